"""A run on several machines: what a step sends over the network, and how much of their number that leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vspdf.bench.calibrate import Calibration
from vspdf.errors import UserError, require
from vspdf.parallel.environment import divisors
from vspdf.parallel.traffic import sent
from vspdf.shapes import Shape

PAYLOAD = 0.94  # of a line's bits; the rest are Ethernet's, IP's and TCP's own


@dataclass(frozen=True)
class Machines:
    """So many machines like this one, with a rank each, and the network between them.

    Attributes
    ----------
    count : int
    network : float
        Gigabits a second that a machine can send.
    """

    count: int
    network: float

    def __post_init__(self) -> None:
        require(self.count >= 1, f"`machines` must be at least 1, not {self.count}.")
        require(
            0 < self.network < float("inf"), f"`network` must be positive, in gigabits a second, not {self.network}."
        )

    def require_even_shares(self, batch_size: int) -> None:
        """Refuses a number of machines that cannot share a step's sequences evenly.

        Raises
        ------
        UserError
            Naming those numbers that can.
        """
        if batch_size % self.count:
            raise UserError(
                f"{self.count} machines cannot share the {batch_size} sequences of a step evenly: `machines` "
                f"{divisors(batch_size)}."
            )

    def bytes_per_step(self, shape: Shape, sparsity: float) -> int:
        """That a machine sends, and receives, in a step."""
        return sent(round(shape.parameters - sparsity * shape.linear), self.count)

    def of(
        self, shape: Shape, step_tokens: int, measured: Calibration, stages: list[tuple[float, int]]
    ) -> dict[str, float]:
        """Means over a run's steps.

        Parameters
        ----------
        step_tokens : int
            Of all machines.
        stages : list of (sparsity, steps)

        Returns
        -------
        dict
            `bytes_per_step` and `allreduce_seconds` of a machine, nothing hidden behind compute; `efficiency`: how many
            times as fast as one machine, over how many there are.
        """
        steps = sum(n for _, n in stages)
        sizes = [self.bytes_per_step(shape, s) for s, _ in stages]
        exchange = [8 * size / (PAYLOAD * self.network * 1e9) for size in sizes]
        alone = sum(n * measured.step_seconds(shape, s, step_tokens) for s, n in stages)
        shared = sum(
            n * (measured.step_seconds(shape, s, step_tokens // self.count) + wait)
            for (s, n), wait in zip(stages, exchange, strict=True)
        )
        return {
            "bytes_per_step": sum(size * n for size, (_, n) in zip(sizes, stages, strict=True)) / steps,
            "allreduce_seconds": sum(wait * n for wait, (_, n) in zip(exchange, stages, strict=True)) / steps,
            "efficiency": alone / (self.count * shared),
        }

    def to_json(self, shape: Shape, step_tokens: int, measured: Calibration, stages: list[tuple[float, int]]) -> Any:
        """The figures of the dense run and of the planned one, by figure."""
        dense = self.of(shape, step_tokens, measured, [(0.0, 1)])
        planned = self.of(shape, step_tokens, measured, stages)
        return {"count": self.count, "network": self.network} | {
            key: {"dense": dense[key], "planned": planned[key]} for key in dense
        }
