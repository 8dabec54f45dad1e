"""A run directory: its files by name, and `Run`, which reads them. `vspdf.runs.writer` fills it."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vspdf.config import loading, resolve
from vspdf.config.resolved import ResolvedConfig
from vspdf.errors import UserError, near_path
from vspdf.files import read_json
from vspdf.runs import digests, forms, masks
from vspdf.runs.masks import Masks
from vspdf.runs.record import beside_dense, stages
from vspdf.shapes import Shape

if TYPE_CHECKING:
    from vspdf.pattern import Pattern

CONFIG = "config.yaml"  # as it was resolved
TOKENIZER = "tokenizer.json"
MANIFEST = "manifest.json"  # what the data is, and in which order it is read
METRICS = "metrics.jsonl"  # a line per logged step
CHECKPOINTS = "checkpoints"  # folders step-N, see `vspdf.runs.checkpoint`
_STEP = re.compile(r"step-[0-9]+")
STATE = "state.json"  # of a checkpoint
SUMMARY = "summary.json"  # once the run is finished
DIGEST = "summary.digest.json"  # of what the summary holds
REPORT = "report.html"
TENSORBOARD = "tensorboard"
EVALUATION = "evaluation.json"  # of a study's run: losses on all of the held-out text, or why it diverged
ANSWERS = "answers.txt"  # of a study's fine-tuning, to the test part of its task: a line each
LOCK = ".lock"  # while a process trains there
LOG = "worker.log"  # of a study's run: what its process said, until it ended well
START = "start"  # of a study's run that is not trained: its initial weights, as a Hugging Face folder


def masks_file(phase: int) -> str:
    """Name of the file with the masks at the start of a phase, if that was sparse."""
    return f"patterns-{phase + 1}.npz" if phase else "patterns.npz"


def end_masks_file(phase: int) -> str:
    """Name of the file with the masks at the end of a phase, if they moved in it."""
    return masks_file(phase).replace(".npz", "-end.npz")


def steps(folder: Path) -> list[Path]:
    """Whole checkpoints in the checkpoints folder of a run, oldest first; folders of other names are none."""
    found = (path for path in folder.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def damaged(file: Path) -> UserError:
    """The error that a file of a checkpoint is not what was written."""
    others = [path.name for path in steps(file.parent.parent) if path != file.parent]
    cure = "no other checkpoint is there"
    if others:
        cure = f"move that folder out of {CHECKPOINTS}/ to resume from {others[-1]}"
    return UserError(f"{file} is damaged (truncated or altered since it was written); {cure}.")


def read_state(path: Path) -> dict[str, Any]:
    """State of one checkpoint, without its tensors.

    Raises
    ------
    UserError
        If it is missing or altered.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        stated = state.pop("state_sha256")
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} has no {STATE}; it is not whole.") from None
    except OSError as error:
        raise UserError(f"{path / STATE} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise damaged(path / STATE) from None
    if digests.of_body(state) != stated:
        raise damaged(path / STATE)
    return state


def of_checkpoint(step: Path) -> Run:
    """The run that a checkpoint's folder belongs to."""
    return Run(step.parent.parent)


class Run:
    """A run directory. Each file is read when it is first asked for, and kept: a new `Run` sees what is new.

    Parameters
    ----------
    folder : Path
    label : str, optional
        What a report calls it; default: the folder's name.
    """

    def __init__(self, folder: Path, label: str | None = None) -> None:
        self.folder = folder
        self.label = label or folder.resolve().name

    @property
    def begun(self) -> bool:
        """Whether the directory holds a run at all."""
        return any((self.folder / name).exists() for name in (CONFIG, METRICS, CHECKPOINTS))

    @property
    def configured(self) -> bool:
        """Whether its configuration is there, so that it is a run and no mere folder of checkpoints."""
        return (self.folder / CONFIG).is_file()

    @property
    def finished(self) -> bool:
        """Whether the run is at its end."""
        return (self.folder / SUMMARY).exists()

    def require(self, *, finished: bool = False) -> Run:
        """The run itself.

        Raises
        ------
        UserError
            If the directory holds none, or one that is not finished where that is asked for.
        """
        folder = self.folder
        if not folder.exists():
            raise UserError(f"no run directory '{folder}'.{near_path(folder)}")
        if not self.configured:
            inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
            hint = f" Did you mean '{inside[0]}'?" if inside else ""
            raise UserError(f"'{folder}' holds no run: expected a directory that `vspdf train` filled.{hint}")
        if finished and not self.finished:
            raise UserError(f"'{folder}' has no {SUMMARY}: the run is not finished (vspdf train --resume).")
        return self

    def check(self, state: Mapping[str, Any] | None = None, *, whole: bool = True) -> Run:
        """The run itself, with files that are those that a checkpoint was written with; older ones do not tell.

        Parameters
        ----------
        state : mapping, optional
            Of the checkpoint, with `bytes` and `sha256` of `files` by name; default: of the last one. Metrics may have
            grown since.
        whole : bool
            Whether a missing file is an error.

        Raises
        ------
        UserError
            If one is missing or altered; the message names it.
        """
        state = self.state if state is None else state
        for name, was in state.get("files", {}).items():
            path = self.folder / name
            try:
                found = digests.of_file(path, was["bytes"] if name == METRICS else None)
            except FileNotFoundError:
                if not whole or not self.configured:  # a folder of checkpoints that were taken out of their run
                    continue
                raise UserError(f"{path} is missing: the run directory is not whole.") from None
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}.") from None
            if found != was["sha256"]:
                if name == METRICS:
                    _ = self.lines  # may name the line
                raise UserError(
                    f"{path} is damaged: it was another when step {state['step']} was saved. Put back a copy of it."
                )
        return self

    # -- what was wanted -----------------------------------------------------------------------------------------------

    @cached_property
    def config(self) -> ResolvedConfig:
        """The configuration, resolved."""
        return loading.load(self.require().folder / CONFIG)

    @cached_property
    def shape(self) -> Shape:
        """Shape of the model."""
        return resolve.model_shape(self.config.model)

    @property
    def total_steps(self) -> int:
        """Steps that are wanted, over all phases."""
        return self.config.steps

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the data is: `corpus`, `tokenizer`, parts, and `order`, a hash of the order in which it is read."""
        return _json(self.folder / MANIFEST, forms.MANIFEST)

    @property
    def tokenizer(self) -> Path:
        """Of the tokenizer's file."""
        return self.folder / TOKENIZER

    # -- what was done -------------------------------------------------------------------------------------------------

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """Lines of the metrics."""
        return lines_of(self.folder / METRICS)

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """Lines of the metrics at which the model was evaluated."""
        return [line for line in self.lines if "val_loss" in line]

    @property
    def step(self) -> int:
        """Steps done so far, as the last whole line of the metrics tells now; 0 before there is one."""
        try:
            with open(self.folder / METRICS, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                ends = file.read().split(b"\n")
            return int(json.loads(ends[-2])["step"])
        except (OSError, ValueError, IndexError, KeyError, TypeError):
            return 0

    @property
    def checkpoints(self) -> list[Path]:
        """Folders of whole checkpoints, oldest first."""
        return steps(self.folder / CHECKPOINTS)

    @cached_property
    def checkpoint(self) -> Path | None:
        """Folder of the last checkpoint."""
        return self.checkpoints[-1] if self.checkpoints else None

    @cached_property
    def state(self) -> dict[str, Any]:
        """What the last checkpoint says beside its tensors; empty where there is none."""
        return read_state(self.checkpoint) if self.checkpoint else {}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the run did, from its end; empty before that."""
        body = _json(self.folder / SUMMARY, forms.SUMMARY, needed=False)
        stated = _json(self.folder / DIGEST, {}, needed=False)
        if body and stated and stated != {"sha256": digests.of_body(body)}:
            raise UserError(f"{self.folder / SUMMARY} is damaged; `vspdf train --resume` writes it again.")
        return body

    @property
    def evaluation(self) -> dict[str, Any]:
        """Of a study's run, losses on all of the held-out text, or why it diverged; empty where not known yet."""
        body = _json(self.folder / EVALUATION, forms.EVALUATION, needed=False)
        stated = body.pop("sha256", None)
        if stated not in (None, digests.of_body(body)):
            raise UserError(f"{self.folder / EVALUATION} is damaged: without it, `vspdf compare` measures it again.")
        return body

    def masks(self, phase: int) -> Masks:
        """Masks by layer at the start of a phase; none where it was dense, or where an older run did not keep them."""
        return masks.read(self.folder / masks_file(phase))

    def end_masks(self, phase: int) -> Masks:
        """Masks by layer at the end of a phase in which they moved; none before it is over."""
        return masks.read(self.folder / end_masks_file(phase))

    @cached_property
    def patterns(self) -> dict[str, Pattern]:
        """Patterns by layer at the start of the first phase; none where it was dense."""
        from vspdf.pattern import Pattern  # brings torch

        return {name: Pattern(*stored) for name, stored in self.masks(0).bits.items()}

    @cached_property
    def phases(self) -> list[dict[str, Any]]:
        """As in the summary; of a run that is not finished, what metrics and the last checkpoint say so far."""
        if phases := self.summary.get("phases"):
            _check_form(self.folder / SUMMARY, self.summary, {"phases": [forms.WHOLE_PHASE]})
            return phases
        return list(self._phases_so_far())

    def _phases_so_far(self) -> Iterator[dict[str, Any]]:
        before: dict[str, Any] = {"step": 0, "tokens": 0, "training_seconds": 0.0, "flops": dict.fromkeys(COLUMNS, 0)}
        ends = np.cumsum([phase.steps for phase in self.config.phases])
        layers = resolve.linear_layers(self.config.model)
        records = self.state.get("records") or [{}] * len(ends)
        for phase, end, record in zip(self.config.phases, ends, records, strict=True):
            mine = [line for line in self.lines if before["step"] < line["step"] <= end]
            if not mine:
                return
            last, pairs = mine[-1], record.get("paired_seconds") or []
            body = {
                "name": phase.name,
                "sparsity": phase.mean(layers, phase.stages()[0].sparsity),
                "stages": stages(phase, layers, last["step"] - before["step"]),
                "steps": last["step"] - before["step"],
                "tokens": last["tokens"] - before["tokens"],
                "seconds": last["training_seconds"] - before["training_seconds"],
                "step_seconds_median": statistics.median(line["step_seconds"] for line in mine),
                "loss": last["loss"],
                "val_loss": None,
                "val_bits_per_byte": None,
                "flops": {column: last["flops"][column] - before["flops"][column] for column in COLUMNS},
                "time_fractions": record.get("parts") or {},
            }
            for line in mine:
                body.update({key: line[key] for key in ("val_loss", "val_bits_per_byte") if key in line})
            yield body | (beside_dense(pairs) if pairs else {})
            before = last


COLUMNS = ("dense", "useful", "executed")  # of FLOPs


def read(folders: Sequence[Path]) -> list[Run]:
    """Run directories, each under a label that no other has.

    Raises
    ------
    UserError
        If a directory holds no run or is given twice, or none is given.
    """
    if not folders:
        raise UserError("a report needs at least one run directory.")
    names = [folder.resolve().name for folder in folders]
    runs: list[Run] = []
    for folder, name in zip(folders, names, strict=True):
        if any(folder.resolve() == other.folder.resolve() for other in runs):
            raise UserError(f"'{folder}' is given twice.")
        runs.append(Run(folder, name if names.count(name) == 1 else str(folder)).require().check())
    return runs


def lines_of(path: Path, form: forms.Form = forms.LINE) -> list[dict[str, Any]]:
    """Lines of metrics; a last line without its end is one that a process is writing, or died in: left out.

    Raises
    ------
    UserError
        If a line is broken or stands after one of a later step; the message names it.
    """
    lines: list[dict[str, Any]] = []
    try:
        texts = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    for number, text in enumerate(texts[:-1], 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {number} is broken: expected a JSON object, got {text[:40]!r}.") from None
        if why := forms.wrong_line(line, form, lines[-1] if lines else None):
            raise UserError(f"{path}, line {number} is broken: {why}.")
        lines.append(line)
    return lines


def _json(path: Path, form: forms.Form, *, needed: bool = True) -> dict[str, Any]:
    """What a file of a form holds; empty where it is missing and not `needed`."""
    if not path.exists():
        if not needed:
            return {}
        raise UserError(f"{path} is missing: the run directory is not whole.")
    body = read_json(path)
    _check_form(path, body, form)
    return body


def _check_form(path: Path, body: Any, form: forms.Form) -> None:
    if why := forms.wrong(body, form):
        raise UserError(f"{path} cannot be read: {why}.")
