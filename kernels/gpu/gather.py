"""The three products by gathers: kept weights alone are multiplied, outside tensor cores, in float32.

At home where dense is slow (strict float32, consumer cards) or little is left (above 99 %): see `costs`.
"""

from __future__ import annotations

import threading
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from vspdf.kernels.gpu.bitmap import narrow, unpacked
from vspdf.kernels.gpu.launch import KINDS, OPTIONS, kernels, on, up
from vspdf.pattern import Pattern

BLOCK_N = 32  # rows of a panel
BLOCK_E = 64  # kept weights of a program of the SDDMM
LINE = 128  # bytes of a feature that a program reads at a time: a line of the cache
UNROLL = 2  # kept weights of a row in flight
PITCH = 64  # tokens that packed activations are padded to a multiple of
WIDE = 1 << 31  # elements of packed activations from which offsets take 64 bits
PROGRAMS = 4096  # enough to fill any device several times over: beyond it a program takes more panels

# --- Tables ----------------------------------------------------------------------------------------------------------


class Side(NamedTuple):
    """Kept weights by row of the product's output. ``source``: their places among the values, None if in order."""

    pointers: Tensor  # int32 [rows + 1]
    columns: Tensor  # uint16 or int32 [nnz], rising within a row
    order: Tensor | None  # int32 [rows]: row in each slot, longest first, where lengths are very uneven
    source: Tensor | None  # int32 [nnz]
    steps: int  # sum over panels of their longest row, rounded up to UNROLL


