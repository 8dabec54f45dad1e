"""How a state_dict holds a layer's pattern: its bits, and behind them its two sides; older ones have the bits alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vspdf.errors import require
from vspdf.pattern import Pattern

_SIDES = 16  # bytes: out_features and in_features, int64, little-endian


def to_state(pattern: Pattern) -> Tensor:
    """What `from_state` reads: uint8, shape (ceil(out · in / 8) + 16,)."""
    return torch.from_numpy(np.concatenate([pattern.bits, np.array(pattern.shape, dtype="<i8").view(np.uint8)]))


def split(state: Tensor) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Bits of a state, and (out_features, in_features) that stand behind them; None where an older one has none."""
    array = state.detach().cpu().contiguous().numpy()
    if array.dtype != np.uint8 or array.ndim != 1 or len(array) <= _SIDES:
        return array, None
    out, into = (int(side) for side in array[-_SIDES:].copy().view("<i8"))
    told = min(out, into) > 0 and len(array) == (out * into + 7) // 8 + _SIDES  # which bits alone never come to
    return (array[:-_SIDES], (out, into)) if told else (array, None)


def from_state(state: Tensor, shape: tuple[int, int]) -> Pattern:
    """The pattern of a layer of `shape`, (out_features, in_features).

    Raises
    ------
    UserError
        If the state is of a layer of another shape, or its bits are not those of a pattern.
    """
    bits, sides = split(state)
    require(
        sides is None or sides == tuple(shape),
        f"the stored pattern is of a layer of shape {sides} (out, in), this one has {tuple(shape)}.",
    )
    return Pattern(shape, bits)
