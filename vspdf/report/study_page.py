"""The page of a study and its plot, drawn from its results alone."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from vspdf.draw import page, svg, words
from vspdf.draw.svg import Series, interval_chart, line_chart
from vspdf.draw.words import between, listed, number
from vspdf.errors import UserError
from vspdf.files import write_whole
from vspdf.report import tables
from vspdf.report.comparison import OTHER_AXES, WEIGHTS, Axis, whole

TEMPLATE = Path(__file__).with_name("templates") / "study.html"


def write(results: dict[str, Any], root: Path) -> None:
    """Writes `results.json`, `results.csv`, for tasks `tasks.csv`, and `comparison.html`."""
    write_whole(root / "results.json", json.dumps(results, indent=1) + "\n")
    write_whole(root / "results.csv", tables.table(results))
    if results["tasks"]:
        write_whole(root / "tasks.csv", tables.task_table(results))
    write_whole(root / "comparison.html", render(results))


# -- the page ---------------------------------------------------------------------------------------------------------


def render(results: dict[str, Any]) -> str:
    """The page of a study as HTML, from its results alone."""
    tasks = results.get("tasks", [])
    every = [results["arms"], *(task["arms"] for task in tasks)]
    return page.render(
        TEMPLATE,
        title=results["study"],
        results=results,
        arms=max(map(len, every)),
        done=sum(len(arm["runs"]) for arms in every for arm in arms),
        seeds=listed(results["seeds"]),
        tasks=tables.task_tables(results),
        losses=_losses(results),
        notes=" ".join(tables.notes(results)),
        differences=_differences(results),
        curves=_curves(results) if any(map(_drawn, results["arms"])) else None,
        tuning=tables.tuning_table(results),
        tuning_seeds=listed(results["tuning_seeds"]),
        runs=_runs(results),
        facts=_facts(results),
    )


def _losses(results: dict[str, Any]) -> dict[str, Any]:
    rows, clocks = [], tables.clocks(results)
    for arm in results["arms"]:
        relative, ended = arm["relative_flops"] or {}, whole(arm["runs"])
        rows.append((
            arm["name"], ", ".join(f"{phase['sparsity']:.0%}: {phase['steps']:,}" for phase in arm["phases"]),
            number(arm["test_loss"]["mean"]), between(arm["test_loss"]),
            number(tables.mean(arm, "val_loss")), number(tables.mean(arm, "test_bits_per_byte")), str(len(ended)),
            f"{ended[0]['tokens']:,}" if ended else "–",
            *(number(relative.get(name), ".1%") for name in ("linear", "spdf", "executed")),
            *(number(tables.mean(arm, key), ".0f") for _, key in clocks),
        ))  # fmt: skip
    head = (
        "arm", "sparsity: steps", "test loss", "95 % interval of the mean", "validation loss",
        "test bits/byte", "seeds", "tokens", "weight-FLOPs", "all FLOPs (spdf)", "executed",
        *(name for name, _ in clocks),
    )  # fmt: skip
    return {"head": head, "rows": rows}


def _differences(results: dict[str, Any]) -> dict[str, Any] | None:
    pairs = [pair for pair in results["paired"] if pair["mean"] is not None]
    if not pairs:
        return None
    axes = tables.main_axes(results["arms"])
    rows = [
        (
            f"{pair['a']} − {pair['b']}", f"{pair['mean']:+.4f}", between(pair, "+.4f"), str(len(pair["seeds"])),
            f"{pair['a']}: {pair['verdict']}",
            *((number(each["mean"], "+.4f"), between(each, "+.4f")) for each in _at_equal(pair, axes)),
        )
        for pair in pairs
    ]  # fmt: skip
    head = ("pair", "test loss, mean", "95 % interval", "seeds", "verdict", *(f"at equal {axis.name}" for axis in axes))
    return {"head": head, "rows": rows, "chart": _intervals([("", pair) for pair in pairs], "test losses")}


def _at_equal(pair: dict[str, Any], axes: Sequence[Axis]) -> list[dict[str, Any]]:
    return [pair["at_equal"][axis.name] for axis in axes]


def _intervals(pairs: Sequence[tuple[str, dict[str, Any]]], what: str) -> Element:
    rows = [
        (
            f"{label}{pair['a']} − {pair['b']}",
            pair["mean"],
            None if pair["low"] is None else (pair["low"], pair["high"]),
        )
        for label, pair in pairs
    ]
    return interval_chart(rows, title="Paired differences", x_label=f"difference of {what}, 95 % interval")


def _curves(results: dict[str, Any]) -> dict[str, Any]:
    arms = results["arms"]
    return {
        "legend": [(arm["name"], i) for i, arm in enumerate(arms)],
        "main": [_chart(arms, axis) for axis in tables.main_axes(arms)],
        "other": [_chart(arms, axis) for axis in OTHER_AXES],
    }


def _drawn(arm: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs that an arm's mean is drawn of: those that diverged end early, and would end it."""
    return [run for run in whole(arm["runs"]) if run["curve"]]


