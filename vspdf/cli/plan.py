"""`vspdf plan`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vspdf.cli.console import Json, emit, murmur, number, out, say, show, tell
from vspdf.draw import words
from vspdf.errors import UserError, percent_meant, require
from vspdf.files import must_be_new
from vspdf.kernels.hardware import keep_freed_memory

if TYPE_CHECKING:
    from vspdf.plan.planner import Plan


def plan(
    model: Annotated[
        str | None, typer.Option(help="A named model, a configuration, or a Hugging Face folder; advice needs none.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(parser=number, help="Of the first stage; alone, of the whole run.")
    ] = None,
    effective: Annotated[
        float | None, typer.Option(parser=number, help="Weight-FLOPs to save against the dense run.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="add-on (as published, the default) or fixed-budget.")] = None,
    phases: Annotated[str, typer.Option(metavar="S:STEPS,...", help="Explicit stages, any number.")] = "",
    steps: Annotated[int | None, typer.Option(help="Of the dense run to compare with.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step, for models without a config.")] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens of a sequence; default: the model's.")] = None,
    convention: Annotated[str, typer.Option(help="linear, spdf, vspdf, chinchilla or cerebras-card.")] = "vspdf",
    causal: Annotated[bool, typer.Option("--causal", help="Count half of the attention products.")] = False,
    save: Annotated[float | None, typer.Option(parser=number, help="Wish: save this fraction of all FLOPs.")] = None,
    memory: Annotated[float | None, typer.Option(help="Wish: a training state of so many GB in every stage.")] = None,
    hours: Annotated[
        float | None, typer.Option(help="Wish: done in so many hours on this machine; also advice what to train then.")
    ] = None,
    time: Annotated[bool, typer.Option("--time", help="Measure this machine's speed for it.")] = False,
    machines: Annotated[int | None, typer.Option(metavar="N", help="So many machines share every step.")] = None,
    network: Annotated[
        float | None, typer.Option(metavar="GBITS", help="Between them, gigabits a second; default 10.")
    ] = None,
    write: Annotated[Path | None, typer.Option(metavar="CONFIG", help="Write the YAML that `train` runs.")] = None,
    as_json: Json = False,
) -> None:
    """Stages, tokens, FLOPs, memory and time of a run before it is run, or the run for a wish.

    `vspdf plan --model cerebras-gpt-6.7b --sparsity 0.9 --effective 0.75`

    `vspdf plan --model gpt2-small --save 0.5 --write mine.yaml`

    `vspdf plan --model quickstart --time`

    `vspdf plan --hours 2 --write mine.yaml`

    `vspdf plan --model gpt2-small --sparsity 0.9 --machines 8 --network 10`
    """
    from vspdf.plan import advice, planner
    from vspdf.plan import write as plan_write
    from vspdf.plan.machines import Machines

    require(network is None or machines is not None, "`network` goes with `machines`: how many are there?")
    several = None if machines is None else Machines(machines, 10.0 if network is None else network)
    if write:
        must_be_new(write)  # rather than after measuring
    keep_freed_memory()  # as training does, for what is timed
    if model is None:
        _advise(hours, write, as_json, {
            "sparsity": sparsity, "effective": effective, "split": split, "phases": phases or None, "steps": steps,
            "batch-size": batch_size, "sequence": sequence, "convention": None if convention == "vspdf" else convention,
            "causal": causal or None, "save": save, "memory": memory, "time": time or None, "machines": machines,
        })  # fmt: skip
        return
    found = planner.plan(
        model, sparsity=sparsity, effective=effective, split=split, phases=_stages(phases) if phases else None,
        steps=steps, batch_size=batch_size, sequence=sequence, convention=convention, causal=causal, save=save,
        memory=memory, hours=hours, time=time, machines=several, progress=murmur,
    )  # fmt: skip
    advised = advice.advise(hours, murmur) if hours is not None else None
    if write:
        plan_write.write(found, write)
        say(f"wrote {write}: vspdf train {write}")
    if as_json:
        emit(found.to_json() | ({"advice": advised.to_json()} if advised else {}))
    else:
        _print_plan(found)
        tell(*(advised.sentences() if advised else ()))


def _advise(hours: float | None, write: Path | None, as_json: bool, of_a_model: dict[str, Any]) -> None:
    """`hours` without a model; what else was given must be None."""
    from vspdf.plan import advice
    from vspdf.plan.write import write_advice

    if hours is None:
        raise UserError(
            "`model` says what to plan for: a name, a configuration or a folder. `hours` alone gives advice."
        )
    for name, value in of_a_model.items():
        require(value is None, f"`{name}` plans a run of a `model`, which one? `hours` alone gives advice.")
    advised = advice.advise(hours, murmur)
    if write:
        write_advice(advised, write)
        say(f"wrote {write}: vspdf train {write}")
    emit({"advice": advised.to_json()}) if as_json else tell(*advised.sentences())


def _stages(text: str) -> list[tuple[float, int]]:
    try:
        pairs = [part.split(":") for part in text.split(",") if part]
        return [(float(sparsity), int(steps)) for sparsity, steps in pairs]
    except ValueError:
        meant = next(filter(None, map(percent_meant, re.split("[:,]", text))), "")
        raise UserError(f"`phases` '{text}': expected SPARSITY:STEPS,..., e.g. 0.9:62523,0:9379.{meant}") from None


def _print_plan(found: Plan) -> None:
    timed = found.calibration is not None
    table = Table(title=f"{found.model}: {words.count(found.shape.parameters)} parameters", title_justify="left")
    table.add_column("")
    for column in ("sparsity", "steps", "tokens", "FLOPs", "state", *(["time"] if timed else [])):
        table.add_column(column, justify="right")
    for stage in [*found.phases, found.dense]:
        if stage is found.dense:
            table.add_section()
            steps = sum(phase.steps for phase in found.phases)
            cells = [f"{steps:,}", words.count(found.tokens), f"{found.flops:.2e}", words.size(found.state_bytes)]
            clock = [words.duration(found.seconds)] if found.seconds is not None else []
            table.add_row("whole run", f"{found.time_average_sparsity:.4f}", *cells, *clock, style="bold")
        clock = [words.duration(stage.seconds)] if stage.seconds is not None else []
        table.add_row(
            stage.name, f"{stage.sparsity:.4g}", f"{stage.steps:,}", words.count(stage.tokens), f"{stage.flops:.2e}",
            words.size(stage.state_bytes), *clock,
        )  # fmt: skip
    show(table)
    table = Table(title="training FLOPs" + (", causal attention" if found.causal else ""), title_justify="left")
    for column in ("convention", "dense run", "planned", "saved", "times fewer"):
        table.add_column(column, justify="left" if column == "convention" else "right")
    for name, row in found.by_convention().items():
        table.add_row(
            name, f"{row['dense']:.4g}", f"{row['planned']:.4g}", f"{row['saved_fraction']:.2%}",
            f"{row['dense'] / row['planned']:.3f}x", style="bold" if name == found.convention else None,
        )  # fmt: skip
    show(table)
    lines = [
        f"Dense run: {found.baseline}.",
        f"Effective sparsity {found.effective_sparsity:.4f} (weight-FLOPs against the dense run), over time "
        f"{found.time_average_sparsity:.4f}; {found.token_ratio:.4f} times the dense run's tokens, "
        f"{found.sparse_fraction:.4f} of them at the first sparsity.",
        f"State: weights, gradients and AdamW moments in float32, patterns and kernel plans; activations come on top. "
        f"Peak {found.state_bytes / found.dense.state_bytes:.0%} of the dense run's.",
        *found.notes,
    ]
    if (measured := found.calibration) is not None:
        block = measured.block_seconds
        speeds = ", ".join(f"{s:.4g}: {block[0.0] / seconds:.2f}x" for s, seconds in block.items() if s)
        lines.append(
            f"Time: from one block timed here on {measured.tokens:,} tokens ({measured.precision}, {measured.threads} "
            f"threads, medians of {measured.rounds} rounds; forward and backward, attention and norms included; "
            f"speed-up by sparsity {speeds or '-'}), times the layers; vocabulary and AdamW timed apart. No data, "
            "evaluation, checkpoints."
        )
    else:
        lines.append("Time on this machine: not measured (--time).")
    lines[3:3] = _on_gpu(found)
    if (spread := found.on_machines()) is not None:
        lines.append(_on_machines(spread))
    lines.append(_on_cs2(found))
    for line in lines:
        out.print(line, markup=False, highlight=False)


def _on_machines(spread: dict[str, Any]) -> str:
    """What several machines make of it, in a sentence."""
    each = [
        f"{name} {words.size(spread['bytes_per_step'][kind])} in {spread['allreduce_seconds'][kind]:.3g} s, "
        f"{spread['efficiency'][kind]:.0%} of {spread['count']} times one machine's speed"
        for name, kind in (("planned", "planned"), ("the dense run", "dense"))
    ]
    return (
        f"On {spread['count']} machines like this one, {spread['network']:g} Gb/s between them, each sends in a step: "
        f"{'; '.join(each)} (nothing hidden behind compute; on the mean of all steps)."
    )


def _on_gpu(found: Plan) -> list[str]:
    """Memory of the sparsest stage there, where it is another than on a CPU."""
    stage = max(found.phases, key=lambda phase: phase.sparsity)
    if not stage.sparsity:
        return []
    paths, dense = stage.state_bytes_by_path, found.dense.state_bytes
    return [
        f"On a GPU '{stage.name}' has a state of {words.size(paths['dense'])} on the paths dense and 2:4 "
        f"({paths['dense'] / dense:.0%}), {words.size(paths['triton'])} on triton ({paths['triton'] / dense:.0%})."
    ]


def _on_cs2(found: Plan) -> str:
    """The last line: simulated time, or why there is none."""

    try:
        wafer = found.on_cs2()
    except UserError as error:
        return f"Time on a CS-2: not known; {error}"
    seconds = wafer["seconds"]
    longest, middle, shortest = (words.duration(seconds["planned"][key]) for key in ("low", "central", "high"))
    return (
        f"Time on a CS-2, simulated: {middle} ({shortest} to {longest}, by what is not known of it); the dense run "
        f"{words.duration(seconds['dense'])}. One system at {wafer['clock']}; {wafer['central']} (vspdf simulate step)."
    )
