"""Masks of a run directory, phase by phase."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from vspdf.errors import UserError, did_you_mean, near_path
from vspdf.shapes import Shape


@dataclass(frozen=True)
class Run:
    """A finished run: its shape, every phase's masks {layer: bool [out, in]} (none: dense), what its summary says."""

    folder: Path
    shape: Shape
    masks: list[dict[str, np.ndarray]]
    summary: dict[str, Any]

    @property
    def patterns(self) -> dict[str, np.ndarray]:
        """Of the first phase."""
        return self.masks[0]

    def batch(self, phase: dict[str, Any]) -> int:
        return _batch(phase, self.shape)

    @property
    def first(self) -> dict[str, Any]:
        return self.summary["phases"][0]

    def mask(self, name: str) -> np.ndarray:
        """Of one layer.

        Raises
        ------
        UserError
            If the run has no sparse layer of that name.
        """
        if name not in self.patterns:
            raise UserError(f"'{self.folder}' has no sparse layer '{name}'.{did_you_mean(name, self.patterns)}")
        return self.patterns[name]


def _batch(phase: dict[str, Any], shape: Shape) -> int:
    return max(1, round(phase["tokens"] / phase["steps"] / shape.sequence_length))


def read_run(folder: Path) -> Run:
    """Reads a run directory's summary and masks.

    Raises
    ------
    UserError
        If it holds no finished run, or a file is broken.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"'{folder}' holds no run: expected a directory that `vspdf train` filled.{near_path(folder)}")
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text())
        dims = {key: summary["model"][key] for key in Shape.__dataclass_fields__}
    except FileNotFoundError:
        raise UserError(f"'{folder}' has no summary.json: the run is not finished (vspdf train --resume).") from None
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    return Run(folder, Shape(**dims), read_masks(folder, len(summary["phases"])), summary)


def masks_file(index: int) -> str:
    """Where a run directory holds the masks at the start of its phase `index`, if it was sparse."""
    return f"patterns-{index + 1}.npz" if index else "patterns.npz"


def read_masks(folder: Path, phases: int) -> list[dict[str, np.ndarray]]:
    """Masks of every phase of a run, by layer; none where it was dense, or where an older run did not keep them.

    Raises
    ------
    UserError
        For a file that is damaged.
    """
    return [_read_masks(folder / masks_file(index)) for index in range(phases)]


def _read_masks(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        with np.load(path) as arrays:
            masks = {}
            for name in (name for name in arrays.files if not name.endswith(".shape")):
                rows, columns = (int(n) for n in arrays[f"{name}.shape"])
                flat = np.unpackbits(arrays[name], count=rows * columns, bitorder="little")
                masks[name] = flat.view(np.bool_).reshape(rows, columns)
            return masks
    except (ValueError, KeyError, OSError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} is damaged: {error}.") from None
