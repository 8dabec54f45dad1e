"""The other way round: the run for a wish, FLOPs to save, memory or hours to keep within."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vspdf import ledger
from vspdf.bench.calibrate import Calibration, calibrate
from vspdf.errors import UserError
from vspdf.shapes import PATH_BYTES, STATE_BYTES, Shape
from vspdf.sparsity import schedule

SPLITS = ("add-on", "fixed-budget")
SPARSITY, EFFECTIVE = 0.9, 0.75  # of the published Variable SPDF recipe
WISHED = (0.9, 0.95, 0.98, 0.99)  # first stages tried for a wish, mildest first; nobody is known to train beyond


def state_bytes(shape: Shape, sparsity: float, path: str = "cpu") -> float:
    """Training state of the whole model: float32 weights, gradients, AdamW moments; where sparse, what a path keeps."""
    if not sparsity:
        return STATE_BYTES * shape.parameters
    position, weight = PATH_BYTES[path]
    kept = (STATE_BYTES + weight) * (1 - sparsity) + position
    return STATE_BYTES * (shape.parameters - shape.linear) + kept * shape.linear


def by_path(shape: Shape, sparsity: float) -> dict[str, float]:
    """Training state by the path that all sparse layers take: "cpu", and on GPUs "dense", "2:4" and "triton"."""
    return {path: state_bytes(shape, sparsity, path) for path in PATH_BYTES}


@dataclass
class _Wish:
    """Ways to stages (sparsity, steps) for one model and dense run."""

    shape: Shape
    dense_steps: int
    step_tokens: int
    how: str  # one of SPLITS
    sparsity: float | None
    effective: float | None
    convention: str
    causal: bool
    progress: Callable[[str], None]
    precision: str = "fp32"
    calibration: Calibration | None = None
    notes: list[str] = field(default_factory=list)

    def stages(self, save: float | None, memory: float | None, hours: float | None) -> list[tuple[float, int]]:
        """(sparsity, steps) of each stage for the wish that is not None, `memory` in GB; for none, as `split`."""
        if save is not None:
            return self.save(save)
        if memory is not None:
            return self.memory(memory * 1e9)
        return self.split() if hours is None else self.hours(hours)

    def split(self) -> list[tuple[float, int]]:
        """By effective sparsity."""
        if self.effective is None and self.sparsity is not None:
            return [(self.sparsity, self.dense_steps)]
        sparsity = SPARSITY if self.sparsity is None else self.sparsity
        effective = EFFECTIVE if self.effective is None else self.effective
        function = schedule.split_add_on if self.how == "add-on" else schedule.split_fixed_budget
        sparse, dense = function(self.dense_steps, effective, sparsity)
        return [(sparsity, sparse), (0.0, dense)]

    def save(self, fraction: float) -> list[tuple[float, int]]:
        cost = lambda s: ledger.flops_per_token(self.shape, s, self.convention, self.causal)  # noqa: E731
        dense = self.dense_steps * cost(0.0)
        stages = self._within(cost, (1 - fraction) * dense, self._candidates())
        if stages:
            return stages
        most = self._candidates()[-1]
        limit = "considered" if self.sparsity is None else "at that sparsity"
        raise UserError(
            f"saving {fraction:.4g} of the FLOPs (convention {self.convention}) is not possible: a run that stays at "
            f"sparsity {most:.4g} saves {1 - cost(most) / cost(0.0):.4f}, the most {limit}."
        )

    def hours(self, hours: float) -> list[tuple[float, int]]:
        budget, candidates = hours * 3600, self._candidates()
        for measured in (candidates[:1], candidates):  # the others take their time: only where they are needed
            self.measure(measured)
            if self.dense_steps * self._step_seconds(0.0) <= budget:
                self.notes.append("The dense run itself fits into that time: nothing has to be sparse.")
                return [(0.0, self.dense_steps)]
            stages = self._within(self._step_seconds, budget, measured)
            if stages:
                return stages
        fastest = min((0.0, *candidates), key=self._step_seconds)
        seconds = self._step_seconds(fastest)
        raise UserError(
            f"finishing in {hours:.4g} hours is not possible here: the fastest found, sparsity {fastest:.4g} "
            f"throughout, takes {self.dense_steps * seconds / 3600:.4g}; {hours:.4g} hours are enough "
            f"for {math.floor(budget / seconds):,} of {self.dense_steps:,} steps (`steps`)."
        )

    def _step_seconds(self, sparsity: float) -> float:
        assert self.calibration is not None
        return self.calibration.step_seconds(self.shape, sparsity, self.step_tokens)

    def memory(self, budget: float) -> list[tuple[float, int]]:
        """The mildest sparsity whose state fits, to the end; with `effective`, a sparser first stage before it."""
        shape = self.shape
        if state_bytes(shape, 0.0) <= budget:
            self.notes.append("The dense model's training state fits as well: memory does not ask for sparsity.")
            return self.split()
        most = WISHED[-1]
        if state_bytes(shape, most) > budget:
            raise UserError(
                f"a training state of {budget / 1e9:.4g} GB is not possible: at sparsity {most} it is "
                f"{state_bytes(shape, most) / 1e9:.4g} GB, of which {self._fixed() / 1e9:.4g} GB are never sparse "
                f"(embeddings, norms, biases; float32, AdamW)."
            )
        position, weight = PATH_BYTES["cpu"]
        kept = (budget - self._fixed()) / shape.linear - position
        least = math.ceil((1 - kept / (STATE_BYTES + weight)) * 1000 - 1e-9) / 1000
        if self.sparsity is not None and self.sparsity < least:
            raise UserError(
                f"a training state of {budget / 1e9:.4g} GB is not possible at sparsity {self.sparsity}, which takes "
                f"{state_bytes(shape, self.sparsity) / 1e9:.4g} GB: {least} is the least that fits."
            )
        self.notes.append(f"At least {least} of the projection and FFN weights have to stay away to the end.")
        if self.effective is None:
            return [(least if self.sparsity is None else self.sparsity, self.dense_steps)]
        first = max(SPARSITY, least) if self.sparsity is None else self.sparsity
        if self.effective > first:
            raise UserError(f"an effective sparsity of {self.effective} cannot come from a first stage at {first}.")
        if self.how == "fixed-budget" and self.effective < least:
            raise UserError(
                f"an effective sparsity of {self.effective} is not possible in {budget / 1e9:.4g} GB: {least} is the "
                "least that fits."
            )
        stages = self._fit(lambda s: 1 - s, (1 - self.effective) * self.dense_steps, first, least)
        assert stages is not None
        return stages

    def measure(self, sparsities: Sequence[float]) -> None:
        """Speed at these sparsities, unless known."""
        wanted = sorted({s for s in sparsities if s})
        if self.calibration is None or not set(wanted) <= self.calibration.block_seconds.keys():
            self.calibration = calibrate(self.shape, wanted, self.step_tokens, self.progress, precision=self.precision)

    def _fixed(self) -> float:
        return STATE_BYTES * (self.shape.parameters - self.shape.linear)

    def _candidates(self) -> tuple[float, ...]:
        return WISHED if self.sparsity is None else (self.sparsity,)

    def _within(
        self, cost: Callable[[float], float], budget: float, candidates: Sequence[float]
    ) -> list[tuple[float, int]] | None:
        """Stages for a budget, from the mildest first stage that leaves room."""
        return next(filter(None, (self._fit(cost, budget, first, 0.0) for first in candidates)), None)

    def _fit(
        self, cost: Callable[[float], float], budget: float, first: float, last: float
    ) -> list[tuple[float, int]] | None:
        """As many steps at `last` as a budget allows after those at `first`; None if it is less than `first` takes."""
        steps, a, b = self.dense_steps, cost(first), cost(last)
        left = budget - steps * a
        if left < -1e-9 * budget:
            return None
        if self.how == "add-on":
            more = math.floor(max(0.0, left) / b + 1e-9)
            return [(first, steps + more)] if first == last else [(first, steps), (last, more)]
        if first == last:
            return [(first, steps)]
        sparse = max(0, math.ceil((steps * b - budget) / (b - a) - 1e-9))
        return [(first, sparse), (last, steps - sparse)]
