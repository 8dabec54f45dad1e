"""`vspdf train` and `vspdf finetune`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vspdf.cli import simulate
from vspdf.cli.console import Json, emit, out, say, show, tell
from vspdf.draw import words
from vspdf.errors import UserError
from vspdf.kernels.hardware import keep_freed_memory
from vspdf.parallel.environment import from_environment

if TYPE_CHECKING:
    from vspdf.config.resolved import ResolvedConfig


def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or a config that ships: quickstart, ...")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Pre-train a GPT through its phases, e.g. 90 % sparse, then dense.

    `vspdf train quickstart`

    `vspdf train my.yaml phases.0.sparsity=0.75 run_dir=runs/mine`

    `vspdf train my.yaml run_dir=runs/mine --resume`
    """
    from vspdf.interop import load_config
    from vspdf.runs.folder import Run
    from vspdf.train.trainer import train as run

    keep_freed_memory()
    with from_environment() as world:
        settings = world.together(lambda: load_config(config, overrides or []))
        run(settings, resume=resume, say=say, on_evaluation=_draw)
        if not world.first:
            return
    summary = Run(Path(settings.run_dir)).summary
    if as_json:
        emit(summary)
    else:
        _print_summary(summary)
        out.print(f"\nEverything is in {settings.run_dir}/, drawn in report.html", highlight=False)


def _draw(folder: Path) -> None:
    """Refreshes the report, of a finished run with what a CS-2 would make of its masks."""
    from vspdf.plan import cs2
    from vspdf.report.run_page import refresh
    from vspdf.runs.folder import Run

    if Run(folder).finished:
        try:
            cs2.compare(folder)
        except UserError as error:
            say(f"no CS-2 estimate: {error}")
    refresh(folder)


def _ideal(phase: dict[str, Any]) -> float:
    """How many times faster a phase would be if time followed the FLOPs that its masks leave."""
    return phase["flops"]["dense"] / phase["flops"]["useful"]


def _print_summary(summary: dict[str, Any]) -> None:
    from vspdf.runs.record import sparsities

    phases = summary["phases"]
    table = Table(
        title=f"{summary['name']}: {words.count(summary['model']['parameters'])} parameters on "
        f"{summary['corpus']['name']}",
        title_justify="left",
    )
    table.add_column("phase")
    for phase in phases:
        table.add_column(phase["name"], justify="right")
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("sparsity", lambda p: words.from_to(*sparsities(p)[:2])),
        ("steps", lambda p: f"{p['steps']:,}"),
        ("tokens", lambda p: f"{p['tokens']:,}"),
        ("training loss (last step)", lambda p: f"{p['loss']:.4f}"),
        ("validation loss", lambda p: f"{p['val_loss']:.4f}"),
        ("validation bits/byte", lambda p: f"{p['val_bits_per_byte']:.4f}"),
        ("TFLOP dense", lambda p: f"{p['flops']['dense'] / 1e12:,.2f}"),
        ("TFLOP useful", lambda p: f"{p['flops']['useful'] / 1e12:,.2f}"),
        ("TFLOP executed", lambda p: f"{p['flops']['executed'] / 1e12:,.2f}"),
        ("seconds a step, median of all", lambda p: f"{p['step_seconds_median']:.4g}"),
        ("median pair: a step", lambda p: f"{p['paired_step_seconds_median']:.4g}" if "speedup" in p else "-"),
        ("median pair: dense step beside it",
         lambda p: f"{p['dense_step_seconds_median']:.4g}" if "speedup" in p else "-"),
        ("median pair: times faster",
         lambda p: words.speedup(p["speedup"]["median"], _ideal(p)) if "speedup" in p else "-"),
        ("slowest and fastest pair",
         lambda p: "{low:.2f}x-{high:.2f}x".format(**p["speedup"]) if "speedup" in p else "-"),
    ]  # fmt: skip
    for title, cell in rows:
        table.add_row(title, *(cell(phase) for phase in phases))
    parts = {part for phase in phases for part in phase["time_fractions"]}
    for part in sorted(parts, key=lambda part: -phases[0]["time_fractions"].get(part, 0)):
        table.add_row(f"time in {part}", *(f"{phase['time_fractions'].get(part, 0):.0%}" for phase in phases))
    show(table)
    if any("speedup" in phase and phase["speedup"]["median"] > _ideal(phase) for phase in phases):
        tell(words.ABOVE_IDEAL)
    if summary.get("comparison"):
        show(simulate.comparison_table(summary["comparison"]))
    flops = summary["flops"]
    saved = summary["flops_saved_fraction_by_convention"]
    out.print(
        f"{1 - flops['executed'] / flops['dense']:.1%} of all FLOPs were really skipped (executed, padding included, "
        "against dense on the same tokens). By convention: "
        + ", ".join(f"{name} {fraction:.1%}" for name, fraction in saved.items()) + ".",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def finetune(
    start: Annotated[
        str,
        typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run, one of its checkpoints, or a Hugging Face folder."),
    ],
    config: Annotated[str, typer.Argument(help="A YAML file, or a config that ships: dart-small, dart-6.7b.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model, densely, on contexts and completions: DART, WebNLG, E2E or JSONL.

    `vspdf finetune runs/mine dart-small data.path=dart-v1.1.1-full-train.json run_dir=runs/dart`

    `vspdf finetune cerebras-gpt-111m/ my.yaml data.path=pairs.jsonl`
    """
    from vspdf.config import resolve
    from vspdf.interop import checkpoints, load_config
    from vspdf.runs.folder import Run
    from vspdf.train.trainer import train

    keep_freed_memory()

    def loaded() -> ResolvedConfig:
        model = resolve.settings_of(checkpoints.shape_of(start))
        return load_config(config, overrides or [], start=(start, model))

    with from_environment() as world:
        settings = world.together(loaded)
        train(settings, resume=resume, say=say, on_evaluation=_draw)
        if not world.first:
            return
    summary = Run(Path(settings.run_dir)).summary
    if as_json:
        emit(summary)
        return
    last = summary["phases"][-1]
    lines = [
        f"{summary['name']}: {last['steps']:,} steps, {summary['tokens']:,} tokens of {summary['corpus']['name']} in "
        f"{summary['seconds']:,.0f} s; {last['flops']['executed'] / 1e12:,.2f} TFLOP",
        f"held-out completions: {last['val_loss']:.4f} nats/token, {last['val_bits_per_byte']:.4f} bits/byte",
        f"Everything is in {settings.run_dir}/. Texts: vspdf generate {settings.run_dir} --input FILE --output FILE",
    ]
    tell(*lines)
