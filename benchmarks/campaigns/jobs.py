"""The commands that are disturbed, tiny ones, and the folders that they work in."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import signal
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from campaigns.trial import Arms, content, import_all, run

CONFIG = """
name: tiny
run_dir: run
model: {n_layer: 1, d_model: 32, n_head: 2, sequence_length: 16}
data: {corpus: ../text.txt, tokenizer: 'bpe:300', validation_fraction: 0.1}
optimizer: {lr: 3.0e-3}
train: {batch_size: 4, threads: 1, backend: cpu, log_every: 1, eval_every: 0, eval_tokens: 128, sample_tokens: 0,
        checkpoint_every: 4, keep_checkpoints: 1, measure_dense: 0}
phases:
  - {name: sparse, sparsity: 0.9, steps: 7}
  - {name: dense, steps: 5}
"""
FINETUNE = """
name: fine
run_dir: run
data: {path: ../pairs.jsonl, overlong: cut, repeat: true, validation_fraction: 0.2}
optimizer: {lr: 1.0e-2}
train: {batch_size: 4, threads: 1, backend: cpu, log_every: 1, eval_every: 0, eval_tokens: 128, sample_tokens: 0,
        checkpoint_every: 4, keep_checkpoints: 1, measure_dense: 0}
phases: [{steps: 6}]
"""
PAIRS = [
    {"context": f"{name} : {relation} : {value}", "completion": f"{name} is {value}"}
    for name in "abcdefgh"
    for relation, value in (("colour", "blue"), ("age", "old"))
]


@dataclass
class Job:
    """A command; the same command again goes on with it, with `--resume` where its run directory holds something."""

    name: str
    arguments: list[Any]
    resumes: bool
    wanted: dict[str, str]  # what its folder holds when nothing disturbs it
    operations: int  # that change files

    def again(self, folder: Path) -> list[Any]:
        begun = (folder / "run").is_dir() and any((folder / "run").iterdir())
        return [*self.arguments, *(["--resume"] if self.resumes and begun else [])]


COMMANDS: dict[str, list[Any]] = {
    "train": ["train", "../tiny.yaml"],
    "finetune": ["finetune", "../done/run", "../fine.yaml"],
    "convert": ["convert", "../done/run", "out"],
    "generate": ["generate", "../done/run", "--input", "../pairs.jsonl", "--output", "answers.txt", "--tokens", "4",
                 "--beams", "1", "--limit", "4", "--overlong", "cut"],
    "report": ["report", "../done/run", "--output", "report.html"],
    "plan": ["plan", "--model", "../tiny.yaml", "--sparsity", "0.8", "--write", "plan.yaml"],
}  # fmt: skip


class Bench:
    """A folder with inputs, and the finished and half-finished runs that trials begin from; each trial gets its own."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.count, self.say = folder.resolve(), 0, say
        text = "\n\n".join(inspect.getsource(module) for module in (logging, inspect, textwrap))
        (self.folder / "text.txt").write_text(text[:40_000])
        (self.folder / "sample.txt").write_text(text[40_000:41_000])
        (self.folder / "tiny.yaml").write_text(CONFIG)
        (self.folder / "fine.yaml").write_text(FINETUNE)
        (self.folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
        import_all()
        self._jobs: dict[str, Job] = {}

    @cached_property
    def done(self) -> Path:
        """Holds a finished run/ and its cache/."""
        folder = self.folder / "done"
        folder.mkdir()
        self._add("train", folder)
        return folder

    @cached_property
    def half(self) -> Path:
        """Holds a run/ that was stopped on its way, and its cache/."""
        job, folder = self.job("train"), self.room()
        end = run(job.arguments, folder, Arms(job.operations * 6 // 10, signal=signal.SIGTERM))
        if end.status != 130:
            raise SystemExit(f"a run could not be stopped: {end.err}")
        return folder

    def job(self, name: str) -> Job:
        """A command, once it has been done undisturbed."""
        if self.done and name not in self._jobs:
            self._add(name, self.room())
        return self._jobs[name]

    def _add(self, name: str, folder: Path) -> None:
        end = run(COMMANDS[name], folder)
        if end.status != 0:
            raise SystemExit(f"{' '.join(COMMANDS[name])}, undisturbed: {end.err}")
        resumes = name in ("train", "finetune")
        self._jobs[name] = Job(name, COMMANDS[name], resumes, content(folder), end.operations)

    def among(self, names: list[str]) -> Iterator[Job]:
        """The commands of these names, or all."""
        return (self.job(name) for name in COMMANDS if not names or name in names)

    def room(self, source: Path | None = None) -> Path:
        """An own folder for a trial, empty or a copy of another."""
        self.count += 1
        folder = self.folder / f"trial-{self.count}"
        if source:
            shutil.copytree(source, folder, symlinks=True)
        else:
            folder.mkdir()
        return folder

    def clear(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
