"""How much is kept over the steps of a phase, when masks move, how fast it learns: pure functions, no torch."""

from __future__ import annotations

import logging
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple, TypeVar

from vspdf.errors import did_you_mean, require
from vspdf.sparsity import courses

T = TypeVar("T")
log = logging.getLogger("vspdf")


# Parts of names that torch.compile, FSDP and activation checkpointing put in.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """A module's name without what wrappers put in: what globs match, masks are drawn by, and most states are named by.

    A state of a compiled model has its wrapper's part in each name, one of a checkpointed model has not.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS) or name


def matches(name: str, glob: str) -> bool:
    """Whether a glob over modules takes one of that name; either may have what wrappers put in."""
    return fnmatchcase(plain_name(name), plain_name(glob))


def first_match(rules: Mapping[str, T], name: str, default: T) -> T:
    """What the first glob of `rules` says that takes a module of that name, or `default`."""
    return next((rule for glob, rule in rules.items() if matches(name, glob)), default)


def shadowed(rules: Mapping[str, T], names: Iterable[str]) -> dict[str, list[str]]:
    """Globs of `rules` that match some of `names` and count for none of them, with the earlier ones that do."""
    firsts: dict[str, list[str]] = {glob: [] for glob in rules}
    for name in names:
        found = [glob for glob in rules if matches(name, glob)]
        for glob in found:
            if found[0] not in firsts[glob]:
                firsts[glob].append(found[0])
    return {glob: before for glob, before in firsts.items() if before and glob not in before}


_trying: ContextVar[bool] = ContextVar("trying", default=False)


@contextmanager
def no_warnings() -> Iterator[None]:
    """For settings that are tried and that nobody wrote: what `warn_once` has to say of them is not said."""
    token = _trying.set(True)
    try:
        yield
    finally:
        _trying.reset(token)


def warn_once(line: str) -> None:
    """Logs a warning that was not yet given in this process."""
    if not _trying.get():
        _warn(line)


