"""What `vspdf bench` prints: tables, and what keeps figures from being results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from vspdf.cli.console import emit, show, tell
from vspdf.draw import words

GREY = "bright_black"
_OF = ("tokens", "in_features", "out_features", "threads", "mask")


def print_candidates(as_json: bool) -> None:
    """Every candidate, what it is, and what one that is missing needs."""
    from vspdf.bench.candidates import listed

    rows = listed()
    if as_json:
        emit({"candidates": [{"name": name, "about": about, "state": state} for name, about, state in rows]})
        return
    table = Table(title="candidates of vspdf bench linear", title_justify="left")
    for column in ("name", "what it is", "here"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    show(table)


def of(table: Any) -> Table:
    """A table of the report wing, for the terminal."""
    made = Table(title=table.title, title_justify="left")
    for i, head in enumerate(table.head):
        made.add_column(str(head), justify="left" if table.is_words(i) else "right")
    for row in table.rows:
        made.add_row(*(Text(str(cell), GREY if hasattr(cell, "grey") else "") for cell in row))
    return made


def print_linear_gpu(result: dict[str, Any]) -> None:
    """Rows of a GPU."""
    table = Table(title=f"speed-up over cuBLAS on masked weights: {result['hardware']['gpu']}", title_justify="left")
    for column in ("tokens, in, out", "sparsity", "", "product", "candidate", "speed-up", "TFLOP/s useful", "error"):
        table.add_column(column)
    for r in result["rows"]:
        shape = f"{r['tokens']} {r['in_features']} {r['out_features']}"
        error = "" if r["error"] is None else f"{r['error']:.1e}"
        name = f"auto: {r['path']}" if r["candidate"] == "auto" != r["path"] else r["candidate"]
        table.add_row(
            shape, f"{r['sparsity']:.4g}", r["precision"], r["product"], name,
            f"{r['ratio_to_dense']:.2f}x" if r["correct"] else Text("wrong", "red"),
            f"{r['gflops_useful'] / 1e3:.1f}" if r["correct"] else "", error,
        )  # fmt: skip
    show(table)
    if wrong := sum(not r["correct"] for r in result["rows"]):
        tell(f"WRONG: {wrong} of {len(result['rows'])} rows differ from float64; auto takes none of them.")
    for name, reason in result["missing"].items():
        tell(f"{name} was not timed: {reason}")


# ---- layers ----------------------------------------------------------------------------------------------------------


def print_linear(result: dict[str, Any]) -> None:
    """Rows of layers: a table each, or one of masks where there are many."""
    rows = result["rows"]
    if result["masks"]:
        _print_masks(result)
    else:
        for here in dict.fromkeys(tuple(r[key] for key in _OF) for r in rows):
            tokens, n_in, n_out, threads, _ = here
            mine = [r for r in rows if tuple(r[key] for key in _OF) == here]
            title = f"speed-up over dense {mine[0]['dtype']}: {tokens} tokens, {n_in} -> {n_out}, {threads} threads"
            show(_linear_table(title, mine))
    _print_wrong(rows)
    _print_preparation(rows)
    if "roofline" in result:
        _print_roofline(result)
    for threads, peak in result["peak_gflops"].items():
        tell(f"FMA peak measured with {threads} threads, float32: {peak:.0f} GFLOP/s")
    tell(
        "Speed-up: median of the ratios of interleaved rounds, and its 95 % interval; packing, transposes and value "
        "refresh counted. A round is disturbed, and left out, where dense ran below 60 % of its best or a call had "
        "less of the processor than in its best round. Grey: the interval is wider than a tenth, or most rounds were "
        "disturbed."
    )
    _print_rest(result)


def _label(row: dict[str, Any]) -> str:
    plain = row["dtype"] == "float32" or row["candidate"] == "dense_bf16"
    return row["candidate"] if plain else f"{row['candidate']} {row['dtype']}"


def _linear_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    first = next(r["dtype"] for r in rows if r["candidate"] == "dense")
    cells = {(r["product"], _label(r), r["sparsity"]): r for r in rows}
    sparsities = list(dict.fromkeys(r["sparsity"] for r in rows))
    table = Table(title=title, title_justify="left")
    table.add_column("product")
    table.add_column("candidate", no_wrap=True)
    for s in sparsities:
        table.add_column(f"{s:.4g}", justify="right", no_wrap=True)
    shown = [r for r in rows if (r["candidate"], r["dtype"]) != ("dense", first)]
    for product, candidate in dict.fromkeys((r["product"], _label(r)) for r in shown):
        found = [cells.get((product, candidate, s)) for s in sparsities]

        def line(name: str, cell: Callable[[dict[str, Any]], Any], first: str = "", found: Any = found) -> None:
            table.add_row(first, name, *(cell(r) if r else "" for r in found))

        line(candidate, speedup, product)
        if candidate.startswith("vspdf"):
            timed = [r for r in found if r and r["ratio_to_dense"]]
            line("  95 % interval", lambda r: f"{r['ratio_low']:.2f}-{r['ratio_high']:.2f}" if r["ratio_low"] else "")
            line("  GFLOP/s useful", lambda r: f"{r['gflops_useful']:.0f}" if r["gflops_useful"] else "")
            if timed and timed[0]["peak_fraction"] is not None:
                line("  of FMA peak", lambda r: f"{r['peak_fraction']:.0%}" if r["peak_fraction"] <= 1 else "above it")
            if any(r["disturbed_rounds"] for r in timed):
                line("  disturbed rounds", lambda r: f"{r['disturbed_rounds']} of {r['rounds']}")
    return table


def speedup(row: dict[str, Any]) -> Text | str:
    """A ratio; grey where it is noise."""
    if not row.get("correct", True):
        return Text("wrong", "red")
    if not row["possible"]:
        return "(no result)"
    return Text(f"{row['ratio_to_dense']:.2f}x", GREY if row["noisy"] else "")


def _print_masks(result: dict[str, Any]) -> None:
    rows, masks = result["rows"], result["masks"]
    for tokens, threads in dict.fromkeys((r["tokens"], r["threads"]) for r in rows):
        mine = [r for r in rows if (r["tokens"], r["threads"]) == (tokens, threads)]
        names = list(dict.fromkeys(_label(r) for r in mine if r["candidate"] not in ("dense", "vspdf")))
        table = Table(title=f"speed-up over dense: {tokens} tokens, {threads} threads", title_justify="left")
        table.add_column("mask", overflow="fold")
        columns = ("out x in", "sparsity", "row spread", "fullest row", "empty rows", "bandwidth", "forward",
                   "grad_input", "grad_values", "layer", *(f"{name}, layer" for name in names))  # fmt: skip
        for column in columns:
            table.add_column(column, justify="right")
        for mask in dict.fromkeys(r["mask"] for r in mine):
            about, here = masks[mask], {(_label(r), r["product"]): r for r in mine if r["mask"] == mask}
            ours = [here.get(("vspdf", product)) for product in ("forward", "grad_input", "grad_values", "layer")]
            theirs = [here.get((name, "layer")) for name in names]
            table.add_row(
                mask, f"{about['rows']}x{about['columns']}", f"{about['sparsity']:.4g}", f"{about['row_spread']:.2f}",
                f"{about['fullest_row']:.1f}x", f"{about['empty_rows']}", f"{about['bandwidth']:.2f}",
                *(speedup(r) if r else "" for r in (*ours, *theirs)),
            )  # fmt: skip
        show(table)
    _print_summary(result["summary"])


def _print_summary(summary: Sequence[dict[str, Any]]) -> None:
    """Geometric means of whole layers by sparsity, the worst and the best mask."""
    table = Table(title="geometric means by sparsity, whole layers", title_justify="left")
    for i, column in enumerate(("sparsity", "threads", "candidate", "masks", "mean", "worst", "", "best", "")):
        table.add_column(column, justify="right" if i in (0, 1, 3, 4, 5, 7) else "left", overflow="fold")
    for group in sorted(summary, key=lambda g: (g["sparsity"], g["threads"])):
        if group["product"] == "layer" and group["candidate"] != "dense":
            worst, best = group["worst"], group["best"]
            table.add_row(
                f"{group['sparsity']:.0%}", str(group["threads"]), _label(group), str(group["count"]),
                f"{group['ratio_to_dense']:.2f}x", f"{worst['ratio_to_dense']:.2f}x", worst["mask"],
                f"{best['ratio_to_dense']:.2f}x", best["mask"],
            )  # fmt: skip
    show(table)


def _print_wrong(rows: Sequence[dict[str, Any]]) -> None:
    wrong: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if not row["correct"]:
            wrong.setdefault(f"{_label(row)}, {row['product']}", []).append(row)
    for name, found in wrong.items():
        worst = max(row["error"] for row in found)
        tell(
            f"WRONG, not timed: {name}: differs from float64 by {worst:.1e} of the largest value in {len(found)} layers"
        )


def _print_preparation(rows: Sequence[dict[str, Any]]) -> None:
    """What each candidate prepares for a mask, and when that has paid."""
    first = rows[0]["dtype"]
    layers = [r for r in rows if r["product"] == "layer" and r["dtype"] == first and (r["prepare_seconds"] or 0) > 1e-4]
    if not layers:
        return
    table = Table(title="preparation for a mask, once", title_justify="left")
    for i, column in enumerate(("candidate", "sparsity", "seconds", "paid after")):
        table.add_column(column, justify="right" if i else "left")
    for name, s in dict.fromkeys((_label(r), round(r["sparsity"], 2)) for r in layers):
        mine = [r for r in layers if (_label(r), round(r["sparsity"], 2)) == (name, s)]
        pays = [r["pays_after"] for r in mine]
        longest = max((p for p in pays if p is not None), default=None)
        steps = (
            "never"
            if longest is None
            else f"{longest:,} step{'s' * (longest != 1)}" + (" or never" if None in pays else "")
        )
        table.add_row(name, f"{s:.4g}", f"{max(r['prepare_seconds'] for r in mine):.4f}", steps)
    show(table)


def _print_roofline(result: dict[str, Any]) -> None:
    for threads, machine in result["roofline"].items():
        speeds = ", ".join(f"{level} {speed:.0f}" for level, speed in machine["gbytes_per_second"].items())
        tell(f"{threads} threads: {machine['peak_gflops']:.0f} GFLOP/s from registers; GB/s read from {speeds}.")
    table = Table(title="roofline: operands and result counted once", title_justify="left")
    for i, column in enumerate(("layer", "sparsity", "threads", "product", "candidate", "FLOP/byte", "GFLOP/s",
                                "of the roof", "fed from")):  # fmt: skip
        table.add_column(column, justify="right" if i in (1, 2, 5, 6, 7) else "left")
    for r in result["rows"]:
        if r["intensity"] is not None and r["product"] != "layer":
            table.add_row(
                r["mask"] or f"{r['tokens']}x{r['in_features']}x{r['out_features']}", f"{r['sparsity']:.4g}",
                str(r["threads"]), r["product"], _label(r), f"{r['intensity']:.1f}", f"{r['gflops_useful']:.0f}",
                f"{r['roof_fraction']:.0%}", r["level"] or "registers",
            )  # fmt: skip
    show(table)


# ---- steps -----------------------------------------------------------------------------------------------------------


def print_step(result: dict[str, Any]) -> None:
    """Rows of training steps."""
    table = Table(
        title=f"training step, {words.count(result['model']['parameters'])} parameters, "
        f"{result['rows'][0]['threads']} threads",
        title_justify="left",
    )
    for column in ("sparsity", "attention", "dense by", "dtype", "compiled", "first step", "s/step", "95 % interval",
                   "speed-up", "95 % interval", "disturbed", "state of its layers", "of the model"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in result["rows"]:
        memory = row["memory"]
        shares = (
            [f"{memory[k]['sparse'] / memory[k]['dense']:.0%}" for k in ("sparsified", "model")] if memory else ["", ""]
        )
        table.add_row(
            f"{row['sparsity']:.4g}", row["attention"], row["dense_products"], row["dtype"],
            "yes" if row["compiled"] else "", f"{row['prepare_seconds']:.1f}", f"{row['seconds_median']:.3f}",
            f"{row['seconds_low']:.3f}-{row['seconds_high']:.3f}", speedup(row),
            f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}", f"{row['disturbed_rounds']} of {row['rounds']}", *shares,
        )  # fmt: skip
    show(table)
    tell(
        "Speed-up: median of the ratios of a round's steps, dense float32 over the other, and its 95 % interval. "
        "bfloat16: under autocast."
    )
    tell(f"Beside the state, the sparse kernels keep {result['scratch_bytes'] / 2**20:.0f} MiB of working memory.")
    _print_rest(result)


def print_decode(result: dict[str, Any]) -> None:
    """Rows of generation."""
    table = Table(
        title=f"generation, {words.count(result['model']['parameters'])} parameters after {result['context']} tokens, "
        f"{result['rows'][0]['threads']} threads",
        title_justify="left",
    )
    for column in ("sparsity", "dtype", "batch", "tokens/s", "MB a token", "of dense fp32", "95 % interval",
                   "of dense bf16"):  # fmt: skip
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


def print_update(result: dict[str, Any]) -> None:
    """What moves of a mask take beside steps of its layer."""
    first = result["rows"][0]
    shape = f"{first['tokens']} tokens, {first['in_features']} -> {first['out_features']}"
    title = f"an update of {shape}, {first['drop_fraction']:.0%} dropped, {first['threads']} threads"
    table = Table(title=title, title_justify="left")
    for column in ("sparsity", "step, ms", "update, ms", "of it plans, ms", "in steps", "95 %"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        times = (f"{1e3 * row[key]:.1f}" for key in ("step_seconds", "update_seconds", "plan_seconds"))
        spread = f"{row['share_low']:.2f}-{row['share_high']:.2f}"
        table.add_row(f"{row['sparsity']:.4g}", *times, f"{row['share_of_step']:.2f}", spread)
    show(table)


# ---- what is said of both --------------------------------------------------------------------------------------------


def _print_rest(result: dict[str, Any]) -> None:
    """How quiet the machine was, what was not timed, and what changed since an earlier result."""
    _tell_of_quiet(result)
    if result["missing"]:
        tell("not timed: " + "; ".join(f"{name} ({reason})" for name, reason in result["missing"].items()))
    if "comparison" in result:
        _print_comparison(result["comparison"])


def _print_comparison(found: dict[str, Any]) -> None:
    tell(f"Against the earlier result: {found['verdict']}.")
    for kind in ("wrong", "right", "faster", "slower"):
        for row in found[kind][:20]:
            of = [str(row[key]) for key in ("mask", "product", "candidate", "attention") if row.get(key) is not None]
            size = f"{row['tokens']}x{row['in_features']}x{row['out_features']}, " if "tokens" in row else ""
            was, now = (f"{row[key]:.2f}x" if key in row else "wrong" for key in ("old", "new"))
            change = f" ({row['change'] - 1:+.0%})" if "change" in row else ""
            tell(
                f"  {kind}: {', '.join(of)}, {size}sparsity {row['sparsity']:.4g}, {row['threads']} threads, "
                f"{row['dtype']}: {was} -> {now}{change}"
            )


def _tell_of_quiet(result: dict[str, Any]) -> None:
    """What keeps figures from being results: others at work, rounds that they disturbed, what cannot be."""
    from vspdf.bench.rounds import busy

    rows = result["rows"]
    if line := busy(result["load"]):
        tell(line)
    felt = [f"{before[key]:.0f} to {after[key]:.0f} {unit}" for before, after in [tuple(result["sensors"].values())]
            for key, unit in (("mhz", "MHz"), ("celsius", "°C")) if key in before and key in after]  # fmt: skip
    disturbed, rounds = (sum(row[key] for row in rows) for key in ("disturbed_rounds", "rounds"))
    if rounds:
        tell(f"{disturbed / rounds:.0%} of all rounds were disturbed." + f" Sensors: {', '.join(felt)}." * bool(felt))
    if any(2 * row["disturbed_rounds"] > row["rounds"] for row in rows):
        tell("More than half of some rounds were disturbed: all of these count then, and are worth little.")
    if not all(row["possible"] for row in rows):
        tell("(no result): above the FMA peak, or of steps above what the sparsity allows: disturbed.")