class Tables:
    """The parts of a pattern that the gathers need on one device, each made there on first use; no weights.

    Bytes per kept weight: 2 (columns) + 2 (rows, for the SDDMM) + 6 (the transposed side), 2 more for each index into
    a side above 65,536.
    """

    def __init__(self, pattern: Pattern, device: torch.device) -> None:
        self.bits, self.shape, self.device = pattern.bits, pattern.shape, device  # no pattern: it holds these tables

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        parts = [part for part in vars(self).values() if isinstance(part, (Tensor, Side))]
        tensors = [t for part in parts for t in ([part] if isinstance(part, Tensor) else part)]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def _kept(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the kept weights, row-major."""
        rows, columns = unpacked(self.bits, self.shape, self.device).nonzero(as_tuple=True)
        return rows, columns

    def _side(self, rows: Tensor, columns: Tensor, shape: tuple[int, int], source: Tensor | None) -> Side:
        """Of kept weights sorted by row."""
        lengths = torch.bincount(rows, minlength=shape[0])
        pointers = torch.zeros(shape[0] + 1, dtype=torch.int32, device=self.device)
        pointers[1:] = lengths.cumsum(0)
        longest, order = lengths.sort(descending=True, stable=True)
        steps, sorted_steps = _panel_steps(lengths), _panel_steps(longest)
        # Sorted rows scatter the output: only where idle steps would cost more than that.
        uneven = steps > 2 * sorted_steps
        return Side(
            pointers, narrow(columns, shape[1]), order.to(torch.int32) if uneven else None,
            None if source is None else source.to(torch.int32), sorted_steps if uneven else steps,
        )  # fmt: skip

    @cached_property
    def forward(self) -> Side:
        """Rows are out-features."""
        return self._side(*self._kept(), self.shape, None)

    @cached_property
    def transposed(self) -> Side:
        """Rows are in-features."""
        rows, columns = self._kept()
        columns, source = columns.sort(stable=True)
        return self._side(columns, rows[source], (self.shape[1], self.shape[0]), source)

    @cached_property
    def rows(self) -> Tensor:
        """Row of each kept weight, uint16 or int32 [nnz]."""
        return narrow(self._kept()[0], self.shape[0])

    def prepare(self) -> None:
        """Makes all of it now."""
        _ = self.forward, self.transposed, self.rows


def _panel_steps(lengths: Tensor) -> int:
    padded = torch.nn.functional.pad(lengths, (0, -len(lengths) % BLOCK_N)).view(-1, BLOCK_N)
    longest = padded.amax(1)
    return int((-(-longest // UNROLL) * UNROLL).sum())


def tables(pattern: Pattern, device: torch.device) -> Tables:
    """The tables of a pattern on a device, kept with the pattern."""
    return pattern.derived(f"gather {device}", lambda: Tables(pattern, device))


# --- Packed activations ----------------------------------------------------------------------------------------------


class _Once(threading.local):
    """Within it, an activation that two products take is packed for the first: dX and dW share the output's gradient.

    What was packed is let go at the end. Longer it must not stay: a captured graph, or a kernel that torch knows
    nothing of, may write into the same memory again.
    """

    made: dict[tuple, Tensor] | None = None

    def __enter__(self) -> None:
        self.made = {}

    def __exit__(self, *raised: object) -> None:
        self.made = None


packed_once = _Once()


def _packed(x: Tensor) -> Tensor:
    """[features, pitch] of [tokens, features], any strides."""
    made = packed_once.made
    key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)
    if made is not None and key in made:
        return made[key]
    tokens, features = x.shape
    pitch = up(tokens, PITCH) * PITCH
    packed = x.new_empty(features, pitch)
    grid = (pitch // 64, up(features, 64))
    kernels().pack_activations[grid](packed, x, tokens, features, pitch, *x.stride(), BLOCK_T=64, BLOCK_F=64, **OPTIONS)
    if made is not None:
        made[key] = packed
    return packed


def _words(values: Tensor, side: Side) -> Tensor:
    """Values beside their columns, in the order of a side."""
    wide = values.element_size() == 4
    bits = values.contiguous().view(torch.int32 if wide else torch.int16)
    words = torch.empty(len(side.columns), dtype=torch.int64 if wide else torch.int32, device=values.device)
    order = side.pointers if side.source is None else side.source
    kernels().pack_words[(up(len(words), 1024),)](
        words, bits, side.columns, order, len(words), PERMUTED=side.source is not None, WIDE=wide, BLOCK=1024, **OPTIONS
    )
    return words


# --- Products --------------------------------------------------------------------------------------------------------


def _gather(x: Tensor, values: Tensor, bias: Tensor | None, side: Side) -> tuple[Tensor, int]:
    """Product of one side."""
    tokens, rows = x.shape[0], len(side.pointers) - 1
    y = x.new_empty(tokens, rows)
    if not tokens:
        return y, 0
    kind = KINDS[x.dtype]
    if side.columns.dtype == torch.int32:  # a column takes more than half a word: float32 words hold both
        values, kind = values.float(), "fp32"
    block_t = LINE // x.element_size()
    with on(x.device):
        words, packed = _words(values, side), _packed(x)
        blocks, panels = up(tokens, block_t), up(rows, BLOCK_N)
        panels_each = min(max(blocks * panels // PROGRAMS, 1), 16)
        bias = None if bias is None else bias.contiguous()
        kernels().gather_spmm[(blocks * up(panels, panels_each),)](
            y, packed, words, side.pointers, side.pointers if side.order is None else side.order,
            side.pointers if bias is None else bias, tokens, rows, packed.stride(0), y.stride(0), panels_each,
            KIND=kind, ORDERED=side.order is not None, BIAS=bias is not None, WIDE=packed.numel() >= WIDE,
            UNROLL=UNROLL, BLOCK_N=BLOCK_N, BLOCK_T=block_t, **OPTIONS,
        )  # fmt: skip
    return y, side.steps * BLOCK_N * blocks * block_t


def forward(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> tuple[Tensor, int]:
    """``x @ W.T + bias`` and the multiply-adds executed."""
    return _gather(x, values, bias, tables(pattern, x.device).forward)


def grad_input(grad_output: Tensor, values: Tensor, pattern: Pattern) -> tuple[Tensor, int]:
    """``grad_output @ W`` and the multiply-adds executed."""
    return _gather(grad_output, values, None, tables(pattern, grad_output.device).transposed)


def grad_values(
    grad_output: Tensor, x: Tensor, pattern: Pattern, dtype: torch.dtype | None = None
) -> tuple[Tensor, int]:
    """``grad_output.T @ x`` at kept positions, of `dtype` (that of `x`), and the multiply-adds executed."""
    tokens, count = x.shape[0], pattern.nnz
    if not tokens or not count:
        return x.new_zeros(count, dtype=dtype), 0
    here = tables(pattern, x.device)
    block_t = LINE // x.element_size()
    with on(x.device):
        packed_grad, packed_x = _packed(grad_output), _packed(x)
        pitch, programs = packed_x.stride(0), up(count, BLOCK_E)
        splits = max(1, min(PROGRAMS // 4 // programs, pitch // 512))  # of the tokens, where weights are few
        share = up(up(pitch, splits), block_t) * block_t
        splits = up(pitch, share)
        sums = torch.empty(splits, count, dtype=torch.float32, device=x.device)
        kernels().gather_sddmm[(programs, splits)](
            sums, packed_grad, packed_x, here.rows, here.forward.columns, count, pitch, share,
            WIDE=max(packed_grad.numel(), packed_x.numel()) >= WIDE, BLOCK_E=BLOCK_E, BLOCK_T=block_t, **OPTIONS,
        )  # fmt: skip
    return sums.sum(0).to(dtype or x.dtype), programs * BLOCK_E * up(pitch, block_t) * block_t
