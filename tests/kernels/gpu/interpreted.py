"""Every Triton kernel in the interpreter against float64; what a step leaves to the host.

`TRITON_INTERPRET=1 pytest tests/kernels/gpu/interpreted.py`; `tests/kernels/test_gpu.py` runs this file in a process of
its own. Outputs are poisoned with NaN before a kernel writes them.
The interpreter truncates when it rounds to bfloat16, a GPU does not: hence that tolerance.
"""

import csv
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder

import vspdf
from vspdf import ledger
from vspdf.errors import UserError
from vspdf.kernels import cpu, dense, dispatch, ops, reference, tuning
from vspdf.kernels.gpu import bitmap, gather, launch, two_four
from vspdf.pattern import Pattern
from vspdf.sparsity.layer import training_state_bytes

sys.path.insert(0, str(Path(__file__).parent))
from emulation import Emulation

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # of the largest value of the result


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that torch would hand out as it is comes full of NaN."""
    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        plain = getattr(owner, name)

        def poisoned(*args, plain=plain, **kwargs):
            tensor = plain(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

        monkeypatch.setattr(owner, name, poisoned)


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request):
    return request.param


def draw(pattern, tokens, dtype, seed=0):
    """x, values, bias and the output's gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, pattern.in_features), (pattern.nnz,), (pattern.out_features,), (tokens, pattern.out_features)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def assert_close(found, exact, dtype):
    assert found.dtype == dtype and found.shape == exact.shape
    scale = exact.abs().max().item() if exact.numel() else 0.0
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=TOLERANCE[dtype] * scale + 1e-30)


def assert_exact(pattern, x, values, bias, grad):
    """Output and all gradients of `sparse_linear` on the gather kernels."""
    dtype = x.dtype
    leaves = [None if t is None else t.requires_grad_() for t in (x, values, bias)]
    y = vspdf.sparse_linear(x, values, pattern, bias, backend="triton")
    wide = [None if t is None else t.detach().double() for t in (x, values, bias, grad)]
    assert_close(y.detach(), reference.forward(*wide[:3], pattern), dtype)
    grads = torch.autograd.grad(y, [t for t in leaves if t is not None], grad)
    assert_close(grads[0], reference.grad_input(wide[3], wide[1], pattern), dtype)
    assert_close(grads[1], reference.grad_values(wide[3], wide[0], pattern), dtype)
    if bias is not None:
        assert_close(grads[2], wide[3].sum(0), dtype)


@pytest.mark.parametrize("tokens", [0, 1, 67], ids="T={}".format)
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (5, 7), (33, 40)], ids=lambda s: "{}x{}".format(*s))
def test_every_product_is_exact(shape, tokens, dtype):
    pattern = Pattern.random(shape, 0.8 if shape[0] * shape[1] > 400 else 0.5)
    assert_exact(pattern, *draw(pattern, tokens, dtype))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97, 1.0])
def test_every_density(sparsity, dtype):
    pattern = Pattern.random((40, 21), sparsity)
    assert_exact(pattern, *draw(pattern, 5, dtype))


def uneven():
    """Empty rows and columns, a full row, a full column: panels are sorted."""
    mask = torch.zeros(130, 120, dtype=torch.bool)
    mask[[2, 40, 70, 100]], mask[:, [3, 40, 70, 100]] = True, True
    return Pattern.from_mask(mask)


