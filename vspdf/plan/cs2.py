"""The one place where runs and plans meet the simulator: a run's phases, a layer or a step as asked for, a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vspdf.errors import UserError, check_sparsity, check_whole, did_you_mean, one_of, require
from vspdf.plan import outlook
from vspdf.plan.wafer_models import transformer
from vspdf.runs.folder import Run
from vspdf.runs.writer import Writer
from vspdf.shapes import Shape
from vspdf.simulator import machine as machines
from vspdf.simulator.aggregate.estimates import check_picture, plot_layer, simulate_layer, simulate_step, sweep_layer
from vspdf.simulator.aggregate.layer import Weights
from vspdf.simulator.aggregate.model import Model, Transformer
from vspdf.simulator.machine import Machine

SAMPLES = 32  # of the band of a plan

# ---- a run -----------------------------------------------------------------------------------------------------------


def compare(folder: Path, machine: Machine | None = None) -> list[dict[str, Any]]:
    """Compares a finished run with a CS-2, as `compare_phases` does, and keeps that as `comparison` in its summary.

    Raises
    ------
    UserError
        If the run is not finished, a file of it is broken, or its model's activations do not fit the wafer.
    """
    run = Run(folder).require(finished=True).check(whole=False)
    rows = _compared(machine or machines.load(), run, _masks(run))
    Writer(folder).summary({**run.summary, "comparison": rows})
    return rows


def _masks(run: Run) -> list[Mapping[str, np.ndarray]]:
    return [run.masks(index) for index in range(len(run.summary["phases"]))]


def _compared(machine: Machine, run: Run, masks: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    """`compare_phases` of a run that is at hand."""
    ends = [run.end_masks(index) for index in range(len(masks))]
    return compare_phases(machine, run.shape, masks, run.summary["phases"], ends=ends)


STAGES = 4  # of a sparsity that changes, that are simulated


def _over_time(
    machine: Machine, shape: Shape, stages: Sequence[Mapping[str, Any]], first: Mapping[str, np.ndarray],
    last: Mapping[str, np.ndarray], batch: int, systems: int,
) -> dict[str, Any]:  # fmt: skip
    """`simulate_step` of a phase, on average over its steps."""
    real = [Model.of_patterns(shape, masks, batch, systems) for masks in (first, last) if masks]
    if real and len(stages) == 1:
        models = [(1.0, model) for model in real]
    else:
        size = -(-len(stages) // STAGES)
        parts = [stages[i : i + size] for i in range(0, len(stages), size)]
        models = [(sum(s["steps"] for s in part), Model.uniform(shape, batch, _mean(part), systems)) for part in parts]
    results = [simulate_step(machine, model, sensitivity=False) for _, model in models]
    if len(results) == 1:
        return results[0]
    found, total = dict(results[-1]), sum(weight for weight, _ in models)
    clock = found["clock"]
    dense = results[0]["seconds"][clock]["dense"]
    sparse = {
        key: sum(w * r["seconds"][clock]["sparse"][key] for (w, _), r in zip(models, results, strict=True)) / total
        for key in ("low", "central", "high")
    }
    found["seconds"] = {**found["seconds"], clock: {"dense": dense, "sparse": sparse}}
    found["speedup"] = {**found["speedup"], **{key: dense / seconds for key, seconds in sparse.items()}}
    return found


def _mean(stages: Sequence[Mapping[str, Any]]) -> float:
    """Sparsity over the steps of stages."""
    return sum(stage["steps"] * stage["sparsity"] for stage in stages) / sum(stage["steps"] for stage in stages)


def _stages(phase: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Steps and sparsity of the stages of a phase, as in a summary; that of one stage is over all layers."""
    stages: Sequence[Mapping[str, Any]] = phase.get("stages", [])
    return stages if len(stages) > 1 else [{"steps": phase["steps"], "sparsity": phase["sparsity"]}]


def _batch(phase: Mapping[str, Any], shape: Shape) -> int:
    """Sequences a step of a phase had."""
    return max(1, round(phase["tokens"] / phase["steps"] / shape.sequence_length))


