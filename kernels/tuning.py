"""What was measured on this machine, kept in the user's cache: which path is faster for which product."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from vspdf import gemm
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
    algorithm: int = 0  # of cuSPARSELt, that its seconds were taken with

    def choice(self, source: str = "tuned here", without: Sequence[str] = ()) -> Choice:
        """The fastest path that can be trusted; `without` those that cannot run the pattern at hand."""
        trusted = [path for path, ratio in self.worst.items() if ratio <= TUNED and path not in without]
        path = min(trusted, key=lambda path: self.seconds[path], default="dense")
        base = self.seconds.get("cublas", self.seconds["dense"])
        ratios = ", ".join(
            f"{p} {base / self.seconds[p]:.2f}x (worst round {1 / worst:.2f}x)" for p, worst in self.worst.items()
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
    """Timings hold for one processor, instruction set, pair of builds and library of dense products."""
    return f"{cpu.cpu_name()}; {cpu.isa()}; {cpu.build()}; torch {torch.__version__}; dense by {gemm.library()}"


CPU = _Table(Timing, _machine)
GPUS: dict[str, _Table] = {}  # by the name of a device
# By the arguments of `dispatch.choose`: to ask again would cost time. It ends with its pattern.
MADE: WeakKeyDictionary[Pattern, dict[tuple, Choice]] = WeakKeyDictionary()
_pinned: dict[str, GpuTiming] = {}  # of a resumed run, on whatever GPU it goes on


def gpu(name: str) -> _Table:
    """The table of a kind of GPU: machines have GPUs of different kinds."""
    if name not in GPUS:
        table = _Table(GpuTiming, lambda: f"{name}; {launch.build()}; torch {torch.__version__}")
        table.used.update(_pinned)
        GPUS.setdefault(name, table)
    return GPUS[name]


@cache
def shipped() -> dict[str, dict[str, list[Any]]]:
    """Tables that come with vspdf, by device name: as `tuning.json`, but for any build. Empty until measured."""
    return json.loads(Path(__file__).with_name("gpu_tuning.json").read_text())


def find_gpu(device: torch.device, key: str) -> tuple[GpuTiming, str] | None:
    """What is known of a product on a GPU and where from: the user's cache, then the table that ships."""
    name = launch.device_name(device)
    if (timing := gpu(name).find(key)) is not None:
        return timing, "tuned here"
    columns = shipped().get(name, {}).get(key)
    return None if columns is None else (GpuTiming(*columns), "shipped table")


def forget() -> None:
    """Has every choice made again, by what is known then."""
    MADE.clear()
    cpu.shut_door()


def choices() -> dict[str, list[Any]]:
    """Timings that decided anything in this process, for a checkpoint."""
    used = {key: timing for table in (CPU, *GPUS.values()) for key, timing in table.used.items()}
    return {key: list(timing) for key, timing in sorted(used.items())}


def pin(stored: dict[str, list[Any]]) -> None:
    """Decides as a stored run did."""
    for key, columns in stored.items():
        if isinstance(columns[0], dict):
            _pinned[key] = GpuTiming(*columns)
        else:
            CPU.used.update(CPU.parse({key: columns}))
    for table in GPUS.values():
        table.used.update(_pinned)
    forget()


def describe_table() -> list[str]:
    """A line for every timing known on this machine."""
    tables = [] if cpu.unavailable() else [CPU]
    if not launch.unavailable():
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        tables += [gpu(name) for name in {launch.device_name(device) for device in devices}]
    found: dict[str, Choice] = {}
    for table in tables:
        table.load()
        found |= {key: timing.choice() for key, timing in {**table.timings, **table.used}.items()}
    return [f"{key}: {choice.path}; {choice.reason}" for key, choice in sorted(found.items())]


def bucket(tokens: int) -> int:
    """Tokens rounded up to three leading bits (64, 80, 96, 112, ...): not every length of text is tuned anew."""
    step = 1 << max(tokens.bit_length() - 3, 0)
    return -(-tokens // step) * step


def _uneven(pattern: Pattern) -> str:
    """How unlike a random one a pattern is, "" for a random one: what was timed on those says nothing of it.

    The variance of kept weights a row over what chance gives, in powers of four; and of a column.
    """
    found = pattern.packed.get("uneven")
    if found is None:
        mask, spread = pattern.mask(), []
        for counts in (mask.sum(1), mask.sum(0)) if 0 < pattern.nnz < pattern.numel else ():
            chance = float(counts.double().mean()) * pattern.sparsity
            spread.append(float(counts.double().var(correction=0)) / chance)
        powers = [max(-2, min(6, round(math.log(max(s, 1e-9), 4)))) for s in spread]
        found = pattern.packed["uneven"] = " uneven=" + ",".join(map(str, powers)) if any(powers) else ""
    return found


def cpu_key(product: str, pattern: Pattern, tokens: int, dtype: torch.dtype, wide: bool = False) -> str:
    """The key of what a CPU's timings hold for; `wide`: values are float32 beside narrower tokens."""
    kind = str(dtype).removeprefix("torch.") + "+float32" * wide
    return (
        f"{product} T={bucket(tokens)} in={pattern.in_features} out={pattern.out_features} "
        f"sparsity={pattern.sparsity:.2f}{_uneven(pattern)} {kind} threads={torch.get_num_threads()}"
        f"{' memory=low' if cpu.memory(pattern) == 'low' else ''}"
    )


def faster_in_bf16(product: str, pattern: Pattern, tokens: int) -> str:
    """What `explain` adds where dense in bfloat16 was measured here to beat both paths in float32, else ""."""
    known = CPU.known(cpu_key(product, pattern, tokens, torch.float32))
    keys = (cpu_key(product, pattern, tokens, torch.bfloat16, wide) for wide in (False, True))
    narrow = min((timing.dense for key in keys if (timing := CPU.known(key))), default=None)
    if known is None or narrow is None or narrow >= min(known.cpu, known.dense):
        return ""
    gain = min(known.cpu, known.dense) / narrow
    return f"; dense in bfloat16 is {gain:.2f}x as fast as that (measured {narrow:.2e} s)"


def gpu_key(product: str, pattern: Pattern, tokens: int, dtype: torch.dtype) -> str:
    """The key of what a GPU's timings hold for, beside the device and the builds."""
    return (
        f"{product} T={bucket(tokens)} in={pattern.in_features} out={pattern.out_features} "
        f"sparsity={pattern.sparsity:.3f} {launch.precision(dtype)}"
    )


def timing(rounds: dict[str, list[float]], algorithm: int = 0) -> GpuTiming:
    """What the seconds of interleaved rounds, by path, come to; `algorithm` is cuSPARSELt's.

    Sparse paths must beat "cublas", a GEMM on a weight that is ready, where it was timed: "dense" may lose to it by
    what spreading the weight out takes.
    """
    base = rounds.get("cublas", rounds["dense"])
    sparse = {path: column for path, column in rounds.items() if path not in ("dense", "cublas")}
    return GpuTiming(
        {path: statistics.median(column) for path, column in rounds.items()},
        {path: max(a / b for a, b in zip(column, base, strict=True)) for path, column in sparse.items()}, algorithm,
    )  # fmt: skip


def keep(key: str, timing: GpuTiming, device: torch.device) -> None:
    """Keeps it in the user's cache, for `dispatch.choose`."""
    table = gpu(launch.device_name(device))
    table.load()
    table.add(key, timing)
    forget()
