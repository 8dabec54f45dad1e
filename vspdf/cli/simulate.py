"""`vspdf simulate ...`: what the wafer would do with a layer or a training step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vspdf.cli.console import Json, MachineName, Settings, Verb, emit, number, say, show, tell
from vspdf.draw import words

simulate = typer.Typer(
    help="A Cerebras CS-2 at work: programs on a grid, one layer, a whole training step.", no_args_is_help=True
)

Level = Annotated[str, typer.Option(help="event (every wavelet) or aggregate (closed form).")]


def load_machine(name: str, settings: Sequence[str] | None) -> Any:
    from vspdf.simulator import machine

    return machine.load(name, settings or ())


# ---- layer -----------------------------------------------------------------------------------------------------------


@simulate.command(name="layer", cls=Verb)
def simulate_layer(
    tokens: Annotated[int | None, typer.Option(help="On the wafer at once.")] = None,
    in_features: Annotated[int | None, typer.Option("--in", help="Features in.")] = None,
    out_features: Annotated[int | None, typer.Option("--out", help="Features out.")] = None,
    sparsity: Annotated[
        float | None, typer.Option(parser=number, help="In [0, 1), positions by chance; default 0.9.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Take a layer's real mask from this run.")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Take a real mask from this file (.smtx, .mtx, .npz, .pt, ...) or folder.")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Which one, by its name in the run or the file.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw speed-up over sparsity here: .png; at level event, heat maps: .html, .png."),
    ] = None,
    machine: MachineName = "cs2",
    settings: Settings = None,
    level: Level = "aggregate",
    as_json: Json = False,
) -> None:
    """Forward product and both gradients of one linear layer: cycles dense and sparse, the speed-up as a band.

    `vspdf simulate layer --tokens 65536 --in 12288 --out 12288 --sparsity 0.9`

    `vspdf simulate layer --run runs/quickstart --layer h.0.mlp.c_fc`
    """
    from vspdf.plan import cs2

    wafer = load_machine(machine, settings)
    asked = {"tokens": tokens, "in_features": in_features, "out_features": out_features, "sparsity": sparsity}
    result = cs2.layer_by_request(wafer, **asked, run=run, mask=mask, layer=layer, level=level, plot=plot)  # type: ignore[arg-type]
    if plot is not None:
        say(f"wrote {plot}")
    if as_json:
        emit(result)
    elif level == "event":
        _print_event_layer(result)
    else:
        _print_layer(result)


def _print_layer(result: dict[str, Any]) -> None:
    positions = "a real mask" if result["mask"] == "real" else "positions by chance"
    table = Table(
        title=f"{result['machine']}: {result['in_features']} -> {result['out_features']}, {result['tokens']:,} tokens, "
        f"sparsity {result['sparsity']:.4g} ({positions}); {result['central']}; cycles",
        title_justify="left",
    )
    cost_columns(table, "product")
    for name, pair in result["products"].items():
        cost_row(table, name, pair)
    total_row(table, "layer", result)
    show(table)
    tell(
        *[
            band(result),
            where(result["products"].values()),
            *(
                f"{kind}: {m['columns']} columns share the features, {m['rows']} rows x {m['replicas']} replicas the "
                f"tokens, {m['local']} a PE; {result['utilisation'][kind]:.1%} of peak."
                for kind, m in result["mapping"].items()
            ),
            _clocks(result),
            *note(result),
        ]
    )
    tornado_table(result, most=99)


def _print_event_layer(result: dict[str, Any]) -> None:
    region = result["region"]
    table = Table(
        title=f"{result['in_features']} -> {result['out_features']}, {result['tokens']:,} tokens, sparsity "
        f"{result['sparsity']:.4g}: level 1 on {region['columns']}x{region['rows']} PEs of {result['machine']}",
        title_justify="left",
    )
    table.add_column("product")
    for column in ("dense cycles", "aggregate", "sparse cycles", "aggregate", "speed-up"):
        table.add_column(column, justify="right")
    for name, pair in result["products"].items():
        dense, sparse = pair["dense"], pair["sparse"]
        numbers = (dense["cycles"], dense["aggregate"], sparse["cycles"], sparse["aggregate"])
        table.add_row(name, *(f"{n:,}" for n in numbers), f"{dense['cycles'] / sparse['cycles']:.2f}x")
    show(table)
    s = result["speedup"]
    tell(f"Speed-up {s['central']:.2f}x, ideal {s['ideal']:.2f}x; {result['why']}.", *note(result))


# ---- shared ----------------------------------------------------------------------------------------------------------


def comparison_table(rows: Sequence[dict[str, Any]]) -> Table:
    """CPU-measured speed-up, ideal and CS-2 estimate of a run's sparse phases."""
    first = rows[0]
    table = Table(
        title=f"a training step, sparse against dense; {first['machine']} estimated, {first['central']}",
        title_justify="left",
    )
    for column in ("phase", "sparsity", "CPU, measured", "ideal", first["machine"], "band"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for row in rows:
        measured = words.speedup(row["cpu"]["median"], row["ideal"]) if row["cpu"] else "-"
        band = f"{row['cs2']['low']:.2f}-{row['cs2']['high']:.2f}x"
        table.add_row(
            row["phase"], f"{row['sparsity']:.4g}", measured, f"{row['ideal']:.2f}x",
            f"{row['cs2']['central']:.2f}x", band,
        )  # fmt: skip
    if any(row["cpu"] and row["cpu"]["median"] > row["ideal"] for row in rows):
        table.caption = words.ABOVE_IDEAL
        table.caption_justify = "left"
    return table


def cost_columns(table: Table, first: str) -> None:
    for column in (first, "dense", "bound by", "sparse", "bound by", "speed-up", "overhead"):
        left = column in (first, "bound by")
        table.add_column(column, justify="left" if left else "right", no_wrap=left)


def cost_row(table: Table, name: str, pair: dict[str, Any]) -> None:
    dense, sparse = pair["dense"], pair["sparse"]
    ratio = f"{dense['cycles'] / sparse['cycles']:.2f}x" if sparse["cycles"] else "-"
    table.add_row(
        name, words.cycles(dense["cycles"]), dense["bound_by"], words.cycles(sparse["cycles"]), sparse["bound_by"],
        ratio, f"{sparse['overhead']:.0%}",
    )  # fmt: skip


def total_row(table: Table, name: str, result: dict[str, Any]) -> None:
    """What a whole layer or step costs, below its parts."""
    total = {
        "dense": {"cycles": result["cycles"]["dense"], "bound_by": result["bound_by_dense"]},
        "sparse": {
            "cycles": result["cycles"]["sparse"]["central"],
            "bound_by": result["bound_by"],
            "overhead": result["overhead"]["sparse"],
        },
    }
    table.add_section()
    cost_row(table, name, total)


def band(result: dict[str, Any]) -> str:
    s = result["speedup"]
    return (
        f"Speed-up {s['central']:.2f}x; 90 % of {result['samples']} samples of all that is not known lie between "
        f"{s['low']:.2f}x and {s['high']:.2f}x, half between {s['interval50'][0]:.2f}x and {s['interval50'][1]:.2f}x; "
        f"median {s['median']:.2f}x, ideal {s['ideal']:.2f}x."
    )


def note(result: dict[str, Any]) -> list[str]:
    return [result["note"]] if result.get("note") else []


def where(pairs: Any) -> str:
    parts: dict[str, float] = {}
    for pair in pairs:
        for name, cycles in pair["sparse"]["parts"].items():
            parts[name] = parts.get(name, 0) + cycles
    total = sum(parts.values())
    shares = sorted(parts.items(), key=lambda item: -item[1])
    return (
        "Overhead is all but multiplying. Sparse time: "
        + ", ".join(f"{name} {c / total:.0%}" for name, c in shares if c / total >= 0.005)
        + "."
    )


def _clocks(result: dict[str, Any]) -> str:
    return "; ".join(
        f"at {label} dense {t['dense']:.4g} s, sparse {t['sparse']['central']:.4g} s"
        for label, t in result["seconds"].items()
    ) + ". Cycles are at {clock}.".format(**result)  # fmt: skip


def tornado_table(result: dict[str, Any], most: int) -> None:
    rows = [row for row in result["tornado"] if abs(row["speedup"]["high"] / row["speedup"]["low"] - 1) >= 0.002][:most]
    if not rows:
        return
    table = Table(title="what moves the speed-up most, one at a time (5 % and 95 % of its range)", title_justify="left")
    for column in ("unknown", "grade", "from", "to", "speed-up", "of the variance"):
        table.add_column(column, justify="left" if column == "unknown" else "right")
    for row in rows:
        table.add_row(
            row["parameter"], row["grade"], f"{row['from']:.4g}", f"{row['to']:.4g} {row['unit']}",
            f"{row['speedup']['low']:.2f}x to {row['speedup']['high']:.2f}x", f"{row['share']:.0%}",
        )  # fmt: skip
    show(table)
