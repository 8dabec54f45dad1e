"""What a mask can follow from in a tensor of torch's: which entries are largest, and which a sparse one stores."""

from __future__ import annotations

import numpy as np
import torch

from vspdf.errors import UserError


def by_magnitude(weight: torch.Tensor) -> np.ndarray:
    """Flat positions of a matrix, the largest magnitude first, of equal ones the first; int64.

    Raises
    ------
    UserError
        If it is no matrix of finite numbers.
    """
    if not isinstance(weight, torch.Tensor):
        raise UserError(
            f"topk ranks a torch.Tensor, not a {type(weight).__name__}: torch.as_tensor makes one of arrays."
        )
    if weight.is_meta or weight.layout != torch.strided:
        what = f"on {weight.device}" if weight.is_meta else f"stored as {weight.layout}"
        raise UserError(f"topk ranks a matrix of finite numbers: this one is {what}.")
    weight = weight.detach()
    if weight.is_complex() or weight.dtype == torch.float64:
        below = -weight.abs()
    elif weight.is_floating_point():
        below = -weight.float().abs()
    else:
        below = torch.minimum(weight.long(), -weight.long())  # exact, that of the least of them too
    if weight.dim() != 2 or not bool(below.isfinite().all()):
        raise UserError(f"topk ranks a matrix of finite numbers: {tuple(weight.shape)} is none, or NaN is in it.")
    return np.argsort(below.cpu().numpy().reshape(-1), kind="stable")


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """Which entries a sparse tensor of torch stores, as booleans of its shape; explicit zeros count."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        same = torch.sparse_coo_tensor(tensor.indices(), torch.ones_like(tensor.values()), tensor.shape)
        return same.to_dense().bool()
    rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    indices = (tensor.crow_indices(), tensor.col_indices()) if rows else (tensor.ccol_indices(), tensor.row_indices())
    same = torch.sparse_compressed_tensor(
        *indices, torch.ones_like(tensor.values()), tensor.shape, layout=tensor.layout
    )
    return same.to_dense().bool()
