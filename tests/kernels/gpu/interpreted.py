"""Every Triton kernel in the interpreter against float64, and what is really multiplied.

`TRITON_INTERPRET=1 pytest tests/kernels/gpu/interpreted.py`; `tests/kernels/test_gpu.py` runs this file, `steps.py` and
`choices.py` in a process of their own. Outputs are poisoned with NaN before a kernel writes them (`conftest.py`).
The interpreter truncates when it rounds to bfloat16, a GPU does not: hence that tolerance.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from triton.runtime.interpreter import InterpreterBuilder

import vspdf
from vspdf import ledger
from vspdf.errors import UserError
from vspdf.kernels import dense, reference, tuning
from vspdf.kernels.gpu import bitmap, gather, two_four
from vspdf.pattern import Pattern
from vspdf.sparsity.layer import training_state_bytes

sys.path.insert(0, str(Path(__file__).parent))
from emulation import Emulation

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # of the largest value of the result


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
