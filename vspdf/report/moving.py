"""Masks that moved in a run: how far they got, how much of what grew stayed, and how they looked before and after."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vspdf.draw.png import mask_png
from vspdf.draw.svg import Series, line_chart
from vspdf.errors import UserError
from vspdf.pattern import Pattern
from vspdf.report.weights import CROP, INK
from vspdf.runs.checkpoint import MODEL
from vspdf.runs.folder import Run

PICTURES = 2  # layers whose masks are drawn
_CURVES = {
    "sparsity": "sparsity",
    "coverage": "positions that were ever alive",
    "survival": "of what grew last, still there",
    "mask_overlap": "of the first masks, still there",
}


def moving(run: Run) -> dict[str, Any] | None:
    """Curves over the steps, figures by phase, and pictures of masks before and after; None where no mask moves."""
    phases = run.config.phases
    if all(phase.algorithm == "static" for phase in phases):
        return None
    lines = [line for line in run.lines if "coverage" in line]
    if not lines:
        return {"missing": "No mask has moved yet."}
    series = []
    for i, (key, name) in enumerate(_CURVES.items()):
        known = [line for line in (run.lines if key == "sparsity" else lines) if key in line]
        series.append(Series(name, [line["step"] for line in known], [100 * line[key] for line in known], i))
    rows = [
        (phase.name, phase.algorithm, f"{done['masks']['mask_updates']:,}", *_shares(done["masks"]))
        for phase, done in zip(phases, run.summary.get("phases", ()), strict=False)
        if "masks" in done
    ]
    return {
        "chart": line_chart(
            series, title="Masks over the steps", x_label="step", y_label="%", y_limits=(0.0, 100.0)
        ),
        "legend": [(s.name, i) for i, s in enumerate(series)],
        "rows": rows or [("so far", "", f"{lines[-1]['mask_updates']:,}", *_shares(lines[-1]))],
        "pictures": _pictures(run),
    }  # fmt: skip


def _shares(figures: dict[str, Any]) -> tuple[str, ...]:
    keys = ("coverage", "survival", "mask_overlap")
    return tuple(f"{figures[key]:.1%}" if key in figures else "–" for key in keys)


def _phase(run: Run) -> int:
    """The last phase in which masks have moved."""
    reached = run.lines[-1]["phase"]
    moves = [i for i, phase in enumerate(run.config.phases) if phase.algorithm != "static"]
    now = next((i for i, phase in enumerate(run.config.phases) if phase.name == reached), 0)
    return max((i for i in moves if i <= now), default=moves[0])


def _after(run: Run) -> dict[str, np.ndarray]:
    """Masks at the end of the last phase in which they moved, or at the last checkpoint in it."""
    if masks := run.end_masks(_phase(run)):
        return dict(masks)
    if run.checkpoint is None:
        return {}
    path, found = run.checkpoint / MODEL, {}
    shapes = {name: mask.shape for name, mask in run.masks(_phase(run)).items()}
    try:
        with safe_open(path, framework="pt") as tensors:
            for name in (key.removesuffix(".pattern") for key in tensors.keys() if key.endswith(".pattern")):  # noqa: SIM118
                if name in shapes:
                    found[name] = Pattern(shapes[name], tensors.get_tensor(f"{name}.pattern").numpy()).mask().numpy()
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    return found


def _pictures(run: Run) -> list[dict[str, str]]:
    """Corners of some layers' masks when the phase began, and where they got to; dense before they were pruned."""
    first, found = run.masks(_phase(run)), []
    for name, after in itertools.islice(_after(run).items(), PICTURES):
        before = first.get(name, np.ones_like(after))
        for when, mask in (("before", before), ("after", after)):
            crop = mask[:CROP, :CROP]
            both = (before & after)[:CROP, :CROP].sum() / max(1, crop.sum())
            shared = f", {both:.0%} of it there before" if when == "after" else ""
            found.append({
                "source": mask_png(crop, INK), "alt": f"mask of {name} {when}",
                "caption": f"{name} {when}: {crop.mean():.1%} kept{shared}",
            })  # fmt: skip
    return found
