"""A whole training step, sparse beside the same model dense, in float32, under bf16 autocast and compiled."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vspdf import gemm
from vspdf.attention import plain
from vspdf.bench.problem import check_dtypes, check_memory
from vspdf.bench.rounds import (
    Budget,
    Timed,
    compared,
    ideal,
    interval,
    on_threads,
    others_at_work,
    sensors,
    time_rounds,
)
from vspdf.errors import in_one_line
from vspdf.kernels import cpu, hardware
from vspdf.model import GPT, MLP, Attention
from vspdf.shapes import STATE_BYTES, Shape


class Side(NamedTuple):
    """A model and how its step is taken."""

    sparsity: float
    attention: str = "torch"  # or "own": `vspdf.attention`, `vspdf.activation`, and `vspdf.gemm` for dense products
    dtype: str = "float32"  # "bfloat16": under autocast
    compiled: bool = False  # by torch.compile


BASE = Side(0.0)
BUDGET = Budget(seconds=120)


def bench_step(
    n_layer: int = 12,
    d_model: int = 768,
    n_head: int = 12,
    sequence_length: int = 512,
    batch_size: int = 4,
    sparsities: Sequence[float] = (0.75, 0.9),
    threads: int | None = None,
    budget: Budget | int = BUDGET,
    dtypes: Sequence[str] = ("float32",),
    compiled: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Times whole training steps (forward, backward, clipping, AdamW) of sparse models beside the same dense model.

    The dense side is plain PyTorch: nn.Linear, scaled_dot_product_attention, GELU, fused AdamW. A second dense model is
    as `vspdf train` trains it: attention that skips more than torch's (`vspdf.attention`), GELU in one pass
    (`vspdf.activation`), dense products by the library that knows the processor (`vspdf.gemm`). Vocabulary: bytes.

    Parameters
    ----------
    budget : Budget, or int for so many rounds
    dtypes : sequence of {"float32", "bfloat16"}
        Each model is timed in each of them; float32 dense is the base of every ratio and always timed.
    compiled : bool
        Time the dense model under torch.compile too, in each dtype.

    Returns
    -------
    dict
        ``rows`` with ``sparsity``, ``attention`` ("torch" or "own"), ``dense_products`` (by "MKL" or "oneDNN"),
        ``dtype``, ``compiled``, ``prepare_seconds`` (the first step: plans, tuning, compilation), ``seconds_median``
        and its interval, ``ratio_to_dense`` (plain PyTorch in float32), whether it is ``possible``, memory of the
        training state; ``scratch_bytes`` that the sparse kernels keep for their next calls, of all models together;
        ``load``, ``sensors``, ``hardware``, ``versions``, ``missing`` sides with the reason.
    """
    from vspdf.sparsity.layer import training_state_bytes

    check_dtypes(dtypes)
    shape = Shape(n_layer, d_model, n_head, 4 * d_model, 257, sequence_length)
    logits = 4 * batch_size * sequence_length * shape.vocab_size
    check_memory("such a model and batch", STATE_BYTES * shape.parameters + logits)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(257, (batch_size, sequence_length + 1), generator=generator)
    sides = _sides(sparsities, dtypes, compiled)
    load, felt, missing = others_at_work(), sensors(), {}
    steps: dict[Side, Callable[[], None]] = {}
    first: dict[Side, float] = {}
    with on_threads(threads) as used:
        models = {(side.sparsity, side.attention): _model(shape, side) for side in sides}
        optimizers = {key: _optimizer(model) for key, model in models.items()}
        for side in sides:
            key = (side.sparsity, side.attention)
            step = _training_step(models[key], optimizers[key], tokens, side)
            progress(f"first step: {_name(side)}")
            start = time.perf_counter()
            try:
                step()
            except Exception as error:  # a compiler that is not there says so in many ways
                missing[_name(side)] = in_one_line(error)
                continue
            steps[side], first[side] = step, time.perf_counter() - start
        progress("rounds")
        times = time_rounds({_name(side): {"layer": step} for side, step in steps.items()}, budget, _name(BASE))
        memory = {key: training_state_bytes(model) if key[0] else None for key, model in models.items()}
    columns = {side: times[_name(side), "layer"] for side in steps}
    rows = [
        {**side._asdict(), "dense_products": _library(side), "threads": used, "prepare_seconds": first[side]}
        | _figures(side, columns, column)
        | {"memory": memory[side.sparsity, side.attention]}
        for side, column in columns.items()
    ]
    return {
        "model": {**asdict(shape), "batch_size": batch_size, "parameters": shape.parameters},
        "rows": rows, "scratch_bytes": cpu.extension().scratch_nbytes(), "load": load,
        "sensors": {"before": felt, "after": sensors()},
        "hardware": hardware.hardware(), "versions": hardware.versions(), "missing": missing,
    }  # fmt: skip


def _sides(sparsities: Sequence[float], dtypes: Sequence[str], compiled: bool) -> list[Side]:
    amounts = dict.fromkeys((0.0, *sparsities))  # one that is given twice is timed once
    own = [Side(s, "own") for s in amounts]
    narrow = [Side(0.0, dtype="bfloat16"), *(Side(s, "own", "bfloat16") for s in amounts)]
    sides = [BASE, *(own if "float32" in dtypes else []), *(narrow if "bfloat16" in dtypes else [])]
    return sides + [Side(0.0, dtype=dtype, compiled=True) for dtype in dtypes if compiled]


def _library(side: Side) -> str:
    return gemm.library() if side.attention == "own" else "MKL"


def _name(side: Side) -> str:
    what = f"{side.sparsity:g} sparse" if side.sparsity else "dense"
    own = ", as vspdf trains it" if side.attention == "own" and not side.sparsity else ""
    return f"{what}{own}, {side.dtype}{', compiled' * side.compiled}"


def _figures(side: Side, columns: dict[Side, list[Timed]], column: Sequence[Timed]) -> dict[str, Any]:
    """Seconds and speed-up of one side; possible is what sparsity allows against a dense model with its attention."""
    seconds = [timed.seconds for timed in column]
    low, high = interval(seconds)
    ratio = compared(columns[BASE], column)
    alike = columns.get(Side(0.0, side.attention), [])[: len(column)]
    plain_side = side.dtype == "float32" and not side.compiled and alike
    return {
        "seconds_median": statistics.median(seconds), "seconds_low": low, "seconds_high": high,
        "ratio_to_dense": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high,
        "noisy": ratio.noisy(len(column)),
        "possible": not plain_side or compared(alike, column[: len(alike)]).median <= ideal(side.sparsity),
        "rounds": len(column), "disturbed_rounds": ratio.disturbed,
    }  # fmt: skip


def _model(shape: Shape, side: Side) -> GPT:
    from vspdf.sparsity.surgery import sparsify

    model = GPT(shape)
    if side.attention == "torch":
        for module in model.modules():
            if isinstance(module, Attention):
                module.attend = plain
            elif isinstance(module, MLP):
                module.activation = F.gelu
    if side.sparsity:
        sparsify(model, side.sparsity)
    return model


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def _training_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, side: Side
) -> Callable[[], None]:
    called: Callable[..., Tensor] = torch.compile(model) if side.compiled else model
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        with gemm.faster() if side.attention == "own" else nullcontext():
            with torch.autocast("cpu", torch.bfloat16) if side.dtype == "bfloat16" else nullcontext():
                loss = called(inputs, targets)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
