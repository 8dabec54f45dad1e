"""Which path runs a product, and why."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

from vspdf.errors import BackendUnavailable, UserError, did_you_mean
from vspdf.kernels import cpu
from vspdf.pattern import Pattern

BACKENDS = ("auto", "cpu", "reference", "triton")


class Choice(NamedTuple):
    path: str  # "cpu" or "dense"
    reason: str


def choose(
    product: str, pattern: Pattern, tokens: int, dtype: torch.dtype, device: torch.device, backend: str = "auto"
) -> Choice:
    """Path for one product ("forward", "grad_input" or "grad_values") of `tokens` rows.

    Raises
    ------
    UserError
        If `backend` is unknown, or the named one takes neither the dtype nor the device.
    BackendUnavailable
        If the named backend cannot run here.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown backend '{backend}'.{did_you_mean(backend, BACKENDS)}")
    if backend == "reference":
        return Choice("dense", "asked for: masked-dense PyTorch")
    if backend == "triton":
        raise BackendUnavailable("backend 'triton' is not part of this version; use 'auto' (dense on a GPU).")
    refusal = (
        f"no kernel for device '{device.type}'" if device.type != "cpu"
        else f"no kernel for {dtype} (float32 and bfloat16 have one)" if dtype not in cpu.DTYPES
        else None
    )  # fmt: skip
    if backend == "cpu":
        if refusal:
            raise UserError(f"backend 'cpu' cannot run: {refusal}.")
        cpu.extension()
        return Choice("cpu", "asked for")
    if refusal:
        return Choice("dense", refusal)
    missing = cpu.unavailable()
    if missing:
        warnings.warn(f"vspdf: sparse products run dense: {missing}.", stacklevel=2)
        return Choice("dense", missing)
    if pattern.sparsity < 0.45:
        return Choice("dense", f"sparsity {pattern.sparsity:.2f} is below the kernels' break-even of about 0.45")
    return Choice("cpu", f"sparsity {pattern.sparsity:.2f} is above the kernels' break-even of about 0.45")
