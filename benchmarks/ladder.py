"""Every program on level 1 (event by event) against level 2 (closed form), on a ladder of grids.

    python benchmarks/ladder.py                      # 8, 16, 32, 64: several minutes
    python benchmarks/ladder.py --sizes 128          # products of matrices take level 1 minutes each there
    python benchmarks/ladder.py --sizes 8,16 --only meshgemm,forward

Each rung replaces its line of `benchmarks/results/ladder.csv` when it is done, the other lines stay. Level 2 never runs
level 1. tests/simulator/test_ladder.py holds small rungs.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from vspdf.files import write_whole
from vspdf.simulator import machine as machines
from vspdf.simulator.aggregate import programs as closed
from vspdf.simulator.events import programs
from vspdf.simulator.machine import Machine

RESULTS = Path(__file__).parent / "results" / "ladder.csv"
KEY = ("program", "case", "grid")
Rung = tuple[str, str, Callable[[], float], Callable[[], float]]  # program, case, level 1, level 2


def rungs(machine: Machine, side: int) -> Iterator[Rung]:
    """Cases on a grid of side x side, or on a line of `side` PEs where a program runs on a line."""
    random = np.random.default_rng(side)  # values, which cost nothing; positions have generators of their own

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    def line(name: str, group: int | str, everywhere: bool = False) -> Rung:
        return (
            name, f"group {group}, 256 elements",
            lambda: programs.reduce(machine, normal(side, 256), group, everywhere).cycles,
            lambda: closed.reduce(machine, side, 256, group, everywhere),
        )  # fmt: skip

    yield (
        "broadcast", "256 elements",
        lambda: programs.broadcast(machine, normal(256), side).cycles,
        lambda: closed.broadcast(machine, side, 256),
    )  # fmt: skip
    yield line("chain", side)
    yield line("two-phase", max(2, round(side**0.5)))
    yield line("star", "star")
    yield line("all-reduce", max(2, round(side**0.5)), True)
    for algorithm in ("summa", "cannon", "meshgemm"):
        for half, tile in ((False, 4), (True, 8)):
            n = tile * side

            def event(algorithm: str = algorithm, half: bool = half, n: int = n) -> float:
                a, b = normal(n, n), normal(n, n)
                if algorithm == "summa":
                    return programs.summa(machine, a, b, side, half).cycles
                return programs.ring_gemm(machine, a, b, side, algorithm == "meshgemm", half).cycles

            yield (
                algorithm, f"{'fp16' if half else 'fp32'}, tiles of {tile}", event,
                lambda algorithm=algorithm, half=half, n=n: closed.gemm(machine, algorithm, side, n, half)["cycles"],
            )  # fmt: skip
    for half, tile in ((False, 8), (True, 20)):
        n = tile * side
        yield (
            "meshgemv", f"{'fp16' if half else 'fp32'}, tiles of {tile}",
            lambda half=half, n=n: programs.mesh_gemv(machine, normal(n, n), normal(n), side, half).cycles,
            lambda half=half, n=n: closed.gemv(machine, side, n, half)["cycles"],
        )  # fmt: skip
    yield from _sparse(machine, side)
    yield from _streams(machine, side, normal)


def _sparse(machine: Machine, side: int) -> Iterator[Rung]:
    tile, m = 8, 16
    n = tile * side
    mask = np.random.default_rng(side).random((n, n)) < 0.3
    counts = mask.reshape(side, tile, side, tile).sum((1, 3))
    slots = int(mask.reshape(n, side, tile).sum(2).max())
    for fmt in programs.FORMATS:
        most, mean = (tile * slots,) * 2 if fmt == "ellpack" else (int(counts.max()), float(counts.mean()))
        yield (
            fmt, "30 %, tiles of 8 x 8, M = 16",
            lambda fmt=fmt: programs.spmm(machine, fmt, mask, m, side, side).cycles,
            lambda fmt=fmt, most=most, mean=mean: closed.spmm(
                machine, fmt, n, n, m, side, side, most, mean, slots
            )["cycles_max"],
        )  # fmt: skip
    yield (
        "dense", "tiles of 8 x 8, M = 16",
        lambda: programs.dense(machine, n, n, m, side, side).cycles,
        lambda: closed.dense(machine, n, n, m, side, side)["cycles_max"],
    )  # fmt: skip


def _streams(machine: Machine, side: int, normal: Callable[..., np.ndarray]) -> Iterator[Rung]:
    block, streamed = 16, 48  # features of a column, rows of the matrix
    narrow = max(2, 48 // side)  # features of a column in grad_input, which streams a matrix of another shape
    for number, (density, local) in enumerate(((1.0, 16), (0.5, 4), (0.1, 4), (0.1, 32))):
        positions = np.random.default_rng((side, number))
        mask, turned = (positions.random((streamed, side * n)) < density for n in (block, narrow))
        case = f"density {density:g}, {local} tokens a PE"
        for name, kept, of_column in (("forward", mask, block), ("grad_input", turned, narrow)):
            # grad_input is the same program with the transposed matrix.
            yield (
                name, case,
                lambda kept=kept, t=local * side: programs.stream_layer(
                    machine, normal(*kept.shape) * 0.1, kept, normal(kept.shape[1], t) * 0.1, side, side
                ).cycles,
                lambda kept=kept, n=of_column, local=local: closed.stream_layer(
                    machine, kept.reshape(streamed, side, n).sum(2), n, local, side
                ),
            )  # fmt: skip
        yield (
            "gradient", case,
            lambda kept=mask, t=local * side: programs.stream_gradient(
                machine, kept, normal(streamed, t) * 0.1, normal(kept.shape[1], t) * 0.1, side, side
            ).cycles,
            lambda kept=mask, local=local: closed.stream_gradient(
                machine, kept.reshape(streamed, side, block).sum(2), block, local, side
            ),
        )  # fmt: skip


def climb(machine: Machine, sides: list[int], only: set[str] = frozenset()) -> Iterator[dict[str, object]]:  # type: ignore[assignment]
    """Runs the rungs; a row for each."""
    for side in sides:
        for program, case, event, aggregate in rungs(machine, side):
            if only and program not in only:
                continue
            start = time.perf_counter()
            cycles = event()
            seconds = time.perf_counter() - start
            estimate = aggregate()
            yield {
                "program": program, "case": case, "grid": f"{side}x{side}", "event_cycles": int(cycles),
                "aggregate_cycles": round(estimate), "error": f"{estimate / cycles - 1:+.4f}",
                "event_seconds": f"{seconds:.2f}",
            }  # fmt: skip


def keep(path: Path, row: dict[str, object]) -> None:
    """Puts a rung into the table: in its old line's place, or after the last line of its grid."""
    rows: list[dict[str, object]] = []
    if path.exists():
        with path.open(newline="") as stream:
            rows.extend(csv.DictReader(stream))
    key = [row[name] for name in KEY]
    old = [i for i, other in enumerate(rows) if [other[name] for name in KEY] == key]
    mates = [i for i, other in enumerate(rows) if other["grid"] == row["grid"]]
    if old:
        rows[old[0]] = row
    else:
        rows.insert(mates[-1] + 1 if mates else len(rows), row)
    text = io.StringIO()
    writer = csv.DictWriter(text, row, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", default="8,16,32,64")
    parser.add_argument("--only", default="")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rungs, worst = 0, 0.0
    only = {name for name in arguments.only.split(",") if name}
    for row in climb(machines.load("cs2"), [int(n) for n in arguments.sizes.split(",")], only):
        keep(arguments.csv, row)
        rungs, worst = rungs + 1, max(worst, abs(float(str(row["error"]))))
        print("  ".join(str(value) for value in row.values()), file=sys.stderr, flush=True)
    print(f"wrote {rungs} rungs to {arguments.csv}, at most {worst:.1%} apart")


if __name__ == "__main__":
    main()
