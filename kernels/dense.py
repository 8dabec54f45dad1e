"""Dense GEMM on materialised weights: the path `auto` takes where it is faster than skipping.

What spreads values out and collects gradients runs where they are: C++ on the CPU, one kernel on a GPU; elsewhere torch
indexes by positions that are kept on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vspdf import gemm
from vspdf.kernels import cpu, reference
from vspdf.kernels.gpu import bitmap, launch
from vspdf.pattern import Pattern


def _weight(values: Tensor, pattern: Pattern, dtype: torch.dtype) -> Tensor:
    if cpu.takes(values):
        return cpu.materialise(values, pattern).to(dtype)
    if launch.takes(values):
        return bitmap.expand(values, pattern, dtype)
    return reference.materialise(values.to(dtype), pattern, reference.positions(pattern, values.device))


def _sample(full: Tensor, pattern: Pattern, dtype: torch.dtype) -> Tensor:
    if cpu.takes(full):
        return cpu.sample(full, pattern).to(dtype)
    if launch.takes(full):
        return bitmap.sample(full, pattern, dtype)
    return reference.sample(full, pattern, reference.positions(pattern, full.device)).to(dtype)


def _working_dtype(x: Tensor) -> torch.dtype:
    """What torch multiplies `x` in: on processors without bfloat16 its own products of it take 10 to 100 times as long
    as those of float32 (pytorch#146508), so that there they are computed in float32."""
    return torch.float32 if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not cpu.has_bf16() else x.dtype


def forward(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """``x @ W.T + bias``: [T, in_features] -> [T, out_features]; `values` and `bias` may be wider than `x`."""
    dtype = _working_dtype(x)
    shift = None if bias is None else bias.to(dtype)
    with gemm.faster():
        return torch.nn.functional.linear(x.to(dtype), _weight(values, pattern, dtype), shift).to(x.dtype)


def grad_input(grad_output: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """``grad_output @ W``: [T, out_features] -> [T, in_features]."""
    dtype = _working_dtype(grad_output)
    with gemm.faster():
        return (grad_output.to(dtype) @ _weight(values, pattern, dtype)).to(grad_output.dtype)


def grad_values(grad_output: Tensor, x: Tensor, pattern: Pattern, dtype: torch.dtype | None = None) -> Tensor:
    """``grad_output.T @ x`` at kept positions, row-major: shape (nnz,), of `dtype` (that of `x`)."""
    working = _working_dtype(x)
    with gemm.faster():
        full = grad_output.to(working).T @ x.to(working)
    return _sample(full, pattern, dtype or x.dtype)
