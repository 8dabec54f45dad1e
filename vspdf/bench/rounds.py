"""Interleaved rounds: every candidate of a round is timed before the next round starts, and each round is judged.

A speed-up is the median of the ratios of a round's two times, with the quartiles of these ratios as its spread: what
slows a whole round down cancels out. A round that other programs disturbed is left out where enough are left.
"""

from __future__ import annotations

import csv
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PRODUCTS = ("forward", "grad_input", "grad_values")
HELD_UP = 0.85  # of a call's best share of the processor: below it, others had the cores
BUSY = 0.5  # cores that other programs keep at work: more, and a measurement says so

Candidate = dict[str, Callable[[], Any]]  # product -> one timed call


class Timed(NamedTuple):
    """One call: seconds on the wall, and of the processor over all threads."""

    seconds: float
    cpu_seconds: float

    @classmethod
    def of(cls, call: Callable[[], Any]) -> Timed:
        cpu, start = time.process_time(), time.perf_counter()
        call()
        return cls(time.perf_counter() - start, time.process_time() - cpu)


class Ratio(NamedTuple):
    """How many times faster: median and quartiles of the ratios of undisturbed rounds."""

    median: float
    low: float
    high: float
    disturbed: int  # rounds, of all


def time_rounds(candidates: dict[str, Candidate], rounds: int) -> dict[tuple[str, str], list[Timed]]:
    """Times of every (candidate, product) in each round; "layer" is the sum of a round's three products."""
    times: dict[tuple[str, str], list[Timed]] = {}
    for i in range(rounds + 1):
        for product in (*PRODUCTS, "layer"):
            for name, candidate in candidates.items():
                if product in candidate:
                    timed = Timed.of(candidate[product])
                    if i:  # round 0 warms up
                        times.setdefault((name, product), []).append(timed)
    for name, candidate in candidates.items():
        if all(product in candidate for product in PRODUCTS):
            columns = zip(*(times[name, product] for product in PRODUCTS), strict=True)
            times[name, "layer"] = [Timed(*map(sum, zip(*column, strict=True))) for column in columns]
    return times


def held_up(column: Sequence[Timed]) -> list[bool]:
    """By round, whether a call got less of the processor than in its best one: others were at work."""
    shares = [timed.cpu_seconds / timed.seconds for timed in column]
    return [share < HELD_UP * max(shares) for share in shares]


def compared(base: Sequence[Timed], mine: Sequence[Timed], disturbed: Sequence[bool] | None = None) -> Ratio:
    """How many times faster `mine` is than `base`, round by round.

    `disturbed` tells of rounds that are known to be; those in which either was held up are too. Where fewer than half
    would be left, all count.
    """
    bad = [any(each) for each in zip(disturbed or [False] * len(base), held_up(base), held_up(mine), strict=True)]
    pairs = [a.seconds / b.seconds for a, b in zip(base, mine, strict=True)]
    good = [ratio for ratio, wrong in zip(pairs, bad, strict=True) if not wrong]
    used = good if 2 * len(good) >= len(pairs) else pairs
    return Ratio(statistics.median(used), *quartiles(used), sum(bad))


def ideal(sparsity: float) -> float:
    """Speed-up at which all that is left away takes no time; a tenth more, for a dense side that has no good moment."""
    return 1.1 / (1 - sparsity) if sparsity < 1 else math.inf


def quartiles(numbers: Sequence[float]) -> tuple[float, float]:
    """Of few numbers, their ends included."""
    if len(numbers) < 2:
        return numbers[0], numbers[0]
    low, _, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, high


def others_at_work() -> float | None:
    """Cores that were kept busy in the last minute, as the system counts; None where it does not."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def write_csv(result: dict[str, Any], path: Path) -> None:
    """The rows of a result, with the model, the hardware and the versions in every line."""
    first = result["rows"][0]
    facts = {**result.get("model", {}), **result["hardware"], **result["versions"], "load": result.get("load")}
    told = {key: str(value) for key, value in facts.items() if key not in first}
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*first, *told])
        writer.writeheader()
        writer.writerows({**row, **told} for row in result["rows"])
