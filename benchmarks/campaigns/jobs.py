"""The commands that are disturbed, tiny ones, each with what its folder holds when nothing disturbs it."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import signal
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaigns.trial import Arms, End, content, import_what_it_imports, run

CONFIG = """
name: tiny
run_dir: run
model: {vocab_size: 300, n_layer: 1, d_model: 32, n_head: 2, sequence_length: 16}
data: {corpus: ../text.txt, tokenizer: ../tokenizer.json, validation_fraction: 0.1}
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
    """A command; the same command again goes on with it, with `resume` where its run directory holds something."""

    name: str
    arguments: list[Any]
    resume: list[Any] | None = None
    wanted: dict[str, str] | None = None
    operations: int = 0

    def again(self, folder: Path) -> list[Any]:
        begun = (folder / "run").is_dir() and any((folder / "run").iterdir())
        return self.resume if self.resume and begun else self.arguments


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
        self.done = self.folder / "done"  # holds run/ and cache/
        say("what the commands import")
        warm = self.room()
        small = ["phases=[{sparsity: 0.5, steps: 3}]", "train.eval_every=0"]
        import_what_it_imports(
            [["train", "../tiny.yaml", "data.tokenizer=bpe:300", *small], ["convert", "run", "hf"],
             ["eval", "run", "--text", "../sample.txt"]],
            warm,
        )  # fmt: skip
        shutil.copy(warm / "run" / "tokenizer.json", self.folder)  # trained once for all
        self.done.mkdir()
        self._must(run(["train", "../tiny.yaml"], self.done))
        resume = ["train", "../tiny.yaml", "--resume"]
        tune = ["finetune", "../done/run", "../fine.yaml"]
        self.jobs = {
            job.name: job
            for job in (
                Job("train", ["train", "../tiny.yaml"], resume),
                Job("finetune", tune, [*tune, "--resume"]),
                Job("convert", ["convert", "../done/run", "out"]),
                Job("generate", ["generate", "../done/run", "--input", "../pairs.jsonl", "--output", "answers.txt",
                                 "--tokens", "4", "--beams", "1", "--limit", "4", "--overlong", "cut"]),
                Job("report", ["report", "../done/run", "--output", "report.html"]),
                Job("plan", ["plan", "--model", "../tiny.yaml", "--sparsity", "0.8", "--write", "plan.yaml"]),
            )
        }  # fmt: skip
        for job in self.jobs.values():
            trial = self.room()
            end = self._must(run(job.arguments, trial))
            job.wanted, job.operations = content(trial), end.operations
            self.clear(trial)
        self.half = self.room()  # interrupted, to be resumed
        run(
            self.jobs["train"].arguments,
            self.half,
            Arms(self.jobs["train"].operations * 6 // 10, signal=signal.SIGTERM),
        )

    def _must(self, end: End) -> End:
        if end.status != 0:
            raise SystemExit(f"an undisturbed command failed: {end.err}")
        return end

    def among(self, names: list[str]) -> list[tuple[str, Job]]:
        return [(name, job) for name, job in self.jobs.items() if not names or name in names]

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
