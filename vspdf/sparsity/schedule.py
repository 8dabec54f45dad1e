"""How much of a model is kept, and when, as pure functions: phases, and ways to split a budget. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import NamedTuple

from vspdf.errors import UserError, check_sparsity, did_you_mean, one_of, require
from vspdf.mask_forms import block_of

# How first masks are drawn; "random:FORM" draws those that fit a form of `Pattern.random`
INIT_METHODS = ("random", "topk", "from_zeros", "checkerboard", "file")
SCHEDULES = ("constant", "linear", "exp", "power", "cosine", "cycling")
DECAYS = ("linear", "cosine", "constant")  # of the learning rate


def plain_name(name: str) -> str:
    """A module's name without what torch.compile puts before it: what globs match, and what masks are drawn by."""
    return name.replace("_orig_mod.", "")


def check_init_method(what: str, method: str) -> None:
    """Raises UserError unless `method` is one of INIT_METHODS, or "random:" and a form, e.g. "random:2:4"."""
    kind, _, form = method.partition(":")
    if kind == "random" and form:
        block_of(form)
    else:
        require(method in INIT_METHODS, f"{what} '{method}' is not known.{did_you_mean(method, INIT_METHODS)}")


class Stage(NamedTuple):
    """A stretch of a phase at one sparsity, from `start` (a step of the phase) for `steps`."""

    start: int
    steps: int
    sparsity: float


@dataclass(frozen=True)
class Amounts:
    """How much of a model is kept over the steps of a phase, and how fast it learns, checked: see `Phase`.

    Only `lr` and `lr_end` may be left open, for the optimizer to say.
    """

    name: str
    sparsity: float
    schedule: str
    sparsity_end: float | None  # None where the schedule is constant, as is update_every
    levels: tuple[float, ...]
    update_every: int | None
    layers: Mapping[str, float]
    init_method: str
    init_file: str | None
    count: str
    steps: int
    moments: str
    revived_warmup: int
    lr: float | None
    lr_multiple: float
    lr_end: float | None
    decay: str
    warmup_steps: int

    def learning_rate(self, step: int, lr: float) -> float:
        """Learning rate of a step of the phase: linear warm-up to the peak, then decay, and its end from then on.

        Parameters
        ----------
        step : int
            From 0; the end is reached at the phase's last step.
        lr : float
            Peak of a phase that leaves it open; a tenth of it, or the phase's own peak if that is less, is the end of
            a phase that leaves this open.
        """
        peak = (lr if self.lr is None else self.lr) * self.lr_multiple
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return peak
        end = min(lr / 10, peak) if self.lr_end is None else self.lr_end
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps))
        if self.decay == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return peak + (end - peak) * progress

    def stages(self) -> list[Stage]:
        """The stretches of the phase: one where its schedule is constant, else one per update that changes something.

        With u from 0 at the first update to 1 at the last, the sparsity s goes from a to b as: linear, a + (b − a)u;
        exp, 1 − s grows by equal factors; power, b + (a − b)(1 − u)³ (arXiv:1710.01878); cosine,
        b + (a − b)(1 + cos πu)/2; cycling, the levels one after the other.
        """
        if self.schedule == "constant":
            return [Stage(0, self.steps, self.sparsity)]
        every = self.update_every or self.steps
        starts = range(0, self.steps, every)
        found: list[Stage] = []
        for k, start in enumerate(starts):
            steps = min(every, self.steps - start)
            amount = self._amount(k, len(starts) - 1)
            if found and found[-1].sparsity == amount:
                found[-1] = found[-1]._replace(steps=found[-1].steps + steps)
            else:
                found.append(Stage(start, steps, amount))
        return found

    def _amount(self, k: int, last: int) -> float:
        """Sparsity after update `k` of the phase, the first being 0."""
        a, b = self.sparsity, self.end
        if self.schedule == "cycling":
            return self.levels[k % len(self.levels)]
        if k == last:
            return b
        u = k / last
        if self.schedule == "linear":
            s = a + (b - a) * u
        elif self.schedule == "exp":
            s = 1 - (1 - a) * ((1 - b) / (1 - a)) ** u
        elif self.schedule == "power":
            s = b + (a - b) * (1 - u) ** 3
        else:
            s = b + (a - b) * (1 + math.cos(math.pi * u)) / 2
        return round(s, 12)

    @property
    def end(self) -> float:
        """Sparsity at the phase's end."""
        return self.sparsity if self.sparsity_end is None else self.sparsity_end

    def of_layers(self, layers: Iterable[str], sparsity: float | None = None) -> dict[str, float]:
        """Sparsity of each layer by its name, where the phase's own is `sparsity` (default: that of its start)."""
        amount = self.sparsity if sparsity is None else sparsity
        return {
            name: next((s for glob, s in self.layers.items() if fnmatchcase(plain_name(name), glob)), amount)
            for name in layers
        }

    def mean(self, layers: Mapping[str, int], sparsity: float | None = None) -> float:
        """Sparsity over all weights of `layers` (how many each has), where the phase's own is `sparsity`."""
        if not self.layers:
            return self.sparsity if sparsity is None else sparsity
        amounts = self.of_layers(layers, sparsity)
        return sum(amounts[name] * weights for name, weights in layers.items()) / sum(layers.values())

    def check_layers(self, key: str, previous: Amounts | None, layers: Sequence[str]) -> None:
        """Whether the phase's globs match layers, and no layer is to be sparser than at the end of the phase before.

        Raises
        ------
        UserError
            Naming the glob or the layer.
        """
        for glob in self.layers:
            require(
                any(fnmatchcase(plain_name(name), glob) for name in layers),
                f"{key}.layers: '{glob}' matches no layer.{did_you_mean(glob, map(plain_name, layers))}",
            )
        if previous and (self.layers or previous.layers):
            old = previous.of_layers(layers, previous.end)
            for name, amount in self.of_layers(layers).items():
                only_added(amount <= old[name], f"{key}: layer '{name}' would go from sparsity {old[name]} to {amount}")


