"""Measured beside a run: the dense twin, and the profile of one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


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
