"""Which path runs a product, and why: a sparse kernel, or dense GEMM on materialised weights.

On the CPU `auto` times both paths once per product, shape, density and thread count, on the data at hand, and keeps the
medians in the user's cache (`tuning.json`). On a GPU it never times by itself: it believes what `vspdf bench linear
--device cuda --tune` left in that cache, then the table that ships (`gpu_tuning.json`), then a conservative model, and
takes dense where none of them speaks for a sparse path. A run stores its choices and resumes with them (`choices`,
`pin`), so that it stays equal to the last bit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vspdf.cache import user_cache
from vspdf.errors import UserError, did_you_mean
from vspdf.kernels import cpu, gpu, gpu_24, gpu_model
from vspdf.pattern import Pattern

log = logging.getLogger("vspdf")

BACKENDS = ("auto", "cpu", "reference", "triton")
ROUNDS = 3
SMALL = 1 << 21  # multiply-adds: below it a call costs microseconds either way and timing would decide by noise


TUNED = 0.97  # of dense, in every interleaved round: a tuned sparse path is never slower, noise included


class Choice(NamedTuple):
    path: str  # a key of ops.PATHS
    reason: str


class Timing(NamedTuple):
    """Median seconds of both paths."""

    cpu: float
    dense: float

    def choice(self) -> Choice:
        path, slower = ("cpu", "dense") if self.cpu <= self.dense else ("dense", "cpu")
        fast, slow = min(self), max(self)
        return Choice(path, f"{slower} takes {slow / fast:.2f}x as long (measured {slow:.2e} s against {fast:.2e} s)")


class GpuTiming(NamedTuple):
    """Median seconds by path, and by sparse path the worst of its rounds as a fraction of dense."""

    seconds: dict[str, float]
    worst: dict[str, float]

    def choice(self, source: str) -> Choice:
        trusted = [path for path, ratio in self.worst.items() if ratio <= TUNED]
        path = min(trusted, key=lambda path: self.seconds[path], default="dense")
        ratios = ", ".join(
            f"{p} {self.seconds['dense'] / self.seconds[p]:.2f}x (worst round {1 / worst:.2f}x)"
            for p, worst in self.worst.items()
        )
        return Choice(path, f"{source}: {ratios or 'no sparse path'} against dense")


class _Table:
    """Timings by key: pinned ones of a resumed run, then this machine's from the user's cache."""

    def __init__(self, kind: Callable[..., Any], machine: Callable[[], str]) -> None:
        self.kind, self.machine = kind, machine
        self.timings: dict[str, Any] = {}
        self.used: dict[str, Any] = {}
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
                stored = json.loads(self.path().read_text()).get(self.machine(), {})
                self.timings = {**{key: self.kind(*columns) for key, columns in stored.items()}, **self.timings}

    def find(self, key: str) -> Any:
        self.load()
        timing = self.timings.get(key)
        if timing is not None:
            self.used[key] = timing
        return timing

    def add(self, key: str, timing: Any) -> None:
        with self.lock:
            self.timings[key] = self.used[key] = timing
            file = self.path()
            draft = file.with_name(f".{file.name}.{os.getpid()}")
            try:
                machines: dict[str, Any] = {}
                with contextlib.suppress(OSError, ValueError):  # others may have added theirs meanwhile
                    machines = json.loads(file.read_text())
                machines.setdefault(self.machine(), {}).update({k: list(v) for k, v in self.timings.items()})
                draft.write_text(json.dumps(machines, indent=0, sort_keys=True))
                draft.replace(file)
            except (OSError, TypeError, AttributeError):  # a cache that cannot be written costs only the next tuning
                draft.unlink(missing_ok=True)


def _machine() -> str:
    """Timings hold for one processor, instruction set and pair of builds."""
    return f"{cpu.cpu_name()}; {cpu.isa()}; {cpu.build()}; torch {torch.__version__}"


def _gpu_machine() -> str:
    return f"{gpu.device_name()}; {gpu.build()}; torch {torch.__version__}"


_table = _Table(Timing, _machine)
_gpu_table = _Table(GpuTiming, _gpu_machine)


@cache
def _shipped() -> dict[str, dict[str, list[dict[str, float]]]]:
    """Tables that come with vspdf, by device name: as `tuning.json`, but for any build. Empty until measured."""
    return json.loads(Path(__file__).with_name("gpu_tuning.json").read_text())


def choices() -> dict[str, list[Any]]:
    """Timings that decided anything in this process, for a checkpoint."""
    return {key: list(timing) for key, timing in sorted({**_table.used, **_gpu_table.used}.items())}


def pin(stored: dict[str, list[Any]]) -> None:
    """Decides as a stored run did."""
    for key, columns in stored.items():
        kind, table = (GpuTiming, _gpu_table) if isinstance(columns[0], dict) else (Timing, _table)
        table.load()
        table.timings[key] = kind(*columns)


def describe_table() -> list[str]:
    """A line for every timing known on this machine."""
    found: dict[str, Choice] = {}
    if not cpu.unavailable():
        _table.load()
        found = {key: timing.choice() for key, timing in _table.timings.items()}
    if not gpu.unavailable():
        _gpu_table.load()
        found |= {key: timing.choice("tuned here") for key, timing in _gpu_table.timings.items()}
    return [f"{key}: {choice.path}; {choice.reason}" for key, choice in sorted(found.items())]


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
        gpu.kernels()
        if refusal := gpu.refusal(dtype, device):
            raise UserError(f"backend 'triton' cannot run: {refusal}.")
        return Choice("triton", "asked for")
    if backend == "auto" and device.type == "cuda":
        return _choose_gpu(product, pattern, tokens, dtype, device)
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


def gpu_key(product: str, pattern: Pattern, tokens: int, dtype: torch.dtype) -> str:
    """What a GPU's timings hold for, beside the device and the builds."""
    return (
        f"{product} T={_bucket(tokens)} in={pattern.in_features} out={pattern.out_features} "
        f"sparsity={pattern.sparsity:.3f} {gpu.precision(dtype)}"
    )


