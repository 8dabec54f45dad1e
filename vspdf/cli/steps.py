"""`vspdf simulate step`, `scale` and `machines`: a whole training step, on one or several systems."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vspdf.cli.console import Json, MachineName, Settings, emit, number, say, show, tell
from vspdf.cli.simulate import (
    Level,
    band,
    comparison_table,
    cost_columns,
    cost_row,
    load_machine,
    note,
    tornado_table,
    total_row,
    where,
)
from vspdf.draw import words
from vspdf.errors import UserError, require

ModelName = Annotated[str | None, typer.Option(help="A name (e.g. gpt3-xl), a configuration or a Hugging Face folder.")]
RunFolder = Annotated[Path | None, typer.Option(help="A finished run: its model, batch, masks and measured times.")]
Batch = Annotated[int | None, typer.Option(help="Sequences of a step, all systems together.")]
Sequence_ = Annotated[int | None, typer.Option("--sequence", help="Tokens of a sequence; default: the model's.")]
Sparsity = Annotated[
    float | None, typer.Option(parser=number, help="Of projections and FFN; default: 0, or the run's.")
]
Picture = Annotated[
    Path | None, typer.Option("--plot", help="Draw the rows, or what is not known, here: .png, .svg, .pdf.")
]


def step(
    model: ModelName = None,
    run: RunFolder = None,
    batch: Batch = None,
    sequence: Sequence_ = None,
    systems: Annotated[int, typer.Option(help="Systems that share the batch.")] = 1,
    sparsity: Sparsity = None,
    tokens: Annotated[float | None, typer.Option(help="Of a whole training: its time and energy.")] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="NAME=VALUES", help="sparsity, batch or systems, e.g. sparsity=0,0.5,0.9.")
    ] = None,
    plot: Picture = None,
    machine: MachineName = "cs2",
    settings: Settings = None,
    level: Level = "aggregate",
    details: Annotated[bool, typer.Option("--details", help="Where the time goes, part by part.")] = False,
    as_json: Json = False,
) -> None:
    """A training step of a transformer: samples and tokens a second, dense against sparse, and what bounds it.

    `vspdf simulate step --model gpt3-xl --batch 121 --sparsity 0.75 --tokens 26e9`

    `vspdf simulate step --model gpt3-xl --batch 121 --sweep sparsity=0,0.5,0.75,0.9 --plot step.png`
    """
    from vspdf.plan import cs2

    wafer = load_machine(machine, settings)
    require(not (details and as_json), "`details` is for people: `as_json` has them all.")
    result = cs2.step_by_request(
        wafer, model=model, run=run, batch=batch, sequence=sequence, systems=systems, sparsity=sparsity, tokens=tokens,
        sweep=sweep, level=level, plot=plot,
    )  # fmt: skip
    result["name"] = model or str(run)
    if plot is not None:
        say(f"wrote {plot}")
    if as_json:
        emit(result)
        return
    _print_step(result)
    if details:
        _print_details(result)


def scale(
    model: ModelName = None,
    run: RunFolder = None,
    systems: Annotated[str, typer.Option(help="Numbers of systems, with commas.")] = "1,2,4,8,16",
    batch: Annotated[
        int | None, typer.Option(help="Sequences of a step: of all systems, or of each with --weak.")
    ] = None,
    weak: Annotated[bool, typer.Option("--weak", help="The batch grows with the systems.")] = False,
    sequence: Sequence_ = None,
    sparsity: Sparsity = None,
    plot: Picture = None,
    machine: MachineName = "cs2",
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """A training step on several systems: samples a second, and how much of linear scaling is left.

    `vspdf simulate scale --model cerebras-gpt-1.3b --batch 528 --systems 1,2,4,8,16`

    `vspdf simulate scale --model gpt3-xl --batch 121 --systems 1,4,16 --weak --sparsity 0.75`
    """
    from vspdf.plan import cs2

    try:
        counts = [int(part) for part in systems.split(",")]
    except ValueError:
        raise UserError(f"`systems` '{systems}': expected whole numbers with commas, e.g. 1,2,4,8,16.") from None
    result = cs2.scale_by_request(
        load_machine(machine, settings), systems=counts, model=model, run=run, batch=batch, sequence=sequence,
        sparsity=sparsity, weak=weak, plot=plot,
    )  # fmt: skip
    result["name"] = model or str(run)
    if plot is not None:
        say(f"wrote {plot}")
    if as_json:
        emit(result)
        return
    shared = f"{result['batch']} sequences a system" if weak else f"{result['batch']} sequences for all"
    table = Table(
        title=f"{result['name']} on {result['machine']}, {shared}, sparsity {result['sparsity']:.4g}",
        title_justify="left",
    )
    for column in ("systems", "samples/s", "tokens/s", "efficiency", "exposed", "bound by"):
        table.add_column(column, justify="left" if column == "bound by" else "right")
    for row in result["rows"]:
        table.add_row(
            str(row["systems"]), f"{row['samples_per_second']:,.4g}", f"{row['tokens_per_second']:,.0f}",
            f"{row['efficiency']:.1%}", f"{row['exposed']:.2%}", row["bound_by"],
        )  # fmt: skip
    show(table)
    tell(
        "Exposed: the way from the last gradients through tree and memory service to the next step's first weights. "
        "Efficiency also falls with the sequences of a system: fixed cost of a step, and rows of cores left empty.",
        *note(result),
    )


def machines(as_json: Json = False) -> None:
    """The machines that can be simulated, and what is known of them.

    `vspdf simulate machines`
    """
    from vspdf.simulator import machine as known

    rows = []
    for name in known.names():
        m = known.load(name)
        grades = [parameter.grade for parameter in m.parameters.values()]
        rows.append({
            "name": name, "validated": not m.note, "note": m.note, "width": m.width, "height": m.height,
            "clock_ghz": m.clock_sdk, "peak_pflops": m.width * m.height * m.fmac_fp16_rate * 2 * m.clock_sdk / 1e6,
            "grades": {grade: grades.count(grade) for grade in sorted(known.GRADES)},
            "parameters": {
                key: {"value": p.value, "unit": p.unit, "grade": p.grade, "source": p.source, "range": p.range}
                for key, p in m.parameters.items()
            },
        })  # fmt: skip
    if as_json:
        emit({"machines": rows})
        return
    table = Table(title="grades: A primary text, B quoted, D derived or fitted, M assumed", title_justify="left")
    for column in ("machine", "PEs", "clock", "fp16 peak", "A", "B", "D", "M", "validated"):
        table.add_column(column, justify="left" if column in ("machine", "validated") else "right")
    for row in rows:
        sizes = (f"{row['width']} x {row['height']}", f"{row['clock_ghz']:g} GHz", f"{row['peak_pflops']:.2f} PF")
        table.add_row(
            row["name"], *sizes, *(str(row["grades"][grade]) for grade in "ABDM"), "yes" if row["validated"] else "no",
        )  # fmt: skip
    show(table)
    tell(*(row["note"] for row in rows if row["note"]))
    tell("One's own: a YAML file with `base: NAME` and the parameters that differ (docs/simulator.md).")


def _print_step(result: dict[str, Any]) -> None:
    systems = f"{result['systems']} systems" if result["systems"] > 1 else "one system"
    rate, samples = result["tokens_per_second"], result["samples_per_second"]
    table = Table(
        title=f"{result['name']} on {result['machine']}, {systems}: {result['batch']} sequences of "
        f"{result['sequence_length']} tokens a step, sparsity {result['sparsity']:.4g}, at {result['clock']}",
        title_justify="left",
    )
    table.add_column("")
    for column in ("dense", "sparse", "90 % of what is possible"):
        table.add_column(column, justify="right")
    sparse = result["sparsity"] > 0
    between = lambda values, form: f"{form(values['low'])} to {form(values['high'])}" if sparse else ""  # noqa: E731
    three = [
        ("samples/s", samples, lambda v: f"{v:,.4g}"), ("tokens/s", rate, lambda v: f"{v:,.0f}"),
        ("seconds a step", result["seconds"][result["clock"]], lambda v: f"{v:.4g}"),
    ]  # fmt: skip
    if "training_seconds" in result:
        three += [
            ("training", result["training_seconds"], words.duration),
            ("energy, kWh", result["energy_kwh"], lambda v: f"{v:,.4g}"),
        ]
    for name, values, form in three:
        ends = values["sparse"] if values["sparse"]["low"] <= values["sparse"]["high"] else _turned(values["sparse"])
        table.add_row(name, form(values["dense"]), form(values["sparse"]["central"]), between(ends, form))
    table.add_row("of fp16 peak", *(f"{result['utilisation'][kind]:.1%}" for kind in ("dense", "sparse")), "")
    table.add_row("bound by", result["bound_by_dense"], result["bound_by"], "")
    show(table)
    lines = [band(result)] if sparse else []
    if better := result["better_batch"]:
        lines.append(
            f"A batch of {better['batch']} would be {better['gain']:.0%} faster: {better['tokens_per_second']:,.0f} "
            "tokens/s."
        )
    gpu, cpu = result["beside"]["gpu"], result["beside"]["cpu"]
    lines += [
        f"Beside it, dense: one {gpu['name']} {gpu['tokens_per_second']:,.0f} tokens/s ({gpu['rests_on']}); this CPU "
        f"{cpu['tokens_per_second']:,.3g} tokens/s ({cpu['rests_on']}).",
        *note(result),
    ]
    tell(*lines)
    tornado_table(result, most=3)
    if "rows" in result:
        _print_sweep(result)
    if result["comparison"]:
        show(comparison_table(result["comparison"]))


def _turned(values: dict[str, float]) -> dict[str, float]:
    """Times of low and high speed-ups, the shorter first."""
    return {**values, "low": values["high"], "high": values["low"]}


def _print_sweep(result: dict[str, Any]) -> None:
    name = result["swept"]
    table = Table()
    for column in (name, "samples/s", "tokens/s", "speed-up", "90 % interval", "ideal", "bound by"):
        table.add_column(column, justify="left" if column == "bound by" else "right")
    for row in result["rows"]:
        s = row["speedup"]
        table.add_row(
            f"{row[name]:g}", f"{row['samples_per_second']['sparse']['central']:,.4g}",
            f"{row['tokens_per_second']['sparse']['central']:,.0f}", f"{s['central']:.2f}x",
            f"{s['low']:.2f}-{s['high']:.2f}x", f"{s['ideal']:.2f}x", row["bound_by"],
        )  # fmt: skip
    show(table)


def _print_details(result: dict[str, Any]) -> None:
    table = Table(title=f"cycles at {result['clock']}; {result['central']}", title_justify="left")
    cost_columns(table, "part")
    for name, pair in result["breakdown"].items():
        cost_row(table, name, pair)
        if name == "linear layers":
            for product, costs in result["products"].items():
                cost_row(table, f"  {product}", costs)
    total_row(table, "step", result)
    show(table)
    lines = [where(result["breakdown"].values())]
    for kind, m in result["mapping"].items():
        again = "blocks computed again in the backward pass" if m["recompute"] else "activations kept"
        joules = result["energy"][kind]["joules_per_token"]
        lines.append(
            f"{kind}: {m['passes']} x {m['micro_batch']} sequences a system, {m['columns']} columns, {m['replicas']} "
            f"replicas, {m['local']} tokens a PE, {again}; {joules[0]:.3g} to {joules[1]:.3g} J a token."
        )
    tell(*lines)
    tornado_table(result, most=99)


STEPS = (step, scale, machines)
