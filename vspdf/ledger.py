"""FLOPs: the one home of how they are counted.

Two halves. What a run *did*: `record` is called where the work is done, in three columns (dense: as if no weight were
masked; useful: kept weights only; executed: what the kernel really multiplied, padding included), so that nothing
multiplied by zero can be called skipped. What a run *would cost*: `training_flops` under the published conventions.
One multiply-add is 2 FLOPs throughout.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from vspdf.errors import UserError, check_sparsity, check_whole, did_you_mean, require
from vspdf.shapes import Shape, named_shape

# ---------------------------------------------------------------------------------------------------------------------
# Conventions: what a training run costs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Convention:
    """Weights b, c of two terms: total = 6 · tokens · (linear·(1−s) + b·attention + c·vocabulary)."""

    attention: float
    vocabulary: float
    softmax: float = 0.0  # multiply-adds per head, position and token, as FLOPs: 3·H·T in Chinchilla, App. F
    source: str = ""


CONVENTIONS: dict[str, Convention] = {
    "linear": Convention(0, 0, source="sparsified weights only"),
    "spdf": Convention(1, 1, source="SPDF, arXiv:2303.10464: 2.5x fewer FLOPs for GPT-3 XL at 75 %"),
    "vspdf": Convention(1, 5 / 3, source="best match to the article's 64 % for 6.7B; its own accounting is not stated"),
    "chinchilla": Convention(1, 2, softmax=3.0, source="arXiv:2203.15556, appendix F"),
    "cerebras-card": Convention(2, 5 / 3, source="an empirical fit to the seven published Cerebras-GPT totals"),
}


def flops_per_token(
    shape: Shape,
    sparsity: float = 0.0,
    convention: str = "vspdf",
    causal: bool = False,
) -> float:
    """Training FLOPs (forward and backward) per token under a named convention.

    Parameters
    ----------
    shape : Shape
    sparsity : float in [0, 1]
        Of all projection and FFN weights.
    convention : str
        A key of `CONVENTIONS`.
    causal : bool
        Count half of the attention products.

    Raises
    ------
    UserError
        For an unknown convention or a sparsity outside [0, 1].
    """
    if convention not in CONVENTIONS:
        raise UserError(f"unknown FLOP convention '{convention}'.{did_you_mean(convention, CONVENTIONS)}")
    check_sparsity("sparsity", sparsity, all_masked=True)
    rule = CONVENTIONS[convention]
    attention = shape.attention * (0.5 if causal else 1.0)
    softmax = rule.softmax * shape.n_layer * shape.n_head * shape.sequence_length / 2  # FLOPs -> multiply-adds
    dense_part = rule.attention * attention + softmax + rule.vocabulary * shape.vocabulary
    return 6 * (shape.linear * (1 - sparsity) + dense_part)


def training_flops(
    model: str | Shape,
    phases: Sequence[tuple[float, float]] | None = None,
    *,
    tokens: float | None = None,
    sparsity: float = 0.0,
    convention: str = "vspdf",
    causal: bool = False,
    sequence_length: int | None = None,
) -> float:
    """Total training FLOPs of a run.

    Parameters
    ----------
    model : str or Shape
        A key of `MODELS` or a shape.
    phases : sequence of (sparsity, tokens), optional
        Stages of training. Without it, one stage of `tokens` at `sparsity`.
    tokens, sparsity : float
        The single stage where `phases` is not given.
    convention : {"linear", "spdf", "vspdf", "chinchilla", "cerebras-card"}
    causal : bool
        Count half of the attention products.
    sequence_length : int, optional
        Instead of the model's own.

    Returns
    -------
    float
        FLOPs, two per multiply-add, forward and backward.

    Raises
    ------
    UserError
        For an unknown model or convention, if not one of `phases` and `tokens` is given, or for numbers that are none
        of tokens or of a length.
    """
    shape = named_shape(model) if isinstance(model, str) else model
    if sequence_length is not None:
        check_whole("sequence_length", sequence_length)
        shape = replace(shape, sequence_length=sequence_length)
    if (phases is None) == (tokens is None) or (phases is not None and sparsity):
        raise UserError("training_flops needs `tokens`, or `phases` as (sparsity, tokens) pairs: one of the two.")
    phases = [(sparsity, tokens or 0.0)] if phases is None else phases
    for _, count in phases:
        require(0 <= count < math.inf, f"tokens must be a number of at least 0, not {count}.")
    return sum(n * flops_per_token(shape, s, convention, causal) for s, n in phases)


# ---------------------------------------------------------------------------------------------------------------------
# Counts: what a run did
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Count:
    """FLOPs in the three columns, and seconds inside the products counted."""

    dense: int = 0
    useful: int = 0
    executed: int = 0
    seconds: float = 0.0

    def add(self, other: Count) -> None:
        self.dense += other.dense
        self.useful += other.useful
        self.executed += other.executed
        self.seconds += other.seconds

    def flops(self) -> dict[str, int]:
        return {"dense": self.dense, "useful": self.useful, "executed": self.executed}


@dataclass
class Tally:
    """Counts by product ("forward", "grad_input", "grad_values", ...)."""

    products: dict[str, Count] = field(default_factory=dict)

    def add(self, product: str, count: Count) -> None:
        self.products.setdefault(product, Count()).add(count)

    @property
    def total(self) -> Count:
        total = Count()
        for count in self.products.values():
            total.add(count)
        return total


TALLIES: list[Tally] = []
_lock = threading.Lock()


def record(product: str, dense: int, useful: int, executed: int, seconds: float) -> None:
    """Called by whoever did the work, with FLOPs (two per multiply-add)."""
    if TALLIES:
        with _lock:  # autograd runs backward in threads of its own
            for tally in TALLIES:
                tally.add(product, Count(dense, useful, executed, seconds))


@contextmanager
def counting() -> Iterator[Tally]:
    """Collects what is recorded inside the block, from every thread."""
    tally = Tally()
    with _lock:
        TALLIES.append(tally)
    try:
        yield tally
    finally:
        with _lock:
            TALLIES[:] = [other for other in TALLIES if other is not tally]
