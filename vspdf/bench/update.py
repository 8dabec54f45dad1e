"""What it costs to move masks: an update of one layer, with its plans, beside a training step of that layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from vspdf.bench.problem import check_memory
from vspdf.bench.rounds import Timed, held_up, interval, on_threads, others_at_work
from vspdf.errors import require
from vspdf.kernels import cpu, hardware
from vspdf.sparsity.evolve import evolve
from vspdf.sparsity.layer import SparseLinear
from vspdf.sparsity.surgery import sparsify


def bench_update(
    tokens: int,
    in_features: int,
    out_features: int,
    sparsities: Sequence[float],
    drop_fraction: float = 0.3,
    threads: int | None = None,
    rounds: int = 9,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Times steps and updates of one sparse layer, interleaved: all products and AdamW against `vspdf.evolve`
    with the plans of the new mask.

    Returns
    -------
    dict
        `rows` with `step_seconds`, `update_seconds`, of these `plan_seconds`, and `share_of_step`, the median of the
        rounds' ratios, with its 95 % interval from `share_low` to `share_high`; `hardware`, `versions`, `load`.

    Raises
    ------
    UserError
        If a sparsity is not between 0 and 1.
    """
    for sparsity in sparsities:
        require(0 < sparsity < 1, f"`sparsity` {sparsity:g}: expected more than 0 and less than 1: else no mask moves.")
    data = tokens * in_features + tokens * out_features
    check_memory(f"`shape` {tokens}x{in_features}x{out_features}", 4 * (data + in_features * out_features))
    load, rows = others_at_work(), []
    with on_threads(threads) as used:
        for sparsity in sparsities:
            progress(f"{in_features} x {out_features} at {sparsity:g}")
            found = _rounds(tokens, in_features, out_features, sparsity, drop_fraction, rounds)
            ratios = [(moved.seconds + built.seconds) / step.seconds for step, moved, built in found]
            low, high = interval(ratios)
            rows.append({
                "tokens": tokens, "in_features": in_features, "out_features": out_features, "sparsity": sparsity,
                "drop_fraction": drop_fraction, "threads": used,
                "step_seconds": median(step.seconds for step, _, _ in found),
                "update_seconds": median(moved.seconds + built.seconds for _, moved, built in found),
                "plan_seconds": median(built.seconds for _, _, built in found),
                "share_of_step": median(ratios), "share_low": low, "share_high": high,
            })  # fmt: skip
    return {"rows": rows, "hardware": hardware.hardware(), "versions": hardware.versions(), "load": load}


def _rounds(
    tokens: int, in_features: int, out_features: int, sparsity: float, fraction: float, rounds: int
) -> list[tuple[Timed, Timed, Timed]]:
    """A step, a move of the mask, and the making of plans, of each round that others left alone, or of all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(in_features, out_features))
    sparsify(model, sparsity, backend="cpu")
    layer = model[0]
    assert isinstance(layer, SparseLinear)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    x, gradient = torch.randn(tokens, in_features, requires_grad=True), torch.randn(tokens, out_features)

    def step() -> None:
        layer(x).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    found = []
    for i in range(rounds + 1):
        with torch.no_grad():  # spread as by training: Adam's first steps make what grew last all of one size
            layer.values.normal_(std=in_features**-0.5)
        step()  # what a new plan does not have yet, and memory
        whole = Timed.of(step)
        moved = Timed.of(partial(evolve, model, optimizer, fraction, seed=i))
        timed = (whole, moved, Timed.of(lambda: cpu.prepare([layer.pattern])))
        if i:  # round 0 warms up
            found.append(timed)
    steps = [timed[0] for timed in found]
    good = [timed for timed, bad in zip(found, held_up(steps), strict=True) if not bad]
    return good if 2 * len(good) >= len(found) else found
