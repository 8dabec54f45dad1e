"""What a run did, or several side by side, as one HTML file that needs no network.

Everything comes from the files of the run directories, so a report can be drawn at any time: of a run that is going on,
one that was stopped, or one that is done.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from vspdf.draw import page, words
from vspdf.draw.svg import Band, Series, line_chart
from vspdf.errors import UserError
from vspdf.files import write_whole
from vspdf.report import run_parts
from vspdf.report.comparison import AXES, Arm, Axis, arms_of, compare, curve, evaluated, measure
from vspdf.runs.folder import REPORT, Run, read
from vspdf.runs.record import sparsities

log = logging.getLogger("vspdf")

TEMPLATE = Path(__file__).with_name("templates") / "run.html"
POINTS = 120  # of a training curve: more lines than that are averaged


# -- writing ----------------------------------------------------------------------------------------------------------


def write(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Writes a report.

    Parameters
    ----------
    folders : sequence of Path
        Run directories; several are compared.
    output : Path, optional
        Default: `report.html`, of one run in its directory, of several in the current one.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    UserError
        As `vspdf.runs.folder.read`, if the file cannot be written, or if `output` is there and no page.
    """
    if output is not None:
        _must_be_a_page(output)
    text = render(read(folders))
    output = output or (folders[0] if len(folders) == 1 else Path()) / REPORT
    write_whole(output, text)
    return output


def _must_be_a_page(path: Path) -> None:
    """Refuses to write over what is no HTML: reports are drawn anew, a slip of the name must not cost a file."""
    try:
        with path.open("rb") as file:
            begin = file.read(512).lstrip()
    except OSError:  # not there, or writing says what is wrong
        return
    if not begin.lower().startswith((b"<!doctype html", b"<html")):
        raise UserError(f"'{path}' exists and is no HTML page: it is not overwritten; name another or move it away.")


def refresh(folder: Path) -> None:
    """Draws a run's report anew while it trains; what goes wrong is a warning, for the run must go on."""
    try:
        write([folder])
    except Exception as error:
        log.warning("%s was not drawn: %s", REPORT, " ".join(str(error).split()) or type(error).__name__)


def render(runs: Sequence[Run]) -> str:
    """The report of a run, or of several, as HTML."""
    arms, alone = arms_of(runs), len(runs) == 1
    return page.render(
        TEMPLATE,
        title=runs[0].config.name if alone else f"{len(runs)} runs",
        status=[run_parts.status(run) for run in runs],
        tiles=run_parts.tiles(runs[0]) if alone else [],
        losses=_losses(arms),
        comparison=None if alone else _comparison(arms),
        head=run_parts.HEAD,
        figures=[row for run in runs for row in run_parts.rows(run)],
        runs=[(run.label, run_parts.parts(run, drawn=alone)) for run in runs],
    )


# -- losses -----------------------------------------------------------------------------------------------------------


