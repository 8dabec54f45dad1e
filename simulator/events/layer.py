"""Small layers on level 1: our streaming programs on a region of the wafer, with real or random masks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vspdf.errors import UserError
from vspdf.simulator.aggregate import layer
from vspdf.simulator.aggregate import programs as aggregate_programs
from vspdf.simulator.aggregate.layer import Weights
from vspdf.simulator.events import pictures, programs
from vspdf.simulator.events.fabric import Region, tracing
from vspdf.simulator.machine import Machine

MOST_MACS = 3e8  # multiply-adds of a product that level 1 runs in a minute or so
MOST_SIDE = 32  # columns and rows of its region, at most


def event_layer(
    machine: Machine, weights: Weights, tokens: int, plot: Path | None = None, seed: int = 0
) -> dict[str, Any]:
    """A small layer on level 1: our streaming programs on a region, dense and sparse, with level 2 beside each.

    Parameters
    ----------
    plot : Path, optional
        Draw heat maps and a time line of the sparse forward product here.

    Raises
    ------
    UserError
        If the layer is too large, or does not divide into a region; as `pictures.plot`.
    """
    pictures.check_paths(None, plot)
    rows_out, rows_in = weights.out_features, weights.in_features
    if weights.numel * tokens > MOST_MACS:
        raise UserError(
            f"`level` event runs layers of up to {MOST_MACS:.0e} multiply-adds, this one has "
            f"{weights.numel * tokens:.1e}: take fewer features or tokens, or `level` aggregate."
        )
    columns = _divisor(math.gcd(rows_in, rows_out))
    rows = _divisor(tokens // 4) if tokens % 4 == 0 else 0
    if columns < 2 or rows < 1:
        raise UserError(
            "`level` event needs `in_features` and `out_features` with a common divisor and `tokens` that are a "
            f"multiple of 4, not {rows_in}, {rows_out} and {tokens}."
        )
    random = np.random.default_rng(seed)
    kept = random.random((rows_out, rows_in)) < weights.density if weights.mask is None else weights.mask
    w = (random.standard_normal((rows_out, rows_in)) * 0.1).astype(np.float32)
    x, dy = ((random.standard_normal((n, tokens)) * 0.1).astype(np.float32) for n in (rows_in, rows_out))
    local = tokens // rows
    products: dict[str, Any] = {name: {} for name in layer.PRODUCTS}
    for kind, mask in (("dense", np.ones_like(kept)), ("sparse", kept)):
        counts, turned = (m.reshape(len(m), columns, -1).sum(2) for m in (mask, mask.T))
        block, block_out = rows_in // columns, rows_out // columns
        drawn = plot if kind == "sparse" else None
        with tracing(drawn is not None):
            forward = programs.stream_layer(machine, w, mask, x, columns, rows)
        if drawn:
            pictures.plot(forward.region, drawn, f"forward, {rows_in} to {rows_out} features, {columns} x {rows} PEs")
        events = {
            "forward": forward.cycles,
            "grad_input": programs.stream_layer(machine, w.T, mask.T, dy, columns, rows).cycles,
            "grad_values": programs.stream_gradient(machine, mask, dy, x, columns, rows).cycles,
        }
        closed = {
            "forward": aggregate_programs.stream_layer(machine, counts, block, local, rows),
            "grad_input": aggregate_programs.stream_layer(machine, turned, block_out, local, rows),
            "grad_values": aggregate_programs.stream_gradient(machine, counts, block, local, rows),
        }
        for name in layer.PRODUCTS:
            products[name][kind] = {"cycles": int(events[name]), "aggregate": round(closed[name])}
    total = {k: sum(products[name][k]["cycles"] for name in layer.PRODUCTS) for k in ("dense", "sparse")}
    speedup = total["dense"] / total["sparse"]
    three = ("low", "central", "high")
    return {
        "tokens": tokens,
        "in_features": rows_in,
        "out_features": rows_out,
        "sparsity": 1 - float(kept.mean()),
        "machine": machine.name,
        "level": "event",
        "region": {"columns": columns, "rows": rows},
        "cycles": {"dense": total["dense"], "sparse": dict.fromkeys(three, total["sparse"])},
        "speedup": {**dict.fromkeys(three, speedup), "ideal": kept.size / kept.sum()},
        "products": products,
    }


def _divisor(n: int) -> int:
    """The largest one that is a side of a region; 0 where there is none but 1, and n is not 1."""
    return max((d for d in range(1, MOST_SIDE + 1) if n % d == 0), default=0)


# What a report shows of a run's mask: a corner of it that level 1 runs in a moment.
COLUMNS, ROWS, FEATURES, OUTPUTS, LOCAL = 16, 8, 16, 96, 32  # PEs; features of a column, outputs, tokens of a PE


@dataclass(frozen=True)
class Corner:
    """The forward product with a corner of a mask: its region with all events, and what it takes dense."""

    outputs: int
    features: int
    density: float
    region: Region
    cycles: int
    dense_cycles: int


def corner(machine: Machine, mask: np.ndarray) -> Corner:
    """Streams the first outputs and inputs of a mask past random activations, traced; and as if it were dense.

    Parameters
    ----------
    mask : bool array [out_features, in_features]

    Raises
    ------
    UserError
        If the layer has a single input: nothing to share between columns.
    """
    columns = max(2, min(COLUMNS, mask.shape[1]))
    features = columns * min(FEATURES, mask.shape[1] // columns)
    if not features:
        raise UserError(f"a layer with {mask.shape[1]} input has nothing to share between columns.")
    kept = mask[:OUTPUTS, :features]
    outputs = len(kept)
    random = np.random.default_rng(0)
    w, x = (random.standard_normal(shape) * 0.1 for shape in (kept.shape, (features, ROWS * LOCAL)))
    with tracing():
        sparse = programs.stream_layer(machine, w, kept, x, columns, ROWS)
    dense = programs.stream_layer(machine, w, np.ones_like(kept), x, columns, ROWS)
    return Corner(outputs, features, float(kept.mean()), sparse.region, sparse.cycles, dense.cycles)
