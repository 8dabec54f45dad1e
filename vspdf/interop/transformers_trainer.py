"""Phases of sparsity in the Trainer of Hugging Face transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

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
    >>> callback = vspdf.PhasesCallback([(0.9, 900), (0.0, 100)])
    >>> trainer = Trainer(callback.prepare(model), args, train_dataset=data, callbacks=[callback])
    >>> trainer.train()

    To resume, with a fresh model: ``callback.prepare(model, "out/checkpoint-500")`` and
    ``trainer.train(resume_from_checkpoint="out/checkpoint-500")``.
    """

    def __init__(self, phases: Sequence[tuple[float, int] | Phase], **options: Any) -> None:
        self.phases = Phases(phases, **options)
        self._resumed: int | None = None

    def prepare(self, model: nn.Module, resume_from: str | Path | None = None) -> nn.Module:
        """The model in the form of the first phase, or in that of a checkpoint of the Trainer.

        Raises
        ------
        UserError
            If the checkpoint is no folder of the Trainer, or does not belong to these phases.
        """
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

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
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
        last = self.phases.stages[-1].start
        if 0 < state.max_steps <= last:
            log.warning("training ends at step %s, before the last switch at step %s.", state.max_steps, last)
        if bool(sparse_layers(model)) != bool(self.phases.sparsity):
            raise UserError("PhasesCallback: the Trainer has another model than the one that was prepared.")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.phases.revived is not None:
            self.phases.revived.begin()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.phases.revived is not None:
            self.phases.revived.end()

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **others: Any
    ) -> None:
        over = 0 < state.max_steps <= state.global_step
        if not over and self.phases.at(state.global_step, model, getattr(optimizer, "optimizer", optimizer)):
            log.info("step %s: sparsity is now %.4g", state.global_step, self.phases.sparsity)
