"""Markdown tables of results against the project's goals: geometric means over the shapes, by product and threads.

    python benchmarks/tables.py benchmarks/results/linear-*.csv

A cell shows the geometric mean and, in brackets, the least of the shapes. ** aim met, * must met: the mean reaches it,
and no shape is below 0.8 of the must. What was not measured stays empty; "-" is what cannot be, as the file says.
Disturbed rounds are counted below the table.
"""

from __future__ import annotations

import csv
import statistics
import sys
from pathlib import Path

SPARSITIES = (0.5, 0.75, 0.9, 0.95, 0.99)
SPMM = ((1.4, 1.7), (2.7, 3.5), (5, 7), (7, 10), (12, 15))
GOALS = {  # must and aim by sparsity
    "forward": SPMM,
    "grad_input": SPMM,
    "grad_values": ((1.1, 1.5), (2, 2.8), (4, 5.5), (6, 8), (9, 12)),
    "layer": ((1.25, 1.6), (2.3, 3.2), (4.5, 6.2), (6.5, 9), (10, 13)),
}


def cell(rows: list[dict[str, str]], must: float, aim: float) -> str:
    """Of the shapes that were measured, with their number where that is not all; empty where none was."""
    ratios = [float(row["ratio_to_dense"]) for row in rows if row.get("possible", "True") == "True"]
    if not ratios:
        return "-" if rows else ""
    mean, least = statistics.geometric_mean(ratios), min(ratios)
    met = "**" if mean >= aim and least >= 0.8 * must else "*" if mean >= must and least >= 0.8 * must else ""
    missing = f", {len(ratios)} of {len(rows)}" if len(ratios) < len(rows) else ""
    return f"{mean:.2f}x ({least:.2f}{missing}){met and ' ' + met.replace('*', chr(92) + '*')}"


def table(path: Path) -> None:
    with path.open() as stream:
        rows = list(csv.DictReader(stream))
    if not rows or not {"candidate", "product", "threads", "sparsity", "ratio_to_dense"} <= rows[0].keys():
        sys.exit(f"{path}: expected what vspdf bench linear --csv writes")
    mine = [row for row in rows if row["candidate"] == "vspdf" and row.get("precision", "fp32") == "fp32"]
    print(f"\n{rows[0]['cpu']}, {path.name}\n")
    print("| product | threads |" + "".join(f" {s:.0%} |" for s in SPARSITIES))
    print("|---|---|" + "---|" * len(SPARSITIES))
    for product, goals in GOALS.items():
        for threads in sorted({row["threads"] for row in mine}, key=int):
            here = [row for row in mine if (row["product"], row["threads"]) == (product, threads)]
            cells = [
                cell([row for row in here if float(row["sparsity"]) == s], *goal)
                for s, goal in zip(SPARSITIES, goals, strict=True)
            ]
            print(f"| {product} | {threads} | " + " | ".join(cells) + " |")
    products = [row for row in mine if row["product"] != "layer"]
    disturbed = sum(int(row["disturbed_rounds"]) for row in products)
    print(f"\n{disturbed} of {sum(int(row['rounds']) for row in products)} rounds were disturbed.")


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        table(path)


if __name__ == "__main__":
    main()
