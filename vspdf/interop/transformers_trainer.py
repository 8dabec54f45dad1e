"""Phases of sparsity in the Trainer of Hugging Face transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from vspdf.errors import UserError
from vspdf.files import read_json
from vspdf.interop import tensors
from vspdf.sparsity.layer import sparse_layers
from vspdf.sparsity.phases import Phases
from vspdf.sparsity.schedule import Phase

try:
    from transformers import TrainerCallback
except ImportError:
    raise ImportError("vspdf.PhasesCallback needs transformers and accelerate: pip install 'vspdf[hub]'.") from None

log = logging.getLogger("vspdf")


class PhasesCallback(TrainerCallback):
    """Phases of sparsity in transformers' Trainer.

    Sparse layers must be there before the Trainer makes its optimizer or loads a checkpoint: `prepare` the model first.
    Checkpoints of the Trainer hold values and patterns; once dense, they are ordinary ones.

    Parameters
    ----------
    phases, **options
        As of `Phases`; steps are the Trainer's global steps.

    Examples
    --------
    >>> callback = vspdf.PhasesCallback([(0.9, 900, 3e-3), (0.0, 100, 1e-3)])
    >>> callback.prepare(model)
    >>> optimizer = torch.optim.AdamW(vspdf.parameter_groups(model, 0.1), lr=1e-3)
    >>> pair = optimizer, callback.scheduler(optimizer)
    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[callback], optimizers=pair)
    >>> trainer.train()

    Without `optimizers` the Trainer's own learning rate goes on through the switch, with no warm-up after it.

    To resume, with a fresh model: ``callback.prepare(model, "out/checkpoint-500")`` and
    ``trainer.train(resume_from_checkpoint="out/checkpoint-500")``.
    """

    def __init__(self, phases: Sequence[tuple[float, int] | tuple[float, int, float] | Phase], **options: Any) -> None:
        self.phases = Phases(phases, **options)
        self._scheduler: LambdaLR | None = None
        self._resumed: int | None = None

    def prepare(self, model: nn.Module, resume_from: str | Path | None = None) -> nn.Module:
        """The model in the form of the first phase, or in that of a checkpoint of the Trainer.

        Raises
        ------
        UserError
            If the checkpoint is no folder of the Trainer, or does not belong to these phases.
        """
        self._resumed = None
        if resume_from is None:
            return self.phases.start(model)
        folder = Path(resume_from)
        file = folder / "trainer_state.json"
        if not file.is_file():
            raise UserError(f"'{folder}' is no checkpoint of the Trainer: it has no trainer_state.json.")
        self._resumed = read_json(file).get("global_step")
        if not isinstance(self._resumed, int):
            raise UserError(f"{file} is damaged: expected a whole number as global_step.")
        return self.phases.restore(model, tensors.read_folder(folder), self._resumed)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """The learning rate of the phases, for the Trainer's `optimizers`: see `Phases.scheduler`."""
        self._scheduler = self.phases.scheduler(optimizer)
        return self._scheduler

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **others: Any,
    ) -> None:
        if not self.phases.started:
            raise UserError("PhasesCallback: prepare(model) comes before Trainer(model, ...).")
        if args.world_size > 1:
            raise UserError(
                "PhasesCallback runs in one process: parameters change at a switch, which DDP cannot follow."
            )
        if state.global_step != (self._resumed or 0):
            raise UserError(
                f"the Trainer goes on from step {state.global_step}, the model was prepared for "
                f"{self._resumed or 0}: give prepare(model, resume_from) the same checkpoint."
            )
        self.phases.require_onward(state.global_step)
        last = self.phases.stages[-1].start
        if 0 < state.max_steps <= last:
            log.warning("training ends at step %s, before the last switch at step %s.", state.max_steps, last)
        if bool(sparse_layers(model)) != bool(self.phases.sparsity):
            raise UserError("PhasesCallback: the Trainer has another model than the one that was prepared.")
        forms = self.phases.sparsities(state.max_steps)
        if args.load_best_model_at_end and forms[-1] and set(forms) != {forms[-1]}:
            raise UserError(
                f"load_best_model_at_end: these phases end at a sparsity of {forms[-1]:.4g}, the best checkpoint may "
                "have another, which the model cannot take: set it to False, and use from_pretrained(CHECKPOINT) later."
            )
        self._check_rates(getattr(lr_scheduler, "scheduler", lr_scheduler))
        if self.phases.revived is not None:  # of a switch before the checkpoint
            self.phases.revived.follow(optimizer)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **others: Any
    ) -> None:
        over = 0 < state.max_steps <= state.global_step
        if not over and self.phases.at(state.global_step, model, getattr(optimizer, "optimizer", optimizer)):
            log.info("step %s: sparsity is now %.4g", state.global_step, self.phases.sparsity)

    def _check_rates(self, used: Any) -> None:
        """Whether the Trainer follows the phases' learning rates, where they have any."""
        if self._scheduler is not None and used is self._scheduler:
            return
        how = "pass optimizers=(optimizer, callback.scheduler(optimizer)) to it"
        if any(phase.lr is not None or phase.lr_multiple != 1 for phase in self.phases.phases):
            raise UserError(f"PhasesCallback: the Trainer does not follow the phases' learning rates: {how}.")
        if len(self.phases.phases) > 1:
            log.warning("the Trainer's learning rate goes through switches without a new warm-up; for one, %s.", how)
