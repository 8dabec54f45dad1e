"""A whole training step, sparse beside the same model dense."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from vspdf.bench.rounds import Timed, compared, ideal, others_at_work, quartiles
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
        ``rows`` with ``sparsity``, ``seconds_median`` and quartiles, ``ratio_to_dense`` (of rounds, `compared`) and
        whether it is ``possible``, memory of the training state; ``load``, ``hardware``, ``versions``.
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
    load = others_at_work()
    times: dict[float, list[Timed]] = {sparsity: [] for sparsity in steps}
    try:
        for i in range(rounds + 2):
            progress(f"round {i} of {rounds + 1}")
            for sparsity, step in steps.items():
                timed = Timed.of(step)
                if i > 1:  # two rounds of warm-up: plans, tuning, moments
                    times[sparsity].append(timed)
        for sparsity, model in models.items():
            memory[sparsity] = training_state_bytes(model) if sparsity else None
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    rows = [
        _row(sparsity, used, times[0.0], column) | {"memory": memory[sparsity]} for sparsity, column in times.items()
    ]
    return {
        "model": {**asdict(shape), "batch_size": batch_size, "parameters": shape.parameters},
        "rows": rows,
        "load": load,
        "hardware": hardware.hardware(),
        "versions": hardware.versions(),
    }


def _row(sparsity: float, threads: int, dense: Sequence[Timed], column: Sequence[Timed]) -> dict[str, Any]:
    seconds = [timed.seconds for timed in column]
    low, high = quartiles(seconds)
    ratio = compared(dense, column)
    return {
        "sparsity": sparsity, "threads": threads, "seconds_median": statistics.median(seconds),
        "seconds_low": low, "seconds_high": high,
        "ratio_to_dense": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high,
        "possible": ratio.median <= ideal(sparsity), "rounds": len(column), "disturbed_rounds": ratio.disturbed,
    }  # fmt: skip


def _training_step(model: torch.nn.Module, tokens: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        model(tokens[:, :-1], tokens[:, 1:].contiguous()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
