"""Causal attention that skips most of the masked half on CPUs, in one of two ways.

By blocks of torch's own flash operator, which walks the keys in blocks of 512 (pytorch's FlashAttentionKernel.cpp): up
to 512 tokens it computes the whole square and drops half of it. Here the triangle of queries and keys is halved again
and again, each time into two triangles and the square between them. Squares of one size are one call without a mask,
the least triangles one causal call: blocks fold into the batch as views. Softmax over two sets of keys is merged by the
logarithms of their sums of exponentials (flash attention, arXiv:2205.14135); backward merges nothing, since the
operator takes the global ones.

By products, where oneDNN is twice as fast as the MKL inside that operator (`vspdf.gemm`): some queries at a time
against all keys that they see, the probabilities kept where they are small and computed again where they are not.

In bfloat16 torch's forward is taken, and of short sequences the gradient in float32, by blocks: torch's multiplies in
bfloat16 head by head and block by block, by calls that cost more than such products.

Shape suffixes: B batch, H heads, G both, T tokens, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vspdf import gemm
from vspdf.onlookers import stored

# Measured on two EPYCs: 1.0 to 1.5 times torch's speed within these limits. On a Xeon a call costs more: one halving
# pays, of what is about as long as torch's blocks, and no other.
TOKENS = range(64, 2049)
# Tokens by width of a head up to which bfloat16's gradient is the faster in float32: on a Xeon with AMX, forward and
# backward, by 1.2 to 3.6 times. Of twice as many by nothing or by 1.3 times, of more it is the slower.
NARROW = 256 * 64
LEAST = range(48, 129)  # tokens of the triangles at the end
HALVED_ON_INTEL = range(384, 577)
QUERIES = 128  # by products: at a time
KEPT = 1 << 22  # probabilities of one call, at most: 16 MB


def plain(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor) -> Tensor:
    """Causal attention as torch computes it; shapes as in `causal_attention`."""
    return F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, is_causal=True)


def causal_attention(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor) -> Tensor:
    """Softmax attention of every token to itself and to those before it, scaled by ``1 / sqrt(d)``.

    Equal to `torch.nn.functional.scaled_dot_product_attention` with ``is_causal=True`` up to rounding. That computes it
    too wherever blocks do not apply or do not pay: on GPUs, for short or odd lengths, other dtypes than float32 and
    bfloat16, inside `torch.compile` and `torch.func`, and where `torch.nn.attention.sdpa_kernel` asks for another
    kernel than flash. In bfloat16 only the gradient differs. A gradient may be differentiated again.

    Parameters
    ----------
    q_BHTd, k_BHTd, v_BHTd : Tensor, shape (B, H, T, d), all of one shape and dtype

    Returns
    -------
    Tensor, shape (B, H, T, d)
    """
    if not _flash(q_BHTd):
        return plain(q_BHTd, k_BHTd, v_BHTd)
    if q_BHTd.dtype == torch.bfloat16:
        return _Narrow.apply(q_BHTd, k_BHTd, v_BHTd)
    if gemm.library() == "oneDNN" and not torch.is_autocast_enabled("cpu"):
        return _Products.apply(q_BHTd, k_BHTd, v_BHTd)
    triangles = _triangles(q_BHTd.shape[2])
    return plain(q_BHTd, k_BHTd, v_BHTd) if triangles == 1 else _Blocks.apply(q_BHTd, k_BHTd, v_BHTd, triangles)


def _flash(q_BHTd: Tensor) -> bool:
    """Whether torch would take its flash operator for CPUs, at lengths where that can be bettered."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    T, d = q_BHTd.shape[2:]
    narrow = q_BHTd.dtype == torch.bfloat16 and T * d <= NARROW
    if q_BHTd.device.type != "cpu" or not (narrow or q_BHTd.dtype == torch.float32) or T not in TOKENS:
        return False
    return torch._fused_sdp_choice(q_BHTd, q_BHTd, q_BHTd, is_causal=True) == SDPBackend.FLASH_ATTENTION.value


def _triangles(T: int) -> int:
    """Into how many triangles on the diagonal the work is cut: a power of two, 1 where torch does better."""
    if gemm.processor()[0] == "GenuineIntel":
        return 2 if T in HALVED_ON_INTEL and T % 2 == 0 else 1
    parts = 1
    while T % 2 == 0 and T >= 2 * LEAST.start:
        T, parts = T // 2, 2 * parts
    return parts if T in LEAST else 1


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


