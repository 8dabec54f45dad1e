"""What users see of layers and steps: speed-ups as a band, what moves them, both clocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vspdf.errors import UserError
from vspdf.simulator.aggregate import layer, step
from vspdf.simulator.aggregate.layer import Assumption, Cost, Weights
from vspdf.simulator.machine import Machine

CENTRAL = "c0 = {start_up:g}, slack = queue depth"
SENSITIVITY: dict[str, tuple[float, float]] = {  # unknowns of grade M or B, with factors to try
    "reduce_startup": (0.5, 2.0),
    "router_buffer": (0.5, 4.0),
    "activation_share": (0.5, 1.5),
    "dense_weight_bytes": (1.0, 2.0),
    "gradient_bytes": (1.0, 2.0),
    "host_bandwidth": (0.5, 2.0),
    "elementwise_passes": (0.5, 4.0),
}


@dataclass(frozen=True)
class Case:
    """Dense and sparse under one assumption."""

    assumption: Assumption
    dense: Any  # layer.Estimate or step.Estimate
    sparse: Any

    @property
    def speedup(self) -> float:
        return self.dense.total.cycles / self.sparse.total.cycles


Solve = Callable[[Machine, float, Assumption], Case]


def _band(cases: Sequence[Case]) -> dict[str, float]:
    """Over all cases; the first is the central one."""
    speedups = [case.speedup for case in cases]
    return {"low": min(speedups), "central": speedups[0], "high": max(speedups)}


def _report(machine: Machine, solve: Solve, sensitivity: bool) -> tuple[list[Case], dict[str, Any]]:
    """Cases at the first clock, and what layers and steps have in common."""
    label, clock = next(iter(machine.clocks.items()))
    cases = [solve(machine, clock, assumption) for assumption in layer.band(machine)]
    middle, speedup = cases[0], _band(cases)
    dense = middle.dense.total
    cycles = {"dense": round(dense.cycles), "sparse": {k: round(dense.cycles / v) for k, v in speedup.items()}}
    seconds = {}
    for name, hz in machine.clocks.items():
        case = middle if hz == clock else solve(machine, hz, middle.assumption)
        whole = case.dense.total.cycles / hz
        at = speedup["central"] if hz == clock else case.speedup
        seconds[name] = {
            "dense": whole,
            "sparse": {k: whole / (v * at / speedup["central"]) for k, v in speedup.items()},
        }
    body: dict[str, Any] = {
        "machine": machine.name,
        "level": "aggregate",
        "central": CENTRAL.format(start_up=middle.assumption.start_up),
        "clock": label,
        "cycles": cycles,
        "seconds": seconds,
        "speedup": speedup,
        "bound_by": middle.sparse.total.bound_by,
        "bound_by_dense": dense.bound_by,
        "overhead": {"dense": dense.overhead, "sparse": middle.sparse.total.overhead},
        "utilisation": {
            kind: estimate.total.macs
            / (estimate.total.cycles * machine.width * machine.height * machine.fmac_fp16_rate)
            for kind, estimate in (("dense", middle.dense), ("sparse", middle.sparse))
        },
        "cases": [
            {
                "start_up": case.assumption.start_up,
                "policy": case.assumption.policy,
                "cycles": {"dense": round(case.dense.total.cycles), "sparse": round(case.sparse.total.cycles)},
                "speedup": case.speedup,
            }
            for case in cases
        ],
    }
    if sensitivity:
        body["sensitivity"] = _sensitivity(machine, solve, clock, cases)
    return cases, body


def _sensitivity(machine: Machine, solve: Solve, clock: float, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Speed-ups with one unknown moved at a time, the one that moves them most first."""
    middle = cases[0].assumption
    of = lambda keep: [c for c in cases if keep(c.assumption)]  # noqa: E731
    rows = [
        ("start-up c0", of(lambda a: a.policy == middle.policy), lambda a: f"{a.start_up:g}"),
        ("synchronisation", of(lambda a: a.start_up == middle.start_up), lambda a: a.policy),
    ]
    table: list[dict[str, Any]] = []
    for name, members, word in rows:
        values = {word(c.assumption): c.speedup for c in sorted(members, key=lambda c: c.assumption.start_up)}
        table.append({"unknown": name, "speedup": values})
    for name, factors in SENSITIVITY.items():
        values = {}
        for factor in factors:
            value = type(getattr(machine, name))(getattr(machine, name) * factor)
            if factor == 1.0:
                values[f"{value:g}"] = cases[0].speedup
                continue
            try:
                values[f"{value:g}"] = solve(machine.override({name: value}), clock, middle).speedup
            except UserError:  # it does not fit there
                continue
        table.append({"unknown": name, "speedup": values})
    for row in table:
        found = [*row["speedup"].values(), cases[0].speedup]
        row["span"] = max(found) / min(found) - 1
    return sorted(table, key=lambda row: -row["span"])


