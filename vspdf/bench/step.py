"""A whole training step, sparse beside the same model dense."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from vspdf.bench.rounds import _quartiles
from vspdf.kernels import hardware


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

    The dense side is plain PyTorch: nn.Linear, scaled_dot_product_attention, fused AdamW. Vocabulary: bytes.

    Returns
    -------
    dict
        ``rows`` with ``sparsity``, ``seconds_median`` and quartiles, ``ratio_to_dense``, memory of the training state;
        ``hardware``, ``versions``.
    """
    from vspdf.model import GPT
    from vspdf.shapes import Shape
    from vspdf.sparsity.layer import training_state_bytes
    from vspdf.sparsity.surgery import sparsify

    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    shape = Shape(n_layer, d_model, n_head, 4 * d_model, 257, sequence_length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(257, (batch_size, sequence_length + 1), generator=generator)
    steps: dict[float, Callable[[], None]] = {}
    memory: dict[float, Any] = {}
    models = {}
    for sparsity in (0.0, *sparsities):
        model = GPT(shape)
        if sparsity:
            sparsify(model, sparsity)
        steps[sparsity], models[sparsity] = _training_step(model, tokens), model
    times: dict[float, list[float]] = {sparsity: [] for sparsity in steps}
    try:
        for i in range(rounds + 2):
            progress(f"round {i} of {rounds + 1}")
            for sparsity, step in steps.items():
                start = time.perf_counter()
                step()
                if i > 1:  # two rounds of warm-up: plans, tuning, moments
                    times[sparsity].append(time.perf_counter() - start)
        for sparsity, model in models.items():
            memory[sparsity] = training_state_bytes(model) if sparsity else None
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    dense = statistics.median(times[0.0])
    rows = []
    for sparsity, seconds in times.items():
        low, high = _quartiles(seconds)
        median = statistics.median(seconds)
        rows.append(
            {
                "sparsity": sparsity, "threads": used, "seconds_median": median,
                "seconds_low": low, "seconds_high": high,
                "ratio_to_dense": dense / median, "memory": memory[sparsity],
            }
        )  # fmt: skip
    return {
        "model": {**asdict(shape), "batch_size": batch_size, "parameters": shape.parameters},
        "rows": rows,
        "hardware": hardware.hardware(),
        "versions": hardware.versions(),
    }


def _training_step(model: torch.nn.Module, tokens: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        model(tokens[:, :-1], tokens[:, 1:].contiguous()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
