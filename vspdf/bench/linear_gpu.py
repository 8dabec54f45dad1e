"""Linear layers on a GPU: every path beside cuBLAS on masked weights made beforehand, and cuSPARSE.

As on the CPU: interleaved rounds, random data, everything counted. Each call is timed by events on the device, after
the L2 cache was overwritten. On a CPU the same code runs on tiny shapes, to test it, not to learn speeds.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from vspdf.bench.rounds import PRODUCTS
from vspdf.errors import UserError, first_line
from vspdf.kernels import hardware, reference, tuning
from vspdf.kernels.gpu import bitmap, launch, two_four
from vspdf.kernels.ops import PATHS
from vspdf.pattern import Pattern

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
# Largest error as a fraction of the largest value: rounding of inputs and output, TF32's 10 bits of mantissa.
TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "tf32": 2e-3, "fp32": 1e-5}
SHAPES = ((16384, 768, 3072), (16384, 2048, 8192), (16384, 8192, 2048), (8192, 4096, 4096))  # tokens, in, out
SPARSITIES = (0.9, 0.95, 0.98, 0.99, 0.995)
FLUSH = 256 << 20  # bytes written before each call: more than any L2

Call = Callable[[], Any]


@contextmanager
def precision(name: str) -> Iterator[None]:
    """How torch multiplies float32 inside the block."""
    matmul = torch.backends.cuda.matmul
    new = hasattr(matmul, "fp32_precision")  # torch >= 2.9, where reading the old one may raise
    setting = "fp32_precision" if new else "allow_tf32"
    before = getattr(matmul, setting)
    setattr(matmul, setting, ("tf32" if name == "tf32" else "ieee") if new else name == "tf32")
    try:
        yield
    finally:
        setattr(matmul, setting, before)


class Layer:
    """One layer's tensors on a device, and what can be timed on them; from 50 % its mask fits 2:4."""

    def __init__(
        self, tokens: int, in_features: int, out_features: int, sparsity: float, name: str, device: torch.device
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator, device=device).to(PRECISIONS[name])  # noqa: E731
        self.name, self.sparsity, self.device = name, sparsity, device
        self.pattern = Pattern.random((out_features, in_features), sparsity, fits="2:4" if sparsity >= 0.5 else None)
        self.x, self.grad, self.values = draw(tokens, in_features), draw(tokens, out_features), draw(self.pattern.nnz)
        self.weight = reference.materialise(self.values, self.pattern)
        self.missing: dict[str, str] = {}
        self.timings: dict[str, tuning.GpuTiming] = {}  # of `measure`, by the key that `auto` looks for

    def arguments(self, product: str) -> tuple[Any, ...]:
        return {
            "forward": (self.x, self.values, None), "grad_input": (self.grad, self.values),
            "grad_values": (self.grad, self.x),
        }[product]  # fmt: skip

    def paths(self, product: str) -> dict[str, Call]:
        """What `auto` chooses from."""
        names = ["dense"]
        if (why := launch.unavailable() or launch.refusal(self.x.dtype, self.device)) is None:
            names.append("triton")
        else:
            self.missing["triton"] = why
        if (why := two_four.unavailable(self.pattern, self.name, self.device)) is None:
            names.append("2:4")
        else:
            self.missing["2:4"] = why
        return {n: self._path(n, product) for n in names if product in PATHS[n]}

    def _path(self, name: str, product: str) -> Call:
        run, arguments = PATHS[name][product], self.arguments(product)
        return lambda: run(*arguments, self.pattern)

    def search(self, product: str) -> int:
        """cuSPARSELt's fastest algorithm, used from now on; its default where the search fails."""
        try:
            tokens = self.x if product == "forward" else self.grad
            return two_four.search(product, tokens, self.values, self.pattern)
        except RuntimeError as error:
            self.missing[f"2:4 search {product}"] = first_line(error)[:160]
            return 0

    def bounds(self, product: str) -> dict[str, Call]:
        """cuBLAS on the masked weight, made beforehand, and what "dense" does beside it, alone."""
        x, grad, weight = self.x, self.grad, self.weight
        found: dict[str, Call] = {
            "cublas": {
                "forward": lambda: F.linear(x, weight), "grad_input": lambda: grad @ weight,
                "grad_values": lambda: grad.T @ x,
            }[product]
        }  # fmt: skip
        if launch.takes(x):
            sampled = product == "grad_values"
            tensor, spread = (weight, bitmap.sample) if sampled else (self.values, bitmap.expand)
            found["sample alone" if sampled else "expand alone"] = lambda: spread(tensor, self.pattern, x.dtype)
        return found

    def peers(self, product: str) -> dict[str, Call]:
        """cuSPARSE."""
        x, grad, weight, mask = self.x, self.grad, self.weight, self.pattern.mask()
        found: dict[str, Call] = {}
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        if product == "grad_values":
            zeros = (weight * 0 + mask.to(self.device)).to_sparse_csr()
            found["cusparse"] = lambda: torch.sparse.sampled_addmm(zeros, grad.T, x, beta=0.0).values()
        else:
            side, tokens = (weight, x) if product == "forward" else (weight.T.contiguous(), grad)
            csr = side.to_sparse_csr()
            found["cusparse"] = lambda: (csr @ tokens.T.contiguous()).T.contiguous()
        return found

    def error(self, product: str, result: Any) -> float:
        """Largest error against float64, as a fraction of the largest value."""
        wide = [t if t is None else t.double() for t in self.arguments(product)]
        exact = getattr(reference, product)(*wide, self.pattern)
        found = result[0] if isinstance(result, tuple) else result
        if not exact.numel():
            return 0.0
        return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


