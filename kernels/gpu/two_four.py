"""Masks that are 2:4 along rows and columns on sparse tensor cores, through torch's cuSPARSELt.

`Pattern.random(..., fits="2:4")` draws such masks. The weights change in every step, so the library's compressed form
is made anew in each product, of a dense weight that one kernel spreads out: nothing of it stays between products.
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vspdf.kernels import tuning
from vspdf.kernels.gpu import launch
from vspdf.kernels.gpu.bitmap import expand
from vspdf.pattern import Pattern


class Library(Protocol):
    """A library that multiplies the compressed form."""

    def compress(self, weight: Tensor) -> Tensor:
        """Opaque buffer of a matrix [rows, columns] with at most two of every four neighbours of a row."""
        ...

    def multiply(self, x: Tensor, compressed: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
        """``x @ weight.T + bias``: [tokens, columns] -> [tokens, rows]; `x` is contiguous, tokens a multiple of 8."""
        ...

    def search(self, x: Tensor, compressed: Tensor) -> int:
        """The fastest of its algorithms for these operands, by trying all of them; waits for the device."""
        ...


class CuSparseLt:
    """cuSPARSELt as torch binds it."""

    def compress(self, weight: Tensor) -> Tensor:
        return torch._cslt_compress(weight)

    def multiply(self, x: Tensor, compressed: Tensor, bias: Tensor | None, algorithm: int) -> Tensor:
        return torch._cslt_sparse_mm(compressed, x.t(), bias=bias, transpose_result=True, alg_id=algorithm)

    def search(self, x: Tensor, compressed: Tensor) -> int:
        return torch._cslt_sparse_mm_search(compressed, x.t(), transpose_result=True)


CUSPARSELT = CuSparseLt()
_device: list[torch.device] = []  # torch's handle belongs to the first device that used it (pytorch#189048)
_found: WeakKeyDictionary[Pattern, dict[tuple, int]] = WeakKeyDictionary()  # algorithms


def fits(pattern: Pattern) -> bool:
    """Whether at most two of every four neighbours are kept, along rows and along columns."""
    if "2:4" not in pattern.packed:
        mask = pattern.mask().numpy()
        wide = np.pad(mask, [(0, -side % 4) for side in mask.shape])
        rows = wide.reshape(len(wide), -1, 4).sum(2, dtype=np.uint8)
        columns = wide.reshape(-1, 4, wide.shape[1]).sum(1, dtype=np.uint8)
        pattern.packed["2:4"] = bool(rows.max() <= 2 and columns.max() <= 2)
    return pattern.packed["2:4"]


def unavailable(pattern: Pattern, precision: str, device: torch.device) -> str | None:
    """Why 2:4 cannot run a pattern on a device; None if it can."""
    if precision not in ("fp16", "bf16"):
        return f"2:4 takes float16 and bfloat16, not {precision}"
    if pattern.out_features % 16 or pattern.in_features % 16:
        return "2:4 needs sides that are multiples of 16"
    if not fits(pattern):
        return 'the mask is not 2:4 along rows and columns (Pattern.random(..., fits="2:4") draws such)'
    if not torch.backends.cusparselt.is_available():
        return "cuSPARSELt is not part of this torch"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "2:4 needs compute capability 8.0"
    if (_device or [device])[0] != device:
        return f"torch gives cuSPARSELt to one device of a process, here {_device[0]} (pytorch#189048)"
    return None


def _side(product: str, values: Tensor, pattern: Pattern, dtype: torch.dtype, library: Library) -> Tensor:
    """The compressed weight of a product, or of its transpose."""
    if not _device:
        _device.append(values.device)
    weight = expand(values, pattern, dtype)
    return library.compress(weight if product == "forward" else weight.T.contiguous())


def _whole(x: Tensor) -> Tensor:
    """Tokens up to a multiple of 8, contiguous; the tensor itself where it is so."""
    return (F.pad(x, (0, 0, 0, -x.shape[0] % 8)) if x.shape[0] % 8 else x).contiguous()


def _known(pattern: Pattern, product: str, x: Tensor) -> tuple[dict[tuple, int], tuple]:
    return _found.setdefault(pattern, {}), (product, tuning.bucket(x.shape[0]), x.dtype, x.device)


def _algorithm(pattern: Pattern, product: str, x: Tensor) -> int:
    """The algorithm that tuning found for a product like this one; the library's default where there was none."""
    made, key = _known(pattern, product, x)
    if key not in made:
        timing = tuning.find_gpu(x.device, tuning.gpu_key(product, pattern, x.shape[0], x.dtype))
        made[key] = timing[0].algorithm if timing else 0
    return made[key]


def search(product: str, x: Tensor, values: Tensor, pattern: Pattern, library: Library = CUSPARSELT) -> int:
    """Tries the library's algorithms on a product and uses the fastest from now on; not for within a step."""
    made, key = _known(pattern, product, x)
    made[key] = library.search(_whole(x), _side(product, values, pattern, x.dtype, library))
    return made[key]


def _product(
    product: str, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, library: Library
) -> tuple[Tensor, int]:
    whole = _whole(x)
    with launch.on(x.device):
        compressed = _side(product, values, pattern, x.dtype, library)
        y = library.multiply(whole, compressed, bias, _algorithm(pattern, product, x))
    # No view of something longer, which nobody could edit in place.
    return y if len(whole) == len(x) else y[: len(x)].contiguous(), len(whole) * pattern.numel // 2


def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, library: Library = CUSPARSELT
) -> tuple[Tensor, int]:
    """``x @ W.T + bias`` and the multiply-adds executed."""
    return _product("forward", x, values, bias, pattern, library)


def grad_input(
    grad_output: Tensor, values: Tensor, pattern: Pattern, library: Library = CUSPARSELT
) -> tuple[Tensor, int]:
    """``grad_output @ W`` and the multiply-adds executed."""
    return _product("grad_input", grad_output, values, None, pattern, library)
