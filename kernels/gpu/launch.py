"""Whether and how the Triton kernels can run: devices, dtypes, precision, options. Triton is imported on first use.

They run on CUDA and HIP devices and, where ``TRITON_INTERPRET=1`` was set before the start, in Triton's interpreter on
the CPU. What runs in every product is written to be captured in a CUDA graph and to leave the host little to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vspdf.errors import BackendUnavailable

KINDS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Triton 3.10 no longer fuses multiply and add unless asked: the gather would take a quarter longer, with other bits.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def interpreted() -> bool:
    """Tells whether Triton interprets kernels on the CPU in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def unavailable() -> str | None:
    """Why the kernels cannot run here; None if they can."""
    if not _installed():
        return "the package 'triton' is not installed (pip install triton; Linux only)"
    if not torch.cuda.is_available() and not interpreted():
        return "no CUDA or HIP device is visible to torch"
    return None


@cache
def kernels() -> Any:
    """The module of Triton kernels.

    Raises
    ------
    BackendUnavailable
        If they cannot run here.
    """
    reason = unavailable()
    if reason:
        raise BackendUnavailable(f"backend 'triton' cannot run: {reason}.")
    return import_module("vspdf.kernels.gpu.triton_kernels")


def takes(tensor: Tensor) -> bool:
    """Whether the kernels can work on a tensor like this one."""
    return _installed() and refusal(tensor.dtype, tensor.device) is None


def refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels cannot work on such a tensor; None if they can."""
    if dtype not in KINDS:
        return f"no kernel for {dtype} (float32, float16 and bfloat16 have one)"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"no kernel for device '{device.type}' (CUDA and HIP devices have one)"
    return None


def device_name(device: torch.device | None = None) -> str:
    """The name of a GPU, as its driver tells it."""
    return torch.cuda.get_device_name(device)


@cache
def build() -> str:
    """Identifies the kernels, so that timings of another build are not believed."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    triton = import_module("triton").__version__
    return f"kernels {hashlib.blake2b(sources, digest_size=6).hexdigest()}; triton {triton}"


def tf32() -> bool:
    """Tells whether the user lets torch multiply float32 matrices in TF32; off by default."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):  # torch < 2.9
        return matmul.allow_tf32
    own = matmul.fp32_precision
    return (torch.backends.fp32_precision if own == "none" else own) == "tf32"  # type: ignore[attr-defined]


def precision(dtype: torch.dtype) -> str:
    """Names how torch multiplies matrices of this dtype here: "fp32", "tf32", "fp16" or "bf16"."""
    return "tf32" if dtype == torch.float32 and tf32() else KINDS[dtype]


_stays = contextlib.nullcontext()


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes `device` the current one, if it is not: Triton launches there."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return _stays
    return torch.cuda.device(device)


def up(n: int, block: int) -> int:
    """Blocks that hold `n`."""
    return -(-n // block)