class Stopwatch:
    """Seconds of one call on a device, the caches cold."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rubbish = torch.empty(FLUSH if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def __call__(self, run: Call) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.rubbish.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def time_rounds(
    calls: dict[str, Call], rounds: int, stopwatch: Stopwatch
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every call in each interleaved round after one of warm-up, and why others failed."""
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for i in range(rounds + 1):
        for name, run in calls.items():
            if name in failed:
                continue
            try:
                spent = stopwatch(run)
            except RuntimeError as error:  # a library without this dtype, or out of memory
                failed[name] = first_line(error)[:160]
                seconds.pop(name, None)
                continue
            if i:
                seconds.setdefault(name, []).append(spent)
    return seconds, failed


def measure(
    layer: Layer, rounds: int, stopwatch: Stopwatch, peers: bool = True, tune: bool = False
) -> list[dict[str, Any]]:
    """A row per candidate and product, and "layer" rows: the sum of a round's three products.

    ``auto`` in a layer row is the sum of the best path of each product that would be trusted. A row of a path whose
    result differs from float64 is not ``correct``, counts in no layer row, and is nothing that `auto` may choose; a
    product without the base, cuBLAS, has no rows.
    """
    rows: list[dict[str, Any]] = []
    sums: dict[str, list[list[float]]] = {}
    tokens = layer.x.shape[0]
    with precision(layer.name):
        for product in PRODUCTS:
            calls = {**layer.paths(product), **layer.bounds(product), **(layer.peers(product) if peers else {})}
            algorithm = layer.search(product) if "2:4" in calls else 0
            seconds, failed = time_rounds(calls, rounds, stopwatch)
            layer.missing.update({f"{name} {product}": why for name, why in failed.items()})
            if (base := seconds.get("cublas")) is None:
                continue
            errors = {name: layer.error(product, calls[name]()) for name in seconds if name in PATHS}
            wrong = {name for name, error in errors.items() if not error <= TOLERANCE[layer.name]}
            chosen = {}
            if "dense" in errors.keys() - wrong:  # what auto falls back to
                right = {name: seconds[name] for name in errors if name not in wrong}
                timing = tuning.timing({**right, "cublas": base}, algorithm)
                choice, key = timing.choice("measured"), tuning.gpu_key(product, layer.pattern, tokens, layer.x.dtype)
                layer.timings[key] = timing
                if tune:
                    tuning.keep(key, timing, layer.device)
                errors["auto"], seconds["auto"] = errors[choice.path], seconds[choice.path]
                chosen = {"auto": choice.path}
            for name, column in seconds.items():
                if name not in wrong:
                    sums.setdefault(name, []).append(column)
                row = _row(layer, product, name, column, base, 1)
                row |= {"path": chosen.get(name, name), "correct": name not in wrong, "error": errors.get(name)}
                rows.append(row)
    whole = {
        name: [sum(parts) for parts in zip(*columns, strict=True)]
        for name, columns in sums.items()
        if len(columns) == 3
    }
    for name, column in whole.items() if "cublas" in whole else ():
        rows.append(_row(layer, "layer", name, column, whole["cublas"], 3) | {"correct": True, "error": None})
    return rows


