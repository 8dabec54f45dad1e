"""Held-out loss and bits per byte."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import nn

from vspdf import gemm
from vspdf.data.samples import ValidationBatch
from vspdf.kernels import tuning
from vspdf.kernels.hardware import slow_bf16
from vspdf.parallel.world import ALONE, World
from vspdf.sparsity.layer import sparse_layers


class Evaluation(NamedTuple):
    """Mean loss of a model over held-out text."""

    loss: float  # nats per token
    bits_per_byte: float  # of the text itself, so that tokenizers compare


class HeldOut(Protocol):
    """Data that a model can be evaluated on: batches of held-out text, always the same."""

    def validation_batches(self, batch_size: int, max_tokens: int = 0) -> Iterator[ValidationBatch]: ...


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Context of a configured `train.precision`; of fp32 too where the device has bf16 by name only."""
    bf16 = precision == "bf16" and not slow_bf16(device)
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def settle(world: World, run: Callable[[], object]) -> None:
    """Lets rank 0 choose kernels in something that it runs first; its choices hold on all ranks from then on."""
    if world.size > 1:
        if world.first:
            run()
        tuning.pin(world.from_first(tuning.choices()))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: HeldOut,
    batch_size: int,
    max_tokens: int = 0,
    precision: str = "fp32",
    world: World = ALONE,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Mean loss of a model over the held-out documents, the same ones at every call.

    Parameters
    ----------
    model : nn.Module
        ``model(tokens, targets)`` gives the mean cross-entropy in nats per token.
    data : Dataset, Text or Pairs
    batch_size : int
        Sequences at a time.
    max_tokens : int
        Stop after about this many; 0: all.
    precision : {"fp32", "bf16"}
        bf16 runs in fp32 on processors that would take 10 to 100 times as long.
    world : World
        Who shares the batches; their sums are added in the order of the text, so that the result has the same bits.
    progress : callable
        Called with the number of tokens done.
    """
    training = model.training
    model.eval()
    parts, done, usual = dict[int, tuple[float, int, int]](), 0, None
    chosen = bool(sparse_layers(model))  # kernels are, by shape and by rank 0
    where = next(model.parameters()).device
    with gemm.faster(), autocast(precision, where):
        for number, (inputs, targets, size) in enumerate(data.validation_batches(batch_size, max_tokens)):
            usual = inputs.shape if usual is None else usual
            count = int((targets >= 0).sum())  # below: no target
            if world.rank == (0 if chosen and inputs.shape != usual else number % world.size):
                parts[number] = (float(model(inputs.to(where), targets.to(where))) * count, count, size)
            done += count
            progress(done)
    nats = tokens = text_bytes = 0.0
    for _, part in sorted(item for mine in world.gather_things(parts) for item in mine.items()):
        nats, tokens, text_bytes = nats + part[0], tokens + part[1], text_bytes + part[2]
    model.train(training)
    return Evaluation(nats / tokens, nats / math.log(2) / text_bytes)
