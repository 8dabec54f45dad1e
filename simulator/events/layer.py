"""Small layers on level 1: the streaming programs on one row of the wafer's PEs, with real or random masks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vspdf.errors import UserError, require
from vspdf.simulator.aggregate import layer
from vspdf.simulator.aggregate.layer import Mapping, Weights
from vspdf.simulator.events import pictures, programs
from vspdf.simulator.events.fabric import Region, tracing
from vspdf.simulator.machine import Machine

MOST_WEIGHTS = 2_500_000  # of a matrix that level 1 streams three times, dense and sparse, in half a minute or so
DRAWN_ROWS = 4  # of a region that is drawn


def event_layer(
    machine: Machine, weights: Weights, tokens: int, plot: Path | None = None, seed: int = 0
) -> dict[str, Any]:
    """A small layer on level 1, dense and sparse, under the mapping that level 2 chooses, with level 2 beside each.

    All rows of PEs and all replicas of a ring do the same at a hop's delay, so one row of one ring runs, fed by as many
    links as its columns have at the edge; the way to the others is added, and to `grad_values` that of its last sums
    down the rows (``beyond_region``, cycles by product).

    Parameters
    ----------
    plot : Path, optional
        Draw heat maps and a time line of the sparse forward product on `DRAWN_ROWS` rows here.

    Raises
    ------
    UserError
        If the layer is too large for level 1, or too narrow for a ring; as `pictures.plot`.
    """
    pictures.check_paths(None, plot)
    if weights.numel > MOST_WEIGHTS:
        raise UserError(
            f"`level` event streams layers of up to {MOST_WEIGHTS:,} weights, this one has {weights.numel:,}: take "
            "fewer features, or `level` aggregate, which answers the same question in closed form."
        )
    if min(weights.in_features, weights.out_features) < 2:
        raise UserError("`level` event needs at least 2 features in and out: a ring has 2 columns.")
    require(
        machine.sum_bytes == 2, "`level` event adds up in fp16: sum_bytes must be 2 there, other sums are in the law."
    )
    random = np.random.default_rng(seed)
    shape = (weights.out_features, weights.in_features)
    kept = random.random(shape) < weights.density if weights.mask is None else weights.mask
    if not kept.any():
        raise UserError("not a single weight is kept: there is nothing to stream.")
    real = Weights.of_mask(kept)
    products: dict[str, Any] = {name: {} for name in layer.PRODUCTS}
    mappings, beyond = {}, {}
    for kind, matrix in (("dense", Weights(*shape)), ("sparse", real)):
        chosen = layer.estimate_layer(machine, machine.clock, matrix, tokens)
        mappings[kind] = mapping = _ring(chosen.mapping)
        mask = np.ones(shape, bool) if kind == "dense" else kept
        drawn = plot if kind == "sparse" else None
        closed = layer.product_costs(machine, machine.clock, matrix, mapping)
        beyond[kind] = dict.fromkeys(layer.PRODUCTS, (machine.width + mapping.rows) * machine.hop_cycles)
        beyond[kind]["grad_values"] += (mapping.rows - 1) * machine.relay_cycles
        for name, cycles in _products(machine, mask, mapping, random, drawn).items():
            products[name][kind] = {"cycles": cycles + beyond[kind][name], "aggregate": round(closed[name].cycles)}
    total = {k: sum(products[name][k]["cycles"] for name in layer.PRODUCTS) for k in ("dense", "sparse")}
    speedup = total["dense"] / total["sparse"]
    three = ("low", "central", "high")
    region = {"columns": mappings["sparse"].columns, "rows": 1}
    return {
        "tokens": tokens,
        "in_features": weights.in_features,
        "out_features": weights.out_features,
        "sparsity": 1 - real.density,
        **machine.said(),
        "level": "event",
        "region": region,
        "why": f"one row of {region['columns']} PEs stands for the wafer's {machine.width} x {machine.height}: all "
        "rows and replicas of a ring do the same a hop later",
        "mapping": {kind: asdict(mapping) for kind, mapping in mappings.items()},
        "beyond_region": beyond,
        "cycles": {"dense": total["dense"], "sparse": dict.fromkeys(three, total["sparse"])},
        "speedup": {**dict.fromkeys(three, speedup), "ideal": 1 / real.density},
        "products": products,
    }


def _ring(mapping: Mapping) -> Mapping:
    """The same with two columns at least, which a ring has."""
    return mapping if mapping.columns > 1 else replace(mapping, columns=2)


def _products(
    machine: Machine, mask: np.ndarray, mapping: Mapping, random: np.random.Generator, plot: Path | None
) -> dict[str, int]:
    """Cycles of the three products on a row of a ring; features and tokens are padded to what the programs take."""
    columns = mapping.columns
    share = max(1, round(columns / machine.edge_links))
    tokens = -(-mapping.local // 4) * 4
    whole = np.zeros([-(-n // columns) * columns for n in mask.shape], bool)
    whole[: mask.shape[0], : mask.shape[1]] = mask
    w = (random.standard_normal(whole.shape) * 0.1).astype(np.float32)
    x, dy = ((random.standard_normal((n, tokens)) * 0.1).astype(np.float32) for n in whole.shape[::-1])
    n_out, n_in = mask.shape
    forward = programs.stream_layer(machine, w[:n_out], whole[:n_out], x, columns, 1, share)
    if plot:  # a run of its own, so that a picture changes no figure
        with tracing():
            drawn = programs.stream_layer(
                machine, w[:n_out], whole[:n_out], np.tile(x, DRAWN_ROWS), columns, DRAWN_ROWS, share
            )
        pictures.plot(drawn.region, plot, f"forward, {n_in} to {n_out} features, {columns} x {DRAWN_ROWS} PEs")
    back = programs.stream_layer(machine, w.T[:n_in], whole.T[:n_in], dy, columns, 1, share)
    values = programs.stream_gradient(machine, whole.T[:n_in], x[:n_in], dy, columns, 1, share)  # rides on back's
    return {"forward": int(forward.cycles), "grad_input": int(back.cycles), "grad_values": int(values.cycles)}


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
