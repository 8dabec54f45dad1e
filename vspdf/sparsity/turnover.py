"""What moving masks have done so far: how much of the matrix was ever alive, and how much of what grew stayed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from vspdf.pattern import Pattern, ones


class Turnover:
    """Follows the masks of layers through their updates.

    Parameters
    ----------
    patterns : mapping of str to Pattern
        Of all layers whose masks move, as they are now.

    Attributes
    ----------
    updates : int
        How often masks have moved.
    survival : float or None
        Of the weights that grew in the update before the last one, the share that the last one kept.
    """

    def __init__(self, patterns: Mapping[str, Pattern]) -> None:
        self.updates = 0
        self.survival: float | None = None
        self._now = dict(patterns)
        self._bits: dict[str, dict[str, np.ndarray]] = {
            name: {"first": p.bits, "ever": p.bits, "grown": np.zeros_like(p.bits)} for name, p in patterns.items()
        }

    def moved(self, patterns: Mapping[str, Pattern]) -> None:
        """Takes note of an update, after which the layers have `patterns`; where nothing moved, it was none."""
        if all(np.array_equal(new.bits, self._now[name].bits) for name, new in patterns.items()):
            return
        grew = stayed = 0
        for name, new in patterns.items():
            bits, old = self._bits[name], self._now[name]
            grew += ones(bits["grown"])
            stayed += ones(bits["grown"] & new.bits)
            bits["ever"] = bits["ever"] | new.bits
            bits["grown"] = new.bits & ~old.bits
        self._now.update(patterns)
        self.updates += 1
        self.survival = stayed / grew if grew else self.survival

    def follows(self, patterns: Mapping[str, Pattern]) -> bool:
        """Whether it knows these layers."""
        return patterns.keys() == self._now.keys()

    def figures(self) -> dict[str, float]:
        """For a line of metrics: `mask_updates`, `coverage` (the share of positions that were ever alive),
        `mask_overlap` (of the first masks, the share that is alive now) and, from the second update on, `survival`."""
        numel = sum(pattern.numel for pattern in self._now.values())
        first = sum(ones(bits["first"]) for bits in self._bits.values())
        both = sum(ones(self._bits[name]["first"] & pattern.bits) for name, pattern in self._now.items())
        found = {
            "mask_updates": self.updates,
            "coverage": sum(ones(bits["ever"]) for bits in self._bits.values()) / numel,
            "mask_overlap": both / first if first else 1.0,
        }
        return found if self.survival is None else found | {"survival": self.survival}

    # -- kept beside a checkpoint --------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What it holds of layers, as ``KIND:LAYER``."""
        return {
            f"{kind}:{name}": torch.from_numpy(bits.copy())
            for name, kinds in self._bits.items()
            for kind, bits in kinds.items()
        }

    @classmethod
    def restored(
        cls, patterns: Mapping[str, Pattern], tensors: Mapping[str, Tensor], updates: int, survival: float | None
    ) -> Turnover:
        """From what a checkpoint kept: `tensors`, and the two attributes."""
        found = cls(patterns)
        found.updates, found.survival = updates, survival
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            found._bits[name][kind] = tensor.numpy()
        return found
