"""How sure an estimate is: one seeded sampling over everything about a machine that is not known, all at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vspdf.errors import UserError
from vspdf.simulator.machine import Machine

SAMPLES = 100
EXTREMES = (0.05, 0.95)  # quantiles of one parameter, for a tornado chart
Speedup = Callable[[Machine], float]


@dataclass(frozen=True)
class Band:
    """A distribution of speed-ups.

    Attributes
    ----------
    values : float array
        Sorted.
    parts : dict of str to float
        Of the variance, by parameter; "together" is what no parameter explains alone. They add up to 1.
    tornado : list of dict
        Per parameter its value, grade, 5 % and 95 % quantile, the speed-up at each with all others as they are, and its
        share of the variance; the widest first.
    """

    values: np.ndarray
    parts: dict[str, float]
    tornado: list[dict[str, Any]]

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.values, q))

    def summary(self, central: float, ideal: float) -> dict[str, Any]:
        """Keys of a result's ``speedup``: 90 % interval (with the central case inside), median, 50 % interval."""
        low, high = (self.quantile(q) for q in EXTREMES)
        return {
            "low": min(low, central), "central": central, "high": max(high, central), "ideal": ideal,
            "median": self.quantile(0.5), "interval50": [self.quantile(0.25), self.quantile(0.75)],
        }  # fmt: skip


def unknown(machine: Machine) -> list[str]:
    """The parameters that are sampled: those with a range."""
    return [name for name, parameter in machine.parameters.items() if parameter.range is not None]


def at(machine: Machine, name: str, quantile: float) -> Any:
    """A parameter's value at a quantile: half of the weight lies below the stated value, half above, evenly."""
    parameter = machine.parameters[name]
    assert parameter.range is not None
    low, high = parameter.range
    middle = float(parameter.value)
    value = low + 2 * quantile * (middle - low) if quantile < 0.5 else middle + (2 * quantile - 1) * (high - middle)
    return round(value) if isinstance(parameter.value, int) else value


def draws(machine: Machine, samples: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Names and quantiles [sample, parameter]: a Latin hypercube, the same for a seed."""
    names, random = unknown(machine), np.random.default_rng(seed)
    strata = np.stack([random.permutation(samples) for _ in names], axis=1) if names else np.zeros((samples, 0))
    return names, (strata + random.random(strata.shape)) / samples


def band(machine: Machine, speedup: Speedup, samples: int = SAMPLES, seed: int = 0, tornado: bool = True) -> Band:
    """Samples `speedup` over the machine's unknown parameters; machines on which nothing fits are left out.

    Parameters
    ----------
    speedup : callable
        Of a machine.
    tornado : bool
        Also one parameter at a time.

    Raises
    ------
    UserError
        If `speedup` raises it for the machine as it is.
    """
    middle = speedup(machine)
    names, quantiles = draws(machine, samples, seed)
    rows, found = [], []
    for row in quantiles:
        value = _try(speedup, machine, dict(zip(names, row, strict=True)))
        if value is not None:
            rows.append(row)
            found.append(value)
    if not found:
        rows, found = [np.full(len(names), 0.5)], [middle]
    y = np.array(found)
    shares = _shares(names, np.array(rows), y)
    table = []
    for name in names if tornado else ():
        ends = [_try(speedup, machine, {name: q}) for q in EXTREMES]
        low, high = (middle if end is None else end for end in ends)
        parameter = machine.parameters[name]
        table.append({
            "parameter": name, "value": parameter.value, "unit": parameter.unit, "grade": parameter.grade,
            "from": at(machine, name, EXTREMES[0]), "to": at(machine, name, EXTREMES[1]),
            "speedup": {"low": low, "high": high}, "share": shares.get(name, 0.0),
        })  # fmt: skip
    table.sort(key=lambda row: -abs(row["speedup"]["high"] - row["speedup"]["low"]))
    return Band(np.sort(y), shares, table)


def _try(speedup: Speedup, machine: Machine, quantiles: dict[str, float]) -> float | None:
    try:
        return speedup(machine.override({name: at(machine, name, q) for name, q in quantiles.items()}))
    except UserError:
        return None


def _shares(names: list[str], x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """First-order parts of the variance, by a fit of second degree in each parameter's quantile."""
    if len(y) <= 2 * len(names) + 1 or y.std() < 1e-9 * abs(y.mean()):
        return {}
    u = 2 * x - 1
    terms = np.concatenate([u, u * u - 1 / 3], axis=1)
    terms = terms - terms.mean(0)
    fitted = np.linalg.lstsq(terms, y - y.mean(), rcond=None)[0]
    own = np.array([(terms[:, [k, k + len(names)]] @ fitted[[k, k + len(names)]]).var() for k in range(len(names))])
    rest = max(0.0, float((y - y.mean() - terms @ fitted).var()))
    whole = own.sum() + rest
    parts = {name: float(part / whole) for name, part in zip(names, own, strict=True)}
    return dict(sorted(parts.items(), key=lambda item: -item[1])) | {"together": float(rest / whole)}
