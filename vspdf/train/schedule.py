"""The place within a run as a pure function of the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vspdf.config.resolved import ResolvedPhase


class Position(NamedTuple):
    """Where a step falls: phase index, step within the phase, and sequences consumed before it (the global count)."""

    phase: int
    step: int
    samples: int


def position(phases: Sequence[ResolvedPhase], step: int) -> Position:
    """Position of a global step, 0-based; ``phase == len(phases)`` after the last."""
    samples = 0
    for i, phase in enumerate(phases):
        if step < phase.steps:
            return Position(i, step, samples + step * phase.batch_size)
        step -= phase.steps
        samples += phase.steps * phase.batch_size
    return Position(len(phases), step, samples)
