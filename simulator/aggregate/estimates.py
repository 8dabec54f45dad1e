"""What users see of layers and steps: speed-ups with their distribution, what bounds them, seconds, energy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vspdf.errors import UserError
from vspdf.simulator.aggregate import band, layer, step
from vspdf.simulator.aggregate.layer import Cost, Weights
from vspdf.simulator.aggregate.model import Model
from vspdf.simulator.machine import Machine

CENTRAL = "c0 = {trigger_cycles:g}, slack = queue depth"


@dataclass(frozen=True)
class Case:
    """Dense and sparse on one machine."""

    dense: Any  # layer.Estimate or step.Estimate
    sparse: Any

    @property
    def speedup(self) -> float:
        return self.dense.total.cycles / self.sparse.total.cycles


Solve = Callable[[Machine, float], Case]


def central(machine: Machine) -> str:
    """Names the central case: the machine as its file has it."""
    return CENTRAL.format(trigger_cycles=machine.trigger_cycles)


def _report(machine: Machine, middle: Case, solve: Solve, found: band.Band | None, ideal: float) -> dict[str, Any]:
    """What layers and steps have in common; `middle`: the central case at the first clock; no `found`: dense, 1."""
    label, clock = next(iter(machine.clocks.items()))
    one: dict[str, Any] = {
        "low": 1.0,
        "central": 1.0,
        "high": 1.0,
        "ideal": 1.0,
        "median": 1.0,
        "interval50": [1.0, 1.0],
    }
    speedup = found.summary(middle.speedup, ideal) if found else one
    three = {key: speedup[key] for key in ("low", "central", "high")}
    dense = middle.dense.total
    seconds = {}
    for name, hz in machine.clocks.items():
        case = middle if hz == clock else solve(machine, hz)
        whole = case.dense.total.cycles / hz
        seconds[name] = {
            "dense": whole,
            "sparse": {k: whole / (v * case.speedup / speedup["central"]) for k, v in three.items()},
        }
    return {
        **machine.said(),
        "level": "aggregate",
        "central": central(machine),
        "clock": label,
        "cycles": {"dense": round(dense.cycles), "sparse": {k: round(dense.cycles / v) for k, v in three.items()}},
        "seconds": seconds,
        "speedup": speedup,
        "parts": found.parts if found else {},
        "tornado": found.tornado if found else [],
        "samples": len(found.values) if found else 0,
        "bound_by": middle.sparse.total.bound_by,
        "bound_by_dense": dense.bound_by,
        "overhead": {"dense": dense.overhead, "sparse": middle.sparse.total.overhead},
        "utilisation": {
            kind: estimate.total.macs
            / (estimate.total.cycles * machine.width * machine.height * machine.fmac_fp16_rate)
            for kind, estimate in (("dense", middle.dense), ("sparse", middle.sparse))
        },
    }


def _cost(cost: Cost) -> dict[str, Any]:
    return {
        "cycles": round(cost.cycles),
        "bound_by": cost.bound_by,
        "overhead": cost.overhead,
        "parts": {name: round(cycles) for name, cycles in cost.parts.items()},
    }


# ---- a layer ---------------------------------------------------------------------------------------------------------


def simulate_layer(
    machine: Machine, weights: Weights, tokens: int, *, sensitivity: bool = True, samples: int = band.SAMPLES
) -> dict[str, Any]:
    """Forward product and both gradients of one linear layer, dense against sparse.

    Parameters
    ----------
    weights : Weights
        With a real mask or a density.
    tokens : int
        On the wafer at once.
    sensitivity : bool
        Also move one parameter at a time (``tornado``).
    samples : int
        Of the band.

    Returns
    -------
    dict
        ``cycles`` (at the first clock; ``sparse`` as dense over the speed-ups), ``speedup`` (90 % interval, central
        case, ideal, median, 50 % interval), ``parts`` of its variance, ``products``, ``mapping``.

    Raises
    ------
    UserError
        For a layer that does not fit, or one without weights.
    """
    if not 0 < weights.nnz:
        raise UserError("a layer without a single weight has nothing to simulate: sparsity must be below 1.")
    whole = Weights(weights.out_features, weights.in_features)
    chance = Weights(weights.out_features, weights.in_features, weights.density)
    sparse_one = weights.density < 1

    def solve(machine: Machine, clock: float) -> Case:
        dense = layer.estimate_layer(machine, clock, whole, tokens)
        return Case(dense, layer.estimate_layer(machine, clock, weights, tokens) if sparse_one else dense)

    clock = machine.clock
    middle = solve(machine, clock)
    found = None
    if sparse_one:
        near = _near(machine, middle.dense.mapping.columns, middle.sparse.mapping.columns)

        def by_chance(machine: Machine) -> float:
            dense = layer.estimate_layer(machine, clock, whole, tokens, near)
            return dense.total.cycles / layer.estimate_layer(machine, clock, chance, tokens, near).total.cycles

        found = _scaled(band.band(machine, by_chance, samples, tornado=sensitivity), middle.speedup, by_chance(machine))
    body = _report(machine, middle, solve, found, weights.numel / weights.nnz)
    return {
        "tokens": tokens,
        "in_features": weights.in_features,
        "out_features": weights.out_features,
        "sparsity": 1 - weights.density,
        "mask": "real" if weights.mask is not None else "binomial",
        **body,
        "mapping": {"dense": asdict(middle.dense.mapping), "sparse": asdict(middle.sparse.mapping)},
        "products": {
            name: {"dense": _cost(middle.dense.products[name]), "sparse": _cost(middle.sparse.products[name])}
            for name in layer.PRODUCTS
        },
    }


def _near(machine: Machine, *columns: int) -> tuple[int, ...]:
    """Ring widths around those of the central case: what a sample's search looks at."""
    widths = {max(2, round(c * f)) for c in columns for f in (0.5, 1, 2)}
    return tuple(sorted({w for w in widths if w <= machine.width} | set(columns)))


