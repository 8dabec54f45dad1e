"""What the phases of a run did: seconds, FLOPs and parts of their steps, as checkpoints and the summary keep them."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from vspdf import ledger, schedule
from vspdf.config import ModelConfig, PhaseConfig, mean_sparsity
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

    def summary(self, model: ModelConfig, phase: PhaseConfig, tokens: int) -> dict[str, Any]:
        """What `summary.json` says of the phase."""
        body: dict[str, Any] = {
            "name": phase.name,
            "sparsity": mean_sparsity(model, phase),
            "stages": [stage._asdict() for stage in schedule.stages(phase)],
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
        if self.paired_seconds:
            mine, dense, ratios = self.beside_dense()
            body["dense_step_seconds_median"] = dense
            body["paired_step_seconds_median"] = mine
            body["speedup"] = {"median": dense / mine, "low": min(ratios), "high": max(ratios)}
            body["dense_threads"] = self.dense_threads
        return body

    def beside_dense(self) -> tuple[float, float, list[float]]:
        """Median seconds of the steps timed beside dense ones, of those, and how much faster each was."""
        mine, dense = (statistics.median(column) for column in zip(*self.paired_seconds, strict=True))
        return mine, dense, [b / a for a, b in self.paired_seconds]


def dense_counts(model: nn.Module, shape: ledger.Shape, tokens: int) -> dict[str, Count]:
    """What torch itself multiplies in a step, forward and backward: nothing is skipped there, the columns agree."""
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    macs = {"dense_linear": linear, "attention": shape.attention, "vocabulary": shape.vocabulary}
    flops = {name: 6 * tokens * n for name, n in macs.items() if n}
    return {name: Count(n, n, n) for name, n in flops.items()}


def profiled(step: Callable[[], Any], vocab_size: int) -> tuple[Any, dict[str, float]]:
    """Runs a step under torch's profiler; returns its result and the fraction of its time by part."""
    with torch.autograd.profiler_legacy.profile(record_shapes=True) as profile:  # the newer one writes to stderr
        result = step()
    times: dict[str, float] = {}
    for event in profile.key_averages(group_by_input_shape=True):
        part = _part(event.key, event.input_shapes, vocab_size)
        times[part] = times.get(part, 0.0) + event.self_cpu_time_total
    total = sum(times.values())
    return result, {part: seconds / total for part, seconds in sorted(times.items())}


def _part(key: str, shapes: Any, vocab_size: int) -> str:
    if "vspdf::" in key:
        return "sparse products"
    if "scaled_dot_product" in key or "flash_attention" in key:
        return "attention"
    if "AdamW" in key or "adamw" in key or "_foreach_" in key or "Optimizer" in key:
        return "optimizer"
    if any(vocab_size in shape for shape in shapes if isinstance(shape, list)):
        return "vocabulary"
    if key in ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul"):
        return "dense products"
    return "rest"
