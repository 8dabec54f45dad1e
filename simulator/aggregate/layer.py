"""The weight-streaming dataflow, one linear layer: what three products cost, dense and sparse.

Activations lie on the wafer: `columns` PEs along x share the features (a ring), the rows of the wafer and `replicas` of
the ring side by side share the tokens. Weights come in row by row; each one triggers an AXPY on the local tokens of its
feature; a command at the end of an output row sends the row's partial sums around the ring beside the next row's AXPYs.
The law is that of the event level's program, mechanism by mechanism, with the same parameters (`law`);
tests/simulator/test_law.py holds it against the events' recurrences, docs/simulator.md tells it at length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil
from typing import Any, TypeVar

import numpy as np

from vspdf.errors import UserError
from vspdf.simulator.aggregate.law import law, measured_pace, pace
from vspdf.simulator.machine import Machine

PRODUCTS = ("forward", "grad_input", "grad_values")
PARTS = ("multiply-add", "start-up", "imbalance", "reduction", "broadcast", "edge", "fill", "I/O")


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

    @classmethod
    def of_mask(cls, mask: np.ndarray) -> Weights:
        """Of real positions, bool [out_features, in_features]."""
        out_features, in_features = mask.shape
        return cls(out_features, in_features, float(mask.mean()), mask)

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

    @classmethod
    def sum(cls, costs: Iterable[Cost]) -> Cost:
        """Several, added up."""
        total = cls()
        for cost in costs:
            total.add(cost)
        return total

    def add(self, other: Cost, times: float = 1.0) -> None:
        self.cycles += times * other.cycles
        self.macs += times * other.macs
        self.io += times * other.io
        for mine, theirs in ((self.parts, other.parts), (self.bounds, other.bounds)):
            for name, cycles in theirs.items():
                mine[name] = mine.get(name, 0.0) + times * cycles

    @property
    def bound_by(self) -> str:
        """Names what bounds most of the time: compute, reduction, broadcast, I/O, memory (the service's), latency
        (filling and draining), or fixed."""
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def overhead(self) -> float:
        """Share of the time in which the average datapath does not multiply."""
        return 1 - self.parts.get("multiply-add", 0.0) / self.cycles if self.cycles else 0.0


def bounded(parts: dict[str, float], macs: float, io: float = 0.0, source: str = "I/O") -> Cost:
    """A product's cost from its parts without I/O, and the cycles that its stream takes beside it, bound by
    `source`."""
    work = sum(parts.values())
    groups = {
        "compute": sum(parts.get(name, 0.0) for name in ("multiply-add", "start-up", "imbalance", "elementwise")),
        "reduction": parts.get("reduction", 0.0),
        "broadcast": parts.get("broadcast", 0.0),
        "I/O": parts.get("edge", 0.0),
        "latency": parts.get("fill", 0.0),
    }
    bound = source if io > work else max(groups, key=lambda name: groups[name])
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


@lru_cache(maxsize=65536)
def fill(machine: Machine, mapping: Mapping) -> float:
    """Cycles from a first weight at the edge to all PEs at work, and from a last weight to the last sum at home."""
    spread = (machine.width + mapping.rows) * machine.hop_cycles + 2 * machine.ramp_cycles
    return spread + machine.reduce_startup + mapping.columns * machine.relay_cycles + ceil(mapping.local / 2)


def product_cost(
    machine: Machine, clock: float, weights: Weights, mapping: Mapping, product: str, *, exact: bool = True
) -> Cost:
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
    rule = law(machine, mapping.columns, mapping.local, product, _wire(machine, weights) / 4)
    z = block * weights.density
    parts = rule.attribute(z, rows)
    if exact:
        queue = machine.in_queue_depth[0] + machine.router_buffer
        if weights.mask is None or weights.density >= 1:
            row = pace(rule, queue, block, min(1.0, weights.density), mapping.columns, rows)
        else:
            row = measured_pace(rule, queue, weights.counts(mapping.columns, transposed))
        parts["imbalance"] = rows * max(0.0, row - rule(z))
    parts["fill"] = fill(machine, mapping)
    if product == "grad_values":  # the last sums come down the columns
        parts["fill"] += (mapping.rows - 1) * machine.relay_cycles
    rate = min(machine.host_bandwidth, machine.memory_bandwidth)
    io = _bytes(machine, weights, product) / rate * clock
    source = "I/O" if rate == machine.host_bandwidth else "memory"
    return bounded(parts, weights.nnz * mapping.tokens, io, source)


def _wire(machine: Machine, weights: Weights) -> float:
    """Bytes of a weight on a link."""
    return machine.dense_weight_bytes if weights.density >= 1 else machine.sparse_weight_bytes


def _bytes(machine: Machine, weights: Weights, product: str) -> float:
    return weights.nnz * (machine.gradient_bytes if product == "grad_values" else _wire(machine, weights))


# ---- a layer ---------------------------------------------------------------------------------------------------------


def product_costs(
    machine: Machine, clock: float, weights: Weights, mapping: Mapping, exact: bool = True
) -> dict[str, Cost]:
    """The three products. Where sending a sparse matrix with its zeros is cheaper, it is sent so."""
    costs = {}
    for product in PRODUCTS:
        cost = product_cost(machine, clock, weights, mapping, product, exact=exact)
        if weights.density < 1:
            rows, features = weights.sides(product != "forward")
            dense = law(machine, mapping.columns, mapping.local, product, 0.0)(-(-features // mapping.columns))
            if rows * dense < cost.cycles:
                whole = Weights(weights.out_features, weights.in_features)
                with_zeros = product_cost(machine, clock, whole, mapping, product, exact=exact)
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
        return Cost.sum(self.products.values())


def estimate_layer(
    machine: Machine, clock: float, weights: Weights, tokens: int, among: tuple[int, ...] | None = None
) -> Estimate:
    """The three products of a layer under the best mapping that fits, of all ring widths or of those `among`.

    Raises
    ------
    UserError
        If the activations do not fit the wafer; the message says how many tokens do.
    """
    limit = machine.activation_share * machine.sram_bytes
    narrow = min(weights.in_features, weights.out_features)
    options = [Mapping.of(machine, columns, tokens) for columns in among or candidates(machine, narrow)]
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
        return sum(c.cycles for c in product_costs(machine, clock, weights, option, exact=False).values())

    def exact(option: Mapping) -> tuple[float, dict[str, Cost]]:
        costs = product_costs(machine, clock, weights, option)
        return sum(cost.cycles for cost in costs.values()), costs

    return Estimate(*best(fitting, lower, exact))


def _most_tokens(machine: Machine, weights: Weights, columns: int, limit: float) -> int:
    one = layer_bytes(Mapping(columns, 1, 1, 1, 1), weights)
    return int(limit // one) * (machine.width // columns) * machine.height