def test_uneven_rows_are_sorted_and_exact(dtype):
    pattern = uneven()
    plan = gather.tables(pattern, torch.device("cpu"))
    assert plan.forward.order is not None and plan.transposed.order is not None
    assert_exact(pattern, *draw(pattern, 9, dtype))


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second row": lambda x: torch.cat([x, x])[::2],
    "every second column": lambda x: torch.stack([x, x], dim=-1).flatten(-2)[..., ::2],
    "broadcast row": lambda x: x[:1].expand_as(x),
    "broadcast everywhere": lambda x: x[:1, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout_of_input_and_gradient(layout):
    pattern = Pattern.random((24, 20), 0.7)
    x, values, bias, grad = draw(pattern, 22, torch.float32)
    assert_exact(pattern, layout(x), values, bias, layout(grad))


def test_batches_strided_values_and_no_bias():
    pattern = Pattern.random((6, 10), 0.5)
    x = torch.randn(3, 4, 10).transpose(0, 1).requires_grad_()
    values = torch.randn(pattern.nnz, 2)[:, 0].requires_grad_()
    y = vspdf.sparse_linear(x, values, pattern, backend="triton")
    y.sum().backward()
    assert_close(y.detach(), x.detach().double() @ reference.materialise(values.detach().double(), pattern).T, x.dtype)
    weight = reference.materialise(values.detach().double(), pattern)
    assert_close(x.grad, weight.sum(0).expand(4, 3, 10), x.dtype)


def test_what_only_masked_weights_would_read_does_not_show(dtype):
    mask = torch.rand(40, 8) < 0.5
    mask[:, 0] = False  # where padding would point
    mask[:, 3] = False
    pattern = Pattern.from_mask(mask)
    x, values, bias, _ = draw(pattern, 5, dtype)
    clean = gather.forward(x, values, bias, pattern)[0]
    x[:, 0], x[:, 3] = float("nan"), float("inf")
    assert torch.equal(gather.forward(x, values, bias, pattern)[0], clean)


def test_several_panels_a_program(monkeypatch):
    monkeypatch.setattr(gather, "PROGRAMS", 1)
    pattern = Pattern.random((150, 20), 0.8)
    assert_exact(pattern, *draw(pattern, 33, torch.float32))


def test_offsets_of_64_bits(monkeypatch):
    monkeypatch.setattr(gather, "WIDE", 0)
    pattern = Pattern.random((33, 20), 0.8)
    assert_exact(pattern, *draw(pattern, 33, torch.float32))


def test_sides_above_65536():
    """Column numbers of 17 bits: they do not fit beside a value of 16."""
    mask = torch.zeros(3, 65540, dtype=torch.bool)
    mask[0, 65539] = mask[0, 1] = mask[2, 65536] = True
    pattern = Pattern.from_mask(mask)
    x, values, bias, _ = draw(pattern, 2, torch.bfloat16)
    y, _ = gather.forward(x, values, bias, pattern)
    assert_close(y, reference.forward(x.double(), values.double(), bias.double(), pattern), torch.bfloat16)


def test_few_weights_and_many_tokens_split_the_tokens(dtype):
    pattern = Pattern.random((4, 6), 0.5)
    x, _, _, grad = draw(pattern, 1100, dtype)
    exact = reference.grad_values(grad.double(), x.double(), pattern)
    assert_close(gather.grad_values(grad, x, pattern)[0], exact, dtype)


# -- what is multiplied -----------------------------------------------------------------------------------------------


@pytest.fixture
def multiplied(monkeypatch):
    """Counts the floating-point multiplications that the interpreter really carries out."""
    count = [0]

    def counting(name, elements):
        plain = getattr(InterpreterBuilder, name)

        def method(self, *args):
            count[0] += elements(*args)
            return plain(self, *args)

        monkeypatch.setattr(InterpreterBuilder, name, method)

    counting("create_fmul", lambda a, b: np.broadcast(a.data, b.data).size)
    counting("create_fma", lambda a, b, c: a.data.size)
    return count


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("product", ["forward", "grad_input", "grad_values"])
def test_masked_weights_are_not_multiplied_and_the_count_is_true(product, sparsity, multiplied):
    pattern = Pattern.random((64, 160), sparsity)
    x, values, bias, grad = draw(pattern, 64, torch.float32)
    arguments = {"forward": (x, values, bias), "grad_input": (grad, values), "grad_values": (grad, x)}[product]
    multiplied[0] = 0
    _, macs = getattr(gather, product)(*arguments, pattern)
    assert macs == multiplied[0]
    useful = 64 * pattern.nnz
    slack = {0.5: 1.35, 0.9: 2.3, 0.99: 6}[sparsity]  # idle rows of a panel: few columns, uneven rows
    assert useful <= macs <= min(slack * useful, 64 * pattern.numel * 0.8)


def test_ledger_gets_what_was_executed():
    pattern = Pattern.random((64, 128), 0.9)
    x, values, bias, grad = draw(pattern, 32, torch.float32)
    with ledger.counting() as tally:
        vspdf.sparse_linear(x, values.requires_grad_(), pattern, bias, backend="triton").backward(grad)
    useful = 2 * 32 * pattern.nnz
    for count in tally.products.values():
        assert count.dense == 2 * 32 * pattern.numel and count.useful == useful
        assert useful < count.executed < 0.3 * count.dense


# -- around it --------------------------------------------------------------------------------------------------------


def test_plans_are_kept_and_small():
    pattern = Pattern.random((128, 256), 0.9)
    plan = gather.tables(pattern, torch.device("cpu"))
    assert plan is gather.tables(pattern, torch.device("cpu"))
    x, values, bias, grad = draw(pattern, 3, torch.float32)
    (
        gather.forward(x, values, bias, pattern),
        gather.grad_input(grad, values, pattern),
        gather.grad_values(grad, x, pattern),
    )
    assert pattern.nnz * 10 <= plan.nbytes <= pattern.nnz * 10 + 4 * (128 + 256 + 2)


def test_float64_is_refused_and_a_layer_learns():
    pattern = Pattern.random((6, 8), 0.5)
    with pytest.raises(UserError, match=r"backend 'triton' cannot run: no kernel for torch.float64"):
        vspdf.sparse_linear(torch.ones(2, 8).double(), torch.ones(pattern.nnz).double(), pattern, backend="triton")
    layer = vspdf.SparseLinear.from_linear(nn.Linear(8, 6), pattern, backend="triton")
    x, before = torch.randn(5, 8), None
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for _ in range(3):
        loss = layer(x).square().sum()
        assert before is None or loss < before
        before = loss.detach()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert vspdf.explain(layer, tokens=5).count("triton chose triton: asked for") == 3


# -- dense: weights spread out, gradients collected -------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """As on an H200: no C++ kernels for its tensors, choices as for a GPU, nothing tuned."""
    monkeypatch.setenv("VSPDF_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "takes", lambda tensor: False)
    monkeypatch.setattr(launch, "device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(tuning, "GPUS", {})
    choose = lambda product, pattern, tokens, dtype, device, backend, tune=None, wide=False: (  # noqa: E731
        dispatch._choose_gpu(product, pattern, tokens, dtype, device)
    )
    monkeypatch.setattr(ops, "choose", choose)


SHAPES = [(1, 1), (1, 70), (20, 1), (5, 7), (33, 40), (3, 1056), (2, 2100)]


def test_weights_of_a_side_above_65536_are_spread_out():
    pattern = Pattern.random((2, 65600), 0.8)
    values = torch.randn(pattern.nnz)
    assert torch.equal(bitmap.expand(values, pattern, torch.float32), reference.materialise(values, pattern))
    assert bitmap.bitmap(pattern, torch.device("cpu")).before.dtype == torch.int32


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "{}x{}".format(*s))
@pytest.mark.parametrize("sparsity", [0.0, 0.8, 1.0])
def test_weights_are_spread_out_and_collected(shape, sparsity):
    pattern = Pattern.random(shape, sparsity, seed=4)
    for given, wanted in [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "fp16")]:
        values = torch.randn(pattern.nnz).to(DTYPES[given])
        weight = bitmap.expand(values, pattern, DTYPES[wanted])
        assert_close(weight, reference.materialise(values.double(), pattern), DTYPES[wanted])
        full = torch.randn(shape[::-1]).to(DTYPES[given]).T  # not contiguous
        assert_close(
            bitmap.sample(full, pattern, DTYPES[wanted]), reference.sample(full, pattern).double(), DTYPES[wanted]
        )


def test_strided_values_are_spread_out():
    pattern = Pattern.random((12, 20), 0.5)
    values = torch.randn(pattern.nnz, 3)[:, 1]
    assert torch.equal(bitmap.expand(values, pattern, values.dtype), reference.materialise(values, pattern))


def test_the_bitmap_takes_three_sixteenths_of_a_byte():
    pattern = Pattern.random((256, 512), 0.9)
    found = bitmap.bitmap(pattern, torch.device("cpu"))
    assert found is bitmap.bitmap(pattern, torch.device("cpu"))
    assert found.nbytes == 3 * pattern.numel // 16 + 4 * 257
    model = nn.Sequential(vspdf.SparseLinear(pattern, torch.zeros(pattern.nnz)))
    gather.tables(pattern, torch.device("cpu")).prepare()
    state = training_state_bytes(model)
    assert state["paths"]["dense"] == state["paths"]["2:4"] == 16 * pattern.nnz + found.nbytes - 4 * 257
    assert state["paths"]["triton"] == 16 * pattern.nnz + 10 * pattern.nnz
    assert gather.tables(pattern, torch.device("cpu")).nbytes == 10 * pattern.nnz + 4 * (257 + 513)
    for sparsity, expected in [(0.9, 1.8), (0.75, 4.2)]:
        model = nn.Sequential(nn.Linear(1024, 512, bias=False), nn.ReLU(), nn.Linear(512, 1024, bias=False))
        vspdf.sparsify(model, sparsity)
        assert training_state_bytes(model)["paths"]["dense"] / 2**20 == pytest.approx(expected, abs=0.02)


def test_the_dense_path_is_exact_on_a_gpu(gpu, dtype):
    pattern = Pattern.random((48, 40), 0.75)
    x, values, bias, grad = draw(pattern, 9, dtype)
    wide = [t.double() for t in (x, values, bias, grad)]
    tolerance = torch.bfloat16 if dtype == torch.bfloat16 else dtype
    assert_close(dense.forward(x, values, bias, pattern), reference.forward(*wide[:3], pattern), tolerance)
    assert_close(dense.grad_input(grad, values, pattern), reference.grad_input(wide[3], wide[1], pattern), tolerance)
    found = dense.grad_values(grad, x, pattern, torch.float32)
    assert_close(found.to(dtype), reference.grad_values(wide[3], wide[0], pattern), tolerance)


class Watch(TorchDispatchMode):
    """What torch is asked to do below autograd."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


WAITS = {  # what reads from a device, or whose result's size does; what copies from the host
    "_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal", "bincount",
    "sort", "lift_fresh", "lift_fresh_copy", "_pin_memory",
}  # fmt: skip


@pytest.mark.parametrize("backend, sparsity", [("auto", 0.75), ("triton", 0.9)])
def test_host_work_is_done_once_per_pattern(gpu, monkeypatch, backend, sparsity):
    """Three steps of two layers: patterns go over to the device in the first, nothing does afterwards."""
    if backend == "triton":
        monkeypatch.setattr(ops, "choose", dispatch.choose)
    counts, step = {}, [0]

    def count(owner, name):
        plain = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[step[0], name] = counts.get((step[0], name), 0) + 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for owner, names in {
        Pattern: ("positions", "mask", "csr", "_flat"), np: ("unpackbits", "flatnonzero", "nonzero", "argsort"),
        torch: ("from_numpy",), bitmap: ("unpacked",),
    }.items():  # fmt: skip
        for name in names:
            count(owner, name)
    patterns = [Pattern.random(shape, sparsity, seed=9) for shape in ((48, 40), (32, 48))]
    layers = [vspdf.SparseLinear(p, torch.randn(p.nnz), backend=backend) for p in patterns]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step[0] in range(3):
        with Watch() as watch:
            model(torch.ones(8, 40, requires_grad=True)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if step[0]:
            assert not WAITS & set(watch.seen)
    assert {name for _, name in counts} <= {"from_numpy", "unpacked", "_flat", "unpackbits", "mask"}
    later = {key: n for key, n in counts.items() if key[0] and key[1] != "from_numpy"}
    assert not later, "host work after the first step"
    if backend == "auto":
        assert counts[0, "unpacked"] == 2, "once per pattern and device"


def test_without_triton_positions_go_over_once(monkeypatch):
    """A GPU with no Triton, or float64: torch indexes by positions that stay on the device."""
    monkeypatch.setattr(cpu, "takes", lambda tensor: False)
    monkeypatch.setattr(launch, "takes", lambda tensor: False)
    calls = []
    plain = Pattern.positions
    monkeypatch.setattr(Pattern, "positions", lambda self: calls.append(self) or plain(self))
    pattern = Pattern.random((24, 16), 0.75, seed=5)
    x, values, bias, grad = draw(pattern, 9, torch.float64)
    for _ in range(3):
        dense.forward(x, values, bias, pattern)
        dense.grad_input(grad, values, pattern)
        dense.grad_values(grad, x, pattern)
    assert calls == [pattern]


def test_the_gradient_is_packed_once_for_two_products(monkeypatch):
    pattern = Pattern.random((24, 40), 0.8)
    x, values, bias, grad = draw(pattern, 9, torch.float32)
    packed = []
    plain = launch.kernels().pack_activations

    class Counting:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: (packed.append(args[1].data_ptr()), plain[grid](*args, **kwargs))

    monkeypatch.setattr(launch.kernels(), "pack_activations", Counting())
    y = vspdf.sparse_linear(x.requires_grad_(), values.requires_grad_(), pattern, bias, backend="triton")
    torch.autograd.grad(y, (x, values), grad)
    assert packed == [x.data_ptr(), grad.data_ptr(), x.data_ptr()]
    assert gather.packed_once.made is None, "nothing is kept"


# -- 2:4 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9, 1.0])
def test_24_is_exact(gpu, sparsity, dtype):
    library = Emulation()
    pattern = Pattern.random((48, 64), sparsity, fits="2:4")
    for seed, tokens in ((0, 13), (1, 16)):
        x, values, bias, grad = draw(pattern, tokens, dtype, seed)
        values[: pattern.nnz // 3] = 0.0  # zeros among the kept weights
        wide = [t.double() for t in (x, values, bias, grad)]
        y, macs = two_four.forward(x, values, bias, pattern, library)
        assert_close(y, reference.forward(*wide[:3], pattern), dtype)
        dx, _ = two_four.grad_input(grad, values, pattern, library)
        assert_close(dx, reference.grad_input(wide[3], wide[1], pattern), dtype)
        assert macs == 16 * pattern.numel // 2  # tokens are padded to 16, half of the positions are multiplied


def test_24_uses_the_algorithm_that_was_searched(monkeypatch):
    monkeypatch.setattr(tuning, "find_gpu", lambda device, key: (tuning.GpuTiming({}, {}, 5), "tuned here"))
    library = Emulation()
    pattern = Pattern.random((32, 32), 0.5, seed=2, fits="2:4")
    x, values, bias, grad = draw(pattern, 8, torch.bfloat16)
    two_four.forward(x, values, bias, pattern, library)
    assert library.algorithms == [5], "of the table"
    assert two_four.search("grad_input", grad, values, pattern, library) == library.best == 3
    two_four.grad_input(grad, values, pattern, library)
    two_four.forward(x, values, bias, pattern, library)
    assert library.algorithms == [5, 3, 5]


def test_24_says_why_it_cannot_run(monkeypatch):
    device = torch.device("cuda", 0)
    pattern = Pattern.random((48, 64), 0.9, fits="2:4")
    assert "not fp32" in two_four.unavailable(pattern, "fp32", device)
    assert "multiples of 16" in two_four.unavailable(Pattern.random((48, 65), 0.9), "bf16", device)
    assert 'fits="2:4"' in two_four.unavailable(Pattern.random((48, 64), 0.5), "bf16", device)
    sides = torch.zeros(16, 16, dtype=torch.bool)
    sides[:3, 0] = True
    for mask in (sides, sides.T):
        assert 'fits="2:4"' in two_four.unavailable(Pattern.from_mask(mask.contiguous()), "bf16", device)
    assert "cuSPARSELt is not part" in two_four.unavailable(pattern, "bf16", device)
    monkeypatch.setattr(two_four, "_device", [])
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    capability = {0: (9, 0), 1: (9, 0), 2: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[device.index])
    assert two_four.unavailable(pattern, "bf16", device) is None
    assert "capability 8.0" in two_four.unavailable(pattern, "bf16", torch.device("cuda", 2))
    monkeypatch.setattr(two_four, "_device", [device])
    assert two_four.unavailable(pattern, "bf16", device) is None
    assert "one device of a process, here cuda:0" in two_four.unavailable(pattern, "bf16", torch.device("cuda", 1))


def test_cusparselt_is_called_as_torch_binds_it():
    """Names and arguments of torch's own schemas, which this torch has though it has no GPU."""
    known = lambda name: {a.name for a in getattr(torch.ops.aten, name).default._schema.arguments}  # noqa: E731
    assert {"compressed_A", "dense_B", "bias", "transpose_result", "alg_id"} <= known("_cslt_sparse_mm")
    assert {"compressed_A", "dense_B", "transpose_result"} <= known("_cslt_sparse_mm_search")
    assert known("_cslt_compress") == {"input"}


# -- which path runs, on a GPU that is not here -----------------------------------------------------------------------


@pytest.fixture
def h200(monkeypatch, tmp_path):
    """Dispatch as on an H200, with an empty user cache; returns the choice for a layer."""
    monkeypatch.setenv("VSPDF_CACHE", str(tmp_path))
    monkeypatch.setattr(launch, "device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(tuning, "GPUS", {})
    monkeypatch.setattr(tuning, "_pinned", {})
    monkeypatch.setattr(dispatch, "_told", set())

    def choice(pattern, product="forward", tokens=16384, dtype=torch.bfloat16):
        return dispatch._choose_gpu(product, pattern, tokens, dtype, torch.device("cpu"))

    return choice


def test_the_model_is_conservative(h200):
    for sparsity, dtype, path in [
        (0.5, torch.bfloat16, "dense"), (0.993, torch.bfloat16, "dense"), (0.998, torch.bfloat16, "triton"),
        (0.5, torch.float32, "dense"), (0.98, torch.float32, "triton"),
    ]:  # fmt: skip
        choice = h200(Pattern.random((4096, 1024), sparsity), dtype=dtype)
        assert choice.path == path and "modelled, not measured" in choice.reason
    assert h200(Pattern.random((64, 64), 0.9), dtype=torch.float64) == (
        "dense",
        launch.refusal(torch.float64, torch.device("cpu")),
    )


def test_an_unknown_device_runs_dense_until_it_is_tuned(h200, monkeypatch):
    monkeypatch.setattr(launch, "device_name", lambda device=None: "Unheard-of 9000")
    choice = h200(Pattern.random((4096, 1024), 0.999))
    assert choice.path == "dense" and "vspdf bench linear --device cuda --tune" in choice.reason


def test_the_log_tells_each_choice_once(h200, caplog):
    caplog.set_level("INFO", "vspdf")
    pattern = Pattern.random((4096, 1024), 0.95)
    for _ in range(3):
        h200(pattern)
    (line,) = caplog.messages
    assert line.startswith("forward T=16384 in=1024 out=4096 sparsity=0.950 bf16: dense: modelled, not measured")


def keep(key, rounds):
    tuning.keep(key, tuning.timing(rounds), torch.device("cpu"))


def test_a_tuned_24_is_not_taken_for_other_masks(h200):
    pattern = Pattern.random((4096, 1024), 0.75)
    keep(tuning.gpu_key("forward", pattern, 16384, torch.bfloat16), {"dense": [1.0], "2:4": [0.5]})
    assert h200(pattern).path == "dense"


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S"])
def test_no_gather_below_994_on_data_centre_cards_in_16_bit(h200, monkeypatch, name):
    monkeypatch.setattr(launch, "device_name", lambda device=None: name)
    for product in ("forward", "grad_input", "grad_values"):
        assert h200(Pattern.random((8192, 2048), 0.9935), product).path == "dense"


def test_machines_have_gpus_of_different_kinds(h200, monkeypatch):
    pattern = Pattern.random((4096, 1024), 0.95)
    key = tuning.gpu_key("forward", pattern, 16384, torch.bfloat16)
    keep(key, {"dense": [1.0], "triton": [0.5]})
    assert h200(pattern).path == "triton"
    monkeypatch.setattr(launch, "device_name", lambda device=None: "NVIDIA A100-SXM4-80GB")
    assert h200(pattern).path == "dense"


@pytest.mark.parametrize(
    "triton, path",
    [([0.5, 0.5, 0.6], "triton"), ([0.5, 0.5, 0.98], "dense"), ([0.97, 0.97, 0.97], "triton"), ([2, 2, 2], "dense")],
    ids=["faster", "one round is not", "just", "slower"],
)
def test_tuned_paths_must_win_every_round(h200, triton, path):
    pattern = Pattern.random((4096, 1024), 0.95)
    key = tuning.gpu_key("forward", pattern, 16384, torch.bfloat16)
    keep(key, {"dense": [1.2, 1.2, 1.2], "cublas": [1.0, 1.0, 1.0], "triton": triton, "2:4": [1.1, 0.9, 1.0]})
    assert h200(pattern).path == path and h200(pattern).reason.startswith("tuned here: triton")
    assert h200(pattern, tokens=16000).path == path  # the same bucket
    assert h200(pattern, tokens=100).reason.startswith("modelled")


def test_the_cache_survives_and_overrules_the_shipped_table(h200, monkeypatch):
    pattern = Pattern.random((4096, 1024), 0.95)
    key = tuning.gpu_key("forward", pattern, 16384, torch.bfloat16)
    shipped = {"NVIDIA H200": {key: [{"dense": 1.0, "triton": 0.8}, {"triton": 0.85}]}}
    monkeypatch.setattr(tuning, "shipped", lambda: shipped)
    assert h200(pattern) == ("triton", "shipped table: triton 1.25x (worst round 1.18x) against dense")
    keep(key, {"dense": [1.0], "triton": [2.0]})
    monkeypatch.setattr(tuning, "GPUS", {})
    assert h200(pattern).path == "dense"
    stored = tuning.choices()
    assert stored[key] == [{"dense": 1.0, "triton": 2.0}, {"triton": 2.0}, 0]
    tuning.pin({key: [{"dense": 1.0, "triton": 0.5}, {"triton": 0.5}]})
    assert h200(pattern).path == "triton"
    monkeypatch.setattr(launch, "device_name", lambda device=None: "NVIDIA A100-SXM4-80GB")
    assert h200(pattern).path == "triton", "a resumed run goes on as it began, whatever it runs on"


def test_the_shipped_table_can_be_read():
    assert isinstance(tuning.shipped(), dict)
    for table in tuning.shipped().values():
        for columns in table.values():
            assert tuning.GpuTiming(*columns).choice("shipped table").path in ops.PATHS


# -- benchmarks/gpu.py ------------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch, tmp_path):
    """benchmarks/gpu.py on tiny layers: status of `main` with further arguments."""
    spec = spec_from_file_location("gpu_benchmark", Path(__file__).parents[3] / "benchmarks" / "gpu.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ORDER", ("bf16", "fp32"))
    monkeypatch.setattr(module, "ODD", [(7, 20, 33, 0.8)])
    monkeypatch.setattr(module, "SMOKE", [module.Cell("tiny", 8, 20, 33, 0.9)])

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path), *arguments])
        return module.main()

    main.module = module
    return main


