"""One deterministic order of training samples, by seed and one global sample index alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from vspdf.errors import UserError

# --- The dataset -----------------------------------------------------------------------------------------------------


class ValidationBatch(NamedTuple):
    """Held-out text; the last batch may be shorter than a sequence, so that nothing is padded or left out."""

    tokens: torch.Tensor  # int64 [B, T]
    targets: torch.Tensor  # int64 [B, T]
    target_bytes: int  # of text that the targets stand for


class Samples:
    """One deterministic order of training samples.

    Every epoch of `n_samples` samples is a permutation of all of them, drawn from the seed and the number of the epoch.

    Attributes
    ----------
    n_samples : int
        Samples of one epoch.
    repeat : bool
        Whether there is a second epoch.
    """

    def __init__(self, what: str, n_samples: int, seed: int, repeat: bool):
        self.n_samples, self.repeat = n_samples, repeat
        self._what, self._seed = what, seed
        self._permutations: dict[int, np.ndarray] = {}

    def check(self, total_samples: int) -> None:
        """Refuse a run of `total_samples` samples that the data cannot feed.

        Raises
        ------
        UserError
            If there are fewer and `repeat` is off.
        """
        if total_samples > self.n_samples and not self.repeat:
            raise UserError(
                f"{self._what}, the run wants {total_samples}: give more text, or set data.repeat=true to see it again."
            )

    def window_ids(self, start: int, count: int) -> np.ndarray:
        """Numbers of the windows that samples `start` to `start + count - 1` are, int64: what `batch` reads."""
        if start < 0 or count < 0:
            raise UserError(f"Samples are counted from 0, not from {start} to {start + count}.")
        self.check(start + count)
        samples = np.arange(start, start + count)
        windows = np.empty(count, np.int64)
        for epoch in np.unique(samples // self.n_samples):
            here = samples // self.n_samples == epoch
            windows[here] = self._permutation(int(epoch))[samples[here] % self.n_samples]
        return windows

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            # Raw words of the generator: NumPy promises that these, unlike `permutation`, never change.
            words = np.random.PCG64(np.random.SeedSequence([self._seed, epoch])).random_raw(self.n_samples)
            self._permutations = {epoch: np.argsort(words, kind="stable")}  # one epoch at a time is in use
        return self._permutations[epoch]
