"""Measured beside a run: the dense twin, and the profile of one step."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vspdf.config.resolved import ResolvedPhase
from vspdf.model import GPT
from vspdf.parallel.world import COMMUNICATION
from vspdf.runs.record import PhaseRecord, beside_dense
from vspdf.sparsity.layer import sparse_layers
from vspdf.sparsity.surgery import densify
from vspdf.train.state import State
from vspdf.train.step import adamw, optimise

# Of attention by products (`vspdf.attention`), which a model has nowhere else
_ATTENTION = ("aten::bmm", "aten::baddbmm_", "aten::_softmax", "aten::_softmax_backward_data")
TICK = 1e-9  # seconds that anything takes at least, even where a clock stands still


class DenseTwin:
    """The plain dense model with a run's weights, to be timed beside it on the same ranks; it never feeds back."""

    def __init__(self, state: State, phase: ResolvedPhase, batch: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self.config = state.config
        self.model: GPT = copy.deepcopy(state.model)
        densify(self.model)
        self.optimizer = adamw(self.model, self.config.optimizer, phase)
        self.world, self.net = state.world, state.wrapped(self.model)
        times: dict[int, float] = {}
        alone = {os.cpu_count() or 1} if self.world.size == 1 else set()
        for threads in {torch.get_num_threads(), *alone}:
            self.threads = threads
            self.step(batch)  # warm-up: allocates the moments
            times[threads] = self.step(batch)
        self.threads = min(times, key=lambda threads: times[threads])

    def step(self, batch: Callable[[], tuple[Tensor, Tensor]]) -> float:
        """Seconds of one dense step at its best thread count, making the batch included."""
        current = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            start = time.perf_counter()
            optimise(
                self.net, self.optimizer, batch(), 1e-8, self.config.train, self.config.optimizer.clip, world=self.world
            )
            return max(time.perf_counter() - start, TICK)
        finally:
            torch.set_num_threads(current)


class Beside:
    """Times steps of a dense twin on the batches of the sparse steps beside them, a few per phase."""

    def __init__(self) -> None:
        self._twin: DenseTwin | None = None

    def forget(self) -> None:
        """Drops the twin: the model has another form now."""
        self._twin = None

    def measure(
        self, state: State, phase: ResolvedPhase, record: PhaseRecord, batch: Callable[[], tuple[Tensor, Tensor]],
        seconds: float,
    ) -> dict[str, Any] | None:  # fmt: skip
        """Takes the dense step beside one that took `seconds`; what was found, once enough were taken."""
        wanted = state.config.train.measure_dense if sparse_layers(state.model) else 0
        if len(record.paired_seconds) >= wanted or len(record.step_seconds) < 2:
            return None
        if self._twin is None:
            self._twin = DenseTwin(state, phase, batch)
            record.dense_threads = self._twin.threads
            return None
        record.paired_seconds.append((seconds, self._twin.step(batch)))
        if len(record.paired_seconds) < wanted:
            return None
        self._twin = None
        return beside_dense(record.paired_seconds)


def profiled(step: Callable[[], Any], vocab_size: int, ranks: int = 1) -> tuple[Any, dict[str, float]]:
    """Runs a step under torch's profiler; returns its result and the fraction of its time by part."""
    # The older does not know of exchanges, which begin and end in different threads; the newer writes to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    profiler = torch.autograd.profiler_legacy.profile if ranks == 1 else torch.autograd.profiler.profile
    with profiler(record_shapes=True) as profile:
        result = step()
    times: dict[str, float] = {}
    for event in profile.key_averages(group_by_input_shape=True):
        part = _part(event.key, event.input_shapes, vocab_size)
        times[part] = times.get(part, 0.0) + event.self_cpu_time_total
    total = sum(times.values()) or 1.0
    return result, {part: seconds / total for part, seconds in sorted(times.items())}


def _part(key: str, shapes: Any, vocab_size: int) -> str:
    if key == COMMUNICATION or key.startswith(("c10d::", "gloo:", "nccl:")):
        return "communication"
    if "vspdf::" in key:
        return "sparse products"
    if "scaled_dot_product" in key or "flash_attention" in key or key in _ATTENTION:
        return "attention"
    if "AdamW" in key or "adamw" in key or "_foreach_" in key or "Optimizer" in key:
        return "optimizer"
    if any(vocab_size in shape for shape in shapes if isinstance(shape, list)):
        return "vocabulary"
    if key in ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul"):
        return "dense products"
    return "rest"