def _scaled(found: band.Band, measured: float, chance: float) -> band.Band:
    """A band by chance, moved to where the real positions are."""
    return band.Band(found.values * (measured / chance), found.parts, found.tornado)


SWEPT = 48  # samples of each point of a sweep
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
        simulate_layer(machine, Weights(out_features, in_features, 1 - s), tokens, sensitivity=False, samples=SWEPT)
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
    left.fill_between(x, speed["low"], speed["high"], alpha=0.25, color="C0", linewidth=0, label="90 % of the samples")
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


def simulate_step(
    machine: Machine, model: Model, *, sensitivity: bool = True, samples: int = band.SAMPLES
) -> dict[str, Any]:
    """One training step, dense against sparse.

    Parameters
    ----------
    model : Model
    sensitivity, samples
        As `simulate_layer` has them.

    Returns
    -------
    dict
        As `simulate_layer`, and ``samples_per_second``, ``tokens_per_second`` (at the first clock, and
        ``..._by_clock``), ``products``, ``breakdown`` of the model, ``energy``.

    Raises
    ------
    UserError
        If the model does not fit, or systems have nothing to do.
    """
    whole, chance, sparse_one = model.dense, model.grouped(), model.kept < 1

    def solve(machine: Machine, clock: float) -> Case:
        dense = step.search(machine, clock, whole)
        return Case(dense, step.search(machine, clock, model) if sparse_one else dense)

    clock = machine.clock
    middle = solve(machine, clock)
    found = None
    if sparse_one:
        near = _near(machine, middle.dense.placement.ring.columns, middle.sparse.placement.ring.columns)

        def by_chance(machine: Machine) -> float:
            dense = step.search(machine, clock, whole, near)
            return dense.total.cycles / step.search(machine, clock, chance, near).total.cycles

        sampled = band.band(machine, by_chance, samples, tornado=sensitivity)
        found = _scaled(sampled, middle.speedup, by_chance(machine))
    flops = {"dense": model.flops(dense=True), "sparse": model.flops()}
    body = _report(machine, middle, solve, found, flops["dense"] / flops["sparse"])
    s = model.shape
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
        "mask": "real" if model.measured else "binomial",
        **body,
        "flops": flops,
        "samples_per_second": rates(model.batch, body["clock"]),
        "tokens_per_second": rates(model.tokens, body["clock"]),
        "samples_per_second_by_clock": {label: rates(model.batch, label) for label in machine.clocks},
        "tokens_per_second_by_clock": {label: rates(model.tokens, label) for label in machine.clocks},
        "energy": _energy(machine, model, body["seconds"][body["clock"]]),
        "mapping": {"dense": _placement(middle.dense), "sparse": _placement(middle.sparse)},
        "breakdown": {
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


def _energy(machine: Machine, model: Model, seconds: dict[str, Any]) -> dict[str, Any]:
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
