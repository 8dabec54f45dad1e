"""Sparse against dense and peers: interleaved rounds in one process, medians, everything counted.

Every candidate of a round is timed before the next round starts, so that a slow minute of the machine hits all of them.
Data are random, never zeros. Times include packing, transposes and the refresh of values; plans are built before.
"""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vspdf.bench.rounds import PRODUCTS, Candidate, _quartiles, time_rounds
from vspdf.errors import UserError
from vspdf.kernels import cpu, hardware, ops
from vspdf.pattern import Pattern

# (tokens, in_features, out_features) of the layers that GPTs of 100M to 1B parameters have.
SHAPES = ((1024, 768, 3072), (2048, 3072, 768), (2048, 768, 768), (2048, 2048, 2048), (4096, 1024, 4096))
SPARSITIES = (0.5, 0.75, 0.9, 0.95, 0.99)
DISTURBED = 0.6  # of the FMA peak: a round in which dense ran below it says more about the machine than about kernels


@dataclass
class Row:
    """One median. Seconds; GFLOP/s on useful work (two FLOPs per kept weight and token)."""

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
    ratio_to_dense: float
    gflops_useful: float
    peak_fraction: float  # of the machine's measured FMA peak, on useful work
    rounds: int
    disturbed_rounds: int


@dataclass
class Problem:
    """One layer: inputs, weights and what each candidate needs, with the plans already built."""

    pattern: Pattern
    x: Tensor
    grad: Tensor
    weight: Tensor

    @classmethod
    def random(cls, tokens: int, in_features: int, out_features: int, sparsity: float, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        pattern = Pattern.random((out_features, in_features), sparsity, seed=seed)
        x = torch.randn(tokens, in_features, generator=generator)
        grad = torch.randn(tokens, out_features, generator=generator)
        return cls(pattern, x, grad, torch.randn(out_features, in_features, generator=generator) * pattern.mask())

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
    mask = p.pattern.mask().float()
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
        Time the other libraries too.

    Returns
    -------
    dict
        ``rows`` (of `Row` fields), ``peak_gflops`` by threads, ``break_even`` sparsity per shape, product and thread
        count, ``hardware``, ``versions``, ``missing`` peers with the reason.
    """
    if rounds < 1:
        raise UserError(f"rounds must be at least 1, not {rounds}.")
    extension = cpu.extension()
    names, missing = available_peers() if peers else ([], {})
    thread_counts = list(threads or sorted({1, hardware.hardware()["cores"]}))
    before = torch.get_num_threads()
    rows: list[Row] = []
    peaks: dict[int, float] = {}
    try:
        for count in thread_counts:
            torch.set_num_threads(count)
            peaks[count] = extension.fma_peak(count, 0.3)
            for shape in shapes:
                for sparsity in sparsities:
                    progress(f"{count} threads, tokens x in x out = {'x'.join(map(str, shape))}, sparsity {sparsity}")
                    problem = Problem.random(*shape, sparsity)
                    times = time_rounds(problem.candidates(["dense", "vspdf", "auto", *names]), rounds)
                    rows += _rows(problem, sparsity, count, times, peaks[count])
    finally:
        torch.set_num_threads(before)
    return {
        "rows": [asdict(row) for row in rows],
        "peak_gflops": {str(count): peak for count, peak in peaks.items()},
        "break_even": _break_even(rows),
        "hardware": hardware.hardware(),
        "versions": hardware.versions(),
        "missing": missing,
    }


def _rows(
    problem: Problem, sparsity: float, threads: int, times: dict[tuple[str, str], list[float]], peak: float
) -> list[Row]:
    tokens, pattern = problem.x.shape[0], problem.pattern
    rows = []
    for (name, product), seconds in times.items():
        factor = len(PRODUCTS) if product == "layer" else 1
        dense_flops = 2 * tokens * pattern.numel * factor
        dense = times["dense", product]
        disturbed = sum(dense_flops / s < DISTURBED * peak * 1e9 for s in dense)
        median = statistics.median(seconds)
        low, high = _quartiles(seconds)
        rate = 2 * tokens * pattern.nnz * factor / median / 1e9
        rows.append(
            Row(
                tokens, pattern.in_features, pattern.out_features, sparsity, threads, product, name, median, low, high,
                statistics.median(dense) / median, rate, rate / peak, len(seconds), disturbed,
            )
        )  # fmt: skip
    return rows


def _break_even(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Sparsity at which the sparse kernels meet dense, linear between the measured ones; None if outside them."""
    found = []
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.candidate == "vspdf":
            groups.setdefault((row.tokens, row.in_features, row.out_features, row.threads, row.product), []).append(row)
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