def _losses(arms: Sequence[Arm]) -> dict[str, Any] | None:
    runs = [run for arm in arms for run in arm.runs]
    if not any(run.lines for run in runs):
        return None
    key, name = measure(runs)
    # Side by side it is validation that is compared: training loss, noisy and high at first, would flatten it.
    training = key == "val_loss" and (len(arms) == 1 or not any(run.evaluations for run in runs))
    averaged = max(-(-len(run.lines) // POINTS) for run in runs)
    pale = f"mean of {averaged} logged steps each" if averaged > 1 else "each logged step"
    notes = ["Dots: validation." + (f" Pale: training, {pale}." if training else "")]
    if any(len(run.config.phases) > 1 for run in runs):
        notes.append("Dashed: a switch to the next phase. Shaded: the sparser a phase, the darker.")
    notes.append("Training time is that of the steps alone, without evaluations and dense steps measured beside them.")
    return {
        "legend": [(arm.name, i) for i, arm in enumerate(arms)] if len(arms) > 1 else [],
        "charts": [_loss_chart(arms, axis, key, name, training) for axis in AXES],
        "note": " ".join(notes),
    }


def _loss_chart(arms: Sequence[Arm], axis: Axis, key: str, name: str, training: bool) -> Element:
    curves = [(i, run, curve(run)) for i, arm in enumerate(arms) for run in arm.runs]
    divisor, unit = words.scale(max(axis.value(points[-1]) for _, _, points in curves if points), axis.unit)
    series: list[Series] = []
    bands: list[Band] = []
    for i, run, points in curves:
        if training:
            losses = _thinned([point["loss"] for point in points])
            series.append(Series(run.label, _thinned([x / divisor for x in axis.along(points)]), losses, i, faint=True))
        known = evaluated(points)
        x = [x / divisor for x in axis.along(known)]
        series.append(Series(run.label, x, [point[key] for point in known], i, dots=True))
        if run is arms[i].runs[0] and points:
            row = None if len(arms) == 1 else len(arms) - 1 - i
            bands.extend(_bands(run, points, axis, divisor, i, row))
    shown = [y for s in series for y in s.y]
    series.sort(key=lambda s: not s.faint)  # validation on top
    return line_chart(
        series, bands, title=f"{name} against {axis.name}", x_label=f"{axis.name} ({unit})", y_label=name,
        y_limits=(min(shown), max(shown)) if shown else (0.0, 1.0),
    )  # fmt: skip


def _bands(
    run: Run, points: Sequence[dict[str, Any]], axis: Axis, divisor: float, index: int, row: int | None
) -> list[Band]:
    """Where the phases of a run were on an axis, as far as it got."""
    bands, start, end_step = [], 0.0, 0
    for phase, done in zip(run.config.phases, run.phases, strict=False):  # the last of them may not have begun
        end_step += phase.steps
        until = [point for point in points if point["step"] <= end_step]
        end = axis.value(until[-1]) / divisor if until else start
        if end > start:
            bands.append(Band(start, end, phase.name, sparsities(done)[2], index, row))
        start = end
    return bands


def _thinned(values: Sequence[float]) -> list[float]:
    """At most `POINTS` values: means of equal stretches."""
    return [float(np.mean(part)) for part in np.array_split(values, min(len(values), POINTS))] if values else []


# -- several runs -----------------------------------------------------------------------------------------------------


def _comparison(arms: Sequence[Arm]) -> dict[str, Any]:
    """Arms at equal budgets, and in `missing` why they cannot be compared."""
    runs = [run for arm in arms for run in arm.runs]
    orders: dict[str, list[str]] = {}
    for run in runs:
        orders.setdefault(run.manifest["order"][:16], []).append(run.label)
    body: dict[str, Any] = {"orders": [(order, ", ".join(labels)) for order, labels in orders.items()]}
    if len({run.manifest["corpus"]["sha256"] for run in runs}) > 1:
        return body | {"missing": "The corpora differ, so losses are not compared."}
    if not all(run.evaluations for run in runs):
        return body | {"missing": "Losses are compared once every run has been evaluated."}
    key, name = measure(runs)
    found = compare(arms, key)
    scaled = [(axis, budget, words.scale(budget, axis.unit)) for axis, budget in found.budgets]
    head: list[Any] = ["run"]
    head += [(f"at equal {axis.name}", f"{budget / by:.3g} {unit}") for axis, budget, (by, unit) in scaled]
    machines = {json.dumps(run.summary.get("hardware"), sort_keys=True) for run in runs}
    return body | {
        "name": name,
        "head": [*head, "at its own end"],
        "rows": [(name, *(_cell(body) for body in row)) for name, row in found.spreads.items()],
        "first": arms[0].name,
        "differences": [
            (name, *(_cell(body, "+.4f") for body in row))
            for name, row in found.differences.items()
            if any(body["mean"] is not None for body in row)
        ],
        "amounts_differ": len({run.config.train.eval_tokens for run in runs}) > 1,
        "machines_differ": len(machines) > 1,
    }


def _cell(body: dict[str, Any] | None, form: str = ".4f") -> tuple[str, ...]:
    """A mean with its interval below, and of a difference the verdict."""
    if body is None or body["mean"] is None:
        return ("–",)
    around = () if body["low"] is None else (words.between(body, form),)
    return (words.number(body["mean"], form), *around, *([body["verdict"]] if around and "verdict" in body else []))
