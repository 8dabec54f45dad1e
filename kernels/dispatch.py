"""Which path runs a product, and why: the sparse kernel, or dense GEMM on materialised weights.

`auto` times both paths once per product, shape, density and thread count, on the data at hand, and keeps the medians in
the user's cache (`tuning.json`). A run stores its choices and resumes with them (`choices`, `pin`), so that it stays
equal to the last bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vspdf.cache import user_cache
from vspdf.errors import BackendUnavailable, UserError, did_you_mean
from vspdf.kernels import cpu
from vspdf.pattern import Pattern

BACKENDS = ("auto", "cpu", "reference", "triton")
ROUNDS = 3
SMALL = 1 << 21  # multiply-adds: below it a call costs microseconds either way and timing would decide by noise


class Choice(NamedTuple):
    path: str  # "cpu", "dense" or "reference"
    reason: str


class Timing(NamedTuple):
    """Median seconds of both paths."""

    cpu: float
    dense: float

    def choice(self) -> Choice:
        path, slower = ("cpu", "dense") if self.cpu <= self.dense else ("dense", "cpu")
        fast, slow = min(self), max(self)
        return Choice(path, f"{slower} takes {slow / fast:.2f}x as long (measured {slow:.2e} s against {fast:.2e} s)")


class _Table:
    """Timings by key: pinned ones of a resumed run, then this machine's from the user's cache."""

    def __init__(self) -> None:
        self.timings: dict[str, Timing] = {}
        self.used: dict[str, Timing] = {}
        self.lock = threading.RLock()
        self.loaded = False

    def path(self) -> Path:
        return user_cache() / "tuning.json"

    def load(self) -> None:
        with self.lock:
            if self.loaded:
                return
            self.loaded = True
            with contextlib.suppress(
                OSError, ValueError, TypeError, AttributeError
            ):  # absent or damaged: measured anew
                stored = json.loads(self.path().read_text()).get(_machine(), {})
                self.timings = {**{key: Timing(*pair) for key, pair in stored.items()}, **self.timings}

    def find(self, key: str) -> Timing | None:
        self.load()
        timing = self.timings.get(key)
        if timing is not None:
            self.used[key] = timing
        return timing

    def add(self, key: str, timing: Timing) -> None:
        with self.lock:
            self.timings[key] = self.used[key] = timing
            file = self.path()
            draft = file.with_name(f".{file.name}.{os.getpid()}")
            try:
                machines: dict[str, Any] = {}
                with contextlib.suppress(OSError, ValueError):  # others may have added theirs meanwhile
                    machines = json.loads(file.read_text())
                machines.setdefault(_machine(), {}).update({k: list(v) for k, v in self.timings.items()})
                draft.write_text(json.dumps(machines, indent=0, sort_keys=True))
                draft.replace(file)
            except (OSError, TypeError, AttributeError):  # a cache that cannot be written costs only the next tuning
                draft.unlink(missing_ok=True)


_table = _Table()


def _machine() -> str:
    """Timings hold for one processor, instruction set and pair of builds."""
    return f"{cpu.cpu_name()}; {cpu.isa()}; {cpu.build()}; torch {torch.__version__}"


def choices() -> dict[str, list[float]]:
    """Timings that decided anything in this process, for a checkpoint."""
    return {key: list(timing) for key, timing in sorted(_table.used.items())}


def pin(stored: dict[str, list[float]]) -> None:
    """Decides as a stored run did."""
    _table.load()
    _table.timings.update({key: Timing(*pair) for key, pair in stored.items()})


def describe_table() -> list[str]:
    """A line for every timing known on this machine."""
    _table.load()
    chosen = {key: timing.choice() for key, timing in sorted(_table.timings.items())}
    return [f"{key}: {choice.path}; {choice.reason}" for key, choice in chosen.items()]


def _bucket(tokens: int) -> int:
    """Tokens rounded up to two leading bits (64, 96, 128, 192, ...), so that every length of text is not tuned anew."""
    if tokens <= 2:
        return tokens
    step = 1 << (tokens.bit_length() - 2)
    return -(-tokens // step) * step


def _key(product: str, pattern: Pattern, tokens: int, dtype: torch.dtype) -> str:
    return (
        f"{product} T={_bucket(tokens)} in={pattern.in_features} out={pattern.out_features} "
        f"sparsity={pattern.sparsity:.2f} {str(dtype).removeprefix('torch.')} threads={torch.get_num_threads()}"
    )


def choose(
    product: str,
    pattern: Pattern,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str = "auto",
    tune: Callable[[str], Any] | None = None,
) -> Choice:
    """Path for one product ("forward", "grad_input" or "grad_values") of `tokens` rows.

    Parameters
    ----------
    tune : callable, optional
        Runs the product on the path it is given ("cpu" or "dense"); used where no timing is known.

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
        return Choice("reference", "asked for")
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
    if tokens * pattern.numel < SMALL:
        return Choice("cpu", "too small for the choice to matter")
    key = _key(product, pattern, tokens, dtype)
    timing = _table.find(key)
    if timing is None:
        if tune is None:
            return Choice("cpu", "not measured yet: the first call will time both paths")
        timing = _measure(tune)
        _table.add(key, timing)
    return timing.choice()


def _measure(run: Callable[[str], Any]) -> Timing:
    """Interleaved medians of both paths after a warm-up that builds plans."""
    seconds: dict[str, list[float]] = {"cpu": [], "dense": []}
    for i in range(ROUNDS + 1):
        for path, column in seconds.items():
            start = time.perf_counter()
            run(path)
            if i:
                column.append(time.perf_counter() - start)
    return Timing(*(statistics.median(column) for column in seconds.values()))
