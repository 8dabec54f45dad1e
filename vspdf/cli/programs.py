"""`vspdf simulate PROGRAM` on a grid, and `vspdf validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from vspdf.cli.console import Json, MachineName, Settings, emit, murmur, percentage, say, show, tell
from vspdf.draw import words

Level = Annotated[
    str, typer.Option(help="event (every wavelet), aggregate (closed form), or auto: event where it ends in seconds.")
]
Grid = Annotated[str, typer.Option(metavar="WxH", help="PEs, width x height.")]
Dtype = Annotated[str, typer.Option(help="fp32 or fp16.")]
Trace = Annotated[Path | None, typer.Option(help="Write a Chrome (Perfetto) trace here: .json.")]
Plot = Annotated[Path | None, typer.Option(help="Draw heat maps per PE and a time line here: .html or .png.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of matrices and positions.")]


def _run(program: str, options: dict[str, Any]) -> None:
    """Simulates a program with the options of its verb, which bear the names of `simulate`'s arguments, and prints."""
    from vspdf.simulator.simulate import simulate

    as_json, trace, plot = options.pop("as_json"), options["trace"], options["plot"]
    result = simulate(program, **options | {"settings": options["settings"] or ()})
    for path in (trace, plot):
        if path is not None:
            say(f"wrote {path}")
    if as_json:
        emit(result)
        return
    table = Table(
        title=f"{program} on {result['machine']}, {result['level']} level ({result['why']})", title_justify="left"
    )
    table.add_column("")
    table.add_column("", justify="right")
    for key, value in result.items():
        if key in ("program", "machine", "note", "settings", "level", "why"):
            continue
        if isinstance(value, dict):
            for name, part in value.items():
                table.add_row(f"{key.replace('_', ' ')}: {name.replace('_', ' ')}", words.amount(part))
        else:
            table.add_row(key.replace("_", " "), words.amount(value))
    show(table)
    if result["note"]:
        tell(result["note"])


def spmm(
    format: Annotated[str, typer.Option(help="coo, csc, csr or ellpack; dense for the product without any.")],
    grid: Grid,
    n: Annotated[int, typer.Option(help="Rows of A and C; the grid's height splits them.")],
    k: Annotated[int, typer.Option(help="Columns of A, rows of B; the grid's width splits them.")],
    m: Annotated[int, typer.Option(help="Columns of B and C, padding included.")],
    density: Annotated[float | None, typer.Option(parser=percentage, help="Of A, in percent; default 100.")] = None,
    nnz_per_pe: Annotated[int | None, typer.Option(help="Stored non-zeros of the fullest PE after padding.")] = None,
    seed: Seed = None,
    trace: Trace = None,
    plot: Plot = None,
    machine: MachineName = "cs2",
    settings: Settings = None,
    level: Level = "auto",
    as_json: Json = False,
) -> None:
    """C = A·B in fp32 with A sparse: one multiply-add over a row of B per non-zero, as hand-written kernels do.

    `vspdf simulate spmm --format coo --grid 48x6 --n 768 --k 768 --m 68 --density 5 --nnz-per-pe 127`
    """
    _run("spmm", locals())


def gemm(
    grid: Grid,
    n: Annotated[int, typer.Option(help="Side of all three matrices.")],
    algorithm: Annotated[str, typer.Option(help="summa, cannon or meshgemm.")] = "meshgemm",
    dtype: Dtype = "fp32",
    seed: Seed = None,
    trace: Trace = None,
    plot: Plot = None,
    machine: MachineName = "cs2",
    settings: Settings = None,
    level: Level = "auto",
    as_json: Json = False,
) -> None:
    """C = A·B, dense, on a square grid. Efficiency: the time of the local products alone over the whole time.

    `vspdf simulate gemm --algorithm meshgemm --grid 750x750 --n 33000 --dtype fp16`
    """
    _run("gemm", locals())


