"""`vspdf bench ...`: sparse against dense and peers, on the CPU or a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vspdf.cli import bench_tables as tables
from vspdf.cli.console import Json, Verb, emit, murmur, say, show, tell
from vspdf.errors import UserError, did_you_mean, one_of, percent_meant, require
from vspdf.kernels.cpu import cpu_name
from vspdf.kernels.hardware import check_threads, crowded, keep_freed_memory, slow_bf16_measured
from vspdf.parallel.environment import refuse

Positive = Annotated[int, typer.Option(min=1)]
Rounds = Annotated[
    int | None, typer.Option(min=1, help="Exactly so many; default: as many as it takes, see --seconds.")
]
Csv = Annotated[Path | None, typer.Option(help="Write all rows here.")]
Compare = Annotated[
    Path | None, typer.Option(help="An earlier --json of this machine: say what became faster or slower beyond noise.")
]
Mask = Annotated[
    Path | None, typer.Option(help="Masks to time: a file (.smtx, .mtx, .npz, .pt, ...), a folder of them, a run.")
]
Candidates = Annotated[
    list[str] | None, typer.Option(help="Time this too: module:Class, or a name of --list; repeatable.")
]
Dtypes = Annotated[
    str, typer.Option("--dtype", "--precision", help="float32 (default), bfloat16; on a GPU float16, tf32 too.")
]
bench = typer.Typer(help="Sparse against dense and peers, interleaved in one process.", no_args_is_help=True)


class _Alone(Verb):
    """A verb that measures: several processes would measure each other."""

    def invoke(self, context: Any) -> Any:
        """Refuses to be one of several."""
        refuse(f"bench {context.info_name}", "start it without torchrun, alone on its machine")
        return super().invoke(context)


SHORT = {"fp32": "float32", "bf16": "bfloat16"}
LONG = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _parts(text: str, what: str, expected: str = "names with commas between", needed: bool = False) -> list[str]:
    """What stands between the commas; of a list that is not there nothing, unless it is needed."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts and (text or needed):
        raise UserError(f"{what} '{text}' is an empty list: expected {expected}.")
    return parts


def _numbers(
    text: str, kind: type, what: str, least: float = 0, most: float = math.inf, needed: bool = False
) -> list[Any]:
    parts = _parts(text, what, "numbers with commas between", needed)
    try:
        numbers = [kind(part) for part in parts]
    except ValueError:
        meant = next(filter(None, map(percent_meant, text.split(","))), "")
        raise UserError(f"{what} '{text}': expected numbers with commas between.{meant}") from None
    if wrong := [number for number in numbers if not least <= number <= most]:
        bounds = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
        meant = f" Did you mean {wrong[0] / 100:g}?" if most == 1 and 2 <= wrong[0] < 100 else ""
        raise UserError(f"{what} '{text}': expected numbers {bounds}, not {wrong[0]}.{meant}")
    return numbers


def _shapes(text: str, what: str = "--shapes", needed: bool = False) -> list[tuple[int, int, int]]:
    parts = _parts(text, what, "TOKENSxINxOUT, e.g. 1024x768x3072", needed)
    try:
        found: Any = [tuple(int(n) for n in shape.split("x")) for shape in parts]
        assert all(len(shape) == 3 and min(shape) > 0 for shape in found)
    except (ValueError, AssertionError):
        raise UserError(f"{what} '{text}': expected TOKENSxINxOUT, e.g. 1024x768x3072.") from None
    return found


def _layers(shapes: str, sparsity: str, dtype: str) -> tuple[list[tuple[int, int, int]], list[float], str]:
    """Shapes, sparsities and dtypes as named, or of the sparse phases of a configuration."""
    from vspdf.bench.linear import SPARSITIES
    from vspdf.config.loading import find_config

    amounts = _numbers(sparsity, float, "--sparsity", most=1)
    try:
        find_config(shapes or "-")
    except UserError:  # no such file: shapes, or a slip of the pen in them
        return _shapes(shapes), amounts or list(SPARSITIES), dtype
    from vspdf.config.resolve import model_shape
    from vspdf.interop import load_config

    config = load_config(shapes)
    own = {s for phase in config.phases for s in (*(part.sparsity for part in phase.stages()), *phase.layers.values())}
    amounts = amounts or sorted(own - {0.0})
    require(bool(amounts), f"--shapes {shapes}: no phase of that configuration is sparse; say --sparsity.")
    tokens = config.train.micro_batch_size * config.model.sequence_length
    chosen = [(tokens, n_in, n_out) for n_out, n_in in dict.fromkeys(model_shape(config.model, 1).block.values())]
    return chosen, amounts, dtype or config.train.precision


