"""One change of a phase's masks, by its algorithm: which weights go, which come, and the model with them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vspdf.pattern import Pattern, kept_count
from vspdf.sparsity.amounts import Amounts, only_added
from vspdf.sparsity.evolve import layer_number, remask, renewed
from vspdf.sparsity.kinds import sides
from vspdf.sparsity.layer import SparseLinear, sparse_layers, whole_layers
from vspdf.sparsity.scores import DenseGradients
from vspdf.sparsity.surgery import densify, set_sparsity, sparsify
from vspdf.sparsity.timeline import Stretch

log = logging.getLogger("vspdf")


def move(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    phase: Amounts,
    amounts: Mapping[str, float],
    step: int,
    seeds: tuple[int, int],
    gradients: DenseGradients | None,
    options: Mapping[str, Any],
) -> dict[str, Pattern]:
    """Moves masks in place, before a step of a phase; at its first they only go to the sparsities they are to have.

    Parameters
    ----------
    amounts : mapping of str to float
        Sparsity of each layer from here on; layers that are dense still become sparse.
    step : int
        Of the phase.
    seeds : (int, int)
        Of the run, and of this update.
    gradients : DenseGradients, optional
        What RigL has seen.
    options : mapping
        Of `sparsify`, for layers that become sparse.

    Returns
    -------
    dict of str to Pattern
        The patterns before.
    """
    if not any(amounts.values()):
        return densify(model, optimizer)
    layers = whole_layers(model, "values")
    whole = {n: _whole(model.get_submodule(n)) for n, amount in amounts.items() if amount and n not in layers}
    if whole:
        how = {option: options[option] for option in ("backend", "memory") if option in options}
        sparsify(model, whole, optimizer=optimizer, **how)
    scores = _scores(phase, gradients, step)
    moved = {}
    for name, layer in sparse_layers(model).items():
        if name not in amounts or not layer.values.requires_grad:
            continue
        if scores is not None and name not in scores:
            log.warning("RigL: no gradient reached '%s' (is it compiled?): its mask stays as it is.", name)
            continue
        if scores is not None and not bool(scores[name].isfinite().all()):  # an overflow, or one bad batch
            log.warning("RigL: the gradient of '%s' is not finite: its mask stays as it is.", name)
            continue
        keep, target = _counts(phase, layer, amounts[name], step)
        random = np.random.default_rng([*seeds, layer_number(name)])
        moved[name] = renewed(
            layer, keep, target, random, scores[name] if scores else None, phase.random_share or 0.0,
            anywhere=phase.rules == "cstorch",
        )  # fmt: skip
    return remask(model, moved, optimizer, "Phases", often=True)


def grow(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, phase: Amounts, stretch: Stretch, seed: int
) -> dict[str, Pattern]:
    """Adds positions until the model has the sparsities of a stretch of a static phase; returns the patterns before."""
    layers = sparse_layers(model)
    amounts = phase.of_layers(layers, stretch.sparsity)
    if not any(amounts.values()):
        return densify(model, optimizer)
    wanted = {}
    for name, amount in amounts.items():  # one weight more or less is a matter of how kept ones are counted
        pattern = layers[name].pattern
        missing = kept_count(pattern.numel, amount) - pattern.nnz
        now = f"phase '{phase.name}': layer '{name}' has sparsity {pattern.sparsity:.4g}"
        only_added(missing >= -1, f"{now} and would go to {amount:.4g}")
        if missing > 1:
            wanted[name] = amount
    seed += stretch.phase + 1_000_003 * stretch.stage
    return set_sparsity(model, wanted, optimizer, seed=seed) if wanted else {}


def _whole(layer: nn.Module) -> Pattern:
    """The full pattern of a layer that is dense still."""
    return Pattern.random(sides(layer), 0.0)


def _scores(phase: Amounts, gradients: DenseGradients | None, step: int) -> dict[str, Tensor] | None:
    """Of masked positions, where RigL grows; None where it does not, or only goes to another sparsity."""
    if phase.algorithm != "rigl" or not step:
        return None
    if gradients is None:
        log.warning("RigL has seen no gradients for this update (Phases.step was not called?): it grows at random.")
        return None
    return gradients.scores(normalised=phase.rules == "vspdf")


def _counts(phase: Amounts, layer: SparseLinear, amount: float, step: int) -> tuple[int, int]:
    """How many of a layer's weights are kept, and how many it is to have."""
    numel, nnz = layer.pattern.numel, layer.pattern.nnz
    target = kept_count(numel, amount, truncate=phase.count == "truncate")
    fraction = phase.dropped(step) if step else 0.0
    if phase.rules == "cstorch" and phase.algorithm != "gmp" and step:
        keep = min(nnz, int((1 - fraction) * nnz))
        return keep, max(keep, target)
    keep = min(nnz, target)
    return keep - int(fraction * keep), target
