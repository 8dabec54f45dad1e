"""Phases as they are written, checked; and ways to split a budget between sparse and dense ones. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from vspdf.errors import UserError, check_sparsity, did_you_mean, one_of, require
from vspdf.mask_forms import block_of
from vspdf.sparsity import courses
from vspdf.sparsity.amounts import Amounts as Amounts
from vspdf.sparsity.amounts import no_warnings as no_warnings
from vspdf.sparsity.amounts import only_added, warn_once

# How first masks are drawn; "random:FORM" draws those that fit a form of `Pattern.random`
INIT_METHODS = ("random", "topk", "from_zeros", "checkerboard", "file")
SCHEDULES = ("constant", "linear", "exp", "power", "cosine", "cycling")
ALGORITHMS = ("static", "set", "rigl", "gmp")
RULES = ("vspdf", "cstorch")  # how masks move, see `Phase`
DECAYS = ("linear", "cosine", "constant")  # of the learning rate
_DROP = 0.3  # as in cstorch.sparse
_RANDOM = 0.25  # of what RigL grows, against its collapse onto columns of large activations (arXiv:2108.06277)


def check_init_method(what: str, method: str) -> None:
    """Raises UserError unless `method` is one of INIT_METHODS, or "random:" and a form, e.g. "random:2:4"."""
    kind, _, form = method.partition(":")
    if kind == "random" and form:
        block_of(form)
    else:
        require(method in INIT_METHODS, f"{what} '{method}' is not known.{did_you_mean(method, INIT_METHODS)}")


@dataclass
class Phase:
    """How much of a model is kept over a number of steps (at one sparsity, or changing in stages), and how it learns.

    Phases are checked where they are put together, by `vspdf.Phases` or in a configuration.
    """

    name: str | None = None  # default: "sparse 0.9", "sparse layers" (theirs alone) or "dense"
    # At the phase's start; or over its steps, for an algorithm that is not static: a list of one value an update, or
    # {type: linear, init, slope}, {type: exp, init, gamma, final}, {type: power, init, beta},
    # {type: cosine, init, half_period, minimum}, as in cstorch.sparse
    sparsity: Any = 0.0
    # How it goes on within the phase: "constant", "linear", "exp" (density grows by a factor), "power" (cubic),
    # "cosine", or "cycling" through `levels`; static masks only ever get denser. Or what `sparsity` may be beside a
    # number
    schedule: Any = "constant"
    # From the last update on, not beside levels; default 0 of static masks, if schedule is not constant.
    sparsity_end: float | None = None
    levels: list[float] = field(default_factory=list)  # of "cycling", one an update, e.g. [0.9, 0.75, 0.5, 0]
    update_every: int | None = None  # steps between updates of static masks; default: ten updates, or one per level
    layers: dict[str, float] = field(default_factory=dict)  # glob over layers to sparsity, the first match counts
    # Of the first masks: "random", "random:FORM" (2:4, 16x16, ...), "topk", "from_zeros", "checkerboard" or "file"
    init_method: str = "random"
    init_file: str | None = None  # of "file": masks by layer, in any form that Pattern.read takes
    count: str = "round"  # kept weights: numel − round(s·numel); "truncate": int((1−s)·numel), as the Cerebras stack
    # "static"; or masks that move. At each update "set" (arXiv:1707.04780) drops a fraction of the smallest weights and
    # lets as many grow at random, "rigl" (arXiv:1911.11134) where the dense gradient is largest; a sparsity that rises
    # takes more than it gives (GraNet). "gmp" (arXiv:1710.01878) only drops, as the sparsity rises
    algorithm: str = "static"
    # At an update, of "set" and "rigl": a number, or over the steps as `sparsity`; default 0.3
    drop_fraction: Any = None
    # When masks move, in steps of the phase: {freq, start, stop} or {steps: [...]}; default: some sixty updates, 50
    # steps apart or more, over its first three quarters, since what grows late has no time to learn
    update: Any = None
    # Of what "rigl" grows, drawn at random. The rest goes by the gradient over the RMS of the input it belongs to: by
    # the bare gradient, what grows collapses onto few inputs of large activations (arXiv:2108.06277). Default 0.25
    random_share: float | None = None
    # "vspdf"; or "cstorch", as cstorch.sparse does: masks are dense until their first update, what is dropped may
    # grow again at once, keep int((1 − f)·nnz) and never get denser than the sparsity asks, RigL by the bare gradient
    rules: str = "vspdf"
    steps: int | None = None
    moments: str = "keep"  # "keep" or "reset": optimizer state of the weights that were there before the phase
    revived_warmup: int = 0  # steps over which the updates of newly added weights ramp up; 50-100 where beta2 > 0.98
    lr: float | None = None  # peak of the learning rate; default: the optimizer's
    lr_multiple: float = 1.0  # of `lr`; at 90 % about 3 (published, and best of 3, 5 and 8 in study "toy")
    lr_end: float | None = None  # at the last step; default: a tenth of the optimizer's as published, at most the peak
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
        named = not courses.is_course(self.schedule)
        one_of(f"{key}.schedule", self.schedule if named else "constant", SCHEDULES)
        one_of(f"{key}.count", self.count, ("round", "truncate"))
        one_of(f"{key}.algorithm", self.algorithm, ALGORITHMS)
        one_of(f"{key}.rules", self.rules, RULES)
        steps = self.steps
        if steps is None or steps < 1:
            raise UserError(f"{key} needs a number of steps of at least 1, not {steps}.")
        update, drop, random_share = self._moving(key, steps)
        start, schedule, end, every = self._amounts(key, steps, update)
        self._check_first_masks(key, start, previous)
        for glob, amount in self.layers.items():
            check_sparsity(f"{key}.layers: the sparsity of '{glob}'", amount)
        one_of(f"{key}.moments", self.moments, ("keep", "reset"))
        require(self.revived_warmup >= 0, f"{key}.revived_warmup must not be negative, is {self.revived_warmup}.")
        warmup = steps // (10 if previous else 20) if self.warmup_steps is None else self.warmup_steps
        self._check_rates(key, steps, warmup)
        found = Amounts(
            "", start, schedule, end, tuple(self.levels), every, dict(self.layers), self.init_method, self.init_file,
            self.count, self.algorithm, drop, update, random_share, self.rules, steps, self.moments,
            self.revived_warmup, self.lr, self.lr_multiple, self.lr_end, self.decay, warmup,
        )  # fmt: skip
        if found.levels:
            found = replace(found, sparsity_end=found.end)
        self._check_levels(key, found)
        if self.rules == "cstorch" and not any(stage.sparsity for stage in found.stages()):
            self._name_dense(key, found)
            found = replace(found, sparsity=0.0)
        found = replace(found, name=self.name or _usual_name(found))
        self._check_updates(key, found, previous)
        if layers is not None:
            found.check_layers(key, previous, list(layers))
        if previous and self.algorithm == "static" and not (found.layers or previous.layers):
            only_added(start <= previous.end, f"{key}.sparsity = {start} is above the phase before ({previous.end})")
        return found

    def _check_first_masks(self, key: str, start: float, previous: Amounts | None) -> None:
        """Of how they are made: whether that is known, and there are any to make."""
        method = self.init_method
        check_init_method(f"{key}.init_method =", method)
        require(
            (method == "file") == bool(self.init_file),
            f"{key}: init_method: file and init_file, the file with the masks, belong together.",
        )
        if previous:
            require(
                method == "random" or (method, self.init_file) == (previous.init_method, previous.init_file),
                f"{key}.init_method = {method} does nothing: first masks are those of the first phase.",
            )
        elif method not in ("random", "from_zeros", "file") and self.rules == "vspdf":  # these are held against weights
            require(
                any((start, *self.layers.values())),
                f"{key}.init_method = {method} does nothing: the phase begins dense.",
            )

    def _moving(self, key: str, steps: int) -> tuple[dict[str, Any] | None, Any, float | None]:
        """When masks move, how much of them, and which share of that by chance."""
        share = self.random_share
        for name, value, of in (
            ("update", self.update, ("set", "rigl", "gmp")), ("drop_fraction", self.drop_fraction, ("set", "rigl")),
            ("random_share", share, ("rigl",)),
        ):  # fmt: skip
            require(
                value is None or self.algorithm in of,
                f"{key}.{name} belongs to algorithm: {' or '.join(of)}, not to {self.algorithm}.",
            )
        if self.algorithm == "static":
            require(self.rules == "vspdf", f"{key}.rules say how masks move; those of algorithm: static do not.")
            return None, None, None
        if share is None and self.algorithm == "rigl":
            share = _RANDOM if self.rules == "vspdf" else 0.0
        require(share is None or 0 <= share <= 1, f"{key}.random_share must lie in [0, 1], not {share}.")
        update = courses.updates(f"{key}.update", self.update, steps, within=self.rules == "vspdf")
        if self.algorithm == "gmp":
            return update, None, None
        written = _DROP if self.drop_fraction is None else self.drop_fraction
        end, bounded = courses.end_of(update, steps), self.rules == "vspdf"
        return update, courses.checked(f"{key}.drop_fraction", written, end, bounded=bounded), share

    def _amounts(
        self, key: str, steps: int, update: dict[str, Any] | None
    ) -> tuple[float, Any, float | None, int | None]:
        """Sparsity at the start, how it goes on, where it ends, and the steps between updates of static masks."""
        written = self.sparsity if courses.is_course(self.sparsity) else self.schedule
        if not courses.is_course(written):
            start, end = self._ends(key)
            if self.schedule == "constant":
                require(
                    end in (None, start) and self.update_every is None,
                    f"{key}: sparsity_end and update_every need a schedule that is not constant, e.g. linear.",
                )
                return start, self.schedule, end, None
            if update is None:
                require(not self.layers, f"{key}: layers with sparsities of their own need schedule: constant.")
                end = 0.0 if end is None else end
                return start, self.schedule, end, self._updates(key, steps, start, end)
            require(self.update_every is None, f"{key}.update_every is for static masks: give update: {{freq: N}}.")
            if end is None:
                raise UserError(f"{key}.sparsity_end is not set: where does the sparsity go from {start}?")
            check_sparsity(f"{key}.sparsity_end", end)
            return start, self.schedule, end, None
        require(
            update is not None,
            f"{key}: a sparsity that is a list or has a type needs algorithm: set, rigl or gmp; static masks get "
            "denser by a schedule by name, e.g. schedule: linear.",
        )
        require(
            self.schedule == "constant" or written is self.schedule,
            f"{key}: the sparsity says how it goes on already: leave `schedule` out.",
        )
        require(
            not self.levels and self.sparsity_end is None and self.update_every is None,
            f"{key}: levels, sparsity_end and update_every go with a schedule by name.",
        )
        assert update is not None
        last, bounded = courses.last_of(update, steps), self.rules == "vspdf"
        course = courses.checked(f"{key}.sparsity", written, last, bounded=bounded)
        if isinstance(course, dict) and course["type"] != "constant":
            return round(courses.amount(course, 0, 0), 12), course, None, None
        start = course["value"] if isinstance(course, dict) else course
        check_sparsity(f"{key}.sparsity", start)
        return start, "constant", None, None

    def _check_updates(self, key: str, found: Amounts, previous: Amounts | None) -> None:
        """Of masks that move: whether they can, and whether ramps end before the next update."""
        if self.algorithm == "static":
            return
        targets = {step: found.target(step) for step in (0, *found.update_steps())}
        for step, amount in targets.items():
            check_sparsity(f"{key}.sparsity, from step {step} on", amount)
        require(
            self.rules == "cstorch" or any(self.layers.values()) or any(targets.values()),
            f"{key}: algorithm: {self.algorithm} has no masks to move, the sparsity stays at 0: expected one above it, "
            "or algorithm: static.",
        )
        constant = found.schedule == "constant" and (previous is None or found.sparsity <= previous.end)
        require(
            self.algorithm != "gmp" or not constant,
            f"{key}: algorithm: gmp prunes as the sparsity rises, and it stays at {found.sparsity}: give it a "
            "schedule, e.g. {sparsity: 0.0, schedule: power, sparsity_end: 0.75}, or take algorithm: static.",
        )
        if self.algorithm == "gmp" and self.rules == "vspdf":
            for a, b in pairwise(found.stages()):
                require(
                    a.sparsity < b.sparsity,
                    f"{key}: algorithm: gmp only drops weights, and the sparsity goes from {a.sparsity:g} down to "
                    f"{b.sparsity:g} at step {b.start}: expected one that rises, or algorithm: set, rigl or static.",
                )
        moves = [step for step in found.update_steps() if step]
        usual = found.update == courses.updates(key, None, found.steps)  # short phases may have none by themselves
        rises = previous is not None and found.sparsity > previous.end
        require(
            bool(moves) or usual or rises or self.rules == "cstorch",
            f"{key}.update: masks never move in the phase's {found.steps} steps: expected an update after step 0, "
            "or algorithm: static.",
        )
        switches = previous is not None and (found.sparsity != previous.end or bool(found.layers or previous.layers))
        by_drops = self.algorithm != "gmp" and self.rules == "vspdf" and found.schedule == "constant" and not switches
        require(
            not (by_drops and moves) or any(map(found.dropped, moves)),
            f"{key}.drop_fraction: nothing is dropped at any update, so that masks never move: expected more than 0, "
            "or algorithm: static.",
        )
        near = min((b - a for a, b in pairwise(moves)), default=found.steps)
        self._check_ramp(key, near)

    def _name_dense(self, key: str, found: Amounts) -> None:
        """Says why no mask of a phase is ever pruned, by rules of cstorch.sparse, which are taken at their word."""
        if any(self.layers.values()):
            return
        why, course = "its first update comes later", found.schedule
        if starts := found.update_steps():
            why = "the sparsity stays at 0" if not any(map(found.target, starts)) else "nothing is dropped"
            if isinstance(course, dict) and course.get("gamma", 0) > 0:
                why += " (type: exp rises where gamma < 0)"
        warn_once(f"{key}: algorithm: {self.algorithm} prunes nothing in the phase's {found.steps} steps, {why}.")

    def _check_ramp(self, key: str, every: int) -> None:
        """Whether updates of new weights are no longer ramped when the next come, after so many steps."""
        require(
            self.revived_warmup <= every,
            f"{key}.revived_warmup = {self.revived_warmup} must end before the next update, after {every} steps.",
        )

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
        ends = self.decay != "constant" or self.lr_end is None or (self.lr is not None and self.lr_end == peak)
        if not ends:  # said, not refused: a file's end beside an override of its decay is nobody's mistake
            warn_once(f"{key}.lr_end = {self.lr_end} does nothing with decay: constant.")
        require(
            0 <= warmup <= steps, f"{key}.warmup_steps = {warmup} must lie between 0 and the phase's {steps} steps."
        )

    def _ends(self, key: str) -> tuple[float, float | None]:
        """Sparsity at the start and the end; of a phase that cycles, what its levels give."""
        end, cycling = self.sparsity_end, self.schedule == "cycling"
        start = courses.number(f"{key}.sparsity", self.sparsity)
        require(cycling or not self.levels, f"{key}.levels belong to schedule: cycling, not to {self.schedule}.")
        if cycling:
            require(bool(self.levels), f"{key}.levels: schedule: cycling needs them, e.g. [0.9, 0.75, 0.5, 0].")
            for level in self.levels:
                check_sparsity(f"{key}.levels", level)
            start, end = self.levels[0], self.levels[-1]  # the last of them that has its turn is known later
        check_sparsity(f"{key}.sparsity", start)
        return start, end

    def _check_levels(self, key: str, found: Amounts) -> None:
        """Whether each of the sparsities that a phase goes through has its turn, and nothing beside them says else."""
        course = found.schedule if isinstance(found.schedule, dict) else {}
        values = found.levels or course.get("values", ())
        if courses.is_course(self.schedule) and not courses.is_course(self.sparsity):
            require(
                self.sparsity in (0.0, found.sparsity),
                f"{key}.sparsity = {self.sparsity}, but the schedule begins at {found.sparsity:g}: leave it out.",
            )
        turns = len(found.update_steps())
        if turns < len(values) and self.rules == "vspdf":
            raise UserError(
                f"{key}.{'levels' if found.levels else 'sparsity'}: {values[turns]:g} is never reached: expected an "
                f"update for each of {len(values)} values, the phase's {found.steps} steps have {turns}."
            )
        if not found.levels:
            return
        for name, value, allowed in (
            ("sparsity", self.sparsity, (0.0, found.sparsity)), ("sparsity_end", self.sparsity_end, (None, found.end)),
        ):  # fmt: skip
            require(
                value in allowed,
                f"{key}.{name} = {value}, but the levels go from {found.sparsity:g} to {found.end:g}: leave it out.",
            )

    def _updates(self, key: str, steps: int, start: float, end: float) -> int:
        """Steps between the updates of a phase that is not constant."""
        if not self.levels:
            only_added(0 <= end <= start, f"{key}.sparsity_end = {end} must lie between 0 and sparsity = {start}")
        every = -(-steps // (len(self.levels) or 10)) if self.update_every is None else self.update_every
        require(1 <= every < steps, f"{key}.update_every = {every} must lie between 1 and the phase's {steps} steps.")
        self._check_ramp(key, every)
        seen = [self.levels[k % len(self.levels)] for k in range(-(-steps // every))] if self.levels else []
        for a, b in pairwise(seen):
            only_added(b <= a, f"{key}.levels go from {a} up to {b}: that would drop weights")
        return every


def _usual_name(phase: Amounts) -> str:
    static = phase.algorithm == "static"
    amount = phase.sparsity if static else max(map(phase.target, (0, *phase.update_steps())))
    own = not amount and any(phase.layers.values())
    if static and not (amount or own):
        return "dense"
    return f"{'sparse' if static else phase.algorithm} {'layers' if own else f'{amount:.4g}'}"


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


def phase_of(key: str, given: Any) -> Phase:
    """A phase given as (sparsity, steps) or (sparsity, steps, lr)."""
    if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
        raise UserError(f"{key} must be (sparsity, steps), (sparsity, steps, lr) or a vspdf.Phase, not {given!r}.")
    sparsity, steps, *rate = given
    check_sparsity(f"{key}.sparsity", sparsity)
    if isinstance(steps, bool) or not isinstance(steps, int | float) or steps != int(steps):
        raise UserError(f"{key}: the steps must be a whole number, not {steps!r}.")
    if rate and (isinstance(rate[0], bool) or not isinstance(rate[0], int | float)):
        raise UserError(f"{key}: the learning rate must be a number, not {rate[0]!r}.")
    return Phase(sparsity=sparsity, steps=int(steps), lr=rate[0] if rate else None)
