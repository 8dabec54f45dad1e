"""Sparse against dense and peers: interleaved rounds in one process, medians, everything counted.

Every candidate of a round is timed before the next round starts, so that a slow minute of the machine hits all of them.
Data are random, never zeros. Times include packing, transposes and the refresh of values; plans are built before.
"""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vspdf.bench.rounds import PRODUCTS, Candidate, Timed, compared, ideal, others_at_work, quartiles, time_rounds
from vspdf.errors import UserError, require
from vspdf.kernels import cpu, hardware, ops
from vspdf.pattern import Pattern

# (tokens, in_features, out_features) of the layers that GPTs of 100M to 1B parameters have.
SHAPES = ((1024, 768, 3072), (2048, 3072, 768), (2048, 768, 768), (2048, 2048, 2048), (4096, 1024, 4096))
SPARSITIES = (0.5, 0.75, 0.9, 0.95, 0.99)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
DISTURBED = 0.6  # of the FMA peak: a round in which dense ran below it says more about the machine than about kernels


@dataclass
class Row:
    """Medians of one candidate and product. Seconds; GFLOP/s on useful work (two FLOPs per kept weight and token)."""

    tokens: int
    in_features: int
    out_features: int
    sparsity: float
    threads: int
    product: str
    candidate: str
    seconds_median: float
    seconds_low: float  # quartiles
    seconds_high: float
    ratio_to_dense: float  # median of the rounds' ratios
    gflops_useful: float
    peak_fraction: float | None  # of the machine's measured float32 FMA peak, on useful work; bf16 may go beyond it
    rounds: int
    disturbed_rounds: int
    precision: str = "fp32"
    ratio_low: float = math.nan  # quartiles
    ratio_high: float = math.nan
    possible: bool = True  # below the FMA peak and the ideal speed-up, as far as these bind


@dataclass
class Problem:
    """One layer: inputs, weights and what each candidate needs, with the plans already built."""

    pattern: Pattern
    x: Tensor
    grad: Tensor
    weight: Tensor

    @classmethod
    def random(
        cls, tokens: int, in_features: int, out_features: int, sparsity: float, seed: int = 0, precision: str = "fp32"
    ) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        pattern = Pattern.random((out_features, in_features), sparsity, seed=seed)
        draw = lambda *shape: torch.randn(shape, generator=generator).to(PRECISIONS[precision])  # noqa: E731
        x, grad = draw(tokens, in_features), draw(tokens, out_features)
        return cls(pattern, x, grad, draw(out_features, in_features) * pattern.mask())

    def candidates(self, names: Iterable[str]) -> dict[str, Candidate]:
        return {name: MAKERS[name](self) for name in names}


def _vspdf(p: Problem) -> Candidate:
    """The sparse kernels, whatever `auto` would choose."""
    values = p.weight[p.pattern.mask()]
    return {
        "forward": lambda: cpu.forward(p.x, values, None, p.pattern),
        "grad_input": lambda: cpu.grad_input(p.grad, values, p.pattern),
        "grad_values": lambda: cpu.grad_values(p.grad, p.x, p.pattern),
    }


def _auto(p: Problem) -> Candidate:
    """What users get: the operators with their dispatch."""
    values, key = p.weight[p.pattern.mask()], p.pattern.digest
    return {
        "forward": lambda: ops.linear(p.x, values, None, key, "auto"),
        "grad_input": lambda: ops.grad_input(p.grad, values, key, "auto"),
        "grad_values": lambda: ops.grad_values(p.grad, p.x, key, "auto"),
    }


def _dense(p: Problem) -> Candidate:
    return {
        "forward": lambda: F.linear(p.x, p.weight),
        "grad_input": lambda: p.grad @ p.weight,
        "grad_values": lambda: p.grad.T @ p.x,
    }


