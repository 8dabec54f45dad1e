"""The verb `compare`: arms of a study over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vspdf.console import Json, emit, err, out


def compare(
    study: Annotated[str, typer.Argument(help="A YAML file, or a study that ships: toy, ...")],
    runs: Annotated[Path | None, typer.Option(help="Folder of its runs; default runs/NAME.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default: as many as the cores allow.")
    ] = None,
    results: Annotated[bool, typer.Option("--results", help="Show the results kept beside it; run nothing.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw loss over tokens and FLOPs here (PNG, SVG).")] = None,
    as_json: Json = False,
) -> None:
    """Several ways to train, over seeds, on the same data in the same order: tuned, run, told apart where they differ.

    Finished runs are kept: the same command goes on after Ctrl-C, kill -9 or a reboot.

    `vspdf compare toy --results`

    `vspdf compare my-study.yaml --jobs 2`
    """
    from vspdf import compare as runner
    from vspdf import evidence, evidence_page
    from vspdf import study as studies

    if results:
        body = evidence.read(studies.load(study))
    else:
        body = runner.run(
            study, runs, jobs, say=lambda line: err.print(line, markup=False, highlight=False, soft_wrap=True)
        )
    if plot:
        evidence_page.plot(body, plot)
        err.print(f"wrote {plot}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        emit(body)
    else:
        _print(body)


def _print(body: dict[str, Any]) -> None:
    from vspdf import evidence
    from vspdf.evidence_page import between, number

    clock = evidence.time_axis(body["arms"])
    key, seconds = ("cpu_seconds", "CPU s") if clock is evidence.CPU else ("seconds", "seconds")
    table = Table(title=f"{body['study']}: test loss, nats a token", title_justify="left")
    table.add_column("arm")
    for column in ("test loss", "± 95 %", "seeds", "tokens", "weight-FLOPs", "executed", seconds):
        table.add_column(column, justify="right")
    for arm in body["arms"]:
        loss, runs = arm["test_loss"], arm["runs"]
        table.add_row(
            arm["name"], number(loss["mean"]),
            number(None if loss["low"] is None else loss["high"] - loss["mean"]),
            f"{len(runs)}/{len(body['seeds'])}", f"{runs[0]['tokens']:,}" if runs else "–",
            *(number((arm["relative_flops"] or {}).get(name), ".1%") for name in ("linear", "executed")),
            number(sum(run[key] for run in runs) / len(runs) if runs else None, ".0f"),
        )  # fmt: skip
    out.print(table)
    if body["paired"]:
        table = Table(title="paired differences of test losses, a − b", title_justify="left")
        for column in ("a", "b", "mean", "95 % interval", "seeds", "a is", "at equal time"):
            table.add_column(column, justify="left" if column in ("a", "b", "a is") else "right")
        for pair in body["paired"]:
            table.add_row(
                pair["a"], pair["b"], number(pair["mean"], "+.4f"), between(pair, "+.4f"), str(len(pair["seeds"])),
                pair["verdict"], number(pair["at_equal"].get(clock.name, {}).get("mean"), "+.4f"),
            )  # fmt: skip
        out.print(table)
    for line in evidence.notes(body):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
