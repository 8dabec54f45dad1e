"""A pattern on a GPU as bits and prefix sums: weights are spread out from it, and gradients collected, by one kernel.

3/16 of a byte for every position of the dense matrix, made once per pattern and device, on the device; nothing of it
is done again in a step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vspdf.kernels.gpu import launch
from vspdf.pattern import Pattern

WORD = 32  # columns of a word of bits
BLOCK = 1024  # columns of a program, at most


class Bitmap(NamedTuple):
    """Which positions are kept; the place of a kept weight is that of its word, and the bits ahead of it there."""

    bits: Tensor  # int32 [rows, ceil(columns / WORD)], the lowest bit first
    before: Tensor  # uint16 or int32, likewise: kept weights of the row ahead of a word
    pointers: Tensor  # int32 [rows + 1]: kept weights ahead of a row

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self)


def unpacked(bits: np.ndarray, shape: tuple[int, int], device: torch.device) -> Tensor:
    """A pattern's mask on a device, uint8 [out_features, in_features]; one byte a position while it is needed."""
    packed = torch.from_numpy(bits.copy()).to(device)
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    return ((packed[:, None] >> shifts) & 1).view(-1)[: shape[0] * shape[1]].view(shape)


def narrow(indices: Tensor, size: int) -> Tensor:
    """Indices below `size` in as few bytes as hold them: uint16 or int32."""
    return indices.to(torch.int16).view(torch.uint16) if size <= 1 << 16 else indices.to(torch.int32)


def _make(pattern: Pattern, device: torch.device) -> Bitmap:
    rows, columns = pattern.shape
    mask = unpacked(pattern.bits, pattern.shape, device)
    wide = torch.nn.functional.pad(mask, (0, -columns % WORD)).view(rows, -1, WORD)
    counts = wide.sum(2, dtype=torch.int32)
    octets = (wide.view(rows, -1, 8) << torch.arange(8, dtype=torch.uint8, device=device)).sum(2, dtype=torch.uint8)
    before = counts.cumsum(1, dtype=torch.int32) - counts
    pointers = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    pointers[1:] = counts.sum(1).cumsum(0)
    return Bitmap(octets.view(torch.int32), narrow(before, columns), pointers)


def bitmap(pattern: Pattern, device: torch.device) -> Bitmap:
    """The bitmap of a pattern on a device, kept with the pattern."""
    return pattern.derived(f"bitmap {device}", lambda: _make(pattern, device))


def _blocks(columns: int) -> tuple[int, int]:
    """Columns of a program, a power of two, and programs a row."""
    block = min(BLOCK, max(WORD, 1 << (columns - 1).bit_length()))
    return block, launch.up(columns, block)


def expand(values: Tensor, pattern: Pattern, dtype: torch.dtype) -> Tensor:
    """Dense weight [out_features, in_features] of `dtype`, zeros at masked positions: one kernel, one write."""
    here, values = bitmap(pattern, values.device), values.contiguous()
    weight = values.new_empty(pattern.shape, dtype=dtype)
    block, across = _blocks(pattern.in_features)
    with launch.on(values.device):
        launch.kernels().expand[(across * pattern.out_features,)](
            weight, values, *here, pattern.in_features, here.bits.stride(0), BLOCK=block, **launch.OPTIONS
        )
    return weight


def sample(dense: Tensor, pattern: Pattern, dtype: torch.dtype) -> Tensor:
    """Kept positions of a dense [out_features, in_features], row-major, as `dtype`: shape (nnz,)."""
    here, dense = bitmap(pattern, dense.device), dense.contiguous()
    values = dense.new_empty(pattern.nnz, dtype=dtype)
    block, across = _blocks(pattern.in_features)
    with launch.on(dense.device):
        launch.kernels().sample[(across * pattern.out_features,)](
            values, dense, *here, pattern.in_features, here.bits.stride(0), BLOCK=block, **launch.OPTIONS
        )
    return values