def _dense_mask(p: Problem) -> Candidate:
    """What masked training usually does: multiply by zeros."""
    mask = p.pattern.mask().to(p.weight.dtype)
    return {
        "forward": lambda: F.linear(p.x, p.weight * mask),
        "grad_input": lambda: p.grad @ (p.weight * mask),
        "grad_values": lambda: (p.grad.T @ p.x) * mask,
    }


def _csr_parts(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values and indices of W, the same of its transpose, and the permutation between their values."""
    rows, columns = (torch.from_numpy(a) for a in p.pattern.csr())
    mask = p.pattern.mask()
    order = torch.zeros(p.pattern.shape, dtype=torch.int64)
    order[mask] = torch.arange(p.pattern.nnz)
    transposed_order = order.T[mask.T]
    t_rows, t_columns = (torch.from_numpy(a) for a in Pattern.from_mask(mask.T.contiguous()).csr())
    return p.weight[mask], rows.int(), columns, t_rows.int(), t_columns, transposed_order


def _torch_csr(p: Problem) -> Candidate:
    """torch.sparse (MKL), with the transposes that a Linear layer's row-major activations need."""
    values, rows, columns, t_rows, t_columns, order = _csr_parts(p)
    shape, t_shape = p.pattern.shape, (p.pattern.in_features, p.pattern.out_features)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    zeros = torch.sparse_csr_tensor(rows, columns, torch.zeros_like(values), shape, check_invariants=False)

    def forward() -> Tensor:
        return (
            torch.sparse_csr_tensor(rows, columns, values, shape, check_invariants=False) @ p.x.T.contiguous()
        ).T.contiguous()

    def grad_input() -> Tensor:
        w_t = torch.sparse_csr_tensor(t_rows, t_columns, values[order], t_shape, check_invariants=False)
        return (w_t @ p.grad.T.contiguous()).T.contiguous()

    def grad_values() -> Tensor:
        return torch.sparse.sampled_addmm(zeros, p.grad.T.contiguous(), p.x, beta=0.0).values()

    return {"forward": forward, "grad_input": grad_input, "grad_values": grad_values}


def _scipy_csr(p: Problem) -> Candidate:
    """scipy.sparse: single-threaded, no product for gradients at kept positions."""
    import scipy.sparse as sp

    values, rows, columns, t_rows, t_columns, order = (part.numpy() for part in _csr_parts(p))
    shape, t_shape = p.pattern.shape, (p.pattern.in_features, p.pattern.out_features)
    x, grad = p.x.numpy(), p.grad.numpy()

    def forward() -> Any:
        return (sp.csr_matrix((values, columns, rows), shape=shape) @ x.T).T.copy()

    def grad_input() -> Any:
        return (sp.csr_matrix((values[order], t_columns, t_rows), shape=t_shape) @ grad.T).T.copy()

    return {"forward": forward, "grad_input": grad_input}


def _sparselab(p: Problem) -> Candidate:
    """SparseLab's padded-CSR layer (PyPI `sparselab`), forward and backward; its backward is not split by product."""
    from sparselab import SparseLinear

    layer = SparseLinear(p.pattern.in_features, p.pattern.out_features, sparsity=p.pattern.sparsity, bias=False)
    x = p.x.clone().requires_grad_()

    def backward() -> None:
        layer(x).backward(p.grad)

    return {"forward": lambda: layer(p.x), "layer": backward}


MAKERS: dict[str, Callable[[Problem], Candidate]] = {
    "vspdf": _vspdf,
    "auto": _auto,
    "dense": _dense,
    "dense_mask": _dense_mask,
    "torch_csr": _torch_csr,
    "scipy_csr": _scipy_csr,
    "sparselab": _sparselab,
}


def available_peers() -> tuple[list[str], dict[str, str]]:
    """Peers that can run here, and why the others cannot."""
    found, missing = ["dense_mask", "torch_csr"], {}
    for name, package in (("scipy_csr", "scipy"), ("sparselab", "sparselab")):
        try:
            __import__(package)
            found.append(name)
        except ImportError:
            missing[name] = f"package '{package}' is not installed"
    return found, missing


def bench_linear(
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    sparsities: Sequence[float] = SPARSITIES,
    threads: Sequence[int] | None = None,
    rounds: int = 7,
    peers: bool = True,
    precisions: Sequence[str] = ("fp32",),
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Times all candidates on layers.

    Parameters
    ----------
    shapes : sequence of (tokens, in_features, out_features)
    sparsities : sequence of float in [0, 1)
    threads : sequence of int, default: 1 and all cores
    rounds : int
        Interleaved rounds after one of warm-up.
    peers : bool
        Time the other libraries too, in float32.
    precisions : sequence of {"fp32", "bf16"}

    Returns
    -------
    dict
        ``rows`` (of `Row` fields), ``peak_gflops`` by threads, ``load`` before it began, ``break_even`` sparsity per
        shape, product and thread count, ``hardware``, ``versions``, ``missing`` peers with the reason.
    """
    if rounds < 1:
        raise UserError(f"rounds must be at least 1, not {rounds}.")
    for precision in precisions:
        require(
            precision in PRECISIONS,
            f"`precision` {precision}: on a CPU {' and '.join(PRECISIONS)} are timed; others are for a GPU.",
        )
    extension = cpu.extension()
    names, missing = available_peers() if peers else ([], {})
    thread_counts = list(threads or sorted({1, hardware.hardware()["cores"]}))
    before, load = torch.get_num_threads(), others_at_work()
    found: list[tuple[Layer, dict[tuple[str, str], list[Timed]]]] = []
    peaks: dict[int, float] = {}
    try:
        for count, shape, sparsity, precision in itertools.product(thread_counts, shapes, sparsities, precisions):
            torch.set_num_threads(count)
            # Measured anew beside each problem: the highest counts, what a busy machine lets through does not.
            peaks[count] = max(peaks.get(count, 0.0), extension.fma_peak(count, 0.1))
            what = f"tokens x in x out = {'x'.join(map(str, shape))}, sparsity {sparsity}"
            progress(f"{count} threads, {what}, {precision}")
            problem = Problem.random(*shape, sparsity, precision=precision)
            others = names if precision == "fp32" else []
            times = time_rounds(problem.candidates(["dense", "vspdf", "auto", *others]), rounds)
            found.append((Layer(*shape, sparsity, problem.pattern.nnz, count, precision), times))
    finally:
        torch.set_num_threads(before)
    if names and "bf16" in precisions:
        missing |= {f"{name} in bf16": "the other libraries are timed in float32" for name in names}
    rows = [row for layer, times in found for row in _rows(layer, times, peaks[layer.threads])]
    return {
        "rows": [asdict(row) for row in rows],
        "peak_gflops": {str(count): peak for count, peak in peaks.items()},
        "break_even": _break_even(rows),
        "load": load,
        "hardware": hardware.hardware(),
        "versions": hardware.versions(),
        "missing": missing,
    }


class Layer(NamedTuple):
    """What was timed: sizes, kept weights, threads and precision."""

    tokens: int
    in_features: int
    out_features: int
    sparsity: float
    nnz: int
    threads: int
    precision: str


def _rows(layer: Layer, times: dict[tuple[str, str], list[Timed]], peak: float) -> list[Row]:
    rows, bound = [], layer.precision == "fp32"  # bf16 may have instructions of its own, or none at all
    for (name, product), column in times.items():
        factor = len(PRODUCTS) if product == "layer" else 1
        dense_flops = 2 * layer.tokens * layer.in_features * layer.out_features * factor
        dense = times["dense", product]
        slow = [bound and dense_flops / timed.seconds < DISTURBED * peak * 1e9 for timed in dense]
        ratio = compared(dense, column, slow)
        seconds = [timed.seconds for timed in column]
        median, (low, high) = statistics.median(seconds), quartiles(seconds)
        rate = 2 * layer.tokens * layer.nnz * factor / median / 1e9
        possible = not bound or (rate <= peak and ratio.median <= ideal(layer.sparsity))
        rows.append(
            Row(
                layer.tokens, layer.in_features, layer.out_features, layer.sparsity, layer.threads, product, name,
                median, low, high, ratio.median, rate, rate / peak if bound else None, len(column), ratio.disturbed,
                layer.precision, ratio.low, ratio.high, possible,
            )
        )  # fmt: skip
    return rows


def _break_even(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Sparsity at which the sparse kernels meet dense, linear between the measured ones; None if outside them."""
    found = []
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.candidate == "vspdf" and row.possible and row.precision == "fp32":
            of = (row.tokens, row.in_features, row.out_features, row.threads, row.product)
            groups.setdefault(of, []).append(row)
    for (tokens, in_features, out_features, threads, product), group in groups.items():
        group.sort(key=lambda row: row.sparsity)
        at = None
        for a, b in itertools.pairwise(group):
            if a.ratio_to_dense < 1 <= b.ratio_to_dense:
                share = (1 - a.ratio_to_dense) / (b.ratio_to_dense - a.ratio_to_dense)
                at = a.sparsity + share * (b.sparsity - a.sparsity)
        below = group[0].ratio_to_dense >= 1
        found.append(
            {
                "tokens": tokens, "in_features": in_features, "out_features": out_features, "threads": threads,
                "product": product, "sparsity": at, "note": f"below {group[0].sparsity}" if below else "",
            }
        )  # fmt: skip
    return found


LABELS = {
    "vspdf": "vspdf", "dense_mask": "dense x mask", "torch_csr": "torch.sparse CSR", "scipy_csr": "scipy CSR",
    "sparselab": "SparseLab",
}  # fmt: skip


def plot(result: dict[str, Any], path: Path, threads: int | None = None) -> None:
    """Speed-up of a whole layer over sparsity: ideal 1/(1−s), vspdf and peers; geometric means over the shapes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [Row(**row) for row in result["rows"]]
    count = threads or max(row.threads for row in rows)
    sparsities = sorted({row.sparsity for row in rows})
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(sparsities, [1 / (1 - s) for s in sparsities], "--", color="0.6", label="ideal 1/(1−s)")
    for name, label in LABELS.items():
        product = "forward" if name == "scipy_csr" else "layer"
        points = []
        for s in sparsities:
            ratios = [
                row.ratio_to_dense
                for row in rows
                if (row.candidate, row.product, row.threads, row.sparsity) == (name, product, count, s)
                and row.possible
                and row.precision == "fp32"
            ]
            if ratios:
                points.append((s, statistics.geometric_mean(ratios)))
        if points:
            label = f"{label} ({product})" if product != "layer" else label
            axes.plot(*zip(*points, strict=True), marker="o", linewidth=2.5 if name == "vspdf" else 1.2, label=label)
    axes.axhline(1, color="0.3", linewidth=0.8)
    shapes = sorted({f"{row.tokens}x{row.in_features}x{row.out_features}" for row in rows})
    rounds = "-".join(str(n) for n in sorted({min(row.rounds for row in rows), max(row.rounds for row in rows)}))
    axes.set(
        xlabel="sparsity", ylabel="speed-up over dense (log)", yscale="log",
        title=f"Linear layer, forward + both gradients, {count} threads, fp32\n{result['hardware']['cpu']}\n"
        f"{shapes[0] if len(shapes) == 1 else f'{len(shapes)} shapes'} (tokens x in x out), {rounds} rounds",
    )  # fmt: skip
    if len(shapes) > 1:
        figure.supxlabel(", ".join(shapes), fontsize=7, color="0.4")
    axes.set_xticks(sparsities, [f"{s:.0%}" for s in sparsities])
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64]
    axes.set_yticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
