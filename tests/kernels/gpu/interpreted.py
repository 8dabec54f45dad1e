"""Every Triton kernel in the interpreter against float64. Run: `TRITON_INTERPRET=1 pytest tests/gpu/interpreted.py`.

`tests/test_gpu.py` runs this file in a process of its own. Outputs are poisoned with NaN before a kernel writes them.
The interpreter truncates when it rounds to bfloat16, a GPU does not: hence that tolerance.
"""

import csv
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from triton.runtime.interpreter import InterpreterBuilder

import vspdf
from vspdf import ledger
from vspdf.errors import UserError
from vspdf.kernels import dispatch, ops, reference, tuning
from vspdf.kernels.gpu import launch, two_four
from vspdf.pattern import Pattern

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
    """Output and all gradients of `sparse_linear` on the gather kernels, and grad_values of the sampled GEMM."""
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
    with torch.no_grad():
        assert_close(
            launch.sampled_grad_values(grad, x, pattern)[0], reference.grad_values(wide[3], wide[0], pattern), dtype
        )


@pytest.mark.parametrize("tokens", [0, 1, 67], ids="T={}".format)
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (5, 7), (33, 40)], ids=lambda s: "{}x{}".format(*s))
def test_every_product_is_exact(shape, tokens, dtype):
    pattern = Pattern.random(shape, 0.8 if shape[0] * shape[1] > 400 else 0.5)
    assert_exact(pattern, *draw(pattern, tokens, dtype))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97, 1.0])
def test_every_density(sparsity, dtype):
    pattern = Pattern.random((40, 21), sparsity)
    assert_exact(pattern, *draw(pattern, 5, dtype))


def test_tiles_of_the_sampled_gemm(dtype):
    """More than one tile each way, groups of tiles that do not divide, several token blocks."""
    pattern = Pattern.random((130, 290), 0.9)
    x, _, _, grad = draw(pattern, 70, dtype)
    exact = reference.grad_values(grad.double(), x.double(), pattern)
    assert_close(launch.sampled_grad_values(grad, x, pattern)[0], exact, dtype)


def test_sampled_gemm_takes_tiles_in_groups(monkeypatch):
    monkeypatch.setitem(launch.GEMM, "GROUP", 2)
    pattern = Pattern.random((300, 150), 0.95)
    x, _, _, grad = draw(pattern, 3, torch.float32)
    exact = reference.grad_values(grad.double(), x.double(), pattern)
    assert_close(launch.sampled_grad_values(grad, x, pattern)[0], exact, torch.float32)


def uneven():
    """Empty rows and columns, a full row, a full column: panels are sorted."""
    mask = torch.zeros(130, 120, dtype=torch.bool)
    mask[[2, 40, 70, 100]], mask[:, [3, 40, 70, 100]] = True, True
    return Pattern.from_mask(mask)


def test_uneven_rows_are_sorted_and_exact(dtype):
    pattern = uneven()
    plan = launch.packed(pattern, torch.device("cpu"))
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
    clean = launch.forward(x, values, bias, pattern)[0]
    x[:, 0], x[:, 3] = float("nan"), float("inf")
    assert torch.equal(launch.forward(x, values, bias, pattern)[0], clean)


def test_several_panels_a_program(monkeypatch):
    monkeypatch.setattr(launch, "PROGRAMS", 1)
    pattern = Pattern.random((150, 20), 0.8)
    assert_exact(pattern, *draw(pattern, 33, torch.float32))


def test_offsets_of_64_bits(monkeypatch):
    monkeypatch.setattr(launch, "WIDE", 0)
    pattern = Pattern.random((33, 20), 0.8)
    assert_exact(pattern, *draw(pattern, 33, torch.float32))


def test_sides_above_65536():
    """Column numbers of 17 bits: they do not fit beside a value of 16."""
    mask = torch.zeros(3, 65540, dtype=torch.bool)
    mask[0, 65539] = mask[0, 1] = mask[2, 65536] = True
    pattern = Pattern.from_mask(mask)
    x, values, bias, _ = draw(pattern, 2, torch.bfloat16)
    y, _ = launch.forward(x, values, bias, pattern)
    assert_close(y, reference.forward(x.double(), values.double(), bias.double(), pattern), torch.bfloat16)


def test_few_weights_and_many_tokens_split_the_tokens(dtype):
    pattern = Pattern.random((4, 6), 0.5)
    x, _, _, grad = draw(pattern, 1100, dtype)
    exact = reference.grad_values(grad.double(), x.double(), pattern)
    assert_close(launch.grad_values(grad, x, pattern)[0], exact, dtype)


