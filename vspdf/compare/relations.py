"""How the arms of a study stand to each other: which are paired, which are a family, and how long all of them train."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vspdf.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from vspdf.compare.definition import Arm


def pairs(body: Mapping[str, Any], read: Mapping[str, Arm], where: str) -> tuple[tuple[str, str], ...]:
    """The pairs of arms to compare; without a word about them, each other arm with the first."""
    first = next(iter(read))
    named = body.get("pairs", [[name, first] for name in read if name != first])
    if not isinstance(named, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in named):
        raise UserError(f"{where}: 'pairs' must be a list of pairs of arms, e.g. [[variable, spdf]].")
    for a, b in named:
        for name in (a, b):
            if not isinstance(name, str) or name not in read:
                raise UserError(f"{where}: pairs: no arm '{name}'.{did_you_mean(str(name), read)}")
        if a == b:
            raise UserError(f"{where}: pairs: '{a}' is paired with itself.")
    return tuple((a, b) for a, b in named)


def times(
    body: Mapping[str, Any], read: Mapping[str, Arm], both: set[int], where: str
) -> tuple[float | None, float | None]:
    """CPU seconds of a run, and of a trial where that is shorter."""
    found = []
    for key in ("seconds", "tuning_seconds"):
        value = body.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        if value is not None and not number:
            raise UserError(f"{where}: '{key}' must be a number of CPU seconds, not {value!r}.")
        found.append(value)
    seconds, trial = found
    if trial is not None and (seconds is None or both):
        raise UserError(f"{where}: 'tuning_seconds' goes with 'seconds', and with tuning_seeds apart from seeds.")
    for name, arm in read.items() if seconds is not None else ():
        if any(phase.get("steps") is None for phase in arm.body["phases"]) or arm.untrained or "tasks" in body:
            raise UserError(f"{where}: arm '{name}': with 'seconds', phases have steps, which say their proportion.")
        for key in arm.tune:
            if re.fullmatch(r"phases(\.\d+)?(\.steps)?", key):
                raise UserError(
                    f"{where}: arm '{name}': tune.{key}: with 'seconds' the time decides on steps, in the proportion "
                    "that is written: give each proportion an arm of its own."
                )
        if arm.configure({}, 0).train.threads != 1 or arm.configure({}, 0).train.device != "cpu":
            raise UserError(f"{where}: 'seconds' are CPU seconds of one thread: set common.train.threads to 1.")
    return seconds, trial


def family(names: Any, read: Mapping[str, Arm], where: str) -> tuple[str, ...]:
    """Dense arms, at least two."""
    if not isinstance(names, list) or len(names) == 1:
        raise UserError(f"{where}: 'multiplier' must be a list of at least two dense arms, e.g. [dense-64, dense-128].")
    for name in names:
        if not isinstance(name, str) or name not in read:
            raise UserError(f"{where}: multiplier: no arm '{name}'.{did_you_mean(str(name), read)}")
        if names.count(name) > 1:
            raise UserError(f"{where}: multiplier: arm '{name}' is named twice.")
        if any(stage.sparsity for phase in read[name].configure({}, 0).phases for stage in phase.stages()):
            raise UserError(f"{where}: multiplier: arm '{name}' is not dense.")
    return tuple(names)
