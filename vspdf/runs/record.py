"""What the phases of a run did: seconds, FLOPs and parts of their steps, as checkpoints and the summary keep them."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vspdf.config.resolved import ResolvedPhase
from vspdf.ledger import Count, Tally


@dataclass
class PhaseRecord:
    """What one phase has done so far."""

    seconds: float = 0.0  # in steps
    cpu_seconds: float | None = 0.0  # of all threads, in steps; None: it began before they were counted
    tally: Tally = field(default_factory=Tally)
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=512))
    paired_seconds: list[tuple[float, float]] = field(default_factory=list)  # (this step, dense step on the same batch)
    dense_threads: int | None = None
    parts: dict[str, float] = field(default_factory=dict)  # fraction of a step's time
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    loss: float | None = None
    masks: dict[str, float] = field(default_factory=dict)  # of masks that move, at the end: see Turnover.figures

    def spend(self, seconds: float, cpu_seconds: float) -> None:
        """Counts what a step, or a move of masks before it, has taken."""
        self.seconds += seconds
        self.cpu_seconds = None if self.cpu_seconds is None else self.cpu_seconds + cpu_seconds

    def to_json(self) -> dict[str, Any]:
        return {
            **{k: v for k, v in vars(self).items() if k not in ("tally", "step_seconds")},
            "tally": {name: asdict(count) for name, count in self.tally.products.items()},
            "step_seconds": list(self.step_seconds),
        }

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> PhaseRecord:
        plain = {k: v for k, v in body.items() if k not in ("tally", "step_seconds", "paired_seconds")}
        record = cls(**{"cpu_seconds": None, **plain})
        record.tally = Tally({name: Count(**count) for name, count in body["tally"].items()})
        record.step_seconds.extend(body["step_seconds"])
        record.paired_seconds = [(a, b) for a, b in body["paired_seconds"]]
        return record

    def summary(self, layers: Mapping[str, int], phase: ResolvedPhase, tokens: int) -> dict[str, Any]:
        """What `summary.json` says of the phase, of a model that has `layers` with so many weights each."""
        body: dict[str, Any] = {
            "name": phase.name,
            "sparsity": phase.mean(layers, phase.stages()[0].sparsity),
            "stages": stages(phase, layers, phase.steps),
            "steps": phase.steps,
            "tokens": tokens,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "step_seconds_median": statistics.median(self.step_seconds),
            "loss": self.loss,
            "val_loss": self.val_loss,
            "val_bits_per_byte": self.val_bits_per_byte,
            "flops": self.tally.total.flops(),
            "products": {name: asdict(count) for name, count in self.tally.products.items()},
            "time_fractions": self.parts,
        }
        if self.masks:
            body["masks"] = self.masks
        if self.paired_seconds:
            body |= beside_dense(self.paired_seconds) | {"dense_threads": self.dense_threads}
        return body


def stages(phase: ResolvedPhase, layers: Mapping[str, int], steps: int) -> list[dict[str, Any]]:
    """The stretches of a phase that its first `steps` are of, each at its sparsity over all weights of `layers`."""
    return [
        {"start": start, "steps": min(of, steps - start), "sparsity": phase.mean(layers, sparsity)}
        for start, of, sparsity in phase.stages()
        if start < steps
    ]


def sparsities(phase: Mapping[str, Any]) -> tuple[float, float, float]:
    """Of a phase in a summary, the sparsity at its start and at its end, and the mean over its steps."""
    found = phase.get("stages", [])
    if len(found) < 2:  # one that stays, which older summaries have over all weights only here
        return (phase["sparsity"],) * 3
    mean = sum(stage["steps"] * stage["sparsity"] for stage in found) / sum(stage["steps"] for stage in found)
    return found[0]["sparsity"], found[-1]["sparsity"], mean


def beside_dense(paired_seconds: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """How much faster steps were than dense ones on the same batches, from (seconds, seconds of the dense one).

    The three figures fit each other: they are of one pair, the one whose ratio is the median of all pairs' (of two in
    the middle, the lower).
    """
    pairs = sorted(paired_seconds, key=lambda pair: pair[1] / pair[0])
    mine, dense = pairs[(len(pairs) - 1) // 2]
    ratios = [b / a for a, b in pairs]
    return {
        "dense_step_seconds_median": dense,
        "paired_step_seconds_median": mine,
        "pairs": len(pairs),
        "speedup": {"median": dense / mine, "low": ratios[0], "high": ratios[-1]},
    }
