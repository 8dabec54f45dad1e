"""Interleaved rounds: every candidate of a round is timed before the next round starts, and each round is judged.

A speed-up is the median of the ratios of a round's two times: what slows a whole round down cancels out. Rounds go on
until the interval of that median is narrow, or time is up. A round that other programs disturbed is left out where
enough are left. Short calls are repeated inside a round.
"""

from __future__ import annotations

import csv
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from vspdf.errors import in_one_line
from vspdf.kernels.cpu import PRODUCTS
from vspdf.kernels.hardware import check_threads

T = TypeVar("T")

HELD_UP = 0.85  # of a call's best share of the processor: below it, others had the cores
BUSY = 0.5  # cores that other programs keep at work: more, and a measurement says so
SHORT = 1e-3  # seconds: a call that takes less is repeated until it does
LEAST, FEWEST = 7, 3  # rounds before an interval counts, and where time is up
NOISE = 0.1  # width of the interval over the ratio: wider, and the figure is noise

Candidate = dict[str, Callable[[], Any]]  # product -> one timed call


class Timed(NamedTuple):
    """One call: seconds on the wall, and of the processor over all threads; of several, their mean."""

    seconds: float
    cpu_seconds: float

    @classmethod
    def of(cls, call: Callable[[], Any], repeats: int = 1) -> Timed:
        cpu, start = time.process_time(), time.perf_counter()
        for _ in range(repeats):
            call()
        return cls((time.perf_counter() - start) / repeats, (time.process_time() - cpu) / repeats)


@contextmanager
def on_threads(count: int | None) -> Iterator[int]:
    """torch works on so many threads inside the block, on as many as it has by default; gives their number."""
    if count:
        check_threads("`threads`", count)
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)


class Ratio(NamedTuple):
    """How many times faster: median of the ratios of undisturbed rounds, and its 95 % interval."""

    median: float
    low: float
    high: float
    disturbed: int  # rounds, of all

    @property
    def width(self) -> float:
        """Of the interval, as a fraction of the median."""
        return (self.high - self.low) / self.median

    def noisy(self, rounds: int) -> bool:
        """Whether it is noise: its interval is wider than `NOISE`, or most of all rounds were disturbed."""
        return self.width > NOISE or 2 * self.disturbed > rounds


class Budget(NamedTuple):
    """How many rounds: exactly `rounds`, or until the interval of every ratio is `width` wide or `seconds` are gone."""

    rounds: int | None = None
    seconds: float = 10.0
    width: float = 0.02


def time_rounds(
    candidates: dict[str, Candidate], budget: int | Budget, base: str = "dense",
    failed: dict[tuple[str, str], str] | None = None,
) -> dict[tuple[str, str], list[Timed]]:  # fmt: skip
    """Times of every (candidate, product) in each round; "layer" is the sum of a round's three products.

    One that is settled against `base` is not timed any more, so that its column is shorter than that of the base. With
    `failed`, one that raises is timed no more and has no times; why is told there.
    """
    budget = Budget(budget) if isinstance(budget, int) else budget
    repeats: dict[tuple[str, str], int] = {}
    times: dict[tuple[str, str], list[Timed]] = {}
    for key in [(name, product) for product in (*PRODUCTS, "layer") for name in candidates]:
        if key[1] in (calls := candidates[key[0]]) and (count := _tried(_warmed, key, failed, calls[key[1]])):
            repeats[key], times[key] = count, []
    active, start, done = set(candidates), time.perf_counter(), 0
    while active and (budget.rounds is None or done < budget.rounds):
        for (name, product), count in list(repeats.items()):
            if name not in active and name != base:
                continue
            if timed := _tried(Timed.of, (name, product), failed, candidates[name][product], count):
                times[name, product].append(timed)
            else:
                del repeats[name, product], times[name, product]
        done += 1
        if budget.rounds is None:
            active -= {name for name in active if done >= LEAST and _settled(name, times, base, budget.width)}
            if done >= FEWEST and time.perf_counter() - start > budget.seconds:
                break
    for name in candidates:
        if all((name, product) in times for product in PRODUCTS):
            columns = zip(*(times[name, product] for product in PRODUCTS), strict=True)
            times[name, "layer"] = [Timed(*map(sum, zip(*column, strict=True))) for column in columns]
    return times