def _row(
    layer: Layer, product: str, candidate: str, column: Sequence[float], base: Sequence[float], factor: int
) -> dict[str, Any]:
    low, high = min(column), max(column)
    median = statistics.median(column)
    ratios = [a / b for a, b in zip(base, column, strict=True)]
    return {
        "tokens": layer.x.shape[0], "in_features": layer.pattern.in_features,
        "out_features": layer.pattern.out_features, "sparsity": layer.sparsity, "precision": layer.name,
        "product": product, "candidate": candidate, "path": candidate, "seconds_median": median, "seconds_low": low,
        "seconds_high": high, "ratio_to_dense": statistics.median(ratios),
        "ratio_low": min(ratios), "ratio_high": max(ratios),
        "gflops_useful": 2 * layer.x.shape[0] * layer.pattern.nnz * factor / median / 1e9, "rounds": len(column),
    }  # fmt: skip


def require_cuda() -> torch.device:
    """The current CUDA device.

    Raises
    ------
    UserError
        If there is none.
    """
    if not torch.cuda.is_available():
        raise UserError("torch sees no CUDA device here; GPU timings need one.")
    return torch.device("cuda", torch.cuda.current_device())


def bench_linear(
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    sparsities: Sequence[float] = SPARSITIES,
    precisions: Sequence[str] = ("bf16", "fp32"),
    rounds: int = 7,
    peers: bool = True,
    tune: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Times all candidates on layers of the current CUDA device.

    Parameters
    ----------
    shapes : sequence of (tokens, in_features, out_features)
    sparsities : sequence of float in [0, 1)
    precisions : sequence of {"bf16", "fp16", "tf32", "fp32"}
    rounds : int
        Interleaved rounds after one of warm-up.
    peers : bool
        Time cuSPARSE too.
    tune : bool
        Keep what `auto` should choose in the user's cache.

    Returns
    -------
    dict
        ``rows``, ``hardware``, ``versions``, and ``missing`` candidates with the reason.

    Raises
    ------
    UserError
        If there is no CUDA device or a precision is unknown.
    """
    device = require_cuda()
    if unknown := [name for name in precisions if name not in PRECISIONS]:
        raise UserError(f"unknown precision '{unknown[0]}': expected some of {', '.join(PRECISIONS)}.")
    stopwatch = Stopwatch(device)
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for tokens, n_in, n_out in shapes:
        for sparsity in sparsities:
            for name in precisions:
                progress(f"tokens x in x out = {tokens}x{n_in}x{n_out}, sparsity {sparsity}, {name}")
                layer = Layer(tokens, n_in, n_out, sparsity, name, device)
                rows += measure(layer, rounds, stopwatch, peers, tune)
                missing.update(layer.missing)
    return {"rows": rows, "hardware": hardware.hardware(), "versions": hardware.versions(), "missing": missing}
