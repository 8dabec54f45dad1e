"""What fills a run directory, file by file; each is replaced whole or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vspdf.config import loading
from vspdf.config.loading import differences, free_to_change
from vspdf.config.resolved import ResolvedConfig
from vspdf.errors import UserError
from vspdf.files import flush, lock, write_whole
from vspdf.runs import folder as names
from vspdf.runs import forms, masks
from vspdf.runs.digests import Digest, of_body
from vspdf.runs.folder import Run

if TYPE_CHECKING:
    from vspdf.pattern import Pattern

log = logging.getLogger("vspdf")


def check(config: ResolvedConfig, resume: bool) -> ResolvedConfig:
    """That the run directory is free, or to `resume`, that its run can go on as configured.

    Returns
    -------
    ResolvedConfig
        The configuration; of a run that goes on, with what data decided where it leaves that open.

    Raises
    ------
    UserError
        If the directory holds a run already, none to resume, one that was configured otherwise, or one whose
        checkpoints are gone.
    """
    run = Run(Path(config.run_dir))
    if run.begun and not resume:
        raise _taken(run.folder)
    if not resume:
        return config
    if not run.begun:
        raise UserError(f"nothing to resume: '{run.folder}' holds no run.")
    try:
        config = config.with_data(run.config.model.vocab_size, run.config.data.first_sequence)
    except UserError:
        run.check()  # says more
        raise
    for key, (old, new) in differences(loading.to_dict(run.config), loading.to_dict(config)).items():
        if key in ("train.threads", "train.device", "train.data_parallel"):
            log.warning("resuming with %s = %s instead of %s: results will differ in the last bits.", key, new, old)
        elif key not in free_to_change(run.config):
            run.check()
            raise UserError(f"cannot resume '{run.folder}': {key} was {old}, is now {new}.{_beyond(run)}")
    if not run.checkpoints and (run.finished or run.step > _first_checkpoint(run.config)):
        how = "is finished" if run.finished else f"had come to step {run.step}"
        raise UserError(
            f"cannot resume '{run.folder}': the run {how}, its {names.CHECKPOINTS}/ is gone; put it back, or remove "
            f"'{run.folder}' to train anew."
        )
    return config


def _first_checkpoint(config: ResolvedConfig) -> int:
    """The step after which a run has a checkpoint at the latest."""
    train, due = config.train, [config.steps]
    due += [train.checkpoint_every] if train.checkpoint_every else []
    if train.keep_best:  # the first evaluation is the best so far
        due += [train.eval_every or config.steps, config.phases[0].steps]
    return min(due)


def _beyond(run: Run) -> str:
    """The tail of an error message on a run that cannot go on so: what can."""
    return f" The run is finished: init_from={run.folder} with another run_dir begins from it." if run.finished else ""


class Writer:
    """Writes a run directory. Of several processes one holds it: as a context, from `hold` or `begin` to its end.

    Raises
    ------
    UserError
        From every method, if the file cannot be written: what was there before is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Digest] = {}  # what was written, for checkpoints
        self._held = ExitStack()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *how: object) -> None:
        self._held.close()

    def hold(self) -> None:
        """Locks the directory, which is there, against other processes.

        Raises
        ------
        UserError
            If another process holds it.
        """
        try:
            self._held.enter_context(lock(self.folder / names.LOCK, f"run_dir '{self.folder}'"))
        except OSError as error:
            raise UserError(f"run_dir '{self.folder}' cannot be written: {error.strerror}.") from None

    def begin(
        self, config: ResolvedConfig, tokenizer: str, manifest: Mapping[str, Any], *, again: bool = False
    ) -> None:
        """Makes the directory: only with model and data at hand, so that a run that cannot start leaves nothing.

        Parameters
        ----------
        config : ResolvedConfig
        tokenizer : str
            Content of its file.
        manifest : mapping
            What the data is, and in which order it is read.
        again : bool
            Whether this is held already, and has a run that was cut off before its first checkpoint.

        Raises
        ------
        UserError
            If another process was faster.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            flush(self.folder.parent)
        except OSError as error:
            raise UserError(f"run_dir '{self.folder}' cannot be made: {error.strerror}.") from None
        if not again:
            self.hold()
            if Run(self.folder).begun:
                raise _taken(self.folder)
        self._write(names.TOKENIZER, tokenizer)
        self._write(names.MANIFEST, json.dumps(manifest, indent=1))
        self._write(names.CONFIG, loading.to_yaml(config))
        self._write(names.METRICS, "")

    def go_on_from(self, step: int) -> None:
        """Drops metrics after the checkpoint of a step, and a line that a killed process left half written."""
        run, path = Run(self.folder), self.folder / names.METRICS
        try:
            kept = path.read_bytes()
            if stated := run.state.get("files"):  # the checkpoint was read, so that they were compared
                kept = kept[: stated[names.METRICS]["bytes"]]
            else:  # an older version's
                stated = (
                    names.TOKENIZER,
                    names.MANIFEST,
                    names.CONFIG,
                    *(file.name for file in self.folder.glob("patterns*.npz")),
                )
                lines = names.lines_of(path, {"step": forms.LINE["step"]})
                kept = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step).encode()
            there = (self.folder / name for name in stated)
            self._files = {file.name: Digest(file.read_bytes()) for file in there if file.is_file() and file != path}
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from None
        self._write(names.METRICS, kept)

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line to the metrics."""
        path, text = self.folder / names.METRICS, (json.dumps(line) + "\n").encode()
        try:
            with path.open("ab") as stream:
                stream.write(text)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from None
        self._files.setdefault(names.METRICS, Digest()).grow(text)

    def synced(self) -> dict[str, dict[str, Any]]:
        """Waits until the metrics are on disk; length and digest of every file so far, for a checkpoint."""
        path = self.folder / names.METRICS
        try:
            flush(path)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from None
        return {name: digest.to_json() for name, digest in self._files.items()}

    def masks(self, phase: int, patterns: Mapping[str, Pattern]) -> None:
        """Writes the positions at the start of a phase, by layer."""
        self._write(names.masks_file(phase), masks.packed(patterns))

    def end_masks(self, phase: int, patterns: Mapping[str, Pattern]) -> None:
        """Writes the positions at the end of a phase in which masks moved, by layer."""
        self._write(names.end_masks_file(phase), masks.packed(patterns))

    def summary(self, body: Mapping[str, Any]) -> None:
        """Writes what the run did, at its end."""
        text = json.dumps(body, indent=1)
        self._write(names.DIGEST, json.dumps({"sha256": of_body(json.loads(text))}))
        self._write(names.SUMMARY, text)

    def evaluation(self, body: Mapping[str, Any]) -> None:
        """Writes what a study measures on a run that is finished, or why it diverged."""
        self._write(names.EVALUATION, json.dumps({**body, "sha256": of_body(json.loads(json.dumps(body)))}))

    def answers(self, lines: Sequence[str]) -> str:
        """Writes what a study's fine-tuned model answered to the test part of its task; returns the file's digest."""
        self._write(names.ANSWERS, "".join(f"{line}\n" for line in lines))
        return self._files[names.ANSWERS].to_json()["sha256"]

    def _write(self, name: str, content: str | bytes) -> None:
        content = content.encode() if isinstance(content, str) else content
        write_whole(self.folder / name, content)
        self._files[name] = Digest(content)


def _taken(folder: Path) -> UserError:
    return UserError(f"run_dir '{folder}' already holds a run: `resume` goes on with it, run_dir=... starts another.")
