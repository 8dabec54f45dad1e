"""What a row of weights costs a column, and what columns wait for each other: the event level's program in a law.

For an output row that brings z weights to a column, with L tokens a PE::

    t = max(z · (c0 + v) + max(0, words - 2/3 z · c0) + row, z · share + 1)        v = ceil(L / rate)

AXPYs with their start-ups one after the other; the words of a sum, which pass in start-ups, of which two thirds come at
a time when a word is there, and beside everything else where these do not hold them; or one wavelet a cycle on the link
of the edge, which `share` columns have in common.
`row`: the command and the clearing of the next sum. Which z a row costs, columns settle between them (`pace`). Each
term is a mechanism of simulator/events/programs/streaming.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np

from vspdf.simulator.machine import Machine

# Fitted to the event level (tests/simulator/test_law.py): of AXPYs' start-ups, those in which a passing sum finds a
# word.
GAPS = 2 / 3


@dataclass(frozen=True)
class Law:
    """Cycles of an output row on one column that it brings z weights.

    Attributes
    ----------
    start_up : float
        c0, cycles between a weight's arrival and its first multiply-add.
    vector : int
        Cycles of the multiply-adds of a weight with the local tokens.
    sums : float
        Words per weight that pass by on their way down a column and are added up (1 in the gradient).
    row : float
        Beside the weights: the command and clearing the next sum.
    words : float
        Cycles that a passing sum takes where no start-up holds it.
    share : float
        Columns that one link of the edge feeds.
    wire : float
        Wavelets of a weight.
    hop : float
        From one place of the ring to the next, for each sum that a column may hold meanwhile.
    wait : float
        -1: as in forward. Else the fraction of the way from the mean to the fullest column that a row costs, as in the
        gradient, where a row's dy goes to all columns.
    """

    start_up: float
    vector: int
    sums: float
    row: float
    words: float
    share: float
    wire: float
    hop: float
    wait: float = -1.0

    @property
    def weight(self) -> float:
        return self.start_up + self.vector + self.sums

    def __call__(self, z: float) -> float:
        return max(float(self.work(z)), z * self.share * self.wire + 1)

    def work(self, z: Any) -> Any:
        """Of a number or an array of weights: what the column itself has to do."""
        return z * self.weight + np.maximum(0.0, self.words - GAPS * z * self.start_up) + self.row

    def attribute(self, z: float, rows: float) -> dict[str, float]:
        """Splits the cycles of `rows` rows of z weights into the parts that they go to."""
        weights, work = z * (self.start_up + self.vector), float(self.work(z))
        return {
            "multiply-add": rows * z * self.vector,
            "start-up": rows * z * self.start_up,
            "reduction": rows * (work - weights),
            "edge" if self.share > 1 else "broadcast": rows * (self(z) - work),
        }


# What columns wait for each other: cycles that a row costs, between the mean column's and the fullest one's.


@lru_cache(maxsize=65536)
def pace(law: Law, queue: int, block: int, density: float, columns: int, rows: int) -> float:
    """Cycles of a row when each of `columns` gets Binomial(block, density) weights, in `rows` rows.

    In forward a column lags behind those fed by the same link by no more than the `queue` of weights in front of it:
    the slowest way through the rows stays with a column, or jumps to another one and takes back a queue of weights. The
    expected number of such ways bounds the pace: min over θ of (ln E exp(θ t) + ln(1 + (share - 1) exp(-θ q))) / θ,
    with q in cycles.
    """
    mean = law(block * density)
    if density >= 1:
        return max(law.hop * columns, mean)
    sigma = math.sqrt(block * density * (1 - density) / rows)
    k, chance = _binomial(block, density)
    below = np.minimum(np.cumsum(chance), 1.0) ** columns
    fullest = law(float(k[-1] - below[:-1].sum()))
    slowest = min(fullest, law(block * density + sigma * _normal_most(columns)))
    return _between(law, k, chance, queue, columns, mean, slowest, fullest)


def measured_pace(law: Law, queue: int, counts: np.ndarray) -> float:
    """`pace` of real counts [row, column]."""
    rows, columns = counts.shape
    mean, slowest, fullest = (law(float(z)) for z in (counts.mean(), counts.sum(0).max() / rows, counts.max(1).mean()))
    chance = np.bincount(counts.ravel()) / counts.size
    k = np.flatnonzero(chance)
    return _between(law, k, chance[k], queue, columns, mean, slowest, fullest)


_THETA = np.exp(np.linspace(math.log(1e-4), math.log(20.0), 120))  # per weight


def _between(
    law: Law, k: np.ndarray, chance: np.ndarray, queue: int, columns: int, mean: float, slowest: float, fullest: float
) -> float:
    if law.wait >= 0:
        return max(slowest, mean + law.wait * (fullest - mean))
    theta = _THETA / law.weight
    grow = theta[:, None] * law.work(k) + np.log(np.maximum(chance, 1e-300))
    most = grow.max(1)
    stay = most + np.log(np.exp(grow - most[:, None]).sum(1)) + np.log1p((law.share - 1) * np.exp(-_THETA * queue))
    return max(law.hop * columns, min(fullest, max(slowest, float((stay / theta).min()))))


@lru_cache(maxsize=4096)
def _binomial(trials: int, density: float) -> tuple[np.ndarray, np.ndarray]:
    """Counts that are likely at all, and their probabilities."""
    mean, sigma = trials * density, math.sqrt(trials * density * (1 - density))
    low, high = max(0, int(mean - 12 * sigma - 12)), min(trials, int(mean + 12 * sigma + 24))
    k = np.arange(low, high + 1)
    logs = _log_factorials(1 << trials.bit_length())
    log_pmf = logs[trials] - logs[k] - logs[trials - k] + k * math.log(density) + (trials - k) * math.log1p(-density)
    return k, np.exp(log_pmf)


@lru_cache(maxsize=64)
def _normal_most(columns: int) -> float:
    x = np.linspace(-9, 9, 4001)
    below = np.cumsum(np.exp(-x * x / 2)) * (x[1] - x[0]) / math.sqrt(2 * math.pi)
    return float((x * np.diff(np.minimum(below, 1.0) ** columns, prepend=0.0)).sum())


@lru_cache(maxsize=64)
def _log_factorials(n: int) -> np.ndarray:
    """ln 0! to ln n!"""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])


@lru_cache(maxsize=65536)
def law(machine: Machine, columns: int, tokens: int, product: str, wire: float = 1.0, heads: int = 1) -> Law:
    """The law of a product on `columns` columns with `tokens` a PE.

    `wire`: wavelets of a weight on the link; `heads`: sums that a row sends, attention's.
    """
    rate = 2 * machine.fmac_fp16_rate / machine.sum_bytes
    vector, words = ceil(tokens / rate), tokens * machine.sum_bytes / 4 * heads
    command = machine.reduce_startup + machine.command_cycles
    share = max(1.0, columns / machine.edge_links)
    c0 = machine.trigger_cycles
    if product == "grad_values":
        row = command + 2 * machine.vector_startup + ceil(tokens / 2) + 2 * c0 + machine.relay_cycles
        return Law(c0, vector, 1, row, 0, share, wire, 0, machine.gradient_wait)
    row = command + machine.vector_startup + vector
    hop = (2 * machine.ramp_cycles + 1 + 2 * machine.hop_cycles) / max(1, machine.sums_held - 1)
    return Law(c0, vector, 0, row, words + machine.vector_startup, share, wire, hop)