def gemv(
    grid: Grid,
    n: Annotated[int, typer.Option(help="Side of the matrix.")],
    algorithm: Annotated[str, typer.Option(help="meshgemv.")] = "meshgemv",
    dtype: Dtype = "fp16",
    seed: Seed = None,
    trace: Trace = None,
    plot: Plot = None,
    machine: MachineName = "cs2",
    settings: Settings = None,
    level: Level = "auto",
    as_json: Json = False,
) -> None:
    """y = A·v, dense, on a square grid: local products, then an all-reduce along the columns.

    `vspdf simulate gemv --grid 720x720 --n 16384 --dtype fp16`
    """
    _run("gemv", locals())


def reduce(
    pes: Annotated[int, typer.Option(help="PEs in a row, each with a vector.")],
    elements: Annotated[int, typer.Option(help="fp32 elements of the vector.")],
    group: Annotated[str, typer.Option(help="PEs of a chain in the first phase; all of them is one chain; or star.")],
    everywhere: Annotated[bool, typer.Option("--everywhere", help="All-reduce: broadcast the sum back.")] = False,
    trace: Trace = None,
    plot: Plot = None,
    machine: MachineName = "cs2",
    settings: Settings = None,
    level: Level = "auto",
    as_json: Json = False,
) -> None:
    """The sum of a vector per PE, in two phases of chains.

    `vspdf simulate reduce --pes 512 --elements 4096 --group 32`
    """
    _run("reduce", locals())


PROGRAMS = (spmm, gemm, gemv, reduce)


def validate(
    case: Annotated[list[str] | None, typer.Option(help="Only this one, e.g. V4; repeatable.")] = None,
    machine: MachineName = "cs2",
    settings: Settings = None,
    level: Level = "auto",
    as_json: Json = False,
) -> None:
    """The simulator against every published measurement it knows, with the error of each.

    `vspdf validate`

    `vspdf validate --case step-gpt-j-6b --case V13`
    """
    from vspdf.simulator.validate import validate as check

    result = check(
        machine, settings or (), level, case,
        say=murmur,
    )  # fmt: skip
    if as_json:
        emit(result)
        return
    table = Table(title=f"{result['machine']} against published measurements", title_justify="left")
    for column in ("case", "published", "simulated", "error", "role", "level"):
        table.add_column(column, justify="right" if column in ("published", "simulated", "error") else "left")
    last = None
    for c in result["cases"]:
        if c["id"] != last:
            last = c["id"]
            table.add_section()
            tolerance = f"< {c['tolerance']:.0%}" if c["tolerance"] else ""
            table.add_row(Text.assemble((c["id"], "bold"), f" {c['title']}"), "", "", tolerance)
        error = Text.assemble(f"{c['error']:+.2%}", ("" if c["passed"] else " MISSED", "red"))
        detail = c["case"].removeprefix(c["title"]).lstrip(", ")
        table.add_row(
            f"  {detail}", words.amount(c["published"]), words.amount(c["simulated"]), error, c["role"], c["level"],
        )  # fmt: skip
    show(table)
    roles = [c["role"] for c in result["cases"]]
    lines = [
        f"{sum(c['passed'] for c in result['cases'])} of {len(roles)} cases within their tolerance; "
        f"{roles.count('predicted')} predicted, {roles.count('calibrated')} calibrated (they set a parameter), "
        f"{roles.count('repeated')} repeated (tile, columns and density of a calibrated row), "
        f"{roles.count('definition')} definitions.",
    ]
    if steps := result["steps"]:
        lines.append(
            f"Training steps: mean error {steps['mean_error']:.0%}, largest {steps['largest_error']:.0%}, all at one "
            "set of parameters; no sparse step has been published."
        )
    lines += [
        f"Known miss, {c['id']} {c['case'].removeprefix(c['title']).lstrip(', ')}: {c['published']:g} published, "
        f"{c['simulated']:.3g} simulated ({c['error']:+.0%})."
        for c in result["known_misses"]
    ]
    views = {
        name: view for name, view in result["chosen_in_view"].items() if any(c["id"] == name for c in result["cases"])
    }
    lines += [
        "Predicted: no number was set from this row. Mechanisms chosen with a table in view:",
        *(f"  {name}: {view}." for name, view in views.items()),
        *([result["note"]] if result["note"] else []),
    ]
    tell(*lines)
