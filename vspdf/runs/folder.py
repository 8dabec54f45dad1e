"""A run directory: names, writers and readers of its files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from vspdf.config import loading
from vspdf.config.resolved import ResolvedConfig
from vspdf.errors import UserError, near_path
from vspdf.pattern import Pattern
from vspdf.runs import checkpoint

_LINE = ("step", "phase", "sparsity", "tokens", "loss", "flops", "training_seconds", "step_seconds")


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run directory, read.

    Attributes
    ----------
    label : str
        Unique within the report.
    lines : list of dict
        Of `metrics.jsonl`.
    state : dict
        Of the last checkpoint's `state.json`; empty where there is none.
    summary : dict
        Of `summary.json`; empty while the run is not finished.
    """

    folder: Path
    label: str
    config: ResolvedConfig
    manifest: dict[str, Any]
    lines: list[dict[str, Any]]
    patterns: dict[str, Pattern]
    checkpoint: Path | None
    state: dict[str, Any]
    summary: dict[str, Any]

    @property
    def total_steps(self) -> int:
        return self.config.steps

    @property
    def step(self) -> int:
        return self.lines[-1]["step"] if self.lines else 0

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "val_loss" in line]

    @cached_property
    def phases(self) -> list[dict[str, Any]]:
        """As in the summary; of a run that is not finished, what metrics and the last checkpoint say so far."""
        return self.summary.get("phases") or list(self._phases_so_far())

    def _phases_so_far(self) -> Iterator[dict[str, Any]]:
        before: dict[str, Any] = {"step": 0, "tokens": 0, "training_seconds": 0.0, "flops": dict.fromkeys(_COLUMNS, 0)}
        ends = np.cumsum([phase.steps for phase in self.config.phases])
        records = self.state.get("records") or [{}] * len(ends)
        for phase, end, record in zip(self.config.phases, ends, records, strict=True):
            mine = [line for line in self.lines if before["step"] < line["step"] <= end]
            if not mine:
                return
            last, pairs = mine[-1], record.get("paired_seconds") or []
            body = {
                "name": phase.name,
                "sparsity": phase.sparsity,
                "steps": last["step"] - before["step"],
                "tokens": last["tokens"] - before["tokens"],
                "seconds": last["training_seconds"] - before["training_seconds"],
                "step_seconds_median": statistics.median(line["step_seconds"] for line in mine),
                "loss": last["loss"],
                "val_loss": None,
                "val_bits_per_byte": None,
                "flops": {column: last["flops"][column] - before["flops"][column] for column in _COLUMNS},
                "time_fractions": record.get("parts") or {},
            }
            for line in mine:
                body.update({key: line[key] for key in ("val_loss", "val_bits_per_byte") if key in line})
            if pairs:
                mine_median, dense = (statistics.median(column) for column in zip(*pairs, strict=True))
                ratios = [b / a for a, b in pairs]
                body["dense_step_seconds_median"] = dense
                body["speedup"] = {"median": dense / mine_median, "low": min(ratios), "high": max(ratios)}
            yield body
            before = last


_COLUMNS = ("dense", "useful", "executed")


def read(folders: Sequence[Path]) -> list[Run]:
    """Reads run directories.

    Raises
    ------
    UserError
        If a directory holds no run, is given twice, or a file of it is broken; the message names it, and the line.
    """
    if not folders:
        raise UserError("a report needs at least one run directory.")
    names = [folder.resolve().name for folder in folders]
    runs: list[Run] = []
    for folder, name in zip(folders, names, strict=True):
        if any(folder.resolve() == other.folder.resolve() for other in runs):
            raise UserError(f"'{folder}' is given twice.")
        runs.append(_read(folder, name if names.count(name) == 1 else str(folder)))
    return runs


def _read(folder: Path, label: str) -> Run:
    if not folder.exists():
        raise UserError(f"no run directory '{folder}'.{near_path(folder)}")
    if not (folder / "config.yaml").is_file():
        inside = sorted(path.parent for path in folder.glob("*/config.yaml")) if folder.is_dir() else []
        hint = f" Did you mean '{inside[0]}'?" if inside else ""
        raise UserError(f"'{folder}' holds no run: expected a directory that `vspdf train` filled.{hint}")
    config = loading.load(folder / "config.yaml")
    found = checkpoint.checkpoints(folder / "checkpoints")
    return Run(
        folder, label, config,
        manifest=_json(folder / "manifest.json"),
        lines=_metrics(folder / "metrics.jsonl"),
        patterns=_patterns(folder / "patterns.npz"),
        checkpoint=found[-1] if found else None,
        state=_json(found[-1] / "state.json") if found else {},
        summary=_json(folder / "summary.json") if (folder / "summary.json").exists() else {},
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the run directory is not whole.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics; a last line without its end is one that a process is writing, or died in: left out."""
    lines = []
    try:
        texts = path.read_text().split("\n")
    except FileNotFoundError:
        return []
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    for number, text in enumerate(texts[:-1], 1):
        try:
            line = json.loads(text)
        except ValueError:
            raise UserError(f"{path}, line {number} is broken: expected a JSON object, got {text[:40]!r}.") from None
        if missing := [key for key in _LINE if not isinstance(line, dict) or key not in line]:
            raise UserError(f"{path}, line {number} is broken: it has no '{missing[0]}'.")
        lines.append(line)
    return lines


def _patterns(path: Path) -> dict[str, Pattern]:
    """Which weights the first phase had, by layer; none where it was dense."""
    if not path.exists():
        return {}
    try:
        with np.load(path) as arrays:
            names = [name for name in arrays.files if not name.endswith(".shape")]
            return {name: Pattern(tuple(arrays[f"{name}.shape"]), arrays[name]) for name in names}
    except (ValueError, KeyError, OSError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} is damaged: {error}.") from None


# -- what runs leave behind -------------------------------------------------------------------------------------------


def evaluation(folder: Path) -> dict[str, Any]:
    """What is known of a finished run: losses on all of the held-out text, or why it diverged; empty before that."""
    try:
        return json.loads((folder / "evaluation.json").read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / 'evaluation.json'} cannot be read: {error}.") from None
