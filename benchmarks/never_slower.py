"""Is `auto` ever slower than the better of its two paths? Random layers, tuned nowhere before.

    python benchmarks/never_slower.py [--problems 30] [--seed 0] [--threads 1] [--csv FILE]

Each product of each layer is called once (which tunes it), then timed in rounds on the sparse path, the dense path and
`auto`, each right after each of the three, in a new random order each round: whoever follows a dense product finds the
caches cold. A time is the mean over what came before of the median. Two figures come out. *Choice*: the time of the
path that `auto` took against the better path. *Door*: `auto` itself, the operator included, against the better path
called bare, of products that take it at least 100 us. Times of one thread are its CPU time, which other work on the
machine leaves almost alone.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

os.environ["VSPDF_CACHE"] = tempfile.mkdtemp()  # an empty tuning table

import torch

from vspdf.bench import candidates as known
from vspdf.bench.problem import Problem
from vspdf.bench.rounds import PRODUCTS
from vspdf.kernels import dense, dispatch
from vspdf.kernels.hardware import keep_freed_memory

LIMIT = 0.05
LEAST = 1e-4  # seconds of the better path, from which on the operator's own time must not count


def measure(problem: Problem, product: str, draw: random.Random, seconds: float) -> dict[str, float]:
    """Seconds of sparse, dense and auto, in at least seven rounds and at least `seconds`."""
    values = problem.values
    tensors = {
        "forward": (problem.x, values, None),
        "grad_input": (problem.grad, values),
        "grad_values": (problem.grad, problem.x),
    }[product]
    candidates = {name: known.find(name) for name in ("vspdf", "auto")}
    for candidate in candidates.values():
        problem.prepared(candidate)
    runs = {
        "sparse": problem.calls(candidates["vspdf"])[product],
        "dense": lambda: getattr(dense, product)(*tensors, problem.pattern),
        "auto": problem.calls(candidates["auto"])[product],
    }
    for run in runs.values():
        run()
    times: dict[tuple[str, str], list[float]] = {(before, name): [] for before in runs for name in runs}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    stop = time.perf_counter() + seconds
    rounds = 0
    while rounds < 7 or time.perf_counter() < stop:
        rounds += 1
        for before, name in draw.sample(list(times), len(times)):
            runs[before]()
            start = clock()
            runs[name]()
            times[before, name].append(clock() - start)
    return {name: statistics.fmean(statistics.median(times[before, name]) for before in runs) for name in runs}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--problems", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.3, help="least time for a product's rounds")
    parser.add_argument("--threads", type=int, help="default: 1 or all cores, drawn for each layer")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    draw = random.Random(arguments.seed)
    cores = torch.get_num_threads()
    rows = []
    for i in range(arguments.problems):
        tokens, n_in, n_out = (round(2 ** draw.uniform(a, b)) for a, b in ((4, 12), (5, 12), (5, 12)))
        sparsity, threads = draw.uniform(0.3, 0.99), arguments.threads or draw.choice((1, cores))
        torch.set_num_threads(threads)
        problem = Problem.random(tokens, n_in, n_out, sparsity, seed=i)
        for product in PRODUCTS:
            medians = measure(problem, product, draw, arguments.seconds)
            path = dispatch.choose(product, problem.pattern, tokens, torch.float32, torch.device("cpu")).path
            best = min(medians["sparse"], medians["dense"])
            rows.append(
                {
                    "tokens": tokens, "in_features": n_in, "out_features": n_out, "sparsity": round(sparsity, 3),
                    "threads": threads, "product": product, "path": path,
                    "choice": medians["sparse" if path == "cpu" else "dense"] / best - 1,
                    "door": medians["auto"] / best - 1, **medians,
                }
            )  # fmt: skip
        print(f"{i + 1}/{arguments.problems}", end="\r", flush=True)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    for figure, least in (("choice", 0.0), ("door", LEAST)):
        judged = [row for row in rows if min(row["sparse"], row["dense"]) >= least]
        within = sum(row[figure] <= LIMIT for row in judged)
        print(f"{figure}: within {LIMIT:.0%} of the better path in {within} of {len(judged)} products; the worst:")
        for row in sorted(judged, key=lambda row: -row[figure])[:6]:
            print(
                f"  {row[figure]:+.1%}  {row['tokens']}x{row['in_features']}x{row['out_features']} "
                f"{row['sparsity']:.2f} {row['threads']} threads {row['product']}: {row['path']}  "
                + "  ".join(f"{name} {1e3 * row[name]:.3f} ms" for name in ("sparse", "dense", "auto"))
            )
    overhead = statistics.median(row["auto"] - row["sparse" if row["path"] == "cpu" else "dense"] for row in rows)
    print(f"the operator adds {1e6 * overhead:.0f} us to a product (median)")


if __name__ == "__main__":
    main()
