"""Causal attention that skips most of the masked half on CPUs, by blocks of torch's own flash operator.

That operator walks the keys in blocks of 512 (pytorch's FlashAttentionKernel.cpp): up to 512 tokens it computes the
whole square and drops half of it. Here the triangle of queries and keys is halved again and again, each time into two
triangles and the square between them. Squares of one size are one call without a mask, the least triangles one causal
call: blocks fold into the batch as views. Softmax over two sets of keys is merged by the logarithms of their sums of
exponentials (flash attention, arXiv:2205.14135); backward merges nothing, since the operator takes the global ones.

Shape suffixes: B batch, H heads, T tokens, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Measured on two AMD EPYCs: 1.0 to 1.5 times torch's speed within these limits. bfloat16 is slower than whole.
TOKENS = range(128, 2049)
LEAST = range(48, 129)  # tokens of the triangles at the end


def plain(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor) -> Tensor:
    """Causal attention as torch computes it; shapes as in `causal_attention`."""
    return F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, is_causal=True)


def causal_attention(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor) -> Tensor:
    """Softmax attention of every token to itself and to those before it, scaled by ``1 / sqrt(d)``.

    Equal to `torch.nn.functional.scaled_dot_product_attention` with ``is_causal=True`` up to rounding. That computes it
    too wherever blocks do not apply or do not pay: on GPUs, for short or odd lengths, dtypes other than float32, inside
    `torch.compile` and `torch.func`, and where `torch.nn.attention.sdpa_kernel` asks for another kernel than flash.
    A gradient may be differentiated again.

    Parameters
    ----------
    q_BHTd, k_BHTd, v_BHTd : Tensor, shape (B, H, T, d), all of one shape and dtype

    Returns
    -------
    Tensor, shape (B, H, T, d)
    """
    triangles = _triangles(q_BHTd)
    return plain(q_BHTd, k_BHTd, v_BHTd) if triangles == 1 else _Blocks.apply(q_BHTd, k_BHTd, v_BHTd, triangles)


def _triangles(q_BHTd: Tensor) -> int:
    """Into how many triangles on the diagonal the work is cut: a power of two, 1 where torch does better."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return 1
    T, parts = q_BHTd.shape[2], 1
    if q_BHTd.device.type != "cpu" or q_BHTd.dtype != torch.float32 or T not in TOKENS:
        return 1
    while T % 2 == 0 and T >= 2 * LEAST.start:
        T, parts = T // 2, 2 * parts
    if T not in LEAST:
        return 1
    flash = torch._fused_sdp_choice(q_BHTd, q_BHTd, q_BHTd, is_causal=True) == SDPBackend.FLASH_ATTENTION.value
    return parts if flash else 1


def _fold(x: Tensor, batch: int) -> Tensor:
    """A view of [B, H, T, ...] with consecutive tokens dealt to another batch; in memory tokens come before heads."""
    H, *rest = x.shape[1], *x.shape[3:]
    return x.transpose(1, 2).view(batch, x.shape[0] * x.shape[2] // batch, H, *rest).transpose(1, 2)


def _foldable(x: Tensor) -> Tensor:
    fits = x.stride(0) == x.shape[2] * x.stride(2)
    return x if fits else x.transpose(1, 2).contiguous().transpose(1, 2)


def _squares(triangles: int) -> list[int]:
    """Numbers of squares in a sequence, size by size, the least first."""
    return [triangles >> level for level in range(1, triangles.bit_length())]


class _Blocks(torch.autograd.Function):
    """Attention by blocks; the last input is the number of triangles."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, triangles: int) -> Tensor:
        flash, B = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, len(q)
        given = [_foldable(x) for x in (q, k, v)]
        least = (_fold(x, B * triangles) for x in given)
        out, log_sums = (_fold(x, B) for x in flash(*least, is_causal=True))
        for squares in _squares(triangles):
            (_, queries), (keys, _), (values, _), (_, late_out), (_, late_sums) = (
                _fold(x, B * squares).chunk(2, dim=2) for x in (*given, out, log_sums)
            )
            more, more_sums = flash(queries, keys, values)
            late_out.lerp_(more, torch.sigmoid(more_sums - late_sums).unsqueeze(-1))
            torch.logaddexp(late_sums, more_sums, out=late_sums)
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.triangles = triangles
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of this one is asked for, and flash has none
            with sdpa_kernel(SDPBackend.MATH):
                return *torch.func.vjp(plain, q, k, v)[1](grad), None
        flash, B = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, len(q)
        known = [_foldable(x) for x in (grad, q, k, v, out, log_sums)]
        least = flash(*(_fold(x, B * ctx.triangles) for x in known), dropout_p=0.0, is_causal=True)
        gradients = [_fold(x, B) for x in least]
        for squares in _squares(ctx.triangles):
            halves = lambda x: _fold(x, B * squares).chunk(2, dim=2)  # noqa: B023, E731
            (_, g), (_, queries), (keys, _), (values, _), (_, late_out), (_, late_sums) = map(halves, known)
            more = flash(g, queries, keys, values, late_out, late_sums, dropout_p=0.0, is_causal=False)
            (_, dq), (dk, _), (dv, _) = map(halves, gradients)
            for total, part in zip((dq, dk, dv), more, strict=True):
                total += part
        return *gradients, None