def _cost(cost: Cost) -> dict[str, Any]:
    return {
        "cycles": round(cost.cycles),
        "bound_by": cost.bound_by,
        "overhead": cost.overhead,
        "parts": {name: round(cycles) for name, cycles in cost.parts.items()},
    }


# ---- a layer ---------------------------------------------------------------------------------------------------------


def simulate_layer(machine: Machine, weights: Weights, tokens: int, *, sensitivity: bool = True) -> dict[str, Any]:
    """Forward product and both gradients of one linear layer, dense against sparse.

    Parameters
    ----------
    weights : Weights
        With a real mask or a density.
    tokens : int
        On the wafer at once.

    Returns
    -------
    dict
        ``cycles`` (at the first clock; ``sparse`` as dense over the band of speed-ups), ``speedup`` with ``ideal``,
        ``products``, ``mapping``, ``cases``, ``sensitivity``.

    Raises
    ------
    UserError
        For a layer that does not fit, or one without weights.
    """
    if not 0 < weights.nnz:
        raise UserError("a layer without a single weight has nothing to simulate: sparsity must be below 1.")
    whole = Weights(weights.out_features, weights.in_features)

    def solve(machine: Machine, clock: float, assumption: Assumption) -> Case:
        dense = layer.estimate_layer(machine, clock, whole, tokens, assumption)
        sparse = dense if weights.density >= 1 else layer.estimate_layer(machine, clock, weights, tokens, assumption)
        return Case(assumption, dense, sparse)

    cases, body = _report(machine, solve, sensitivity and weights.density < 1)
    middle = cases[0]
    return {
        "tokens": tokens,
        "in_features": weights.in_features,
        "out_features": weights.out_features,
        "sparsity": 1 - weights.density,
        "mask": "real" if weights.mask is not None else "binomial",
        **body,
        "speedup": {**body["speedup"], "ideal": weights.numel / weights.nnz},
        "mapping": {"dense": asdict(middle.dense.mapping), "sparse": asdict(middle.sparse.mapping)},
        "products": {
            name: {"dense": _cost(middle.dense.products[name]), "sparse": _cost(middle.sparse.products[name])}
            for name in layer.PRODUCTS
        },
    }


SWEEP = (
    0.1,
    0.25,
    0.5,
    0.6,
    0.7,
    0.75,
    0.8,
    0.85,
    0.9,
    0.925,
    0.95,
    0.97,
    0.98,
    0.985,
    0.99,
    0.993,
    0.995,
    0.998,
    0.999,
)


def sweep_layer(
    machine: Machine, in_features: int, out_features: int, tokens: int, sparsities: Iterable[float] = SWEEP
) -> list[dict[str, Any]]:
    """`simulate_layer` over sparsities."""
    return [
        simulate_layer(machine, Weights(out_features, in_features, 1 - s), tokens, sensitivity=False)
        for s in sparsities
    ]


def check_picture(path: Path) -> None:
    """Before anything is computed.

    Raises
    ------
    UserError
        Without matplotlib, for an unknown kind of file or a missing folder.
    """
    if find_spec("matplotlib") is None:
        raise UserError("a plot needs matplotlib: pip install 'vspdf[plot]'.")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"'{path}': expected a name that ends in .png, .svg or .pdf.")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}.")