def test_adds_to_an_output(dtype):
    pattern = Pattern.random((40, 20), 0.9)
    x, values, _, grad = draw(pattern, 7, dtype)
    exact = grad.double() + reference.forward(x.double(), values.double(), None, pattern)
    assert_close(launch.add_forward(x, values, pattern, into=grad)[0], exact, dtype)


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
    counting("create_dot", lambda a, b, *rest: a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
    return count


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("product", ["forward", "grad_input", "grad_values"])
def test_masked_weights_are_not_multiplied_and_the_count_is_true(product, sparsity, multiplied):
    pattern = Pattern.random((64, 160), sparsity)
    x, values, bias, grad = draw(pattern, 64, torch.float32)
    arguments = {"forward": (x, values, bias), "grad_input": (grad, values), "grad_values": (grad, x)}[product]
    multiplied[0] = 0
    _, macs = getattr(launch, product)(*arguments, pattern)
    assert macs == multiplied[0]
    useful = 64 * pattern.nnz
    slack = {0.5: 1.35, 0.9: 2.3, 0.99: 6}[sparsity]  # idle rows of a panel: few columns, uneven rows
    assert useful <= macs <= min(slack * useful, 64 * pattern.numel * 0.8)


def test_sampled_gemm_owns_up_to_multiplying_everything(multiplied):
    pattern = Pattern.random((130, 96), 0.9)
    x, _, _, grad = draw(pattern, 40, torch.float32)
    _, macs = launch.sampled_grad_values(grad, x, pattern)
    assert macs == multiplied[0] == 256 * 128 * 64


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
    plan = launch.packed(pattern, torch.device("cpu"))
    assert plan is launch.packed(pattern, torch.device("cpu"))
    x, values, bias, grad = draw(pattern, 3, torch.float32)
    (
        launch.forward(x, values, bias, pattern),
        launch.grad_input(grad, values, pattern),
        launch.grad_values(grad, x, pattern),
    )
    assert pattern.nnz * 10 <= plan.nbytes <= pattern.nnz * 10 + 4 * (128 + 256 + 2)
    layer = vspdf.SparseLinear(pattern, values)
    state = vspdf.sparsity.layer.training_state_bytes(nn.Sequential(layer))["sparsified"]
    assert state["sparse"] < 0.25 * state["dense"]


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


# -- 2:4 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_24_and_its_residual_are_exact(sparsity, dtype):
    library = Emulation()
    pattern = Pattern.random((48, 64), sparsity)
    for seed in (0, 1):  # new values go to places that were learnt before
        x, values, bias, grad = draw(pattern, 13, dtype, seed)
        values[: pattern.nnz // 3] = 0.0  # zeros among the kept weights keep their places
        wide = [t.double() for t in (x, values, bias, grad)]
        y, macs = two_four.forward(x, values, bias, pattern, library)
        assert_close(y, reference.forward(*wide[:3], pattern), dtype)
        dx, _ = two_four.grad_input(grad, values, pattern, library)
        assert_close(dx, reference.grad_input(wide[3], wide[1], pattern), dtype)
        assert macs >= 16 * pattern.numel // 2  # tokens are padded to 16, half of the positions are multiplied
    assert len([key for key in pattern.packed if key.startswith("2:4") and str(dtype) in key]) == 2


def test_24_learns_more_places_than_a_digit_holds():
    library = Emulation()
    pattern = Pattern.random((192, 256), 0.6)  # some 19,000 weights: three digits of 128
    assert pattern.nnz > 128**2
    layout = two_four.Layout(pattern, np.arange(pattern.nnz), torch.bfloat16, torch.device("cpu"), library)
    values = torch.randn(pattern.nnz).bfloat16()
    fits, rest = two_four.split(pattern)
    expected = reference.materialise(values, pattern) * ~rest.mask()
    assert torch.equal(library.expand(layout.compressed(values), 256), expected)
    assert fits.sum() + rest.nnz == pattern.nnz


@pytest.mark.parametrize("columns", [3, 8, 30])
def test_24_takes_two_of_every_four_and_leaves_the_rest(columns):
    pattern = Pattern.random((20, columns), 0.3)
    fits, rest = two_four.split(pattern)
    mask = pattern.mask()
    taken = torch.zeros_like(mask)
    taken[mask] = torch.from_numpy(fits)
    groups = torch.nn.functional.pad(taken, (0, -columns % 4)).unflatten(1, (-1, 4)).sum(2)
    kept = torch.nn.functional.pad(mask, (0, -columns % 4)).unflatten(1, (-1, 4)).sum(2)
    assert torch.equal(groups, kept.clamp(max=2))
    assert torch.equal(rest.mask(), mask & ~taken)


def test_24_says_why_it_cannot_run():
    pattern = Pattern.random((48, 64), 0.9)
    assert "not fp32" in two_four.unavailable(pattern, "fp32")
    assert "multiples of 16" in two_four.unavailable(Pattern.random((48, 65), 0.9), "bf16")
    assert "cuSPARSELt is not part" in two_four.unavailable(pattern, "bf16")


# -- which path runs, on a GPU that is not here -----------------------------------------------------------------------


@pytest.fixture
def h200(monkeypatch, tmp_path):
    """Dispatch as on an H200, with an empty user cache; returns the choice for a layer."""
    monkeypatch.setenv("VSPDF_CACHE", str(tmp_path))
    monkeypatch.setattr(launch, "device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(tuning, "GPU", tuning._Table(tuning.GpuTiming, tuning._gpu_machine))
    monkeypatch.setattr(dispatch, "_told", set())

    def choice(pattern, product="forward", tokens=16384, dtype=torch.bfloat16):
        return dispatch._choose_gpu(product, pattern, tokens, dtype, torch.device("cpu"))

    return choice


def test_the_model_is_conservative(h200):
    for sparsity, dtype, path in [
        (0.5, torch.bfloat16, "dense"), (0.95, torch.bfloat16, "dense"), (0.998, torch.bfloat16, "triton"),
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


@pytest.mark.parametrize(
    "triton, path",
    [([0.5, 0.5, 0.6], "triton"), ([0.5, 0.5, 0.98], "dense"), ([0.97, 0.97, 0.97], "triton"), ([2, 2, 2], "dense")],
    ids=["faster", "one round is not", "just", "slower"],
)
def test_tuned_paths_must_win_every_round(h200, triton, path):
    pattern = Pattern.random((4096, 1024), 0.95)
    key = tuning.gpu_key("forward", pattern, 16384, torch.bfloat16)
    tuning.tune(key, {"dense": [1.0, 1.0, 1.0], "triton": triton, "2:4": [1.1, 0.9, 1.0]})
    assert h200(pattern).path == path and h200(pattern).reason.startswith("tuned here: triton")
    assert h200(pattern, tokens=16000).path == path  # the same bucket
    assert h200(pattern, tokens=100).reason.startswith("modelled")


def test_the_cache_survives_and_overrules_the_shipped_table(h200, monkeypatch):
    pattern = Pattern.random((4096, 1024), 0.95)
    key = tuning.gpu_key("forward", pattern, 16384, torch.bfloat16)
    shipped = {"NVIDIA H200": {key: [{"dense": 1.0, "2:4": 0.8}, {"2:4": 0.85}]}}
    monkeypatch.setattr(tuning, "shipped", lambda: shipped)
    assert h200(pattern) == ("2:4", "shipped table: 2:4 1.25x (worst round 1.18x) against dense")
    tuning.tune(key, {"dense": [1.0], "triton": [0.5]})
    fresh = tuning._Table(tuning.GpuTiming, tuning._gpu_machine)
    monkeypatch.setattr(tuning, "GPU", fresh)
    assert h200(pattern).path == "triton"
    stored = tuning.choices()
    assert stored[key] == [{"dense": 1.0, "triton": 0.5}, {"triton": 0.5}]
    monkeypatch.setattr(tuning, "GPU", tuning._Table(tuning.GpuTiming, lambda: "another machine"))
    tuning.pin({key: [{"dense": 1.0, "sampled": 0.5}, {"sampled": 0.5}]})
    assert h200(pattern).path == "sampled"


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
    assert {row["candidate"] for row in rows} == {"dense", "triton", "sampled", "cublas", "cusparse", "auto"}
    checked = [row for row in rows if row["product"] != "layer" and row["candidate"] in ("triton", "sampled", "auto")]
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


def test_the_benchmark_keeps_to_its_time(script, capsys):
    assert script("--smoke", "--seconds", "0") == 0
    assert "skipped for lack of time: tiny bf16" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_benchmark_needs_a_gpu(script, capsys):
    assert script() == 2
    assert (
        capsys.readouterr().err == "benchmarks/gpu.py: error: torch sees no CUDA device here; GPU timings need one.\n"
    )
