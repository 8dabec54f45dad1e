"""Linear layers, sparse beside dense and peers: interleaved rounds in one process, everything counted.

Times include packing, transposes and the refresh of values; what a candidate prepares for a mask is timed apart. No
figure is given of a candidate whose results differ from float64 on that very mask.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from vspdf.bench import candidates as known
from vspdf.bench.problem import DTYPES, TOLERANCE, Problem, check_dtypes, check_memory, facts
from vspdf.bench.rounds import (
    PRODUCTS,
    Budget,
    Candidate,
    Timed,
    compared,
    interval,
    on_threads,
    others_at_work,
    sensors,
    time_rounds,
)
from vspdf.errors import in_one_line
from vspdf.kernels import cpu, hardware
from vspdf.pattern import Pattern

# (tokens, in_features, out_features) of the layers that GPTs of 100M to 1B parameters have.
SHAPES = ((1024, 768, 3072), (2048, 3072, 768), (2048, 768, 768), (2048, 2048, 2048), (4096, 1024, 4096))
SPARSITIES = (0.5, 0.75, 0.9, 0.95, 0.99)
DISTURBED = 0.6  # of its best speed: a round in which dense ran below it says more about the machine than about kernels
BUDGET = Budget()
OPPONENT = "dense_bf16"  # dense in bfloat16, where float32 is asked for


@dataclass
class Row:
    """One candidate and product: seconds a call; GFLOP/s on useful work (two FLOPs per kept weight and token)."""

    tokens: int
    in_features: int
    out_features: int
    sparsity: float
    mask: str | None  # of a file or a pattern; None for a random one
    threads: int
    dtype: str
    product: str
    candidate: str
    correct: bool = True
    error: float | None = None  # against float64, as a fraction of the largest value
    seconds_median: float | None = None
    seconds_low: float | None = None  # 95 % interval of the median, as of the ratio
    seconds_high: float | None = None
    ratio_to_dense: float | None = None  # median of the rounds' ratios to dense of the first dtype
    ratio_low: float | None = None
    ratio_high: float | None = None
    noisy: bool = False  # as `Ratio.noisy` judges
    gflops_useful: float | None = None
    peak_fraction: float | None = None  # of the measured float32 FMA peak; bf16 may go beyond it
    prepare_seconds: float | None = None  # for the mask, once
    pays_after: int | None = None  # steps until a layer has won that back; None: never
    rounds: int = 0
    disturbed_rounds: int = 0
    possible: bool = True  # below the FMA peak, as far as it binds


class Case(NamedTuple):
    """What is timed: a mask, tokens, threads, and what to call it."""

    pattern: Pattern
    tokens: int
    sparsity: float
    mask: str | None
    threads: int

    @property
    def about(self) -> str:
        size = f"{self.tokens}x{self.pattern.in_features}x{self.pattern.out_features}"
        name = f"{self.mask}, " if self.mask else ""
        return f"{self.threads} threads, {name}tokens x in x out = {size}, sparsity {self.sparsity:.4g}"


class Side(NamedTuple):
    """A candidate at one dtype, prepared and checked."""

    calls: Candidate
    errors: dict[str, float]
    wrong: tuple[str, ...]
    prepare_seconds: float


def cases(
    shapes: Sequence[tuple[int, int, int]], sparsities: Sequence[float], threads: Sequence[int],
    masks: Iterable[tuple[str, Pattern]] | None, tokens: Sequence[int],
) -> list[Case]:  # fmt: skip
    """All that is to be timed: random masks of shapes and sparsities, or given ones at so many tokens; once each."""
    threads, tokens = [*dict.fromkeys(threads)], [*dict.fromkeys(tokens)]
    if masks is None:
        sizes = dict.fromkeys((t, n_in, n_out) for t, n_in, n_out in shapes)
        for size in sizes:
            _check_memory("`shapes` " + "x".join(map(str, size)), *size)
        return [
            Case(Pattern.random((n_out, n_in), s), t, s, None, count)
            for count, (t, n_in, n_out), s in itertools.product(threads, sizes, dict.fromkeys(sparsities))
        ]
    given = distinct(masks)
    for count, (name, pattern) in itertools.product(tokens, given):
        _check_memory(f"`tokens` {count} with {name}", count, pattern.in_features, pattern.out_features)
    return [Case(p, t, p.sparsity, name, count) for count, t, (name, p) in itertools.product(threads, tokens, given)]


def _check_memory(what: str, tokens: int, n_in: int, n_out: int) -> None:
    """Data in float32 and float64, and products as large in float64."""
    check_memory(what, 20 * (tokens * n_in + tokens * n_out + n_in * n_out))


def distinct(masks: Iterable[tuple[str, Pattern]]) -> list[tuple[str, Pattern]]:
    """Masks by names of their own: a name that was there before is numbered, "a (2)"."""
    found: dict[str, Pattern] = {}
    for name, pattern in masks:
        others = (f"{name} ({n})" for n in itertools.count(2))
        found[name if name not in found else next(other for other in others if other not in found)] = pattern
    return list(found.items())


def bench_linear(
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    sparsities: Sequence[float] = SPARSITIES,
    threads: Sequence[int] | None = None,
    budget: Budget | int = BUDGET,
    peers: bool = True,
    dtypes: Sequence[str] = ("float32",),
    masks: Iterable[tuple[str, Pattern]] | None = None,
    tokens: Sequence[int] = (1024,),
    candidates: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Times all candidates on layers.

    Parameters
    ----------
    shapes : sequence of (tokens, in_features, out_features)
    sparsities : sequence of float in [0, 1)
    threads : sequence of int, default: 1 and all cores
    budget : Budget, or int for so many rounds
    peers : bool
        Time other libraries and dense in bfloat16 too.
    dtypes : sequence of {"float32", "bfloat16"}
        Every ratio is to dense in the first of them.
    masks : iterable of (name, Pattern), optional
        In place of random ones of `shapes` and `sparsities`, each at so many `tokens`.
    candidates : sequence of str
        Others by name, as `vspdf.bench.candidates.find` takes them.

    Returns
    -------
    dict
        ``rows`` (of `Row` fields), ``masks`` (`problem.facts` by name), ``summary`` (geometric means by sparsity),
        ``peak_gflops`` by threads, ``break_even`` sparsity per shape, product, thread count and kind of mask
        (``mask``, of masks that are given), ``load`` and
        ``sensors`` before and after, ``hardware``, ``versions``, ``missing`` candidates with the reason.

    Raises
    ------
    UserError
        If a dtype or a candidate is not known, or a layer does not fit this machine's memory.
    """
    check_dtypes(dtypes)
    extension = cpu.extension()
    names, missing = known.peers() if peers else ([], {})
    if "bfloat16" in dtypes:
        names = [name for name in names if name != OPPONENT]  # dense is timed in it anyway
        missing.pop(OPPONENT, None)
    wanted = {name: known.find(name) for name in dict.fromkeys((*known.OWN, *names, *candidates))}
    counts = list(threads or sorted({1, hardware.hardware()["cores"]}))
    todo = cases(shapes, sparsities, counts, masks, tokens)
    load, felt = others_at_work(), sensors()
    found: list[tuple[Case, dict[tuple[str, str], Side], dict[tuple[str, str], list[Timed]]]] = []
    peaks: dict[int, float] = {}
    for case in todo:
        with on_threads(case.threads):
            # Measured anew beside each problem: the highest counts, what a busy machine lets through does not.
            peaks[case.threads] = max(peaks.get(case.threads, 0.0), extension.fma_peak(case.threads, 0.03))
            progress(case.about)
            sides, failed = _sides(case, wanted, dtypes)
            missing |= failed
            times, broken = _timed_sides(sides, budget, dtypes[0])
            missing |= broken
            found.append((case, sides, times))
    rows = [row for case, sides, times in found for row in _rows(case, sides, times, dtypes[0], peaks[case.threads])]
    return {
        "rows": [asdict(row) for row in rows],
        "masks": {str(case.mask): facts(case.pattern) for case in todo if case.mask is not None},
        "summary": summary(rows),
        "peak_gflops": {str(count): peak for count, peak in peaks.items()},
        "break_even": _break_even(rows),
        "load": load,
        "sensors": {"before": felt, "after": sensors()},
        "hardware": hardware.hardware(),
        "versions": hardware.versions(),
        "missing": missing,
    }


