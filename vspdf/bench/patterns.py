"""Masks that ship, each of a kind that kernels meet, seeded: what `vspdf bench linear --pattern NAME` draws."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch

from vspdf.errors import UserError, did_you_mean
from vspdf.pattern import Pattern, kept_count

Shape = tuple[int, int]  # (out_features, in_features)


def _chosen(weights: np.ndarray, keep: int) -> Pattern:
    """The `keep` positions with the largest weights."""
    mask = np.zeros(weights.size, dtype=bool)
    mask[np.argpartition(-weights.reshape(-1), max(keep - 1, 0))[:keep]] = True
    return Pattern.from_mask(mask.reshape(weights.shape))


def uniform(shape: Shape, sparsity: float, seed: int) -> Pattern:
    """Every position alike: the static random masks of SPDF."""
    return Pattern.random(shape, sparsity, seed=seed)


def power_law(shape: Shape, sparsity: float, seed: int) -> Pattern:
    """Rows of very different lengths: the r-th longest has about 1/sqrt(r) of the longest."""
    generator = np.random.default_rng(seed)
    chance = generator.permutation(1 / np.sqrt(np.arange(1, shape[0] + 1)))[:, None]
    return _chosen(generator.random(shape) ** (1 / chance), kept_count(shape[0] * shape[1], sparsity))


def banded(shape: Shape, sparsity: float, seed: int) -> Pattern:
    """A band about the line between the corners, and nothing beside it."""
    rows, columns = np.arange(shape[0])[:, None] / shape[0], np.arange(shape[1])[None] / shape[1]
    return _chosen(-np.abs(rows - columns), kept_count(shape[0] * shape[1], sparsity))


def causal(shape: Shape, sparsity: float, seed: int) -> Pattern:
    """At random on and below the line between the corners, nothing above: half of the rows are nearly empty."""
    rows, columns = np.arange(shape[0])[:, None] / shape[0], np.arange(shape[1])[None] / shape[1]
    allowed = columns <= rows
    keep = kept_count(shape[0] * shape[1], sparsity)
    if keep > np.count_nonzero(allowed):
        raise UserError(f"pattern causal keeps half of a matrix at most: a sparsity of {sparsity:g} asks for more.")
    return _chosen(np.where(allowed, np.random.default_rng(seed).random(shape), -1), keep)


def arrow(shape: Shape, sparsity: float, seed: int) -> Pattern:
    """A few full rows and columns, and a band between the corners: a third of the weights each."""
    keep, (rows, columns) = kept_count(shape[0] * shape[1], sparsity), shape
    full_rows, full_columns = round(keep / 3 / columns), round(keep / 3 / rows)
    r, c = np.arange(rows)[:, None], np.arange(columns)[None]
    weights = -np.abs(r / rows - c / columns)
    return _chosen(np.where((r < full_rows) | (c < full_columns), 1.0, weights), keep)


def blocks(size: int) -> Callable[[Shape, float, int], Pattern]:
    """Square blocks that are kept or not: 1 is `uniform` with whole blocks for weights."""

    def draw(shape: Shape, sparsity: float, seed: int) -> Pattern:
        if shape[0] % size or shape[1] % size:
            raise UserError(f"pattern block-of-{size}: blocks of {size} do not divide a matrix of {shape}.")
        small = Pattern.random((shape[0] // size, shape[1] // size), sparsity, seed=seed).mask().numpy()
        return Pattern.from_mask(np.kron(small, np.ones((size, size), dtype=bool)))

    return draw


def n_of_m(n: int, m: int) -> Callable[[Shape, float, int], Pattern]:
    """N at random of every M neighbours in a row; the sparsity is 1 − N/M whatever is asked for."""
    if not 0 < n <= m:
        raise UserError(f"pattern {n}:{m}: expected N of M with 0 < N <= M, e.g. 2:4.")

    def draw(shape: Shape, sparsity: float, seed: int) -> Pattern:
        if shape[1] % m:
            raise UserError(f"pattern {n}:{m}: groups of {m} do not divide rows of {shape[1]}.")
        order = np.random.default_rng(seed).random((shape[0], shape[1] // m, m)).argsort(axis=2)
        return Pattern.from_mask((order < n).reshape(shape))

    return draw


def magnitude(shape: Shape, sparsity: float, seed: int) -> Pattern:
    """The largest of weights as a trained GPT-2 has them: rows and columns of unequal scale, a few far above."""
    generator = np.random.default_rng(seed)
    rows, columns = (np.exp(0.35 * generator.standard_normal(n)) for n in shape)
    columns[generator.integers(shape[1], size=max(1, shape[1] // 256))] *= 6  # outlier features
    weights = np.abs(generator.standard_normal(shape)) * rows[:, None] * columns[None]
    return Pattern.topk(torch.from_numpy(weights.astype(np.float32)), sparsity)


KINDS: dict[str, Callable[[Shape, float, int], Pattern]] = {
    "uniform": uniform, "power-law": power_law, "banded": banded, "causal": causal, "arrow": arrow,
    "blocks": blocks(16), "2:4": n_of_m(2, 4), "magnitude": magnitude,
}  # fmt: skip
NAMES = (*KINDS, "erk", "N:M", "block-of-N")


def erdos_renyi(shapes: Sequence[Shape], sparsity: float) -> list[float]:
    """Sparsities of layers by the Erdős-Rényi rule (arXiv:1707.04780): density goes with (out + in) / (out · in).

    Over all layers together `sparsity` is kept; a layer that would be more than full is dense.
    """
    sizes, scores = [a * b for a, b in shapes], [(a + b) / (a * b) for a, b in shapes]
    density, full = [0.0] * len(shapes), set[int]()
    while True:
        left = (1 - sparsity) * sum(sizes) - sum(sizes[i] for i in full)
        share = left / max(sum(n * s for i, (n, s) in enumerate(zip(sizes, scores, strict=True)) if i not in full), 1)
        density = [1.0 if i in full else share * score for i, score in enumerate(scores)]
        over = {i for i, d in enumerate(density) if d > 1}
        if not over:
            return [1 - d for d in density]
        full |= over


def find(name: str) -> Callable[[Shape, float, int], Pattern]:
    """How a pattern is drawn from shape, sparsity and seed.

    Raises
    ------
    UserError
        If no pattern has that name.
    """
    if found := re.fullmatch(r"(\d{1,3}):(\d{1,3})", name):
        return n_of_m(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"block-of-([1-9]\d{0,2})", name):
        return blocks(int(found[1]))
    if name not in KINDS:
        raise UserError(f"pattern '{name}' is not known.{did_you_mean(name, NAMES)}")
    return KINDS[name]


def draw(name: str, shapes: Sequence[Shape], sparsities: Sequence[float], seed: int = 0) -> list[tuple[str, Pattern]]:
    """Masks of one kind for every shape and sparsity, with their names; those that come out equal once.

    Raises
    ------
    UserError
        If the name is not known, or the kind does not fit a shape or a sparsity.
    """
    if name == "erk":
        amounts = [(shape, s) for sparsity in sparsities
                   for shape, s in zip(shapes, erdos_renyi(shapes, sparsity), strict=True)]  # fmt: skip
        return [("erk", Pattern.random(shape, min(max(s, 0.0), 1.0), seed=seed)) for shape, s in amounts]
    make = find(name)
    return list(dict.fromkeys((name, make(shape, s, seed)) for s in sparsities for shape in shapes))


def labelled(found: Sequence[tuple[str, Pattern]], sizes: bool, amounts: bool) -> list[tuple[str, Pattern]]:
    """Masks by kind, size and sparsity, the latter where there are several, with as many digits as tell them apart."""

    def labels(digits: int) -> list[str]:
        return [
            name + f" {p.in_features}x{p.out_features}" * sizes + f" {p.sparsity:.{digits}g}" * amounts
            for name, p in found
        ]

    digits = next((n for n in range(2, 10) if len(set(labels(n))) == len(found)), 2)
    return list(zip(labels(digits), (p for _, p in found), strict=True))
