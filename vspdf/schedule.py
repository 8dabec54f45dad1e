"""Amounts over time as pure functions: learning rate within a phase, phase boundaries, and ways to split a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from vspdf.config import Config, PhaseConfig, mean_sparsity
from vspdf.errors import UserError


def learning_rate(phase: PhaseConfig, step: int) -> float:
    """Learning rate of a phase's step, 0-based: linear warm-up to the peak, then decay to `lr_end` at the last step."""
    assert phase.lr is not None and phase.lr_end is not None
    assert phase.steps is not None and phase.warmup_steps is not None
    peak, warmup = phase.lr * phase.lr_multiple, phase.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, phase.steps - 1 - warmup)
    if phase.decay == "constant":
        return peak
    if phase.decay == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return peak + (phase.lr_end - peak) * progress


class Stage(NamedTuple):
    """A stretch of a phase at one sparsity, from `start` (a step of the phase) for `steps`."""

    start: int
    steps: int
    sparsity: float


def stages(phase: PhaseConfig) -> list[Stage]:
    """The stretches of a phase: one where its schedule is constant, else one per update that changes its sparsity.

    With u from 0 at the first update to 1 at the last, the sparsity s goes from a to b as: linear, a + (b − a)u; exp,
    1 − s grows by equal factors; power, b + (a − b)(1 − u)³ (arXiv:1710.01878); cosine, b + (a − b)(1 + cos πu)/2;
    cycling, the levels one after the other.
    """
    assert phase.steps is not None
    if phase.schedule == "constant":
        return [Stage(0, phase.steps, phase.sparsity)]
    assert phase.update_every is not None
    starts = range(0, phase.steps, phase.update_every)
    found: list[Stage] = []
    for k, start in enumerate(starts):
        steps = min(phase.update_every, phase.steps - start)
        amount = _amount(phase, k, len(starts) - 1)
        if found and found[-1].sparsity == amount:
            found[-1] = found[-1]._replace(steps=found[-1].steps + steps)
        else:
            found.append(Stage(start, steps, amount))
    return found


def amounts(config: Config) -> list[tuple[float, float]]:
    """(sparsity over all weights of the layers, tokens) of every stretch of a run, in order."""
    return [
        (mean_sparsity(config.model, phase, stage.sparsity), stage.steps * (phase.tokens or 0) / (phase.steps or 1))
        for phase in config.phases
        for stage in stages(phase)
    ]


def stage_at(phase: PhaseConfig, step: int) -> int:
    """Which of its stages a step of a phase falls into."""
    return sum(stage.start <= step for stage in stages(phase)) - 1


def _amount(phase: PhaseConfig, k: int, last: int) -> float:
    """Sparsity after update `k` of a phase, the first being 0."""
    a, b = phase.sparsity, phase.sparsity_end
    assert b is not None
    if phase.schedule == "cycling":
        return phase.levels[k % len(phase.levels)]
    if k == last:
        return b
    u = k / last
    if phase.schedule == "linear":
        s = a + (b - a) * u
    elif phase.schedule == "exp":
        s = 1 - (1 - a) * ((1 - b) / (1 - a)) ** u
    elif phase.schedule == "power":
        s = b + (a - b) * (1 - u) ** 3
    else:
        s = b + (a - b) * (1 + math.cos(math.pi * u)) / 2
    return round(s, 12)


class Position(NamedTuple):
    """Where a step falls: phase index, step within the phase, and sequences consumed before it (the global count)."""

    phase: int
    step: int
    samples: int


def position(phases: Sequence[PhaseConfig], step: int) -> Position:
    """Position of a global step, 0-based; ``phase == len(phases)`` after the last."""
    samples = 0
    for i, phase in enumerate(phases):
        assert phase.steps is not None and phase.batch_size is not None
        if step < phase.steps:
            return Position(i, step, samples + step * phase.batch_size)
        step -= phase.steps
        samples += phase.steps * phase.batch_size
    return Position(len(phases), step, samples)


def split_add_on(dense_steps: int, effective: float, sparsity: float) -> tuple[int, int]:
    """The published split: as many sparse steps as the dense run has, then dense steps up to the FLOP budget.

    ``N1 = D``, ``N2 = ceil(D(1−S) − N1(1−s1))``: weight-FLOPs are those of a uniform sparsity S.

    Parameters
    ----------
    dense_steps : int
        D, of the dense run.
    effective, sparsity : float
        S and s1, with S <= s1.

    Raises
    ------
    UserError
        If S > s1.
    """
    _check_split(effective, sparsity)
    # Rounded first: 62,522 · (0.25 − 0.1) is a hair above 9,378.3 or below, never to be decided by binary fractions.
    return dense_steps, math.ceil(round(dense_steps * (sparsity - effective), 6))


def split_fixed_budget(dense_steps: int, effective: float, sparsity: float) -> tuple[int, int]:
    """The dense run's steps, a fraction ``f = S / s1`` of them sparse, the rest dense.

    Raises
    ------
    UserError
        If S > s1.
    """
    _check_split(effective, sparsity)
    sparse = round(dense_steps * effective / sparsity)
    return sparse, dense_steps - sparse


def _check_split(effective: float, sparsity: float) -> None:
    if not 0 <= effective <= sparsity < 1 or sparsity == 0:
        raise UserError(f"an effective sparsity of {effective} cannot come from a first stage at {sparsity}.")


def effective_sparsity(dense_steps: float, stages: Sequence[tuple[float, float]]) -> float:
    """``1 − Σ stepsᵢ (1 − sᵢ) / D`` for (sparsity, steps) stages: weight-FLOPs saved against D dense steps."""
    return 1 - sum(steps * (1 - s) for s, steps in stages) / dense_steps


def time_average_sparsity(stages: Sequence[tuple[float, float]]) -> float:
    """Mean sparsity over the run's own steps."""
    return sum(steps * s for s, steps in stages) / sum(steps for _, steps in stages)
