"""Checks and times every GPU path on named layers; writes CSV, a plot and the table that ships. At most eight minutes.

    python benchmarks/gpu.py [--output benchmarks/results] [--seconds 480] [--tune]

First correctness, on odd shapes and all precisions, against float64; then time, the caches cold, interleaved rounds;
memory beside it. What the time does not suffice for is skipped and named. Two bars are what docs/gpu.md promises: in
bf16 a layer on the path "dense" takes at most 3 % longer than cuBLAS on ready weights, and the training state shrinks
to what was kept and 3/16 of a byte a position. Exit status 2 without a CUDA device, 1 if anything computed was wrong,
3 if a bar was missed.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from vspdf.bench.linear_gpu import TOLERANCE, Layer, Stopwatch, measure, precision, require_cuda
from vspdf.bench.rounds import PRODUCTS
from vspdf.errors import UserError
from vspdf.kernels import hardware
from vspdf.kernels.tuning import GpuTiming
from vspdf.pattern import Pattern
from vspdf.shapes import PATH_BYTES, STATE_BYTES
from vspdf.sparsity.layer import SparseLinear


class Cell(NamedTuple):
    name: str
    tokens: int
    in_features: int
    out_features: int
    sparsity: float


CELLS = [
    Cell("gpt2 up 90", 32768, 768, 3072, 0.9),
    Cell("gpt2 up 99", 32768, 768, 3072, 0.99),
    Cell("gpt2 down 95", 32768, 3072, 768, 0.95),
    Cell("1.3b qkv 75", 16384, 2048, 6144, 0.75),
    Cell("1.3b up 90", 16384, 2048, 8192, 0.9),
    Cell("1.3b up 95", 16384, 2048, 8192, 0.95),
    Cell("1.3b up 98", 16384, 2048, 8192, 0.98),
    Cell("1.3b down 99", 16384, 8192, 2048, 0.99),
    Cell("6.7b proj 90", 8192, 4096, 4096, 0.9),
    Cell("6.7b proj 98", 8192, 4096, 4096, 0.98),
    Cell("6.7b proj 99.5", 8192, 4096, 4096, 0.995),
    Cell("13b square 95", 8192, 8192, 8192, 0.95),
    Cell("13b square 99", 8192, 8192, 8192, 0.99),
]
SMOKE = [Cell("tiny 90", 40, 48, 64, 0.9), Cell("tiny 75", 16, 33, 20, 0.75)]
ODD = [(1, 1, 1, 0.0), (7, 33, 70, 0.8), (130, 65, 129, 0.95), (64, 48, 32, 1.0), (513, 256, 144, 0.5)]
ROUNDS = 9
SLOWER = 1.03  # than cuBLAS on ready weights, at most
STATE = 1.05  # of the training state that is promised, at most: allocations are rounded up
TABLE = Path(__file__).resolve().parents[1] / "kernels" / "gpu_tuning.json"
ORDER = ("bf16", "fp32", "tf32", "fp16")  # if time runs short, the first are the ones that matter most


def check(device: torch.device) -> list[str]:
    """What is wrong on odd shapes; every path, product and precision against float64."""
    wrong = []
    for name in ORDER:
        for tokens, n_in, n_out, sparsity in ODD:
            layer = Layer(tokens, n_in, n_out, sparsity, name, device)
            with precision(name):
                for product in PRODUCTS:
                    for path, run in layer.paths(product).items():
                        error = layer.error(product, run())
                        if not error <= TOLERANCE[name]:
                            wrong.append(
                                f"{path} {product} {name} {tokens}x{n_in}x{n_out} at {sparsity}: error {error:.2e}"
                            )
    return wrong


def memory(cell: Cell, device: torch.device) -> dict[str, int]:
    """Bytes that stay after a step in bf16: float32 weights, gradients, AdamW moments, what the path "dense" keeps."""
    if device.type != "cuda":
        return {}
    pattern = Pattern.random((cell.out_features, cell.in_features), cell.sparsity, seed=1)  # nothing of it packed yet
    found = {}
    for name in ("dense", "sparse"):
        before = _allocated()
        layer: nn.Module = nn.Linear(cell.in_features, cell.out_features, bias=False, device=device)
        if name == "sparse":
            layer = SparseLinear.from_linear(layer, pattern)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4, fused=True)
        with torch.autocast("cuda", torch.bfloat16):
            layer(torch.randn(64, cell.in_features, device=device)).sum().backward()
        optimizer.step()
        found[name] = _allocated() - before
        del layer, optimizer
    position, weight = PATH_BYTES["dense"]
    found["promised"] = round(position * pattern.numel + (STATE_BYTES + weight) * pattern.nnz)
    return found


def _allocated() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def bars(rows: list[dict[str, Any]]) -> list[str]:
    """Which promises were not kept, a line each."""
    missed = []
    for row in rows:
        layer = (row["precision"], row["product"], row["candidate"]) == ("bf16", "layer", "dense")
        if layer and row["ratio_to_dense"] * SLOWER < 1:
            missed.append(f"{row['cell']}: dense takes {1 / row['ratio_to_dense']:.3f} times as long as cuBLAS")
        if layer and row.get("bytes_sparse", 0) > STATE * row.get("bytes_promised", 0):
            missed.append(
                f"{row['cell']}: a state of {row['bytes_sparse']:,} bytes, promised {row['bytes_promised']:,}"
            )
    return missed


def ship(timings: dict[str, GpuTiming], device: str, path: Path) -> None:
    """Puts what was timed into the table that `auto` reads where the user has tuned nothing."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table[device] = {**table.get(device, {}), **{key: list(timing) for key, timing in timings.items()}}
    path.write_text(json.dumps(table, indent=0, sort_keys=True) + "\n")


