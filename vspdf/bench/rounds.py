"""Interleaved rounds: every candidate of a round is timed before the next round starts."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PRODUCTS = ("forward", "grad_input", "grad_values")

Candidate = dict[str, Callable[[], Any]]  # product -> one timed call


def time_rounds(candidates: dict[str, Candidate], rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of every (candidate, product) in each round; "layer" is the sum of a round's three products."""
    times: dict[tuple[str, str], list[float]] = {}
    for i in range(rounds + 1):
        for product in (*PRODUCTS, "layer"):
            for name, candidate in candidates.items():
                if product not in candidate:
                    continue
                start = time.perf_counter()
                candidate[product]()
                seconds = time.perf_counter() - start
                if i:  # round 0 warms up
                    times.setdefault((name, product), []).append(seconds)
    for name, candidate in candidates.items():
        if all(product in candidate for product in PRODUCTS):
            columns = zip(*(times[name, product] for product in PRODUCTS), strict=True)
            times[name, "layer"] = [sum(column) for column in columns]
    return times


def _quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, high


def write_csv(result: dict[str, Any], path: Path) -> None:
    """The rows of a result, with the hardware and versions in every line."""
    facts = {k: str(v) for k, v in {**result["hardware"], **result["versions"]}.items() if k not in result["rows"][0]}
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*result["rows"][0], *facts])
        writer.writeheader()
        writer.writerows({**row, **facts} for row in result["rows"])
