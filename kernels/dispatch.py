"""Which path runs a product, and why: a sparse kernel, or dense GEMM on materialised weights.

On the CPU `auto` times both paths once per product, shape, density and thread count, on the data at hand, and keeps the
least times in the user's cache (`tuning.json`). A machine may have been busy then: where the paths lie close or the
times were noisy, the next processes measure again, three in all. On a GPU it never times by itself: it believes what
`vspdf bench linear --device cuda --tune` left in that cache, then the table that ships (`gpu_tuning.json`), then a
conservative model, and takes dense where none of them speaks for a sparse path. Within a process a choice never
changes, and a run stores its choices and resumes with them (`choices`, `pin`), so that it stays equal to the last bit.
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
ROUNDS = 3  # at least; more while a choice is open and BUDGET lasts
BUDGET = 0.1  # seconds
CLEAR = 1.5  # times as long: no open choice
NOISY = 1.25  # a typical round over the least one: the machine was busy
TUNINGS = 3  # processes that measure an open choice
SMALL = 1 << 21  # multiply-adds: below it a call costs microseconds either way and timing would decide by noise
TUNED = 0.97  # of dense, in every interleaved round: a tuned sparse path is never slower, noise included


class Choice(NamedTuple):
    path: str  # a key of ops.PATHS
    reason: str


class Timing(NamedTuple):
    """Least seconds of both paths."""

    cpu: float
    dense: float
    noise: float = 1.0  # median round over the least one, of the noisier path
    tunings: int = 1  # processes that measured

    def choice(self) -> Choice:
        path, slower = ("cpu", "dense") if self.cpu <= self.dense else ("dense", "cpu")
        fast, slow = sorted((self.cpu, self.dense))
        reason = f"{slower} takes {slow / fast:.2f}x as long (measured {slow:.2e} s against {fast:.2e} s)"
        return Choice(
            path, reason if self.settled() else f"{reason}; close or noisy, so the next process measures again"
        )

    def settled(self) -> bool:
        fast, slow = sorted((self.cpu, self.dense))
        return self.tunings >= TUNINGS or (slow > CLEAR * fast and self.noise < NOISY)

    def merge(self, other: Timing) -> Timing:
        cpu, dense = min(self.cpu, other.cpu), min(self.dense, other.dense)
        return Timing(cpu, dense, min(self.noise, other.noise), self.tunings + other.tunings)


class GpuTiming(NamedTuple):
    """Median seconds by path, and by sparse path the worst of its rounds as a fraction of dense."""

    seconds: dict[str, float]
    worst: dict[str, float]

    def choice(self, source: str = "tuned here") -> Choice:
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
        self.used: dict[str, Any] = {}  # decided in this process or pinned: they stay
        self.lock = threading.RLock()
        self.loaded = False

    def path(self) -> Path:
        return user_cache() / "tuning.json"

    def read(self) -> dict[str, Any]:
        """The file by machine; empty where it is absent or damaged."""
        with contextlib.suppress(OSError, ValueError):
            machines = json.loads(self.path().read_text())
            return machines if isinstance(machines, dict) else {}
        return {}

    def load(self) -> None:
        with self.lock:
            if not self.loaded:
                self.loaded = True
                self.timings = {**self.parse(self.read().get(self.machine())), **self.timings}

    def parse(self, stored: Any) -> dict[str, Any]:
        """Stored columns as timings, without those that are none."""
        timings = {}
        for key, columns in stored.items() if isinstance(stored, dict) else ():
            with contextlib.suppress(TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError):
                timing = self.kind(*columns)
                timing.choice()
                timings[key] = timing
        return timings

    def known(self, key: str) -> Any:
        self.load()
        return self.used.get(key) or self.timings.get(key)

    def find(self, key: str) -> Any:
        """What is known of `key`, used from now on."""
        with self.lock:
            timing = self.known(key)
            if timing is not None:
                self.used[key] = timing
            return timing

    def add(self, key: str, timing: Any) -> None:
        """Uses `timing` and keeps it in the user's cache."""
        with self.lock:
            self.used[key] = self.timings[key] = timing
            file = self.path()
            draft = file.with_name(f".{file.name}.{os.getpid()}")
            machines = self.read()  # others may have added theirs meanwhile
            stored = machines.get(self.machine())
            machines[self.machine()] = {**(stored if isinstance(stored, dict) else {}), key: list(timing)}
            with contextlib.suppress(OSError):  # a cache that cannot be written costs only the next tuning
                try:
                    draft.write_text(json.dumps(machines, indent=0, sort_keys=True))
                    draft.replace(file)
                finally:
                    draft.unlink(missing_ok=True)


