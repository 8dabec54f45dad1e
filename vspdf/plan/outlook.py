"""For people who decide: what a simulated step means for a whole training, for other batches and systems, beside other
machines."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from vspdf.errors import UserError, did_you_mean, require
from vspdf.simulator.aggregate import step
from vspdf.simulator.aggregate.estimates import simulate_step
from vspdf.simulator.aggregate.model import Model
from vspdf.simulator.machine import Machine

# Published dense fp16 peak and a utilisation that trainings reach: an orientation, not a measurement.
GPU = ("A100", 312e12, 0.4)
BETTER = 1.02  # a batch is worth naming from here on
SWEPT = ("sparsity", "batch", "systems")
SWEEP_SAMPLES = 40


def better_batch(machine: Machine, model: Model, columns: tuple[int, ...]) -> dict[str, Any] | None:
    """The nearest batch with at least 2 % more tokens a second; None where there is none within a quarter.

    Micro-batches are whole sequences on a wafer of whole rows: a batch that just does not fit costs another pass.
    """

    def rate(batch: int) -> float:
        return batch / step.search(machine, machine.clock, replace(model, batch=batch), columns).seconds

    own = rate(model.batch)
    for distance in range(1, max(4, model.batch // 4) + 1):
        found = [(rate(b), b) for b in (model.batch - distance, model.batch + distance) if b >= model.systems]
        best, batch = max(found, default=(0.0, 0))
        if best >= BETTER * own:
            return {"batch": batch, "gain": best / own - 1, "tokens_per_second": best * model.shape.sequence_length}
        if distance >= 96:
            break
    return None


def training(machine: Machine, result: dict[str, Any], tokens: float) -> dict[str, Any]:
    """Seconds and energy of a training of so many tokens, from a step's result.

    ``energy_kwh`` is at the middle of the machine's power range; ``energy_kwh_range`` spans the range.
    """
    steps = tokens / (result["batch"] * result["sequence_length"])
    seconds = result["seconds"][result["clock"]]
    mean = (machine.power_low + machine.power_high) / 2 * result["systems"]
    energy = lambda power: _each(seconds, lambda t: power * steps * t / 3.6e6)  # noqa: E731
    return {
        "tokens": tokens,
        "steps": steps,
        "training_seconds": _each(seconds, lambda t: steps * t),
        "energy_kwh": energy(mean),
        "energy_kwh_range": [energy(p * result["systems"]) for p in (machine.power_low, machine.power_high)],
    }


def _each(seconds: dict[str, Any], of: Callable[[float], float]) -> dict[str, Any]:
    return {"dense": of(seconds["dense"]), "sparse": {key: of(t) for key, t in seconds["sparse"].items()}}


@lru_cache(maxsize=1)
def cpu_flops() -> float:
    """FLOP/s of this computer in a dense fp32 product of 1024 x 1024, the median of five."""
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((1024, 1024)).astype(np.float32) for _ in range(2))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / statistics.median(times[1:])


def beside(result: dict[str, Any]) -> dict[str, Any]:
    """What a GPU and this CPU would take for the dense step, roughly, and what that rests on."""
    tokens, flops = result["batch"] * result["sequence_length"], result["flops"]["dense"]
    name, peak, share = GPU
    return {
        "gpu": {
            "name": name, "tokens_per_second": tokens * peak * share / flops, "seconds_per_step": flops / peak / share,
            "rests_on": f"published dense fp16 peak of {peak / 1e12:g} TFLOP/s x {share:.0%} utilisation, assumed",
        },
        "cpu": {
            "tokens_per_second": tokens * cpu_flops() / flops, "seconds_per_step": flops / cpu_flops(),
            "rests_on": f"{cpu_flops() / 1e9:,.0f} GFLOP/s measured now in a dense fp32 product; a step reaches less",
        },
    }  # fmt: skip


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def parse_sweep(text: str) -> tuple[str, list[float]]:
    """``sparsity=0,0.5,0.9`` (or batch, systems) as a name and its values.

    Raises
    ------
    UserError
        For an unknown name or what is no list of numbers.
    """
    name, equals, values = text.partition("=")
    name = name.strip()
    require(bool(equals), f"`sweep` '{text}': expected NAME=VALUES, e.g. sparsity=0,0.5,0.75,0.9.")
    require(name in SWEPT, f"`sweep`: '{name}' cannot be swept.{did_you_mean(name, SWEPT)}")
    try:
        numbers = [float(value) for value in values.split(",")]
    except ValueError:
        raise UserError(f"`sweep` '{text}': expected numbers with commas between them, e.g. {name}=1,2,4.") from None
    require(all(map(math.isfinite, numbers)), f"`sweep` '{text}': expected finite numbers.")
    whole = name == "sparsity" or all(n == int(n) and n >= 1 for n in numbers)
    require(whole, f"`sweep` '{text}': {name} takes whole numbers of at least 1.")
    return name, numbers if name == "sparsity" else [int(n) for n in numbers]


def sweep(machine: Machine, model: Model, name: str, values: Sequence[float]) -> list[dict[str, Any]]:
    """A step's figures for each value of one quantity: sparsities by chance, batches and systems with its masks."""
    rows = []
    for value in values:
        if name == "sparsity":
            one = Model.uniform(model.shape, model.batch, value, model.systems)
        elif name == "batch":
            one = replace(model, batch=int(value))
        else:
            one = replace(model, systems=int(value))
        found = simulate_step(machine, one, sensitivity=False, samples=SWEEP_SAMPLES)
        rows.append(
            {name: value}
            | {key: found[key] for key in ("speedup", "samples_per_second", "tokens_per_second", "bound_by")}
        )
    return rows


