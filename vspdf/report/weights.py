"""What masks and weights of a run look like: which were kept, and how far the revived ones moved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vspdf.draw.png import mask_png
from vspdf.draw.svg import Series, line_chart
from vspdf.draw.words import power
from vspdf.errors import UserError
from vspdf.pattern import Pattern
from vspdf.runs.checkpoint import MODEL
from vspdf.runs.folder import Run

SAMPLED = 100_000  # weights of a layer that are looked at, in slices spread over its rows
CROP = 96  # rows and columns of a mask that are drawn
INK = (0x2A, 0x7F, 0xC9)  # of a kept weight


def masks(run: Run) -> dict[str, Any] | None:
    """Pictures of the first block's masks, and the sparsity of every layer; None where no layer was sparse."""
    if not run.patterns:
        return None
    rows: dict[str, dict[str, Pattern]] = {}
    for name, pattern in run.patterns.items():
        block = re.fullmatch(r"(.*?\.\d+)\.(.+)", name)
        row, column = block.groups() if block else (name, "")
        rows.setdefault(row, {})[column] = pattern
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    first, layers = next(iter(rows.items()))
    pictures = []
    for name, pattern in list(layers.items())[:4]:
        crop = pattern.mask().numpy()[:CROP, :CROP]
        full = f"{first}.{name}".rstrip(".")
        pictures.append({
            "source": mask_png(crop, INK), "alt": f"mask of {full}",
            "caption": f"{full}: first {crop.shape[0]} outputs, {crop.shape[1]} inputs; {crop.mean():.1%} kept",
        })  # fmt: skip
    return {
        "pictures": pictures, "columns": columns, "rows": rows,
        "kept": sum(pattern.nnz for pattern in run.patterns.values()),
        "numel": sum(pattern.numel for pattern in run.patterns.values()),
    }  # fmt: skip


def revived(run: Run) -> dict[str, Any] | None:
    """Magnitudes of revived weights beside those that were kept from the start, or in `missing` why there are none.

    None of a run that was dense from its first step.
    """
    if not run.patterns:
        return None
    if len(run.config.phases) == 1:
        return {"missing": "None: the run has one phase, so no masked weight was ever trained."}
    if run.checkpoint is None:
        return {"missing": "Not known before the first checkpoint."}
    step = run.state["step"]
    if run.state["phase"] == 0:
        return {"missing": f"None at the last checkpoint (step {step:,}): the first phase was not over."}
    kept, added = magnitudes(run.checkpoint / MODEL, run.patterns)
    moved = added[added > 0]
    if not (moved.size and kept.any()):
        return {"missing": f"There is nothing to compare at the last checkpoint (step {step:,})."}
    rows = [
        ("median", np.median(kept), np.median(added)),
        ("RMS", np.sqrt(np.mean(kept**2)), np.sqrt(np.mean(added**2))),
        ("largest", kept.max(), added.max()),
    ]
    series = _histograms(kept, moved)
    return {
        "step": step, "kept": kept.size, "revived": added.size, "zero": 1 - moved.size / added.size,
        "chart": line_chart(
            series, title="Magnitudes of weights", x_label="magnitude of a weight", y_label="% of weights",
            x_format=power, y_limits=(0.0, max(max(s.y) for s in series)),
        ),
        "legend": [(s.name, s.colour) for s in series],
        "rows": [(name, f"{a:.2e}", f"{b:.2e}", f"{b / a:.0%}") for name, a, b in rows],
    }  # fmt: skip


def _histograms(kept: np.ndarray, moved: np.ndarray) -> list[Series]:
    logs = [np.log10(values[values > 0]) for values in (kept, moved)]
    low, high = min(np.quantile(v, 0.001) for v in logs), max(float(v.max()) for v in logs)
    edges = np.linspace(low, high, 61)
    series = []
    for i, (name, values) in enumerate(zip(("kept from the start", "revived"), logs, strict=True)):
        share = np.histogram(values, edges)[0] / len(values) * 100
        series.append(Series(name, list(edges), [*share, share[-1]], i, steps=True))
    return series


def magnitudes(path: Path, first: dict[str, Pattern]) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes of weights that were kept from the start, and of those added since; large layers are sampled.

    Parameters
    ----------
    path : Path
        Of a checkpoint's tensors.
    first : dict of Pattern
        By layer, at the start of the first phase.

    Raises
    ------
    UserError
        If the file cannot be read.
    """
    kept, added = [], []
    try:
        with safe_open(path, framework="pt") as tensors:
            stored = set(tensors.keys())
            for name, pattern in first.items():
                mask = pattern.mask().numpy()
                if f"{name}.weight" in stored:
                    weight = tensors.get_slice(f"{name}.weight")
                    for rows in sample(*pattern.shape):
                        part = np.abs(weight[rows].float().numpy())
                        kept.append(part[mask[rows]])
                        added.append(part[~mask[rows]])
                elif f"{name}.values" in stored:  # sparser than the first phase, but sparse still
                    now = Pattern(pattern.shape, tensors.get_tensor(f"{name}.pattern").numpy())
                    was = mask[now.mask().numpy()]
                    values = np.abs(tensors.get_tensor(f"{name}.values").float().numpy())
                    kept.append(values[was])
                    added.append(values[~was])
    except (OSError, RuntimeError, SafetensorError) as error:  # it has each of them for an unreadable file
        raise UserError(f"{path} cannot be read: {error}.") from None
    return np.concatenate(kept), np.concatenate(added)


def sample(rows: int, columns: int) -> Iterator[slice]:
    """Up to eight stretches of rows, spread evenly, with about `SAMPLED` weights together."""
    wanted = max(8, SAMPLED // columns)
    if wanted >= rows:
        yield slice(0, rows)
        return
    for start in np.linspace(0, rows - wanted // 8, 8).astype(int):
        yield slice(int(start), int(start) + wanted // 8)
