"""`World` of several processes, over torch.distributed: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vspdf.errors import BackendUnavailable, Interrupted, RankLost, UserError, first_line
from vspdf.parallel import traffic
from vspdf.parallel.meeting import Member, Roll, meet
from vspdf.parallel.tree import Span, add, spans
from vspdf.parallel.world import COMMUNICATION, World, leave_it_to_the_first

T = TypeVar("T")
# In errors of torch's, gloo's and NCCL's that are about the others and not about what was sent.
_BROKEN = re.compile("(?i)Dist(Backend|Network|Store)Error|gloo|nccl|connection|timed? ?out|broken pipe|reset by peer")
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
PATIENCE = timedelta(minutes=30)  # for what takes long on one rank alone: tokens, checkpoints, reports


def join() -> Group:
    """The world that the environment tells of.

    Raises
    ------
    UserError
        If torch cannot, or not all come.
    """
    if not dist.is_available():
        raise UserError("WORLD_SIZE is above 1, but this torch was built without torch.distributed.")
    if dist.is_initialized():  # by Ray Train, Accelerate, or a loop of the user's own
        return Group(store=dist.distributed_c10d._get_default_store(), owned=False)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = meet(rank, size, PATIENCE)
    try:
        dist.init_process_group(store=store, rank=rank, world_size=size, timeout=PATIENCE)
        return Group(store=store, owned=True)
    except RuntimeError as error:
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"rank {rank} on {socket.gethostname()} cannot reach the others: {reason}. On several "
            "machines, GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) names the network's interface."
        ) from None


class Group(World):
    """See `World`.

    Parameters
    ----------
    store : torch.distributed.Store
        Where ranks leave word for each other.
    owned : bool
        Whether the group is to be left at the end.
    """

    def __init__(self, store: Any, owned: bool) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._owned, self._within = owned, PATIENCE
        self._sent, self._under_way = 0, list[tuple[float, float]]()  # bytes; from when to when
        self._group: Any = None  # of those exchanges that are not waited for long; None: the default group
        members: list[Any] = [None] * self.size
        dist.all_gather_object(members, Member.here())
        self._roll = Roll(store, self.rank, members)

    def __exit__(self, *how: object) -> None:
        error = how[1]
        if isinstance(error, (UserError, Interrupted)) and not (
            isinstance(error, RankLost) or self.first or error.told
        ):
            leave_it_to_the_first(error)
        if self._owned and not isinstance(error, RankLost):
            dist.destroy_process_group()

    @property
    def threads(self) -> int | None:
        return self._roll.threads

    @property
    def local_rank(self) -> int:
        return self._roll.local_rank

    def within(self, seconds: float) -> None:
        self._within = timedelta(seconds=seconds)
        with self._watched():
            self._group = dist.new_group(timeout=self._within)

    @contextmanager
    def _watched(self, patient: bool = False) -> Iterator[None]:
        """What breaks in an exchange is a rank that is gone or silent."""
        try:
            yield
        except RuntimeError as error:
            if not _BROKEN.search(f"{type(error).__name__}: {error}"):
                raise
            patience = (PATIENCE if patient else self._within).total_seconds()
            told = f"{patience:g} s" if patient else f"{patience:g} s (train.timeout)"
            raise RankLost(self._roll.call(first_line(error).rstrip("."), told)) from None

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        exact = all(isinstance(number, int) for number in numbers)
        mine = torch.tensor(numbers, dtype=torch.int64 if exact else torch.float64)
        found = mine.new_empty(self.size, len(mine))
        with self._watched():
            _all_gather(found.view(-1), mine, group=self._group)
        return found.tolist()

    def gather_things(self, thing: T) -> list[T]:
        found: list[Any] = [None] * self.size
        with self._watched(patient=True):
            dist.all_gather_object(found, thing)
        return found

    def from_first(self, thing: T) -> T:
        found = [thing]
        with self._watched(patient=True):
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def together(self, run: Callable[[], T]) -> T:
        result, error = None, None
        try:
            result = run()
        except RankLost:
            raise
        except (UserError, BackendUnavailable, OSError) as found:
            error = found
        told = self.gather_things(None if error is None else str(error))
        failed = [rank for rank, line in enumerate(told) if line is not None]
        if not failed:
            return result  # type: ignore[return-value]
        if len(failed) == self.size and error is not None:
            raise error
        raise UserError(f"rank {failed[0]} on {self._roll.members[failed[0]].host}: {told[failed[0]]}") from None

    def wait(self) -> None:
        with self._watched(patient=True):
            dist.barrier()

    def same(self, things: Callable[[], Mapping[str, str]], cure: str = "") -> None:
        ours, *others = self.gather_things(dict(things()))
        for rank, theirs in enumerate(others, 1):
            for name in {**ours, **theirs}:
                if (a := ours.get(name)) != (b := theirs.get(name)):
                    raise UserError(
                        f"rank {rank} on {self._roll.members[rank].host} has another {name} than rank 0: "
                        f"{_shown(b)}, not {_shown(a)}.{cure and ' ' + cure}"
                    )

    def sum(self, parameters: Sequence[Tensor], count: int, parts: Mapping[Span, Sequence[Tensor | None]]) -> None:
        if not parts:
            return
        sizes = [parameter.numel() for parameter in parameters]
        length = traffic.segment(sum(sizes), self.size)
        flat = parameters[0].new_zeros(len(parts), self.size * length)
        for row, part in zip(flat, parts.values(), strict=True):
            for place, gradient in zip(row[: sum(sizes)].split(sizes), part, strict=True):
                if gradient is not None:
                    place.copy_(gradient.reshape(-1))
        sent = flat.view(len(parts), self.size, length).transpose(0, 1).contiguous()
        nodes = [spans((0, count), self.share(count, rank)) for rank in range(self.size)]
        received = flat.new_empty(sum(map(len, nodes)), length)
        with self._timed(), self._watched():
            dist.all_to_all_single(
                received.view(-1), sent.view(-1), [len(of) * length for of in nodes], [len(parts) * length] * self.size,
                group=self._group,
            )  # fmt: skip
            self._await(received)
        total = add((0, count), dict(zip([node for of in nodes for node in of], received, strict=True)))
        whole = flat.view(-1)[: self.size * length]
        with self._timed(), self._watched():
            _all_gather(whole, total, group=self._group)
            self._await(whole)
        self._sent += traffic.sent(sum(sizes), self.size, len(parts), whole.element_size())
        for parameter, gradient in zip(parameters, whole[: sum(sizes)].split(sizes), strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(gradient.view_as(parameter))

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        with torch.profiler.record_function(COMMUNICATION):
            yield
        self._under_way.append((start, time.perf_counter()))

    def _await(self, tensor: Tensor) -> None:
        if tensor.is_cuda:  # NCCL's calls return before it is done
            torch.cuda.synchronize(tensor.device)

    def spent(self) -> tuple[float, int]:
        seconds = end = 0.0
        for start, stop in sorted(self._under_way):  # buckets of a wrapped model overlap
            seconds += max(0.0, stop - max(start, end))
            end = max(end, stop)
        sent, self._sent = self._sent, 0
        self._under_way.clear()
        return seconds, sent

    def wrapped(self, model: nn.Module) -> nn.Module:
        with self._watched():
            net = DistributedDataParallel(model, process_group=self._group)
        net.__dict__["_vspdf_wraps_anew"] = True
        net.register_comm_hook(None, lambda _, bucket: self._summed(bucket))
        return net

    def wraps(self, model: nn.Module) -> bool:
        return isinstance(model, DistributedDataParallel)

    def watched(self) -> AbstractContextManager[object]:
        return self._watched()

    def accumulating(self, model: nn.Module) -> AbstractContextManager[object]:
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def _summed(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Sums a bucket of gradients over the ranks, beside the backward pass; ours are shares of a mean already."""
        start, buffer = time.perf_counter(), bucket.buffer()
        self._sent += traffic.sent(buffer.numel(), self.size, itemsize=buffer.element_size())  # a ring's

        def done(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            self._under_way.append((start, time.perf_counter()))
            return future.value()[0]

        return dist.all_reduce(buffer, group=self._group, async_op=True).get_future().then(done)


def _shown(value: str | None) -> str:
    """A value in an error message; of a digest, enough to tell it from another."""
    return "none" if value is None else f"{value[:12]}..." if re.fullmatch("[0-9a-f]{40,}", value) else value
