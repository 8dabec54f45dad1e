"""Dense products in float32 by whichever of torch's two libraries knows the processor: MKL, or oneDNN.

torch multiplies float32 matrices by MKL, which leaves half of AMD's 512-bit units idle; oneDNN, which torch ships too,
is then twice as fast. The choice follows from the processor, not from timing, so that a run that resumes stays equal to
the last bit.

Shape suffixes: T tokens, I in_features, O out_features.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

# Multiply-adds a thread below which MKL is faster: oneDNN looks a product up for 10 us, and the gradient of weights
# reads both matrices across their rows. Measured on a Zen 5, widths 64 to 3,072, 1 to 1,024 tokens.
LEAST, LEAST_GRAD_WEIGHT = 1 << 21, 1 << 23
_WIDE = 26  # the first family of AMD's with 512-bit units


@cache
def library() -> str:
    """ "oneDNN" or "MKL": who multiplies large dense float32 matrices on this CPU.

    oneDNN on AMD's processors with 512-bit units, family 26 (Zen 5) and later: a Zen 4 has AVX-512 on 256-bit units,
    which MKL fills. ``ATEN_CPU_CAPABILITY=avx2``, which holds torch to AVX2, and ``VSPDF_ISA=avx2``, which holds the
    sparse kernels, hold this to MKL.
    """
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    held = torch.backends.cpu.get_cpu_capability() != "AVX512" or (os.environ.get("VSPDF_ISA") or "avx512") != "avx512"
    vendor, family = _processor()
    if held or not there or vendor != "AuthenticAMD" or family < _WIDE:
        return "MKL"
    _count_flops()
    return "oneDNN"


def _processor() -> tuple[str, int]:
    """Vendor and family; "" and 0 where the system does not tell."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    return facts.get("vendor_id", ""), int(facts.get("cpu family", 0))


def _count_flops() -> None:
    """Lets `FlopCounterMode` count oneDNN's product as it counts torch's."""

    def flops(x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * math.prod(x_shape) * weight_shape[0]

    if torch.ops.mkldnn._linear_pointwise not in flop_registry:
        register_flop_formula(torch.ops.mkldnn._linear_pointwise)(flops)


@contextlib.contextmanager
def by_onednn() -> Iterator[None]:
    """Inside, torch's products of float32 matrices on CPUs, `torch.bmm` too, run by oneDNN.

    torch takes it where bfloat16 is allowed within such a product. oneDNN has one for AMX only, and multiplies in full
    float32 elsewhere, which `full_precision` holds it to.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch >= 2.9
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def full_precision() -> bool:
    """Whether batches of products may go `by_onednn` here: it is the faster library, and keeps float32's digits."""
    if library() != "oneDNN" or not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    x = torch.linspace(-1, 1, 2 * 64 * 64).view(2, 64, 64)
    with by_onednn():
        found = torch.bmm(x, x)
    exact = x.double() @ x.double()
    return bool((found - exact).abs().max() < 1e-5 * exact.abs().max())  # bfloat16 would be off by 4e-3


def _pays(x: Tensor, weight: Tensor, least: float) -> bool:
    """Whether oneDNN multiplies ``x @ weight.T`` here, and faster."""
    work = x.numel() * weight.shape[0]
    return (
        work >= least * torch.get_num_threads()
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and library() == "oneDNN"
        and bool(torch.backends.mkldnn.enabled)
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, least: float = LEAST) -> Tensor:
    """``x @ weight.T + bias`` without autograd: [..., I] by [O, I] -> [..., O]; either may be transposed in memory."""
    if _pays(x, weight, least):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, in float32 on CPUs by the faster library; equal to it up to rounding.

    torch's own computes it under autocast, inside `torch.compile` and `torch.func`, and where a product is small.
    A gradient may be differentiated again.

    Parameters
    ----------
    x : Tensor, shape (..., in_features)
    weight : Tensor, shape (out_features, in_features)
    bias : Tensor, shape (out_features,), optional

    Returns
    -------
    Tensor, shape (..., out_features)
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.is_autocast_enabled("cpu")
        or not _pays(x, weight, LEAST)
    ):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear` that multiplies by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        least = (math.inf, math.inf) if torch.is_grad_enabled() else (LEAST, LEAST_GRAD_WEIGHT)  # inf: differentiable
        grad_TO, x_TI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(grad, weight.T, least=least[0]) if of_x else None,
            product(grad_TO.T, x_TI.T, least=least[1]) if of_weight else None,
            grad_TO.sum(0) if of_bias else None,
        )
