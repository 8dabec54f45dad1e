"""GELU by our own kernel: against float64, with all derivatives, and where torch's own takes over."""

import pytest
import torch
import torch.nn.functional as F

from vspdf import _C, activation
from vspdf.activation import LEAST, _Gelu, gelu
from vspdf.model import GPT
from vspdf.shapes import Shape

FORMS = ["none", "tanh"]


@pytest.fixture(params=_C.isas())
def isa(request, monkeypatch):
    monkeypatch.setenv("VSPDF_ISA", request.param)


def numbers(n=LEAST + 5, spread=4.0):
    return spread * torch.randn(n, generator=torch.Generator().manual_seed(n))


def poisoned(monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: torch.full_like(x, torch.nan))


def with_gradient(function, x, upstream, **how):
    x = x.detach().requires_grad_()
    y = function(x, **how)
    return y.detach(), torch.autograd.grad(y, x, upstream)[0]


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("more", [0, 1, 3, 15, 20000])
def test_equals_float64_with_its_gradient(approximate, more, isa, monkeypatch):
    x = numbers(LEAST + more)
    upstream = torch.randn(len(x), generator=torch.Generator().manual_seed(1))
    exact = with_gradient(F.gelu, x.double(), upstream.double(), approximate=approximate)
    poisoned(monkeypatch)
    found = with_gradient(gelu, x, upstream, approximate=approximate)
    for mine, right, scale in zip(found, exact, (x, upstream), strict=True):
        assert ((mine - right).abs() <= 3.5e-7 * scale.double().abs()).all()


@pytest.mark.parametrize("approximate", FORMS)
def test_on_a_fine_grid_it_is_as_exact_as_it_says(approximate, isa):
    """Phi within 3e-7, as torch's,, and nothing jumps where the fit ends and the constants begin."""
    x = torch.linspace(-8, 8, 1 << 20)
    exact = with_gradient(F.gelu, x.double(), torch.ones(len(x)).double(), approximate=approximate)
    found = with_gradient(gelu, x, torch.ones(len(x)), approximate=approximate)
    assert ((found[0] - exact[0]).abs() <= 3.5e-7 * x.double().abs()).all()
    assert (found[1] - exact[1]).abs().max() <= 3.5e-7


@pytest.mark.parametrize("approximate", FORMS)
def test_the_ends_of_the_number_line(approximate, isa):
    x = numbers()
    x[:6] = torch.tensor([torch.inf, torch.nan, -0.0, 1e30, -1e30, -7.0])
    y, grad = with_gradient(gelu, x, torch.ones(len(x)), approximate=approximate)
    assert y[0] == torch.inf and y[1].isnan() and y[2] == 0 and y[3] == x[3] and y[4] == 0 and y[5] == 0
    assert grad[0] == 1 and grad[1].isnan() and grad[2] == 0.5 and grad[3] == 1 and grad[4] == 0
    assert not y[2:].isnan().any()


def test_a_number_counts_the_same_wherever_it_stands_and_on_any_threads(isa):
    x = numbers(LEAST + 7)
    whole = gelu(x)
    assert torch.equal(gelu(x.flip(0).contiguous()).flip(0), whole)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(gelu(x), whole)
    finally:
        torch.set_num_threads(before)


def test_shapes_and_strides():
    x = numbers(64 * 256).view(64, 256)
    assert torch.equal(gelu(x), gelu(x.flatten()).view(64, 256))
    assert torch.equal(gelu(x.T), F.gelu(x.T))  # not contiguous: torch's
    upstream = torch.ones(256, 64).T  # a gradient in another order
    whole = with_gradient(gelu, x, torch.ones(64, 256))
    assert torch.equal(with_gradient(gelu, x, upstream)[1], whole[1])
    assert torch.equal(with_gradient(gelu, x, torch.ones(()).expand(64, 256))[1], whole[1])


def test_the_gradient_of_its_gradient():
    x = numbers().double().float().requires_grad_()
    (first,) = torch.autograd.grad(gelu(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    exact = x.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(F.gelu(exact).sum(), exact, create_graph=True)
    (right,) = torch.autograd.grad(right.sum(), exact)
    assert (second - right).abs().max() < 1e-5


def test_batched_gradients_are_those_one_by_one():
    x = numbers().requires_grad_()
    y, many = gelu(x), torch.stack([numbers(spread=1.0), numbers(spread=2.0)])
    found = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)[0]
    single = [torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in many]
    torch.testing.assert_close(found, torch.stack(single))


def test_an_input_edited_before_backward_is_refused():
    x = numbers().requires_grad_()
    hidden = x * 1
    y = gelu(hidden)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "given",
    [lambda x: x.double(), lambda x: x.bfloat16(), lambda x: x[: LEAST - 1], lambda x: x.to("meta")],
    ids=["float64", "bfloat16", "few numbers", "meta"],
)
def test_what_is_not_ours_is_torchs(given, monkeypatch):
    monkeypatch.setattr(activation, "_C", None)  # would fail
    x = given(numbers())
    assert gelu(x).shape == x.shape
    if x.device.type == "cpu":
        assert torch.equal(gelu(x), F.gelu(x))


def test_transforms_meet_torchs():
    x = numbers()
    assert torch.allclose(torch.func.grad(lambda x: gelu(x).sum())(x), with_gradient(F.gelu, x, torch.ones(len(x)))[1])
    assert torch.allclose(torch.func.vmap(gelu)(x.view(1, -1)), F.gelu(x).view(1, -1))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones(len(x)))
        assert torch.autograd.forward_ad.unpack_dual(gelu(dual)).tangent is not None


def test_an_unknown_form_is_refused():
    with pytest.raises(RuntimeError, match="approximate"):
        gelu(numbers(), approximate="tan")


def test_an_unknown_instruction_set_is_said_in_one_line(monkeypatch):
    monkeypatch.setenv("VSPDF_ISA", "avx1024")
    with pytest.raises(ValueError, match=r"VSPDF_ISA: 'avx1024' is no instruction set of the kernels"):
        gelu(numbers())


@pytest.mark.parametrize("mlp", ["gelu", "gelu_tanh"])
def test_models_use_it(mlp, monkeypatch):
    shape = Shape(1, 64, 2, 256, 97, 32, mlp=mlp)
    tokens = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(0))
    model = GPT(shape)
    calls = []
    run = _Gelu.apply
    monkeypatch.setattr(_Gelu, "apply", lambda *inputs: calls.append(inputs) or run(*inputs))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert len(calls) == 1
    mine = model.h[0].mlp.c_fc.weight.grad.clone()
    model.zero_grad()
    monkeypatch.setattr(activation, "LEAST", 1 << 60)
    torchs = model(tokens[:, :-1], tokens[:, 1:])
    torchs.backward()
    assert torch.allclose(loss, torchs, atol=1e-6)
    assert torch.allclose(mine, model.h[0].mlp.c_fc.weight.grad, atol=1e-6)
