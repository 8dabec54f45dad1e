"""What a training step takes on this machine: the parts of one are timed, steps of any size are reckoned from them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from vspdf.shapes import Shape

_Cast = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Calibration:
    """Seconds measured on this machine: forward and backward of one block, of the vocabulary, and AdamW."""

    tokens: int  # of each measured pass
    sequence: int  # tokens that attend to each other in it
    rounds: int
    threads: int
    block_seconds: dict[float, float]  # by sparsity: attention, norms and activations included
    attention_seconds: tuple[float, float]  # one sequence of `sequence` tokens, one of the model's whole length
    vocabulary_seconds: float
    optimizer_seconds: float  # a parameter: clipping and AdamW
    note: str = ""  # on what makes them longer than they are alone
    precision: str = "fp32"  # of forward and backward: or "bf16", under autocast

    def step_seconds(self, shape: Shape, sparsity: float, tokens: int) -> float:
        """Of one training step of `tokens`."""
        short, whole = self.attention_seconds
        missing = whole / shape.sequence_length - short / self.sequence  # attention a token, at the whole length
        block = self.block_seconds[sparsity] / self.tokens + missing
        parameters = shape.parameters - sparsity * shape.linear
        passes = tokens * (shape.n_layer * block + self.vocabulary_seconds / self.tokens)
        return passes + parameters * self.optimizer_seconds


def precisions() -> tuple[str, ...]:
    """Those of `train.precision` that this processor multiplies in."""
    from vspdf.kernels.cpu import has_bf16

    return ("fp32", "bf16") if has_bf16() else ("fp32",)


UPDATED = 1 << 23  # parameters whose update is timed: beyond any cache


def calibrate(
    shape: Shape,
    sparsities: Sequence[float],
    step_tokens: int,
    progress: Callable[[str], None] = lambda line: None,
    rounds: int = 3,
    precision: str = "fp32",
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
    precision : {"fp32", "bf16"}
        As `train.precision`: on a processor without bfloat16 all is float32.
    """
    import torch

    from vspdf import gemm
    from vspdf.bench.rounds import busy, others_at_work, time_rounds

    if precision not in precisions():
        precision = "fp32"
    cast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bf16")
    others = busy(others_at_work())
    block_weights = shape.linear // shape.n_layer
    tokens = min(step_tokens, 2048 if block_weights < 2e7 else 512)
    sequence = min(tokens, shape.sequence_length)
    batch = tokens // sequence
    size = f"{shape.d_model} x {shape.d_ff} on {batch * sequence} tokens"
    progress(f"measuring one block of {size}, dense and at {sparsities}")
    torch.manual_seed(0)  # data, never zeros
    calls = {f"block {s}": _block(shape, s, batch, sequence, cast) for s in (0.0, *sparsities)}
    if sequence < shape.sequence_length:
        lengths = {"short": sequence, "whole": shape.sequence_length}
        calls |= {name: _attention(shape, length, precision) for name, length in lengths.items()}
    rows = min(shape.vocab_size, 8192)  # time goes with the rows
    calls |= {"vocabulary": _vocabulary(shape.d_model, rows, batch * sequence, cast), "optimizer": _update()}
    with gemm.faster():  # as the trainer multiplies
        times = time_rounds({name: {"layer": call} for name, call in calls.items()}, rounds)
    median = {name: statistics.median(timed.seconds for timed in column) for (name, _), column in times.items()}
    return Calibration(
        batch * sequence, sequence, rounds, torch.get_num_threads(),
        {s: median[f"block {s}"] for s in (0.0, *sparsities)},
        (median["short"], median["whole"]) if "short" in median else (0.0, 0.0),
        median["vocabulary"] * shape.vocab_size / rows, median["optimizer"] / UPDATED,
        others and f"{others} Alone, a step takes less time than is said here.", precision,
    )  # fmt: skip


def _block(shape: Shape, sparsity: float, batch: int, sequence: int, cast: _Cast) -> Callable[[], None]:
    """Forward and backward of one transformer block."""
    import torch

    from vspdf.model import Block
    from vspdf.rotary import rotation
    from vspdf.sparsity.surgery import sparsify

    module = Block(shape)
    if sparsity:
        sparsify(module, sparsity)
    x = torch.randn(batch, sequence, shape.d_model, requires_grad=True)
    grad = torch.randn(batch, sequence, shape.d_model)
    by = rotation(shape, torch.arange(sequence))

    def call() -> None:
        with cast():
            y = module(x, by)
        y.backward(grad)
        module.zero_grad(set_to_none=True)

    return call


def _attention(shape: Shape, length: int, precision: str) -> Callable[[], None]:
    """Forward and backward of causal attention over one sequence."""
    import torch

    from vspdf.attention import causal_attention

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = (1, shape.n_head, length, shape.head_dim)
    q, k, v = (torch.randn(size).to(dtype).requires_grad_() for _ in "qkv")
    return lambda: causal_attention(q, k, v).sum().backward()


def _vocabulary(d_model: int, rows: int, tokens: int, cast: _Cast) -> Callable[[], None]:
    """Embedding, unembedding and loss over `rows` of a vocabulary, forward and backward."""
    import torch
    import torch.nn.functional as F

    wte = (torch.randn(rows, d_model) * 0.02).requires_grad_()
    ids = torch.randint(rows, (tokens,))

    def call() -> None:
        with cast():
            loss = F.cross_entropy(F.linear(F.embedding(ids, wte), wte).float(), ids)
        loss.backward()
        wte.grad = None

    return call


def _update() -> Callable[[], None]:
    """Clipping and AdamW over `UPDATED` parameters."""
    import torch

    sample = torch.nn.Parameter(torch.randn(UPDATED))
    sample.grad = torch.randn(UPDATED)
    optimizer = torch.optim.AdamW([sample], lr=1e-5, fused=True)

    def call() -> None:
        torch.nn.utils.clip_grad_norm_([sample], 1.0)
        optimizer.step()

    return call
