"""GELU by a kernel of our own: one quotient of polynomials, where torch takes an error function or a tanh."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vspdf import onlookers
from vspdf.errors import UserError

try:
    from vspdf import _C
except ImportError:
    _C = None

LEAST = 1 << 13  # numbers from which on it is the faster


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Gaussian error linear unit (arXiv:1606.08415), ``x * Phi(x)``.

    Equal to `torch.nn.functional.gelu` up to rounding (3e-7 of Phi, as torch's own). That computes it too for few
    numbers, other dtypes than float32, on GPUs, inside `torch.compile` and `torch.func`. A gradient may be
    differentiated again.

    Parameters
    ----------
    x : Tensor, any shape
    approximate : {"none", "tanh"}

    Returns
    -------
    Tensor, shape of `x`
    """
    ours = _C is not None and x.dtype == torch.float32 and x.numel() >= LEAST and approximate in ("none", "tanh")
    if not (ours and onlookers.nobody() and onlookers.plain(x) and x.is_contiguous()) or onlookers.forward_mode():
        return F.gelu(x, approximate=approximate)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Gelu.apply(x, approximate)
    return _run("gelu", approximate, x)


def _run(kernel: str, approximate: str, *inputs: Tensor) -> Tensor:
    """What `gelu` or `gelu_grad` of the compiled module makes of contiguous float32 inputs of one shape."""
    out = torch.empty_like(inputs[0])
    addresses = [tensor.data_ptr() for tensor in (out, *inputs)]
    try:
        getattr(_C, kernel)(*addresses, out.numel(), approximate == "tanh", torch.get_num_threads())
    except ValueError as error:  # VSPDF_ISA
        raise UserError(str(error)) from None
    return out


class _Gelu(torch.autograd.Function):
    """GELU as autograd knows it; where its gradient is differentiated again, that is torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.approximate = approximate
        return _run("gelu", approximate, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        alone = onlookers.nobody() and onlookers.plain(grad) and onlookers.stored(grad)
        if torch.is_grad_enabled() or not alone:
            return torch.ops.aten.gelu_backward(grad, x, approximate=ctx.approximate), None
        return _run("gelu_grad", ctx.approximate, grad.contiguous(), x), None
