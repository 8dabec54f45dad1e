"""One optimizer step: what is done follows from what is handed over, a sparse run and its dense twin share it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vspdf import gemm, shapes
from vspdf.config.resolved import ResolvedOptimizer, ResolvedPhase, ResolvedTrain
from vspdf.evaluate.loss import autocast
from vspdf.ledger import Count
from vspdf.parallel.tree import accumulate, spans, taken
from vspdf.parallel.world import ALONE, World
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
    world: World = ALONE,
    beside: Sequence[Tensor] = (),
) -> tuple[float, float]:
    """Takes one optimizer step, unless loss or gradient is not finite: then the weights stay as they are.

    Parameters
    ----------
    model : nn.Module
        ``model(inputs, targets)`` gives the mean cross-entropy in nats per token.
    optimizer : torch.optim.Optimizer
        As `adamw` makes it.
    batch : (Tensor, Tensor)
        Inputs and targets [sequences, tokens] of a whole step; taken ``train.micro_batch_size`` sequences at a time,
        of which each rank of a `world` takes its share.
    lr : float
    train : ResolvedTrain
    clip : float
        Largest global norm of the gradient; 0: any.
    take : callable
        Takes the step with the gradients at hand, e.g. `vspdf.Phases.step`.
    world : World
        Who takes the step together. A `model` that it has wrapped sums gradients over ranks by itself.
    beside : sequence of Tensor
        What else gathers a gradient in the backward passes, in its ``.grad``, to be summed over ranks.

    Returns
    -------
    (float, float)
        Loss in nats per token, and the gradient's norm before clipping, NaN where the loss is not finite.
    """
    device = next(model.parameters()).device
    # Counted before they go over, and read after the last of them: in between nothing waits for a device.
    targets = [int((y >= 0).sum()) for _, y in micro_batches(batch, train.micro_batch_size, world.size)]
    micro = micro_batches((batch[0].to(device), batch[1].to(device)), train.micro_batch_size, world.size)
    mine, losses = world.share(len(micro)), list[Tensor]()

    def backward(number: int) -> None:
        x, y = micro[number]
        with gemm.faster():
            with autocast(train.precision, device):
                part = model(x, y) * (targets[number] / sum(targets))
            part.backward()
        losses.append(part.detach())

    parameters = [*(parameter for parameter in model.parameters() if parameter.requires_grad), *beside]
    parts: dict[tuple[int, int], list[Tensor | None]] = {}
    if world.wraps(model):
        for number in mine[:-1]:
            with world.accumulating(model):
                backward(number)
        with world.watched():
            backward(mine[-1])
    else:
        for node in spans((0, len(micro)), mine):
            accumulate(node, backward, parameters)
            parts[node] = [parameter.grad for parameter in parameters] if node[1] == mine.stop else taken(parameters)
    loss, norm = 0.0, math.nan
    for part in (part for row in world.gather(torch.stack(losses).tolist() if losses else []) for part in row):
        loss += part
    if math.isfinite(loss):
        world.sum(parameters, len(micro), parts)
        if world.wraps(model) and beside:
            world.sum(beside, world.size, {(world.rank, world.rank + 1): [tensor.grad for tensor in beside]})
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        take(optimizer)
    optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # so that a step's seconds hold all of it
    return loss, norm


def micro_batches(batch: tuple[Tensor, Tensor], size: int, ranks: int = 1) -> list[tuple[Tensor, Tensor]]:
    """What a step takes at a time, of all ranks: `size` sequences, and where that is all of it, a rank's even share."""
    inputs, targets = batch
    size = size if size < len(inputs) else len(inputs) // ranks
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def dense_counts(model: nn.Module, shape: shapes.Shape, tokens: int) -> dict[str, Count]:
    """What torch itself multiplies in a step, forward and backward: nothing is skipped there, the columns agree."""
    linear = sum(m.weight.numel() for name, m in model.named_modules() if type(m) is nn.Linear and name != "lm_head")
    macs = {"dense_linear": linear, "attention": shape.attention, "vocabulary": shape.vocabulary}
    flops = {name: 6 * tokens * n for name, n in macs.items() if n}
    return {name: Count(n, n, n) for name, n in flops.items()}
