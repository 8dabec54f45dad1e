"""Level 2: the whole wafer in closed form and short recurrences, from the same parameters and instruction counts.

It never runs level 1: kernels' instruction counts come from the same `Code` listings, banks from the same rules, routes
from geometry. tests/simulator/test_ladder.py holds it against level 1 on a ladder of grids.
"""

from __future__ import annotations

from math import ceil

import numpy as np

from vspdf.errors import UserError
from vspdf.simulator.aggregate.law import GAPS
from vspdf.simulator.events import programs
from vspdf.simulator.events.fabric import Code, vector_cycles
from vspdf.simulator.events.programs import streaming
from vspdf.simulator.machine import Machine


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
    programs.check_memory(machine, address["end"], programs.SMALLER)
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
    programs.check_memory(machine, address["end"], programs.SMALLER)
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
        raise UserError(f"`group` {group}: expected 1 to {pes} (the number of PEs) or 'star'.")
    if pes > machine.width:
        raise UserError(
            f"a grid of {pes}x1 PEs does not fit: {machine.name} has {machine.width}x{machine.height} (width x height) "
            "for programs."
        )
    cycles = machine.launch_cycles
    if group == "star":
        cycles += machine.vector_startup + (pes - 1) * (elements + machine.vector_startup)
    else:
        cycles += _chains(machine, pes, elements, int(group)) + elements
    if everywhere:
        cycles += machine.alu_cycles + machine.task_switch + _multicast(machine, elements, pes - 1)
    return cycles


