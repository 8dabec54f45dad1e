"""What fills a run directory, file by file; each is replaced whole or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vspdf.config import loading
from vspdf.config.loading import FREE_TO_CHANGE, differences
from vspdf.config.resolved import ResolvedConfig
from vspdf.errors import UserError
from vspdf.files import write_whole
from vspdf.runs import folder as names
from vspdf.runs import masks
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
        If the directory holds a run already, none to resume, or one that was configured otherwise.
    """
    run = Run(Path(config.run_dir))
    if run.begun and not resume:
        raise UserError(
            f"run_dir '{run.folder}' already holds a run: `resume` goes on with it, run_dir=... starts another."
        )
    if not resume:
        return config
    if not run.begun:
        raise UserError(f"nothing to resume: '{run.folder}' holds no run.")
    config = config.with_data(run.config.model.vocab_size, run.config.data.first_sequence)
    for key, (old, new) in differences(loading.to_dict(run.config), loading.to_dict(config)).items():
        if key in ("train.threads", "train.device"):
            log.warning("resuming with %s = %s instead of %s: results will differ in the last bits.", key, new, old)
        elif key not in FREE_TO_CHANGE:
            raise UserError(f"cannot resume '{run.folder}': {key} was {old}, is now {new}.{_beyond(run)}")
    return config


def _beyond(run: Run) -> str:
    """The tail of an error message on a run that cannot go on so: what can."""
    return f" The run is finished: init_from={run.folder} with another run_dir begins from it." if run.finished else ""


class Writer:
    """Writes a run directory. Of several processes one holds it.

    Raises
    ------
    UserError
        From every method, if the file cannot be written: what was there before is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, config: ResolvedConfig, tokenizer: str, manifest: Mapping[str, Any]) -> None:
        """Makes the directory: only with model and data at hand, so that a run that cannot start leaves nothing.

        Parameters
        ----------
        config : ResolvedConfig
        tokenizer : str
            Content of its file.
        manifest : mapping
            What the data is, and in which order it is read.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir '{self.folder}' cannot be made: {error.strerror}.") from None
        write_whole(self.folder / names.TOKENIZER, tokenizer)
        write_whole(self.folder / names.MANIFEST, json.dumps(manifest, indent=1))
        write_whole(self.folder / names.CONFIG, loading.to_yaml(config))

    def go_on_from(self, step: int) -> None:
        """Drops metrics after the step a run goes on from, and a line that a killed process left half written."""
        path, kept = self.folder / names.METRICS, []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except ValueError:
                    continue
        write_whole(path, "".join(kept))

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line to the metrics."""
        path = self.folder / names.METRICS
        try:
            with path.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from None

    def masks(self, phase: int, patterns: Mapping[str, Pattern]) -> None:
        """Writes the positions at the start of a phase, by layer."""
        masks.write(self.folder / names.masks_file(phase), patterns)

    def summary(self, body: Mapping[str, Any]) -> None:
        """Writes what the run did, at its end."""
        write_whole(self.folder / names.SUMMARY, json.dumps(body, indent=1))

    def evaluation(self, body: Mapping[str, Any]) -> None:
        """Writes what a study measures on a run that is finished, or why it diverged."""
        write_whole(self.folder / names.EVALUATION, json.dumps(body))

    def answers(self, lines: Sequence[str]) -> None:
        """Writes what a study's fine-tuned model answered to the test part of its task."""
        write_whole(self.folder / names.ANSWERS, "".join(f"{line}\n" for line in lines))