def _tried(
    run: Callable[..., T], key: tuple[str, str], failed: dict[tuple[str, str], str] | None, *given: Any
) -> T | None:
    """What a call comes to; None where it raises and `failed` is there to be told why."""
    try:
        return run(*given)
    except Exception as error:  # others' code
        if failed is None:
            raise
        failed[key] = in_one_line(error)
        return None


def _warmed(call: Callable[[], Any]) -> int:
    """Calls it until it is warm, and says how often it is to be called in a round."""
    seconds = Timed.of(call).seconds
    if seconds < 0.1:  # plans, tuning and cold caches were in the first
        seconds = min(seconds, Timed.of(call).seconds)
    return min(1000, math.ceil(SHORT / max(seconds, 1e-9)))


def _settled(name: str, times: dict[tuple[str, str], list[Timed]], base: str, width: float) -> bool:
    mine = [key for key in times if key[0] == name]
    if name == base:  # its own ratio is 1: it goes on for the others
        return True
    return all(compared(times[base, p], times[n, p]).width <= width for n, p in mine if (base, p) in times)


def held_up(column: Sequence[Timed]) -> list[bool]:
    """By round, whether a call got less of the processor than in its best one: others were at work."""
    shares = [timed.cpu_seconds / timed.seconds for timed in column]
    return [share < HELD_UP * max(shares) for share in shares]


def compared(base: Sequence[Timed], mine: Sequence[Timed], disturbed: Sequence[bool] | None = None) -> Ratio:
    """How many times faster `mine` is than `base`, round by round, over the rounds that `mine` has.

    `disturbed` tells of rounds that are known to be; those in which either was held up are too. Where fewer than half
    would be left, all count.
    """
    base = base[: len(mine)]
    known = (disturbed or [False] * len(base))[: len(mine)]
    bad = [any(each) for each in zip(known, held_up(base), held_up(mine), strict=True)]
    pairs = [a.seconds / b.seconds for a, b in zip(base, mine, strict=True)]
    good = [ratio for ratio, wrong in zip(pairs, bad, strict=True) if not wrong]
    used = good if 2 * len(good) >= len(pairs) else pairs
    return Ratio(statistics.median(used), *interval(used), sum(bad))


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median, by ranks: whatever the distribution; of fewer than six numbers, their ends.

    The k-th smallest and largest bound the median unless fewer than k of n fair coins fall on one side.
    """
    from scipy.stats import binom

    ranked, n = sorted(numbers), len(numbers)
    k = max(1, int(binom.ppf(0.025, n, 0.5)))
    return ranked[k - 1], ranked[n - k]


def ideal(sparsity: float) -> float:
    """Speed-up at which all that is left away takes no time; a tenth more, for a dense side that has no good moment."""
    return 1.1 / (1 - sparsity) if sparsity < 1 else math.inf


def others_at_work() -> float | None:
    """Cores that were kept busy in the last minute, as the system counts; None where it does not."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def busy(load: float | None) -> str:
    """A line where others were at work as something was measured, by `others_at_work` before it; else empty."""
    if load is None or load <= BUSY:
        return ""
    return f"The machine was busy when this began: a load of {load:.1f} on {os.cpu_count()} cores."


def sensors() -> dict[str, float]:
    """Clock (``mhz``, of the slowest core) and temperature (``celsius``, of the hottest sensor), where readable."""
    found: dict[str, float] = {}
    with suppress(OSError, ValueError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        if clocks := [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]:
            found["mhz"] = min(clocks)
    heat = []
    for glob in ("class/thermal/thermal_zone*/temp", "class/hwmon/hwmon*/temp*_input"):
        for file in Path("/sys").glob(glob):
            with suppress(OSError, ValueError):
                heat.append(int(file.read_text()) / 1000)
    return found | ({"celsius": max(heat)} if heat else {})


def write_csv(result: dict[str, Any], path: Path) -> None:
    """The rows of a result, with the model, the hardware and the versions in every line."""
    first: dict[str, Any] = next(iter(result["rows"]), {})
    facts = {**result.get("model", {}), **result["hardware"], **result["versions"], "load": result.get("load")}
    told = {key: str(value) for key, value in facts.items() if key not in first}
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*first, *told])
        writer.writeheader()
        writer.writerows({**row, **told} for row in result["rows"])
