"""The statistics of comparisons, of runs side by side and of studies: axes, arms, paired differences, intervals."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vspdf import ledger
from vspdf.config import loading
from vspdf.config.loading import free_to_change
from vspdf.runs.folder import Run

LEVEL = 0.95  # of confidence intervals

# -- what losses are compared against ---------------------------------------------------------------------------------

Point = Mapping[str, Any]  # what a run had spent when it was evaluated, and its losses then


class Axis(NamedTuple):
    """What losses are drawn and compared against: a value of each point of a curve, with its unit."""

    name: str
    unit: str
    value: Callable[[Point], float]

    def along(self, curve: Iterable[Point]) -> list[float]:
        """The values of a curve's points."""
        return [self.value(point) for point in curve]


TOKENS = Axis("tokens", "tokens", lambda point: point["tokens"])
EXECUTED = Axis("executed FLOPs", "FLOP", lambda point: point["flops"]["executed"])
# Two clocks for training steps. Other work on the machine spoils the first; where a run has one thread it leaves the
# second almost alone, so that several may run side by side.
WALL = Axis("training time", "s", lambda point: point["seconds"])
CPU = Axis("CPU time of one thread", "s", lambda point: point["cpu_seconds"])
WEIGHTS = Axis("weight-FLOPs", "FLOP", lambda point: point["flops_by_convention"]["linear"])
OTHER_AXES = (
    Axis("FLOPs as if dense", "FLOP", lambda point: point["flops"]["dense"]),
    Axis("useful FLOPs", "FLOP", lambda point: point["flops"]["useful"]),
    *(
        Axis(f"FLOPs, convention {name}", "FLOP", lambda point, name=name: point["flops_by_convention"][name])  # type: ignore[misc]
        for name in ledger.CONVENTIONS
    ),
)
AXES = (TOKENS, EXECUTED, WALL)  # of runs side by side


def whole(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs of a study that came to their end: all but those that diverged on the way."""
    return [run for run in runs if "diverged" not in run]


def timed(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs of a study whose times count: whole ones, but for those added to earlier results on whatever machine."""
    return [run for run in whole(runs) if "added" not in run]


def curve(run: Run) -> list[dict[str, Any]]:
    """A point for each logged step of a run; `val_loss` and `val_bits_per_byte` where it was evaluated.

    Returns
    -------
    list of dict
        With `step`, `tokens`, `loss`, `flops` by column, `seconds` and `cpu_seconds` (None where an older run did not
        count them) of the training steps so far.
    """
    keys = ("step", "tokens", "loss", "flops", "val_loss", "val_bits_per_byte")
    return [
        {key: line[key] for key in keys if key in line}
        | {"seconds": line["training_seconds"], "cpu_seconds": line.get("training_cpu_seconds")}
        for line in run.lines
    ]


def evaluated(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of a curve at which the model was evaluated."""
    return [point for point in points if "val_loss" in point]


def at(points: Sequence[Point], axis: Axis, budget: float, key: str = "val_loss") -> float | None:
    """A figure of a curve where so much was spent on an axis, between its evaluations; None outside them."""
    x = axis.along(points)
    if not x or not x[0] <= budget <= x[-1] * (1 + 1e-9):
        return None
    return float(np.interp(budget, x, [point[key] for point in points]))


# -- means and their intervals ----------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of a mean, by Student's t over the values; None for less than two."""
    if len(values) < 2:
        return None
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    reach = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - reach, mean + reach


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """The `mean` of values, their standard deviation `std`, and the interval of the mean from `low` to `high`."""
    around = interval(values)
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "low": around[0] if around else None,
        "high": around[1] if around else None,
    }


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """Differences a − b of pairs: `mean`, `low` and `high` of its interval, and the `verdict` of a.

    It is called lower or higher only where the interval leaves out zero.
    """
    body = spread(differences)
    if not differences:
        verdict = "not run yet"
    elif body["low"] is None or body["high"] is None:
        verdict = "one seed: no interval"
    elif body["low"] <= 0 <= body["high"]:
        verdict = "not told apart"
    else:
        verdict = "lower" if body["high"] < 0 else "higher"
    return {key: body[key] for key in ("mean", "low", "high")} | {"verdict": verdict}


# -- runs side by side ------------------------------------------------------------------------------------------------


@dataclass
class Arm:
    """Runs whose configurations differ in nothing but the seed, and names."""

    name: str
    runs: list[Run]


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Puts runs that are seeds of each other together, in the order in which they were given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        body = loading.to_dict(run.config)
        for key in ("seed", *free_to_change(run.config)):
            *path, last = key.split(".")
            node = body
            for part in path:
                node = node[part]
            node.pop(last)
        groups.setdefault(json.dumps(body, sort_keys=True), []).append(run)
    arms, names = [], [group[0].config.name for group in groups.values()]
    for group in groups.values():
        name = group[0].label
        if len(group) > 1:
            shared = group[0].config.name
            name = f"{shared if names.count(shared) == 1 else name} ({len(group)} runs)"
        arms.append(Arm(name, group))
    return arms


def measure(runs: Iterable[Run]) -> tuple[str, str]:
    """Key and name of the validation figure that runs share: tokens differ between tokenizers, bytes do not."""
    same = len({json.dumps(run.manifest["tokenizer"], sort_keys=True) for run in runs}) == 1
    return ("val_loss", "loss (nats a token)") if same else ("val_bits_per_byte", "bits a byte")


class Comparison(NamedTuple):
    """Arms at equal budgets: a column for each axis, with what the run that spent least had spent.

    `spreads` holds each arm's figures in every column and at its own end, None where a run has none there;
    `differences` those from the first arm, of runs that read the same tokens in the same order.
    """

    budgets: list[tuple[Axis, float]]
    spreads: dict[str, list[dict[str, Any] | None]]
    differences: dict[str, list[dict[str, Any]]]


def compare(arms: Sequence[Arm], key: str) -> Comparison:
    """Compares arms by a validation figure; every run must have been evaluated."""
    curves = {run.folder: evaluated(curve(run)) for arm in arms for run in arm.runs}
    budgets = [(axis, min(axis.value(points[-1]) for points in curves.values())) for axis in AXES]
    spreads: dict[str, list[dict[str, Any] | None]] = {}
    differences: dict[str, list[dict[str, Any]]] = {}
    partners = {run.manifest["order"]: run for run in arms[0].runs}
    for arm in arms:
        columns = [[at(curves[run.folder], axis, budget, key) for run in arm.runs] for axis, budget in budgets]
        columns.append([curves[run.folder][-1][key] for run in arm.runs])
        known = [[value for value in column if value is not None] for column in columns]
        spreads[arm.name] = [spread(k) if len(k) == len(c) else None for k, c in zip(known, columns, strict=True)]
        pairs = [(run, partners[run.manifest["order"]]) for run in arm.runs if run.manifest["order"] in partners]
        if arm is not arms[0]:
            both = [
                [tuple(at(curves[run.folder], axis, budget, key) for run in pair) for pair in pairs]
                for axis, budget in budgets
            ]
            differences[arm.name] = [
                paired([a - b for a, b in column if a is not None and b is not None]) for column in both
            ]
    return Comparison(budgets, spreads, differences)
