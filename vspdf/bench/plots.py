"""Pictures of speed-ups, by matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LABELS = {
    "vspdf": "vspdf", "dense_onednn": "dense by oneDNN", "dense_bf16": "dense bf16", "dense_mask": "dense x mask",
    "torch_csr": "torch.sparse CSR", "torch_bsr": "torch.sparse BSR", "scipy_csr": "scipy CSR",
    "sparselab": "SparseLab",
}  # fmt: skip


def curves(rows: Sequence[dict[str, Any]], threads: int) -> dict[str, list[tuple[float, float]]]:
    """Speed-up of a whole layer over sparsity by candidate; of one without all products, of its forward product.

    Geometric means over shapes and masks; sparsities in percent.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    mine = [row for row in rows if row["threads"] == threads and row["ratio_to_dense"] and row.get("possible", True)]
    for name in dict.fromkeys(row["candidate"] for row in mine):
        products = {row["product"] for row in mine if row["candidate"] == name}
        product = "layer" if "layer" in products else "forward"
        groups: dict[float, list[float]] = {}
        for row in mine:
            if (row["candidate"], row["product"]) == (name, product):
                groups.setdefault(round(row["sparsity"], 2), []).append(row["ratio_to_dense"])
        label = LABELS.get(name, name) + ("" if product == "layer" else f" ({product})")
        found[label] = [(s, statistics.geometric_mean(group)) for s, group in sorted(groups.items())]
    return found


def plot(result: dict[str, Any], path: Path, threads: int | None = None) -> None:
    """Speed-up of a whole layer over sparsity: ideal 1/(1−s), vspdf and peers; geometric means over the shapes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if row["candidate"] not in ("dense", "auto") and row["ratio_to_dense"]]
    count = threads or max(row["threads"] for row in rows)
    sparsities = sorted({round(row["sparsity"], 2) for row in rows})
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(sparsities, [1 / max(1 - s, 1e-3) for s in sparsities], "--", color="0.6", label="ideal 1/(1−s)")
    for label, points in curves(rows, count).items():
        axes.plot(*zip(*points, strict=True), marker="o", linewidth=2.5 if label == "vspdf" else 1.2, label=label)
    axes.axhline(1, color="0.3", linewidth=0.8)
    shapes = sorted({f"{row['tokens']}x{row['in_features']}x{row['out_features']}" for row in rows})
    rounds = "-".join(str(n) for n in sorted({min(row["rounds"] for row in rows), max(row["rounds"] for row in rows)}))
    axes.set(
        xlabel="sparsity", ylabel="speed-up over dense (log)", yscale="log",
        title=f"Linear layer, forward + both gradients, {count} threads, {rows[0]['dtype']}\n"
        f"{result['hardware']['cpu']}\n"
        f"{shapes[0] if len(shapes) == 1 else f'{len(shapes)} shapes'} (tokens x in x out), {rounds} rounds",
    )  # fmt: skip
    if 1 < len(shapes) <= 6:
        figure.supxlabel(", ".join(shapes), fontsize=7, color="0.4")
    axes.set_xticks(sparsities[:: max(1, len(sparsities) // 8)])
    axes.xaxis.set_major_formatter(lambda s, _: f"{s:.0%}")
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64]
    axes.set_yticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
