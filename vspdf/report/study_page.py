"""The page of a study and its plot, drawn from its results alone."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from vspdf.draw import words
from vspdf.draw.page import figure, page, section
from vspdf.draw.svg import Series, interval_chart, legend, line_chart
from vspdf.draw.words import between, listed, number
from vspdf.errors import UserError
from vspdf.files import write_whole
from vspdf.report.tables import (
    OTHER_AXES,
    WEIGHTS,
    Axis,
    _clocks,
    _mean,
    _task_tables,
    _tuning_table,
    main_axes,
    notes,
    table,
    task_table,
    undisturbed,
)


def write(results: dict[str, Any], root: Path) -> None:
    """Writes `results.json`, `results.csv`, for tasks `tasks.csv`, and `comparison.html`."""
    write_whole(root / "results.json", json.dumps(results, indent=1) + "\n")
    write_whole(root / "results.csv", table(results))
    if results["tasks"]:
        write_whole(root / "tasks.csv", task_table(results))
    write_whole(root / "comparison.html", render(results))


# -- the page ---------------------------------------------------------------------------------------------------------


def render(results: dict[str, Any]) -> str:
    """The page of a study, from its results alone."""
    every = [results["arms"], *(task["arms"] for task in results.get("tasks", []))]
    done = sum(len(arm["runs"]) for arms in every for arm in arms)
    badge = ("done", "complete") if results["complete"] else ("open", "not complete")
    head = (
        f"<header><h1>{escape(results['study'])}</h1>"
        f'<p><span class="badge {badge[0]}">{badge[1]}</span> {max(map(len, every))} arms, {done} runs, '
        f"seeds {escape(', '.join(map(str, results['seeds'])))}</p><p>{escape(results['about'])}</p></header>"
    )
    sections = [_tasks(results)] if results.get("tasks") else []
    sections += [_losses(results), _differences(results)]
    if any(run["curve"] for arm in results["arms"] for run in arm["runs"]):
        sections.append(_curves(results))
    sections += [_tuning(results), _runs(results), _facts(results)]
    return page(results["study"], [head, *sections])


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]], attributes: str = "") -> str:
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    return f'<div class="scroll"><table{attributes}><tr>{heads}</tr>{body}</table></div>'


def _tasks(results: dict[str, Any]) -> str:
    drawn = [
        f"<h3>{escape(table.title)}</h3>"
        + _html_table(table.head, [[escape(cell) for cell in row] for row in table.rows])
        for table in _task_tables(results)
    ]
    return section("After fine-tuning", "".join(drawn), "A verdict is given only where the interval leaves out "
                          "zero. The texts that were scored are in answers.txt in each run's folder.")  # fmt: skip


def _losses(results: dict[str, Any]) -> str:
    rows, clocks = [], _clocks(results)
    for i, arm in enumerate(results["arms"]):
        stages = ", ".join(f"{phase['sparsity']:.0%}: {phase['steps']:,}" for phase in arm["phases"])
        relative = arm["relative_flops"] or {}
        rows.append((
            f'<i class="c{i % 8}"></i> {escape(arm["name"])}', escape(stages),
            number(arm["test_loss"]["mean"]), between(arm["test_loss"]),
            number(_mean(arm, "val_loss")), number(_mean(arm, "test_bits_per_byte")), str(len(arm["runs"])),
            f"{arm['runs'][0]['tokens']:,}" if arm["runs"] else "–",
            *(number(relative.get(name), ".1%") for name in ("linear", "spdf", "executed")),
            *(number(_mean(arm, key), ".0f") for _, key in clocks),
        ))  # fmt: skip
    head = (
        "arm", "sparsity: steps", "test loss", "95 % interval of the mean", "validation loss",
        "test bits/byte", "seeds", "tokens", "weight-FLOPs", "all FLOPs (spdf)", "executed",
        *(name for name, _ in clocks),
    )  # fmt: skip
    return section(
        "Losses of pre-training" if results.get("tasks") else "Losses",
        _html_table(head, rows),
        escape(" ".join(notes(results))),
    )


def _differences(results: dict[str, Any]) -> str:
    pairs = [pair for pair in results["paired"] if pair["mean"] is not None]
    if not pairs:
        return section("Paired differences", "<p>No two arms have finished runs of the same seed yet.</p>")
    axes = main_axes(results["arms"])
    rows, bars = [], []
    for pair in pairs:
        equal = [pair["at_equal"][axis.name] for axis in axes]
        rows.append((
            f"{escape(pair['a'])} − {escape(pair['b'])}", f"{pair['mean']:+.4f}", between(pair, "+.4f"),
            str(len(pair["seeds"])), f"{escape(pair['a'])}: {pair['verdict']}",
            *(f"{number(at['mean'], '+.4f')}<br><small>{between(at, '+.4f')}</small>" for at in equal),
        ))  # fmt: skip
        span = None if pair["low"] is None else (pair["low"], pair["high"])
        bars.append((f"{pair['a']} − {pair['b']}", pair["mean"], span))
    head = ["pair", "test loss, mean", "95 % interval", "seeds", "verdict"]
    head += [f"at equal {axis.name}" for axis in axes]
    chart = interval_chart(bars, title="Paired differences", x_label="difference of test losses (nats a token)")
    return section(
        "Paired differences", f'<div class="grid2">{figure(chart)}</div>{_html_table(head, rows)}',
        "Below zero: the first of the two has the lower loss. A verdict is given only where the interval leaves out "
        "zero. At equal tokens, FLOPs or time: validation loss while training, where both had spent what the shorter "
        "run spent in all; the longer one is in the middle of its learning rate schedule there.",
    )  # fmt: skip


def _curves(results: dict[str, Any]) -> str:
    arms = results["arms"]
    head = legend([(arm["name"], i) for i, arm in enumerate(arms)])
    main, other = ("".join(figure(_chart(arms, axis)) for axis in axes) for axes in (main_axes(arms), OTHER_AXES))
    more = (
        "<details><summary>Against other counts of FLOPs</summary>"
        f'{head}<div class="grid3">{other}</div></details>'
    )  # fmt: skip
    return section(
        "Loss while training", f'{head}<div class="grid3">{main}</div>{more}',
        "Validation loss on a part of the validation text, means over seeds. Time is that of the training steps alone.",
    )  # fmt: skip


def _mean_curve(arm: dict[str, Any], axis: Axis) -> tuple[list[float], list[float]]:
    """Means over seeds, evaluation by evaluation."""
    curves = [run["curve"] for run in arm["runs"]]
    points = list(zip(*curves, strict=False)) if curves else []
    return (
        [statistics.fmean(axis.value(point) for point in at) for at in points],
        [statistics.fmean(point["val_loss"] for point in at) for at in points],
    )


def _chart(arms: Sequence[dict[str, Any]], axis: Axis) -> str:
    curves = [_mean_curve(arm, axis) for arm in arms]
    divisor, unit = words.scale(max(x for xs, _ in curves for x in xs), axis.unit)
    series = [
        Series(arm["name"], [x / divisor for x in xs], ys, i, dots=True)
        for i, (arm, (xs, ys)) in enumerate(zip(arms, curves, strict=True))
    ]
    shown = [y for _, ys in curves for y in ys[len(ys) // 5 :]]  # the first fall would flatten the rest
    return line_chart(
        series, title=f"loss against {axis.name}", x_label=f"{axis.name} ({unit})", y_label="validation loss",
        y_limits=(min(shown), max(shown)),
    )  # fmt: skip


def _tuning(results: dict[str, Any]) -> str:
    tried = _tuning_table(results)
    if not tried.rows:
        return ""
    return section(
        "Tuning", _html_table(tried.head, [[escape(cell) for cell in row] for row in tried.rows]),
        f"On the validation text, seeds {', '.join(map(str, results['tuning_seeds']))}; one setting after the other, "
        "of a task all combinations. The test text was not read.",
    )  # fmt: skip


def _runs(results: dict[str, Any]) -> str:
    lines = list(csv.reader(io.StringIO(table(results))))
    if not lines:
        return ""
    keep = [i for i, name in enumerate(lines[0]) if name not in ("study", "cpu", *results["versions"])]
    head, *rows = ([escape(line[i]) for i in keep] for line in lines)
    body = _html_table(head, rows, ' id="figures"') + '<button id="copy" type="button">Copy table</button>'
    return section("All runs", f"<details><summary>{len(rows)} runs</summary>{body}</details>")


def _facts(results: dict[str, Any]) -> str:
    corpus = results["corpus"] or {}
    text = {
        part: f"{corpus[part]['documents']:,} documents, {corpus[part]['bytes']:,} bytes"
        for part in ("train", "validation", "test")
        if corpus
    }
    source = corpus.get("corpus", {})
    facts = {
        "command": results["command"], "runs at a time": results["jobs"], "corpus": source.get("name"),
        "corpus sha256": source.get("sha256"), **text, **results["hardware"], **results["versions"],
    }  # fmt: skip
    orders = {run["seed"]: run["order"][:16] for arm in results["arms"] for run in arm["runs"]}
    facts |= {f"data order of seed {seed}": order for seed, order in orders.items()}
    rows = [(escape(str(key)), escape(listed(value))) for key, value in facts.items()]
    return section("Details", _html_table((), rows, ' class="facts"'))


def plot(results: dict[str, Any], path: Path) -> None:
    """Mean validation loss over tokens, executed FLOPs and time (or weight-FLOPs), and the paired differences.

    The differences are of BLEU where the study has tasks, else of test losses.

    Raises
    ------
    UserError
        If matplotlib is missing or the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError("a plot needs the package 'matplotlib': pip install 'vspdf[plot]'.") from None
    labelled = [(f"{task['name']}: ", pair) for task in results["tasks"] for pair in task["paired"]]
    labelled = labelled or [("", pair) for pair in results["paired"]]
    pairs = [(label, pair) for label, pair in reversed(labelled) if pair["mean"] is not None]
    drawing, grid = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    *panels, last = grid.flat
    shown_axes = main_axes(results["arms"])
    if not undisturbed(results):  # times that are not to be quoted are not to be read off either
        shown_axes = (*shown_axes[:2], WEIGHTS)
    for axis, panel in zip(shown_axes, panels, strict=True):
        shown = []
        for arm in results["arms"]:
            xs, ys = _mean_curve(arm, axis)
            panel.plot(xs, ys, marker=".", markersize=3, linewidth=1.3, label=f"{arm['name']} ({len(arm['runs'])})")
            shown.extend(ys[len(ys) // 5 :])
        if shown:
            panel.set_ylim(min(shown) - 0.02, max(shown))
        unit = "" if axis.unit in axis.name else f" ({axis.unit})"
        panel.set(xlabel=f"{axis.name}{unit}", ylabel="validation loss (nats a token)")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8, title="arm (seeds)", title_fontsize=8)
    for i, (_, pair) in enumerate(pairs):
        clear = pair["low"] is not None and not pair["low"] <= 0 <= pair["high"]
        tone = "tab:blue" if clear else "tab:gray"
        if pair["low"] is not None:
            last.plot((pair["low"], pair["high"]), (i, i), color=tone)
        last.plot(pair["mean"], i, "o", color=tone)
    last.axvline(0, color="gray", linewidth=0.8, linestyle="--")
    last.set_yticks(range(len(pairs)), [f"{label}{pair['a']} − {pair['b']}" for label, pair in pairs], fontsize=8)
    last.set(xlabel=f"difference of {'BLEU' if results['tasks'] else 'test losses'}, 95 % interval")
    try:
        drawing.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise UserError(f"the plot cannot be written to '{path}': {error}.") from None
    finally:
        pyplot.close(drawing)