def _destination(path: Path | None, what: str, kinds: Sequence[str]) -> None:
    """Refuses a file that could not be written, before minutes of measuring for it."""
    if path is None:
        return
    if path.suffix.lower() not in kinds:
        raise UserError(f"{what} '{path}': expected a name that ends in {' or '.join(kinds)}.")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{what} '{path}': {'is a folder' if path.is_dir() else f'there is no folder {path.parent}'}.")


def _dtypes(text: str) -> list[str]:
    """Names of dtypes as torch has them; a machine that is slow at one is told of it before minutes of waiting."""
    found = [SHORT.get(name, name) for name in _parts(text, "--dtype")]
    if "bfloat16" in found and (slow := slow_bf16_measured()):
        say(f"bfloat16 will take long: {slow}.")
    return found


def _check_threads(threads: Sequence[int]) -> None:
    """Refuses more than can be started, and says where there are more than cores."""
    check_threads("--threads", max(threads, default=1))
    if threads and (crowd := crowded(max(threads))):
        say(crowd)


def _finish(
    result: dict[str, Any], table: Callable[[dict[str, Any]], None], csv: Path | None, as_json: bool,
    old: dict[str, Any] | None = None, plot: Path | None = None, roofline: bool = False,
) -> None:  # fmt: skip
    """Adds and writes what was asked for, and prints the result."""
    from vspdf.bench import compare, plots
    from vspdf.bench import roofline as roofs
    from vspdf.bench.rounds import write_csv

    if roofline:
        roofs.add(result, sorted({row["threads"] for row in result["rows"]}))
    if csv:
        write_csv(result, csv)
        say(f"wrote {csv}")
    unlike = None
    if old is not None:
        try:
            result["comparison"] = compare.compare(old, result)
        except UserError as error:  # no reason to lose what was measured
            unlike = error
    if as_json:
        emit(result)
    else:
        table(result)
    if plot:
        plots.plot(result, plot)
        say(f"wrote {plot}")
    if unlike is not None:
        raise unlike


def _earlier(path: Path | None, model: dict[str, int] | None = None) -> dict[str, Any] | None:
    """An earlier result, of this machine and of a step's `model`: known before anything is measured."""
    from vspdf.bench import compare

    if path is None:
        return None
    old = compare.read(path)
    compare.check_alike(old, cpu_name(), model)
    return old


@bench.command(name="linear", cls=_Alone)
def bench_linear(
    shapes: Annotated[str, typer.Option(help="TOKENSxINxOUT, with commas, or a CONFIG; default: layers of GPTs.")] = "",
    sparsity: Annotated[str, typer.Option(help="With commas; default 0.5,0.75,0.9,0.95,0.99, or CONFIG's own.")] = "",
    mask: Mask = None,
    pattern: Annotated[str, typer.Option(help="Kinds of masks that ship, e.g. power-law,banded,2:4; or all.")] = "",
    tokens: Annotated[str, typer.Option(help="Of --mask, with commas between; default 1024.")] = "",
    threads: Annotated[str, typer.Option(help="With commas between; default: 1 and all cores.")] = "",
    rounds: Rounds = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Of a layer at most, default 10; rounds end at intervals of 2 %.")
    ] = None,
    peers: Annotated[bool, typer.Option(help="Time other libraries and dense bf16 too.")] = True,
    candidate: Candidates = None,
    dtype: Dtypes = "",
    compare: Compare = None,
    roofline: Annotated[bool, typer.Option("--roofline", help="Measure the machine's ceilings; place rows.")] = False,
    csv: Csv = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of speed-up over sparsity here (PNG, SVG).")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda for the current GPU.")] = "cpu",
    tune: Annotated[bool, typer.Option("--tune", help="On a GPU: keep the timings, for auto.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Name every candidate and what is missing.")] = False,
    as_json: Json = False,
) -> None:
    """One linear layer: forward, gradient of the input, gradient of the weights, and all three.

    `vspdf bench linear --shapes 1024x768x3072 --sparsity 0.75,0.9`

    `vspdf bench linear --mask dlmc/transformer --tokens 256,1024`

    `vspdf bench linear --pattern power-law,banded --candidate mykernel:Mine`

    `vspdf bench linear --device cuda --tune --shapes quickstart`
    """
    if list_:
        tables.print_candidates(as_json)
        return
    _destination(csv, "--csv", (".csv",))
    _destination(plot, "--plot", (".png", ".svg", ".pdf"))
    chosen, amounts, dtype = _layers(shapes, sparsity, dtype)
    if device == "cuda":
        _for_cpus(threads=threads, plot=plot, mask=mask, pattern=pattern, tokens=tokens, candidate=candidate,
                  compare=compare, roofline=roofline, seconds=seconds is not None)  # fmt: skip
        _on_gpu(chosen, amounts, dtype, rounds, peers, tune, csv, as_json)
        return
    if device != "cpu":
        raise UserError(f"--device '{device}' is not known: cpu or cuda.")
    if tune:
        raise UserError("--tune is for --device cuda: on the CPU, auto times both paths by itself.")
    from vspdf.bench import linear
    from vspdf.bench.rounds import Budget

    counts, old = _numbers(threads, int, "--threads", least=1), _earlier(compare)
    masks = _masks(mask, pattern, chosen, amounts)
    if tokens and masks is None:
        raise UserError("--tokens is for --mask and --pattern; --shapes has tokens of its own.")
    lengths = _numbers(tokens, int, "--tokens", least=1) or sorted({shape[0] for shape in chosen}) or [1024]
    dtypes = _dtypes(dtype) or ["float32"]
    _check_threads(counts)
    keep_freed_memory()
    result = linear.bench_linear(
        chosen or linear.SHAPES, amounts, counts or None, Budget(rounds, 10.0 if seconds is None else seconds),
        peers, dtypes, masks, lengths, candidate or (), murmur,
    )  # fmt: skip
    _finish(result, tables.print_linear, csv, as_json, old, plot, roofline)


