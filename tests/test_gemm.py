"""Dense products by the library that knows the processor: as exact as torch's own, and only where it was measured."""

import threading

import pytest
import torch
import torch.nn.functional as F

from vspdf import gemm

onednn = pytest.mark.skipif(gemm.library() != "oneDNN", reason="torch's MKL multiplies as fast on this processor")


def setting():
    """torch's precision of oneDNN's products; None before torch 2.9."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return matmul and matmul.fp32_precision


def with_gradients(x, weight, bias):
    given = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    y = F.linear(*given)
    return y.detach(), *torch.autograd.grad(y.square().sum(), given)


@pytest.mark.parametrize("T, I, O", [(1024, 96, 288), (1100, 131, 257), (517, 257, 131), (3, 5, 7), (0, 8, 8)])
def test_a_layer_keeps_the_digits_of_float32(T, I, O):  # noqa: E741
    generator = torch.Generator().manual_seed(T)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((T, I), (O, I), (O,)))
    exact = with_gradients(*(part.double() for part in (x, weight, bias)))
    with gemm.faster():
        found = with_gradients(x, weight, bias)
    for mine, right in zip(found, exact, strict=True):
        assert mine.dtype == torch.float32
        assert not mine.numel() or (mine - right).abs().max() <= 3e-6 * right.abs().max()


def test_batches_keep_the_digits_of_float32():
    a, b = torch.randn(4, 70, 90), torch.randn(4, 90, 50)
    with gemm.faster():
        found = torch.bmm(a, b)
    torch.testing.assert_close(found.double(), a.double() @ b.double(), rtol=0, atol=5e-5)


@onednn
def test_the_same_product_twice_is_the_same_to_the_last_bit():
    x, weight, bias = torch.randn(1024, 128), torch.randn(512, 128), torch.randn(512)
    with gemm.faster():
        for one, other in zip(*(with_gradients(x, weight, bias) for _ in range(2)), strict=True):
            assert torch.equal(one, other)


@onednn
def test_another_library_multiplies():
    x = torch.randn(512, 512)
    with gemm.faster():
        found = x @ x
    assert not torch.equal(found, x @ x)  # another order of adding


def test_the_setting_is_as_it_was_also_after_an_error():
    before = setting()
    with pytest.raises(ZeroDivisionError), gemm.faster():
        1 / 0  # noqa: B018
    assert setting() == before


@pytest.mark.skipif(setting() is None, reason="torch before 2.9 has no such setting")
def test_of_several_threads_the_last_to_leave_restores_the_setting(monkeypatch):
    """One enters first and leaves first, the other second and last: what the second found set was the first's."""
    monkeypatch.setattr(gemm, "library", lambda: "oneDNN")
    before, entered, left, seen = setting(), threading.Event(), threading.Event(), []

    def second():
        with gemm.faster():
            entered.set()
            left.wait(60)
            seen.append(setting())

    thread = threading.Thread(target=second)
    with gemm.faster():
        thread.start()
        assert entered.wait(60)
    seen.append(setting())
    left.set()
    thread.join()
    assert seen == ["bf16", "bf16"]  # still inside
    assert setting() == before
    with gemm.faster(), gemm.faster():
        assert setting() == "bf16"
    assert setting() == before


@pytest.mark.parametrize("variable", ["ATEN_CPU_CAPABILITY", "VSPDF_ISA", None], ids=str)
def test_what_holds_to_avx2_holds_to_mkl(variable, monkeypatch):
    capability = "AVX2" if variable == "ATEN_CPU_CAPABILITY" else "AVX512"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(gemm, "processor", lambda: ("AuthenticAMD", 26))
    monkeypatch.setattr(gemm, "_keeps_digits", lambda: True)
    monkeypatch.setenv("VSPDF_ISA", "avx2" if variable == "VSPDF_ISA" else "")
    there = torch.backends.mkldnn.is_available() and setting() is not None
    assert gemm.library.__wrapped__() == ("oneDNN" if there and not variable else "MKL")


@pytest.mark.parametrize("processor", [("GenuineIntel", 26), ("AuthenticAMD", 25), ("", 0)], ids=str)
def test_other_processors_stay_with_mkl(processor, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(gemm, "processor", lambda: processor)
    assert gemm.library.__wrapped__() == "MKL"


@onednn
def test_a_library_that_cuts_digits_is_not_taken(monkeypatch):
    monkeypatch.setattr(torch, "bmm", lambda a, b: (a.bfloat16() @ b.bfloat16()).float())
    assert gemm.library.__wrapped__() == "MKL"


def test_where_mkl_is_as_fast_nothing_is_set(monkeypatch):
    monkeypatch.setattr(gemm, "library", lambda: "MKL")
    before = setting()
    with gemm.faster():
        assert setting() == before
