"""What a run will cost before it is run: phases, tokens, FLOPs, memory, time; and the other way, the run for a wish.

A plan compares against one dense run (`Plan.dense`) and says which. Arithmetic only, without torch; time on this
machine is measured by `vspdf.calibrate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vspdf import ledger
from vspdf.bench.calibrate import Calibration
from vspdf.config import resolve
from vspdf.config.resolved import ResolvedConfig
from vspdf.config.settings import PhaseConfig
from vspdf.errors import UserError, check_sparsity, check_whole, did_you_mean, require
from vspdf.plan.cs2 import on_cs2
from vspdf.plan.machines import Machines
from vspdf.plan.models import _dense_run, _source
from vspdf.plan.wish import SPLITS, _Wish, by_path, state_bytes
from vspdf.shapes import Shape
from vspdf.sparsity import schedule

LR_MULTIPLE = 3.0  # of both its stages: 3.6e-4 against the dense run's 1.2e-4


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedPhase:
    """A phase, or the dense run.

    `state_bytes` is the whole model's, as the function of that name counts it, on a CPU; `state_bytes_by_path` is so
    too by the paths that its layers may take on a GPU.
    """

    name: str
    sparsity: float
    steps: int
    tokens: int
    flops: float
    state_bytes: float
    state_bytes_by_path: dict[str, float]
    step_seconds: float | None  # None: not measured

    @property
    def seconds(self) -> float | None:
        return None if self.step_seconds is None else self.step_seconds * self.steps


@dataclass(frozen=True)
class Plan:
    """What `plan` found. `config` is the configuration that trains it; `notes` are sentences for the reader."""

    model: str
    shape: Shape
    convention: str
    causal: bool
    dense: PlannedPhase
    baseline: str  # which dense run that is
    phases: list[PlannedPhase]
    config: ResolvedConfig
    calibration: Calibration | None
    notes: list[str]
    machines: Machines | None = None

    @property
    def tokens(self) -> int:
        return sum(phase.tokens for phase in self.phases)

    @property
    def flops(self) -> float:
        """Of the planned run, under `convention`."""
        return sum(phase.flops for phase in self.phases)

    @property
    def flops_saved_fraction(self) -> float:
        return 1 - self.flops / self.dense.flops

    @property
    def effective_sparsity(self) -> float:
        """Weight-FLOPs saved against the dense run."""
        return schedule.effective_sparsity(self.dense.tokens, self._stages())

    @property
    def time_average_sparsity(self) -> float:
        return schedule.time_average_sparsity(self._stages())

    @property
    def sparse_fraction(self) -> float:
        """Share of the run's tokens that its sparsest phase takes."""
        most = max(phase.sparsity for phase in self.phases)
        return sum(phase.tokens for phase in self.phases if phase.sparsity == most) / self.tokens

    @property
    def token_ratio(self) -> float:
        return self.tokens / self.dense.tokens

    @property
    def state_bytes(self) -> float:
        """Peak over the phases."""
        return max(phase.state_bytes for phase in self.phases)

    @property
    def seconds(self) -> float | None:
        """On this machine; None: not measured."""
        parts = [phase.seconds for phase in self.phases]
        return None if None in parts else sum(part for part in parts if part is not None)

    def _stages(self) -> list[tuple[float, float]]:
        return [(phase.sparsity, phase.tokens) for phase in self.phases]

    def by_convention(self) -> dict[str, dict[str, float]]:
        """``{convention: {"dense", "planned", "saved_fraction"}}``, FLOPs."""
        table = {}
        for name in ledger.CONVENTIONS:
            dense, planned = (
                ledger.training_flops(self.shape, stages, convention=name, causal=self.causal)
                for stages in ([(0.0, self.dense.tokens)], self._stages())
            )
            table[name] = {"dense": dense, "planned": planned, "saved_fraction": 1 - planned / dense}
        return table

    def on_cs2(self) -> dict[str, Any]:
        """As `vspdf.plan.cs2.on_cs2` estimates it.

        Raises
        ------
        UserError
            If the model's activations do not fit the wafer.
        """
        stages = [(phase.sparsity, phase.steps) for phase in self.phases]
        return on_cs2(self.shape, self.config.train.batch_size, stages, self.dense.steps)

    def on_machines(self) -> dict[str, Any] | None:
        """As `vspdf.plan.machines` has it; None where one machine was asked for."""
        if self.machines is None or self.calibration is None:
            return None
        stages = [(phase.sparsity, phase.steps) for phase in self.phases]
        tokens = self.config.train.batch_size * self.shape.sequence_length
        return self.machines.to_json(self.shape, tokens, self.calibration, stages)

    def _cs2(self) -> dict[str, Any] | None:
        try:
            return self.on_cs2()
        except UserError:
            return None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "parameters": self.shape.parameters,
            "convention": self.convention,
            "causal": self.causal,
            "dense_run": {**asdict(self.dense), "origin": self.baseline},
            "phases": [asdict(phase) for phase in self.phases],
            "flops": {"dense": self.dense.flops, "planned": self.flops},
            "flops_saved_fraction": self.flops_saved_fraction,
            "flops_by_convention": self.by_convention(),
            "effective_sparsity": self.effective_sparsity,
            "time_average_sparsity": self.time_average_sparsity,
            "sparse_fraction": self.sparse_fraction,
            "token_ratio": self.token_ratio,
            "state_bytes": {"dense": self.dense.state_bytes, "planned": self.state_bytes},
            "seconds": {"dense": self.dense.seconds, "planned": self.seconds} if self.calibration else None,
            "calibration": asdict(self.calibration) if self.calibration else None,
            "cs2": self._cs2(),
            "machines": self.on_machines(),
            "notes": self.notes,
        }


