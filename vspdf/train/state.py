"""A run under way, in one place: `start` makes it, the trainer's steps advance it, `log` tells of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vspdf.config.resolved import ResolvedConfig, ResolvedPhase
from vspdf.data import source
from vspdf.data.pairs import Pairs
from vspdf.data.text import Dataset
from vspdf.errors import UserError
from vspdf.kernels import hardware, tuning
from vspdf.ledger import Count
from vspdf.model import GPT
from vspdf.parallel.world import World
from vspdf.runs import checkpoint
from vspdf.runs.folder import Run
from vspdf.runs.record import PhaseRecord
from vspdf.shapes import Shape
from vspdf.sparsity.layer import build_plans, patterns_of
from vspdf.sparsity.phases import Phases
from vspdf.sparsity.turnover import Turnover
from vspdf.train.schedule import Position, position
from vspdf.train.step import adamw

log = logging.getLogger("vspdf")


@dataclass(frozen=True)
class Best:
    """The lowest validation loss of a phase, the step it was found after, and how many evaluations came since."""

    phase: int
    step: int
    val_loss: float
    since: int = 0


@dataclass
class State:
    """A run under way.

    Attributes
    ----------
    config : ResolvedConfig
        With what the data told filled in.
    device : torch.device
    data : Dataset or Pairs
        Samples by their global index, and held-out text.
    shape : Shape
    model : GPT
    phases : Phases
        The engine that has brought the model into the form it has.
    optimizer : torch.optim.Optimizer, optional
        None before the first phase, unless another run's moments are taken over.
    step : int
        Global steps done.
    seconds : float
        Wall clock, evaluation and checkpoints included.
    records : list of PhaseRecord
        What each phase has done.
    samples : list of dict
        Text generated at the ends of phases.
    saved_step : int, optional
        Step of the last checkpoint of this run.
    best : Best, optional
        Of the phase that was evaluated last.
    world : World
        Who trains it together.
    net : nn.Module, optional
        What a step runs where that is not the model itself: wrapped by `world`, anew whenever the model changes form.
    """

    config: ResolvedConfig
    device: torch.device
    data: Dataset | Pairs
    shape: Shape
    model: GPT
    phases: Phases
    optimizer: torch.optim.Optimizer | None = None
    step: int = 0
    seconds: float = 0.0
    records: list[PhaseRecord] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    saved_step: int | None = None
    best: Best | None = None
    world: World = field(default_factory=World)
    net: nn.Module | None = None

    # -- where it is -------------------------------------------------------------------------------------------------

    @property
    def place(self) -> Position:
        """Where the next step falls."""
        return position(self.config.phases, self.step)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or patience is at its end."""
        return self.step >= self.config.steps or self.out_of_patience

    @property
    def out_of_patience(self) -> bool:
        """Whether the last phase has been evaluated `train.patience` times in a row without getting better."""
        best, patience, last = self.best, self.config.train.patience, len(self.config.phases) - 1
        return 0 < patience and best is not None and best.phase == last and best.since >= patience

    @property
    def first_sample(self) -> int:
        """Global index of the run's first sample: other runs may have seen those before it."""
        return self.config.data.first_sequence or 0

    def batch(self, place: Position) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of a step."""
        return self.data.batch(self.first_sample + place.samples, self.config.phases[place.phase].batch_size)

    def tokens(self, step: int) -> int:
        """Tokens that the first `step` steps consume."""
        return self.data.tokens(position(self.config.phases, step).samples)

    @property
    def count(self) -> Count:
        """FLOPs done, over all phases."""
        total = Count()
        for record in self.records:
            total.add(record.tally.total)
        return total

    @property
    def cpu_seconds(self) -> float | None:
        """CPU time of all threads in steps; None where a part of the run did not count it."""
        counted = [record.cpu_seconds for record in self.records]
        return None if None in counted else math.fsum(counted)  # type: ignore[arg-type]

    def judge(self, phase: int, val_loss: float) -> bool:
        """Takes note of an evaluation, and says whether it is the best of its phase so far."""
        if self.best is None or phase != self.best.phase or val_loss < self.best.val_loss:
            self.best = Best(phase, self.step, val_loss)
            return True
        self.best = replace(self.best, since=self.best.since + 1)
        return False

    # -- optimizer and checkpoints -----------------------------------------------------------------------------------

    def renew_optimizer(self, phase: ResolvedPhase) -> torch.optim.Optimizer:
        """Makes an optimizer over the model's present parameters, with the state of the old one."""
        optimizer = adamw(self.model, self.config.optimizer, phase)
        if self.optimizer is not None:
            optimizer.state.update(self.optimizer.state)
        self.optimizer = optimizer
        return optimizer

    def wrapped(self, model: nn.Module) -> nn.Module:
        """A model as a step runs it."""
        return self.world.wrapped(model) if self.config.train.data_parallel == "ddp" else model

    def save(self, files: Mapping[str, Any]) -> None:
        """Writes a checkpoint of the last whole step, unless there is one. Of several ranks, the first.

        Parameters
        ----------
        files : mapping
            Digests of what the run directory holds so far, as `Writer.synced` gives them.
        """
        if self.saved_step == self.step:
            return
        config, revived, turnover = self.config, self.phases.revived, self.phases.turnover
        body = {
            "vspdf": hardware.versions()["vspdf"],
            "model": asdict(self.shape),
            "tokenizer": self.data.manifest["tokenizer"],
            "corpus": self.data.manifest["corpus"],
            "task": self._task(),
            "phase": self.phases.now.phase,
            "seed": config.seed,
            "validation_fraction": config.data.validation_fraction,
            "test_fraction": config.data.test_fraction,
            "sequences": self.first_sample + self.place.samples,
            "seconds": self.seconds,
            "samples": self.samples,
            "records": [record.to_json() for record in self.records],
            "revived_done": revived.done if revived else 0,
            "mask_updates": turnover.updates if turnover else 0,
            "survival": turnover.survival if turnover else None,
            "kernel_choices": tuning.choices(),
            "ranks": self.world.size,
            "threads": torch.get_num_threads(),
            "best": asdict(self.best) if self.best else None,
            "files": files,
        }
        moved = turnover.tensors() if turnover else {}
        checkpoint.save(Path(config.run_dir), self.step, self.model, self.optimizer, body, self.phases.ramp[0], moved)
        self.prune()
        self.saved_step = self.step

    def _task(self) -> dict[str, Any] | None:
        """What the model learns to answer: None in pre-training."""
        if not isinstance(self.data, Pairs):
            return None
        return {"lower_relations": self.config.data.lower_relations, "chat": self.data.chat}

    def prune(self) -> None:
        """Removes the checkpoints that are not to be kept, and what a kill left of such."""
        train = self.config.train
        best = self.best.step if self.best and train.keep_best else None
        checkpoint.prune(Path(self.config.run_dir), train.keep_checkpoints, best)

    def restore(self) -> None:
        """Brings a fresh state to where the last checkpoint of its run was written.

        Raises
        ------
        UserError
            If the checkpoint is damaged, or belongs to another corpus, tokenizer, model or course of phases.
        """
        stored = checkpoint.read(Path(self.config.run_dir))
        body, corpus, shape = stored.state, self.data.manifest["corpus"], asdict(self.shape)
        if body["corpus"]["sha256"] != corpus["sha256"]:
            raise UserError(
                f"checkpoint {stored.folder} belongs to another corpus: sha256 was "
                f"{body['corpus']['sha256'][:12]}..., is {corpus['sha256'][:12]}...."
            )
        theirs = asdict(Shape.read(body["model"], body.get("activation")))
        if wrong := [key for key, value in shape.items() if theirs[key] != value]:
            key = wrong[0]
            raise UserError(
                f"the checkpoint belongs to another model: its {key} is {theirs[key]}, here it is {shape[key]}."
            )
        run = Run(Path(self.config.run_dir)).check(body)
        source.check_unchanged(self.data, self.config, run.manifest)
        threads = torch.get_num_threads()
        if self.config.train.threads is None and body.get("threads", threads) != threads:
            log.warning(
                "resuming with %d threads a process instead of %d: results will differ in the last bits; "
                "train.threads=%d keeps them.", threads, body["threads"], body["threads"],
            )  # fmt: skip
        stored.restore(self.model, self.config.train.backend)
        tuning.pin(body["kernel_choices"])
        build_plans(self.model, self.config.train.memory)
        self.step = self.saved_step = body["step"]
        self.seconds, self.samples = body["seconds"], body["samples"]
        self.best = Best(**body["best"]) if body.get("best") else None  # none before it was kept
        self.records = [PhaseRecord.from_json(record) for record in body["records"]]
        self.phases.resume(self.model, self.step, (stored.before_switch(self.model), body["revived_done"]))
        if stored.moved:
            self.phases.turnover = Turnover.restored(
                patterns_of(self.model), stored.moved, body["mask_updates"], body["survival"]
            )
        stored.restore_optimizer(self.model, self.renew_optimizer(self.config.phases[body["phase"]]))
