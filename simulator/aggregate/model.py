"""What a step trains: a transformer's sizes, its sparsified matrices, a batch, and the systems that share it."""

from __future__ import annotations

from collections import Counter, abc
from dataclasses import asdict, dataclass, replace

import numpy as np

from vspdf.errors import check_sparsity
from vspdf.shapes import Shape
from vspdf.simulator.aggregate.layer import Weights

# Of BERT's positions, those whose logits are computed: 15 % are masked (arXiv:1810.04805).
MASKED = 0.15


@dataclass(frozen=True)
class Transformer(Shape):
    """A `Shape` with what the wafer sees beyond a GPT: Llama's blocks, BERT's few logits.

    Attributes
    ----------
    n_kv_head : int
        Heads of keys and values, fewer than `n_head` where queries are grouped; 0: as many.
    head_size : int
        Features of a head; 0: ``d_model / n_head``.
    gated : bool
        The FFN has two matrices in (SwiGLU).
    predicted : float
        Fraction of the positions that get logits.
    """

    n_kv_head: int = 0
    head_size: int = 0
    gated: bool = False
    predicted: float = 1.0

    @classmethod
    def of(cls, shape: Shape, **more: int | bool | float) -> Transformer:
        return shape if isinstance(shape, cls) else cls(**asdict(shape), **more)  # type: ignore[arg-type]

    @property
    def queries(self) -> int:
        """Features of all heads' queries."""
        return self.n_head * self.head_size if self.head_size else self.d_model

    @property
    def keys(self) -> int:
        """Features of all heads' keys; values have as many."""
        return self.queries * (self.n_kv_head or self.n_head) // self.n_head

    @property
    def linear(self) -> int:
        return sum(o * i * n for (o, i), n in matrices(self).items())

    @property
    def attention(self) -> int:
        return 2 * self.n_layer * self.sequence_length * self.queries

    @property
    def parameters(self) -> int:
        if not (self.gated or self.n_kv_head or self.head_size):
            return super().parameters
        return self.linear + 2 * self.vocabulary + (2 * self.n_layer + 1) * self.d_model

    def at(self, sequence_length: int) -> Transformer:
        return replace(self, sequence_length=sequence_length)


@dataclass(frozen=True)
class Model:
    """A model in training: a shape, its sparsified matrices with how often each occurs, a batch of sequences."""

    shape: Transformer
    layers: tuple[tuple[Weights, int], ...]
    batch: int  # sequences of a step, all systems
    systems: int = 1

    @classmethod
    def uniform(cls, shape: Shape, batch: int, sparsity: float = 0.0, systems: int = 1) -> Model:
        """All projection and FFN matrices at one sparsity, positions by chance."""
        check_sparsity("`sparsity`", sparsity)
        shape = Transformer.of(shape)
        layers = tuple((Weights(o, i, 1 - sparsity), n) for (o, i), n in matrices(shape).items())
        return cls(shape, layers, batch, systems)

    @classmethod
    def of_patterns(cls, shape: Shape, patterns: abc.Mapping[str, np.ndarray], batch: int, systems: int = 1) -> Model:
        """Real positions, bool [out_features, in_features] by layer; matrices without a pattern are dense."""
        shape = Transformer.of(shape)
        left, layers = Counter(matrices(shape)), []
        for mask in patterns.values():
            layers.append((Weights(mask.shape[0], mask.shape[1], float(mask.mean()), mask), 1))
            left[mask.shape] -= 1
        if sum(w.numel for w, _ in layers) < shape.linear:
            layers += [(Weights(o, i), n) for (o, i), n in left.items() if n > 0]
        return cls(shape, tuple(layers), batch, systems)

    @property
    def dense(self) -> Model:
        counts: Counter[tuple[int, int]] = Counter()
        for weights, n in self.layers:
            counts[weights.out_features, weights.in_features] += n
        return replace(self, layers=tuple((Weights(o, i), n) for (o, i), n in counts.items()))

    @property
    def measured(self) -> bool:
        """Whether positions are a run's own."""
        return any(weights.mask is not None for weights, _ in self.layers)

    @property
    def kept(self) -> float:
        """The fraction of projection and FFN weights that is kept."""
        return sum(w.nnz * n for w, n in self.layers) / sum(w.numel * n for w, n in self.layers)

    @property
    def tokens(self) -> int:
        return self.batch * self.shape.sequence_length

    @property
    def trained(self) -> float:
        """Parameters that the memory service updates: kept weights and the vocabulary."""
        return sum(w.nnz * n for w, n in self.layers) + self.shape.vocabulary

    def flops(self, dense: bool = False) -> float:
        """Useful FLOPs of a step: kept weights, attention in full, vocabulary (convention `spdf`)."""
        s = self.shape
        linear = s.linear * (1.0 if dense else self.kept)
        return 6 * self.tokens * (linear + s.attention + s.vocabulary * s.predicted)

    def grouped(self) -> Model:
        """Layers of a shape as one, at their mean density: for the search."""
        groups: dict[tuple[int, int], list[tuple[Weights, int]]] = {}
        for weights, n in self.layers:
            groups.setdefault((weights.out_features, weights.in_features), []).append((weights, n))
        layers = []
        for (o, i), members in groups.items():
            count = sum(n for _, n in members)
            layers.append((Weights(o, i, sum(w.density * n for w, n in members) / count), count))
        return replace(self, layers=tuple(layers))


def matrices(shape: Shape) -> dict[tuple[int, int], int]:
    """(out_features, in_features) of the sparsified matrices and how many there are: QKV as one, projection, FFN."""
    t = Transformer.of(shape)
    counts: Counter[tuple[int, int]] = Counter()
    for sides in (
        (t.queries + 2 * t.keys, t.d_model), (t.d_model, t.queries),
        (t.d_ff * (2 if t.gated else 1), t.d_model), (t.d_model, t.d_ff),
    ):  # fmt: skip
        counts[sides] += t.n_layer
    return dict(counts)
