"""What a kept weight is worth: how many weights the dense model has that ends at an arm's loss, over those it keeps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from vspdf.report.comparison import interval, paired, timed


def multipliers(arms: Sequence[Mapping[str, Any]], family: Sequence[str]) -> list[dict[str, Any]]:
    """M of every arm that keeps fewer weights than its model has, from a family of dense arms on the same data.

    Seed by seed, between the losses of the family on that seed, linear in the logarithm of its weights; beyond its
    ends along the nearest two, which is said in `extrapolated`.

    Parameters
    ----------
    arms : sequence of dict
        As `vspdf.compare.results.collect` gives them.
    family : sequence of str
        Names of the dense arms.

    Returns
    -------
    list of dict
        `method`, `m` with its 95 % interval from `low` to `high` (Student's t over logarithms, None for one seed),
        `seeds`, `kept` weights on average over the steps, `break_even` (what M has to exceed for the arm to win where a
        dense model is given the same CPU time and as many tokens; None where seconds do not say), `at_equal_time` (test
        loss less that of this dense model, as `vspdf.report.comparison.paired` has it), `extrapolated`. Arms with no
        run are left out.
    """
    dense = [arm for name in family for arm in arms if arm["name"] == name]
    found = []
    for arm in arms:
        if arm["name"] in family or not arm["kept"] < arm["weights"]:
            continue
        logs, seeds, differences, outside = [], [], [], False
        as_slow = _as_slow(arm, dense)
        for run in arm["runs"]:
            points = [(math.log(one["kept"]), of["test_loss"]) for one in dense for of in one["runs"]
                      if of["seed"] == run["seed"] and of["test_loss"] is not None]  # fmt: skip
            if run["test_loss"] is None or len(points) < 2:
                continue
            size, beyond = _where(points, run["test_loss"])
            if math.isnan(size):
                continue
            logs.append(size - math.log(arm["kept"]))
            seeds.append(run["seed"])
            outside |= beyond
            if as_slow is not None:
                differences.append(run["test_loss"] - _at(points, as_slow))
        if not logs:
            continue
        around = interval(logs)
        found.append({
            "method": arm["name"], "m": math.exp(statistics.fmean(logs)),
            "low": math.exp(around[0]) if around else None, "high": math.exp(around[1]) if around else None,
            "seeds": seeds, "kept": arm["kept"],
            "break_even": None if as_slow is None else math.exp(as_slow) / arm["kept"],
            "at_equal_time": paired(differences), "extrapolated": outside,
        })  # fmt: skip
    return found


def _where(points: Sequence[tuple[float, float]], value: float) -> tuple[float, bool]:
    """The x at which a line through points (x, y), y falling, takes a value; and whether that lies beyond them.

    NaN where it lies beyond an end at which y does not fall.
    """
    points = sorted(points)
    for (x, y), (x2, y2) in pairwise(points):
        if y >= value >= y2 and y > y2:
            return x + (x2 - x) * (y - value) / (y - y2), False
    below = value < min(y for _, y in points)
    (x, y), (x2, y2) = points[-2:] if below else points[:2]
    if y <= y2:
        return math.nan, True
    return x + (x2 - x) * (y - value) / (y - y2), True


def _at(points: Sequence[tuple[float, float]], x: float) -> float:
    """The y at an x on the line through points (x, y), or on with the nearest two beyond them."""
    points = sorted(points)
    (x1, y1), (x2, y2) = next((pair for pair in pairwise(points) if x <= pair[1][0]), points[-2:])
    return y1 + (y2 - y1) * (x - x1) / (x2 - x1)


def _as_slow(arm: Mapping[str, Any], dense: Sequence[Mapping[str, Any]]) -> float | None:
    """Logarithm of the weights of the dense model whose step takes as long as the arm's; None where unknown."""
    pace = lambda some: statistics.median(run["cpu_seconds"] / run["tokens"] for run in timed(some["runs"]))  # noqa: E731
    known = [
        one for one in (*dense, arm) if timed(one["runs"]) and all(run.get("cpu_seconds") for run in timed(one["runs"]))
    ]
    if len(known) < 3 or known[-1] is not arm:
        return None
    points = [(math.log(one["kept"]), -pace(one)) for one in known[:-1]]
    size, _ = _where(points, -pace(arm))
    if math.isnan(size) or size > max(x for x, _ in points) + math.log(4):  # too far beyond what was timed
        return None
    return size
