"""What the ranks of a run agree on: how it begins, which masks and kernels it has, and that they stay alike."""

from __future__ import annotations

import hashlib
import os

import torch
from torch import Tensor

from vspdf.config import loading
from vspdf.config.resolved import ResolvedConfig
from vspdf.errors import UserError
from vspdf.evaluate.loss import autocast
from vspdf.evaluate.loss import settle as settle_kernels
from vspdf.kernels import hardware
from vspdf.ledger import Tally
from vspdf.parallel.environment import divisors
from vspdf.parallel.world import World
from vspdf.sparsity.layer import sparse_layers
from vspdf.train.state import State
from vspdf.train.step import micro_batches

_OWN = {"data.cache_dir", "run_dir"}  # settings that may be another machine's own
_ALIKE = (
    "Processors of unlike instruction sets round an update differently: run on like ones, or set ATEN_CPU_CAPABILITY "
    "to what all have (default, avx2 or avx512) for every rank, and resume."
)


def check_shares(config: ResolvedConfig, ranks: int) -> None:
    """Whether so many processes can share every step of a run evenly.

    Raises
    ------
    UserError
        Naming those numbers that can.
    """
    for i, phase in enumerate(config.phases):
        batch, micro = phase.batch_size, config.train.micro_batch_size
        count, what = (batch // micro, "micro-batches") if micro < batch else (batch, "sequences")
        if count % ranks:
            raise UserError(
                f"{ranks} processes cannot share the {count} {what} of a step evenly (phases.{i}: batch_size = "
                f"{batch}, train.micro_batch_size = {micro}): start {divisors(count)}."
            )


def said(config: ResolvedConfig, world: World) -> list[str]:
    """How several processes do it, in words."""
    train, threads = config.train, torch.get_num_threads()
    orders = {
        "exact": "gradients are added in one order, whatever the number of processes (of as many threads)",
        "ddp": "DistributedDataParallel adds gradients in an order of its own, losses are alike to about 1e-6 only",
    }
    overruled = threads > 1 and os.environ.get("OMP_NUM_THREADS") == "1" and not train.threads
    note = " (torchrun's OMP_NUM_THREADS=1 is overruled; train.threads sets another number)" if overruled else ""
    found = [
        f"{world.size} processes share every step, {threads} thread{'s' * (threads > 1)} each{note}; "
        f"train.data_parallel = {train.data_parallel}: {orders[train.data_parallel]}"
    ]
    if any(phase.batch_size <= train.micro_batch_size for phase in config.phases):
        found.append(
            f"a step is one micro-batch (train.micro_batch_size = {train.micro_batch_size}), of which each takes its "
            "share: the last bits go by the number of processes then; set a size that all of them take alike"
        )
    return found


def beginning(state: State) -> dict[str, str]:
    """What must be alike before anything is written, by name."""
    settings = _flat(loading.to_dict(state.config))
    return {
        **{f"version of {name}": version for name, version in hardware.versions().items()},
        **{f"setting {name}": str(value) for name, value in settings.items() if name not in _OWN},
        "corpus": state.data.manifest["corpus"]["sha256"],
        "order of the data": state.data.manifest["order"],
        "number of threads (train.threads)": str(torch.get_num_threads()),
        "step to begin with": str(state.step),
    }


def _flat(body: object, prefix: str = "") -> dict[str, object]:
    items = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else None
    if items is None:
        return {prefix: body}
    return {k: v for key, item in items for k, v in _flat(item, f"{prefix}.{key}".lstrip(".")).items()}


def masks(state: State) -> dict[str, str]:
    """Digests of all masks, by name."""
    return {f"mask of '{name}'": layer.pattern.digest for name, layer in sparse_layers(state.model).items()}


def weights(state: State) -> dict[str, str]:
    """Digests of all weights, by name."""
    return {f"value in '{name}'": _digest(tensor) for name, tensor in state.model.named_parameters()}


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def require_alike(state: State) -> None:
    """Makes sure that all ranks have the same masks and weights.

    Raises
    ------
    UserError
        On every rank, naming the one that differs, and where.
    """
    state.world.same(lambda: masks(state))
    state.world.same(lambda: weights(state), _ALIKE)


def settle(state: State) -> None:
    """After the model has changed form: all have the same, rank 0's choices of kernels hold, and it is wrapped anew."""
    if state.world.size == 1:
        return
    require_alike(state)
    if sparse_layers(state.model):
        settle_kernels(state.world, lambda: _try(state))
    state.net = None  # the old one goes before the new one comes
    state.net = state.wrapped(state.model)


def _try(state: State) -> None:
    """One micro-batch forward and backward, for nothing but the choices that it makes."""
    (x, y), *_ = micro_batches(state.batch(state.place), state.config.train.micro_batch_size, state.world.size)
    with autocast(state.config.train.precision, state.device):
        loss = state.model(x.to(state.device), y.to(state.device))
    loss.backward()
    state.model.zero_grad(set_to_none=True)
    for tensor in gradients.parameters if (gradients := state.phases.dense_gradients) else ():
        tensor.grad = None


def add_up(world: World, tally: Tally, cpu_seconds: float) -> float:
    """Makes a tally that of all ranks, and returns the CPU seconds of all."""
    if world.size == 1:
        return cpu_seconds
    names = sorted(tally.products)
    counts = [tally.products[name] for name in names]
    mine = [round(cpu_seconds * 1e9)]
    mine += [n for count in counts for n in (count.dense, count.useful, count.executed, round(count.seconds * 1e9))]
    total, *sums = (sum(column) for column in zip(*world.gather(mine), strict=True))
    for i, count in enumerate(counts):
        count.dense, count.useful, count.executed = (int(n) for n in sums[4 * i : 4 * i + 3])
        count.seconds = sums[4 * i + 3] / 1e9
    return total / 1e9
