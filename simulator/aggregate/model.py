"""What a step trains: a transformer's sizes, its sparsified matrices, a batch, and the systems that share it."""

from __future__ import annotations

from collections import Counter, abc
from dataclasses import dataclass, fields, replace

import numpy as np

from vspdf.errors import check_sparsity
from vspdf.shapes import Shape
from vspdf.simulator.aggregate.layer import Weights

# Of BERT's positions, those whose logits are computed: 15 % are masked (arXiv:1810.04805).
MASKED = 0.15


@dataclass(frozen=True)
class Transformer(Shape):
    """A `Shape` with what the wafer sees beyond a GPT: BERT's few logits.

    Attributes
    ----------
    predicted : float
        Fraction of the positions that get logits.
    """

    predicted: float = 1.0

    @classmethod
    def of(cls, shape: Shape, predicted: float = 1.0) -> Transformer:
        if isinstance(shape, cls):
            return shape
        return cls(**{field.name: getattr(shape, field.name) for field in fields(Shape)}, predicted=predicted)

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
            layers.append((Weights.of_mask(mask), 1))
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
    """(out_features, in_features) of the sparsified matrices and how many there are; of a GPT-2, QKV as one."""
    counts = Counter(shape.block.values())
    return {sides: shape.n_layer * count for sides, count in counts.items()}
