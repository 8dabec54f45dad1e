"""Level 2: the whole wafer in closed form and short recurrences, from the same parameters and instruction counts.

It never runs level 1: kernels' instruction counts come from the same `Code` listings, banks from the same rules, routes
from geometry. tests/test_simulator_ladder.py holds it against level 1 on a ladder of grids.
"""

from __future__ import annotations

from math import ceil

import numpy as np

from vspdf.errors import UserError

from . import programs
from .fabric import Code
from .machine import Machine

# A stream passes a PE in ramp + one cycle of work + ramp, and a link in one hop.


def relay(machine: Machine) -> int:
    """Cycles from one PE's arithmetic on a streamed element to its neighbour's."""
    return 2 * machine.ramp_cycles + 1 + machine.hop_cycles


def start(machine: Machine) -> int:
    """Task and vector operation begin."""
    return machine.task_switch + machine.vector_startup


def bank_cycles(machine: Machine, dst: tuple[int, int], src0: tuple[int, int], src1: tuple[int, int], length: int) -> int:
    """Cycles that the banks need for dst = src0 + src1 · f, fp32; operands as (byte address, stride in elements)."""
    g = np.arange(min(length, machine.banks * max(1, machine.bank_bytes // 4)))

    def bank(operand: tuple[int, int], at: np.ndarray) -> np.ndarray:
        return (operand[0] + 4 * operand[1] * at) // machine.bank_bytes % machine.banks

    r0, r1, w = bank(src0, g), bank(src1, g), bank(dst, g - machine.write_delay)
    apart = np.where((w == r0) | (w == r1), 2, 1)
    together = np.where((w == r0) & (w == r1), 3, 2)
    cycles = np.where(r0 % machine.read_groups == r1 % machine.read_groups, together, apart)
    whole, rest = divmod(length, len(g))
    return int(whole * cycles.sum() + cycles[:rest].sum())


def fmac(machine: Machine, dst: tuple[int, int], src: tuple[int, int], length: int) -> int:
    """Cycles of dst += src · f in fp32 after its start-up."""
    return max(ceil(machine.fmac_fp32_cycles * length - 1e-9), bank_cycles(machine, dst, dst, src, length))


# ---- sparse x dense --------------------------------------------------------------------------------------------------


def spmm(
    machine: Machine, fmt: str, n: int, k: int, m: int, width: int, height: int, nnz_max: int, nnz_mean: float, slots: int = 0
) -> dict[str, float]:
    """Timed window of the fullest and the average PE of `programs.spmm`.

    `nnz_max`: non-zeros that the fullest PE processes (stored ones, for COO and ELLPACK), `nnz_mean` those of an
    average PE; `slots` of a row for ELLPACK.
    """
    nt, kt = programs.check_spmm(machine, width, height, n, k, m)
    address = programs.tile_layout(fmt, nt, kt, m, nnz_max)
    programs.check_memory(machine, address["end"])
    code = Code(machine)
    programs.emit_spmm(code, fmt, address, nt, kt, m, nnz_max, slots)
    # Rows of B and C may fall into the same banks or not: the average over all pairs of rows.
    costs = [
        fmac(machine, (address["C"] + 4 + 4 * m * i, 1), (address["B"] + 4 * m * j, 1), m)
        for i in range(min(nt, machine.banks))
        for j in range(min(kt, machine.banks))
    ]
    vector = float(np.mean(costs))
    datapath = ceil(machine.fmac_fp32_cycles * m - 1e-9)
    nonzero = code.costs["nonzero"] + machine.vector_startup + vector
    lines = {"coo": 0, "csc": kt}.get(fmt, nt)
    fixed = machine.timing_frame + lines * code.costs.get("line", 0) + 2 * machine.alu_cycles
    return {
        "cycles_max": fixed + nnz_max * nonzero,
        "cycles_avg": fixed + nnz_mean * nonzero,
        "vector": nnz_mean * (machine.vector_startup + datapath),
        "bank_stall": nnz_mean * (vector - datapath),
        "scalar": fixed + nnz_mean * code.costs["nonzero"],
    }


def dense(machine: Machine, n: int, k: int, m: int, width: int, height: int) -> dict[str, float]:
    """Timed window of an inner PE of `programs.dense`."""
    nt, kt = programs.check_spmm(machine, width, height, n, k, m)
    address = programs.dense_layout(nt, kt, m)
    programs.check_memory(machine, address["end"])
    code = Code(machine)
    programs.emit_dense(code, address, nt, kt, m)
    vector = np.mean(
        [
            fmac(machine, (address["C"] + 4 * j, m), (address["A"] + 4 * i, kt), nt)
            for i in range(min(kt, machine.banks))
            for j in range(min(m, machine.banks))
        ]
    )
    forward = machine.vector_startup + kt * m if height > 2 else 0
    local = machine.timing_frame + kt * code.costs["line"] + kt * m * (code.costs["nonzero"] + machine.vector_startup + vector)
    middle = max(0, height - 2) / height
    return {"cycles_max": local + forward, "cycles_avg": local + forward * middle}
