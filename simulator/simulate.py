"""Single programs by name: which level runs them, why, and what comes back as one dictionary."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vspdf.errors import UserError, check_whole, did_you_mean, one_of, require
from vspdf.simulator import machine as machines
from vspdf.simulator.aggregate import programs as aggregate_programs
from vspdf.simulator.events import fabric, pictures, programs
from vspdf.simulator.machine import Machine

LEVELS = ("auto", "event", "aggregate")
SECONDS = 20  # that the event level may take where nobody asked for it
# Tile-cycles per second of the event level: half of the slowest program's in benchmarks/results/simulator.csv.
VECTOR_SPEED, ROUTER_SPEED = 12e6, 6e6
SET_UP = 1e-4  # seconds a PE, whatever it does
BESIDE_SRAM = 4096  # bytes a PE: queues, code, statistics


@dataclass(frozen=True)
class Work:
    """A program with its arguments: the aggregate model's figures, and the event simulator's on demand."""

    aggregate: dict[str, Any]
    event: Callable[[], tuple[programs.Outcome, dict[str, Any]]]
    pes: int
    speed: float
    seeded: bool = False  # the aggregate figures go with the seed
    beyond: str = ""  # why the event level does not take it, whatever this computer has

    @property
    def seconds(self) -> float:
        """Seconds that the event level would take, roughly."""
        cycles = self.aggregate.get("cycles", self.aggregate.get("cycles_max", 0))
        return self.pes * (cycles / self.speed + SET_UP)

    def too_large(self, machine: Machine) -> str:
        """Why the event level does not take the program, or cannot hold it in this computer's memory; or empty."""
        if self.beyond:
            return self.beyond
        needed, there = self.pes * (machine.sram_bytes + BESIDE_SRAM), _memory()
        if needed < there:
            return ""
        gib = f"{needed / 2**30:,.0f} GiB of memory"
        return f"the event level would need {gib} for such a grid, {there / 2**30:,.0f} are there"


