"""The weight-streaming dataflow, one linear layer: what three products cost, dense and sparse, and how sure that is.

Activations lie on the wafer: `columns` PEs along x share the features (a ring), the rows of the wafer and `replicas` of
the ring side by side share the tokens. Weights come in row by row; each one triggers an AXPY on the local tokens of its
feature; a command at the end of an output row sends the row's partial sums around the ring beside the next row's AXPYs.
For an output row that brings z weights to a column, with L tokens a PE::

    t = max(z · (c0 + v),  z · v + words,  z + 1) + c_r,    v = ceil(L / simd), words = ceil(L / 2)

AXPYs with their start-ups; or the one datapath, which the sums' micro-thread shares (it fits into start-ups, beyond
them it is exposed); or one wavelet a cycle on the link. The command's own task c_r runs alone: tasks are not preempted.
What z is, columns settle between them: the fullest one's in lock-step, the mean when decoupled (`pace`).
docs/simulator.md tells it at length, with the assumptions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil
from typing import Any, TypeVar

import numpy as np

from vspdf.errors import UserError, did_you_mean
from vspdf.simulator.machine import Machine

POLICIES = ("lock-step", "slack", "decoupled")
START_UPS = (0, 2, 5, 10)  # c0 of the published band
PRODUCTS = ("forward", "grad_input", "grad_values")
PARTS = ("multiply-add", "start-up", "imbalance", "reduction", "broadcast", "fill", "I/O")


@dataclass(frozen=True)
class Assumption:
    """The two properties that nobody has published and that decide a speed-up.

    Attributes
    ----------
    start_up : float
        c0, cycles between a weight's arrival and its first multiply-add.
    policy : {"lock-step", "slack", "decoupled"}
        How far the columns of a ring may drift apart: not at all, as far as the weights' queues reach, at will.
    """

    start_up: float
    policy: str

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UserError(f"unknown synchronisation policy '{self.policy}'.{did_you_mean(self.policy, POLICIES)}")


def central(machine: Machine) -> Assumption:
    return Assumption(machine.trigger_cycles, "slack")


def band(machine: Machine) -> list[Assumption]:
    """All cases of the published band, the central one first."""
    middle = central(machine)
    others = [Assumption(c0, policy) for c0 in START_UPS for policy in POLICIES]
    return [middle, *(case for case in others if case != middle)]


# ---- one product -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """Cycles of an output row on one column; see the module's text.

    `sums`: words per weight that pass by on their way down a column and are added up (1 in the gradient).
    """

    start_up: float
    vector: int
    words: int
    command: float
    sums: int = 0

    def __call__(self, z: float) -> float:
        triggered, shared = z * (self.start_up + self.vector), z * (self.vector + self.sums) + self.words
        return max(triggered, shared, z + 1) + self.command

    def attribute(self, z: float, rows: float) -> dict[str, float]:
        """Splits the cycles of `rows` rows of z weights into the parts that they go to."""
        triggered, shared = z * (self.start_up + self.vector), z * (self.vector + self.sums) + self.words
        work = max(triggered, shared)
        return {
            "multiply-add": rows * z * self.vector,
            "start-up": rows * z * self.start_up,
            "reduction": rows * (work - triggered + self.command),
            "broadcast": rows * (max(work, z + 1) - work),
        }


# What columns wait for each other: the weights a row costs, between the mean and the fullest column's.


@lru_cache(maxsize=4096)
def pace(policy: str, queue: int, block: int, density: float, columns: int, rows: int) -> float:
    """Weights that a row costs when each of `columns` gets Binomial(block, density) of them, in `rows` rows.

    lock-step
        The expected largest count, exactly.
    decoupled
        The expected largest total over all rows, by its normal limit.
    slack
        A column may lag behind the stream by `queue` weights. The slowest way through rows stays with one column or
        jumps to another, which takes back `queue` weights. The expected number of such ways through many rows bounds
        the pace: the least over θ of (ln E exp(θ z) + ln(1 + (columns − 1) exp(−θ queue))) / θ. It lies 0 to 20 %
        above a simulation of the queues (tests/test_simulator_layer.py).
    """
    fullest = _expected_most(block, density, columns)
    sigma = math.sqrt(block * density * (1 - density) / rows)
    slowest = min(fullest, block * density + sigma * _normal_most(columns))
    if policy == "slack":
        return min(fullest, max(slowest, _path(block * np.log1p(density * np.expm1(_THETA)), columns, queue)))
    return fullest if policy == "lock-step" else slowest


def measured_pace(policy: str, queue: int, counts: np.ndarray) -> float:
    """`pace` of real counts [row, column]."""
    rows, columns = counts.shape
    slowest, fullest = float(counts.sum(0).max()) / rows, float(counts.max(1).mean())
    if policy != "slack":
        return fullest if policy == "lock-step" else slowest
    histogram = np.bincount(counts.ravel()) / counts.size
    grow = np.exp(_THETA[:, None] * (np.arange(len(histogram)) - len(histogram) + 1)) @ histogram
    return min(fullest, max(slowest, _path(np.log(grow) + _THETA * (len(histogram) - 1), columns, queue)))


_THETA = np.exp(np.linspace(math.log(1e-3), math.log(20.0), 300))


def _path(log_growth: np.ndarray, columns: int, queue: int) -> float:
    return float(((log_growth + np.log1p((columns - 1) * np.exp(-_THETA * queue))) / _THETA).min())


def _expected_most(trials: int, density: float, columns: int) -> float:
    """Of `columns` binomial counts."""
    mean, sigma = trials * density, math.sqrt(trials * density * (1 - density))
    low, high = max(0, int(mean - 12 * sigma - 12)), min(trials, int(mean + 12 * sigma + 24))
    k = np.arange(low, high + 1)
    logs = _log_factorial(trials)
    log_pmf = logs[trials] - logs[k] - logs[trials - k] + k * math.log(density) + (trials - k) * math.log1p(-density)
    below = np.minimum(np.cumsum(np.exp(log_pmf)), 1.0) ** columns
    return float(k[-1] - below[:-1].sum())


@lru_cache(maxsize=64)
def _normal_most(columns: int) -> float:
    x = np.linspace(-9, 9, 4001)
    below = np.cumsum(np.exp(-x * x / 2)) * (x[1] - x[0]) / math.sqrt(2 * math.pi)
    return float((x * np.diff(np.minimum(below, 1.0) ** columns, prepend=0.0)).sum())


@lru_cache(maxsize=1)
def _factorials() -> list[np.ndarray]:
    return [np.zeros(1)]


def _log_factorial(n: int) -> np.ndarray:
    table = _factorials()
    if len(table[0]) <= n:
        table[0] = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, max(n, 1024) + 1)))])
    return table[0]


@dataclass(frozen=True)
class Weights:
    """A weight matrix as the wafer sees it.

    Attributes
    ----------
    density : float
        Of kept weights; 1 is dense.
    mask : bool array [out_features, in_features], optional
        The real positions; without it every weight is kept by chance `density`.
    """

    out_features: int
    in_features: int
    density: float = 1.0
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)
    _counts: dict[tuple[int, bool], np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features

    @property
    def nnz(self) -> float:
        return self.numel * self.density

    def sides(self, transposed: bool) -> tuple[int, int]:
        """(output rows, features that columns share) of the forward product, or of the backward ones."""
        return (self.in_features, self.out_features) if transposed else (self.out_features, self.in_features)

    def counts(self, columns: int, transposed: bool) -> np.ndarray:
        """Kept weights [output row, column] of the real mask."""
        key = (columns, transposed)
        if key not in self._counts:
            assert self.mask is not None
            mask = self.mask.T if transposed else self.mask
            edges = np.linspace(0, mask.shape[1], columns + 1).round().astype(int)
            total = np.zeros((mask.shape[0], mask.shape[1] + 1), np.int32)
            np.cumsum(mask, axis=1, out=total[:, 1:])
            self._counts[key] = total[:, edges[1:]] - total[:, edges[:-1]]
        return self._counts[key]


@dataclass
class Cost:
    """Cycles of a product, or of many, by cause (`parts` add up to `cycles`) and by what bound each product."""

    cycles: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    macs: float = 0.0  # multiply-adds asked for, over the wafer
    io: float = 0.0  # cycles that the host's link is busy

    def add(self, other: Cost, times: float = 1.0) -> None:
        self.cycles += times * other.cycles
        self.macs += times * other.macs
        self.io += times * other.io
        for mine, theirs in ((self.parts, other.parts), (self.bounds, other.bounds)):
            for name, cycles in theirs.items():
                mine[name] = mine.get(name, 0.0) + times * cycles

    @property
    def bound_by(self) -> str:
        """Names what bounds most of the time: compute, reduction, broadcast, I/O, or latency (filling and draining)."""
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def overhead(self) -> float:
        """Share of the time in which the average datapath does not multiply."""
        return 1 - self.parts.get("multiply-add", 0.0) / self.cycles if self.cycles else 0.0


def bounded(parts: dict[str, float], macs: float, io: float = 0.0) -> Cost:
    """A product's cost from its parts without I/O, and the cycles that its stream takes beside it."""
    work = sum(parts.values())
    groups = {
        "compute": sum(parts.get(name, 0.0) for name in ("multiply-add", "start-up", "imbalance", "elementwise")),
        "reduction": parts.get("reduction", 0.0),
        "broadcast": parts.get("broadcast", 0.0),
        "latency": parts.get("fill", 0.0),
    }
    bound = "I/O" if io > work else max(groups, key=lambda name: groups[name])
    cycles = max(work, io)
    return Cost(cycles, parts | {"I/O": cycles - work}, {bound: cycles}, macs, io)