def _key(name: str, dtype: str) -> str:
    return f"{name} {dtype}"


def _sides(
    case: Case, wanted: dict[str, Any], dtypes: Sequence[str]
) -> tuple[dict[tuple[str, str], Side], dict[str, str]]:
    """Every candidate at every dtype that it takes, checked against float64; and why others failed."""
    problem, sides, missing = Problem.of(case.pattern, case.tokens), {}, {}
    for name, candidate in wanted.items():
        try:
            seconds = problem.prepared(candidate)
        except Exception as error:  # others' code
            missing[name] = in_one_line(error)
            continue
        own, takes = getattr(candidate, "dtype", None), _taken(candidate)
        if own and own not in DTYPES:
            missing[name] = f"its dtype is {own}: on a CPU {' and '.join(DTYPES)} are timed"
            continue
        for dtype in [own] if own else [d for d in dtypes if d in takes]:
            calls = problem.calls(candidate, dtype)
            errors, failed = problem.check(calls)
            missing |= {f"{name} {product} in {dtype}": why for product, why in failed.items()}
            wrong = tuple(product for product, error in errors.items() if not error <= TOLERANCE[dtype])
            calls = {product: call for product, call in calls.items() if product in errors and product not in wrong}
            sides[name, dtype] = Side(calls, errors, wrong, seconds)
        if not own and (without := [d for d in dtypes if d not in takes]):
            missing[f"{name} in {', '.join(without)}"] = "it takes " + " and ".join(takes)
    return sides, missing


