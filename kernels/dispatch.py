"""Which path runs a product, and why: a sparse kernel, or dense GEMM on materialised weights.

On the CPU `auto` times both paths once per product, shape, density and thread count, on the data at hand, and keeps the
least times in the user's cache (`tuning.json`). A machine may have been busy then: where the paths lie close or the
times were noisy, the next processes measure again, three in all. On a GPU it never times by itself: it believes what
`vspdf bench linear --device cuda --tune` left in that cache, then the table that ships (`gpu_tuning.json`), then a
conservative model, and takes dense where none of them speaks for a sparse path. Within a process a choice never
changes, and a run stores its choices and resumes with them (`choices`, `pin`), so that it stays equal to the last bit.
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vspdf.errors import UserError, did_you_mean
from vspdf.kernels import cpu, tuning
from vspdf.kernels.gpu import costs, launch, two_four
from vspdf.kernels.tuning import Choice, Timing
from vspdf.pattern import Pattern

log = logging.getLogger("vspdf")

BACKENDS = ("auto", "cpu", "reference", "triton")
ROUNDS = 3  # at least; more while a choice is open and BUDGET lasts
BUDGET = 0.1  # seconds
LOST = 4  # times as long in the first round: not timed again
SMALL = 1 << 21  # multiply-adds: below it a call costs microseconds either way and timing would decide by noise


def choose(
    product: str,
    pattern: Pattern,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str = "auto",
    tune: Callable[[str], Any] | None = None,
    wide: bool = False,
) -> Choice:
    """Path for one product ("forward", "grad_input" or "grad_values") of `tokens` rows.

    Parameters
    ----------
    tune : callable, optional
        Runs the product on the path it is given ("cpu" or "dense"); used where no timing is known.
    wide : bool
        Values are float32 beside tokens of a narrower `dtype`.

    Raises
    ------
    UserError
        If `backend` is unknown, or the named one takes neither the dtype nor the device.
    BackendUnavailable
        If the named backend cannot run here.
    """
    if tune is None:
        return _choose(product, pattern, tokens, dtype, device, backend, tune, wide)
    made = tuning.MADE.setdefault(pattern, {})
    known: tuple[Any, ...]
    if device.type == "cpu":
        bucket = tuning.bucket(tokens) if tokens * pattern.numel >= SMALL else 0
        known = (product, bucket, dtype, wide, backend, torch.get_num_threads())
    else:
        known = (product, tuning.bucket(tokens), dtype, backend, device, dtype == torch.float32 and launch.tf32())
    choice = made.get(known)
    if choice is None:
        choice = made[known] = _choose(product, pattern, tokens, dtype, device, backend, tune, wide)
    return choice


def set_memory(pattern: Pattern, memory: str) -> None:
    """Builds the pattern's plan for the CPU anew, at its next use, if it was for another choice of `cpu.MEMORY`.

    Raises
    ------
    UserError
        If there is no such choice.
    """
    if memory not in cpu.MEMORY:
        raise UserError(f"unknown memory '{memory}'.{did_you_mean(memory, cpu.MEMORY)}")
    if memory != cpu.memory(pattern):
        pattern.packed["memory"] = memory
        pattern.packed.pop("cpu", None)
        tuning.MADE.pop(pattern, None)


def _choose(
    product: str,
    pattern: Pattern,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    tune: Callable[[str], Any] | None,
    wide: bool,
) -> Choice:
    if backend not in BACKENDS:
        raise UserError(f"unknown backend '{backend}'.{did_you_mean(backend, BACKENDS)}")
    if backend == "reference":
        return Choice("reference", "asked for")
    if backend == "triton":
        launch.kernels()
        if refusal := launch.refusal(dtype, device):
            raise UserError(f"backend 'triton' cannot run: {refusal}.")
        return Choice("triton", "asked for")
    if backend == "auto" and device.type == "cuda":
        return _choose_gpu(product, pattern, tokens, dtype, device)
    refusal = (
        f"no kernel for device '{device.type}'" if device.type != "cpu"
        else f"no kernel for {dtype} (float32 and bfloat16 have one)" if dtype not in cpu.DTYPES
        else None
    )  # fmt: skip
    if backend == "cpu":
        if refusal:
            raise UserError(f"backend 'cpu' cannot run: {refusal}.")
        cpu.extension()
        return Choice("cpu", "asked for")
    if refusal:
        return Choice("dense", refusal)
    missing = cpu.unavailable()
    if missing:
        warnings.warn(f"vspdf: sparse products run dense: {missing}.", stacklevel=2)
        return Choice("dense", missing)
    if tokens * pattern.numel < SMALL:
        return Choice("cpu", "too small for the choice to matter")
    key = tuning.cpu_key(product, pattern, tokens, dtype, wide)
    if tune is None:
        timing = tuning.CPU.known(key)
        return timing.choice() if timing else Choice("cpu", "not measured yet: the first call will time both paths")
    with tuning.CPU.lock:  # the other threads wait: two measurements at once would disturb each other
        timing = tuning.CPU.known(key)
        if timing is None or (key not in tuning.CPU.used and not timing.settled()):
            found = _measure(tune)
            tuning.CPU.add(key, timing.merge(found) if timing else found)
        return tuning.CPU.find(key).choice()


def _measure(run: Callable[[str], Any]) -> Timing:
    """Both paths in turn, after a warm-up that builds plans; one that has lost by far is not timed again."""
    seconds: dict[str, list[float]] = {"cpu": [], "dense": []}
    for path in seconds:
        run(path)
    going = list(seconds)
    stop = time.perf_counter() + BUDGET
    while True:
        for path in going:
            start = time.perf_counter()
            run(path)
            seconds[path].append(time.perf_counter() - start)
        least = min(min(column) for column in seconds.values())
        going = [path for path in going if min(seconds[path]) <= LOST * least]
        if all(len(seconds[path]) >= ROUNDS for path in going):
            noise = max(statistics.median(seconds[path]) / min(seconds[path]) for path in going)
            timing = Timing(min(seconds["cpu"]), min(seconds["dense"]), noise)
            if timing.settled() or time.perf_counter() > stop:
                return timing


def _choose_gpu(product: str, pattern: Pattern, tokens: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """User cache, shipped table, conservative model, dense; each choice is logged once."""
    refusal = launch.unavailable() or launch.refusal(dtype, device)
    if refusal:
        return _logged(f"{product} {dtype}", Choice("dense", refusal))
    key, precision = tuning.gpu_key(product, pattern, tokens, dtype), launch.precision(dtype)
    without = ["2:4"] if two_four.unavailable(pattern, precision, device) else []
    if (found := tuning.find_gpu(device, key)) is not None:
        timing, source = found
        return _logged(key, timing.choice(source, without))
    return _logged(key, _modelled(product, pattern, tokens, precision, launch.device_name(device), without))


def _modelled(product: str, pattern: Pattern, tokens: int, precision: str, name: str, without: Sequence[str]) -> Choice:
    model = costs.find(name)
    if model is None:
        return Choice("dense", f"not tuned, and '{name}' has no model: vspdf bench linear --device cuda --tune")
    seconds = costs.predict(model, product, pattern.shape, pattern.nnz, tokens, precision)
    seconds = {path: spent for path, spent in seconds.items() if path not in without}
    told = ", ".join(f"{p} {seconds['dense'] / s:.2f}x" for p, s in seconds.items() if p != "dense")
    if precision != "fp32" and pattern.sparsity < model.gather_from:
        seconds.pop("triton")
    path = min(seconds, key=lambda path: seconds[path])
    if seconds["dense"] / seconds[path] < costs.GAIN:
        path = "dense"
    bound = f" and, for triton, {model.gather_from:.1%} sparsity" if precision != "fp32" and model.gather_from else ""
    return Choice(path, f"modelled, not measured: {told} against dense (sparse from {costs.GAIN}x{bound})")


_told: set[str] = set()


def _logged(key: str, choice: Choice) -> Choice:
    if key not in _told:
        _told.add(key)
        log.info("%s: %s: %s", key, choice.path, choice.reason)
    return choice
