"""The truth: the three products of a sparse linear layer in plain masked-dense PyTorch.

Any float dtype, any device; nothing is skipped. The kernels are tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vspdf.pattern import Pattern


def positions(pattern: Pattern, device: torch.device) -> Tensor:
    """Flat positions of the kept weights, int64 [nnz], kept with the pattern: made once per device."""
    return pattern.derived(f"positions {device}", lambda: pattern.positions().to(device))


def materialise(values: Tensor, pattern: Pattern, where: Tensor | None = None) -> Tensor:
    """Dense weight [out_features, in_features] with `values` (row-major) at kept positions and zeros elsewhere.

    `where` are the positions on the values' device, for those who keep them.
    """
    weight = values.new_zeros(pattern.numel)
    weight[pattern.positions().to(values.device) if where is None else where] = values
    return weight.view(pattern.shape)


def sample(dense: Tensor, pattern: Pattern, where: Tensor | None = None) -> Tensor:
    """Kept positions of a dense [out_features, in_features], row-major: shape (nnz,); `where` as above."""
    return dense.reshape(-1)[pattern.positions().to(dense.device) if where is None else where]


def forward(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """``x @ W.T + bias``: [T, in_features] -> [T, out_features]; wider `values` and `bias` are rounded to x's dtype."""
    shift = None if bias is None else bias.to(x.dtype)
    weight = materialise(values.to(x.dtype), pattern, positions(pattern, x.device))
    return torch.nn.functional.linear(x, weight, shift)


def grad_input(grad_output: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """``grad_output @ W``: [T, out_features] -> [T, in_features]."""
    return grad_output @ materialise(values.to(grad_output.dtype), pattern, positions(pattern, grad_output.device))


def grad_values(grad_output: Tensor, x: Tensor, pattern: Pattern, dtype: torch.dtype | None = None) -> Tensor:
    """``grad_output.T @ x`` at kept positions, row-major: shape (nnz,), of `dtype` (that of `x`)."""
    return sample(grad_output.T @ x, pattern, positions(pattern, x.device)).to(dtype or x.dtype)
