"""Level 2: the whole wafer in closed form and short recurrences, from the same parameters and instruction counts.

It never runs level 1: kernels' instruction counts come from the same `Code` listings, banks from the same rules, routes
from geometry. tests/test_simulator_ladder.py holds it against level 1 on a ladder of grids.
"""

from __future__ import annotations

from math import ceil

import numpy as np

from vspdf.errors import UserError
from vspdf.simulator import programs
from vspdf.simulator.fabric import Code, vector_cycles
from vspdf.simulator.machine import Machine

# A stream passes a PE in ramp + one cycle of work + ramp, and a link in one hop.


def relay(machine: Machine) -> int:
    """Cycles from one PE's arithmetic on a streamed element to its neighbour's."""
    return 2 * machine.ramp_cycles + 1 + machine.hop_cycles


def start(machine: Machine) -> int:
    """Task and vector operation begin."""
    return machine.task_switch + machine.vector_startup


def fmac(machine: Machine, dst: tuple[int, int], src: tuple[int, int], length: int, half: bool = False) -> int:
    """Cycles of dst += src · f after its start-up; operands as (byte address, stride in elements)."""
    return vector_cycles(machine, "fmac", dst, dst, src, length=length, half=half)


# ---- sparse x dense --------------------------------------------------------------------------------------------------


