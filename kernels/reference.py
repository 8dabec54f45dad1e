"""The truth: the three products of a sparse linear layer in plain masked-dense PyTorch.

Any float dtype, any device; nothing is skipped. The kernels are tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vspdf.pattern import Pattern


def materialise(values: Tensor, pattern: Pattern) -> Tensor:
    """Dense weight [out_features, in_features] with `values` (row-major) at kept positions and zeros elsewhere."""
    weight = values.new_zeros(pattern.numel)
    weight[pattern.positions().to(values.device)] = values
    return weight.view(pattern.shape)


def sample(dense: Tensor, pattern: Pattern) -> Tensor:
    """Kept positions of a dense [out_features, in_features], row-major: shape (nnz,)."""
    return dense.reshape(-1)[pattern.positions().to(dense.device)]


def forward(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """``x @ W.T + bias``: [T, in_features] -> [T, out_features]; wider `values` and `bias` are rounded to x's dtype."""
    shift = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, materialise(values.to(x.dtype), pattern), shift)


def grad_input(grad_output: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """``grad_output @ W``: [T, out_features] -> [T, in_features]."""
    return grad_output @ materialise(values.to(grad_output.dtype), pattern)


def grad_values(grad_output: Tensor, x: Tensor, pattern: Pattern, dtype: torch.dtype | None = None) -> Tensor:
    """``grad_output.T @ x`` at kept positions, row-major: shape (nnz,), of `dtype` (that of `x`)."""
    return sample(grad_output.T @ x, pattern).to(dtype or x.dtype)
