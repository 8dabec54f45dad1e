"""Every program on level 1 (event by event) against level 2 (closed form), on a ladder of grids.

    python benchmarks/ladder.py                      # 8, 16, 32, 64, then 128 where level 1 reaches it: several minutes
    python benchmarks/ladder.py --sizes 8,16 --only meshgemm,forward

Writes `benchmarks/results/ladder.csv`. Level 2 never runs level 1. tests/test_simulator_ladder.py holds small rungs.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from vspdf.simulator import machine as machines
from vspdf.simulator import programs, wafer
from vspdf.simulator.machine import Machine

RESULTS = Path(__file__).parent / "results" / "ladder.csv"
TOO_LONG = 128  # on this side, the products of matrices take level 1 more than ten minutes
Rung = tuple[str, str, Callable[[], float], Callable[[], float]]  # program, case, level 1, level 2


def rungs(machine: Machine, side: int) -> Iterator[Rung]:
    """Cases on a grid of side x side, or on a line of `side` PEs where a program runs on a line."""
    random = np.random.default_rng(side)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    def line(name: str, group: int | str, everywhere: bool = False) -> Rung:
        return (
            name, f"group {group}, 256 elements",
            lambda: programs.reduce(machine, normal(side, 256), group, everywhere).cycles,
            lambda: wafer.reduce(machine, side, 256, group, everywhere),
        )  # fmt: skip

    yield (
        "broadcast", "256 elements",
        lambda: programs.broadcast(machine, normal(256), side).cycles,
        lambda: wafer.broadcast(machine, side, 256),
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
                lambda algorithm=algorithm, half=half, n=n: wafer.gemm(machine, algorithm, side, n, half)["cycles"],
            )  # fmt: skip
    for half, tile in ((False, 8), (True, 20)):
        n = tile * side
        yield (
            "meshgemv", f"{'fp16' if half else 'fp32'}, tiles of {tile}",
            lambda half=half, n=n: programs.mesh_gemv(machine, normal(n, n), normal(n), side, half).cycles,
            lambda half=half, n=n: wafer.gemv(machine, side, n, half)["cycles"],
        )  # fmt: skip
    yield from _sparse(machine, side, random)
    yield from _streams(machine, side, random, normal)


def _sparse(machine: Machine, side: int, random: np.random.Generator) -> Iterator[Rung]:
    tile, m = 8, 16
    n = tile * side
    mask = random.random((n, n)) < 0.3
    counts = mask.reshape(side, tile, side, tile).sum((1, 3))
    slots = int(mask.reshape(n, side, tile).sum(2).max())
    for fmt in programs.FORMATS:
        most, mean = (tile * slots,) * 2 if fmt == "ellpack" else (int(counts.max()), float(counts.mean()))
        yield (
            fmt, "30 %, tiles of 8 x 8, M = 16",
            lambda fmt=fmt: programs.spmm(machine, fmt, mask, m, side, side).cycles,
            lambda fmt=fmt, most=most, mean=mean: wafer.spmm(
                machine, fmt, n, n, m, side, side, most, mean, slots
            )["cycles_max"],
        )  # fmt: skip
    yield (
        "dense", "tiles of 8 x 8, M = 16",
        lambda: programs.dense(machine, n, n, m, side, side).cycles,
        lambda: wafer.dense(machine, n, n, m, side, side)["cycles_max"],
    )  # fmt: skip


def _streams(
    machine: Machine, side: int, random: np.random.Generator, normal: Callable[..., np.ndarray]
) -> Iterator[Rung]:
    outputs, block = 48, 16
    for density, local in ((1.0, 16), (0.5, 4), (0.1, 4), (0.1, 32)):
        features, tokens = block * side, local * side
        mask = random.random((outputs, features)) < density
        counts = mask.reshape(outputs, side, block).sum(2)
        case = f"density {density:g}, {local} tokens a PE"
        yield (
            "forward", case,
            lambda mask=mask, f=features, t=tokens: programs.stream_layer(
                machine, normal(outputs, f) * 0.1, mask, normal(f, t) * 0.1, side, side
            ).cycles,
            lambda counts=counts, local=local: wafer.stream_layer(machine, counts, block, local, side),
        )  # fmt: skip
        # The delta: the same program with the transposed matrix.
        turned = mask[:, :outputs].T if features >= outputs else None
        if turned is not None and outputs % side == 0 and outputs // side >= 1:
            delta_block = outputs // side
            delta_counts = turned.reshape(outputs, side, delta_block).sum(2)
            yield (
                "delta", case,
                lambda mask=turned, t=tokens: programs.stream_layer(
                    machine, normal(outputs, outputs) * 0.1, mask, normal(outputs, t) * 0.1, side, side
                ).cycles,
                lambda counts=delta_counts, b=delta_block, local=local: wafer.stream_layer(
                    machine, counts, b, local, side
                ),
            )  # fmt: skip
        yield (
            "gradient", case,
            lambda mask=mask, f=features, t=tokens: programs.stream_gradient(
                machine, mask, normal(outputs, t) * 0.1, normal(f, t) * 0.1, side, side
            ).cycles,
            lambda counts=counts, local=local: wafer.stream_gradient(machine, counts, block, local, side),
        )  # fmt: skip


def climb(machine: Machine, sides: list[int], only: set[str] = frozenset()) -> Iterator[dict[str, object]]:  # type: ignore[assignment]
    """Runs the rungs; a row for each."""
    for side in sides:
        for program, case, event, aggregate in rungs(machine, side):
            if (only and program not in only) or (side >= TOO_LONG and program in ("summa", "cannon", "meshgemm")):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", default="8,16,32,64,128")
    parser.add_argument("--only", default="")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows, worst = [], 0.0
    only = {name for name in arguments.only.split(",") if name}
    for row in climb(machines.load("cs2"), [int(n) for n in arguments.sizes.split(",")], only):
        rows.append(row)
        worst = max(worst, abs(float(str(row["error"]))))
        print("  ".join(str(value) for value in row.values()), file=sys.stderr, flush=True)
    with arguments.csv.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {arguments.csv}: {len(rows)} rungs, at most {worst:.1%} apart")


if __name__ == "__main__":
    main()