def _timed_sides(
    sides: dict[tuple[str, str], Side], budget: Budget | int, first: str
) -> tuple[dict[tuple[str, str], list[Timed]], dict[str, str]]:
    """Times of every side, and why some have none of a product that was computed before."""
    keys, failed = {_key(*key): key for key in sides}, dict[tuple[str, str], str]()
    times = time_rounds({name: sides[key].calls for name, key in keys.items()}, budget, _key("dense", first), failed)
    missing = {}
    for (key, product), why in failed.items():
        name, dtype = keys[key]
        missing[f"{name} {product} in {dtype}"] = why
    return times, missing


def _taken(candidate: Any) -> list[str]:
    """Names of the dtypes that a candidate takes: of one, its name alone will do."""
    takes = getattr(candidate, "dtypes", DTYPES)
    return list(map(str, [takes] if isinstance(takes, str) or not isinstance(takes, Iterable) else takes))


def _rows(
    case: Case, sides: dict[tuple[str, str], Side], times: dict[tuple[str, str], list[Timed]], first: str, peak: float
) -> list[Row]:
    rows: list[Row] = []
    shape = (case.tokens, case.pattern.in_features, case.pattern.out_features)
    base = _key("dense", first)
    for (name, dtype), side in sides.items():
        about = (*shape, case.sparsity, case.mask, case.threads, dtype)
        rows += [Row(*about, product, name, correct=False, error=side.errors[product]) for product in side.wrong]
        for product in (*PRODUCTS, "layer"):
            column = times.get((_key(name, dtype), product))
            if not column or (base, product) not in times:
                continue
            row = _timed(Row(*about, product, name), case, column, times[base, product], peak)
            errors = [side.errors[p] for p in (PRODUCTS if product == "layer" else (product,)) if p in side.errors]
            row.error = max(errors, default=side.errors.get(product))
            row.prepare_seconds = side.prepare_seconds
            if product == "layer":
                gain = statistics.median(t.seconds for t in times[base, product]) - (row.seconds_median or 0)
                row.pays_after = math.ceil(side.prepare_seconds / gain) if gain > 0 else None
            rows.append(row)
    return rows