def test_the_benchmark_writes_what_it_found(script, tmp_path, capsys):
    assert script("--smoke") == 0
    rows = list(csv.DictReader((tmp_path / "gpu.csv").open()))
    assert {row["product"] for row in rows} == {"forward", "grad_input", "grad_values", "layer"}
    assert {row["candidate"] for row in rows} == {
        "dense", "triton", "cublas", "expand alone", "sample alone", "cusparse", "auto",
    }  # fmt: skip
    (table,) = json.loads((tmp_path / "gpu_tuning.json").read_text()).values()
    assert len(table) == 6 and all(tuning.GpuTiming(*columns).choice() for columns in table.values())
    checked = [row for row in rows if row["product"] != "layer" and row["candidate"] in ("triton", "dense", "auto")]
    assert checked and all(float(row["error"]) < 1e-2 for row in checked)
    assert all(row["torch"] == torch.__version__ and row["device"] for row in rows)
    assert (tmp_path / "gpu.png").stat().st_size > 5000
    assert "the figures mean nothing" in capsys.readouterr().out


def test_the_benchmark_finds_wrong_results(script, monkeypatch, capsys):
    monkeypatch.setattr(script.module, "ORDER", ("bf16",))
    right = ops.PATHS["triton"]["forward"]
    monkeypatch.setitem(ops.PATHS["triton"], "forward", lambda *a: (right(*a)[0] + 1, 0))
    assert script("--smoke") == 1
    assert "WRONG: triton forward bf16" in capsys.readouterr().out


