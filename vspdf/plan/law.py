"""What loss to expect of a model: the law of dense ones, and how many of their weights a kept weight counts for.

Loss over weights N and bytes D of text, read as bytes: ``L = e + a·(N/N₀)^-α + b·(D/D₀)^-β`` nats a byte, fitted to
dense models on the Python standard library's sources (study "toy" and beside it). A kept weight of a sparse model
counts for M dense ones, the less the more text it has seen: ``M = c·(D/kept)^-γ``, fitted to studies that ship.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from vspdf.config.loading import find_config
from vspdf.files import read_json

# The fit, and the two others with which it was compared: what they say apart is a part of the doubt.
_ANCHOR = (98_304, 3.87e6)  # N₀ of d = 64 in two layers, D₀ of one epoch
_TERMS = (0.53, 0.37, 0.63)
_EXPONENTS = ((0.35, 0.35), (0.30, 0.40), (0.40, 0.30))
FITS = len(_EXPONENTS)
# Dense models beside sparse ones, all of them with attention as wide as the model.
_STUDIES = (
    "multiplier-128", "multiplier", "frontier-5min", "frontier-bf16", "frontier-256", "frontier-longer",
    "frontier-20min", "same-size", "size-cap",
)  # fmt: skip
_ENDS_DENSE = "set-then-dense"
DENSE_SHARE = 1 / 3  # of its steps, the last ones
METHODS = ("static", "set", _ENDS_DENSE)


def loss(weights: float, tokens: float, fit: int = 0) -> float:
    """Nats a byte that a dense model of so many weights in its layers ends at, after so many bytes."""
    (e, a, b), (alpha, beta), (n, d) = _TERMS, _EXPONENTS[fit], _ANCHOR
    return e + a * (weights / n) ** -alpha + b * (tokens / d) ** -beta


def size(reached: float, tokens: float) -> float:
    """Weights of the dense model that ends at a loss after so many bytes; NaN where none does."""
    (e, a, b), (alpha, beta), (n, d) = _TERMS, _EXPONENTS[0], _ANCHOR
    rest = reached - e - b * (tokens / d) ** -beta
    return n * (rest / a) ** (-1 / alpha) if rest > 0 else math.nan


@dataclass(frozen=True)
class Point:
    """What a kept weight was worth in an arm of a study.

    Attributes
    ----------
    study, arm, method : str
        The method is one of `METHODS`.
    seen : float
        Bytes of text a kept weight, of those kept on average over the steps.
    m : float
        Dense weights that it counts for: between the study's dense models where those are a family, else by the law,
        less what it misses the study's dense models by.
    """

    study: str
    arm: str
    method: str
    seen: float
    m: float


def points() -> list[Point]:
    """What a kept weight was worth in every study with dense arms and sparse ones of these methods, by test loss."""
    found = []
    for study in _STUDIES:
        results = read_json(find_config(study, "studies", "study").parent / "results" / f"{study}.json")
        between = {each["method"]: each["m"] for each in results["multipliers"]}
        arms = [arm for arm in results["arms"] if arm["test_loss"]["mean"]]
        missed = fmean(_lost(arm) - loss(arm["kept"], _read(arm)) for arm in arms if arm["kept"] == arm["weights"])
        for arm in arms:
            if method := _method(arm):
                by_law = size(_lost(arm) - missed, _read(arm)) / arm["kept"]
                found.append(
                    Point(study, arm["name"], method, _read(arm) / arm["kept"], between.get(arm["name"], by_law))
                )
    return found


def _method(arm: dict[str, Any]) -> str | None:
    """By name, and by phases, since other methods' names begin alike."""
    first, last = arm["phases"][0]["sparsity"], arm["phases"][-1]["tokens"]
    if arm["name"].startswith(_ENDS_DENSE):
        return _ENDS_DENSE if abs(last / _read(arm) - DENSE_SHARE) < 0.05 else None
    constant = len(arm["phases"]) == 1 and arm["kept"] == (1 - first) * arm["weights"] < arm["weights"]
    name = str(arm["name"]).partition("-")[0]
    return name if constant and name in METHODS else None


def _lost(arm: dict[str, Any]) -> float:
    return float(arm["test_loss"]["mean"])


def _read(arm: dict[str, Any]) -> int:
    """Bytes of text that a run reads."""
    return sum(phase["tokens"] for phase in arm["phases"])


@dataclass(frozen=True)
class Worth:
    """M of a method over the bytes of text that a kept weight has seen.

    Attributes
    ----------
    first : float
        M at one byte a weight, by the line; nothing was measured there.
    slope : float
        Of the logarithms; the same for all methods.
    apart : float
        By what factor the farthest point lies off its line.
    """

    first: float
    slope: float
    apart: float

    def at(self, seen: float) -> tuple[float, float, float]:
        """Least, usual and greatest M."""
        usual = self.first * seen**self.slope
        return usual / self.apart, usual, usual * self.apart


def worth() -> dict[str, Worth]:
    """What a kept weight is worth by method of `METHODS`: lines of one slope through all points, in logarithms."""
    measured = points()
    design = np.array([[*(point.method == method for method in METHODS), math.log(point.seen)] for point in measured])
    wanted = np.log([point.m for point in measured])
    lines = np.linalg.lstsq(design, wanted, rcond=None)[0]
    apart = math.exp(float(np.abs(design @ lines - wanted).max()))
    return {m: Worth(math.exp(line), float(lines[-1]), apart) for m, line in zip(METHODS, lines, strict=False)}