@dataclass(frozen=True)
class Mapping:
    """How activations lie on the wafer: `columns` of a ring share features, `rows` and `replicas` share tokens."""

    columns: int
    replicas: int
    rows: int
    local: int  # tokens of a PE
    tokens: int  # of the wafer

    @classmethod
    def of(cls, machine: Machine, columns: int, tokens: int) -> Mapping:
        replicas = min(machine.width // columns, tokens)
        local = -(-tokens // (replicas * machine.height))
        return cls(columns, replicas, min(machine.height, -(-tokens // (replicas * local))), local, tokens)


def candidates(machine: Machine, features: int) -> list[int]:
    """Numbers of columns worth trying: for every number of replicas the widest ring, and the one of the same block of
    `features` (the smaller side) that leaves no column idle; narrow ones that differ by less than 4 % are one."""
    found: set[int] = set()
    last = machine.width + 1
    for replicas in range(1, machine.width + 1):
        widest = min(machine.width // replicas, features)
        if replicas > 12 and (widest >= 0.96 * last or widest < 2):
            continue
        found |= {widest, -(-features // -(-features // widest))}
        last = widest
    return sorted(found, reverse=True)


@lru_cache(maxsize=4096)
def law(machine: Machine, start_up: float, tokens: int, product: str) -> Law:
    return Law(
        start_up,
        ceil(tokens / machine.fmac_fp16_rate),
        ceil(tokens / 2),
        machine.reduce_startup,
        product == "grad_values",
    )


@lru_cache(maxsize=4096)
def fill(machine: Machine, mapping: Mapping) -> float:
    """Cycles from a first weight at the edge to all PEs at work, and from a last weight to the last sum at home."""
    spread = (machine.width + mapping.rows) * machine.hop_cycles + 2 * machine.ramp_cycles
    return spread + machine.reduce_startup + mapping.columns * machine.relay_cycles + ceil(mapping.local / 2)


def product_cost(
    machine: Machine, clock: float, weights: Weights, mapping: Mapping, product: str, assumption: Assumption,
    *, exact: bool = True,
) -> Cost:  # fmt: skip
    """One product of one layer.

    Parameters
    ----------
    clock : float
        Hz; turns the host's bytes a second into cycles.
    product : {"forward", "grad_input", "grad_values"}
        `grad_values` rides on the stream of weights of `grad_input` and sends sums out (an assumption).
    exact : bool
        False: columns never wait for each other, a quick lower bound.
    """
    transposed = product != "forward"
    rows, features = weights.sides(transposed)
    block = -(-features // mapping.columns)
    rule = law(machine, assumption.start_up, mapping.local, product)
    z = block * weights.density
    parts = rule.attribute(z, rows)
    if exact and 0 < weights.density < 1:
        queue = machine.in_queue_depth[0] + machine.router_buffer
        if weights.mask is None:
            slowest = pace(assumption.policy, queue, block, weights.density, mapping.columns, rows)
        else:
            slowest = measured_pace(assumption.policy, queue, weights.counts(mapping.columns, transposed))
        parts["imbalance"] = rows * max(0.0, rule(slowest) - rule(z))
    parts["fill"] = fill(machine, mapping)
    if product == "grad_values":  # the last sums come down the columns
        parts["fill"] += (mapping.rows - 1) * machine.relay_cycles
    io = _bytes(machine, weights, product) / machine.host_bandwidth * clock
    return bounded(parts, weights.nnz * mapping.tokens, io)


def _bytes(machine: Machine, weights: Weights, product: str) -> float:
    if product == "grad_values":
        return weights.nnz * machine.gradient_bytes
    return weights.nnz * (machine.dense_weight_bytes if weights.density >= 1 else machine.sparse_weight_bytes)


# ---- a layer ---------------------------------------------------------------------------------------------------------


def product_costs(
    machine: Machine, clock: float, weights: Weights, mapping: Mapping, assumption: Assumption, exact: bool = True
) -> dict[str, Cost]:
    """The three products. Where sending a sparse matrix with its zeros is cheaper, it is sent so."""
    costs = {}
    for product in PRODUCTS:
        cost = product_cost(machine, clock, weights, mapping, product, assumption, exact=exact)
        if weights.density < 1:
            rows, features = weights.sides(product != "forward")
            least = (
                rows * -(-features // mapping.columns) * (assumption.start_up + mapping.local / machine.fmac_fp16_rate)
            )
            if least < cost.cycles:
                whole = Weights(weights.out_features, weights.in_features)
                with_zeros = product_cost(machine, clock, whole, mapping, product, assumption, exact=exact)
                cost = min(cost, with_zeros, key=lambda c: c.cycles)
        cost.macs = weights.nnz * mapping.tokens  # zeros sent are not work asked for
        costs[product] = cost
    return costs


def layer_bytes(mapping: Mapping, weights: Weights) -> int:
    """SRAM of a PE for one layer's activations in fp16: x and, in the backward pass, dx; y or dy."""
    x, y = (-(-n // mapping.columns) for n in (weights.in_features, weights.out_features))
    return 2 * mapping.local * (2 * x + y)


Option = TypeVar("Option")


def best(
    options: Sequence[Option], bound: Callable[[Option], float], exact: Callable[[Option], tuple[float, Any]]
) -> tuple[Option, Any]:
    """The option with the least exact cycles; those whose lower bound is above the best so far are not looked at."""
    found: tuple[float, Option, Any] | None = None
    for at_least, _, option in sorted((bound(option), i, option) for i, option in enumerate(options)):
        if found and at_least >= found[0]:
            break
        cycles, result = exact(option)
        if found is None or cycles < found[0]:
            found = (cycles, option, result)
    assert found is not None
    return found[1], found[2]


@dataclass
class Estimate:
    """One case: the mapping chosen and what it costs."""

    mapping: Any
    products: dict[str, Cost]

    @property
    def total(self) -> Cost:
        total = Cost()
        for cost in self.products.values():
            total.add(cost)
        return total


def estimate_layer(machine: Machine, clock: float, weights: Weights, tokens: int, assumption: Assumption) -> Estimate:
    """The three products of a layer under the best mapping that fits.

    Raises
    ------
    UserError
        If the activations do not fit the wafer; the message says how many tokens do.
    """
    limit = machine.activation_share * machine.sram_bytes
    narrow = min(weights.in_features, weights.out_features)
    options = [Mapping.of(machine, columns, tokens) for columns in candidates(machine, narrow)]
    fitting = [option for option in options if layer_bytes(option, weights) <= limit]
    if not fitting:
        most = max(_most_tokens(machine, weights, option.columns, limit) for option in options)
        raise UserError(
            f"a layer of {weights.in_features} -> {weights.out_features} does not fit {machine.name} with {tokens:,} "
            f"tokens: its activations need {min(layer_bytes(o, weights) for o in options):,} bytes of SRAM a PE, "
            f"{int(limit):,} are there (activation_share of {machine.sram_bytes:,}). "
            + (f"{most:,} tokens fit." if most else "Not even one token does.")
        )

    def lower(option: Mapping) -> float:
        return sum(c.cycles for c in product_costs(machine, clock, weights, option, assumption, exact=False).values())

    def exact(option: Mapping) -> tuple[float, dict[str, Cost]]:
        costs = product_costs(machine, clock, weights, option, assumption)
        return sum(cost.cycles for cost in costs.values()), costs

    return Estimate(*best(fitting, lower, exact))


def _most_tokens(machine: Machine, weights: Weights, columns: int, limit: float) -> int:
    one = layer_bytes(Mapping(columns, 1, 1, 1, 1), weights)
    return int(limit // one) * (machine.width // columns) * machine.height
