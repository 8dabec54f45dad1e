"""FLOPs: the one home of how they are counted.

Two halves. What a run *did*: `record` is called where the work is done, in three columns (dense: as if no weight were
masked; useful: kept weights only; executed: what the kernel really multiplied, padding included), so that nothing
multiplied by zero can be called skipped. What a run *would cost*: `training_flops` under the published conventions.
One multiply-add is 2 FLOPs throughout.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from vspdf.errors import UserError, did_you_mean

# ---------------------------------------------------------------------------------------------------------------------
# Model shapes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What FLOPs depend on. Multiply-adds per token: ``linear``, ``attention`` (QKᵀ and AV, full), ``vocabulary``."""

    n_layer: int
    d_model: int
    n_head: int
    d_ff: int
    vocab_size: int
    sequence_length: int

    @property
    def linear(self) -> int:
        """Projection and FFN weights: ``L(4d² + 2·d·f)``, the ones that sparsity applies to."""
        return self.n_layer * (4 * self.d_model**2 + 2 * self.d_model * self.d_ff)

    @property
    def attention(self) -> int:
        return 2 * self.n_layer * self.sequence_length * self.d_model

    @property
    def vocabulary(self) -> int:
        return self.vocab_size * self.d_model

    @property
    def parameters(self) -> int:
        """All parameters of a GPT-2-shaped model with biases, learnt positions and a tied unembedding."""
        d, f = self.d_model, self.d_ff
        block = 4 * d * d + 2 * d * f + 9 * d + f  # weights + biases (4d attention, f + d FFN) + two norms (4d)
        return self.n_layer * block + (self.vocab_size + self.sequence_length) * d + 2 * d


def _gpt(
    n_layer: int, d_model: int, n_head: int, d_ff: int, vocab_size: int = 50257, sequence_length: int = 2048
) -> Shape:
    return Shape(n_layer, d_model, n_head, d_ff, vocab_size, sequence_length)


# Cerebras-GPT: arXiv:2304.03208, table 1; GPT-2: Radford et al. 2019; GPT-3 XL: arXiv:2005.14165, table 2.1.
MODELS: dict[str, Shape] = {
    "cerebras-gpt-111m": _gpt(10, 768, 12, 3072),
    "cerebras-gpt-256m": _gpt(14, 1088, 17, 4352),
    "cerebras-gpt-590m": _gpt(18, 1536, 12, 6144),
    "cerebras-gpt-1.3b": _gpt(24, 2048, 16, 8192),
    "cerebras-gpt-2.7b": _gpt(32, 2560, 32, 10240),
    "cerebras-gpt-6.7b": _gpt(32, 4096, 32, 16384),
    "cerebras-gpt-13b": _gpt(40, 5120, 40, 20480),
    "gpt2-small": _gpt(12, 768, 12, 3072, sequence_length=1024),
    "gpt3-xl": _gpt(24, 2048, 16, 8192),
    "gpt-j-6b": _gpt(28, 4096, 16, 16384, vocab_size=50400),
    "bert-large": _gpt(24, 1024, 16, 4096, vocab_size=30522, sequence_length=512),
}


def model_shape(name: str) -> Shape:
    """Shape of a named model.

    Raises
    ------
    UserError
        If the name is unknown.
    """
    if name not in MODELS:
        raise UserError(f"unknown model '{name}'.{did_you_mean(name, MODELS)}")
    return MODELS[name]


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
    dense_weight_gradient: bool = False,
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
    dense_weight_gradient : bool
        Of the three products of a layer, only the forward one and the gradient of its input skip masked weights, as
        where a framework masks the weight's gradient after the fact: at 75 % 6.7B saves 44.8 % (``spdf``), not 67.25 %.

    Raises
    ------
    UserError
        For an unknown convention or a sparsity outside [0, 1].
    """
    if convention not in CONVENTIONS:
        raise UserError(f"unknown FLOP convention '{convention}'.{did_you_mean(convention, CONVENTIONS)}")
    if not 0 <= sparsity <= 1:
        raise UserError(f"sparsity must lie in [0, 1], not {sparsity}.")
    rule = CONVENTIONS[convention]
    attention = shape.attention * (0.5 if causal else 1.0)
    softmax = rule.softmax * shape.n_layer * shape.n_head * shape.sequence_length / 2  # FLOPs -> multiply-adds
    dense_part = rule.attention * attention + softmax + rule.vocabulary * shape.vocabulary
    kept = 1 - sparsity * (2 / 3 if dense_weight_gradient else 1)
    return 6 * (shape.linear * kept + dense_part)


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
        For an unknown model or convention, or if neither `phases` nor `tokens` is given.
    """
    shape = model_shape(model) if isinstance(model, str) else model
    if sequence_length is not None:
        shape = replace(shape, sequence_length=sequence_length)
    if phases is None:
        if tokens is None:
            raise UserError("training_flops needs `tokens`, or `phases` as (sparsity, tokens) pairs.")
        phases = [(sparsity, tokens)]
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


_tallies: list[Tally] = []
_lock = threading.Lock()


def record(product: str, dense: int, useful: int, executed: int, seconds: float) -> None:
    """Called by whoever did the work, with FLOPs (two per multiply-add)."""
    if _tallies:
        with _lock:  # autograd runs backward in threads of its own
            for tally in _tallies:
                tally.add(product, Count(dense, useful, executed, seconds))


@contextmanager
def counting() -> Iterator[Tally]:
    """Collects what is recorded inside the block, from every thread."""
    tally = Tally()
    with _lock:
        _tallies.append(tally)
    try:
        yield tally
    finally:
        with _lock:
            _tallies[:] = [other for other in _tallies if other is not tally]