def _timed(row: Row, case: Case, column: Sequence[Timed], dense: Sequence[Timed], peak: float) -> Row:
    """A row with its figures, from its own times and those of dense."""
    bound = row.dtype == "float32"  # bf16 may have instructions of its own, or none at all
    factor = len(PRODUCTS) if row.product == "layer" else 1
    flops = 2 * case.tokens * factor
    best = min(timed.seconds for timed in dense)
    slow = [DISTURBED * timed.seconds > best for timed in dense]
    ratio, seconds = compared(dense, column, slow), [timed.seconds for timed in column]
    median = statistics.median(seconds)
    rate = flops * case.pattern.nnz / median / 1e9
    row.seconds_median, (row.seconds_low, row.seconds_high) = median, interval(seconds)
    row.ratio_to_dense, row.ratio_low, row.ratio_high, row.disturbed_rounds = ratio
    row.noisy = ratio.noisy(len(column))
    row.gflops_useful, row.peak_fraction, row.rounds = rate, rate / peak if bound else None, len(column)
    row.possible = not bound or rate <= peak
    return row


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Geometric means of the ratios by sparsity (in percent), product, candidate, dtype and threads, with the worst and
    the best."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.ratio_to_dense is not None and row.possible:
            of = (round(row.sparsity, 2), row.product, row.candidate, row.dtype, row.threads)
            groups.setdefault(of, []).append(row)
    found = []
    for (sparsity, product, candidate, dtype, threads), group in groups.items():
        ranked = sorted(group, key=lambda row: row.ratio_to_dense or 0)
        name = lambda row: row.mask or f"{row.tokens}x{row.in_features}x{row.out_features}"  # noqa: E731
        found.append(
            {
                "sparsity": sparsity, "product": product, "candidate": candidate, "dtype": dtype, "threads": threads,
                "ratio_to_dense": statistics.geometric_mean(row.ratio_to_dense or 1 for row in group),
                "count": len(group), "worst": {"mask": name(ranked[0]), "ratio_to_dense": ranked[0].ratio_to_dense},
                "best": {"mask": name(ranked[-1]), "ratio_to_dense": ranked[-1].ratio_to_dense},
            }
        )  # fmt: skip
    return found


def _break_even(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Sparsity at which the sparse kernels meet dense, linear between the measured ones; None if outside them."""
    found = []
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.candidate == "vspdf" and row.possible and row.dtype == "float32" and row.ratio_to_dense:
            of = (row.tokens, row.in_features, row.out_features, row.threads, row.product, _kind(row))
            groups.setdefault(of, []).append(row)
    for (tokens, in_features, out_features, threads, product, kind), group in groups.items():
        group.sort(key=lambda row: row.sparsity)
        at = None
        for a, b in itertools.pairwise(group):
            low, high = a.ratio_to_dense or 0, b.ratio_to_dense or 0
            if low < 1 <= high:
                at = a.sparsity + (1 - low) / (high - low) * (b.sparsity - a.sparsity)
        below = (group[0].ratio_to_dense or 0) >= 1
        found.append(
            {
                "tokens": tokens, "in_features": in_features, "out_features": out_features, "threads": threads,
                "product": product, "sparsity": at, "note": f"below {group[0].sparsity}" if below else "",
            } | ({"mask": kind} if kind is not None else {})
        )  # fmt: skip
    return found


def _kind(row: Row) -> str | None:
    """What a row's mask has in common with those of other sparsities: its name without size and sparsity."""
    if row.mask is None:
        return None
    found = re.fullmatch(r"(.+?)(?: \d+x\d+)?(?: ([\d.]+)(%?))?", row.mask)
    try:
        told = float(found[2]) / (100 if found[3] else 1) if found and found[2] else row.sparsity
    except ValueError:  # a name that ends in a version
        return row.mask
    return found[1] if found and abs(told - row.sparsity) < 0.006 else row.mask
