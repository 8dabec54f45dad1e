"""`vspdf bench ...`: sparse against dense and peers, on the CPU or a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vspdf.cli.console import Json, Verb, emit, err, murmur, out, say, show, tell
from vspdf.draw import words
from vspdf.errors import UserError, one_of, percent_meant, require
from vspdf.kernels.hardware import crowded, keep_freed_memory

Positive = Annotated[int, typer.Option(min=1)]
bench = typer.Typer(help="Sparse against dense and peers, interleaved in one process.", no_args_is_help=True)


def _numbers(text: str, kind: type, what: str, least: float = 0, most: float = math.inf) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(",") if part]
    except ValueError:
        meant = next(filter(None, map(percent_meant, text.split(","))), "")
        raise UserError(f"{what} '{text}': expected numbers with commas between.{meant}") from None
    if wrong := [number for number in numbers if not least <= number <= most]:
        bounds = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
        meant = f" Did you mean {wrong[0] / 100:g}?" if most == 1 and 2 <= wrong[0] < 100 else ""
        raise UserError(f"{what} '{text}': expected numbers {bounds}, not {wrong[0]}.{meant}")
    if not numbers and text:
        raise UserError(f"{what} '{text}': expected numbers with commas between.")
    return numbers


def _destination(path: Path | None, what: str, kinds: Sequence[str]) -> None:
    """Refuses a file that could not be written, before minutes of measuring for it."""
    if path is None:
        return
    if path.suffix.lower() not in kinds:
        raise UserError(f"{what} '{path}': expected a name that ends in {' or '.join(kinds)}.")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{what} '{path}': {'is a folder' if path.is_dir() else f'there is no folder {path.parent}'}.")


def _warn_of_crowds(threads: Sequence[int]) -> None:
    if threads and (crowd := crowded(max(threads))):
        say(crowd)


def _write_results(result: dict[str, Any], csv: Path | None, as_json: bool) -> None:
    from vspdf.bench.rounds import write_csv

    if csv:
        write_csv(result, csv)
        err.print(f"wrote {csv}")
    if as_json:
        emit(result)


@bench.command(name="linear", cls=Verb)
def bench_linear(
    shapes: Annotated[str, typer.Option(help="TOKENSxINxOUT, with commas between; default: five layers of GPTs.")] = "",
    sparsity: Annotated[str, typer.Option(help="With commas between.")] = "0.5,0.75,0.9,0.95,0.99",
    threads: Annotated[str, typer.Option(help="With commas between; default: 1 and all cores.")] = "",
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    peers: Annotated[bool, typer.Option(help="Time torch.sparse, scipy and, where installed, SparseLab too.")] = True,
    csv: Annotated[Path | None, typer.Option(help="Write all rows here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of speed-up over sparsity here (PNG, SVG).")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda for the current GPU.")] = "cpu",
    precision: Annotated[
        str, typer.Option(help="fp32 (default) or bf16; on a GPU bf16,fp32, and fp16, tf32; commas between.")
    ] = "",
    tune: Annotated[bool, typer.Option("--tune", help="On a GPU: keep the timings, for auto.")] = False,
    as_json: Json = False,
) -> None:
    """One linear layer: forward, gradient of the input, gradient of the weights, and all three.

    `vspdf bench linear --shapes 1024x768x3072 --sparsity 0.75,0.9`

    `vspdf bench linear --device cuda --tune`
    """
    from vspdf.bench import linear as benchmark
    from vspdf.bench import linear_gpu

    if device not in ("cpu", "cuda"):
        raise UserError(f"--device '{device}' is not known: cpu or cuda.")
    if tune and device == "cpu":
        raise UserError("--tune is for --device cuda: on the CPU, auto times both paths by itself.")
    if threads and device == "cuda":
        raise UserError("--threads is for the CPU.")
    if plot and device == "cuda":
        raise UserError("--plot is for the CPU; on a GPU, python benchmarks/gpu.py draws.")
    try:
        chosen: Any = [tuple(int(n) for n in shape.split("x")) for shape in shapes.split(",") if shape]
        assert all(len(shape) == 3 and min(shape) > 0 for shape in chosen)
    except (ValueError, AssertionError):
        raise UserError(f"--shapes '{shapes}': expected TOKENSxINxOUT, e.g. 1024x768x3072.") from None
    _destination(csv, "--csv", (".csv",))
    _destination(plot, "--plot", (".png", ".svg", ".pdf"))
    amounts = _numbers(sparsity, float, "--sparsity", most=1)
    if device == "cuda":
        result = linear_gpu.bench_linear(
            chosen or linear_gpu.SHAPES, amounts, (precision or "bf16,fp32").split(","), rounds, peers, tune, murmur
        )
        _write_results(result, csv, as_json)
        if not as_json:
            _print_linear_gpu(result)
        return
    counts = _numbers(threads, int, "--threads", least=1)
    _warn_of_crowds(counts)
    keep_freed_memory()
    result = benchmark.bench_linear(
        chosen or benchmark.SHAPES,
        amounts,
        counts or None,
        rounds,
        peers,
        (precision or "fp32").split(","),
        murmur,
    )
    _write_results(result, csv, as_json)
    if plot:
        benchmark.plot(result, plot)
        err.print(f"wrote {plot}")
    if not as_json:
        _print_linear(result)


def _print_linear_gpu(result: dict[str, Any]) -> None:
    table = Table(title=f"speed-up over cuBLAS on masked weights: {result['hardware']['gpu']}", title_justify="left")
    for column in ("tokens, in, out", "sparsity", "", "product", "candidate", "speed-up", "TFLOP/s useful", "error"):
        table.add_column(column)
    for r in result["rows"]:
        shape = f"{r['tokens']} {r['in_features']} {r['out_features']}"
        error = "" if r["error"] is None else f"{r['error']:.1e}"
        name = f"auto: {r['path']}" if r["candidate"] == "auto" != r["path"] else r["candidate"]
        table.add_row(
            shape, f"{r['sparsity']:.4g}", r["precision"], r["product"], name, f"{r['ratio_to_dense']:.2f}x",
            f"{r['gflops_useful'] / 1e3:.1f}", error,
        )  # fmt: skip
    show(table)
    for name, reason in result["missing"].items():
        out.print(f"{name} was not timed: {reason}", highlight=False)


def _print_linear(result: dict[str, Any]) -> None:
    rows = result["rows"]
    of = ("tokens", "in_features", "out_features", "threads", "precision")
    for tokens, n_in, n_out, threads, precision in dict.fromkeys(tuple(r[key] for key in of) for r in rows):
        here = (tokens, n_in, n_out, threads, precision)
        mine = [r for r in rows if tuple(r[key] for key in of) == here]
        show(
            _linear_table(
                f"speed-up over dense: {tokens} tokens, {n_in} -> {n_out}, {threads} threads, {precision}", mine
            )
        )
    for threads, peak in result["peak_gflops"].items():
        tell(f"FMA peak measured with {threads} threads, float32: {peak:.0f} GFLOP/s")
    tell(
        "Speed-up: median of the ratios of interleaved rounds, and their quartiles; packing, transposes and value "
        "refresh counted. A round is disturbed, and left out, where dense ran below 60 % of the FMA peak or a call had "
        "less of the processor than in its best round."
    )
    _tell_of_quiet(result)
    tell(*(f"{name} was not timed: {reason}" for name, reason in result["missing"].items()))


def _linear_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    cells = {(r["product"], r["candidate"], r["sparsity"]): r for r in rows}
    sparsities = list(dict.fromkeys(r["sparsity"] for r in rows))
    table = Table(title=title, title_justify="left")
    table.add_column("product")
    table.add_column("candidate", no_wrap=True)
    for s in sparsities:
        table.add_column(f"{s:.4g}", justify="right", no_wrap=True)
    for product, candidate in dict.fromkeys((r["product"], r["candidate"]) for r in rows if r["candidate"] != "dense"):
        found = [cells.get((product, candidate, s)) for s in sparsities]

        def line(name: str, cell: Callable[[dict[str, Any]], str], first: str = "", found: Any = found) -> None:
            table.add_row(first, name, *(cell(r) if r else "" for r in found))

        line(candidate, _speedup, product)
        if candidate == "vspdf":
            line("  quartiles", lambda r: f"{r['ratio_low']:.2f}-{r['ratio_high']:.2f}")
            line("  GFLOP/s useful", lambda r: f"{r['gflops_useful']:.0f}")
            if found[0] and found[0]["peak_fraction"] is not None:
                line("  of FMA peak", lambda r: f"{r['peak_fraction']:.0%}" if r["peak_fraction"] <= 1 else "above it")
            if any(r and r["disturbed_rounds"] for r in found):
                line("  disturbed rounds", lambda r: f"{r['disturbed_rounds']} of {r['rounds']}")
    return table


def _speedup(row: dict[str, Any]) -> str:
    return f"{row['ratio_to_dense']:.2f}x" if row["possible"] else "(no result)"


def _tell_of_quiet(result: dict[str, Any]) -> None:
    """What keeps figures from being results: others at work, rounds that they disturbed, what cannot be."""
    from vspdf.bench.rounds import BUSY

    if result["load"] is not None and result["load"] > BUSY:
        cores = result["hardware"]["cores"]
        tell(f"The machine was busy when this began: a load of {result['load']:.1f} on {cores} cores.")
    if any(2 * row["disturbed_rounds"] > row["rounds"] for row in result["rows"]):
        tell("More than half of some rounds were disturbed: all of these count then, and are worth little.")
    if not all(row["possible"] for row in result["rows"]):
        tell("(no result): above the FMA peak, or above what the sparsity allows: the measurement was disturbed.")


@bench.command(name="step", cls=Verb)
def bench_step(
    n_layer: Positive = 12,
    d_model: Positive = 768,
    n_head: Positive = 12,
    sequence_length: Positive = 512,
    batch_size: Positive = 4,
    sparsity: Annotated[str, typer.Option(help="With commas between.")] = "0.75,0.9",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    csv: Annotated[Path | None, typer.Option(help="Write all rows here.")] = None,
    as_json: Json = False,
) -> None:
    """A whole training step (forward, backward, clipping, AdamW) of a GPT, sparse models beside the same dense one.

    `vspdf bench step --n-layer 4 --d-model 512 --n-head 8`
    """
    from vspdf.bench import step

    _destination(csv, "--csv", (".csv",))
    sparsities = _numbers(sparsity, float, "--sparsity", most=1)
    _warn_of_crowds([threads] if threads else [])
    keep_freed_memory()
    result = step.bench_step(
        n_layer, d_model, n_head, sequence_length, batch_size, sparsities, threads, rounds,
        progress=murmur,
    )  # fmt: skip
    _write_results(result, csv, as_json)
    if as_json:
        return
    table = Table(
        title=f"training step, {words.count(result['model']['parameters'])} parameters, "
        f"{result['rows'][0]['threads']} threads",
        title_justify="left",
    )
    for column in (
        "sparsity",
        "attention",
        "s/step",
        "quartiles",
        "speed-up",
        "quartiles",
        "disturbed",
        "state of its layers",
        "of the model",
    ):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        memory = row["memory"]
        shares = (
            [f"{memory[k]['sparse'] / memory[k]['dense']:.0%}" for k in ("sparsified", "model")] if memory else ["", ""]
        )
        table.add_row(
            f"{row['sparsity']:.4g}", row["attention"], f"{row['seconds_median']:.3f}",
            f"{row['seconds_low']:.3f}-{row['seconds_high']:.3f}", _speedup(row),
            f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}", f"{row['disturbed_rounds']} of {row['rounds']}", *shares,
        )  # fmt: skip
    show(table)
    tell("Speed-up: median of the ratios of a round's steps, dense over sparse, and their quartiles.")
    tell(f"Beside the state, the sparse kernels keep {result['scratch_bytes'] / 2**20:.0f} MiB of working memory.")
    _tell_of_quiet(result)


@bench.command(name="decode", cls=Verb)
def bench_decode(
    model: Annotated[
        str, typer.Option(help="A named model, or any checkpoint: a run, a Hugging Face folder.")
    ] = "llama-130m",
    sparsity: Annotated[
        str, typer.Option(help="With commas between; zeros: those of a checkpoint that was pruned.")
    ] = "0.5,0.75,0.9,0.95,0.99",
    dtype: Annotated[str, typer.Option(help="With commas between.")] = "float32,bfloat16",
    batch_size: Annotated[str, typer.Option(help="Sequences at a time, with commas between.")] = "1",
    context: Annotated[int, typer.Option(min=1, help="Tokens before the first that is timed.")] = 64,
    max_tokens: Annotated[int, typer.Option("--tokens", min=1, help="Timed in a round, one by one.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    csv: Annotated[Path | None, typer.Option(help="Write all rows here.")] = None,
    as_json: Json = False,
) -> None:
    """Generation, a token at a time: sparse models beside the same one dense, in float32 and bfloat16.

    `vspdf bench decode --model llama-130m`

    `vspdf bench decode --model pruned/ --sparsity zeros`
    """
    from vspdf.bench import decode

    _destination(csv, "--csv", (".csv",))
    sparsities = [] if sparsity == "zeros" else _numbers(sparsity, float, "--sparsity", most=1)
    batches, dtypes = _numbers(batch_size, int, "--batch-size", least=1), dtype.split(",")
    for one in dtypes:
        one_of("--dtype", one, decode.DTYPES)
    _warn_of_crowds([threads] if threads else [])
    keep_freed_memory()
    result = decode.bench_decode(
        _to_decode(model, context + max_tokens, sparsity == "zeros"), sparsities, dtypes, batches, context, max_tokens,
        threads, rounds, progress=murmur,
    )  # fmt: skip
    _write_results(result, csv, as_json)
    if as_json:
        return
    table = Table(
        title=f"generation, {words.count(result['model']['parameters'])} parameters after {context} tokens, "
        f"{result['rows'][0]['threads']} threads",
        title_justify="left",
    )
    for column in (
        "sparsity",
        "dtype",
        "batch",
        "tokens/s",
        "MB a token",
        "of dense fp32",
        "quartiles",
        "of dense bf16",
    ):
        table.add_column(column, justify="left" if column == "dtype" else "right")
    for row in result["rows"]:
        other = row["ratio_to_bfloat16"]
        table.add_row(
            f"{row['sparsity']:.4g}", row["dtype"], str(row["batch_size"]), f"{row['tokens_per_second']:.1f}",
            f"{row['bytes'] / 1e6:.0f}", f"{row['ratio_to_dense']:.2f}x",
            f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}", "" if other is None else f"{other:.2f}x",
        )  # fmt: skip
    show(table)
    tell("Medians of the ratios of interleaved rounds; the output head is dense everywhere.")


def _to_decode(source: str, length: int, zeros: bool) -> Any:
    """A dense model by name, with random weights, or out of a checkpoint."""
    from dataclasses import replace

    from vspdf.interop import checkpoints
    from vspdf.model import GPT
    from vspdf.shapes import MODELS
    from vspdf.sparsity.surgery import densify

    if source in MODELS:
        require(not zeros, f"`sparsity` zeros is for a checkpoint that was pruned; {source} is a name.")
        return GPT(replace(MODELS[source], sequence_length=length))
    model = checkpoints.load(source).model
    densify(model)
    longest = model.shape.sequence_length
    require(length <= longest, f"`context` and `tokens` make {length} tokens, the model has {longest} positions.")
    return model
