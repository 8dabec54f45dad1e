"""A few tokens by the bits of the mask: every width, tail and density, against float64."""

import pytest
import torch

from vspdf.kernels import cpu
from vspdf.kernels.ops import grad_input, sparse_linear
from vspdf.pattern import Pattern

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", CLOSE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(40, 64), (33, 72), (16, 8), (7, 200), (64, 1000)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_few_tokens(shape, tokens, dtype):
    """The last values of a matrix have fewer than a register behind them; rows end within a word of the mask."""
    generator = torch.Generator().manual_seed(tokens)
    random = lambda *size: torch.randn(*size, generator=generator).to(dtype)  # noqa: E731
    for sparsity in (0.0, 0.3, 0.5, 0.85, 0.95):
        pattern = Pattern.random(shape, sparsity, seed=1)
        values, x, bias = random(pattern.nnz), random(tokens, 2 * shape[1])[:, : shape[1]], random(shape[0])
        weight = torch.zeros(shape, dtype=torch.float64).masked_scatter(pattern.mask(), values.double())
        expected = x.double() @ weight.T + bias.double()
        found = sparse_linear(x, values, pattern, bias, backend="cpu")
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype] * expected.abs().max().item()
        )


@pytest.mark.skipif(cpu.unavailable() is not None or cpu.isa() != "avx512", reason="bits are read by AVX-512 alone")
@pytest.mark.parametrize("sparsity, way", [(0.5, "by the bits"), (0.95, "gathered rows")], ids=["half", "few weights"])
def test_what_runs_is_said(sparsity, way):
    plan = cpu.packed(Pattern.random((32, 64), sparsity, seed=0))
    assert way in dict(plan.describe(1))["forward"]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("dtype, kept", [(a, b) for a in CLOSE for b in CLOSE if a == b or b == torch.float32], ids=str)
@pytest.mark.parametrize("isa", [] if cpu.unavailable() else cpu.extension().isas())
def test_what_is_not_finite_spoils_only_what_reads_it(monkeypatch, isa, dtype, kept, bad):
    """Kernels that multiply masked positions too, by zero, would make a NaN of it everywhere."""
    monkeypatch.setenv("VSPDF_ISA", isa)
    for shape, sparsity in (((64, 64), 0.75), ((33, 72), 0.3), ((7, 200), 0.5), ((40, 100), 0.9)):
        pattern = Pattern.random(shape, sparsity, seed=2)
        pattern.packed.clear()  # of another instruction set, perhaps
        values, mask = torch.randn(pattern.nnz).to(kept), pattern.mask()
        for tokens in (1, 2, 3, 4, 5, 64, 65):
            x, grad = torch.randn(tokens, shape[1]).to(dtype), torch.randn(tokens, shape[0]).to(dtype)
            x[0, 5], grad[-1, 3] = bad, bad
            y = sparse_linear(x, values, pattern, backend="cpu")
            assert torch.equal(y[0].isfinite(), ~mask[:, 5]) and y[1:].isfinite().all(), (shape, tokens)
            dx = grad_input(grad, values, pattern.digest, "cpu")
            assert torch.equal(dx[-1].isfinite(), ~mask[3]) and dx[:-1].isfinite().all(), (shape, tokens)
        pattern.packed.clear()
