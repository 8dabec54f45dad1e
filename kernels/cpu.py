"""The C++ kernels (`vspdf._C`) on torch tensors: float32 and bfloat16, accumulation in float32."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vspdf.errors import BackendUnavailable, UserError, did_you_mean
from vspdf.pattern import Pattern

try:
    from vspdf import _C  # imported after torch, so that both share torch's OpenMP runtime
except ImportError as error:
    _C = None
    _missing = str(error)

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ISAS = ("avx512", "avx2", "plain")
MEMORY = ("normal", "low")
PRODUCTS = ("forward", "grad_input", "grad_values")


def door(*call: Any) -> Tensor | None:
    """Where the kernels are built, C++: the usual product that was let through before (`open_door`), else None."""
    return None


if _C is not None:
    door = _C.door


def unavailable() -> str | None:
    """Why the backend cannot run here; None if it can."""
    if _C is None:
        return f"the compiled kernels are missing ({_missing}); reinstall vspdf with a C++17 compiler present"
    return None


def extension() -> Any:
    """The compiled module.

    Raises
    ------
    BackendUnavailable
        If it was not built.
    """
    reason = unavailable()
    if reason:
        raise BackendUnavailable(f"backend 'cpu' cannot run: {reason}.")
    return _C


def takes(tensor: Tensor) -> bool:
    """Whether the kernels can work on a tensor like this one."""
    return _C is not None and tensor.device.type == "cpu" and tensor.dtype in DTYPES


def isa() -> str:
    """Instruction set that the kernels use: the best one here, or what ``VSPDF_ISA`` asks for.

    Raises
    ------
    BackendUnavailable
        If the kernels were not built.
    UserError
        If ``VSPDF_ISA`` names no instruction set of the kernels, or one that this machine does not have.
    """
    have = extension().isas()
    wanted = os.environ.get("VSPDF_ISA") or have[0]
    if wanted in have:
        return wanted
    if wanted in ISAS:
        raise UserError(f"VSPDF_ISA={wanted}: this machine does not have it, but {', '.join(have)}.")
    raise UserError(f"VSPDF_ISA={wanted}: the kernels know no such instruction set.{did_you_mean(wanted, have)}")


@cache
def has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 (AVX512_BF16, AMX or Arm's BF16); unknown counts as yes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return not {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}.isdisjoint(line.split())
    return True


def build() -> str:
    """Identifies the compiled kernels, so that timings of another build are not believed."""
    file = Path(extension().__file__).stat()
    return f"kernels {file.st_size:x}-{file.st_mtime_ns:x}"


def cpu_name() -> str:
    """Processor's model name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def packed(pattern: Pattern) -> Any:
    """A pattern packed for the CPU kernels: built once, kept with the pattern, holds no weights."""
    found = pattern.packed.get("cpu")
    if found is None:
        plan = extension().Plan(*pattern.shape, pattern.bits, isa(), memory(pattern) == "normal")
        found = pattern.packed.setdefault("cpu", plan)
    return found


def open_door(product: str, pattern: Pattern, tokens: int, dtype: torch.dtype, kept: torch.dtype, backend: str) -> None:
    """Lets such a product, on plain contiguous tensors, through the `door` from now on. `kept`: the values' dtype."""
    packed(pattern).open(
        pattern.digest, PRODUCTS.index(product), tokens, DTYPES[dtype], DTYPES[kept], backend == "auto",
        torch.get_num_threads(),
    )  # fmt: skip


def shut_door() -> None:
    """Nothing goes through the `door` until it is let through again."""
    if _C is not None:
        _C.shut()


def memory(pattern: Pattern) -> str:
    """ "normal": the plan may hold generated code, where that is faster; "low": none, a quarter of the bytes."""
    return pattern.packed.get("memory", "normal")


def prepare(patterns: Iterable[Pattern]) -> None:
    """Builds the plans of all products now, in parallel, instead of at first use."""
    extension().prepare([packed(pattern) for pattern in patterns], torch.get_num_threads())


def _rows(x: Tensor) -> Tensor:
    """[T, n] with contiguous rows; the row stride may be anything, 0 (broadcast) included."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def forward(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> tuple[Tensor, int]:
    """``x @ W.T + bias``, of the dtype of `x`, and the multiply-adds executed; `values` and `bias` share a dtype."""
    x, values = _rows(x), values.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(x.shape[0], pattern.out_features)
    macs = packed(pattern).forward(
        y.data_ptr(), x.data_ptr(), x.stride(0), values.data_ptr(), 0 if bias is None else bias.data_ptr(),
        x.shape[0], DTYPES[x.dtype], DTYPES[values.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y, macs


def grad_input(grad_output: Tensor, values: Tensor, pattern: Pattern) -> tuple[Tensor, int]:
    """``grad_output @ W``, of the dtype of `grad_output`, and the multiply-adds executed."""
    grad_output, values = _rows(grad_output), values.contiguous()
    dx = grad_output.new_empty(grad_output.shape[0], pattern.in_features)
    macs = packed(pattern).grad_input(
        dx.data_ptr(), grad_output.data_ptr(), grad_output.stride(0), values.data_ptr(),
        grad_output.shape[0], DTYPES[dx.dtype], DTYPES[values.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dx, macs


def grad_values(
    grad_output: Tensor, x: Tensor, pattern: Pattern, dtype: torch.dtype | None = None
) -> tuple[Tensor, int]:
    """``grad_output.T @ x`` at kept positions, of `dtype` (that of `x`), and the multiply-adds executed."""
    grad_output, x = _rows(grad_output), _rows(x)
    dvalues = x.new_empty(pattern.nnz, dtype=dtype)
    macs = packed(pattern).grad_values(
        dvalues.data_ptr(), grad_output.data_ptr(), grad_output.stride(0), x.data_ptr(), x.stride(0),
        x.shape[0], DTYPES[x.dtype], DTYPES[dvalues.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dvalues, macs


def materialise(values: Tensor, pattern: Pattern) -> Tensor:
    """Dense weight [out_features, in_features] with zeros at masked positions."""
    values = values.contiguous()
    weight = values.new_empty(pattern.shape)
    packed(pattern).scatter(weight.data_ptr(), values.data_ptr(), DTYPES[values.dtype], torch.get_num_threads())
    return weight


def sample(dense: Tensor, pattern: Pattern) -> Tensor:
    """Kept positions of a dense [out_features, in_features], row-major: shape (nnz,)."""
    dense = dense.contiguous()
    values = dense.new_empty(pattern.nnz)
    packed(pattern).gather(values.data_ptr(), dense.data_ptr(), DTYPES[dense.dtype], torch.get_num_threads())
    return values