def scale(machine: Machine, model: Model, systems: Sequence[int], weak: bool = False) -> list[dict[str, Any]]:
    """Samples a second and efficiency over numbers of systems, the batch shared by them, or so much for each (`weak`).

    Returns
    -------
    list of dict
        ``systems``, ``batch``, ``samples_per_second``, ``efficiency`` (per system, relative to one), ``exposed`` (the
        part of a step that lies between two steps' passes and is not hidden) and ``exposed_by`` (seconds by cause),
        ``bound_by``.

    Raises
    ------
    UserError
        If a system would have nothing to do.
    """
    clock, rows = machine.clock, []

    def run(count: int) -> tuple[int, step.Estimate]:
        batch = model.batch * count if weak else model.batch
        return batch, step.search(machine, clock, replace(model, batch=batch, systems=count))

    batch, one = run(1)
    alone = batch / one.seconds
    for count in systems:
        batch, found = run(count)
        between = found.parts["between steps"]
        rows.append({
            "systems": count, "batch": batch, "samples_per_second": batch / found.seconds,
            "tokens_per_second": batch * model.shape.sequence_length / found.seconds,
            "efficiency": batch / found.seconds / count / alone,
            "exposed": between.cycles / found.total.cycles,
            "exposed_by": {name: cycles / clock for name, cycles in between.parts.items()},
            "seconds": found.seconds, "bound_by": found.total.bound_by,
        })  # fmt: skip
    return rows


def plot_tornado(result: dict[str, Any], title: str, path: Any) -> None:
    """What each unknown does to the speed-up alone, the widest first, and the distribution of them all together.

    Raises
    ------
    UserError
        If there is no band to draw, or the file cannot be written.
    """
    require(bool(result["tornado"]), "`plot`: a dense step has no speed-up to draw; give a `sparsity` or a `sweep`.")
    from matplotlib.figure import Figure

    rows, s = result["tornado"][:12][::-1], result["speedup"]
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        low, high = row["speedup"]["low"], row["speedup"]["high"]
        axes.barh(y, high - low, left=low, color="C0" if high >= low else "C1", height=0.7)
        axes.annotate(
            f"{row['from']:.3g} to {row['to']:.3g} {row['unit']}", (max(low, high), y), (4, 0), va="center", fontsize=7,
            textcoords="offset points",
        )  # fmt: skip
    axes.set_yticks(
        range(len(rows)), [f"{row['parameter']} ({row['grade']}), {row['share']:.0%}" for row in rows], fontsize=8
    )
    axes.axvline(s["central"], color="0.2", linewidth=1)
    axes.axvspan(s["low"], s["high"], alpha=0.12, color="0.4", linewidth=0, label="90 % of the samples")
    axes.axvspan(*s["interval50"], alpha=0.2, color="0.4", linewidth=0, label="half of them")
    axes.margins(x=0.12)
    axes.set_xlabel("speed-up of a step over dense; percentages: of the variance")
    axes.legend(fontsize=8, loc="lower right")
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def _save(figure: Any, path: Any) -> None:
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {error.strerror}.") from None


def plot_rows(rows: Sequence[dict[str, Any]], name: str, title: str, path: Any) -> None:
    """Tokens a second over what was swept, with the band of sparse ones; efficiency where rows have it.

    Raises
    ------
    UserError
        If the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    x = [row[name] for row in rows]
    if "efficiency" in rows[0]:
        axes.plot(x, [row["efficiency"] for row in rows], marker="o", label="efficiency")
        axes.axhline(1, color="0.4", linestyle="--", linewidth=1, label="linear")
        axes.set_ylabel("efficiency per system, relative to one")
        axes.set_ylim(0, 1.1)
    elif name == "sparsity":
        speed = {key: [row["speedup"][key] for row in rows] for key in ("low", "central", "high", "ideal")}
        axes.fill_between(x, speed["low"], speed["high"], alpha=0.25, linewidth=0, label="90 % interval")
        axes.plot(x, speed["central"], marker="o", label="central")
        axes.plot(x, speed["ideal"], color="0.4", linestyle="--", label="ideal, ratio of FLOPs")
        axes.set_ylabel("speed-up of a step over dense")
    else:
        rates = [row["tokens_per_second"]["sparse"] for row in rows]
        axes.fill_between(x, [r["low"] for r in rates], [r["high"] for r in rates], alpha=0.25, linewidth=0)
        axes.plot(x, [r["central"] for r in rates], marker="o", label="sparse, with its 90 % interval")
        axes.plot(x, [row["tokens_per_second"]["dense"] for row in rows], color="0.4", marker="o", label="dense")
        axes.set_ylabel("tokens a second")
        axes.set_ylim(bottom=0)
    axes.set_xlabel(name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=10)
    _save(figure, path)
