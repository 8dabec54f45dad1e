"""Runs side by side: arms, the axis they are compared on, and paired differences."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from vspdf.config import loading
from vspdf.config.loading import FREE_TO_CHANGE
from vspdf.draw.page import section as section
from vspdf.draw.words import scale
from vspdf.runs.folder import Run

Axis = tuple[str, str, Callable[[dict[str, Any]], float]]  # name, unit, value of a line of metrics
AXES: tuple[Axis, ...] = (
    ("tokens", "tokens", lambda line: line["tokens"]),
    ("executed FLOPs", "FLOP", lambda line: line["flops"]["executed"]),
    ("training time", "s", lambda line: line["training_seconds"]),
)


@dataclass
class Arm:
    """Runs whose configurations differ in nothing but the seed, and names."""

    name: str
    runs: list[Run]


def _arms(runs: Sequence[Run]) -> list[Arm]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        body = loading.to_dict(run.config)
        for key in ("seed", *FREE_TO_CHANGE):
            *path, last = key.split(".")
            node = body
            for part in path:
                node = node[part]
            node.pop(last)
        groups.setdefault(json.dumps(body, sort_keys=True), []).append(run)
    arms, names = [], [group[0].config.name for group in groups.values()]
    for group in groups.values():
        name = group[0].label
        if len(group) > 1:
            shared = group[0].config.name
            name = f"{shared if names.count(shared) == 1 else name} ({len(group)} runs)"
        arms.append(Arm(name, group))
    return arms


def _measure(runs: Iterable[Run]) -> tuple[str, str]:
    """Key and name of the validation figure that these runs share: tokens differ between tokenizers, bytes do not."""
    same = len({json.dumps(run.manifest["tokenizer"], sort_keys=True) for run in runs}) == 1
    return ("val_loss", "loss (nats a token)") if same else ("val_bits_per_byte", "bits a byte")


# -- comparison -------------------------------------------------------------------------------------------------------


def at(run: Run, axis: Axis, budget: float, key: str) -> float | None:
    """Validation figure of a run where it had spent `budget` on an axis, between its evaluations; None outside them."""
    x = [axis[2](line) for line in run.evaluations]
    if not x or not x[0] <= budget <= x[-1] * (1 + 1e-9):
        return None
    return float(np.interp(budget, x, [line[key] for line in run.evaluations]))


def _comparison(arms: Sequence[Arm]) -> str:
    runs = [run for arm in arms for run in arm.runs]
    title = "Comparison"
    order = _same_order(runs)
    if len({run.manifest["corpus"]["sha256"] for run in runs}) > 1:
        return section(title, order, "The corpora differ, so losses are not compared.")
    if not all(run.evaluations for run in runs):
        return section(title, order, "Losses are compared once every run has been evaluated.")
    key, name = _measure(runs)
    head = ["<th>run</th>"]
    cells: dict[str, list[str]] = {arm.name: [] for arm in arms}
    pairs: dict[str, list[str]] = {arm.name: [] for arm in arms[1:]}
    for axis in AXES:
        budget = min(axis[2](run.evaluations[-1]) for run in runs)
        divisor, unit = scale(budget, axis[1])
        head.append(f"<th>at equal {axis[0]}<br><small>{budget / divisor:.3g} {unit}</small></th>")
        for arm in arms:
            cells[arm.name].append(_spread([at(run, axis, budget, key) for run in arm.runs]))
        for arm in arms[1:]:
            pairs[arm.name].append(_paired(arms[0], arm, axis, budget, key))
    head.append("<th>at its own end</th>")
    for arm in arms:
        cells[arm.name].append(_spread([run.evaluations[-1][key] for run in arm.runs]))
    rows = "".join(
        f'<tr><td><i class="c{i % 8}"></i> {escape(arm.name)}</td>'
        + "".join(f"<td>{cell}</td>" for cell in cells[arm.name])
        + "</tr>"
        for i, arm in enumerate(arms)
    )
    table = f'<div class="scroll"><table><tr>{"".join(head)}</tr>{rows}</table></div>'
    if any(cell for row in pairs.values() for cell in row):
        rows = "".join(
            f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{cell or '–'}</td>" for cell in row) + "</tr>"
            for name, row in pairs.items()
        )
        table += (
            f"<h3>Difference from {escape(arms[0].name)}, same data order</h3>"
            f'<div class="scroll"><table><tr>{"".join(head[:-1])}</tr>{rows}</table></div>'
        )
    notes = [
        f"Validation {name}, interpolated between evaluations; below a mean: lowest to highest of the seeds; –: "
        "a run had not been evaluated so early.",
        "The budget is the smallest that any run spent in all: a run that went on is read in the middle of its "
        "learning rate schedule there, which makes it look worse than one that was planned to end there.",
    ]
    if len({run.config.train.eval_tokens for run in runs}) > 1:
        notes.append("<b>The runs were evaluated on different amounts of text (train.eval_tokens).</b>")
    machines = {json.dumps(run.summary.get("hardware"), sort_keys=True) for run in runs}
    if len(machines) > 1:
        notes.append("<b>Hardware or threads differ, or are not known yet: equal time means little.</b>")
    return section(title, order + table, " ".join(notes))


def _same_order(runs: Sequence[Run]) -> str:
    orders: dict[str, list[str]] = {}
    for run in runs:
        orders.setdefault(run.manifest["order"], []).append(run.label)
    if len(orders) == 1:
        return f"<p>All runs read the same tokens in the same order: hash <code>{next(iter(orders))[:16]}</code>.</p>"
    rows = "".join(
        f"<tr><td><code>{order[:16]}</code></td><td>{escape(', '.join(labels))}</td></tr>"
        for order, labels in orders.items()
    )
    return (
        "<p>Runs beside the same hash read the same tokens in the same order.</p>"
        f'<div class="scroll"><table class="facts"><tr><th>data order</th><th>runs</th></tr>{rows}</table></div>'
    )


def _paired(base: Arm, arm: Arm, axis: Axis, budget: float, key: str) -> str:
    partner = {run.manifest["order"]: run for run in base.runs}
    differences = []
    for run in arm.runs:
        other = partner.get(run.manifest["order"])
        mine, theirs = at(run, axis, budget, key), at(other, axis, budget, key) if other else None
        if mine is not None and theirs is not None:
            differences.append(mine - theirs)
    return _spread(differences, "+.4f") if differences else ""


def _spread(values: Sequence[float | None], form: str = ".4f") -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "–"
    mean = f"{statistics.mean(known):{form}}"
    return mean if len(known) == 1 else f"{mean}<br><small>{min(known):{form}} to {max(known):{form}}</small>"