def _for_cpus(**given: Any) -> None:
    for name, value in given.items():
        if value:
            draws = "; on a GPU, python benchmarks/gpu.py draws" if name == "plot" else ""
            raise UserError(f"--{name} is for the CPU{draws}.")


def _masks(
    mask: Path | None, pattern: str, shapes: Sequence[tuple[int, int, int]], sparsities: Sequence[float]
) -> list[tuple[str, Any]] | None:
    """The masks that were asked for by file or by kind; None where none were."""
    if mask is not None and shapes:
        raise UserError("--shapes is for random masks and --pattern: those of --mask have their own; give --tokens.")
    if mask is not None and pattern:
        raise UserError("--mask and --pattern both say which masks to time: give one.")
    if mask is not None:
        from vspdf.interop.mask_files import files

        return list(files(mask))
    if not pattern:
        return None
    from vspdf.bench import patterns
    from vspdf.bench.linear import SHAPES

    names = list(patterns.KINDS) if pattern == "all" else _parts(pattern, "--pattern")
    sides = list(dict.fromkeys((n_out, n_in) for _, n_in, n_out in shapes or SHAPES))
    found = list(dict.fromkeys(each for name in names for each in patterns.draw(name, sides, sparsities)))
    return patterns.labelled(found, len(sides) > 1, len(sparsities) > 1)


def _on_gpu(
    shapes: Sequence[tuple[int, int, int]], sparsities: Sequence[float], dtype: str, rounds: int | None, peers: bool,
    tune: bool, csv: Path | None, as_json: bool,
) -> None:  # fmt: skip
    from vspdf.bench import linear_gpu

    names = [LONG.get(name, name) for name in _parts(dtype or "bf16,fp32", "--dtype")]
    result = linear_gpu.bench_linear(shapes or linear_gpu.SHAPES, sparsities, names, rounds or 7, peers, tune, murmur)
    _finish(result, tables.print_linear_gpu, csv, as_json)


@bench.command(name="update", cls=_Alone)
def bench_update(
    shape: Annotated[str, typer.Option(help="TOKENSxINxOUT.")] = "1024x768x3072",
    sparsity: Annotated[str, typer.Option(help="With commas between.")] = "0.5,0.75,0.9",
    drop_fraction: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.3,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    csv: Csv = None,
    as_json: Json = False,
) -> None:
    """An update of a mask that moves, with its new plans, beside a training step of the same layer.

    `vspdf bench update --sparsity 0.9`
    """
    from vspdf.bench import update

    _destination(csv, "--csv", (".csv",))
    shapes = _shapes(shape, "--shape", needed=True)
    if len(shapes) != 1:
        raise UserError(f"--shape '{shape}': expected TOKENSxINxOUT, e.g. 1024x768x3072.")
    sparsities = _numbers(sparsity, float, "--sparsity", most=1, needed=True)
    _check_threads([threads] if threads else [])
    keep_freed_memory()
    result = update.bench_update(*shapes[0], sparsities, drop_fraction, threads, rounds, murmur)
    _finish(result, tables.print_update, csv, as_json)