def facts(device: torch.device) -> dict[str, str]:
    """Hardware, driver and versions, for every line."""
    found = {"device": "cpu (smoke)", "driver": "", "cuda": str(torch.version.cuda)}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
        except (OSError, subprocess.CalledProcessError):
            found["driver"] = "unknown"
    return found | {name: version for name, version in hardware.versions().items() if name != "numpy"}


def run(
    cells: list[Cell], device: torch.device, seconds: float, rounds: int, tune: bool
) -> tuple[list[dict[str, Any]], dict[str, GpuTiming], list[str]]:
    """Rows and timings of all cells that fit into the time, and the names of those that did not."""
    start, longest, rows, timings, skipped = time.monotonic(), 0.0, [], {}, []
    stopwatch = Stopwatch(device)
    for name in ORDER:
        for cell in cells:
            begin = time.monotonic()
            if begin - start + 1.2 * longest > seconds:
                skipped.append(f"{cell.name} {name}")
                continue
            print(f"{begin - start:4.0f} s  {cell.name}, {name}", file=sys.stderr)
            layer = Layer(cell.tokens, cell.in_features, cell.out_features, cell.sparsity, name, device)
            found = measure(layer, rounds, stopwatch, tune=tune)
            held = memory(cell, device) if name == "bf16" else {}
            timings |= layer.timings
            rows += [{"cell": cell.name, **row, **{f"bytes_{k}": v for k, v in held.items()}} for row in found]
            for what, why in layer.missing.items():
                print(f"        {what}: {why}", file=sys.stderr)
            longest = max(longest, time.monotonic() - begin)
            del layer
    return rows, timings, skipped


def write(rows: list[dict[str, Any]], everywhere: dict[str, str], path: Path) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*columns, *everywhere])
        writer.writeheader()
        writer.writerows({**row, **everywhere} for row in rows)


