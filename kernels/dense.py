"""Dense GEMM on materialised weights: the path `auto` takes where it is faster than skipping."""

from __future__ import annotations

import torch
from torch import Tensor

from vspdf.kernels import cpu, reference
from vspdf.pattern import Pattern


def _weight(values: Tensor, pattern: Pattern) -> Tensor:
    return (cpu.materialise if cpu.takes(values) else reference.materialise)(values, pattern)


def forward(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """``x @ W.T + bias``: [T, in_features] -> [T, out_features]."""
    return torch.nn.functional.linear(x, _weight(values, pattern), bias)


def grad_input(grad_output: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """``grad_output @ W``: [T, out_features] -> [T, in_features]."""
    return grad_output @ _weight(values, pattern)


def grad_values(grad_output: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    """``grad_output.T @ x`` at kept positions, row-major: shape (nnz,)."""
    full = grad_output.T @ x
    return (cpu.sample if cpu.takes(full) else reference.sample)(full, pattern)
