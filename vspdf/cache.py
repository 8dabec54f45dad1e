"""The keys and values of tokens that a model has seen, so that one more token costs one token's work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vspdf.model import GPT


class Cache:
    """Keys and values of the tokens that a model has seen.

    Rows end together and may begin apart: the first `padding_B[b]` columns of row b are filler that no token sees.

    Parameters
    ----------
    model : GPT
    padding_B : Tensor, shape (B,), int64
    capacity : int
        Columns at most.
    """

    def __init__(self, model: GPT, padding_B: Tensor, capacity: int) -> None:
        shape, like = model.shape, model.wte.weight
        size = (len(padding_B), shape.n_kv_head, capacity, shape.head_dim)
        self.padding_B = padding_B
        self.length = 0  # columns held
        self._keys = [like.new_zeros(size) for _ in range(shape.n_layer)]
        self._values = [like.new_zeros(size) for _ in range(shape.n_layer)]
        self._visible = torch.empty(0)

    def begin(self, count: int) -> None:
        """Makes room for `count` columns, which `extend` then fills layer by layer."""
        columns = torch.arange(self.length + count, device=self.padding_B.device)
        mine = columns[self.length :, None]
        # Filler sees itself: with nothing to see it would be NaN, and NaN times zero reaches the others.
        visible = (columns <= mine) & (columns >= self.padding_B[:, None, None]) | (columns == mine)
        self._visible = visible[:, None]  # [B, 1, count, length]
        self.length += count

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's keys and values with those of the newest tokens, and which columns these see."""
        begin = self.length - k.shape[2]
        self._keys[layer][:, :, begin : self.length] = k
        self._values[layer][:, :, begin : self.length] = v
        return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length], self._visible

    def repeat(self, times: int) -> None:
        """Each row `times` times, beside itself."""
        self.select(torch.arange(len(self.padding_B)).repeat_interleave(times))

    def select(self, rows: Tensor, begin: int = 0) -> None:
        """Row b becomes what row ``rows[b]`` was, from column `begin` on (other than 0: as many rows as before)."""
        for tensors in (self._keys, self._values):
            for i, tensor in enumerate(tensors):
                if begin:
                    tensor[:, :, begin : self.length] = tensor[rows, :, begin : self.length]
                else:
                    tensors[i] = tensor[rows]
        if not begin:
            self.padding_B = self.padding_B[rows]