@bench.command(name="step", cls=_Alone)
def bench_step(
    n_layer: Positive = 12,
    d_model: Positive = 768,
    n_head: Positive = 12,
    sequence_length: Positive = 512,
    batch_size: Positive = 4,
    sparsity: Annotated[str, typer.Option(help="With commas between.")] = "0.75,0.9",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    rounds: Rounds = None,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="At most, where rounds go on until intervals are small.")
    ] = 120,
    dtype: Annotated[str, typer.Option(help="float32 (default), bfloat16: steps under autocast.")] = "",
    compiled: Annotated[bool, typer.Option("--compile", help="Time dense under torch.compile, too.")] = False,
    compare: Compare = None,
    csv: Csv = None,
    as_json: Json = False,
) -> None:
    """A whole training step (forward, backward, clipping, AdamW) of a GPT, sparse models beside the same dense one.

    `vspdf bench step --n-layer 4 --d-model 512 --n-head 8`

    `vspdf bench step --dtype float32,bfloat16 --compile`
    """
    from vspdf.bench import step
    from vspdf.bench.rounds import Budget

    _destination(csv, "--csv", (".csv",))
    sparsities = _numbers(sparsity, float, "--sparsity", most=1)
    sizes = {"n_layer": n_layer, "d_model": d_model, "n_head": n_head, "sequence_length": sequence_length}
    old = _earlier(compare, sizes | {"batch_size": batch_size})
    dtypes = _dtypes(dtype) or ["float32"]
    _check_threads([threads] if threads else [])
    keep_freed_memory()
    result = step.bench_step(
        n_layer, d_model, n_head, sequence_length, batch_size, sparsities, threads, Budget(rounds, seconds), dtypes,
        compiled, progress=murmur,
    )  # fmt: skip
    _finish(result, tables.print_step, csv, as_json, old)


@bench.command(name="suite", cls=_Alone)
def bench_suite(
    output: Annotated[Path, typer.Option(help="Folder for MACHINE.json and MACHINE.html.")] = Path("."),
    name: Annotated[str, typer.Option(help="What to call this machine; default: its processor's name.")] = "",
    sections: Annotated[str, typer.Option(help="Of the whole only these, with commas between.")] = "",
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Everything on tiny layers: shows that it works, no speeds.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Everything about this machine in under 15 minutes: one page and one JSON file.

    `vspdf bench suite --output results`
    """
    from vspdf.bench import suite
    from vspdf.report import bench_page

    if output.exists() and not output.is_dir():
        raise UserError(f"--output '{output}': is a file, expected a folder.")
    chosen = _parts(sections, "--sections")
    keep_freed_memory()
    result = suite.bench_suite(chosen or suite.SECTIONS, name or None, tiny, murmur)
    files = bench_page.write(result, output)
    for file in files:
        say(f"wrote {file}")
    if as_json:
        emit(result)
        return
    for table in bench_page.tables(result):
        show(tables.of(table))
    tell(f"{result['seconds'] / 60:.1f} minutes. Open {files[1]} for all of it.")


@bench.command(name="decode", cls=_Alone)
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
    csv: Csv = None,
    as_json: Json = False,
) -> None:
    """Generation, a token at a time: sparse models beside the same one dense, in float32 and bfloat16.

    `vspdf bench decode --model llama-130m`

    `vspdf bench decode --model pruned/ --sparsity zeros`
    """
    from vspdf.bench import decode
    from vspdf.bench.problem import DTYPES

    _destination(csv, "--csv", (".csv",))
    sparsities = [] if sparsity == "zeros" else _numbers(sparsity, float, "--sparsity", most=1, needed=True)
    batches = _numbers(batch_size, int, "--batch-size", least=1, needed=True)
    dtypes = _parts(dtype, "--dtype", needed=True)
    for one in dtypes:
        one_of("--dtype", one, DTYPES)
    _check_threads([threads] if threads else [])
    keep_freed_memory()
    result = decode.bench_decode(
        _to_decode(model, context + max_tokens, sparsity == "zeros"), sparsities, dtypes, batches, context, max_tokens,
        threads, rounds, progress=murmur,
    )  # fmt: skip
    _finish(result, tables.print_decode, csv, as_json)


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
    if not Path(source).exists():
        raise UserError(f"`model` '{source}' not found, by name or as a checkpoint.{did_you_mean(source, MODELS)}")
    model = checkpoints.load(source).model
    densify(model)
    longest = model.shape.sequence_length
    require(length <= longest, f"`context` and `tokens` make {length} tokens, the model has {longest} positions.")
    return model
