"""A whole training step, sparse beside the same model dense."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from vspdf.attention import plain
from vspdf.bench.rounds import Timed, compared, ideal, others_at_work, quartiles
from vspdf.kernels import cpu, hardware
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
        ``ratio_to_dense`` (with torch's attention; of rounds, `compared`) and whether it is ``possible``, memory of the
        training state; ``scratch_bytes`` that the sparse kernels keep for their next calls, of all models together;
        ``load``, ``hardware``, ``versions``.
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
    load = others_at_work()
    times: dict[tuple[float, str], list[Timed]] = {side: [] for side in steps}
    try:
        for i in range(rounds + 2):
            progress(f"round {i} of {rounds + 1}")
            for side, step in steps.items():
                timed = Timed.of(step)
                if i > 1:  # two rounds of warm-up: plans, tuning, moments
                    times[side].append(timed)
        memory = {side: training_state_bytes(model) if side[0] else None for side, model in models.items()}
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    rows = [
        {"sparsity": side[0], "attention": side[1], "threads": used}
        | _figures(side[0], times[dense], times[0.0, side[1]], column)
        | {"memory": memory[side]}
        for side, column in times.items()
    ]
    return {
        "model": {**asdict(shape), "batch_size": batch_size, "parameters": shape.parameters},
        "rows": rows,
        "scratch_bytes": cpu.extension().scratch_nbytes(),
        "load": load,
        "hardware": hardware.hardware(),
        "versions": hardware.versions(),
    }


def _figures(
    sparsity: float, dense: Sequence[Timed], alike: Sequence[Timed], column: Sequence[Timed]
) -> dict[str, Any]:
    """Seconds and speed-up of one model; possible is what sparsity allows against a dense model with its attention."""
    seconds = [timed.seconds for timed in column]
    low, high = quartiles(seconds)
    ratio = compared(dense, column)
    return {
        "seconds_median": statistics.median(seconds), "seconds_low": low, "seconds_high": high,
        "ratio_to_dense": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high,
        "possible": compared(alike, column).median <= ideal(sparsity), "rounds": len(column),
        "disturbed_rounds": ratio.disturbed,
    }  # fmt: skip


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
