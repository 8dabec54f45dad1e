"""Amounts over time as pure functions: learning rate within a phase, phase boundaries, and ways to split a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vspdf.errors import UserError, did_you_mean, one_of, require


class Amounts(Protocol):
    """What is asked here of a phase that is resolved: how much it keeps, and when."""

    @property
    def sparsity(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def sparsity_end(self) -> float | None: ...
    @property
    def levels(self) -> Sequence[float]: ...
    @property
    def update_every(self) -> int | None: ...
    @property
    def layers(self) -> Mapping[str, float]: ...
    @property
    def steps(self) -> int: ...


class Sizes(Protocol):
    """What is asked here of a model of ours."""

    @property
    def n_layer(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def d_ff(self) -> int: ...


class Stage(NamedTuple):
    """A stretch of a phase at one sparsity, from `start` (a step of the phase) for `steps`."""

    start: int
    steps: int
    sparsity: float


def stages(phase: Amounts) -> list[Stage]:
    """The stretches of a phase: one where its schedule is constant, else one per update that changes its sparsity.

    With u from 0 at the first update to 1 at the last, the sparsity s goes from a to b as: linear, a + (b − a)u; exp,
    1 − s grows by equal factors; power, b + (a − b)(1 − u)³ (arXiv:1710.01878); cosine, b + (a − b)(1 + cos πu)/2;
    cycling, the levels one after the other.
    """
    if phase.update_every is None:
        return [Stage(0, phase.steps, phase.sparsity)]
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


def stage_at(phase: Amounts, step: int) -> int:
    """Which of its stages a step of a phase falls into."""
    return sum(stage.start <= step for stage in stages(phase)) - 1


def _amount(phase: Amounts, k: int, last: int) -> float:
    """Sparsity after update `k` of a phase, the first being 0."""
    a, b = phase.sparsity, _end(phase)
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


INIT_METHODS = ("random", "topk", "from_zeros", "checkerboard")  # how first masks are drawn

if TYPE_CHECKING:
    from vspdf.config.settings import PhaseConfig

SCHEDULES = ("constant", "linear", "exp", "power", "cosine", "cycling")


# The layers of our GPT that can be sparse, and their weights in units of d² and d·d_ff.
_LAYERS = {"attn.c_attn": (3, 0), "attn.c_proj": (1, 0), "mlp.c_fc": (0, 1), "mlp.c_proj": (0, 1)}


def layer_sparsities(model: Sizes, phase: Amounts | PhaseConfig, sparsity: float | None = None) -> dict[str, float]:
    """Sparsity of each layer in a phase, or where the phase's own has come to be `sparsity`."""
    amount = phase.sparsity if sparsity is None else sparsity
    names = [f"h.{i}.{name}" for i in range(model.n_layer) for name in _LAYERS]
    return {name: next((s for glob, s in phase.layers.items() if fnmatchcase(name, glob)), amount) for name in names}


def mean_sparsity(model: Sizes, phase: Amounts, sparsity: float | None = None) -> float:
    """Sparsity over all weights of those layers."""
    if not phase.layers:
        return phase.sparsity if sparsity is None else sparsity
    masked = total = 0.0
    for name, amount in layer_sparsities(model, phase, sparsity).items():
        squares, wide = _LAYERS[name.split(".", 2)[2]]
        weights = squares * model.d_model**2 + wide * model.d_model * model.d_ff
        masked, total = masked + amount * weights, total + weights
    return masked / total


def _end(phase: Amounts) -> float:
    return phase.sparsity if phase.sparsity_end is None else phase.sparsity_end


def resolve_amounts(model: Sizes | None, key: str, phase: PhaseConfig, previous: Amounts | None) -> None:
    """Fills in, in place, the sparsities of a phase, and checks that no weight is dropped within it or at its start.

    Layers have names in a `model` of ours alone; None: another.

    Raises
    ------
    UserError
        Naming the setting under `key`.
    """
    one_of(f"{key}.schedule", phase.schedule, SCHEDULES)
    one_of(f"{key}.init_method", phase.init_method, INIT_METHODS)
    one_of(f"{key}.count", phase.count, ("round", "truncate"))
    if phase.steps is None:
        raise UserError(f"{key}.steps is not set.")
    cycling = phase.schedule == "cycling"
    require(cycling or not phase.levels, f"{key}.levels belong to schedule: cycling, not to {phase.schedule}.")
    if cycling:
        require(bool(phase.levels), f"{key}.levels: schedule: cycling needs them, e.g. [0.9, 0.75, 0.5, 0].")
        for level in phase.levels:
            require(0 <= level < 1, f"{key}.levels must lie in [0, 1), not {level}.")
        phase.sparsity, phase.sparsity_end = phase.levels[0], min(phase.levels)
    require(0 <= phase.sparsity < 1, f"{key}.sparsity must lie in [0, 1), not {phase.sparsity}.")
    if phase.schedule == "constant":
        require(
            phase.sparsity_end in (None, phase.sparsity) and phase.update_every is None,
            f"{key}: sparsity_end and update_every need a schedule that is not constant, e.g. linear.",
        )
    else:
        phase.sparsity_end = 0.0 if phase.sparsity_end is None else phase.sparsity_end
        require(
            0 <= phase.sparsity_end <= phase.sparsity,
            f"{key}.sparsity_end = {phase.sparsity_end} must lie between 0 and sparsity = {phase.sparsity}: "
            "weights are only ever added.",
        )
        require(not phase.layers, f"{key}: layers with sparsities of their own need schedule: constant.")
        if phase.update_every is None:
            phase.update_every = -(-phase.steps // (len(phase.levels) or 10))
        require(
            1 <= phase.update_every < phase.steps,
            f"{key}.update_every = {phase.update_every} must lie between 1 and the phase's {phase.steps} steps.",
        )
        require(
            phase.revived_warmup <= phase.update_every,
            f"{key}.revived_warmup = {phase.revived_warmup} must end before the next update, after "
            f"{phase.update_every} steps.",
        )
        if cycling:
            seen = [phase.levels[k % len(phase.levels)] for k in range(-(-phase.steps // phase.update_every))]
            rises = next(((a, b) for a, b in pairwise(seen) if b > a), None)
            require(
                rises is None,
                f"{key}.levels go from {rises[0] if rises else 0} up to {rises[1] if rises else 0}: that would drop "
                "weights, and weights are only ever added (dropping and growing anew is not offered).",
            )
    for glob, amount in phase.layers.items():
        require(0 <= amount < 1, f"{key}.layers: the sparsity of '{glob}' must lie in [0, 1), not {amount}.")
        names = list(layer_sparsities(model, phase)) if model else []
        require(
            any(fnmatchcase(name, glob) for name in names),
            f"{key}.layers: '{glob}' matches no layer.{did_you_mean(glob, names)}",
        )
    require(
        previous is None or bool(phase.layers or previous.layers) or phase.sparsity <= _end(previous),
        f"{key}.sparsity = {phase.sparsity} is above the phase before ({_end(previous) if previous else 0}): "
        "weights are only ever added.",
    )
    if model and previous and (phase.layers or previous.layers):
        old = layer_sparsities(model, previous, _end(previous))
        for name, amount in layer_sparsities(model, phase).items():
            require(
                amount <= old[name],
                f"{key}: layer '{name}' would go from sparsity {old[name]} to {amount}: weights are only ever added.",
            )