def tune(key: str, rounds: dict[str, list[float]]) -> Choice:
    """Keeps the seconds of interleaved rounds, by path, in the user's cache; the choice that follows from them."""
    dense = rounds["dense"]
    timing = GpuTiming(
        {path: statistics.median(column) for path, column in rounds.items()},
        {p: max(a / b for a, b in zip(column, dense, strict=True)) for p, column in rounds.items() if p != "dense"},
    )
    _gpu_table.load()
    _gpu_table.add(key, timing)
    return timing.choice("tuned here")


def _choose_gpu(product: str, pattern: Pattern, tokens: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """User cache, shipped table, conservative model, dense; each choice is logged once."""
    refusal = gpu.unavailable() or gpu.refusal(dtype, device)
    if refusal:
        return _logged(f"{product} {dtype}", Choice("dense", refusal))
    key, name = gpu_key(product, pattern, tokens, dtype), gpu.device_name(device)
    if (timing := _gpu_table.find(key)) is not None:
        return _logged(key, timing.choice("tuned here"))
    if (columns := _shipped().get(name, {}).get(key)) is not None:
        return _logged(key, GpuTiming(*columns).choice("shipped table"))
    return _logged(key, _modelled(product, pattern, tokens, gpu.precision(dtype), name))


def _modelled(product: str, pattern: Pattern, tokens: int, precision: str, name: str) -> Choice:
    model = gpu_model.find(name)
    if model is None:
        return Choice("dense", f"not tuned, and '{name}' has no model: vspdf bench linear --device cuda --tune")
    seconds = gpu_model.predict(model, product, pattern.shape, pattern.nnz, tokens, precision)
    if product in ("forward", "grad_input") and gpu_24.unavailable(pattern, precision):
        seconds.pop("2:4", None)
    path = min(seconds, key=lambda path: seconds[path])
    gain = seconds["dense"] / seconds[path]
    told = ", ".join(f"{p} {seconds['dense'] / s:.2f}x" for p, s in seconds.items() if p != "dense")
    if gain < gpu_model.GAIN:
        path = "dense"
    return Choice(path, f"modelled, not measured: {told} against dense (sparse from {gpu_model.GAIN}x)")


_told: set[str] = set()


def _logged(key: str, choice: Choice) -> Choice:
    if key not in _told:
        _told.add(key)
        log.info("%s: %s: %s", key, choice.path, choice.reason)
    return choice
