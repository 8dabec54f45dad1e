"""What a training step takes on this machine: the parts of one are timed, steps of any size are reckoned from them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vspdf.shapes import Shape


@dataclass(frozen=True)
class Calibration:
    """Seconds measured on this machine, float32: forward and backward of one block, of the vocabulary, and AdamW."""

    tokens: int  # of each measured pass
    sequence: int  # tokens that attend to each other in it
    rounds: int
    threads: int
    block_seconds: dict[float, float]  # by sparsity: attention, norms and activations included
    attention_seconds: tuple[float, float]  # one sequence of `sequence` tokens, one of the model's whole length
    vocabulary_seconds: float
    optimizer_seconds: float  # a parameter: clipping and AdamW

    def step_seconds(self, shape: Shape, sparsity: float, tokens: int) -> float:
        """Of one training step of `tokens`."""
        short, whole = self.attention_seconds
        missing = whole / shape.sequence_length - short / self.sequence  # attention a token, at the whole length
        block = self.block_seconds[sparsity] / self.tokens + missing
        parameters = shape.parameters - sparsity * shape.linear
        passes = tokens * (shape.n_layer * block + self.vocabulary_seconds / self.tokens)
        return passes + parameters * self.optimizer_seconds


def calibrate(
    shape: Shape,
    sparsities: Sequence[float],
    step_tokens: int,
    progress: Callable[[str], None] = lambda line: None,
    rounds: int = 3,
) -> Calibration:
    """Times one transformer block at the model's widths, dense and sparse, and what else a step is made of.

    Real modules, forward and backward, interleaved in one process; fewer tokens than a step has, and only one block, so
    that it takes seconds. `auto` times its paths in the warm-up round, as in training. Activations and gradients of a
    whole model do not fit caches as one block's may: expect the real step to be a few percent slower.

    Parameters
    ----------
    shape : Shape
    sparsities : sequence of float
        Beside 0, which is always measured.
    step_tokens : int
        Tokens of a whole step: never more are used.
    rounds : int
        After one of warm-up; medians count.
    """
    import torch
    import torch.nn.functional as F

    from vspdf.bench.rounds import time_rounds
    from vspdf.model import Block
    from vspdf.sparsity.surgery import sparsify

    block_weights = shape.linear // shape.n_layer
    tokens = min(step_tokens, 2048 if block_weights < 2e7 else 512)
    sequence = min(tokens, shape.sequence_length)
    batch = tokens // sequence
    d, head = shape.d_model, shape.d_model // shape.n_head
    generator = torch.Generator().manual_seed(0)
    progress(f"measuring one block of {d} x {shape.d_ff} on {batch * sequence} tokens, dense and at {sparsities}")
    random = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    x, grad = random(batch, sequence, d).requires_grad_(), random(batch, sequence, d)
    calls: dict[str, Callable[[], Any]] = {}

    def block(sparsity: float) -> Callable[[], None]:
        module = Block(shape)
        if sparsity:
            sparsify(module, sparsity)

        def call() -> None:
            module(x).backward(grad)
            module.zero_grad(set_to_none=True)

        return call

    for s in (0.0, *sparsities):
        calls[f"block {s}"] = block(s)

    def attention(length: int) -> Callable[[], None]:
        q, k, v = (random(1, shape.n_head, length, head).requires_grad_() for _ in range(3))
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    if sequence < shape.sequence_length:
        calls["short"], calls["whole"] = attention(sequence), attention(shape.sequence_length)

    rows = min(shape.vocab_size, 8192)  # time goes with the rows
    wte = (random(rows, d) * 0.02).requires_grad_()
    ids = torch.randint(rows, (batch * sequence,), generator=generator)

    def vocabulary() -> None:
        F.cross_entropy(F.linear(F.embedding(ids, wte), wte), ids).backward()
        wte.grad = None

    calls["vocabulary"] = vocabulary

    sample = torch.nn.Parameter(random(1 << 23))  # beyond any cache
    sample.grad = random(1 << 23)
    optimizer = torch.optim.AdamW([sample], lr=1e-5, fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_([sample], 1.0)
        optimizer.step()

    calls["optimizer"] = update
    times = time_rounds({name: {"layer": call} for name, call in calls.items()}, rounds)
    median = {name: statistics.median(column) for (name, _), column in times.items()}
    return Calibration(
        batch * sequence, sequence, rounds, torch.get_num_threads(),
        {s: median[f"block {s}"] for s in (0.0, *sparsities)},
        (median["short"], median["whole"]) if "short" in median else (0.0, 0.0),
        median["vocabulary"] * shape.vocab_size / rows, median["optimizer"] / sample.numel(),
    )  # fmt: skip
