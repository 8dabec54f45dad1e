"""How fast the event simulator is, in tile-cycles per second (PEs times cycles, over seconds) on one core.

    python benchmarks/simulator.py            # some 30 s
    python benchmarks/simulator.py --large    # 64 x 64 PEs too: a minute more

Writes `benchmarks/results/simulator.csv`.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vspdf.kernels import hardware
from vspdf.simulator import machine
from vspdf.simulator.events import programs
from vspdf.simulator.events.fabric import Region

RESULTS = Path(__file__).parent / "results" / "simulator.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    large = parser.parse_args().large
    cs2, random = machine.load("cs2"), np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    def sparse(fmt: str, width: int, height: int, nnz: int) -> programs.Outcome:
        return programs.spmm(cs2, fmt, random.random((768, 768)) < 0.05, 68, width, height, nnz)

    cases: dict[str, tuple[str, Callable[[], programs.Outcome]]] = {
        "COO, 48x6 PEs": ("vectors", lambda: sparse("coo", 48, 6, 127)),
        "CSC, 32x6 PEs": ("vectors", lambda: sparse("csc", 32, 6, 184)),
        "ELLPACK, 24x8 PEs": ("vectors", lambda: sparse("ellpack", 24, 8, 768)),
        "dense product, 16x12 PEs": ("vectors", lambda: programs.dense(cs2, 768, 768, 64, 16, 12)),
        "two-phase reduce of 4096, 512 PEs": ("routers", lambda: programs.reduce(cs2, normal(512, 4096), 32)),
        "chain reduce of 4096, 512 PEs": ("routers", lambda: programs.reduce(cs2, normal(512, 4096), 512)),
        "SUMMA, 16x16 PEs, tiles of 4": ("routers", lambda: programs.summa(cs2, normal(64, 64), normal(64, 64), 16)),
        "MeshGEMM, 16x16 PEs, tiles of 4": (
            "routers", lambda: programs.ring_gemm(cs2, normal(64, 64), normal(64, 64), 16, True),
        ),
    }  # fmt: skip
    if large:
        cases |= {
            "SUMMA, 64x64 PEs, tiles of 4": (
                "routers", lambda: programs.summa(cs2, normal(256, 256), normal(256, 256), 64),
            ),
            "MeshGEMM, 64x64 PEs, tiles of 4": (
                "routers", lambda: programs.ring_gemm(cs2, normal(256, 256), normal(256, 256), 64, True),
            ),
            "Cannon, 64x64 PEs, tiles of 4": (
                "routers", lambda: programs.ring_gemm(cs2, normal(256, 256), normal(256, 256), 64, False),
            ),
        }  # fmt: skip
    seconds = 0.0
    run = Region.run

    def timed(region: Region, *arguments: int) -> int:
        nonlocal seconds
        start = time.perf_counter()
        cycles = run(region, *arguments)
        seconds = time.perf_counter() - start
        return cycles

    Region.run = timed  # type: ignore[method-assign]
    rows = []
    for name, (busy, call) in cases.items():
        speeds, times = [], []
        for _ in range(1 if "64x64" in name else 3):
            region = call().region
            speeds.append(region.width * region.height * region.cycles / seconds / 1e6)
            times.append(seconds)
        rows.append({"program": name, "busy": busy, "cycles": region.cycles, "seconds": f"{np.median(times):.2f}"})
        rows[-1]["million_tile_cycles_per_second"] = f"{np.median(speeds):.1f}"
        print(f"{name:36s} {rows[-1]['cycles']:>9,} cycles {rows[-1]['seconds']:>7} s "
              f"{rows[-1]['million_tile_cycles_per_second']:>7} M tile-cycles/s", flush=True)  # fmt: skip
    with RESULTS.open("w", newline="") as file:
        file.write(f"# {hardware.hardware()}\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
