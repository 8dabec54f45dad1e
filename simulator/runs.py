"""Layers and steps as asked for, by sizes, by name, or with the masks and measured times of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from vspdf.errors import UserError, did_you_mean, near_path
from vspdf.ledger import Shape, model_shape
from vspdf.simulator import step
from vspdf.simulator.estimates import check_picture, plot_layer, simulate_layer, simulate_step, sweep_layer
from vspdf.simulator.layer import Weights
from vspdf.simulator.machine import Machine


@dataclass(frozen=True)
class Run:
    """A finished run: its shape, every phase's masks {layer: bool [out, in]} (none: dense), what its summary says."""

    folder: Path
    shape: Shape
    masks: list[dict[str, np.ndarray]]
    summary: dict[str, Any]

    @property
    def patterns(self) -> dict[str, np.ndarray]:
        """Of the first phase."""
        return self.masks[0]

    def batch(self, phase: dict[str, Any]) -> int:
        return _batch(phase, self.shape)

    @property
    def first(self) -> dict[str, Any]:
        return self.summary["phases"][0]

    def mask(self, name: str) -> np.ndarray:
        """Of one layer.

        Raises
        ------
        UserError
            If the run has no sparse layer of that name.
        """
        if name not in self.patterns:
            raise UserError(f"'{self.folder}' has no sparse layer '{name}'.{did_you_mean(name, self.patterns)}")
        return self.patterns[name]


def _batch(phase: dict[str, Any], shape: Shape) -> int:
    return max(1, round(phase["tokens"] / phase["steps"] / shape.sequence_length))


def read_run(folder: Path) -> Run:
    """Reads a run directory's summary and masks.

    Raises
    ------
    UserError
        If it holds no finished run, or a file is broken.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"'{folder}' holds no run: expected a directory that `vspdf train` filled.{near_path(folder)}")
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text())
        dims = {key: summary["model"][key] for key in Shape.__dataclass_fields__}
    except FileNotFoundError:
        raise UserError(f"'{folder}' has no summary.json: the run is not finished (vspdf train --resume).") from None
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    return Run(folder, Shape(**dims), read_masks(folder, len(summary["phases"])), summary)


def masks_file(index: int) -> str:
    """Where a run directory holds the masks at the start of its phase `index`, if it was sparse."""
    return f"patterns-{index + 1}.npz" if index else "patterns.npz"


def read_masks(folder: Path, phases: int) -> list[dict[str, np.ndarray]]:
    """Masks of every phase of a run, by layer; none where it was dense, or where an older run did not keep them.

    Raises
    ------
    UserError
        For a file that is damaged.
    """
    return [_read_masks(folder / masks_file(index)) for index in range(phases)]


def _read_masks(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        with np.load(path) as arrays:
            masks = {}
            for name in (name for name in arrays.files if not name.endswith(".shape")):
                rows, columns = (int(n) for n in arrays[f"{name}.shape"])
                flat = np.unpackbits(arrays[name], count=rows * columns, bitorder="little")
                masks[name] = flat.view(np.bool_).reshape(rows, columns)
            return masks
    except (ValueError, KeyError, OSError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} is damaged: {error}.") from None


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
        raise UserError(f"--level {level}: expected event or aggregate.")
    if run is not None:
        if in_features or out_features:
            raise UserError("--run gives the layer's size: leave --in and --out away.")
        done = read_run(Path(run))
        if layer is None:
            raise UserError(f"--layer: which of {', '.join(done.patterns) or 'none: the run was dense'}?")
        mask = done.mask(layer)
        weights = Weights(mask.shape[0], mask.shape[1], float(mask.mean()), mask)
        tokens = tokens or done.batch(done.first) * done.shape.sequence_length
    elif tokens is None or in_features is None or out_features is None:
        raise UserError("expected --tokens, --in and --out (e.g. 65536, 12288, 12288), or --run and --layer.")
    else:
        if not 0 <= sparsity < 1:
            raise UserError(f"sparsity must lie in [0, 1), not {sparsity}.")
        weights = Weights(out_features, in_features, 1 - sparsity)
    if min(weights.in_features, weights.out_features, tokens) < 1:
        raise UserError("--in, --out and --tokens must be at least 1.")
    if level == "event":
        from vspdf.simulator.layer_events import event_layer  # needs the compiled core

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
        raise UserError(f"--level {level}: a training step is simulated at the aggregate level only.")
    for name, value in (("--batch", batch), ("--sequence", sequence), ("--systems", systems)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}.")
    if (model is None) == (run is None):
        raise UserError("expected --model NAME or --run RUN, one of them.")
    done = read_run(Path(run)) if run is not None else None
    shape = done.shape if done else model_shape(model) if isinstance(model, str) else model
    assert shape is not None
    if sequence is not None:
        shape = replace(shape, sequence_length=sequence)
    if batch is None and done:
        batch = done.batch(done.first)
    if batch is None:
        raise UserError("--batch: how many sequences does a step of this model have?")
    if done and sparsity is None and done.patterns:
        what = step.Model.of_patterns(shape, done.patterns, batch, systems)
    else:
        what = step.Model.uniform(shape, batch, sparsity or 0.0, systems)
    result = simulate_step(machine, what)
    result["comparison"] = compare_phases(machine, done.shape, done.masks, done.summary["phases"]) if done else []
    return result