def compare_phases(
    machine: Machine, shape: Shape, masks: Sequence[Mapping[str, np.ndarray]], phases: Sequence[dict[str, Any]],
    systems: int = 1, ends: Sequence[Mapping[str, np.ndarray]] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """CPU-measured speed-up, ideal and CS-2 estimate of every sparse phase of a run, side by side.

    A phase whose masks move, or whose sparsity changes, is estimated over its steps: of its masks as it begins and as
    it ends, or of a few of its stages.

    Parameters
    ----------
    masks : sequence of mapping
        Of every phase by layer, bool [out, in]; a sparse phase without any is simulated with positions by chance.
    ends : sequence of mapping
        Likewise, as phases end in which masks moved.
    phases : sequence of dict
        As in `summary.json`.
    """
    table = []
    for phase, patterns, end in zip(phases, masks, ends or [{}] * len(phases), strict=True):
        stages = _stages(phase)
        if not any(stage["sparsity"] for stage in stages):
            continue
        result = _over_time(machine, shape, stages, patterns, end, _batch(phase, shape), systems)
        flops = phase["flops"]
        table.append(
            {
                "phase": phase["name"],
                "sparsity": phase["sparsity"] if len(stages) == 1 else _mean(stages),
                "cpu": phase.get("speedup"),
                "ideal": flops["dense"] / flops["useful"],
                "executed": flops["dense"] / flops["executed"],
                "cs2": {key: result["speedup"][key] for key in ("low", "central", "high")},
                "cs2_step_seconds": result["seconds"][result["clock"]],
                "bound_by": result["bound_by"],
                "central": result["central"],
                "clock": result["clock"],
                **machine.said(),
                "mask": result["mask"],
            }
        )
    return table


# ---- as asked for, on the command line or in Python ------------------------------------------------------------------


def layer_by_request(
    machine: Machine, *, tokens: int | None = None, in_features: int | None = None, out_features: int | None = None,
    sparsity: float | None = None, run: str | Path | None = None, mask: str | Path | None = None,
    layer: str | None = None, level: str = "aggregate", plot: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`simulate_layer`, or `layer_events.event_layer` for ``level="event"``, by sizes or with a real mask.

    The mask is that of a `layer` of a `run`, or comes from a file or folder that `Pattern.read` takes.

    Sizes alone take positions by chance, at a `sparsity` of 0.9 where none is given.

    `plot` draws speed-up over sparsity, or at the event level heat maps and a time line.

    Raises
    ------
    UserError
        For arguments that are missing or contradict each other, and as the two functions do.
    """
    one_of("`level`", level, ("event", "aggregate"))
    require(run is not None or mask is not None or layer is None, "`layer` is one of a `run` or of a `mask` file.")
    require(run is None or mask is None, "`run` and `mask` both give the mask: leave one away.")
    where = ""
    if (source := "run" if run is not None else "mask" if mask is not None else None) is not None:
        for name, value in (("in_features", in_features), ("out_features", out_features), ("sparsity", sparsity)):
            require(value is None, f"`{source}` gives the layer's size and mask: leave `{name}` away.")
    if mask is not None:
        if tokens is None:
            raise UserError("`mask` gives the layer's size and mask: `tokens` is still to be given.")
        from vspdf.pattern import Pattern  # brings torch

        weights = Weights.of_mask(Pattern.read(mask, name=layer).mask().numpy())
    elif run is not None:
        weights, usual, where = _layer_of_run(Path(run), layer)
        tokens = usual if tokens is None else tokens
    elif tokens is None or in_features is None or out_features is None:
        raise UserError(
            "expected `tokens`, `in_features` and `out_features` (e.g. 65536, 12288, 12288), or `run` and `layer`."
        )
    else:
        sparsity = 0.9 if sparsity is None else sparsity
        check_sparsity("`sparsity`", sparsity)
        check_whole("`in_features`", in_features)
        check_whole("`out_features`", out_features)
        weights = Weights(out_features, in_features, 1 - sparsity)
    check_whole("`tokens`", tokens)
    if level == "event":
        from vspdf.simulator.events.layer import event_layer  # needs the compiled core

        return _noted(event_layer(machine, weights, tokens, plot), where)
    if plot is not None:
        check_picture(plot)
    result = _noted(simulate_layer(machine, weights, tokens), where)
    if plot is not None:
        plot_layer(machine, sweep_layer(machine, weights.in_features, weights.out_features, tokens), plot)
    return result


def _layer_of_run(folder: Path, layer: str | None) -> tuple[Weights, int, str]:
    """A layer as the first phase that has its mask begins, or else ends; tokens of that phase's step; and which it is.

    Masks that move may begin dense, and be sparse at a phase's end alone.
    """
    run = Run(folder).require(finished=True).check(whole=False)
    found: dict[str, tuple[int, str, Mapping[str, np.ndarray]]] = {}
    for index in range(len(run.summary["phases"])):
        for end, read in (("begins", run.masks(index)), ("ends", run.end_masks(index))):
            found |= {name: (index, end, read) for name in read if name not in found}
    if layer is None:
        raise UserError(f"`layer`: which of {', '.join(found) or 'none: the run was dense'}?")
    if layer not in found:
        raise UserError(f"'{folder}' has no sparse layer '{layer}'.{did_you_mean(layer, found)}")
    index, end, masks = found[layer]
    phase = run.summary["phases"][index]
    tokens = _batch(phase, run.shape) * run.shape.sequence_length
    return Weights.of_mask(masks[layer]), tokens, f"The mask is that of phase '{phase['name']}' as it {end}."


def _noted(result: dict[str, Any], line: str) -> dict[str, Any]:
    """A result with a line more in its note."""
    return {**result, "note": " ".join(filter(None, (result.get("note"), line)))}


def step_by_request(
    machine: Machine, *, model: str | Path | Shape | None = None, run: str | Path | None = None,
    batch: int | None = None, sequence: int | None = None, systems: int = 1, sparsity: float | None = None,
    tokens: float | None = None, sweep: str | None = None, level: str = "aggregate", plot: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`simulate_step` of a model (a name, a configuration, a Hugging Face folder, a shape) or of a finished run.

    Without a `sparsity`, a run's own masks count, and a model is dense. ``comparison`` of a run holds `compare_phases`,
    ``better_batch`` the nearest batch that is faster, ``beside`` what a GPU and this CPU would take; with `tokens`
    there are ``training_seconds`` and ``energy_kwh``, with `sweep` (``sparsity=0,0.5,0.9``; batch, systems) ``rows``.
    `plot` draws the sweep, or without one what each unknown does to the speed-up.

    Raises
    ------
    UserError
        For arguments that are missing or wrong, and as `simulate_step` does.
    """
    if level != "aggregate":
        raise UserError(f"`level` {level}: a training step is simulated at the aggregate level only.")
    require(tokens is None or 1 <= tokens < math.inf, f"`tokens` must be at least 1 and finite, not {tokens}.")
    swept = outlook.parse_sweep(sweep) if sweep is not None else None
    if plot is not None:
        check_picture(plot)
    what, done, masks = _model(model, run, batch, sequence, systems, sparsity)
    result = _noted(simulate_step(machine, what), _begins_dense(done, what, sparsity))
    near = tuple({result["mapping"][kind]["columns"] for kind in ("dense", "sparse")})
    result["comparison"] = _compared(machine, done, masks) if done else []
    cut = result["mapping"]["sparse"]["passes"] > 1  # one micro-batch alone: the more sequences the better
    result["better_batch"] = outlook.better_batch(machine, what.grouped(), near) if cut else None
    result["beside"] = outlook.beside(result)
    if tokens is not None:
        result |= outlook.training(machine, result, tokens)
    if swept:
        name, values = swept
        result["swept"], result["rows"] = name, outlook.sweep(machine, what, name, values)
        if plot is not None:
            outlook.plot_rows(result["rows"], name, f"{machine.name}: a training step over {name}", plot)
    elif plot is not None:
        title = f"{machine.name}: what is not known of a step at {result['sparsity']:.4g} sparsity"
        outlook.plot_tornado(result, title, plot)
    return result


def scale_by_request(
    machine: Machine, *, systems: Sequence[int], model: str | Path | Shape | None = None,
    run: str | Path | None = None, batch: int | None = None, sequence: int | None = None,
    sparsity: float | None = None, weak: bool = False, level: str = "aggregate", plot: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`outlook.scale` of a model or a run over numbers of systems.

    Raises
    ------
    UserError
        For arguments that are missing or wrong, and as `outlook.scale` does.
    """
    if level != "aggregate":
        raise UserError(f"`level` {level}: several systems are simulated at the aggregate level only.")
    require(len(systems) > 0, "`systems` takes whole numbers of at least 1, e.g. 1,2,4,8,16.")
    for count in systems:
        check_whole("`systems`", count)
    if plot is not None:
        check_picture(plot)
    what, done, _ = _model(model, run, batch, sequence, 1, sparsity)
    rows = outlook.scale(machine, what, systems, weak)
    if plot is not None:
        kind = "so many sequences a system" if weak else "one batch for all"
        outlook.plot_rows(rows, "systems", f"{machine.name}: {kind}", plot)
    result = {
        **machine.said(), "batch": what.batch, "weak": weak, "sparsity": 1 - what.kept,
        "sequence_length": what.shape.sequence_length, "rows": rows,
    }  # fmt: skip
    return _noted(result, _begins_dense(done, what, sparsity))


def _model(
    model: str | Path | Shape | None, run: str | Path | None, batch: int | None, sequence: int | None, systems: int,
    sparsity: float | None,
) -> tuple[Model, Run | None, list[Mapping[str, np.ndarray]]]:  # fmt: skip
    """What is asked for, the run it comes from and that run's masks."""
    for name, value in (("batch", batch), ("sequence", sequence), ("systems", systems)):
        if value is not None:
            check_whole(f"`{name}`", value)
    if (model is None) == (run is None):
        raise UserError("expected `model` NAME or `run` RUN, one of them.")
    done = Run(Path(run)).require(finished=True).check(whole=False) if run is not None else None
    masks = _masks(done) if done else []
    if done:
        shape, known = Transformer.of(done.shape), _batch(done.summary["phases"][0], done.shape)
    elif isinstance(model, Shape):
        shape, known = Transformer.of(model), None
    else:
        shape, known = transformer(str(model))
    if sequence is not None:
        most = shape.sequence_length
        require(sequence <= most, f"`sequence` {sequence}: this model has positions for {most} tokens.")
        shape = shape.at(sequence)
    batch = known if batch is None else batch
    if batch is None:
        raise UserError("`batch`: how many sequences does a step of this model have?")
    if done and sparsity is None and masks[0]:
        return Model.of_patterns(shape, masks[0], batch, systems), done, masks
    if done and sparsity is None:  # it begins dense, or did not keep its masks
        sparsity = _stages(done.summary["phases"][0])[0]["sparsity"]
    return Model.uniform(shape, batch, sparsity or 0.0, systems), done, masks


def _begins_dense(run: Run | None, simulated: Model, sparsity: float | None) -> str:
    """A line for a run that is simulated as it begins, which is dense, and was sparse later; else none."""
    if run is None or sparsity is not None or simulated.kept < 1:
        return ""
    for phase in run.summary["phases"]:
        if most := max(stage["sparsity"] for stage in _stages(phase)):
            return (
                f"The run is simulated as it begins, dense; phase '{phase['name']}' has a sparsity of up to {most:.4g}."
            )
    return ""


ESTIMATES: dict[str, Callable[..., dict[str, Any]]] = {
    "layer": layer_by_request, "step": step_by_request, "scale": scale_by_request,
}  # fmt: skip


def simulate(
    program: str, *, machine: str | Path | Machine = "cs2", settings: Iterable[str] | Mapping[str, Any] = (),
    level: str = "auto", trace: str | Path | None = None, plot: str | Path | None = None, **arguments: Any,
) -> dict[str, Any]:  # fmt: skip
    """Runs a program on a simulated wafer and returns its figures.

    Parameters
    ----------
    program : {"spmm", "gemm", "gemv", "reduce", "layer", "step", "scale"}
        Its arguments are those of `vspdf simulate PROGRAM` with underscores, e.g.
        ``simulate("reduce", pes=512, elements=4096, group=32)``; of a layer ``in_features`` and ``out_features``.
    machine : str or path
        A machine by name, or a YAML file of one's own.
    settings : list of "key=value", or mapping
        Machine parameters to change.
    level : {"auto", "event", "aggregate"}
        "event" moves every wavelet and computes every value; "aggregate" is the closed form of the same program.
        "auto" takes the event level where it ends within seconds.
    trace : path, optional
        Write a Chrome (Perfetto) trace here; takes the event level.
    plot : path, optional
        Draw heat maps per PE and a time line here (.html, .png); takes the event level. Of a layer at the aggregate
        level: speed-up over sparsity (.png); of a step: its sweep, or what is not known.

    Returns
    -------
    dict
        Cycles and what else the program reports, ``seconds`` at both clocks, ``level`` and ``why``.

    Raises
    ------
    UserError
        For an unknown program, machine, parameter or argument, and for what does not fit the machine.
    """
    from vspdf.simulator import simulate as programs  # needs the compiled core

    chosen = machines.load(machine, settings)
    if program not in programs.PROGRAMS and program not in ESTIMATES:
        raise UserError(f"unknown program '{program}'.{did_you_mean(program, [*programs.PROGRAMS, *ESTIMATES])}")
    if program in programs.PROGRAMS:
        return programs.simulate(program, machine=chosen, level=level, trace=trace, plot=plot, **arguments)
    programs.check_level(level)
    if trace is not None:
        raise UserError(f"a {program} has no trace of events: leave trace away.")
    if plot is not None:
        arguments["plot"] = Path(plot)
    try:
        return ESTIMATES[program](chosen, level="aggregate" if level == "auto" else level, **arguments)
    except TypeError as error:
        raise UserError(f"simulate('{program}'): {str(error).split('()', 1)[-1].strip()}.") from None


# ---- a plan ----------------------------------------------------------------------------------------------------------


def on_cs2(shape: Shape, batch: int, stages: Sequence[tuple[float, int]], dense_steps: int) -> dict[str, Any]:
    """Simulated seconds of a planned run and of its dense run on one CS-2.

    Parameters
    ----------
    shape : Shape
    batch : int
        Sequences of a step.
    stages : sequence of (sparsity, steps)
        Of the planned run.
    dense_steps : int
        Of the dense run.

    Returns
    -------
    dict
        `step_seconds` of every stage, `seconds` of both runs (`low`, `central` and `high` of the planned one), and the
        `machine`, `clock` and `central` case they are of.

    Raises
    ------
    UserError
        If the model's activations do not fit the wafer.
    """
    wafer, steps = machines.load(), {}
    for sparsity in {sparsity for sparsity, _ in stages}:
        steps[sparsity] = simulate_step(
            wafer, Model.uniform(shape, batch, sparsity), sensitivity=False, samples=SAMPLES
        )
    some = next(iter(steps.values()))
    second = lambda sparsity, key: steps[sparsity]["seconds"][some["clock"]]["sparse"][key]  # noqa: E731
    return {
        "machine": some["machine"],
        "clock": some["clock"],
        "central": some["central"],
        "step_seconds": [second(sparsity, "central") for sparsity, _ in stages],
        "seconds": {
            "dense": dense_steps * some["seconds"][some["clock"]]["dense"],
            "planned": {
                key: sum(n * second(sparsity, key) for sparsity, n in stages) for key in ("low", "central", "high")
            },
        },
    }
