"""Learning rate and place within a run as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from vspdf.config.resolved import ResolvedPhase


def learning_rate(phase: ResolvedPhase, step: int) -> float:
    """Learning rate of a phase's step, 0-based: linear warm-up to the peak, then decay to `lr_end` at the last step."""
    peak, warmup = phase.lr * phase.lr_multiple, phase.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, phase.steps - 1 - warmup)
    if phase.decay == "constant":
        return peak
    if phase.decay == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return peak + (phase.lr_end - peak) * progress


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