def plot_layer(machine: Machine, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up over sparsity with band and ideal, and where the sparse time goes; PNG or SVG by the name's end.

    Raises
    ------
    UserError
        As `check_picture`, or where the file cannot be written.
    """
    check_picture(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    first = rows[0]
    x = [1 / (1 - row["sparsity"]) for row in rows]
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    speed = {key: [row["speedup"][key] for row in rows] for key in ("low", "central", "high", "ideal")}
    left.fill_between(
        x, speed["low"], speed["high"], alpha=0.25, color="C0", linewidth=0, label="band: c0 0 to 10, policies"
    )
    left.plot(x, speed["central"], color="C0", marker="o", markersize=3, label=f"central: {first['central']}")
    left.plot(x, speed["ideal"], color="0.4", linestyle="--", label="ideal, 1 / (1 − sparsity)")
    left.set_yscale("log")
    left.set_ylim(0.9, 100)
    left.yaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100]))
    left.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
    left.yaxis.set_minor_locator(NullLocator())
    left.set_ylabel("speed-up of all three products over dense")
    left.legend(fontsize=8, loc="upper left")
    names = [name for name in layer.PARTS if any(_share(row, name) > 0.002 for row in rows)]
    shares = [[_share(row, name) for row in rows] for name in names]
    right.stackplot(x, shares, labels=names, alpha=0.85)
    right.set_ylim(0, 1)
    right.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}"))
    right.set_ylabel("share of the sparse time, central case")
    right.legend(fontsize=8, loc="lower left")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlim(x[0], x[-1])
        marks = [0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999]
        axes.xaxis.set_major_locator(FixedLocator([1 / (1 - s) for s in marks]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{(1 - 1 / v) * 100:.4g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("sparsity, %")
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{machine.name}: a {first['in_features']} x {first['out_features']} layer, {first['tokens']:,} tokens, "
        f"simulated at {first['clock']}", fontsize=10,
    )  # fmt: skip
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {error.strerror}.") from None


def _share(row: dict[str, Any], part: str) -> float:
    sparse = [product["sparse"] for product in row["products"].values()]
    return sum(p["parts"].get(part, 0) for p in sparse) / sum(p["cycles"] for p in sparse)


# ---- a step ----------------------------------------------------------------------------------------------------------


def simulate_step(machine: Machine, model: step.Model, *, sensitivity: bool = True) -> dict[str, Any]:
    """One training step, dense against sparse.

    Returns
    -------
    dict
        As `simulate_layer`, and ``samples_per_second``, ``tokens_per_second`` (at the first clock, and
        ``..._by_clock``), ``products``, ``parts`` of the model, ``energy``.

    Raises
    ------
    UserError
        If the model does not fit, or systems have nothing to do.
    """
    whole = model.dense

    def solve(machine: Machine, clock: float, assumption: Assumption) -> Case:
        dense = step.search(machine, clock, whole, assumption)
        sparse = dense if model.kept >= 1 else step.search(machine, clock, model, assumption)
        return Case(assumption, dense, sparse)

    cases, body = _report(machine, solve, sensitivity and model.kept < 1)
    middle = cases[0]
    s = model.shape
    flops = {"dense": model.flops(dense=True), "sparse": model.flops()}
    clock = machine.clocks[body["clock"]]
    peak = machine.width * machine.height * machine.fmac_fp16_rate * 2 * model.systems
    for kind in ("dense", "sparse"):
        seconds = body["seconds"][body["clock"]][kind]
        body["utilisation"][kind] = flops[kind] / ((seconds if kind == "dense" else seconds["central"]) * peak * clock)

    rates = lambda per_step, label: _rates(per_step, body["seconds"][label])  # noqa: E731
    return {
        "model": {**asdict(s), "parameters": s.parameters},
        "batch": model.batch,
        "sequence_length": s.sequence_length,
        "systems": model.systems,
        "sparsity": 1 - model.kept,
        "mask": "real" if any(w.mask is not None for w, _ in model.layers) else "binomial",
        **body,
        "speedup": {**body["speedup"], "ideal": flops["dense"] / flops["sparse"]},
        "flops": flops,
        "samples_per_second": rates(model.batch, body["clock"]),
        "tokens_per_second": rates(model.tokens, body["clock"]),
        "samples_per_second_by_clock": {label: rates(model.batch, label) for label in machine.clocks},
        "tokens_per_second_by_clock": {label: rates(model.tokens, label) for label in machine.clocks},
        "energy": _energy(machine, model, body["seconds"][body["clock"]]),
        "mapping": {"dense": _placement(middle.dense), "sparse": _placement(middle.sparse)},
        "parts": {
            name: {"dense": _cost(middle.dense.parts[name]), "sparse": _cost(middle.sparse.parts[name])}
            for name in middle.dense.parts
        },
        "products": {
            name: {"dense": _cost(middle.dense.products[name]), "sparse": _cost(middle.sparse.products[name])}
            for name in layer.PRODUCTS
        },
    }


def _rates(per_step: float, seconds: dict[str, Any]) -> dict[str, Any]:
    """So many a step as so many a second."""
    return {"dense": per_step / seconds["dense"], "sparse": {k: per_step / v for k, v in seconds["sparse"].items()}}


def _energy(machine: Machine, model: step.Model, seconds: dict[str, Any]) -> dict[str, Any]:
    """Joules a step and a token between the machine's lowest and highest power."""
    powers = (machine.power_low * model.systems, machine.power_high * model.systems)
    return {
        kind: {
            "joules_per_step": [power * t for power in powers],
            "joules_per_token": [power * t / model.tokens for power in powers],
        }
        for kind, t in (("dense", seconds["dense"]), ("sparse", seconds["sparse"]["central"]))
    }


def _placement(estimate: step.Estimate) -> dict[str, Any]:
    """How the wafer is divided, as `simulate_step` tells it."""
    place = estimate.placement
    return {
        **asdict(place.ring), "micro_batch": place.micro_batch, "passes": place.passes, "recompute": place.recompute,
    }  # fmt: skip