def test_the_bars_are_what_the_page_promises(script):
    row = {"cell": "c", "precision": "bf16", "product": "layer", "candidate": "dense", "ratio_to_dense": 0.975}
    row |= {"bytes_sparse": 1040, "bytes_promised": 1000}
    assert script.module.bars([row]) == []
    slow, large = row | {"ratio_to_dense": 0.96}, row | {"bytes_sparse": 1060}
    assert script.module.bars([slow]) == ["c: dense takes 1.042 times as long as cuBLAS"]
    assert script.module.bars([large]) == ["c: a state of 1,060 bytes, promised 1,000"]
    assert script.module.bars([slow | {"precision": "fp32"}, slow | {"candidate": "triton"}]) == []


def test_the_benchmark_times_float32_as_it_is_told(script):
    """Whichever of torch's two settings the user has written, and puts it back."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with script.module.precision("fp32"):
            assert not launch.tf32()
        assert launch.tf32()
    finally:
        matmul.fp32_precision = before


def test_the_benchmark_keeps_to_its_time(script, capsys):
    assert script("--smoke", "--seconds", "0") == 0
    assert "skipped for lack of time: tiny bf16" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_benchmark_needs_a_gpu(script, capsys):
    assert script() == 2
    assert (
        capsys.readouterr().err == "benchmarks/gpu.py: error: torch sees no CUDA device here; GPU timings need one.\n"
    )
