"""Is `auto` ever slower than the better of its two paths? Random layers, tuned nowhere before.

    python benchmarks/never_slower.py [--problems 30] [--seed 0]

Each product of each layer is called once (which tunes it), then timed on the sparse path, the dense path and `auto`,
interleaved. Prints the share of products where auto is within 5 % of the better path, and the worst ones.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time

os.environ["VSPDF_CACHE"] = tempfile.mkdtemp()  # an empty tuning table

import torch

from vspdf.bench import PRODUCTS, Problem
from vspdf.kernels import dense, ops


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--problems", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    results = []
    for i in range(arguments.problems):
        tokens, n_in, n_out = (round(2 ** draw.uniform(a, b)) for a, b in ((6, 12), (7, 12), (7, 12)))
        sparsity, threads = draw.uniform(0.3, 0.99), draw.choice((1, torch.get_num_threads()))
        torch.set_num_threads(threads)
        problem = Problem.random(tokens, n_in, n_out, sparsity, seed=i)
        values = problem.weight[problem.pattern.mask()]
        candidates = problem.candidates(["vspdf", "auto"])
        for product in PRODUCTS:
            tensors = {
                "forward": (problem.x, values, None),
                "grad_input": (problem.grad, values),
                "grad_values": (problem.grad, problem.x),
            }[product]
            runs = {
                "sparse": candidates["vspdf"][product],
                "dense": lambda p=product, t=tensors, q=problem.pattern: getattr(dense, p)(*t, q),
                "auto": candidates["auto"][product],
            }
            times: dict[str, list[float]] = {name: [] for name in runs}
            for r in range(arguments.rounds + 1):
                for name, run in runs.items():
                    start = time.perf_counter()
                    run()
                    if r:
                        times[name].append(time.perf_counter() - start)
            medians = {name: statistics.median(column) for name, column in times.items()}
            loss = medians["auto"] / min(medians["sparse"], medians["dense"]) - 1
            path = ops.choose(product, problem.pattern, tokens, torch.float32, torch.device("cpu")).path
            results.append(
                (loss, f"{tokens}x{n_in}x{n_out} {sparsity:.2f} {threads} threads {product}: {path}", medians)
            )
        print(f"{i + 1}/{arguments.problems}", end="\r", flush=True)
    results.sort(reverse=True, key=lambda result: result[0])
    within = sum(loss <= 0.05 for loss, *_ in results)
    print(f"auto is within 5 % of the better path in {within} of {len(results)} products; the worst:")
    for loss, what, medians in results[:8]:
        print(f"  {loss:+.1%}  {what}  " + "  ".join(f"{name} {1e3 * s:.2f} ms" for name, s in medians.items()))


if __name__ == "__main__":
    main()