@cache  # a configuration is resolved, and its phases checked, many times in a run
def _warn(line: str) -> None:
    log.warning("%s", line)


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
    schedule: Any  # a name, or a course in full form
    sparsity_end: float | None  # None where the schedule is constant or a course, as is update_every
    levels: tuple[float, ...]
    update_every: int | None
    layers: Mapping[str, float]
    init_method: str
    init_file: str | None
    count: str
    algorithm: str
    drop_fraction: Any  # a number, or a course in full form; None where nothing is dropped to grow elsewhere
    update: Mapping[str, Any] | None  # in full form; None of static masks
    random_share: float | None  # None where nothing grows by scores
    rules: str
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

    @property
    def begins_dense(self) -> bool:
        """Whether no layer is sparse at the phase's first step."""
        return not any((self.stages()[0].sparsity, *self.layers.values()))

    def stages(self) -> list[Stage]:
        """The stretches of the phase: one where its schedule is constant, else one per update that changes something.

        With u from 0 at the first update to 1 at the last, the sparsity s goes from a to b as: linear, a + (b − a)u;
        exp, 1 − s grows by equal factors; power, b + (a − b)(1 − u)³ (arXiv:1710.01878); cosine,
        b + (a − b)(1 + cos πu)/2; cycling, the levels one after the other. A course has a value at each update.

        By the rules of cstorch.sparse an update of "set" and "rigl" drops its fraction and no more, so that a sparsity
        above that is reached over several of them.
        """
        slow = self.rules == "cstorch" and self.algorithm != "gmp"
        starts = () if self.schedule == "constant" and self.rules == "vspdf" else self.update_steps()
        kept = [(0, self.target(0))]
        for start in starts:
            amount, before = self.target(start), kept[-1][1]
            if slow and start:
                amount = round(min(amount, 1 - (1 - self.dropped(start)) * (1 - before)), 12)
            if amount != before:
                kept.append((start, amount))
        ends = [start for start, _ in kept[1:]] + [self.steps]
        return [Stage(start, end - start, amount) for (start, amount), end in zip(kept, ends, strict=True)]

    def target(self, step: int) -> float:
        """The sparsity that the last update up to a step of the phase goes for."""
        starts = self.update_steps()
        k = bisect_right(starts, step) - 1
        if k < 0 and self.rules == "cstorch":  # there a mask that is not updated yet lets all through
            return 0.0
        return self.sparsity if k < 0 or self.schedule == "constant" else self._amount(starts[k], k, len(starts) - 1)

    def coarse_stages(self, most: int = 8) -> list[Stage]:
        """At most so many stretches with the same weights trained in each: of a sparsity that changes all the time."""
        stages = self.stages()
        size = -(-len(stages) // most)
        found = []
        for some in (stages[i : i + size] for i in range(0, len(stages), size)):
            steps = sum(stage.steps for stage in some)
            mean = sum(stage.steps * stage.sparsity for stage in some) / steps if len(some) > 1 else some[0].sparsity
            found.append(Stage(some[0].start, steps, round(mean, 12)))
        return found

    def update_steps(self) -> Sequence[int]:
        """The steps of the phase, 0 its first, at which its sparsity changes or its masks move."""
        if self.update is not None:
            return courses.update_steps(self.update, self.steps)
        return () if self.schedule == "constant" else range(0, self.steps, self.update_every or self.steps)

    def moves(self, step: int) -> bool:
        """Whether masks move before a step of the phase; those of its first step were drawn for it."""
        return self.algorithm != "static" and step > 0 and step in self.update_steps()

    def dropped(self, step: int) -> float:
        """The fraction of weights that is dropped, for others to grow, before a step at which masks move."""
        if self.drop_fraction is None:
            return 0.0
        before = bisect_left(self.update_steps(), step) if isinstance(self.drop_fraction, Mapping) else 0
        return courses.amount(self.drop_fraction, step, before)

    def _amount(self, start: int, k: int, last: int) -> float:
        """Sparsity after update `k` of the phase, the first being 0, before its step `start`."""
        if isinstance(self.schedule, Mapping):
            return round(courses.amount(self.schedule, start, k), 12)
        a, b = self.sparsity, self.sparsity if self.sparsity_end is None else self.sparsity_end
        if self.schedule == "cycling":
            return self.levels[k % len(self.levels)]
        if k >= last:
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
        """Sparsity at the phase's end: of its last stage, whatever was to come after it."""
        return self.stages()[-1].sparsity

    def of_layers(self, layers: Iterable[str], sparsity: float | None = None) -> dict[str, float]:
        """Sparsity of each layer by its name, where the phase's own is `sparsity` (default: that of its start)."""
        amount = self.sparsity if sparsity is None else sparsity
        return {name: first_match(self.layers, name, amount) for name in layers}

    def mean(self, layers: Mapping[str, int], sparsity: float | None = None) -> float:
        """Sparsity over all weights of `layers` (how many each has), where the phase's own is `sparsity`."""
        if not self.layers:
            return self.sparsity if sparsity is None else sparsity
        amounts = self.of_layers(layers, sparsity)
        return sum(amounts[name] * weights for name, weights in layers.items()) / sum(layers.values())

    def check_layers(self, key: str, previous: Amounts | None, layers: Sequence[str]) -> None:
        """Whether the phase's globs match layers, and no layer is to be sparser than at the end of the phase before.

        Of a glob that never counts a warning tells.

        Raises
        ------
        UserError
            Naming the glob or the layer.
        """
        for glob in self.layers:
            require(
                any(matches(name, glob) for name in layers),
                f"{key}.layers: '{glob}' matches no layer.{did_you_mean(glob, map(plain_name, layers))}",
            )
        for glob, before in shadowed(self.layers, layers).items():
            warn_once(
                f"{key}.layers: '{glob}' never counts: all that it matches is taken by "
                f"{' and '.join(map(repr, before))} before it; put it first, or leave it out."
            )
        if previous and self.algorithm == "static" and (self.layers or previous.layers):
            old = previous.of_layers(layers, previous.end)
            for name, amount in self.of_layers(layers).items():
                only_added(amount <= old[name], f"{key}: layer '{name}' would go from sparsity {old[name]} to {amount}")


def only_added(ok: bool, what: str) -> None:
    """Refuses what would drop weights of static masks."""
    require(ok, f"{what}: weights are only ever added, unless by algorithm: set, rigl or gmp.")
