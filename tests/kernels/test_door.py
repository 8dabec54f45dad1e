"""The door in C++: the usual call goes through it, whatever is unusual is left to the operators in Python."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

import vspdf
from vspdf import ledger
from vspdf.errors import UserError
from vspdf.kernels import cpu, derivatives, dispatch, ops, tuning
from vspdf.pattern import Pattern

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason="the kernels are not built")

PRODUCTS = ("linear", "grad_input", "grad_values")
KINDS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32 weights beside bf16": (torch.bfloat16, torch.float32),
}


@pytest.fixture
def pattern():
    return Pattern.random((33, 47), 0.7, seed=7)


def tensors(pattern, *leading, dtype=torch.float32, kept=torch.float32):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    x, dy = draw(*leading, pattern.in_features).to(dtype), draw(*leading, pattern.out_features).to(dtype)
    return x, dy, draw(pattern.nnz).to(kept), draw(pattern.out_features).to(kept)


def inputs(product, x, dy, values, bias):
    """What the product takes, in the door's order."""
    if product == "linear":
        return x, values, bias
    return (dy, values, None) if product == "grad_input" else (dy, x, values.dtype)


def through(product, pattern, given, backend="cpu"):
    """The door's own answer."""
    return cpu.door(PRODUCTS.index(product), *given, pattern.digest, backend)


def operator(product, pattern, given, backend="cpu"):
    taken = given[:2] if product == "grad_input" else given
    if product == "grad_values":
        return ops.grad_values(*given[:2], pattern.digest, backend, given[2])
    return getattr(ops, product)(*taken, pattern.digest, backend)


@pytest.mark.parametrize("leading", [(), (1,), (13,), (0,), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_the_second_call_is_answered_and_equal(product, kind, leading, pattern):
    dtype, kept = KINDS[kind]
    given = inputs(product, *tensors(pattern, *leading, dtype=dtype, kept=kept))
    assert through(product, pattern, given) is None, "open before anybody chose"
    with ledger.counting() as slow:
        first = operator(product, pattern, given)
    with ledger.counting() as fast:
        second = through(product, pattern, given)
    assert second.dtype == first.dtype and second.shape == first.shape and not second._is_view()
    assert torch.equal(first, second)
    strip = lambda tally: {name: count.flops() for name, count in tally.products.items()}  # noqa: E731
    assert strip(slow) == strip(fast)


def test_users_go_through_it(pattern, monkeypatch):
    x, dy, values, bias = tensors(pattern, 5)
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    run = lambda: torch.autograd.grad(vspdf.sparse_linear(x, values, pattern, bias), leaves, dy)  # noqa: E731
    first = run()
    monkeypatch.setattr(derivatives, "RUN", {})  # the operators in Python
    assert all(map(torch.equal, first, run()))


UNUSUAL = {
    "a slice": lambda x, v, b: (x.repeat(1, 2)[:, : x.shape[1]], v, b),
    "transposed": lambda x, v, b: (x.T.contiguous().T, v, b),
    "another length": lambda x, v, b: (x[:4], v, b),
    "a gradient of x": lambda x, v, b: (x.requires_grad_(), v, b),
    "a gradient of values": lambda x, v, b: (x, v.requires_grad_(), b),
    "a gradient of bias": lambda x, v, b: (x, v, b.requires_grad_()),
    "no device": lambda x, v, b: (x.to("meta"), v, b),
    "a subclass": lambda x, v, b: (x.as_subclass(type("Mine", (torch.Tensor,), {})), v, b),
    "a promise to negate": lambda x, v, b: (torch.complex(x, x).conj().imag, v, b),
    "zeros that are not there": lambda x, v, b: (torch._efficientzerotensor(x.shape), v, b),
    "a sparse tensor": lambda x, v, b: (x.to_sparse(), v, b),
    "other tokens": lambda x, v, b: (x.double(), v, b),
    "bf16 beside fp32": lambda x, v, b: (x, v.bfloat16(), b),
    "too few values": lambda x, v, b: (x, v[:-1], b),
    "a matrix of values": lambda x, v, b: (x, v[None], b),
    "a short bias": lambda x, v, b: (x, v, b[:-1]),
    "a wide bias": lambda x, v, b: (x, v, b.double()),
    "too wide": lambda x, v, b: (torch.cat([x, x], 1), v, b),
    "no size": lambda x, v, b: (x[0, 0], v, b),
    "no tensor": lambda x, v, b: (None, v, b),
    "a list": lambda x, v, b: (x, v.tolist(), b),
}


@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_unusual_is_left_to_the_operators(change, pattern):
    x, _, values, bias = tensors(pattern, 5)
    operator("linear", pattern, (x, values, bias))
    assert through("linear", pattern, (x, values, bias)) is not None
    assert through("linear", pattern, change(x, values, bias)) is None


def test_who_looks_on_gets_to_see_it(pattern):
    x, _, values, bias = tensors(pattern, 5)
    given = (x, values, bias)
    operator("linear", pattern, given)
    seen = []
    call = lambda t: (seen.append(through("linear", pattern, (x, values, bias))), t.sum())[1]  # noqa: E731
    with FlopCounterMode(display=False):
        call(x)
    grad(call)(x)
    vmap(call)(x)
    with torch.autograd.forward_ad.dual_level():
        call(x)
    with torch.profiler.profile():
        call(x)
    torch.jit.trace(call, x, check_trace=False)
    assert seen == [None] * 6 and through("linear", pattern, given) is not None


def test_other_threads_and_backends_choose_for_themselves(pattern):
    given = inputs("linear", *tensors(pattern, 5))
    operator("linear", pattern, given)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert through("linear", pattern, given) is None
    finally:
        torch.set_num_threads(threads)
    assert through("linear", pattern, given) is not None
    for backend in ("auto", "reference", "gpu", ""):
        assert through("linear", pattern, given, backend) is None
    assert through("linear", Pattern.random((33, 47), 0.7, seed=8), given) is None


def test_it_shuts_when_choices_are_open_again(pattern):
    given = inputs("linear", *tensors(pattern, 5))
    for reopen in (tuning.forget, lambda: tuning.pin({}), lambda: dispatch.set_memory(pattern, "low")):
        operator("linear", pattern, given)
        assert through("linear", pattern, given) is not None
        reopen()
        assert through("linear", pattern, given) is None


def test_an_open_door_hides_no_mistake(pattern):
    x, _, values, bias = tensors(pattern, 5)
    operator("linear", pattern, (x, values, bias))
    with pytest.raises(UserError, match=r"values of shape \(\d+,\) do not fit"):
        vspdf.sparse_linear(x, values[:-1], pattern, bias, backend="cpu")
    with pytest.raises(UserError, match="unknown backend 'cpus'"):
        vspdf.sparse_linear(x, values, pattern, bias, backend="cpus")


def test_plans_end_with_their_patterns():
    gc.collect()
    before = cpu.extension().open_plans()
    for seed in range(20):
        moved = Pattern.random((16, 16), 0.5, seed=1000 + seed)
        vspdf.sparse_linear(torch.ones(2, 16), torch.ones(moved.nnz), moved)
        assert cpu.extension().open_plans() >= before + 1
    del moved
    gc.collect()
    assert cpu.extension().open_plans() == before
