"""Phases of sparsity: on a training of your own, in any loop, and on our trainer's GPT."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vspdf.config.resolved import ResolvedConfig
from vspdf.config.settings import PhaseConfig
from vspdf.errors import UserError
from vspdf.pattern import Pattern, kept_count
from vspdf.sparsity import schedule
from vspdf.sparsity.layer import sparse_layers
from vspdf.sparsity.optimizer import RevivedWarmup
from vspdf.sparsity.schedule import layer_sparsities, resolve_amounts
from vspdf.sparsity.surgery import adopt, densify, set_sparsity, sparsify

log = logging.getLogger("vspdf")


class Phases:
    """Takes a model and its optimizer through phases of sparsity, in a loop that is not ours.

    Parameters
    ----------
    phases : sequence of (sparsity, steps), or of `vspdf.config.PhaseConfig`
        In steps of the optimizer; the last phase goes on for as long as the training does. A PhaseConfig may have a
        `schedule`, so that a phase densifies in steps.
    seed : int
    moments : {"keep", "reset"}
        Optimizer state of the weights that were there before a switch.
    revived_warmup : int
        Steps over which updates of newly added weights ramp up; about 50-100 for a beta2 above 0.98.
    **options
        Of `vspdf.sparsify`: `include`, `exclude`, `init_method`, `rescale`, `backend`.

    Raises
    ------
    UserError
        If a phase would drop weights, or a sparsity or a number of steps is impossible.

    Examples
    --------
    >>> phases = vspdf.Phases([(0.9, 900), (0.0, 100)])
    >>> phases.start(model)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> for step, batch in enumerate(batches):
    ...     phases.at(step, model, optimizer)
    ...     model(batch).backward()
    ...     phases.step(optimizer)
    ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        phases: Sequence[tuple[float, int] | PhaseConfig],
        *,
        seed: int = 0,
        moments: str = "keep",
        revived_warmup: int = 0,
        **options: Any,
    ) -> None:
        if not phases:
            raise UserError("Phases needs at least one phase, e.g. [(0.9, 900), (0.0, 100)].")
        self.phases = [
            phase if isinstance(phase, PhaseConfig) else PhaseConfig(sparsity=phase[0], steps=int(phase[1]))
            for phase in phases
        ]
        for i, phase in enumerate(self.phases):
            if phase.steps is None or phase.steps < 1:
                raise UserError(f"phases.{i} needs a number of steps of at least 1, not {phase.steps}.")
            phase.revived_warmup = revived_warmup
            resolve_amounts(None, f"phases.{i}", phase, cast(Any, self.phases[i - 1]) if i else None)
        self.seed, self.moments, self.options = seed, moments, options
        self.stages: list[tuple[int, float]] = []  # first step and sparsity, over all phases
        start = 0
        for phase in self.phases:
            for stage in schedule.stages(cast(Any, phase)):
                if not self.stages or self.stages[-1][1] != stage.sparsity:
                    self.stages.append((start + stage.start, stage.sparsity))
            start += phase.steps or 0
        self.revived_warmup = revived_warmup
        self.revived: RevivedWarmup | None = None
        self._now: int | None = None

    @property
    def sparsity(self) -> float:
        """That the model has now."""
        return self.stages[self._now or 0][1]

    def start(self, model: nn.Module) -> nn.Module:
        """Brings a dense model into the form of the first phase; before its optimizer is made."""
        if self.stages[0][1]:
            sparsify(model, self.stages[0][1], seed=self.seed, **self.options)
        self._now = 0
        return model

    def restore(self, model: nn.Module, state_dict: Mapping[str, Tensor], step: int) -> nn.Module:
        """Brings a dense model into the form in which its `state_dict` was saved after `step` steps.

        Weights and optimizer state are then loaded as for any model.

        Raises
        ------
        UserError
            If the state does not belong to these phases at this step.
        """
        layers = adopt(model, state_dict)
        weights = sum(pattern.numel for pattern in layers.values())
        found = 1 - sum(pattern.nnz for pattern in layers.values()) / weights if weights else 0.0
        for stage in {self._stage(step), self._stage(max(0, step - 1))}:  # saved after the switch, or before it
            if abs(self.stages[stage][1] - found) < 1e-3 + len(layers) / max(1, weights):
                self._now = stage
                if self.revived_warmup and 0 < step - self.stages[stage][0] < self.revived_warmup:
                    log.warning("resumed within a ramp of revived weights: the rest of it is left out.")
                return model
        raise UserError(
            f"the checkpoint has a sparsity of {found:.4g}; after {step} steps these phases have "
            f"{self.stages[self._stage(step)][1]:.4g}. Are the phases those it was trained with?"
        )

    def at(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Before the step numbered `step`, from 0: switches where a boundary falls, and says whether it did.

        Parameters of the model are replaced where it switches, and exchanged in the `optimizer`, with their state.

        Raises
        ------
        UserError
            Before `start` or `restore`.
        """
        if self._now is None:
            raise UserError("Phases: start(model) or restore(...) comes before the first step.")
        stage = self._stage(step)
        if stage <= self._now:
            return False
        amount = self.stages[stage][1]
        if amount:
            before = set_sparsity(model, amount, optimizer, seed=self.seed + stage, moments=self.moments)
        else:
            before = densify(model, optimizer, moments=self.moments)
        self._now = stage
        self.revived = RevivedWarmup(model, before, self.revived_warmup) if self.revived_warmup else None
        log.info("step %s: sparsity is now %.4g", step, amount)
        return True

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """``optimizer.step()``, ramped for revived weights after a switch where `revived_warmup` asks for it."""
        if self.revived is None:
            optimizer.step()
        else:
            self.revived.step(optimizer)

    def _stage(self, step: int) -> int:
        return sum(start <= step for start, _ in self.stages) - 1


# What follows takes our own GPT through the phases of a configuration, layer by layer; the trainer uses it.


def begin(model: nn.Module, config: ResolvedConfig, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Brings a dense model into the form of the first phase."""
    phase = config.phases[0]
    amounts = layer_sparsities(config.model, phase)
    if wanted := {name: amount for name, amount in amounts.items() if amount}:
        sparsify(
            model, wanted, seed=config.seed, init_method=phase.init_method, truncate=phase.count == "truncate",
            rescale=phase.s_mu_par and not config.init_from, backend=config.train.backend, optimizer=optimizer,
        )  # fmt: skip


def check_zeros(model: nn.Module, config: ResolvedConfig) -> None:
    """Zeros that are to become masks must be there: figures go by the configured sparsity.

    Raises
    ------
    UserError
        Naming a layer that has more or fewer.
    """
    phase = config.phases[0]
    if phase.init_method != "from_zeros" or sparse_layers(model):
        return
    for name, amount in layer_sparsities(config.model, phase).items():
        zeros = float((model.get_submodule(name).weight == 0).float().mean())  # type: ignore[union-attr]
        if amount and abs(zeros - amount) > 0.005:
            raise UserError(
                f"phases.0.init_method = from_zeros takes zeros for masked: '{name}' has {zeros:.2%} of them, "
                f"its sparsity is to be {amount:.2%}. Start from a model that has (init_from), or give what it has."
            )


def grow(
    model: nn.Module, config: ResolvedConfig, index: int, stage: int, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Pattern]:
    """Adds positions until the model has the sparsities of a stage of a phase; returns the patterns before.

    Raises
    ------
    UserError
        If that would drop weights.
    """
    phase = config.phases[index]
    amount = schedule.stages(phase)[stage].sparsity
    layers = sparse_layers(model)
    amounts = layer_sparsities(config.model, phase, amount)
    if not any(amounts.values()):
        return densify(model, optimizer)
    wanted = {}
    for name, layer in layers.items():  # one weight more or less is a matter of how kept ones are counted
        missing = kept_count(layer.pattern.numel, amounts[name]) - layer.pattern.nnz
        if missing < -1:
            raise UserError(
                f"phase '{phase.name}': layer '{name}' has sparsity {layer.pattern.sparsity:.4g} and would go to "
                f"{amounts[name]:.4g}: weights are only ever added."
            )
        if missing > 1:
            wanted[name] = amounts[name]
    if dense := [name for name, amount in amounts.items() if amount and name not in layers]:
        raise UserError(
            f"phase '{phase.name}': layer '{dense[0]}' is dense already and would go to {amounts[dense[0]]:.4g}: "
            "weights are only ever added."
        )
    seed = config.seed + index + 1_000_003 * stage
    return set_sparsity(model, wanted, optimizer, seed=seed) if wanted else {}


def form(model: nn.Module) -> str:
    """How much of a model is trained, in words."""
    layers = sparse_layers(model)
    kept = sum(layer.pattern.nnz for layer in layers.values())
    numel = sum(layer.pattern.numel for layer in layers.values())
    if not layers:
        return "every weight is trained"
    return f"{len(layers)} sparse layers keep {kept:,} of {numel:,} weights"
