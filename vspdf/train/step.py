"""One optimizer step: what is done follows from what is handed over, a sparse run and its dense twin share it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vspdf import shapes
from vspdf.config.resolved import ResolvedOptimizer, ResolvedPhase, ResolvedTrain
from vspdf.evaluate.loss import autocast
from vspdf.ledger import Count
from vspdf.sparsity.layer import sparse_layers


def adamw(model: nn.Module, settings: ResolvedOptimizer, phase: ResolvedPhase) -> torch.optim.AdamW:
    """AdamW over matrices and sparse values with weight decay, the rest without; fused where torch has it."""
    sparse = {layer.values: 1 / layer.pattern.density for layer in sparse_layers(model).values() if layer.pattern.nnz}
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for parameter in model.parameters():
        decay = phase.weight_decay if parameter.dim() == 2 or parameter in sparse else 0.0
        scale = sparse.get(parameter, 1.0) if phase.s_mu_par else 1.0
        groups.setdefault((decay, scale), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": decay, "lr_scale": scale} for (decay, scale), p in groups.items()],
        lr=0.0, betas=(settings.beta1, phase.beta2), eps=settings.eps, fused=True,
    )  # fmt: skip


def optimise(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    lr: float,
    train: ResolvedTrain,
    clip: float,
    take: Callable[[torch.optim.Optimizer], object] = lambda optimizer: optimizer.step(),
) -> tuple[float, float]:
    """Takes one optimizer step, unless loss or gradient is not finite: then the weights stay as they are.

    Parameters
    ----------
    model : nn.Module
        ``model(inputs, targets)`` gives the mean cross-entropy in nats per token.
    optimizer : torch.optim.Optimizer
        As `adamw` makes it.
    batch : (Tensor, Tensor)
        Inputs and targets [sequences, tokens] of a whole step; taken ``train.micro_batch_size`` sequences at a time.
    lr : float
    train : ResolvedTrain
    clip : float
        Largest global norm of the gradient; 0: any.
    take : callable
        Takes the step with the gradients at hand, e.g. `vspdf.Phases.step`.

    Returns
    -------
    (float, float)
        Loss in nats per token, and the gradient's norm before clipping, NaN where the loss is not finite.
    """
    inputs, targets = batch
    device = next(model.parameters()).device
    all_targets, loss, norm = int((targets >= 0).sum()), 0.0, math.nan
    for x, y in zip(inputs.split(train.micro_batch_size), targets.split(train.micro_batch_size), strict=True):
        share = int((y >= 0).sum()) / all_targets
        with autocast(train.precision, device):
            part = model(x.to(device), y.to(device)) * share
        part.backward()
        loss += float(part.detach())
    if math.isfinite(loss):
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        take(optimizer)
    optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # so that a step's seconds hold all of it
    return loss, norm


def dense_counts(model: nn.Module, shape: shapes.Shape, tokens: int) -> dict[str, Count]:
    """What torch itself multiplies in a step, forward and backward: nothing is skipped there, the columns agree."""
    linear = sum(m.weight.numel() for name, m in model.named_modules() if type(m) is nn.Linear and name != "lm_head")
    macs = {"dense_linear": linear, "attention": shape.attention, "vocabulary": shape.vocabulary}
    flops = {name: 6 * tokens * n for name, n in macs.items() if n}
    return {name: Count(n, n, n) for name, n in flops.items()}
