"""What was measured on this machine, kept in the user's cache: which path is faster for which product."""

from __future__ import annotations

import contextlib
import json
import statistics
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from vspdf.errors import UserError
from vspdf.files import lock, user_cache, write_whole
from vspdf.kernels import cpu
from vspdf.kernels.gpu import launch
from vspdf.pattern import Pattern

CLEAR = 1.5  # times as long: no open choice
NOISY = 1.25  # a typical round over the least one: the machine was busy
PATIENCE = 10.0  # seconds to wait for other processes that write the table
TUNINGS = 3  # processes that measure an open choice
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
            guard = file.with_name(f".{file.name}.lock")
            # A cache that cannot be written costs only the next tuning.
            with contextlib.suppress(UserError, OSError), lock(guard, str(file), PATIENCE):
                machines = self.read()  # others may have added theirs meanwhile
                stored = machines.get(self.machine())
                machines[self.machine()] = {**(stored if isinstance(stored, dict) else {}), key: list(timing)}
                write_whole(file, json.dumps(machines, indent=0, sort_keys=True))


def _machine() -> str:
    """Timings hold for one processor, instruction set and pair of builds."""
    return f"{cpu.cpu_name()}; {cpu.isa()}; {cpu.build()}; torch {torch.__version__}"


def _gpu_machine() -> str:
    return f"{launch.device_name()}; {launch.build()}; torch {torch.__version__}"


CPU = _Table(Timing, _machine)
GPU = _Table(GpuTiming, _gpu_machine)
# On CPUs, by the arguments of `choose`: to ask again would cost time. It ends with its pattern.
MADE: WeakKeyDictionary[Pattern, dict[tuple, Choice]] = WeakKeyDictionary()


@cache
def shipped() -> dict[str, dict[str, list[dict[str, float]]]]:
    """Tables that come with vspdf, by device name: as `tuning.json`, but for any build. Empty until measured."""
    return json.loads(Path(__file__).with_name("gpu_tuning.json").read_text())


def choices() -> dict[str, list[Any]]:
    """Timings that decided anything in this process, for a checkpoint."""
    return {key: list(timing) for key, timing in sorted({**CPU.used, **GPU.used}.items())}


def pin(stored: dict[str, list[Any]]) -> None:
    """Decides as a stored run did."""
    for key, columns in stored.items():
        table = GPU if isinstance(columns[0], dict) else CPU
        table.used.update(table.parse({key: columns}))
    MADE.clear()


def describe_table() -> list[str]:
    """A line for every timing known on this machine."""
    found: dict[str, Choice] = {}
    for table, missing in ((CPU, cpu.unavailable()), (GPU, launch.unavailable())):
        if not missing:
            table.load()
            found |= {key: timing.choice() for key, timing in {**table.timings, **table.used}.items()}
    return [f"{key}: {choice.path}; {choice.reason}" for key, choice in sorted(found.items())]


def bucket(tokens: int) -> int:
    """Tokens rounded up to three leading bits (64, 80, 96, 112, ...): not every length of text is tuned anew."""
    step = 1 << max(tokens.bit_length() - 3, 0)
    return -(-tokens // step) * step


def cpu_key(product: str, pattern: Pattern, tokens: int, dtype: torch.dtype, wide: bool = False) -> str:
    """The key of what a CPU's timings hold for; `wide`: values are float32 beside narrower tokens."""
    return (
        f"{product} T={bucket(tokens)} in={pattern.in_features} out={pattern.out_features} "
        f"sparsity={pattern.sparsity:.2f} {str(dtype).removeprefix('torch.')}{'+float32' if wide else ''} "
        f"threads={torch.get_num_threads()}{' memory=low' if cpu.memory(pattern) == 'low' else ''}"
    )


def gpu_key(product: str, pattern: Pattern, tokens: int, dtype: torch.dtype) -> str:
    """The key of what a GPU's timings hold for, beside the device and the builds."""
    return (
        f"{product} T={bucket(tokens)} in={pattern.in_features} out={pattern.out_features} "
        f"sparsity={pattern.sparsity:.3f} {launch.precision(dtype)}"
    )


def _timing(rounds: dict[str, list[float]]) -> GpuTiming:
    dense = rounds["dense"]
    return GpuTiming(
        {path: statistics.median(column) for path, column in rounds.items()},
        {p: max(a / b for a, b in zip(column, dense, strict=True)) for p, column in rounds.items() if p != "dense"},
    )


def best(rounds: dict[str, list[float]]) -> Choice:
    """Finds what the seconds of interleaved rounds, by path, speak for."""
    return _timing(rounds).choice("measured")


def tune(key: str, rounds: dict[str, list[float]]) -> None:
    """Keeps them in the user's cache, for `choose`."""
    GPU.load()
    GPU.add(key, _timing(rounds))
