"""2:4 tensor cores through torch's cuSPARSELt, and the weights that do not fit 2:4 by the gather kernel.

Of every four neighbours along the summed side at most two go to the tensor cores, the rest stays for the gather kernel:
0.095 % of all positions of a random mask at 90 % sparsity, 0.012 % at 95 %. The compressed form is opaque (values and
metadata in one buffer), so its layout is learnt once per pattern, from what the library makes of known numbers; later
values go straight to their places.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vspdf.kernels.gpu import launch
from vspdf.pattern import Pattern

BASE = 128  # of the digits by which places are learnt: 1 to 128 are exact in bfloat16


class Library(Protocol):
    """A library that multiplies the compressed form."""

    name: str

    def compress(self, weight: Tensor) -> Tensor:
        """Opaque buffer, of the dtype of `weight`, of a matrix [rows, columns] with at most two of every four."""
        ...

    def multiply(self, x: Tensor, compressed: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``: [tokens, columns] -> [tokens, rows]; tokens are a multiple of 8."""
        ...


class CuSparseLt:
    """cuSPARSELt as torch binds it."""

    name = "cusparselt"

    def compress(self, weight: Tensor) -> Tensor:
        return torch._cslt_compress(weight)

    def multiply(self, x: Tensor, compressed: Tensor, bias: Tensor | None) -> Tensor:
        return torch._cslt_sparse_mm(compressed, x.t(), bias=bias, transpose_result=True)


CUSPARSELT = CuSparseLt()


def unavailable(pattern: Pattern, precision: str) -> str | None:
    """Why 2:4 cannot run a pattern here; None if it can."""
    if precision not in ("fp16", "bf16"):
        return f"2:4 takes float16 and bfloat16, not {precision}"
    if pattern.out_features % 16 or pattern.in_features % 16:
        return "2:4 needs sides that are multiples of 16"
    if not torch.backends.cusparselt.is_available():
        return "cuSPARSELt is not part of this torch"
    if torch.cuda.get_device_capability() < (8, 0):
        return "2:4 needs compute capability 8.0"
    return None


class Split(NamedTuple):
    """One side's matrix [rows, columns] in two parts: places among the side's kept weights, row-major."""

    fits: np.ndarray  # bool [nnz]: at most two of every four columns
    rest: Pattern  # the others


def split(pattern: Pattern) -> Split:
    """The first two kept weights of every four columns, and what is left."""
    mask = pattern.mask().numpy()
    rows, columns = mask.shape
    wide = np.zeros((rows, -(-columns // 4), 4), dtype=bool)
    wide.reshape(rows, -1)[:, :columns] = mask
    fits = (wide & (np.cumsum(wide, axis=2, dtype=np.int8) <= 2)).reshape(rows, -1)[:, :columns]
    return Split(fits[mask], Pattern.from_mask(mask & ~fits))


class Layout:
    """The places that the values of one side go in the library's compressed form."""

    def __init__(
        self, pattern: Pattern, source: np.ndarray, dtype: torch.dtype, device: torch.device, library: Library
    ):
        fits, self.rest = split(pattern)
        as_tensor = lambda a: torch.from_numpy(a.astype(np.int32)).to(device)  # noqa: E731
        self.rest_source = as_tensor(source[~fits])
        kept, place = (
            torch.zeros(pattern.shape, dtype=dtype, device=device),
            torch.zeros(pattern.shape, dtype=torch.int64),
        )
        where = torch.zeros(pattern.shape, dtype=torch.bool)
        where[pattern.mask()] = torch.from_numpy(fits)
        kept[where.to(device)] = 1
        place[where] = torch.arange(int(fits.sum()))
        place = place.to(device)
        # A value's place changes with the value; metadata does not: it tells positions alone.
        self.buffer = library.compress(kept)
        self.places = torch.nonzero(_bits(self.buffer) != _bits(library.compress(2 * kept))).flatten()
        index = torch.zeros(len(self.places), dtype=torch.int64, device=device)
        weight = 1
        while weight < max(int(fits.sum()), 1):
            digit = (place // weight % BASE + 1).to(dtype) * kept
            index += (library.compress(digit).flatten()[self.places].to(torch.int64) - 1) * weight
            weight *= BASE
        self.source = as_tensor(source[fits])[index]
        self.numel = pattern.numel

    @property
    def nbytes(self) -> int:
        tensors = (self.buffer, self.places, self.source, self.rest_source)
        return sum(t.numel() * t.element_size() for t in tensors)

    def compressed(self, values: Tensor) -> Tensor:
        """The library's form of these values: one gather."""
        buffer = self.buffer.clone()
        buffer.view(-1)[self.places] = values[self.source]
        return buffer


def _bits(buffer: Tensor) -> Tensor:
    return buffer.flatten().view(torch.int16)


def _layout(pattern: Pattern, product: str, values: Tensor, library: Library) -> Layout:
    """The layout of a side, kept with the pattern."""
    key = f"2:4 {library.name} {product} {values.dtype} {values.device}"
    if key not in pattern.packed:
        if product == "forward":
            side, source = pattern, np.arange(pattern.nnz)
        else:
            side = Pattern.from_mask(pattern.mask().T.contiguous())
            source = np.argsort(pattern.csr()[1], kind="stable")
        pattern.packed.setdefault(key, Layout(side, source, values.dtype, values.device, library))
    return pattern.packed[key]


def _product(x: Tensor, values: Tensor, bias: Tensor | None, layout: Layout, library: Library) -> tuple[Tensor, int]:
    tokens = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -tokens % 8)).contiguous()
    y = library.multiply(padded, layout.compressed(values), bias)[:tokens]
    macs = len(padded) * layout.numel // 2
    if layout.rest.nnz:
        y, more = launch.add_forward(x, values[layout.rest_source], layout.rest, into=y)
        macs += more
    return y, macs


def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, library: Library = CUSPARSELT
) -> tuple[Tensor, int]:
    """``x @ W.T + bias`` and the multiply-adds executed."""
    return _product(x, values, bias, _layout(pattern, "forward", values, library), library)


def grad_input(
    grad_output: Tensor, values: Tensor, pattern: Pattern, library: Library = CUSPARSELT
) -> tuple[Tensor, int]:
    """``grad_output @ W`` and the multiply-adds executed."""
    return _product(grad_output, values, None, _layout(pattern, "grad_input", values, library), library)
