"""What every program shares: its outcome, alignment, and the checks that give one clear line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vspdf.errors import UserError
from vspdf.simulator.events.fabric import Region
from vspdf.simulator.machine import Machine


@dataclass
class Outcome:
    """The outcome of a program on a region: values, cycles and statistics.

    Attributes
    ----------
    cycles : int
        Until the last PE was done, in the program's own timed window.
    per_pe : int64 array [height, width]
        Cycles of each PE's timed window.
    result : ndarray
        Values read back from the PEs.
    region : Region
        With the statistics of every PE.
    phases : dict
        Cycles of named parts, where a program has them.
    window : (int, int), optional
        The stamps that frame what is timed, where that is less than the whole run.
    """

    cycles: int
    per_pe: np.ndarray
    result: Any
    region: Region
    phases: dict[str, int] = field(default_factory=dict)
    window: tuple[int, int] | None = None

    def breakdown(self) -> dict[str, int]:
        """Cycles of the average PE by cause, in the timed window."""
        stats = self.region.stats
        names = ("vector", "bank_stall", "scalar", "task_switch", "wait_data", "back_pressure", "idle")
        if self.window:
            first, last = (self.region.stats_at(slot) for slot in self.window)
            stats = {name: last[name] - first[name] for name in names}
        return {name: round(float(stats[name].mean())) for name in names}


def align(byte: int, to: int = 16) -> int:
    """Rounds an address up to a multiple of `to` bytes."""
    return -(-byte // to) * to


def bits(values: np.ndarray) -> np.ndarray:
    """fp32 values as wavelets."""
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def check_memory(machine: Machine, end: int, instead: str) -> None:
    """Refuses a program that would need `end` bytes of a PE's SRAM, where there are fewer; `instead` would fit."""
    if end > machine.sram_bytes:
        raise UserError(f"a PE would need {end:,} bytes of SRAM, it has {machine.sram_bytes:,}: take {instead}.")