def plan(
    model: str | Path,
    *,
    sparsity: float | None = None,
    effective: float | None = None,
    split: str | None = None,
    phases: Sequence[tuple[float, int]] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    sequence: int | None = None,
    convention: str = "vspdf",
    causal: bool = False,
    save: float | None = None,
    memory: float | None = None,
    hours: float | None = None,
    time: bool = False,
    machines: Machines | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Plans a run against its dense run.

    Without `sparsity`, `effective`, `phases` or a wish: a configuration's own phases, else the published 0.9 and 0.75.

    Parameters
    ----------
    model : str
        A key of `ledger.MODELS`, a configuration of ours (path or shipped name), or a Hugging Face folder.
    sparsity : float in [0, 1)
        Of the first stage. Alone: of the whole run, as in SPDF.
    effective : float
        Weight-FLOPs to save against the dense run; the second stage, dense, takes what is left.
    split : {"add-on", "fixed-budget"}
        As many sparse steps as the dense run has and dense ones on top (published, the default), or the dense run's
        steps in all.
    phases : sequence of (sparsity, steps)
        Explicit stages, any number, each at most as sparse as the one before.
    steps, batch_size : int
        Of the dense run. Default: the published run, the tokens of the phases given, or 20 tokens a parameter.
    sequence : int
        Tokens of a sequence; default: the model's.
    convention : str
        A key of `ledger.CONVENTIONS`.
    causal : bool
        Count half of the attention products.
    save : float in (0, 1)
        Wish: this fraction of the dense run's FLOPs is saved, under `convention`.
    memory : float
        Wish: the training state fits into so many gigabytes (10⁹ bytes) in every phase.
    hours : float
        Wish: the run ends within so many hours on this machine; measures.
    time : bool
        Measure this machine's speed (`calibrate`): seconds; at billions of parameters most of a minute.
    machines : Machines, optional
        Several of this one, that share every step; measures.
    progress : callable
        Receives a line at a time while measuring.

    Raises
    ------
    UserError
        For an unknown model, contradicting arguments, impossible values, or a wish that cannot come true; the message
        names the nearest that can.
    """
    if split is not None and phases is not None:
        raise UserError(f"phases leave nothing to split: give them, or split = '{split}'.")
    asked, split = split, "add-on" if split is None else split
    _check_arguments(sparsity, effective, split, phases, save, memory, hours, steps, batch_size)
    source = _source(model).at(sequence)
    shape, settings = source.shape, source.settings
    own = bool(source.phases) and sparsity is effective is phases is save is memory is hours is None
    one_stage = effective is save is hours is None and (sparsity is not None or memory is not None)
    if asked is not None and (own or one_stage):
        raise UserError(f"`split` {asked}: there is one stage, or those of {model}; `effective` asks for two.")
    if batch_size and source.phases:
        raise UserError(f"the batch size of {model} is in that file (train.batch_size): `batch_size` is for models.")
    dense_steps, baseline = _dense_run(source, shape, steps, batch_size, sum(int(n) for _, n in phases or ()) or None)
    if machines is not None:
        machines.require_even_shares(settings.train.batch_size)
    step_tokens = settings.train.batch_size * shape.sequence_length
    run = _Wish(shape, dense_steps, step_tokens, split, sparsity, effective, convention, causal, progress)
    run.precision = settings.train.precision

    if not own:
        stages = phases if phases is not None else run.stages(save, memory, hours)
        multiple = LR_MULTIPLE if any(s for s, _ in stages) else 1.0
        settings.phases = [PhaseConfig(sparsity=s, steps=int(n), lr_multiple=multiple) for s, n in stages if n]
    config = resolve.resolve(settings)
    stretches = _stretches(config)
    if time or machines is not None:
        run.measure([sparsity for _, sparsity, _, _ in stretches])
    notes = [*run.notes, *_moves(config), *source.notes]
    if run.calibration and run.calibration.note:
        notes.append(run.calibration.note)

    def stage(name: str, s: float, steps: int, tokens: int) -> PlannedPhase:
        flops = ledger.training_flops(shape, [(s, tokens)], convention=convention, causal=causal)
        seconds = run.calibration.step_seconds(shape, s, tokens // steps) if run.calibration else None
        return PlannedPhase(name, s, steps, tokens, flops, state_bytes(shape, s), by_path(shape, s), seconds)

    return Plan(
        source.name, shape, convention, causal,
        stage("dense run", 0.0, dense_steps, dense_steps * step_tokens), baseline,
        [stage(*stretch) for stretch in stretches], config, run.calibration, notes, machines,
    )  # fmt: skip


def _stretches(config: ResolvedConfig) -> list[tuple[str, float, int, int]]:
    """Name, sparsity over all weights, steps and tokens of every stretch of a plan; where it changes often, a few."""
    layers = resolve.linear_layers(config.model)
    return [
        (
            f"{phase.name} {stage.sparsity:.4g}" if len(phase.coarse_stages()) > 1 else phase.name,
            phase.mean(layers, stage.sparsity), stage.steps, stage.steps * phase.tokens // phase.steps,
        )
        for phase in config.phases
        for stage in phase.coarse_stages()
    ]  # fmt: skip


def _moves(config: ResolvedConfig) -> list[str]:
    """What masks that move cost beside what conventions count."""
    said = []
    for phase in config.phases:
        count = sum(step > 0 for step in phase.update_steps()) if phase.algorithm != "static" else 0
        if count and phase.algorithm == "rigl":
            said.append(
                f"Phase '{phase.name}': RigL forms the dense gradient on {count} of {phase.steps:,} steps, a third of "
                "a dense step's weight-FLOPs each; a run counts it as executed, no convention does."
            )
        elif count:
            said.append(f"Phase '{phase.name}': masks move {count} times (vspdf bench update: what that takes).")
    return said


def _check_arguments(
    sparsity: float | None,
    effective: float | None,
    split: str,
    phases: Sequence[tuple[float, int]] | None,
    save: float | None,
    memory: float | None,
    hours: float | None,
    steps: int | None,
    batch_size: int | None,
) -> None:
    if split not in SPLITS:
        raise UserError(f"unknown split '{split}'.{did_you_mean(split, SPLITS)}")
    if sparsity is not None:
        check_sparsity("sparsity", sparsity)
    if effective is not None:
        check_sparsity("effective sparsity", effective)
    wishes = {"save": save, "memory": memory, "hours": hours}
    given = [wish for wish, value in wishes.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"one wish at a time: {' and '.join(given)} were given.")
    if given and phases is not None:
        raise UserError(f"phases say all that {given[0]} would find out: give one of them.")
    if phases is not None and (sparsity is not None or effective is not None):
        raise UserError("phases leave nothing to split: give them, or sparsity and effective sparsity.")
    if effective is not None and (save is not None or hours is not None):
        raise UserError(f"effective sparsity is what {given[0]} finds: give one of them.")
    if save is not None and not 0 < save < 1:
        raise UserError(f"save must lie between 0 and 1 (a fraction of the dense run's FLOPs), not {save}.")
    for what, value in {"memory": memory, "hours": hours, "steps": steps, "batch size": batch_size}.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{what} must be positive, not {value}.")
    for what, value in {"steps": steps, "batch size": batch_size}.items():
        if value is not None:
            check_whole(what, value)
    for i, phase in enumerate(phases or ()):
        pair = isinstance(phase, tuple | list) and len(phase) == 2
        require(pair, f"phases.{i} must be (sparsity, steps), not {phase!r}.")
        check_whole(f"phases.{i}.steps", phase[1], least=0)
