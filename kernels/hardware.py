"""This machine: processor, threads, memory, devices, versions of what matters, and how freed memory is kept."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from vspdf import gemm
from vspdf.errors import UserError, check_device
from vspdf.kernels import cpu
from vspdf.kernels.gpu import launch
from vspdf.kernels.tuning import describe_table

# glibc, <malloc.h> and <sys/mman.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _MADV_HUGEPAGE = -1, -4, 14
_MOST_THREADS = 256
_HEAP, _HUGE = 1 << 30, 2 << 20  # bytes: below the largest threshold for trimming; of a huge page


@cache
def keep_freed_memory() -> None:
    """Lets glibc keep what is freed instead of giving it back to the kernel, and has the heap in huge pages.

    Activations are allocated anew at every step; faulting their pages in again costs about 5 % of a dense step and
    twice that of a sparse one, looking up small pages another 3 to 5 % on a virtual machine. Huge pages are for the
    heap's next gigabyte, which costs nothing before it is used. Does nothing where the C library is another.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        if start := libc.malloc(_HEAP):
            aligned = -(-start // _HUGE) * _HUGE
            libc.madvise(aligned, (start + _HEAP - aligned) // _HUGE * _HUGE, _MADV_HUGEPAGE)
            libc.free(start)


def hardware() -> dict[str, Any]:
    """Facts to print beside a figure: processor, cores, instruction set, threads."""
    extension = cpu._C
    return {
        "cpu": cpu.cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isas": list(extension.isas()) if extension else [],
        "dense_products": gemm.library(),
        "openmp": bool(extension.openmp) if extension else False,
        "bf16": "slow" if slow_bf16(torch.device("cpu")) else "fast",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def crowded(threads: int) -> str:
    """A word on more threads than there are cores; "" where each has its own."""
    cores = os.cpu_count() or threads
    return f"{threads} threads on {cores} cores take turns: expect less speed than with {cores}." * (threads > cores)


def check_threads(key: str, threads: int) -> None:
    """Refuses so many threads that the process would die of starting them, without a word.

    Raises
    ------
    UserError
        Naming how many there may be.
    """
    cores = os.cpu_count() or 1
    if threads > (most := max(_MOST_THREADS, 4 * cores)):
        raise UserError(f"{key} = {threads}: expected at most {most}; this machine has {cores} cores.")


def slow_bf16(device: torch.device) -> str | None:
    """Why bfloat16 is no gain on that device; None if it may be one."""
    if device.type == "cpu" and not cpu.has_bf16():
        return "this processor has neither AVX512_BF16 nor AMX, and torch multiplies bf16 slower than fp32"
    return None


def slow_bf16_measured() -> str | None:
    """Why bfloat16 is no gain on this processor, with what a product takes in it against float32; None if it may be."""
    why = slow_bf16(torch.device("cpu"))
    if why is None:
        return None
    return f"{why}; a product of 256 x 256 took {_bf16_ratio():.1f} times as long here as in float32 (measured)"


@cache
def _bf16_ratio() -> float:
    """Of one product of 256 rows and columns in each, the least of three times."""
    matrices = {dtype: torch.ones(256, 256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = dict.fromkeys(matrices, math.inf)
    for _ in range(3):
        for dtype, matrix in matrices.items():
            start = time.perf_counter()
            matrix @ matrix
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def memory() -> float:
    """Bytes of this machine's main memory; infinite where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return math.inf


def versions() -> dict[str, str]:
    """Versions of what figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("vspdf", "torch", "numpy", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def backends() -> dict[str, str]:
    """ "available", or why not, by backend."""
    return {
        "cpu": cpu.unavailable() or "available",
        "reference": "available",
        "triton": launch.unavailable() or "available",
    }


def tuning() -> list[str]:
    """Tells what `auto` has measured on this machine and chose from it, a line each."""
    return describe_table()


def device(name: str, key: str = "`device`", local_rank: int | None = None) -> torch.device:
    """The device of that name; `key` is the setting that named it.

    Of several processes on a machine each takes the GPU of its `local_rank`, where none is named by number.

    Raises
    ------
    UserError
        If the name is not known, or the device not here.
    """
    check_device(key, name)
    found = torch.device(f"{name}:{local_rank}" if name == "cuda" and local_rank else name)
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            have = f"only {count} of them" if count else "no CUDA device"
            raise UserError(f"{key} = '{name}': torch sees {have} here; cpu runs anywhere.")
    return found
