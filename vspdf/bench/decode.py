"""Generation token by token: a sparse model beside the same one dense, in float32 and in bfloat16.

One token a sequence is bound by the bytes of the weights that have to be read for it, not by multiply-adds.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import nn

from vspdf.bench.problem import DTYPES
from vspdf.bench.rounds import Timed, compared, on_threads, others_at_work
from vspdf.errors import require
from vspdf.kernels import hardware
from vspdf.model import GPT, Cache
from vspdf.sparsity.layer import SparseLinear, sparse_layers
from vspdf.sparsity.surgery import sparsify


class Side(NamedTuple):
    """One of the models that take turns; a sparsity of 0 is the dense model."""

    sparsity: float
    dtype: str
    batch_size: int


def bench_decode(
    model: GPT,
    sparsities: Sequence[float] = (0.5, 0.75, 0.9, 0.95, 0.99),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    batch_sizes: Sequence[int] = (1,),
    context: int = 64,
    tokens: int = 8,
    threads: int | None = None,
    rounds: int = 5,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Times greedy generation after a prompt, from a cache of keys and values, interleaved in one process.

    Parameters
    ----------
    model : GPT
        Dense. With no `sparsities`, its own zeros are taken for masked ("from_zeros").
    sparsities : sequence of float
        Masks at random.
    dtypes : sequence of {"float32", "bfloat16"}
        Dense and sparse; dense float32 is always there, to be compared with.
    batch_sizes : sequence of int
        Sequences at a time.
    context : int
        Tokens before the first that is timed.
    tokens : int
        Timed in a round, one after the other.

    Returns
    -------
    dict
        ``rows`` with ``sparsity``, ``dtype``, ``batch_size``, ``tokens_per_second`` (of all sequences),
        ``seconds_median`` a token, ``ratio_to_dense`` with its interval (against dense float32), ``ratio_to_bfloat16``
        (against dense bfloat16, where it was timed) and ``bytes``, read for a token: weights, masks, output head;
        ``model``, ``load``, ``hardware``, ``versions``.
    """
    load, taken = others_at_work(), tuple(dict.fromkeys(["float32", *dtypes]))
    with on_threads(threads) as used:
        models = _models(model, sparsities, taken)
        kept = dict.fromkeys(s for s, _ in models)
        sides = [
            Side(s, dtype, batch) for batch in batch_sizes for s in kept for dtype in taken if (s, dtype) in models
        ]
        turns = {side: _Turn(models[side.sparsity, side.dtype], side.batch_size, context, tokens) for side in sides}
        times: dict[Side, list[Timed]] = {side: [] for side in sides}
        for i in range(rounds + 1):
            progress(f"round {i} of {rounds}")
            for side, turn in turns.items():
                timed = Timed.of(turn)
                if i:  # the first warms up: plans, tuning
                    times[side].append(timed)
    rows = []
    for side, column in times.items():
        seconds = statistics.median(timed.seconds for timed in column) / tokens
        ratio = compared(times[Side(0.0, "float32", side.batch_size)], column)
        other = times.get(Side(0.0, "bfloat16", side.batch_size))
        rows.append({
            **side._asdict(), "threads": used, "tokens_per_second": side.batch_size / seconds,
            "seconds_median": seconds,
            "ratio_to_dense": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high,
            "ratio_to_bfloat16": compared(other, column).median if other else None,
            "bytes": read_bytes(models[side.sparsity, side.dtype]), "rounds": len(column),
            "disturbed_rounds": ratio.disturbed,
        })  # fmt: skip
    return {
        "model": {**asdict(model.shape), "parameters": model.shape.parameters}, "context": context, "rows": rows,
        "load": load, "hardware": hardware.hardware(), "versions": hardware.versions(),
    }  # fmt: skip


def _models(model: GPT, sparsities: Sequence[float], dtypes: Sequence[str]) -> dict[tuple[float, str], GPT]:
    """Every model to be timed, by sparsity and dtype."""
    found: dict[tuple[float, str], GPT] = {}
    for amount in (0.0, *(sparsities or [None])):  # type: ignore[list-item]
        mine = copy.deepcopy(model).eval()
        if amount is None:
            sparsify(mine, 0.5, init_method="from_zeros")
            layers = sparse_layers(mine).values()
            zeros = any(layer.pattern.nnz < layer.pattern.numel for layer in layers)
            require(zeros, "`sparsity` zeros: none of its weights is zero: expected a checkpoint that was pruned.")
            amount = 1 - sum(layer.pattern.nnz for layer in layers) / sum(layer.pattern.numel for layer in layers)
        elif amount:
            sparsify(mine, amount)
        for dtype in dtypes:
            found[amount, dtype] = copy.deepcopy(mine).to(DTYPES[dtype])
    return found


def read_bytes(model: nn.Module) -> int:
    """Bytes of the weights that one more token has to read: matrices dense or sparse, and the output head."""
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            values = module.values
            total += values.numel() * values.element_size() + min(module.pattern.numel // 8, 2 * values.numel())
        elif isinstance(module, nn.Linear) or (name == "wte" and getattr(model, "lm_head", None) is None):
            assert isinstance(module.weight, torch.Tensor)
            total += module.weight.numel() * module.weight.element_size()
    return total


class _Turn:
    """Some tokens of greedy generation, again and again after the same prompt."""

    def __init__(self, model: GPT, batch_size: int, context: int, tokens: int) -> None:
        self.model, self.context, self.tokens = model, context, tokens
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(model.shape.vocab_size, (batch_size, context), generator=generator)
        self.cache = Cache(model, torch.zeros(batch_size, dtype=torch.long), context + tokens)
        with torch.no_grad():
            self.first = model.logits(model.hidden(prompt, self.cache)[:, -1]).argmax(-1)

    @torch.no_grad()
    def __call__(self) -> None:
        self.cache.length, next_B = self.context, self.first
        for _ in range(self.tokens):
            hidden = self.model.hidden(next_B[:, None], self.cache)
            next_B = self.model.logits(hidden[:, -1]).argmax(-1)
