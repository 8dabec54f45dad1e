"""The verb `compare`: arms of a study over seeds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.table import Table

from vspdf.console import Json, emit, err, out


def compare(
    study: Annotated[str, typer.Argument(help="A YAML file, or a study that ships: toy, small, finetune, gpu.")],
    changes: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")] = None,
    runs: Annotated[Path | None, typer.Option(help="Folder of its runs; default runs/NAME.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default: as many as the cores allow.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.0, help="Stop after so long; run it again to go on.")] = None,
    results: Annotated[bool, typer.Option("--results", help="Show the results kept beside it; run nothing.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw loss over tokens and FLOPs here (PNG, SVG).")] = None,
    as_json: Json = False,
) -> None:
    """Several ways to train, over seeds, on the same data in the same order: tuned, run, told apart where they differ.

    Finished runs are kept: the same command goes on after Ctrl-C, kill -9 or a reboot.

    `vspdf compare toy --results`

    `vspdf compare my-study.yaml --jobs 2`

    `vspdf compare finetune folder=my-tasks`

    `vspdf compare gpu --minutes 9`
    """
    from vspdf import compare as runner
    from vspdf import evidence, evidence_page
    from vspdf import study as studies

    if results:
        body = evidence.read(studies.load(study, changes or []))
    else:
        body = runner.run(
            study, runs, jobs, changes=changes or [], minutes=minutes,
            say=lambda line: err.print(line, markup=False, highlight=False, soft_wrap=True),
        )  # fmt: skip
    if plot:
        evidence_page.plot(body, plot)
        err.print(f"wrote {plot}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        emit(body)
    else:
        _print(body)


def _print(body: dict[str, Any]) -> None:
    from vspdf import evidence, evidence_page

    for found in evidence_page.tables(body):
        table = Table(title=f"{body['study']}: {found.title}", title_justify="left", box=SIMPLE_HEAD)
        table.collapse_padding, table.pad_edge, table.show_edge = True, False, False
        for i, name in enumerate(found.head):  # in a narrow terminal figures are folded, never cut
            stacked = re.sub(r"(?<=\w\w\w) (?=\w\w\w)|(?<=-)(?=\w)", "\n", name)
            side: JustifyMethod = "left" if found.is_words(i) else "right"
            table.add_column(stacked, justify=side, overflow="fold", no_wrap=i == 0)
        for row in found.rows:
            table.add_row(*row)
        out.print(table, "")
    for line in evidence.notes(body):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