def _chains(machine: Machine, pes: int, elements: int, group: int) -> int:
    """When the last leader adds up its first element, in chains of `group` PEs, the last one of what is left."""
    sizes = [group] * (pes // group) + ([pes % group] if pes % group else [])
    begun = machine.vector_startup + (sizes[0] - 1) * machine.relay_cycles  # the first leader streams straight on
    for size in sizes[1:]:  # the others first end their own chain, if there is one
        own = machine.vector_startup + (size - 1) * machine.relay_cycles + elements if size > 1 else 0
        came = begun + machine.relay_cycles + (size - 1) * machine.hop_cycles
        begun = max(came, own + machine.alu_cycles + start(machine))
    return begun


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
    return {"cycles": cycles, "ideal": pes * lean, "compute": pes * product}


def gemv(machine: Machine, pes: int, n: int, half: bool) -> dict[str, float]:
    """Cycles of `programs.mesh_gemv`."""
    if not 2 <= pes <= min(machine.width, machine.height):
        raise UserError(
            f"a grid of {pes}x{pes} PEs does not fit: 2 to {min(machine.width, machine.height)} on {machine.name}."
        )
    if n < pes:
        raise UserError(f"`n` {n} is smaller than the grid's side {pes}: some PEs would have nothing to do.")
    t = -(-n // pes)
    size = 2 if half else 4
    column = programs.align(t * size)
    at_y = programs.gemv_sum(t, column)
    programs.check_memory(machine, at_y + column, "a larger `grid` or a smaller `n`")
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
            chain = (members // 2) * (machine.relay_cycles + (spread - 1) * machine.hop_cycles)
            cycles += chain + sides * (words + machine.vector_startup)
    top = roots[len(roots) // 2]
    cycles += _multicast(machine, words, max(top, pes - 1 - top))
    return {"cycles": cycles, "local": local}


# ---- weight streaming: one row of PEs stands for all -----------------------------------------------------------------


def _steady(times: list[float], rows: int) -> float:
    """Extends the times at which rows were done to `rows` of them, at the pace of the second half."""
    done = len(times)
    if rows <= done or done < 4:
        return times[min(rows, done) - 1]
    half = done // 2
    return times[-1] + (rows - done) * (times[-1] - times[half - 1]) / (done - half)


def _mean_cycles(machine: Machine, arith: str, at: int, dst: int, count: int, n: int) -> float:
    """Of an operation on each of `count` feature rows of n fp16 tokens from byte 0 and one row at `at`."""
    each = range(min(count, machine.banks))  # banks repeat
    cycles = [
        vector_cycles(machine, arith, (dst, 1), (at, 1), (2 * n * j, 1), length=n, half=True)
        if arith == "fmac"
        else vector_cycles(machine, arith, (dst, 1), (2 * n * j, 1), (at, 1), length=n, half=True)
        for j in each
    ]
    return float(np.mean(cycles))


def stream_layer(
    machine: Machine, counts: np.ndarray, block: int, tokens: int, height: int = 1, rows: int | None = None
) -> float:
    """Cycles of `programs.stream_layer` (forward or grad_input).

    Follows every column and row: AXPYs, the command, the sum's way around the ring, which may start when the column's
    own part is ready and the one before it is gone, and passes in the start-ups of the next row's AXPYs. Every column
    has a link of its own.

    Parameters
    ----------
    counts : int array [rows, columns]
        Kept weights. With fewer than `rows` of them the rest goes on at the steady pace.
    block, tokens : int
        Features and tokens of a PE.
    height : int
        PEs that share the tokens.
    """
    total, columns = rows or len(counts), counts.shape[1]
    words = -(-tokens // 2)
    stream = streaming.Stream(columns, height, block * columns, len(counts), tokens * height)
    at_acc, _ = streaming.stream_layout(machine, stream)
    axpy = machine.trigger_cycles + _mean_cycles(machine, "fmac", at_acc, at_acc, block, tokens)
    clear = machine.vector_startup + vector_cycles(machine, "fill", (at_acc, 1), length=tokens, half=True)
    command = machine.reduce_startup + machine.command_cycles + clear
    lead = machine.reduce_startup + machine.command_cycles + machine.vector_startup
    order = programs.ring_order(columns, True)
    work = counts[:, order] * axpy
    hops = np.array([abs(order[m] - order[m - 1]) for m in range(columns)])
    hop = 2 * machine.ramp_cycles + 1 + hops * machine.hop_cycles  # from member m to the next, m - 1
    depth = machine.out_queue_depth[2] + machine.in_queue_depth[1] + 2 * machine.ramp_cycles + 2 * machine.router_buffer
    held_sums = streaming.sums_held(machine, stream) - 1
    free, gone = np.zeros(columns), np.zeros(columns)  # the datapath, and the column's last sum
    left = [np.zeros(columns)] * held_sums  # when the sums before it had gone
    free = free + machine.hop_cycles + 1
    finished: list[float] = []
    place = np.arange(columns)
    for row in range(len(counts)):
        owner = -row % columns
        first = (owner - 1) % columns
        ready = np.maximum(free + work[row], left[row % held_sums])
        ring = (first - place) % columns  # members from the one that starts to the owner
        launch = np.maximum(ready + lead, gone)[ring]
        way = np.concatenate([[0.0], np.cumsum(hop[ring[:-1]])])
        arrive = np.maximum.accumulate(launch - way) + way
        later = counts[row + 1, order] if row + 1 < len(counts) else np.zeros(columns)
        # The sum's words pass in start-ups of the row that follows, and where these do not hold them beside all the
        # rest.
        exposed = np.maximum(0.0, words + machine.vector_startup - GAPS * later * machine.trigger_cycles)
        leave = arrive + words
        leave = np.maximum.accumulate(leave - way) + way
        if words > depth:  # the rest goes as the next one takes words
            leave[:-1] = np.maximum(leave[:-1], arrive[1:] + words - depth)
        gone = np.empty(columns)
        gone[ring] = leave
        left[row % held_sums] = gone
        free = ready + command + exposed
        finished.append(float(max(gone.max(), free.max())))
    return _steady(finished, total) + (height - 1) * machine.hop_cycles


def stream_gradient(
    machine: Machine, counts: np.ndarray, block: int, tokens: int, height: int = 1, rows: int | None = None
) -> float:
    """Cycles of `programs.stream_gradient`: a row's dy arrives, dots at kept positions, the columns add up.

    Parameters as those of `stream_layer`.
    """
    total, columns = rows or len(counts), counts.shape[1]
    words = -(-tokens // 2)
    stream = streaming.Stream(columns, height, block * columns, len(counts), tokens * height)
    address = streaming.gradient_layout(stream)
    at_buffer = address[0]
    dot = machine.trigger_cycles + _mean_cycles(machine, "dot", at_buffer, 0, block, tokens)
    command = machine.reduce_startup + machine.command_cycles + machine.vector_startup
    order = np.array(programs.ring_order(columns, True))
    queue = machine.in_queue_depth[1] + machine.ramp_cycles
    place = np.arange(columns)
    begin = np.zeros(columns)
    finished: list[float] = []
    before = np.sign(place - int(order[0]))
    waits: list[np.ndarray] = []  # when columns were ready for a row's dy
    for row, kept in enumerate(counts):
        root = int(order[-row % columns])
        turned = begin + machine.trigger_cycles
        ready = turned + machine.vector_startup
        waits.append(ready)
        # What holds up the row's multicast: routers that have not turned yet (the old root's, and those that the root
        # has passed: they turn when their own PE begins the row), and columns whose queue is full of earlier rows.
        away, side = np.abs(place - root), np.sign(place - root)
        gate = np.where(side != before, turned, -np.inf)
        if (behind := queue // words) <= row:
            gate = np.maximum(gate, waits[row - behind] + behind * words - queue)
        gate[root], before = -np.inf, side
        sent = ready[root]
        stall = float((gate - machine.router_buffer * (away - 1)).max())
        gone = max(sent, stall - machine.router_buffer - machine.ramp_cycles - machine.out_queue_depth[2])
        passed = np.full(columns, -np.inf)
        for way in (place[root + 1 :], place[:root][::-1]):
            far = away[way] * machine.hop_cycles
            passed[way] = np.maximum.accumulate(gate[way] - far) + far if len(way) else 0
        arrival = np.maximum(max(sent, stall) + machine.ramp_cycles + 1 + away * machine.hop_cycles, passed)
        there = np.maximum(ready, arrival + machine.ramp_cycles)
        there[root] = gone
        begin = there + words + machine.trigger_cycles + kept * dot + command + kept
        finished.append(float(begin.max()))
    last = (height - 1) * machine.relay_cycles if counts[-1].any() else 0
    return _steady(finished, total) + last
