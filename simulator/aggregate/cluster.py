"""Several systems and their memory service: what of a step's end and the next one's beginning is not hidden.

Weights go from the memory service down a tree to all systems at once; gradients are added up on their way back and meet
the optimizer's state there. Links and tree pass words on as they come (cut-through), so several systems cost latency,
not bandwidth. What shows is the chain from a block's last gradient to its first use in the next step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vspdf.simulator.machine import Machine


@dataclass(frozen=True)
class Block:
    """One block of the model on one system: cycles of its passes in the last micro-batch, weights that it trains."""

    forward: float
    backward: float
    trained: float


@dataclass(frozen=True)
class Cluster:
    """What joins systems.

    Attributes
    ----------
    levels : int
        Of the tree between the memory service and the systems.
    hop : float
        Cycles that a level takes, one way.
    link, memory : float
        Bytes a cycle: of a system's link, of the memory service.
    wire, state : float
        Bytes of a weight and its gradient together on the link; of its update in memory.
    jitter : float
        Standard deviation of a system's time, relative; all wait for the slowest.
    """

    systems: int
    levels: int
    hop: float
    link: float
    memory: float
    wire: float
    state: float
    jitter: float

    @classmethod
    def of(cls, machine: Machine, systems: int, clock: float) -> Cluster:
        levels = math.ceil(math.log(systems, machine.swarm_fanout) - 1e-9) if systems > 1 else 0
        return cls(
            systems, levels, machine.exchange_latency * clock, machine.host_bandwidth / clock,
            machine.memory_bandwidth / clock, machine.dense_weight_bytes + machine.gradient_bytes,
            machine.update_bytes, machine.system_jitter,
        )  # fmt: skip

    @property
    def straggling(self) -> float:
        """By how much the slowest system is slower than the average one."""
        return self.jitter * math.sqrt(2 * math.log(self.systems)) if self.systems > 1 else 0.0


def exposed(blocks: Sequence[Block], first: float, cluster: Cluster) -> dict[str, float]:
    """Cycles between the last backward pass and the next step that no pass hides, by cause.

    Parameters
    ----------
    blocks : sequence of Block
        In the order of the forward pass.
    first : float
        Weights of the first matrix: its gradient is the last to leave, its weights are the first to come back.

    Notes
    -----
    A max-plus recurrence. Backward from the last block on, a gradient is out when its block and those before it are;
    up the tree, through the memory (which updates one block after the other), down again; the next step's forward
    pass of a block begins when its weights are there and the block before it is done.
    """
    turn = first * cluster.wire / cluster.link
    way = cluster.levels * cluster.hop
    now = out = updated = 0.0
    ready = []
    for block in reversed(blocks):
        now += block.backward
        out = max(now, out + block.trained * cluster.wire / cluster.link / 2)
        updated = max(out + way, updated) + block.trained * cluster.state / cluster.memory
        ready.append(updated + way)
    ready.reverse()
    begin = ready[0] + turn
    start = begin
    for (before, _), (_, there) in pairwise(zip(blocks, ready, strict=True)):
        start = max(there + turn, start + before.forward)
    whole = start - sum(block.forward for block in blocks[:-1]) - now
    update = min(max(0.0, begin - now - turn - 2 * way), max(0.0, whole - turn - 2 * way))
    rest = max(0.0, whole - turn - 2 * way - update)
    return {"streaming": turn, "tree": 2 * way, "update": update, "waiting": rest}