def _machine() -> str:
    """Timings hold for one processor, instruction set and pair of builds."""
    return f"{cpu.cpu_name()}; {cpu.isa()}; {cpu.build()}; torch {torch.__version__}"


def _gpu_machine() -> str:
    return f"{gpu.device_name()}; {gpu.build()}; torch {torch.__version__}"


_table = _Table(Timing, _machine)
_gpu_table = _Table(GpuTiming, _gpu_machine)
_choices: dict[tuple, Choice] = {}  # on CPUs, by the arguments of `choose`: to ask again would cost time


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
        table = _gpu_table if isinstance(columns[0], dict) else _table
        table.used.update(table.parse({key: columns}))
    _choices.clear()


def describe_table() -> list[str]:
    """A line for every timing known on this machine."""
    found: dict[str, Choice] = {}
    for table, missing in ((_table, cpu.unavailable()), (_gpu_table, gpu.unavailable())):
        if not missing:
            table.load()
            found |= {key: timing.choice() for key, timing in {**table.timings, **table.used}.items()}
    return [f"{key}: {choice.path}; {choice.reason}" for key, choice in sorted(found.items())]


def _bucket(tokens: int) -> int:
    """Tokens rounded up to three leading bits (64, 80, 96, 112, ...): not every length of text is tuned anew."""
    step = 1 << max(tokens.bit_length() - 3, 0)
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
    if device.type != "cpu" or tune is None:
        return _choose(product, pattern, tokens, dtype, device, backend, tune)
    known = (product, pattern.digest, tokens, dtype, backend, torch.get_num_threads())
    choice = _choices.get(known)
    if choice is None:
        choice = _choices[known] = _choose(product, pattern, tokens, dtype, device, backend, tune)
    return choice


def _choose(
    product: str,
    pattern: Pattern,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    tune: Callable[[str], Any] | None,
) -> Choice:
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
    if tune is None:
        timing = _table.known(key)
        return timing.choice() if timing else Choice("cpu", "not measured yet: the first call will time both paths")
    with _table.lock:  # the other threads wait: two measurements at once would disturb each other
        timing = _table.known(key)
        if timing is None or (key not in _table.used and not timing.settled()):
            found = _measure(tune)
            _table.add(key, timing.merge(found) if timing else found)
        return _table.find(key).choice()


def _measure(run: Callable[[str], Any]) -> Timing:
    """Both paths in turn, after a warm-up that builds plans."""
    seconds: dict[str, list[float]] = {"cpu": [], "dense": []}
    for path in seconds:
        run(path)
    stop = time.perf_counter() + BUDGET
    while True:
        for path, column in seconds.items():
            start = time.perf_counter()
            run(path)
            column.append(time.perf_counter() - start)
        if len(column) >= ROUNDS:
            noise = max(statistics.median(column) / min(column) for column in seconds.values())
            timing = Timing(min(seconds["cpu"]), min(seconds["dense"]), noise)
            if timing.settled() or time.perf_counter() > stop:
                return timing


def gpu_key(product: str, pattern: Pattern, tokens: int, dtype: torch.dtype) -> str:
    """What a GPU's timings hold for, beside the device and the builds."""
    return (
        f"{product} T={_bucket(tokens)} in={pattern.in_features} out={pattern.out_features} "
        f"sparsity={pattern.sparsity:.3f} {gpu.precision(dtype)}"
    )


def _timing(rounds: dict[str, list[float]]) -> GpuTiming:
    dense = rounds["dense"]
    return GpuTiming(
        {path: statistics.median(column) for path, column in rounds.items()},
        {p: max(a / b for a, b in zip(column, dense, strict=True)) for p, column in rounds.items() if p != "dense"},
    )


def best(rounds: dict[str, list[float]]) -> Choice:
    """What the seconds of interleaved rounds, by path, speak for."""
    return _timing(rounds).choice("measured")


def tune(key: str, rounds: dict[str, list[float]]) -> None:
    """Keeps them in the user's cache, for `choose`."""
    _gpu_table.load()
    _gpu_table.add(key, _timing(rounds))


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
