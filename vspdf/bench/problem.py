"""One layer to be timed: a mask, random data, and the exact results that every candidate is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vspdf.bench.rounds import PRODUCTS, Candidate, Timed
from vspdf.errors import UserError, did_you_mean, in_one_line, require
from vspdf.kernels import reference
from vspdf.kernels.hardware import memory
from vspdf.pattern import Pattern

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest error as a fraction of the largest value: the rounding of sums of thousands of terms, and of a bf16 result.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def check_dtypes(names: Sequence[str]) -> None:
    """Refuses names that are not in `DTYPES`."""
    for name in names:
        require(
            name in DTYPES, f"`dtype` {name}: on a CPU {' and '.join(DTYPES)} are timed.{did_you_mean(name, DTYPES)}"
        )


def check_memory(what: str, needed: float) -> None:
    """Refuses what needs more bytes at least than this machine has, before anything of it is allocated."""
    if needed > (there := memory()):
        raise UserError(
            f"{what} would need {needed / 2**30:,.0f} GiB of memory at least, this machine has {there / 2**30:,.0f}."
        )


@dataclass
class Problem:
    """One layer's mask and data, float32.

    All numbers are representable in bfloat16 too, so that one float64 result is exact for both.

    Attributes
    ----------
    x : Tensor, shape (tokens, in_features)
    grad : Tensor, shape (tokens, out_features)
    weight : Tensor, shape (out_features, in_features)
        Zeros where the pattern keeps nothing.
    """

    pattern: Pattern
    x: Tensor
    grad: Tensor
    weight: Tensor

    @classmethod
    def of(cls, pattern: Pattern, tokens: int, seed: int = 0) -> Problem:
        """Random normal data, never zeros, for a mask."""
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(shape, generator=generator).bfloat16().float()  # noqa: E731
        x, grad = draw(tokens, pattern.in_features), draw(tokens, pattern.out_features)
        return cls(pattern, x, grad, draw(*pattern.shape) * pattern.mask())

    @classmethod
    def random(cls, tokens: int, in_features: int, out_features: int, sparsity: float, seed: int = 0) -> Problem:
        """The same for a static random mask."""
        return cls.of(Pattern.random((out_features, in_features), sparsity, seed=seed), tokens, seed)

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @cached_property
    def values(self) -> Tensor:
        """Kept weights, row-major."""
        return self.weight[self.pattern.mask()]

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """The three products in float64; the gradient of the values at kept positions."""
        x, grad, weight = self.x.double(), self.grad.double(), self.weight.double()
        return {
            "forward": x @ weight.T, "grad_input": grad @ weight,
            "grad_values": reference.sample(grad.T @ x, self.pattern),
        }  # fmt: skip

    def prepared(self, candidate: Any) -> float:
        """Lets a candidate prepare itself for the mask, and says how many seconds it took."""
        return Timed.of(lambda: candidate.prepare(self.pattern)).seconds if hasattr(candidate, "prepare") else 0.0

    def calls(self, candidate: Any, dtype: str = "float32") -> Candidate:
        """Timed calls of a candidate that is prepared, by product."""
        to = DTYPES[dtype]
        x, grad = self.x.to(to), self.grad.to(to)
        weights = (self.weight if getattr(candidate, "dense", False) else self.values).to(to)
        arguments = {"forward": (x, weights), "grad_input": (grad, weights), "grad_values": (grad, x),
                     "layer": (x, grad, weights)}  # fmt: skip
        return {
            product: _bound(getattr(candidate, product), arguments[product])
            for product in arguments
            if hasattr(candidate, product)
        }

    def error(self, product: str, found: Any) -> float:
        """Largest error of a result against float64, as a fraction of the largest value; infinite for another shape."""
        if product == "layer":
            return max(self.error(each, part) for each, part in zip(PRODUCTS, found, strict=True))
        exact, found = self.exact[product], found.read() if hasattr(found, "read") else found
        found = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
        if product == "grad_values" and found.shape == self.pattern.shape:
            found = reference.sample(found, self.pattern)  # of a dense side
        if not isinstance(found, Tensor) or found.shape != exact.shape:
            return float("inf")
        if not exact.numel():
            return 0.0
        error = float((found.detach().double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))
        return error if error == error else float("inf")

    def check(self, calls: Candidate) -> tuple[dict[str, float], dict[str, str]]:
        """Errors of a candidate's products on this mask, and why others failed."""
        errors: dict[str, float] = {}
        failed: dict[str, str] = {}
        for product, call in calls.items():
            try:
                errors[product] = self.error(product, call())
            except Exception as error:  # others' code may raise anything
                failed[product] = in_one_line(error)
        return errors, failed


def _bound(run: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: run(*arguments)


def facts(pattern: Pattern) -> Mapping[str, float]:
    """What a mask looks like, in figures.

    Returns
    -------
    dict
        ``rows``, ``columns``, ``kept``, ``sparsity``; ``row_spread``, the standard deviation of kept weights a row over
        their mean; ``fullest_row`` over the mean; ``empty_rows`` and ``empty_columns``; ``bandwidth``, the farthest a
        kept weight lies from the diagonal (of a rectangle: from the line between its corners), over the columns.
    """
    pointers, indices = pattern.csr()
    counts = np.diff(pointers)
    mean = max(counts.mean(), 1e-30)
    rows = np.repeat(np.arange(pattern.out_features), counts)
    away = np.abs(indices / pattern.in_features - rows / pattern.out_features)
    return {
        "rows": pattern.out_features, "columns": pattern.in_features, "kept": pattern.nnz,
        "sparsity": pattern.sparsity, "row_spread": float(counts.std() / mean),
        "fullest_row": float(counts.max() / mean), "empty_rows": int((counts == 0).sum()),
        "empty_columns": int(pattern.in_features - np.unique(indices).size),
        "bandwidth": float(away.max()) if pattern.nnz else 0.0,
    }  # fmt: skip
