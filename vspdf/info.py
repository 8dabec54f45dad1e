"""What this machine is and what can run on it."""

from __future__ import annotations

import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from vspdf.kernels import cpu, dispatch, gpu


def hardware() -> dict[str, Any]:
    """Facts to print beside a figure: processor, cores, instruction set, threads."""
    extension = cpu._C
    return {
        "cpu": cpu.cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isas": list(extension.isas()) if extension else [],
        "openmp": bool(extension.openmp) if extension else False,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


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
        "triton": gpu.unavailable() or "available",
    }


def tuning() -> list[str]:
    """What `auto` has measured on this machine and chose from it, a line each."""
    return dispatch.describe_table()