def _chart(arms: Sequence[dict[str, Any]], axis: Axis) -> Element:
    """Mean losses of the arms, evaluation by evaluation, in a pale area from the lowest to the highest of the seeds."""
    points = [list(zip(*(run["curve"] for run in _drawn(arm)), strict=False)) for arm in arms]
    divisor, unit = words.scale(max(axis.value(point) for every in points for at in every for point in at), axis.unit)
    series: list[Series] = []
    shown: list[float] = []
    for i, (arm, every) in enumerate(zip(arms, points, strict=True)):
        losses = [[point["val_loss"] for point in at] for at in every]
        several = len(_drawn(arm)) > 1
        x = [statistics.fmean(axis.value(point) for point in at) / divisor for at in every]
        area = ([min(some) for some in losses], [max(some) for some in losses]) if several else None
        series.append(Series(arm["name"], x, [statistics.fmean(some) for some in losses], i, dots=True, spread=area))
        shown.extend(loss for some in losses[len(losses) // 5 :] for loss in some)  # the first fall would flatten it
    return line_chart(
        series, title=f"loss against {axis.name}", x_label=f"{axis.name} ({unit})",
        y_label="loss (nats a token)", y_limits=(min(shown), max(shown)),
    )  # fmt: skip


def _runs(results: dict[str, Any]) -> dict[str, Any] | None:
    lines = list(csv.reader(io.StringIO(tables.table(results))))
    if not lines:
        return None
    keep = [i for i, name in enumerate(lines[0]) if name not in ("study", "cpu", *results["versions"])]
    head, *rows = ([line[i] for i in keep] for line in lines)
    return {"head": head, "rows": rows}


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
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
    return [(str(key), listed(value)) for key, value in facts.items()]


# -- the plot ---------------------------------------------------------------------------------------------------------


def check_plot(path: Path) -> None:
    """Refuses a plot's name before anything runs.

    Raises
    ------
    UserError
        For a name that does not end in .svg, or a missing folder.
    """
    if path.suffix != ".svg":
        raise UserError(f"a plot of a study is an SVG: expected a name ending in .svg, not '{path}'.")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}.")


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws an SVG: mean validation loss over tokens, executed FLOPs and time, and the paired differences.

    Where times are not to be quoted, weight-FLOPs take their place. The differences are of BLEU where the study has
    tasks, else of test losses.

    Raises
    ------
    UserError
        As `check_plot`, or if the file cannot be written.
    """
    check_plot(path)
    arms, tasks = results["arms"], results.get("tasks", [])
    axes = tables.main_axes(arms)
    if not tables.undisturbed(results):  # times that are not to be quoted are not to be read off either
        axes = (*axes[:2], WEIGHTS)
    panels = []
    if any(map(_drawn, arms)):
        panels += [(f"Validation loss against {axis.name}", _chart(arms, axis)) for axis in axes]
    labelled = [(f"{task['name']}: ", pair) for task in tasks for pair in task["paired"]]
    labelled = labelled or [("", pair) for pair in results["paired"]]
    pairs = [(label, pair) for label, pair in labelled if pair["mean"] is not None]
    if pairs:
        what = "BLEU" if tasks else "test losses"
        panels.append((f"Paired differences of {what}", _intervals(pairs, what)))
    entries = [(f"{arm['name']} ({len(_drawn(arm))} seeds)", i) for i, arm in enumerate(arms)]
    title = f"{results['study']}: means over seeds; shaded: lowest to highest"
    write_whole(path, svg.sheet(title, entries, panels))
