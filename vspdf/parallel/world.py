"""`World`: this process among those that train together. Alone, every verb is a no-op and nothing is imported."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vspdf.errors import Interrupted, UserError
    from vspdf.parallel.tree import Span

T = TypeVar("T")
COMMUNICATION = "communication"  # how a profile calls it


class World:
    """The processes that train together; by itself, a process that is alone.

    `vspdf.parallel.environment` finds the others. As a context it leaves the group at its end, if it has joined it.

    Attributes
    ----------
    rank, size : int
        Number of this process, from 0, and of how many.
    """

    rank, size = 0, 1

    def __enter__(self) -> World:
        return self

    def __exit__(self, *how: object) -> None:
        return None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which speaks and writes."""
        return self.rank == 0

    @property
    def threads(self) -> int | None:
        """Threads that this process has for itself; None: alone, whatever torch takes."""
        return None

    @property
    def local_rank(self) -> int:
        """Number of this process among those on its machine."""
        return 0

    def within(self, seconds: float) -> None:
        """From now on, a rank that lets the others wait longer is taken for lost."""

    def share(self, count: int, rank: int | None = None) -> range:
        """The part of `count` things in order that is this process', or another's."""
        rank = self.rank if rank is None else rank
        return range(rank * count // self.size, (rank + 1) * count // self.size)

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """As many numbers of every rank, in order of ranks: integers, exact, or floats."""
        return [list(numbers)]

    def gather_things(self, thing: T) -> list[T]:
        """Something small of every rank, in order of ranks."""
        return [thing]

    def agree(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return any(row[0] for row in self.gather([int(flag)]))

    def from_first(self, thing: T) -> T:
        """What rank 0 has."""
        return thing

    def together(self, run: Callable[[], T]) -> T:
        """Runs something on all ranks; where it fails on one, all end with that one's error, which names it.

        Raises
        ------
        UserError
            On every rank.
        """
        return run()

    def wait(self) -> None:
        """Until all are here, however long rank 0 takes over what it does alone."""

    def same(self, things: Callable[[], Mapping[str, str]], cure: str = "") -> None:
        """Makes sure that all ranks have the same of what is named.

        Parameters
        ----------
        things : callable
            Gives digests, or values, by what they are of.
        cure : str
            A sentence on what to do where they differ.

        Raises
        ------
        UserError
            On every rank, naming the first that differs from rank 0 and the first thing in which it does.
        """

    def sum(self, parameters: Sequence[Tensor], count: int, parts: Mapping[Span, Sequence[Tensor | None]]) -> None:
        """Leaves the gradient of a whole step in ``.grad``: of `count` micro-batches, in the tree's order.

        Parameters
        ----------
        parts : mapping of Span to sequence of Tensor
            What this process has summed, by node: `tree.spans` of its share. Nothing of a wrapped model.
        """

    def spent(self) -> tuple[float, int]:
        """Since it was asked last: seconds in which gradients were under way, and bytes that this process has sent.

        Seconds hold the wait for the slowest rank; of a wrapped model, the part of the backward pass that goes on
        beside.
        """
        return 0.0, 0

    def wrapped(self, model: nn.Module) -> nn.Module:
        """A model in DistributedDataParallel; alone, itself."""
        return model

    def wraps(self, model: nn.Module) -> bool:
        """Whether its gradients are summed over ranks while they are computed."""
        return False

    def watched(self) -> AbstractContextManager[object]:
        """A context around a wrapped model's backward pass: a rank that is gone shows there."""
        return nullcontext()

    def accumulating(self, model: nn.Module) -> AbstractContextManager[object]:
        """A context in which a wrapped model keeps its gradients to itself."""
        return nullcontext()


ALONE = World()


def leave_it_to_the_first(error: UserError | Interrupted) -> None:
    """Of ranks that end alike, rank 0 says why; torchrun ends all when one ends, so it is given time for that."""
    error.told = True
    time.sleep(1)