def plot(rows: list[dict[str, Any]], everywhere: dict[str, str], path: Path) -> None:
    """Speed-up of the whole layer over cuBLAS, a panel per precision, a group of bars per cell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in ORDER if any(row["precision"] == name for row in rows)]
    shown = ("auto", "triton", "dense")
    figure, panels = plt.subplots(len(names), 1, figsize=(10, 2.6 * len(names)), layout="constrained", squeeze=False)
    for axes, name in zip(panels[:, 0], names, strict=True):
        here = {
            (r["cell"], r["candidate"]): r["ratio_to_dense"]
            for r in rows
            if r["product"] == "layer" and r["precision"] == name
        }
        cells = list(dict.fromkeys(cell for cell, _ in here))
        for i, candidate in enumerate(shown):
            heights = [here.get((cell, candidate), 0.0) for cell in cells]
            axes.bar([x + (i - 1) * 0.27 for x in range(len(cells))], heights, 0.25, label=candidate)
        axes.axhline(1, color="0.3", linewidth=0.8)
        axes.set_xticks(range(len(cells)), cells, rotation=20, ha="right", fontsize=8)
        axes.set(ylabel="over cuBLAS", title=f"{name}: forward and both gradients, against cuBLAS on masked weights")
    panels[0, 0].legend(frameon=False)
    figure.suptitle(f"{everywhere['device']}, torch {everywhere['torch']}, triton {everywhere['triton']}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table(rows: list[dict[str, Any]]) -> str:
    """Ratio to cuBLAS by cell, precision and product, as `auto` would run it."""
    lines = [f"{'cell':16} {'':5} " + " ".join(f"{product:>24}" for product in (*PRODUCTS, "layer"))]
    groups = dict.fromkeys((row["cell"], row["precision"]) for row in rows)
    for cell, name in groups:
        auto = {r["product"]: r for r in rows if (r["cell"], r["precision"], r["candidate"]) == (cell, name, "auto")}
        cells = (
            f"{auto[p]['ratio_to_dense']:.2f}x {auto[p]['path']}" if p in auto else "" for p in (*PRODUCTS, "layer")
        )
        lines.append(f"{cell:16} {name:5} " + " ".join(f"{text:>24}" for text in cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of CSV and plot")
    parser.add_argument("--seconds", type=float, default=480, help="time for all of it")
    parser.add_argument("--tune", action="store_true", help="keep what auto should choose in the user's cache")
    parser.add_argument("--smoke", action="store_true", help="tiny layers on the CPU: tests this file, no speeds")
    options = parser.parse_args()
    start = time.monotonic()
    try:
        device = torch.device("cpu") if options.smoke else require_cuda()
    except UserError as error:
        print(f"benchmarks/gpu.py: error: {error}", file=sys.stderr)
        return 2
    wrong = check(device)
    print(f"correctness: {len(wrong)} of the checks on odd shapes failed", file=sys.stderr)
    left = options.seconds - (time.monotonic() - start)
    rows, timings, skipped = run(
        SMOKE if options.smoke else CELLS, device, left, 2 if options.smoke else ROUNDS, options.tune
    )
    wrong += [
        f"{r['candidate']} {r['product']} {r['precision']} in {r['cell']}: error {r['error']:.2e}"
        for r in rows
        if r["error"] is not None and not r["error"] <= TOLERANCE[r["precision"]]
    ]
    everywhere, missed = facts(device), [] if options.smoke else bars(rows)
    if rows:
        options.output.mkdir(parents=True, exist_ok=True)
        write(rows, everywhere, options.output / "gpu.csv")
        plot(rows, everywhere, options.output / "gpu.png")
        shipped = options.output / "gpu_tuning.json" if options.smoke else TABLE
        if not wrong:
            ship(timings, everywhere["device"], shipped)
        print(table(rows))
        print(f"\nratios to cuBLAS on weights that are ready; {', '.join(f'{k} {v}' for k, v in everywhere.items())}")
        if options.smoke:
            print("tiny layers on a CPU: the figures mean nothing")
        print(f"wrote {options.output / 'gpu.csv'} and gpu.png" + f", and for auto {shipped}" * (not wrong))
        if not options.smoke:
            print(f"bars: {len(missed)} missed")
    for line in skipped:
        print(f"skipped for lack of time: {line}")
    for line in missed:
        print(f"MISSED: {line}")
    for line in wrong:
        print(f"WRONG: {line}")
    return 1 if wrong else 3 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
