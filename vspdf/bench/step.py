"""A whole training step, sparse beside the same model dense."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from vspdf.attention import plain
from vspdf.bench.rounds import _quartiles
from vspdf.kernels import hardware
from vspdf.model import GPT, Attention
from vspdf.shapes import Shape


def bench_step(
    n_layer: int = 12,
    d_model: int = 768,
    n_head: int = 12,
    sequence_length: int = 512,
    batch_size: int = 4,
    sparsities: Sequence[float] = (0.75, 0.9),
    threads: int | None = None,
    rounds: int = 5,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Times whole training steps (forward, backward, clipping, AdamW) of sparse models beside the same dense model.

    The dense side is plain PyTorch: nn.Linear, scaled_dot_product_attention, fused AdamW. Where the sparse models' own
    attention (`vspdf.attention`) skips more than torch's, a second dense model has it too. Vocabulary: bytes.

    Returns
    -------
    dict
        ``rows`` with ``sparsity``, ``attention`` ("torch" or "blocks"), ``seconds_median`` and quartiles,
        ``ratio_to_dense`` (with torch's attention), memory of the training state; ``hardware``, ``versions``.
    """
    from vspdf.sparsity.layer import training_state_bytes

    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    shape = Shape(n_layer, d_model, n_head, 4 * d_model, 257, sequence_length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(257, (batch_size, sequence_length + 1), generator=generator)
    dense = (0.0, "torch")
    models = {side: _model(shape, *side) for side in (dense, *((s, "blocks") for s in (0.0, *sparsities)))}
    steps = {side: _training_step(model, tokens) for side, model in models.items()}
    times: dict[tuple[float, str], list[float]] = {side: [] for side in steps}
    try:
        for i in range(rounds + 2):
            progress(f"round {i} of {rounds + 1}")
            for side, step in steps.items():
                start = time.perf_counter()
                step()
                if i > 1:  # two rounds of warm-up: plans, tuning, moments
                    times[side].append(time.perf_counter() - start)
        memory = {side: training_state_bytes(model) if side[0] else None for side, model in models.items()}
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    rows = []
    for (sparsity, attention), seconds in times.items():
        low, high = _quartiles(seconds)
        median = statistics.median(seconds)
        rows.append(
            {
                "sparsity": sparsity, "attention": attention, "threads": used, "seconds_median": median,
                "seconds_low": low, "seconds_high": high,
                "ratio_to_dense": statistics.median(times[dense]) / median, "memory": memory[sparsity, attention],
            }
        )  # fmt: skip
    return {
        "model": {**asdict(shape), "batch_size": batch_size, "parameters": shape.parameters},
        "rows": rows,
        "hardware": hardware.hardware(),
        "versions": hardware.versions(),
    }


def _model(shape: Shape, sparsity: float, attention: str) -> GPT:
    from vspdf.sparsity.surgery import sparsify

    model = GPT(shape)
    if attention == "torch":
        for module in model.modules():
            if isinstance(module, Attention):
                module.attend = plain
    if sparsity:
        sparsify(model, sparsity)
    return model


def _training_step(model: torch.nn.Module, tokens: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        model(tokens[:, :-1], tokens[:, 1:].contiguous()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
