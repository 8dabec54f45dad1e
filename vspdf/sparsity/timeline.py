"""Which phase and stage a step is of, and whether masks move before it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from vspdf.sparsity.amounts import Amounts


class Stretch(NamedTuple):
    """Steps at one sparsity: the first of them, the phase and which of its stages, and what the stage asks for."""

    start: int
    phase: int
    stage: int
    sparsity: float


class Timeline:
    """Phases one after the other, the last of them without end.

    Attributes
    ----------
    stages : list of Stretch
        In their order.
    """

    def __init__(self, phases: Sequence[Amounts]) -> None:
        self.stages: list[Stretch] = []
        self._phases, self._begins = phases, []
        start = 0
        for i, phase in enumerate(phases):
            self._begins.append(start)
            self.stages += [Stretch(start + s.start, i, k, s.sparsity) for k, s in enumerate(phase.stages())]
            start += phase.steps
        self._starts = [stretch.start for stretch in self.stages]

    def index(self, step: int) -> int:
        """Of the stage that a step is of."""
        return bisect_right(self._starts, step) - 1

    def place(self, step: int) -> tuple[Amounts, int]:
        """The phase that a step is of, and its number there."""
        phase = self.stages[self.index(step)].phase
        return self._phases[phase], step - self._begins[phase]

    def moves(self, step: int) -> bool:
        """Whether masks move before a step, within its phase."""
        phase, inside = self.place(step)
        return phase.moves(inside)
