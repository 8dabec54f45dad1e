"""Dense products by either library against float64, and where torch's own takes over."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vspdf import gemm
from vspdf.model import GPT
from vspdf.shapes import Shape

onednn = pytest.mark.skipif(gemm.library() != "oneDNN", reason="torch's MKL multiplies as fast on this processor")
LARGE = [(1024, 96, 288), (1100, 131, 257), (517, 257, 131)]


def inputs(T, I, O, bias=True, layout="rows"):  # noqa: E741
    generator = torch.Generator().manual_seed(T + I)
    x = torch.randn(T, I, generator=generator) if layout == "rows" else torch.randn(I, T, generator=generator).T
    if layout == "sequences":
        x = torch.randn(2, T // 2, I, generator=generator)
    return x, torch.randn(O, I, generator=generator), torch.randn(O, generator=generator) if bias else None


def with_gradients(linear, given, upstream):
    given = [None if x is None else x.detach().requires_grad_() for x in given]
    y = linear(*given)
    return y.detach(), *torch.autograd.grad(y, [x for x in given if x is not None], upstream)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", ["rows", "columns", "sequences"])
@pytest.mark.parametrize("T, I, O", [*LARGE, (3, 5, 7), (0, 8, 8)])
def test_equals_float64_with_gradients(T, I, O, layout, bias):  # noqa: E741
    given = inputs(T, I, O, bias, layout)
    upstream = torch.randn(*given[0].shape[:-1], O, generator=torch.Generator().manual_seed(1))
    found = with_gradients(gemm.linear, given, upstream)
    exact = with_gradients(F.linear, [None if x is None else x.double() for x in given], upstream.double())
    for mine, right in zip(found, exact, strict=True):
        assert mine.shape == right.shape and mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=2e-6 * max(T, I, O) if mine.numel() else 0)


def test_a_gradient_without_strides_of_its_own():
    given = inputs(1024, 96, 288)
    upstream = torch.ones(()).expand(1024, 288)  # of a sum
    for mine, torchs in zip(
        with_gradients(gemm.linear, given, upstream), with_gradients(F.linear, given, upstream), strict=True
    ):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-3)


def test_only_the_gradients_that_are_wanted():
    x, weight, bias = inputs(1024, 96, 288)
    gemm.linear(x, weight.requires_grad_(), bias).sum().backward()
    assert weight.grad is not None and x.grad is None and bias.grad is None


def test_a_gradient_can_be_differentiated_again():
    def second(linear):
        x, weight, bias = (part.requires_grad_() for part in inputs(1024, 96, 288))
        first = torch.autograd.grad(linear(x, weight, bias).square().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in first), (x, weight, bias))

    for mine, torchs in zip(second(gemm.linear), second(F.linear), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4 * float(torchs.abs().max()))


@onednn
def test_the_same_product_twice_is_the_same_to_the_last_bit():
    given, upstream = inputs(1024, 128, 512), torch.randn(1024, 512)
    for one, other in zip(*(with_gradients(gemm.linear, given, upstream) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@onednn
def test_batches_keep_the_digits_of_float32():
    assert gemm.full_precision()
    a, b = torch.randn(4, 70, 90), torch.randn(4, 90, 50)
    with gemm.by_onednn():
        found = torch.bmm(a, b)
    torch.testing.assert_close(found.double(), a.double() @ b.double(), rtol=0, atol=2e-5)


@onednn
def test_a_library_that_cuts_digits_is_not_taken(monkeypatch):
    monkeypatch.setattr(torch, "bmm", lambda a, b: (a.bfloat16() @ b.bfloat16()).float())
    assert not gemm.full_precision.__wrapped__()


def runs_by(call):
    """Names of the operators that ran in a call."""
    with torch.profiler.profile() as profile:
        call()
    return {event.key for event in profile.key_averages()}


@onednn
def test_large_products_run_by_the_library_forward_and_backward():
    x, weight, bias = (part.requires_grad_() for part in inputs(*LARGE[0]))
    assert "mkldnn::_linear_pointwise" in runs_by(lambda: gemm.linear(x, weight, bias))
    y = gemm.linear(x, weight, bias)
    keys = runs_by(lambda: y.sum().backward())
    assert "mkldnn::_linear_pointwise" in keys and "aten::mm" not in keys and "aten::addmm" not in keys


@pytest.mark.parametrize("how", ["small", "bfloat16", "float64", "autocast", "vmap", "mkldnn off"])
def test_torch_multiplies_where_the_library_does_not(how):
    x, weight, _ = inputs(*((8, 16, 16) if how == "small" else LARGE[0]))
    if how in ("bfloat16", "float64"):
        x, weight = (part.to(getattr(torch, how)) for part in (x, weight))

    def call():
        if how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return gemm.linear(x, weight)
        if how == "vmap":
            return torch.func.vmap(lambda row: gemm.linear(row, weight))(x)
        with torch.backends.mkldnn.flags(enabled=how != "mkldnn off"):
            return gemm.linear(x, weight)

    assert "mkldnn::_linear_pointwise" not in runs_by(call)


@pytest.mark.parametrize("variable", ["ATEN_CPU_CAPABILITY", "VSPDF_ISA", None], ids=str)
def test_what_holds_to_avx2_holds_to_mkl(variable, monkeypatch):
    capability = "AVX2" if variable == "ATEN_CPU_CAPABILITY" else "AVX512"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(gemm, "_processor", lambda: ("AuthenticAMD", 26))
    monkeypatch.setenv("VSPDF_ISA", "avx2" if variable == "VSPDF_ISA" else "")
    assert gemm.library.__wrapped__() == ("MKL" if variable or not torch.backends.mkldnn.is_available() else "oneDNN")


@pytest.mark.parametrize("processor", [("GenuineIntel", 26), ("AuthenticAMD", 25), ("", 0)], ids=str)
def test_other_processors_stay_with_mkl(processor, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(gemm, "_processor", lambda: processor)
    assert gemm.library.__wrapped__() == "MKL"


def test_flops_are_counted_as_torch_counts_them():
    shape = Shape(1, 128, 4, 512, 257, 64)
    model, tokens = GPT(shape), torch.zeros(8, 64, dtype=torch.int64)
    counts = []
    for project in (gemm.linear, F.linear):
        model.project = project
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.__class__ = gemm.Linear if project is gemm.linear else torch.nn.Linear
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