@dataclass
class Phase:
    """How much of a model is kept over a number of steps (at one sparsity, or densifying in stages), and how it learns.

    Phases are checked where they are put together, by `vspdf.Phases` or in a configuration.
    """

    name: str | None = None  # default: "sparse 0.9" or "dense"
    sparsity: float = 0.0  # at the phase's start
    # How it falls within the phase: "constant", "linear", "exp" (density grows by a factor), "power" (cubic), "cosine",
    # or "cycling" through `levels`
    schedule: str = "constant"
    sparsity_end: float | None = None  # from the last update on; default 0, for a schedule that is not constant
    levels: list[float] = field(default_factory=list)  # of "cycling", e.g. [0.9, 0.75, 0.5, 0]
    update_every: int | None = None  # steps between updates; default: ten updates, or one per level
    layers: dict[str, float] = field(default_factory=dict)  # glob over layers to sparsity, the first match counts
    # Of the first masks: "random", "random:FORM" (2:4, 16x16, ...), "topk", "from_zeros", "checkerboard" or "file"
    init_method: str = "random"
    init_file: str | None = None  # of "file": masks by layer, in any form that Pattern.read takes
    count: str = "round"  # kept weights: numel − round(s·numel); "truncate": int((1−s)·numel), as the Cerebras stack
    steps: int | None = None
    moments: str = "keep"  # "keep" or "reset": optimizer state of the weights that were there before the phase
    revived_warmup: int = 0  # steps over which the updates of newly added weights ramp up; 50-100 where beta2 > 0.98
    lr: float | None = None  # peak of the learning rate; default: the optimizer's
    lr_multiple: float = 1.0  # of `lr`; at 90 % about 3 (published, and best of 3, 5 and 8 in study "toy")
    lr_end: float | None = None  # at the last step; default: a tenth of the optimizer's, as published
    decay: str = "linear"  # "linear", "cosine" or "constant"
    warmup_steps: int | None = None  # default: a tenth of the phase after a switch, else 5 %

    def resolved(self, key: str, previous: Amounts | None = None, layers: Iterable[str] | None = None) -> Amounts:
        """The phase with all its amounts, if no weight is dropped within it or at its start.

        Parameters
        ----------
        key : str
            What error messages call the phase, e.g. "phases.1".
        previous : Amounts, optional
            Of the phase before.
        layers : names of the model's layers, optional
            Where they are not known yet, `Amounts.check_layers` is to follow.

        Raises
        ------
        UserError
            Naming the setting under `key`.
        """
        one_of(f"{key}.schedule", self.schedule, SCHEDULES)
        check_init_method(f"{key}.init_method =", self.init_method)
        require(
            (self.init_method == "file") == (self.init_file is not None),
            f"{key}: init_method: file and init_file, the file with the masks, belong together.",
        )
        one_of(f"{key}.count", self.count, ("round", "truncate"))
        steps = self.steps
        if steps is None or steps < 1:
            raise UserError(f"{key} needs a number of steps of at least 1, not {steps}.")
        start, end = self._ends(key)
        every = None
        if self.schedule == "constant":
            require(
                end in (None, start) and self.update_every is None,
                f"{key}: sparsity_end and update_every need a schedule that is not constant, e.g. linear.",
            )
        else:
            end = 0.0 if end is None else end
            every = self._updates(key, steps, start, end)
        for glob, amount in self.layers.items():
            check_sparsity(f"{key}.layers: the sparsity of '{glob}'", amount)
        one_of(f"{key}.moments", self.moments, ("keep", "reset"))
        require(self.revived_warmup >= 0, f"{key}.revived_warmup must not be negative, is {self.revived_warmup}.")
        warmup = steps // (10 if previous else 20) if self.warmup_steps is None else self.warmup_steps
        self._check_rates(key, steps, warmup)
        found = Amounts(
            self.name or (f"sparse {start:.4g}" if start else "dense"), start, self.schedule, end, tuple(self.levels),
            every, dict(self.layers), self.init_method, self.init_file, self.count, steps, self.moments,
            self.revived_warmup, self.lr, self.lr_multiple, self.lr_end, self.decay, warmup,
        )  # fmt: skip
        if layers is not None:
            found.check_layers(key, previous, list(layers))
        if previous and not (found.layers or previous.layers):
            only_added(start <= previous.end, f"{key}.sparsity = {start} is above the phase before ({previous.end})")
        return found

    def _check_rates(self, key: str, steps: int, warmup: int) -> None:
        peak = (1.0 if self.lr is None else self.lr) * self.lr_multiple
        positive = (self.lr is None or self.lr > 0) and self.lr_multiple > 0 and peak < math.inf
        require(positive, f"{key}: lr and lr_multiple must be positive.")
        if self.lr_end is not None:
            require(
                0 <= self.lr_end <= (math.inf if self.lr is None else peak),
                f"{key}.lr_end = {self.lr_end:.4g} must lie between 0 and the phase's peak (lr · lr_multiple).",
            )
        one_of(f"{key}.decay", self.decay, DECAYS)
        require(
            0 <= warmup <= steps, f"{key}.warmup_steps = {warmup} must lie between 0 and the phase's {steps} steps."
        )

    def _ends(self, key: str) -> tuple[float, float | None]:
        """Sparsity at the start and the end; of a phase that cycles, what its levels give."""
        start, end, cycling = self.sparsity, self.sparsity_end, self.schedule == "cycling"
        require(cycling or not self.levels, f"{key}.levels belong to schedule: cycling, not to {self.schedule}.")
        if cycling:
            require(bool(self.levels), f"{key}.levels: schedule: cycling needs them, e.g. [0.9, 0.75, 0.5, 0].")
            for level in self.levels:
                check_sparsity(f"{key}.levels", level)
            start, end = self.levels[0], min(self.levels)
        check_sparsity(f"{key}.sparsity", start)
        return start, end

    def _updates(self, key: str, steps: int, start: float, end: float) -> int:
        """Steps between the updates of a phase that is not constant."""
        only_added(0 <= end <= start, f"{key}.sparsity_end = {end} must lie between 0 and sparsity = {start}")
        require(not self.layers, f"{key}: layers with sparsities of their own need schedule: constant.")
        every = -(-steps // (len(self.levels) or 10)) if self.update_every is None else self.update_every
        require(1 <= every < steps, f"{key}.update_every = {every} must lie between 1 and the phase's {steps} steps.")
        require(
            self.revived_warmup <= every,
            f"{key}.revived_warmup = {self.revived_warmup} must end before the next update, after {every} steps.",
        )
        seen = [self.levels[k % len(self.levels)] for k in range(-(-steps // every))] if self.levels else []
        for a, b in pairwise(seen):
            only_added(b <= a, f"{key}.levels go from {a} up to {b}: that would drop weights")
        return every


def only_added(ok: bool, what: str) -> None:
    """Refuses what would drop weights: masks grow, they do not move."""
    require(ok, f"{what}: weights are only ever added.")


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
