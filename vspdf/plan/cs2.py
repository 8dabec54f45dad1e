"""Where runs and plans meet the simulator: layers and steps as asked for, by sizes, by name, or of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vspdf.errors import UserError
from vspdf.runs.masks import _batch, read_run
from vspdf.shapes import Shape, model_shape
from vspdf.simulator.aggregate import step
from vspdf.simulator.aggregate.estimates import check_picture, plot_layer, simulate_layer, simulate_step, sweep_layer
from vspdf.simulator.aggregate.layer import Weights
from vspdf.simulator.machine import Machine

if TYPE_CHECKING:
    from vspdf.plan.planner import Plan


def compare_phases(
    machine: Machine, shape: Shape, masks: Sequence[dict[str, np.ndarray]], phases: Sequence[dict[str, Any]],
    systems: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """CPU-measured speed-up, ideal and CS-2 estimate of every sparse phase of a run, side by side.

    Parameters
    ----------
    masks : sequence of dict
        Of every phase, as `read_masks`; a sparse phase without any is simulated with positions by chance.
    phases : sequence of dict
        As in `summary.json`.
    """
    table = []
    for phase, patterns in zip(phases, masks, strict=True):
        if not phase["sparsity"]:
            continue
        batch = _batch(phase, shape)
        if patterns:
            model = step.Model.of_patterns(shape, patterns, batch, systems)
        else:
            model = step.Model.uniform(shape, batch, phase["sparsity"], systems)
        result = simulate_step(machine, model, sensitivity=False)
        flops = phase["flops"]
        table.append(
            {
                "phase": phase["name"],
                "sparsity": phase["sparsity"],
                "cpu": phase.get("speedup"),
                "ideal": flops["dense"] / flops["useful"],
                "executed": flops["dense"] / flops["executed"],
                "cs2": {key: result["speedup"][key] for key in ("low", "central", "high")},
                "cs2_step_seconds": result["seconds"][result["clock"]],
                "bound_by": result["bound_by"],
                "central": result["central"],
                "clock": result["clock"],
                "machine": machine.name,
                "mask": result["mask"],
            }
        )
    return table


# ---- as asked for, on the command line or in Python ------------------------------------------------------------------


def layer_by_request(
    machine: Machine, *, tokens: int | None = None, in_features: int | None = None, out_features: int | None = None,
    sparsity: float = 0.9, run: str | Path | None = None, layer: str | None = None, level: str = "aggregate",
    plot: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`simulate_layer`, or `layer_events.event_layer` for ``level="event"``, by sizes or with a run's layer's mask.

    `plot` draws speed-up over sparsity, or at the event level heat maps and a time line.

    Raises
    ------
    UserError
        For arguments that are missing or contradict each other, and as the two functions do.
    """
    if level not in ("aggregate", "event"):
        raise UserError(f"`level` {level}: expected event or aggregate.")
    if run is not None:
        if in_features or out_features:
            raise UserError("`run` gives the layer's size: leave `in_features` and `out_features` away.")
        done = read_run(Path(run))
        if layer is None:
            raise UserError(f"`layer`: which of {', '.join(done.patterns) or 'none: the run was dense'}?")
        mask = done.mask(layer)
        weights = Weights(mask.shape[0], mask.shape[1], float(mask.mean()), mask)
        tokens = tokens or done.batch(done.first) * done.shape.sequence_length
    elif tokens is None or in_features is None or out_features is None:
        raise UserError(
            "expected `tokens`, `in_features` and `out_features` (e.g. 65536, 12288, 12288), or `run` and `layer`."
        )
    else:
        if not 0 <= sparsity < 1:
            raise UserError(f"sparsity must lie in [0, 1), not {sparsity}.")
        weights = Weights(out_features, in_features, 1 - sparsity)
    if min(weights.in_features, weights.out_features, tokens) < 1:
        raise UserError("`in_features`, `out_features` and `tokens` must be at least 1.")
    if level == "event":
        from vspdf.simulator.events.layer import event_layer  # needs the compiled core

        return event_layer(machine, weights, tokens, plot)
    if plot is not None:
        check_picture(plot)
    result = simulate_layer(machine, weights, tokens)
    if plot is not None:
        plot_layer(machine, sweep_layer(machine, weights.in_features, weights.out_features, tokens), plot)
    return result


def step_by_request(
    machine: Machine, *, model: str | Shape | None = None, run: str | Path | None = None, batch: int | None = None,
    sequence: int | None = None, systems: int = 1, sparsity: float | None = None, level: str = "aggregate",
) -> dict[str, Any]:  # fmt: skip
    """`simulate_step` of a model (a name of `ledger.MODELS` or a shape) or of a finished run.

    Without a `sparsity`, a run's own masks count, and a model is dense. ``comparison`` of a run holds `compare_phases`.

    Raises
    ------
    UserError
        For arguments that are missing or wrong, and as `simulate_step` does.
    """
    if level != "aggregate":
        raise UserError(f"`level` {level}: a training step is simulated at the aggregate level only.")
    for name, value in (("batch", batch), ("sequence", sequence), ("systems", systems)):
        if value is not None and value < 1:
            raise UserError(f"`{name}` must be at least 1, not {value}.")
    if (model is None) == (run is None):
        raise UserError("expected `model` NAME or `run` RUN, one of them.")
    done = read_run(Path(run)) if run is not None else None
    shape = done.shape if done else model_shape(model) if isinstance(model, str) else model
    assert shape is not None
    if sequence is not None:
        shape = replace(shape, sequence_length=sequence)
    if batch is None and done:
        batch = done.batch(done.first)
    if batch is None:
        raise UserError("`batch`: how many sequences does a step of this model have?")
    if done and sparsity is None and done.patterns:
        what = step.Model.of_patterns(shape, done.patterns, batch, systems)
    else:
        what = step.Model.uniform(shape, batch, sparsity or 0.0, systems)
    result = simulate_step(machine, what)
    result["comparison"] = compare_phases(machine, done.shape, done.masks, done.summary["phases"]) if done else []
    return result


def on_cs2(found: Plan) -> dict[str, Any]:
    """Simulated seconds of the plan and of its dense run on one CS-2; `low`, `central`, `high` as speed-ups.

    Raises
    ------
    UserError
        If the model's activations do not fit the wafer.
    """
    from vspdf.simulator import machine
    from vspdf.simulator.aggregate import estimates
    from vspdf.simulator.aggregate.step import Model

    wafer, batch = machine.load(), found.config.train.batch_size
    steps = {}
    for sparsity in {phase.sparsity for phase in found.phases}:
        model = Model.uniform(found.shape, batch, sparsity)
        steps[sparsity] = estimates.simulate_step(wafer, model, sensitivity=False)
    some = next(iter(steps.values()))
    second = lambda sparsity, key: steps[sparsity]["seconds"][some["clock"]]["sparse"][key]  # noqa: E731
    return {
        "machine": some["machine"],
        "clock": some["clock"],
        "central": some["central"],
        "step_seconds": [second(phase.sparsity, "central") for phase in found.phases],
        "seconds": {
            "dense": found.dense.steps * some["seconds"][some["clock"]]["dense"],
            "planned": {
                key: sum(phase.steps * second(phase.sparsity, key) for phase in found.phases)
                for key in ("low", "central", "high")
            },
        },
    }
