"""The command line: `vspdf VERB ...`. Figures go to stdout, progress to stderr; `--json` prints one JSON object."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.logging import RichHandler
from rich.table import Table

from vspdf import cli_bench, cli_compare, cli_programs, cli_simulate, cli_tasks
from vspdf.allocator import keep_freed_memory
from vspdf.console import Json, err, out
from vspdf.console import emit as _emit
from vspdf.errors import BackendUnavailable, Interrupted, UserError, did_you_mean

if TYPE_CHECKING:
    from vspdf.plan import Plan

app = typer.Typer(
    name="vspdf",
    help="Variable Sparse Pre-training and Dense Fine-tuning of GPTs, with the masked FLOPs really skipped.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def main() -> None:
    """Entry point: user errors end in one line and status 2, a stopped run in status 130."""
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=err, show_path=False, show_time=False)]
    )
    logging.getLogger("vspdf").setLevel(logging.INFO)
    try:
        sys.exit(app(standalone_mode=False))
    except (UserError, BackendUnavailable) as error:
        message = str(error)
    except Interrupted as error:
        err.print(f"vspdf: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's usage errors, whatever class they are in its version
            raise
        message = _usage_error(error)
    if message:
        err.print(f"vspdf: error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


def _usage_error(error: Any) -> str:
    """What was wrong with the arguments, in one line; empty where help was asked for, and is printed already."""
    context, message = getattr(error, "ctx", None), error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        return ""
    if hasattr(error, "possibilities") and context is not None:
        known = [option for parameter in context.command.params for option in parameter.opts if option[0] == "-"]
        known.extend(context.help_option_names)
        message = f"no such option '{error.option_name}'.{did_you_mean(error.option_name, known)}"
    elif context is not None and "Did you mean" not in message:
        verbs = getattr(context.command, "commands", None)
        expected = f"Known: {', '.join(verbs)}." if verbs else context.get_usage()
        message = f"{message.rstrip('.')}. {expected}"
    return " ".join((message[:1].lower() + message[1:]).split())


@app.command()
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
    from vspdf import config as configuration
    from vspdf.report import refresh
    from vspdf.train import train as run

    keep_freed_memory()
    settings = configuration.load(config, overrides or [])
    err.print(configuration.to_yaml(settings).rstrip(), style="dim", markup=False, highlight=False)
    summary = run(
        settings, resume=resume, say=lambda line: err.print(line, markup=False, highlight=False, soft_wrap=True),
        on_evaluation=refresh,
    )  # fmt: skip
    if as_json:
        _emit(summary)
    else:
        _print_summary(summary)
        out.print(f"\nEverything is in {settings.run_dir}/, drawn in report.html", highlight=False)


def _print_summary(summary: dict[str, Any]) -> None:
    phases = summary["phases"]
    table = Table(
        title=f"{summary['name']}: {summary['model']['parameters'] / 1e6:.1f}M parameters on "
        f"{summary['corpus']['name']}",
        title_justify="left",
    )
    table.add_column("phase")
    for phase in phases:
        table.add_column(phase["name"], justify="right")
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("sparsity", lambda p: f"{p['sparsity']:.4g}"),
        ("steps", lambda p: f"{p['steps']:,}"),
        ("tokens", lambda p: f"{p['tokens']:,}"),
        ("training loss (last step)", lambda p: f"{p['loss']:.4f}"),
        ("validation loss", lambda p: f"{p['val_loss']:.4f}"),
        ("validation bits/byte", lambda p: f"{p['val_bits_per_byte']:.4f}"),
        ("TFLOP dense", lambda p: f"{p['flops']['dense'] / 1e12:,.2f}"),
        ("TFLOP useful", lambda p: f"{p['flops']['useful'] / 1e12:,.2f}"),
        ("TFLOP executed", lambda p: f"{p['flops']['executed'] / 1e12:,.2f}"),
        ("seconds a step (median)", lambda p: f"{p['step_seconds_median']:.3f}"),
        ("dense step beside it", lambda p: f"{p['dense_step_seconds_median']:.3f}" if "speedup" in p else "-"),
        ("speed-up (pairs low-high)",
         lambda p: "{median:.2f}x ({low:.2f}-{high:.2f})".format(**p["speedup"]) if "speedup" in p else "-"),
    ]  # fmt: skip
    for title, cell in rows:
        table.add_row(title, *(cell(phase) for phase in phases))
    parts = {part for phase in phases for part in phase["time_fractions"]}
    for part in sorted(parts, key=lambda part: -phases[0]["time_fractions"].get(part, 0)):
        table.add_row(f"time in {part}", *(f"{phase['time_fractions'].get(part, 0):.0%}" for phase in phases))
    out.print(table)
    if summary.get("comparison"):
        out.print(cli_simulate.comparison_table(summary["comparison"]))
    flops = summary["flops"]
    saved = summary["flops_saved_fraction_by_convention"]
    out.print(
        f"{1 - flops['executed'] / flops['dense']:.1%} of all FLOPs were really skipped (executed, padding included, "
        "against dense on the same tokens). By convention: "
        + ", ".join(f"{name} {fraction:.1%}" for name, fraction in saved.items()) + ".",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


app.command(name="eval")(cli_tasks.evaluate)


@app.command()
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
    from vspdf.report import write

    path = write(runs, output)
    out.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


app.command()(cli_tasks.finetune)
app.command()(cli_tasks.generate)
app.command()(cli_tasks.bleu)
for verb in cli_programs.PROGRAMS:
    cli_simulate.simulate.command()(verb)
app.add_typer(cli_simulate.simulate, name="simulate")
app.command()(cli_compare.compare)
app.add_typer(cli_bench.bench, name="bench")
app.command()(cli_programs.validate)


@app.command()
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
    """Checkpoint to Hugging Face GPT-2 folder and back, and sparse to dense (NaN or `_mask` tensors become zeros).

    `vspdf convert runs/quickstart quickstart-hf`

    `vspdf convert quickstart-hf runs/again`

    `vspdf convert runs/quickstart/checkpoints/step-00000250 dense --to dense`

    `vspdf convert old-checkpoint.pt clean.safetensors`
    """
    from vspdf.convert import convert as run

    found = run(source, target, to, tokenizer)
    if as_json:
        _emit(found)
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
    out.print(f"{source}: {kinds[found['kind']]}, {size}, {what}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"wrote {target}: {forms[found['to']]}", markup=False, highlight=False, soft_wrap=True)
    if found["tokenizer"] is None and found["to"] != "file":
        err.print("no tokenizer was found or written: --tokenizer names one.", highlight=False, soft_wrap=True)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="A named model, a configuration, or a Hugging Face folder.")],
    sparsity: Annotated[float | None, typer.Option(help="Of the first stage; alone, of the whole run.")] = None,
    effective: Annotated[float | None, typer.Option(help="Weight-FLOPs to save against the dense run.")] = None,
    split: Annotated[str | None, typer.Option(help="add-on (as published, the default) or fixed-budget.")] = None,
    phases: Annotated[str, typer.Option(metavar="S:STEPS,...", help="Explicit stages, any number.")] = "",
    steps: Annotated[int | None, typer.Option(help="Of the dense run to compare with.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step, for models without a config.")] = None,
    convention: Annotated[str, typer.Option(help="linear, spdf, vspdf, chinchilla or cerebras-card.")] = "vspdf",
    causal: Annotated[bool, typer.Option("--causal", help="Count half of the attention products.")] = False,
    save: Annotated[float | None, typer.Option(help="Wish: save this fraction of all FLOPs.")] = None,
    memory: Annotated[float | None, typer.Option(help="Wish: a training state of so many GB in every stage.")] = None,
    hours: Annotated[float | None, typer.Option(help="Wish: done in so many hours on this machine.")] = None,
    time: Annotated[bool, typer.Option("--time", help="Measure this machine's speed for it.")] = False,
    write: Annotated[Path | None, typer.Option(metavar="CONFIG", help="Write the YAML that `train` runs.")] = None,
    as_json: Json = False,
) -> None:
    """Stages, tokens, FLOPs, memory and time of a run before it is run, or the run for a wish.

    `vspdf plan --model cerebras-gpt-6.7b --sparsity 0.9 --effective 0.75`

    `vspdf plan --model gpt2-small --save 0.5 --write mine.yaml`

    `vspdf plan --model quickstart --time`
    """
    from vspdf import plan as planner

    if time or hours is not None:
        keep_freed_memory()
    found = planner.plan(
        model, sparsity=sparsity, effective=effective, split=split, phases=_stages(phases) if phases else None,
        steps=steps, batch_size=batch_size, convention=convention, causal=causal, save=save, memory=memory, hours=hours,
        time=time, progress=lambda line: err.print(line, style="dim", highlight=False),
    )  # fmt: skip
    if write:
        planner.write(found, write)
        err.print(f"wrote {write}: vspdf train {write}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        _emit(found.to_json())
    else:
        _print_plan(found)


def _stages(text: str) -> list[tuple[float, int]]:
    try:
        pairs = [part.split(":") for part in text.split(",") if part]
        return [(float(sparsity), int(steps)) for sparsity, steps in pairs]
    except ValueError:
        raise UserError(f"--phases '{text}': expected SPARSITY:STEPS,..., e.g. 0.9:62523,0:9379.") from None


def _print_plan(found: Plan) -> None:
    timed = found.calibration is not None
    table = Table(title=f"{found.model}: {found.shape.parameters / 1e6:,.0f}M parameters", title_justify="left")
    table.add_column("")
    for column in ("sparsity", "steps", "tokens", "FLOPs", "state", *(["time"] if timed else [])):
        table.add_column(column, justify="right")
    for stage in [*found.phases, found.dense]:
        if stage is found.dense:
            table.add_section()
            steps = sum(phase.steps for phase in found.phases)
            cells = [f"{steps:,}", _count(found.tokens), f"{found.flops:.2e}", _bytes(found.state_bytes)]
            clock = [_duration(found.seconds)] if found.seconds is not None else []
            table.add_row("whole run", f"{found.time_average_sparsity:.4f}", *cells, *clock, style="bold")
        clock = [_duration(stage.seconds)] if stage.seconds is not None else []
        table.add_row(
            stage.name, f"{stage.sparsity:.4g}", f"{stage.steps:,}", _count(stage.tokens), f"{stage.flops:.2e}",
            _bytes(stage.state_bytes), *clock,
        )  # fmt: skip
    out.print(table)
    table = Table(title="training FLOPs" + (", causal attention" if found.causal else ""), title_justify="left")
    for column in ("convention", "dense run", "planned", "saved", "times fewer"):
        table.add_column(column, justify="left" if column == "convention" else "right")
    for name, row in found.by_convention().items():
        table.add_row(
            name, f"{row['dense']:.4g}", f"{row['planned']:.4g}", f"{row['saved_fraction']:.2%}",
            f"{row['dense'] / row['planned']:.3f}x", style="bold" if name == found.convention else None,
        )  # fmt: skip
    out.print(table)
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
            f"Time: from one block timed here on {measured.tokens:,} tokens ({measured.threads} threads, medians of "
            f"{measured.rounds} rounds; forward and backward, attention and norms included; speed-up by sparsity "
            f"{speeds or '-'}), times the layers; vocabulary and AdamW timed apart. No data, evaluation, checkpoints."
        )
    else:
        lines.append("Time on this machine: not measured (--time).")
    lines.append(_on_cs2(found))
    for line in lines:
        out.print(line, markup=False, highlight=False)


def _on_cs2(found: Plan) -> str:
    """The last line: simulated time, or why there is none."""
    from vspdf.plan import on_cs2

    try:
        wafer = on_cs2(found)
    except UserError as error:
        return f"Time on a CS-2: not known; {error}"
    seconds = wafer["seconds"]
    longest, middle, shortest = (_duration(seconds["planned"][key]) for key in ("low", "central", "high"))
    return (
        f"Time on a CS-2, simulated: {middle} ({shortest} to {longest}, by what is not known of it); the dense run "
        f"{_duration(seconds['dense'])}. One system at {wafer['clock']}; {wafer['central']} (vspdf simulate step)."
    )


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:g}"


def _bytes(number: float) -> str:
    return f"{number / 1e9:,.4g} GB" if number >= 1e9 else f"{number / 1e6:,.4g} MB"


def _duration(seconds: float) -> str:
    for unit, size in (("years", 365.25 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds:.3g} s"


@app.command()
def info(as_json: Json = False) -> None:
    """Versions, instruction sets, threads, and which backends can run here.

    `vspdf info --json`
    """
    from vspdf import info as facts

    body: dict[str, Any] = {
        "hardware": facts.hardware(),
        "versions": facts.versions(),
        "backends": facts.backends(),
        "tuning": facts.tuning(),
    }
    if as_json:
        _emit(body)
        return
    for title, entries in body.items():
        if title == "tuning":
            out.print("paths that auto has measured on this machine", style="bold")
            for line in entries or ["none yet"]:
                out.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
            continue
        out.print(title, style="bold")
        for key, value in entries.items():
            out.print(f"  {key}: {value}", markup=False, highlight=False)
