"""Verbs over what is there already: `report`, `compare`, `convert`, `info`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.table import Table

from vspdf.cli.console import Json, emit, only, out, say, tell
from vspdf.errors import UserError
from vspdf.parallel.environment import refuse


def compare(
    context: typer.Context,
    study: Annotated[str, typer.Argument(help="A YAML file, or a study that ships: toy, small, finetune, gpu.")],
    changes: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")] = None,
    root: Annotated[Path | None, typer.Option("--runs", help="Folder of its runs; default runs/NAME.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; default: as many as the cores allow.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.0, help="Stop after so long; run it again to go on.")] = None,
    arms: Annotated[str | None, typer.Option(help="Run these arms only, as a,b; leave the others for later.")] = None,
    add_to: Annotated[
        Path | None, typer.Option(help="A results.json whose runs are gone: runs the seeds that it lacks.")
    ] = None,
    results: Annotated[
        bool, typer.Option("--results", help="Show results, kept beside it or in runs/NAME; run nothing.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw losses and differences here (SVG).")] = None,
    as_json: Json = False,
) -> None:
    """Several ways to train, over seeds, on the same data in the same order: tuned, run, told apart where they differ.

    Finished runs are kept: the same command goes on after Ctrl-C, kill -9 or a reboot.

    `vspdf compare toy --results`

    `vspdf compare my-study.yaml --jobs 2`

    `vspdf compare finetune folder=my-tasks`

    `vspdf compare gpu --minutes 9`

    `vspdf compare toy 'seeds=[0, 1, 2, 3, 4, 5]' --add-to results.json --arms dense,variable`
    """
    from vspdf.compare import definition as studies
    from vspdf.compare import runner
    from vspdf.compare.results import read
    from vspdf.report import study_page

    refuse("compare", "`jobs` N spreads a study over the cores of one machine")
    if plot:
        study_page.check_plot(plot)
    rule = "is for running: `results` shows what is there"
    only(not results, rule, context, "root", "jobs", "minutes", "arms", "add_to")
    if results:
        if others := [change for change in changes or [] if not change.startswith("folder=")]:
            raise UserError(f"`results` shows what was kept of the study as it is: '{others[0]}' is for running.")
        body = read(studies.load(study, changes or []))
    else:
        names = [name.strip() for name in arms.split(",")] if arms is not None else []
        body = runner.run(study, root, jobs, changes=changes or [], arms=names, add_to=add_to, minutes=minutes, say=say)
    if plot:
        study_page.plot(body, plot)
        say(f"wrote {plot}")
    if as_json:
        emit(body)
    else:
        _print(body)


def _print(body: dict[str, Any]) -> None:
    from vspdf.report import tables

    for found in tables.tables(body):
        table = Table(title=f"{body['study']}: {found.title}", title_justify="left", box=SIMPLE_HEAD)
        table.collapse_padding, table.pad_edge, table.show_edge = True, False, False
        for i, name in enumerate(found.head):  # in a narrow terminal figures are folded, never cut
            stacked = re.sub(r"(?<=\w\w\w) (?=\w\w\w)|(?<=-)(?=\w)", "\n", name)
            side: JustifyMethod = "left" if found.is_words(i) else "right"
            table.add_column(stacked, justify=side, overflow="fold", no_wrap=i == 0)
        for row in found.rows:
            table.add_row(*row)
        out.print(table, "")
    tell(*tables.notes(body))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories; several are compared.")],
    output: Annotated[
        Path | None, typer.Option(help="Default: report.html, of one run in its directory, of several here.")
    ] = None,
) -> None:
    """One self-contained HTML file of a run, finished or not, or of several side by side.

    `vspdf report runs/quickstart`

    `vspdf report runs/sparse-0 runs/sparse-1 runs/dense-0 runs/dense-1 --output comparison.html`
    """
    from vspdf.report.run_page import write

    tell(f"wrote {write(runs, output)}")


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A run, a checkpoint, a folder of Hugging Face or Cerebras, or a file.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="What to write; must not exist.")],
    to: Annotated[
        str | None, typer.Option(help="hugging-face, dense or sparse; default: the other side, dense.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json, for IN without one.")] = None,
    as_json: Json = False,
) -> None:
    """Checkpoint to Hugging Face folder and back, and sparse to dense (NaN or `_mask` tensors become zeros).

    `vspdf convert runs/quickstart quickstart-hf`

    `vspdf convert quickstart-hf runs/again`

    `vspdf convert runs/quickstart/checkpoints/step-00000250 dense --to dense`

    `vspdf convert old-checkpoint.pt clean.safetensors`
    """
    from vspdf.interop.convert import convert as run

    found = run(source, target, to, tokenizer)
    if as_json:
        emit(found)
        return
    layers = found["layers"]
    kinds = {
        "checkpoint": "a checkpoint of vspdf",
        "hugging-face": "a Hugging Face folder",
        "cerebras": "a checkpoint of the Cerebras stack",
        "file": "a file of tensors",
    }
    name = f" ({found['model']})" if found["model"] else ""
    size = f"{found['parameters']:,} parameters{name}"
    amounts = (
        dict.fromkeys(f"{amount:.4g}" for amount in (min(layers.values()), max(layers.values()))) if layers else ()
    )
    count = f"{len(layers)} sparse {'matrix' if len(layers) == 1 else 'matrices'}"
    what = f"{count}, {' to '.join(amounts)} sparse" if layers else "no masked weights"
    forms = {"hugging-face": "a Hugging Face folder", "dense": "a dense checkpoint", "sparse": "a sparse checkpoint",
             "file": "a dense file"}  # fmt: skip
    tell(f"{source}: {kinds[found['kind']]}, {size}, {what}", f"wrote {target}: {forms[found['to']]}")
    if found["tokenizer"] is None and found["to"] != "file":
        say("no tokenizer was found or written: --tokenizer names one.")


def info(as_json: Json = False) -> None:
    """Versions, instruction sets, threads, and which backends can run here.

    `vspdf info --json`
    """
    from vspdf.kernels import hardware as facts

    body: dict[str, Any] = {
        "hardware": facts.hardware(),
        "versions": facts.versions(),
        "backends": facts.backends(),
        "tuning": facts.tuning(),
    }
    if as_json:
        emit(body)
        return
    for title, entries in body.items():
        if title == "tuning":
            out.print("paths that auto has measured on this machine", style="bold")
            tell(*(f"  {line}" for line in entries or ["none yet"]))
            continue
        out.print(title, style="bold")
        for key, value in entries.items():
            out.print(f"  {key}: {value}", markup=False, highlight=False)