def _memory() -> float:
    """Bytes of this computer; infinite where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def _grid(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in str(text).lower().split("x"))
    except ValueError:
        raise UserError(f"`grid` '{text}': expected WIDTHxHEIGHT, e.g. 64x32.") from None
    return width, height


def _choice(argument: str, value: str, known: Iterable[str]) -> str:
    one_of(f"`{argument}`", value, known)
    return value


def _positive(**numbers: int) -> None:
    for name, value in numbers.items():
        check_whole(f"`{name}`", value)


def _seed(seed: int | None) -> int:
    if seed is not None:
        check_whole("`seed`", seed, least=0)
    return seed or 0


def _square(grid: str, n: int) -> int:
    width, height = _grid(grid)
    if width != height:
        raise UserError(f"`grid` {grid}: this program runs on a square grid, e.g. {height}x{height}.")
    _positive(n=n)
    return width


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    if not expected.size:
        return 0.0
    scale = float(np.abs(expected).max())
    return float(np.abs(found.astype(np.float64) - expected).max()) / (scale or 1.0)


def _normal(seed: int, *shape: int, half: bool = False) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return values.astype(np.float16).astype(np.float32) if half else values


def spmm(
    machine: Machine, format: str, grid: str, n: int, k: int, m: int, density: float | None = None,
    nnz_per_pe: int | None = None, seed: int | None = None,
) -> Work:  # fmt: skip
    """Sparse [n, k] x dense [k, m] in fp32; the grid's width splits k, its height n; `density` in percent, or 100."""
    width, height = _grid(grid)
    _positive(n=n, k=k, m=m)
    seed = _seed(seed)
    _choice("format", format, (*programs.FORMATS, "dense"))
    require(
        m > 1 or format == "dense", "`m` 1: a column of B is padding in sparse formats, so that at least 2 are needed."
    )
    nt, kt = programs.check_spmm(machine, width, height, n, k, m)
    if format == "dense":
        for name, value in (("density", density), ("nnz_per_pe", nnz_per_pe)):
            require(value is None, f"`{name}` is for sparse formats: `format` dense stores every value.")

        def run_dense() -> tuple[programs.Outcome, dict[str, Any]]:
            run = programs.dense(machine, n, k, m, width, height, seed)
            c, a, b = run.result
            return run, _window(run, _error(c, a @ b))

        return Work(aggregate_programs.dense(machine, n, k, m, width, height), run_dense, width * height, VECTOR_SPEED)
    density = _density(density, nnz_per_pe, nt, kt)
    # before anything is drawn for what no PE holds, however few its non-zeros
    programs.check_memory(machine, programs.tile_layout(format, nt, kt, m, 1)["end"], programs.SMALLER)
    generator = np.random.default_rng(seed)
    if n * k <= 1 << 26:
        mask = generator.random((n, k)) < density / 100
        counts, slots = programs.tile_counts(mask, width, height, format, nnz_per_pe)
    else:  # the counts alone; the event level would take hours
        mask = None
        counts = generator.binomial(nt * kt, density / 100, (height, width))
        slots = 0
        if format == "ellpack" and nnz_per_pe is not None:
            slots = -(-nnz_per_pe // nt)
        elif format == "ellpack":  # the fullest row
            slots = max(1, int(generator.binomial(kt, density / 100, (height * nt, min(width, 64))).max()))
    stored = nt * slots if format == "ellpack" else int(nnz_per_pe or max(1, counts.max()))
    mean = float(counts.mean()) if format in ("csc", "csr") else float(stored)
    if nnz_per_pe and format in ("csc", "csr"):
        mean = min(mean, stored)
    aggregate = aggregate_programs.spmm(machine, format, n, k, m, width, height, stored, mean, slots)
    aggregate |= {"nnz_per_pe": stored}

    def run_sparse() -> tuple[programs.Outcome, dict[str, Any]]:
        assert mask is not None  # `beyond` says so
        run = programs.spmm(machine, format, mask, m, width, height, nnz_per_pe, seed)
        c, a, b = run.result
        return run, _window(run, _error(c, a @ b)) | {"nnz_per_pe": stored}

    beyond = "" if mask is not None else f"a matrix of {n} x {k} is too large for the event level"
    return Work(aggregate, run_sparse, width * height, VECTOR_SPEED, seeded=True, beyond=beyond)


def _density(density: float | None, nnz_per_pe: int | None, nt: int, kt: int) -> float:
    """In percent, and not of more non-zeros than a PE is said to store at most."""
    density = 100.0 if density is None else density
    require(0 <= density <= 100, f"`density` {density}: expected a percentage between 0 and 100.")
    if nnz_per_pe is not None:
        _positive(nnz_per_pe=nnz_per_pe)
        holds = nt * kt
        require(1 <= nnz_per_pe <= holds, f"`nnz_per_pe` {nnz_per_pe}: a PE's tile of {nt} x {kt} holds 1 to {holds}.")
        mean = density / 100 * holds
        require(
            mean <= nnz_per_pe,
            f"`nnz_per_pe` {nnz_per_pe}: at a `density` of {density:g} percent the average PE has {mean:.4g} non-zeros "
            "already, the fullest has no fewer.",
        )
    return density


def _window(run: programs.Outcome, error: float) -> dict[str, Any]:
    return {
        "cycles_max": run.cycles,
        "cycles_avg": float(run.per_pe.mean()),
        "cycles_min": int(run.per_pe.min()),
        "cycles_total": run.region.cycles,
        "breakdown": run.breakdown(),
        "largest_error": error,
    }


ALGORITHMS = ("summa", "cannon", "meshgemm")


def gemm(machine: Machine, algorithm: str, grid: str, n: int, dtype: str = "fp32", seed: int | None = None) -> Work:
    """Dense [n, n] x [n, n] on a square grid.

    `efficiency` is the time of the local products alone over the whole time.
    """
    _choice("algorithm", algorithm, ALGORITHMS)
    seed = _seed(seed)
    pes, half = _square(grid, n), _choice("dtype", dtype, ("fp32", "fp16")) == "fp16"
    model = aggregate_programs.gemm(machine, algorithm, pes, n, half)

    def figures(cycles: float) -> dict[str, Any]:
        peak = 2 * (machine.fmac_fp16_rate if half else machine.fmac_fp32_rate) * pes * pes
        return {
            "cycles": cycles,
            "tflops": {label: 2 * n**3 / (cycles / hertz) / 1e12 for label, hertz in machine.clocks.items()},
            "efficiency": model["ideal"] / cycles,
            "fraction_of_peak": 2 * n**3 / cycles / peak,
        }

    def run() -> tuple[programs.Outcome, dict[str, Any]]:
        a, b = _normal(seed, n, n, half=half), _normal(seed + 1, n, n, half=half)
        if algorithm == "summa":
            done = programs.summa(machine, a, b, pes, half)
        else:
            done = programs.ring_gemm(machine, a, b, pes, algorithm == "meshgemm", half)
        extra = {"breakdown": done.breakdown(), "phases": done.phases, "largest_error": _error(done.result, a @ b)}
        return done, figures(done.cycles) | extra

    return Work(figures(model["cycles"]), run, pes * pes, ROUTER_SPEED)


def gemv(
    machine: Machine, grid: str, n: int, algorithm: str = "meshgemv", dtype: str = "fp16", seed: int | None = None
) -> Work:
    """Dense [n, n] x vector on a square grid."""
    _choice("algorithm", algorithm, ("meshgemv",))
    seed = _seed(seed)
    pes, half = _square(grid, n), _choice("dtype", dtype, ("fp32", "fp16")) == "fp16"

    def run() -> tuple[programs.Outcome, dict[str, Any]]:
        a, v = _normal(seed, n, n, half=half), _normal(seed + 1, n, half=half)
        done = programs.mesh_gemv(machine, a, v, pes, half)
        return done, {
            "cycles": done.cycles,
            "breakdown": done.breakdown(),
            "largest_error": _error(done.result, a @ v),
        }

    return Work(aggregate_programs.gemv(machine, pes, n, half), run, pes * pes, ROUTER_SPEED)


def reduce(machine: Machine, pes: int, elements: int, group: int | str = "star", everywhere: bool = False) -> Work:
    """Sum of a vector per PE on a line of PEs; `everywhere`: broadcast back to all of them."""
    _positive(pes=pes, elements=elements)
    if isinstance(group, str) and group != "star":
        try:
            group = int(group)
        except ValueError:
            raise UserError(f"`group` '{group}': expected a number of PEs or 'star'.") from None
    cycles = aggregate_programs.reduce(machine, pes, elements, group, everywhere)
    programs.check_memory(machine, 4 * elements, "fewer `elements`")

    def run() -> tuple[programs.Outcome, dict[str, Any]]:
        values = _normal(0, pes, elements)
        done = programs.reduce(machine, values, group, everywhere)
        error = _error(done.result, values.astype(np.float64).sum(0))
        return done, {"cycles": done.cycles, "breakdown": done.breakdown(), "largest_error": error}

    return Work({"cycles": cycles}, run, pes, ROUTER_SPEED)


PROGRAMS: dict[str, Callable[..., Work]] = {"spmm": spmm, "gemm": gemm, "gemv": gemv, "reduce": reduce}


def check_level(level: str) -> None:
    """Refuses a level of simulation that does not exist.

    Raises
    ------
    UserError
        If it is not.
    """
    _choice("level", level, LEVELS)


def simulate(
    program: str, *, machine: str | Path | Machine = "cs2", settings: Iterable[str] | Mapping[str, Any] = (),
    level: str = "auto", trace: str | Path | None = None, plot: str | Path | None = None, **arguments: Any,
) -> dict[str, Any]:  # fmt: skip
    """Runs one of `PROGRAMS` on a simulated wafer and returns its figures; parameters as `vspdf.simulate` has them.

    Raises
    ------
    UserError
        For an unknown program, machine, parameter or argument, and for what does not fit the machine.
    """
    chosen = machines.load(machine, settings)
    if program not in PROGRAMS:
        raise UserError(f"unknown program '{program}'.{did_you_mean(program, PROGRAMS)}")
    check_level(level)
    to_trace, to_plot = (None if path is None else Path(path) for path in (trace, plot))
    pictures.check_paths(to_trace, to_plot)
    drawn = trace is not None or plot is not None
    if drawn and level == "aggregate":
        raise UserError("`trace` and `plot` show events: the aggregate level has none.")
    try:
        work = PROGRAMS[program](chosen, **arguments)
    except TypeError as error:
        raise UserError(f"simulate('{program}'): {str(error).split('()', 1)[-1].strip()}.") from None
    too_large = work.too_large(chosen)
    if too_large and (drawn or level == "event"):
        raise UserError(f"{too_large}: take a smaller one, or the aggregate level.")
    if level != "auto":
        why = "asked for"
    elif too_large or (work.seconds > SECONDS and not drawn):
        level, why = "aggregate", too_large or f"the event level would take some {work.seconds:,.0f} s"
    else:
        level, why = "event", "events are drawn" if drawn else "small enough to move every wavelet"
    if level == "aggregate" and not work.seeded and arguments.get("seed") is not None:
        raise UserError(
            f"`seed` draws the values that the event level computes with; the level here: aggregate, {why}."
        )
    if level == "event":
        with fabric.tracing(drawn):
            run, body = work.event()
        if drawn:
            title = f"{program} on {run.region.width} x {run.region.height} PEs"
            if to_trace is not None:
                pictures.write_trace(run.region, to_trace)
            if to_plot is not None:
                pictures.plot(run.region, to_plot, title)
    else:
        body = {key: round(x) if key.startswith("cycles") else x for key, x in work.aggregate.items()}
    cycles = body.get("cycles", body.get("cycles_max", 0))
    seconds = {label: cycles / hertz for label, hertz in chosen.clocks.items()}
    return {"program": program, **chosen.said(), "level": level, "why": why, **body, "seconds": seconds}