def _differentiable(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of which derivatives are asked for, which flash has none of."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.vjp(plain, q, k, v)[1](grad)


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
        if torch.is_grad_enabled() or not stored(grad):
            return *_differentiable(q, k, v, grad), None
        return *_gradients((grad, q, k, v, out, log_sums), ctx.triangles), None


def _gradients(known: Sequence[Tensor], triangles: int) -> list[Tensor]:
    """Of queries, keys and values, from the output's, these three, the output and the logarithms of its sums."""
    flash, B = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, len(known[0])
    known = [_foldable(x) for x in known]
    least = flash(*(_fold(x, B * triangles) for x in known), dropout_p=0.0, is_causal=True)
    gradients = [_fold(x, B) for x in least]
    for squares in _squares(triangles):
        halves = lambda x: _fold(x, B * squares).chunk(2, dim=2)  # noqa: B023, E731
        (_, g), (_, queries), (keys, _), (values, _), (_, late_out), (_, late_sums) = map(halves, known)
        more = flash(g, queries, keys, values, late_out, late_sums, dropout_p=0.0, is_causal=False)
        (_, dq), (dk, _), (dv, _) = map(halves, gradients)
        for total, part in zip((dq, dk, dv), more, strict=True):
            total += part
    return gradients


class _Narrow(torch.autograd.Function):
    """Attention in bfloat16 whose gradient is formed in float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, log_sums = ctx.saved_tensors
        if torch.is_grad_enabled() or not stored(grad):
            return _differentiable(q, k, v, grad)
        wide = [x.float() for x in (grad, q, k, v, out, log_sums)]
        return tuple(x.to(q.dtype) for x in _gradients(wide, _triangles(q.shape[2])))


class _Products(torch.autograd.Function):
    """Attention of `QUERIES` tokens at a time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, T, d = q.shape
        scaled, keys, values = _batches(q, k, v)
        out = q.new_empty(B, T, H, d).transpose(1, 2)
        keep = any(ctx.needs_input_grad) and B * H * T * (T + QUERIES) // 2 <= KEPT
        kept = [scaled, keys, values] * keep
        for some in _queries(T):
            probabilities = _probabilities(scaled, keys, some)
            with gemm.faster():
                found = torch.bmm(probabilities, values[:, : some.stop])
            out[:, :, some] = found.view(B, H, -1, d)
            kept += [probabilities] * keep
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        if torch.is_grad_enabled() or not stored(grad):
            return _differentiable(q, k, v, grad)
        B, H, T, d = q.shape
        grads = grad.reshape(B * H, T, d)
        scaled, keys, values, *kept = kept or _batches(q, k, v)
        dq, dk, dv = (torch.empty_like(x) for x in (scaled, keys, values))
        for i, some in reversed(list(enumerate(_queries(T)))):
            old = float(some.stop < T)  # the last queries see all keys: their gradients begin the sums
            seen = slice(some.stop)
            p = kept[i] if kept else _probabilities(scaled, keys, some)
            with gemm.faster():
                dp = torch.bmm(grads[:, some], values[:, seen].transpose(1, 2))
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, torch.float32)
                dq[:, some] = torch.bmm(ds, keys[:, seen])
                dk[:, seen].baddbmm_(ds.transpose(1, 2), scaled[:, some], beta=old)
                dv[:, seen].baddbmm_(p.transpose(1, 2), grads[:, some], beta=old)
        return dq.mul_(d**-0.5).view_as(q), dk.view_as(k), dv.view_as(v)


def _batches(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Queries, scaled, keys and values as [G, T, d]."""
    return [x.reshape(-1, *x.shape[2:]) for x in (q * q.shape[-1] ** -0.5, k, v)]


def _queries(T: int) -> list[slice]:
    return [slice(start, min(T, start + QUERIES)) for start in range(0, T, QUERIES)]


def _probabilities(scaled_GTd: Tensor, keys_GTd: Tensor, some: slice) -> Tensor:
    """Of some queries over all keys up to the last of them, [G, queries, keys]."""
    with gemm.faster():
        scores = torch.bmm(scaled_GTd[:, some], keys_GTd[:, : some.stop].transpose(1, 2))
    n = some.stop - some.start
    scores[:, :, some] += torch.full((n, n), -torch.inf).triu_(1)
    return torch.softmax(scores, -1)