def spmm(
    machine: Machine,
    fmt: str,
    n: int,
    k: int,
    m: int,
    width: int,
    height: int,
    nnz_max: int,
    nnz_mean: float,
    slots: int = 0,
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
    datapath = ceil(m / machine.fmac_fp32_rate)
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
    local = (
        machine.timing_frame
        + kt * code.costs["line"]
        + kt * m * (code.costs["nonzero"] + machine.vector_startup + vector)
    )
    middle = max(0, height - 2) / height
    return {"cycles_max": local + forward, "cycles_avg": local + forward * middle}


# ---- collectives -----------------------------------------------------------------------------------------------------


def _multicast(machine: Machine, words: int, hops: int) -> int:
    """From the first instruction of the sender to the last element stored at the far end."""
    return machine.vector_startup + words + 2 * machine.ramp_cycles + 1 + hops * machine.hop_cycles


def broadcast(machine: Machine, pes: int, elements: int) -> int:
    return machine.launch_cycles + _multicast(machine, elements, pes - 1)


def reduce(machine: Machine, pes: int, elements: int, group: int | str, everywhere: bool = False) -> int:
    """`programs.reduce`: chains of `group` PEs, then a chain of their leaders; "star"."""
    if pes < 2:
        raise UserError("a reduction needs at least 2 PEs.")
    if group != "star" and not (isinstance(group, int) and 1 <= group <= pes):
        raise UserError(f"--group {group}: expected 1 to {pes} (the number of PEs) or 'star'.")
    cycles = machine.launch_cycles + machine.vector_startup
    if group == "star":
        cycles += (pes - 1) * (elements + machine.vector_startup)
    else:
        leaders = -(-pes // int(group))
        if int(group) > 1:
            cycles += elements + (int(group) - 1) * relay(machine)
        if leaders > 1:
            # The first leader streams straight on and waits at the second's door: one step of the chain less.
            steps = leaders - (2 if int(group) > 1 else 1)
            cycles += (
                machine.alu_cycles
                + start(machine)
                + elements
                + steps * (relay(machine) + (int(group) - 1) * machine.hop_cycles)
            )
    if everywhere:
        cycles += machine.alu_cycles + machine.task_switch + _multicast(machine, elements, pes - 1)
    return cycles


# ---- dense products --------------------------------------------------------------------------------------------------


def _product(machine: Machine, layout: programs.Product, descriptors: bool) -> float:
    """Cycles of one PE's t x t x t product."""
    code = Code(machine)
    programs.emit_product(code, layout, 0, 0, descriptors)
    t = layout.tile
    if layout.half:
        vector = float(fmac(machine, (layout.c, 1), (layout.a(0), 1), t, half=True))
    else:
        shift = np.arange(min(t, machine.banks))
        vector = float(np.mean([
            fmac(machine, (layout.c + layout.column * int(j), 1), (layout.a(0) + layout.column * int(k), 1), t)
            for j in shift for k in shift
        ]))  # fmt: skip
    return t * (code.costs["line"] + t * (code.costs["nonzero"] + machine.vector_startup + vector))


def gemm(machine: Machine, algorithm: str, pes: int, n: int, half: bool) -> dict[str, float]:
    """Cycles of `programs.summa` or `programs.ring_gemm`, and of the leanest local product alone (`ideal`)."""
    summa = algorithm == "summa"
    layout = programs.check_gemm(machine, pes, n, half, padded=not summa)
    words = -(-layout.column * layout.tile // 4)
    product = _product(machine, layout, summa)
    lean = _product(machine, programs.Product(layout.tile, half), False)
    test = machine.alu_cycles + machine.branch_cycles
    if summa:
        roles = 4 * test + 6 * machine.alu_cycles + 2 * machine.branch_cycles + test + 2 * machine.alu_cycles
        step = (
            2 * machine.collective_setup
            + roles
            + machine.task_switch
            + 2 * words
            + machine.task_switch
            + _multicast(machine, 0, 0)
        )
        cycles = pes * (product + step) + 2 * pes * machine.hop_cycles
    else:
        test = machine.alu_cycles + machine.branch_cycles
        # A PE both sends and receives A and B: four words' worth of its datapath for every word of a tile.
        if algorithm == "cannon":
            # Twice: the tile's long way back, and the word that it is over, with the tasks that join them.
            alone = machine.vector_startup + 2 * machine.ramp_cycles + 2 * (pes - 1) * machine.hop_cycles
            rotation = 4 * words + 2 * alone + 6 * machine.task_switch + 14 * machine.alu_cycles
            cycles = pes * (product + test) + (pes - 1) * rotation
        else:
            joins = 4 * (machine.task_switch + machine.alu_cycles)
            cycles = pes * (product + 4 * words + machine.task_switch + joins + 6 * machine.alu_cycles + test)
            cycles += pes * machine.hop_cycles
    return {"cycles": cycles, "ideal": pes * lean, "compute": pes * product}


def gemv(machine: Machine, pes: int, n: int, half: bool) -> dict[str, float]:
    """Cycles of `programs.mesh_gemv`."""
    if not 2 <= pes <= min(machine.width, machine.height):
        raise UserError(
            f"a grid of {pes}x{pes} PEs does not fit: 2 to {min(machine.width, machine.height)} on {machine.name}."
        )
    t = -(-n // pes)
    size = 2 if half else 4
    column = programs.align(t * size)
    at_y = programs.align(column * t + column)
    programs.check_memory(machine, at_y + column)
    code = Code(machine)
    programs.emit_gemv(code, t, column, column * t, at_y, half)
    vector = fmac(machine, (at_y, 1), (0, 1), t, half)
    words = -(-t // 2) if half else t
    root_of, roots = programs.tree(pes)
    local = machine.task_switch + t * (code.costs["line"] + machine.vector_startup + vector)
    cycles = float(local)
    group = max(root_of.count(r) for r in set(root_of))
    for members, spread in ((group, 1), (len(roots), group)):
        if members > 1:
            sides = 2 if members > 2 else 1
            chain = (members // 2) * (relay(machine) + (spread - 1) * machine.hop_cycles)
            cycles += machine.alu_cycles + start(machine) + chain + sides * words + (sides - 1) * machine.vector_startup
    top = roots[len(roots) // 2]
    cycles += machine.alu_cycles + machine.task_switch + _multicast(machine, words, max(top, pes - 1 - top))
    return {"cycles": cycles, "local": local}


# ---- weight streaming: one row of PEs stands for all -----------------------------------------------------------------

POLICIES = ("lockstep", "queue", "decoupled")


def _steady(times: list[float], rows: int) -> float:
    """Extends the times at which rows were done to `rows` of them, at the pace of the second half."""
    done = len(times)
    if rows <= done or done < 4:
        return times[min(rows, done) - 1]
    half = done // 2
    return times[-1] + (rows - done) * (times[-1] - times[half - 1]) / (done - half)


def stream_layer(
    machine: Machine, counts: np.ndarray, tokens: int, policy: str = "queue", rows: int | None = None
) -> float:
    """Cycles of `programs.stream_layer` (forward or delta) with `counts` [rows, columns] kept weights, `tokens` per PE.

    "queue" follows every column's and every row's sum as level 1 does, a column being at most `slack_rows` (at least
    one: the second buffer) ahead; "lockstep" waits for the fullest column in every row; "decoupled" never waits.
    With fewer counts than `rows` the rest goes on at the steady pace.
    """
    total = rows or len(counts)
    n_columns = counts.shape[1]
    words, axpy = tokens // 2, machine.trigger_cycles + ceil(tokens / machine.fmac_fp16_rate)
    command = _command_cost(machine, tokens)
    if policy == "lockstep":
        per_row = counts.max(1) * axpy + command + words
        return float(per_row.mean() * total) + relay(machine) * n_columns
    if policy == "decoupled":
        return float((counts.sum(0).max() / len(counts) * axpy + command + words) * total) + relay(machine) * n_columns
    order = programs.ring_order(n_columns, True)
    fmac_time = counts[:, order] * axpy
    hop = relay(machine) + (machine.hop_cycles if n_columns > 2 else 0)
    lead = (
        machine.reduce_startup
        + 4 * machine.alu_cycles
        + 2 * (machine.alu_cycles + machine.branch_cycles)
        + machine.vector_startup
    )
    depth = machine.out_queue_depth[2] + machine.in_queue_depth[1] + 2 * machine.ramp_cycles + 2 * machine.router_buffer
    free = np.zeros(n_columns)  # the datapath, per member
    history = [np.zeros(n_columns)] * max(1, int(machine.slack_rows))  # when the sums of the last rows had left
    distance = np.arange(n_columns) * hop
    finished: list[float] = []
    for row, work in enumerate(fmac_time):
        owner = -row % n_columns
        ready = np.maximum(free + work, history[0])
        launch = ready + lead
        ring = (owner - 1 - np.arange(n_columns)) % n_columns  # from the one that starts to the owner
        arrive = np.maximum.accumulate(launch[ring] - distance) + distance
        leave = arrive + words
        # A sender also waits for the receiver, but for what the queues between them hold.
        leave[:-1] = np.maximum(leave[:-1], arrive[1:] + max(0, words - depth))
        done = np.empty(n_columns)
        done[ring] = leave
        history = [*history[1:], done]
        free = ready + command + words
        finished.append(float(done.max()))
    return _steady(finished, total)


def _command_cost(machine: Machine, tokens: int) -> float:
    """Datapath cycles of a row's end, without its words: the command, clearing the next sum."""
    clear = machine.vector_startup + ceil(tokens / 4)
    test = machine.alu_cycles + machine.branch_cycles
    return machine.reduce_startup + 11 * machine.alu_cycles + 3 * test + clear + machine.branch_cycles


def stream_gradient(
    machine: Machine, counts: np.ndarray, tokens: int, policy: str = "queue", rows: int | None = None
) -> float:
    """Cycles of `programs.stream_gradient`: a row's dy arrives, dots at kept positions, the columns add up."""
    total = rows or len(counts)
    n_columns = counts.shape[1]
    words, dot = tokens // 2, machine.trigger_cycles + ceil(tokens / machine.fmac_fp16_rate)
    test = machine.alu_cycles + machine.branch_cycles
    row_task = machine.task_switch + machine.load_cycles + 2 * test + machine.branch_cycles + 2 * machine.alu_cycles
    before = row_task + _multicast(machine, words, 0) + machine.task_switch + 2 * machine.alu_cycles
    after = machine.reduce_startup + 12 * machine.alu_cycles + 2 * test + machine.vector_startup
    work = counts * (dot + 1) + before + after
    if policy == "lockstep":
        return float(work.max(1).mean() * total) + n_columns
    if policy == "decoupled":
        return float(work.sum(0).max() / len(work) * total) + n_columns
    order = programs.ring_order(n_columns, True)
    depth = machine.in_queue_depth[1] + machine.ramp_cycles + 2 * machine.router_buffer
    place = np.arange(n_columns)
    begin = np.zeros(n_columns)
    finished: list[float] = []
    for row, kept in enumerate(counts):
        root = order[-row % n_columns]
        sent = begin[root] + row_task + machine.vector_startup
        if words > depth:  # the multicast cannot end before everyone takes it
            sent = max(sent, float(begin.max()) + row_task - depth)
        there = np.maximum(
            begin + row_task + machine.vector_startup, sent + 2 * machine.ramp_cycles + 1 + np.abs(place - root)
        )
        begin = there + words + machine.task_switch + 2 * machine.alu_cycles + kept * (dot + 1) + after
        finished.append(float(begin.max()))
    return _steady(finished, total)
