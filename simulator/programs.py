"""Programs for the fabric, each with inputs and outputs as NumPy arrays: what runs on level 1.

Every function builds code and routes, runs the region and returns a `Run` with the values computed and the cycles
counted. Instruction lists follow published kernels (Cerebras csl-examples; the CSL kernels of the CS-2 SpMM study for
the sparse formats); nothing here is fitted per program, all costs are the machine's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import numpy as np

from vspdf.errors import UserError, did_you_mean

from .fabric import Code, Region
from .machine import Machine


@dataclass
class Run:
    """What a program did.

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
    """

    cycles: int
    per_pe: np.ndarray
    result: Any
    region: Region
    phases: dict[str, int] = field(default_factory=dict)

    def breakdown(self) -> dict[str, int]:
        """Cycles of the average PE by cause."""
        stats = self.region.stats
        names = ("vector", "bank_stall", "scalar", "task_switch", "wait_data", "back_pressure", "idle")
        return {name: round(float(stats[name].mean())) for name in names}


def align(byte: int, to: int = 16) -> int:
    return -(-byte // to) * to


def bits(values: np.ndarray) -> np.ndarray:
    """fp32 values as wavelets."""
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


# ---- one vector operation --------------------------------------------------------------------------------------------

VECTOR_MODES = {
    "conflict": (0, False),
    "single": (4, False),
    "pair": (8, True),
}  # shift of one operand in bytes, packed


def vector_op(machine: Machine, length: int, mode: str = "single") -> Run:
    """y = y · x in fp32. Modes: both operands in the same banks; one shifted by a word; two elements per cycle."""
    if mode not in VECTOR_MODES:
        raise UserError(f"unknown vector mode '{mode}'.{did_you_mean(mode, VECTOR_MODES)}")
    shift, pair = VECTOR_MODES[mode]
    region = Region(machine, 1, 1)
    x, y = np.linspace(0.5, 1.5, length, dtype=np.float32), np.linspace(-1, 1, length, dtype=np.float32)
    at_y = align(4 * length, 4 * machine.banks) + shift
    code = Code(machine)
    a, b = code.memory(0, length), code.memory(at_y, length)
    task = code.task()
    code.stamp(0)
    code.vector("mul", b, b, a, pair=pair)
    code.stamp(1)
    code.end()
    region.load(0, 0, region.add(code))
    region.write(0, 0, 0, x)
    region.write(0, 0, at_y, y)
    region.activate(0, 0, task)
    region.run()
    per_pe = region.stamps(1) - region.stamps(0)
    return Run(int(per_pe.max()), per_pe, region.read(0, 0, at_y, length), region)


# ---- collectives on a line of PEs ------------------------------------------------------------------------------------


def broadcast(machine: Machine, values: np.ndarray, pes: int) -> Run:
    """`values` (fp32) from the first of `pes` PEs in a row to all of them by multicast."""
    n = len(values)
    region = Region(machine, pes, 1)
    for x in range(pes):
        code = Code(machine)
        memory = code.memory(0, n)
        task = code.task()
        code.stamp(0)
        if x == 0:
            code.vector("move", code.fabric_out(2, 0, n), memory)
            region.route(x, 0, 0, "R", "E" if pes > 1 else "R")
        else:
            code.vector("move", memory, code.fabric_in(0, n))
            region.route(x, 0, 0, "W", "RE" if x < pes - 1 else "R")
        code.stamp(1)
        code.end()
        if x or pes == 1:
            region.queue(x, 0, 0, 0)
        region.load(x, 0, region.add(code))
        region.write(x, 0, 0, np.asarray(values if x == 0 else np.zeros(n), np.float32))
        region.activate(x, 0, task)
    if pes == 1:
        raise UserError("a broadcast needs at least 2 PEs.")
    region.run()
    result = np.stack([region.read(x, 0, 0, n) for x in range(pes)])
    per_pe = region.stamps(1) - region.stamps(0)
    return Run(int(region.stamps(1).max() - region.stamps(0).min()) + machine.launch_cycles, per_pe, result, region)


def reduce(machine: Machine, values: np.ndarray, group: int | str, everywhere: bool = False) -> Run:
    """Sum of `values` [pes, elements] (fp32), PE by PE, into the last PE; with `everywhere` broadcast back to all.

    `group` PEs form a chain that ends in a leader, the leaders form a second chain (two-phase); group = pes is one
    chain; "star" sends every vector to the root on its own.
    """
    pes, n = values.shape
    if pes < 2:
        raise UserError("a reduction needs at least 2 PEs.")
    if group != "star" and not (isinstance(group, int) and 1 <= group <= pes):
        raise UserError(f"--group {group}: expected 1 to {pes} (the number of PEs) or 'star'.")
    region = Region(machine, pes, 1)
    root = pes - 1
    for x in range(pes):
        code = Code(machine)
        memory = code.memory(0, n)
        first = code.task()
        code.stamp(0)
        after = _star(code, region, x, pes, n, memory) if group == "star" else _two_phase(code, region, x, pes, n, memory, int(group))  # fmt: skip
        if everywhere:
            # The multicast back: its own colour from the root westwards.
            if after:
                code.activate(len(code.entry))
                code.end()
                code.task()
            if x == root:
                code.vector("move", code.fabric_out(4, 8, n), memory)
                region.route(x, 0, 8, "R", "W")
            else:
                code.vector("move", memory, code.fabric_in(4, n))
                region.route(x, 0, 8, "E", "RW" if x else "R")
                region.queue(x, 0, 8, 4)
        code.stamp(1)
        code.end()
        region.load(x, 0, region.add(code))
        region.write(x, 0, 0, np.asarray(values[x], np.float32))
        region.activate(x, 0, first)
    region.run()
    result = np.stack([region.read(x, 0, 0, n) for x in range(pes)]) if everywhere else region.read(root, 0, 0, n)
    per_pe = region.stamps(1) - region.stamps(0)
    return Run(int(region.stamps(1).max() - region.stamps(0).min()) + machine.launch_cycles, per_pe, result, region)


def _star(code: Code, region: Region, x: int, pes: int, n: int, memory: int) -> bool:
    """Nearest first: every router lets its own PE's vector pass, then switches to what comes from farther west."""
    if x == pes - 1:
        region.route(x, 0, 0, "W", "R")
        region.queue(x, 0, 0, 0)
        arriving = code.fabric_in(0, n)
        for _ in range(pes - 1):
            code.vector("add", memory, arriving, memory)
        return True
    region.route(x, 0, 0, "R", "E", ("W", "E"))
    code.vector("move", code.fabric_out(2, 0, n), memory)
    code.switch(0, 1)  # moves once the last of these has left
    return True


def _two_phase(code: Code, region: Region, x: int, pes: int, n: int, memory: int, group: int) -> bool:
    place, leader = x % group, (x + 1) % group == 0 or x == pes - 1
    number, leaders = x // group, -(-pes // group)
    out, came = place % 2, (place + 1) % 2  # neighbours in a chain use two colours in turn
    last_group = leaders > 1 and number > 0
    second_out, second_in = 2 + number % 2, 3 - number % 2
    forwards = leader and number < leaders - 1
    if not leader:
        region.route(x, 0, out, "R", "E")
    if place:
        region.route(x, 0, came, "W", "R")
        region.queue(x, 0, came, 0)
    # The second chain runs through everyone.
    if leader and forwards:
        region.route(x, 0, second_out, "R", "E")
    if leader and number:
        region.route(x, 0, second_in, "W", "R")
        region.queue(x, 0, second_in, 1)
    if not leader and number:
        region.route(x, 0, second_in, "W", "E")
    arriving = code.fabric_in(0, n)
    if not leader:
        sending = code.fabric_out(2, out, n)
        code.vector("add" if place else "move", sending, *((arriving, memory) if place else (memory,)))
        return True
    if number == 0 and forwards:  # what it has summed up goes straight on
        sending = code.fabric_out(3, second_out, n)
        code.vector("add" if place else "move", sending, *((arriving, memory) if place else (memory,)))
        return True
    if place:
        code.vector("add", memory, arriving, memory)
    if last_group:
        code.activate(len(code.entry))
        code.end()
        code.task()
        leaders_in = code.fabric_in(1, n)
        code.vector("add", code.fabric_out(3, second_out, n) if forwards else memory, leaders_in, memory)
    return True


# ---- sparse x dense, one AXPY per non-zero ---------------------------------------------------------------------------

FORMATS = ("coo", "csc", "csr", "ellpack")


@dataclass(frozen=True)
class Tile:
    """A PE's part of the sparse matrix, in the order in which its kernel reads it."""

    rows: np.ndarray  # int32
    cols: np.ndarray  # int32
    values: np.ndarray  # float32


def emit_spmm(code: Code, fmt: str, address: dict[str, int], nt: int, kt: int, m: int, stored: int, slots: int) -> None:
    """Emits the kernel C += A·B of one PE; `costs` of the code then hold cycles per non-zero and per row or column.

    `stored`: non-zeros that are processed; `slots`: of a row (ELLPACK). Row length m includes padding: rows of C lie one
    word after those of B, so that both never fall into the same bank group when m is a multiple of four.
    """
    machine = code.machine
    row_b, row_c = code.memory(address["B"], m), code.memory(address["C"] + 4, m)
    R_I, R_X, R_Y, R_END, R_J, R_LIMIT, R_T = 1, 2, 3, 4, 5, 6, 7

    def axpy(x_from_index: bool = True, y_from_index: bool = True) -> None:
        """Offsets of both rows (product and scaling), then the operation."""
        for r, varies, dsr, base in ((R_X, x_from_index, row_b, "B"), (R_Y, y_from_index, row_c, "C")):
            if varies:
                code.mul(r, r, 4 * m)
                code.work(2 * machine.alu_cycles)
                code.set_base(dsr, address[base] + 4 * (base == "C"), r)
        code.vector("fmac", row_c, row_c, row_b, 0)

    if fmt == "coo":
        code.li(R_I, 0)
        code.li(R_LIMIT, stored)
        with code.loop(R_I, R_LIMIT, section="nonzero"):
            code.load(R_X, address["x"], R_I)
            code.load(R_Y, address["y"], R_I)
            code.load_f(0, address["val"], R_I)
            axpy()
    elif fmt in ("csc", "csr"):
        outer, inner = (R_X, R_Y) if fmt == "csc" else (R_Y, R_X)
        code.li(R_J, 0)
        code.li(R_LIMIT, kt if fmt == "csc" else nt)
        code.li(R_I, 0)
        with code.loop(R_J, R_LIMIT, wide=True, section="line"):
            # Pointers are read four times and subtracted in fp32; a pad of -1 would end the matrix.
            code.load(R_I, address["ptr"], R_J)
            code.load(R_END, address["ptr"] + 4, R_J)
            code.work(2 * machine.load_cycles + 4 * machine.alu_cycles + machine.scalar_fp_cycles)
            code.work(2 * machine.alu_cycles + machine.branch_cycles)  # the pad
            code.work(4 * machine.alu_cycles)  # inner loop's bounds
            done = code.less(R_END, R_I, wide=True)  # never: counts the check
            empty = code.equal(R_I, R_END)
            body = code.here
            with code.section("nonzero"):
                code.work(2 * machine.alu_cycles)  # start + i
                code.add(inner, 0, 0, cycles=0)
                code.load(inner, address["idx"], R_I)
                code.load_f(0, address["val"], R_I)
                code.add(outer, R_J, 0, cycles=0)
                axpy()
                code.add(R_I, R_I, imm=1, wide=True)
                code.less(R_I, R_END, body, wide=True)
            code.patch(done)
            code.patch(empty)
    elif fmt == "ellpack":
        unrolled = slots <= machine.unroll_limit
        code.li(R_J, 0)
        code.li(R_LIMIT, nt)
        code.li(R_T, 0)
        with code.loop(R_J, R_LIMIT, wide=True, section="line"):
            code.mul(R_END, R_J, slots)
            code.add(R_I, R_END, 0, cycles=0)
            code.add(R_END, R_END, imm=slots)
            code.work(2 * machine.alu_cycles)
            if unrolled:  # constants folded: the row of C is fixed, slots are at constant offsets
                code.mul(R_Y, R_J, 4 * m)
                code.set_base(row_c, address["C"] + 4, R_Y)
            body = code.here
            with code.section("nonzero"):
                code.load(R_X, address["idx"], R_I)
                code.load_f(0, address["val"], R_I)
                if unrolled:
                    axpy(y_from_index=False)
                    code.add(R_I, R_I, imm=1, cycles=0)
                else:
                    code.work(2 * machine.alu_cycles)  # row + i
                    code.add(R_Y, R_J, 0, cycles=0)
                    axpy()
                    code.add(R_I, R_I, imm=1, wide=True)
                if unrolled:
                    _free_less(code, R_I, R_END, body)
                else:
                    code.less(R_I, R_END, body, wide=True)
    else:
        raise UserError(f"unknown sparse format '{fmt}'.{did_you_mean(fmt, FORMATS)}")


def _free_less(code: Code, a: int, b: int, target: int) -> None:
    """The loop that the compiler has unrolled: repeats, at no cost."""
    at = code.less(a, b, target)
    code.costs[code._section[-1]] -= code.instrs[at][5]
    code.instrs[at][5] = 0


def tile_layout(fmt: str, nt: int, kt: int, m: int, stored: int) -> dict[str, int]:
    """Byte addresses of a PE's arrays, and `end`."""
    pointers = {"csc": kt, "csr": nt}.get(fmt, -1) + 1
    arrays = {"coo": ("val", "x", "y"), "ellpack": ("val", "idx")}.get(fmt, ("val", "idx", "ptr"))
    address, at = {}, 0
    for name in arrays:
        address[name] = at
        at = align(at + 4 * (pointers if name == "ptr" else stored))
    address["B"] = at
    address["C"] = align(at + 4 * kt * m)
    address["end"] = address["C"] + 4 * (nt * m + 1)
    return address


def cut(
    mask: np.ndarray, width: int, height: int, fmt: str, nnz_per_pe: int | None, seed: int
) -> tuple[list[list[Tile]], int, int]:
    """Tiles of a random matrix with positions `mask` [N, K]; non-zeros stored per PE after padding; slots per row.

    With `nnz_per_pe` the fullest PE gets exactly so many (COO and ELLPACK: every PE, by padding).
    """
    n, k = mask.shape
    nt, kt = n // height, k // width
    generator = np.random.default_rng(seed)
    tiles: list[list[Tile]] = []
    counts = mask.reshape(height, nt, width, kt).sum((1, 3))
    slots = 0
    if fmt == "ellpack":
        slots = int(mask.reshape(n, width, kt).sum(2).max())
        if nnz_per_pe is not None:
            slots = max(1, -(-nnz_per_pe // nt))
    limit = int(counts.max()) if nnz_per_pe is None or fmt == "ellpack" else nnz_per_pe
    fullest = np.unravel_index(int(counts.argmax()), counts.shape)
    for y in range(height):
        row = []
        for x in range(width):
            part = mask[y * nt : (y + 1) * nt, x * kt : (x + 1) * kt].copy()
            have = int(part.sum())
            if have > limit or ((y, x) == fullest and fmt in ("csc", "csr") and have < limit):
                flat = part.reshape(-1)
                change = generator.permutation(np.flatnonzero(flat == (have > limit)))[: abs(have - limit)]
                flat[change] = ~flat[change]
            if fmt == "csc":
                cols, rows = np.nonzero(part.T)
            else:
                rows, cols = np.nonzero(part)
            values = generator.standard_normal(len(rows)).astype(np.float32)
            row.append(Tile(rows.astype(np.int32), cols.astype(np.int32), values))
        tiles.append(row)
    stored = nt * slots if fmt == "ellpack" else limit
    return tiles, stored, slots


def check_spmm(machine: Machine, width: int, height: int, n: int, k: int, m: int) -> tuple[int, int]:
    """Rows and columns of a PE's tile.

    Raises
    ------
    UserError
        If the grid does not fit the machine or does not divide the matrix.
    """
    if not (1 <= width <= machine.width and 1 <= height <= machine.height):
        raise UserError(
            f"a grid of {width}x{height} PEs does not fit: {machine.name} has {machine.width}x{machine.height} "
            "(width x height) for programs."
        )
    if n < 1 or k < 1 or m < 1 or n % height or k % width:
        raise UserError(f"--n {n} must be a multiple of the grid's height {height}, --k {k} of its width {width}.")
    return n // height, k // width


def check_memory(machine: Machine, end: int) -> None:
    if end > machine.sram_bytes:
        raise UserError(
            f"a PE would need {end} bytes of SRAM, it has {machine.sram_bytes}: use a larger grid or fewer columns M."
        )


def spmm(
    machine: Machine,
    fmt: str,
    mask: np.ndarray,
    m: int,
    width: int,
    height: int,
    nnz_per_pe: int | None = None,
    seed: int = 0,
) -> Run:
    """C = A·B in fp32, A sparse [N, K] with positions `mask`, B dense [K, m]; width splits K, height splits N.

    B runs down the columns by multicast, every PE computes its part (the timed window), the parts are summed up along
    the rows into the last column. `result` holds (C, the dense A that was used, B). The last column of B is padding.
    """
    n, k = mask.shape
    nt, kt = check_spmm(machine, width, height, n, k, m)
    if fmt not in FORMATS:
        raise UserError(f"unknown sparse format '{fmt}'.{did_you_mean(fmt, FORMATS)}")
    tiles, stored, slots = cut(mask, width, height, fmt, nnz_per_pe, seed)
    address = tile_layout(fmt, nt, kt, m, stored)
    check_memory(machine, address["end"])
    b = np.random.default_rng(seed + 1).standard_normal((k, m)).astype(np.float32)
    b[:, -1] = 0
    a = np.zeros((n, k), np.float32)
    for y, line in enumerate(tiles):
        for x, tile in enumerate(line):
            a[y * nt + tile.rows, x * kt + tile.cols] = tile.values

    def kernel(code: Code) -> None:
        code.work(machine.timing_frame)
        emit_spmm(code, fmt, address, nt, kt, m, stored, slots)

    def fill(region: Region, x: int, y: int) -> None:
        tile = tiles[y][x]
        pad = np.zeros(max(0, stored - len(tile.values)), np.int32)
        if fmt == "coo":
            region.write(x, y, address["x"], np.concatenate([tile.cols, pad]))
            region.write(x, y, address["y"], np.concatenate([tile.rows, pad]))
            region.write(x, y, address["val"], np.concatenate([tile.values, pad.astype(np.float32)]))
        elif fmt == "ellpack":
            index, value = np.zeros((nt, slots), np.int32), np.zeros((nt, slots), np.float32)
            place = np.arange(len(tile.rows)) - np.searchsorted(tile.rows, tile.rows)
            keep = place < slots
            index[tile.rows[keep], place[keep]] = tile.cols[keep]
            value[tile.rows[keep], place[keep]] = tile.values[keep]
            a[y * nt + tile.rows[~keep], x * kt + tile.cols[~keep]] = 0
            region.write(x, y, address["idx"], index)
            region.write(x, y, address["val"], value)
        else:
            lines, index = (tile.cols, tile.rows) if fmt == "csc" else (tile.rows, tile.cols)
            pointers = np.searchsorted(lines, np.arange((kt if fmt == "csc" else nt) + 1)).astype(np.int32)
            region.write(x, y, address["ptr"], pointers)
            region.write(x, y, address["idx"], index)
            region.write(x, y, address["val"], tile.values)

    run = _grid(machine, width, height, nt, kt, m, address, b, kernel, fill)
    # A row of C starts one word late; what lands beyond its end is 0 (B's padding).
    run.result = (run.result.reshape(n, m)[:, 1:], a, b[:, :-1])
    return run


def dense(machine: Machine, n: int, k: int, m: int, width: int, height: int, seed: int = 0) -> Run:
    """C = A·B in fp32, all dense, by the same flow: for every element of B one AXPY down a column of A and of C.

    A is stored [Nt, Kt] and C [Nt, m] row by row, so both columns are strided: what the banks make of that is theirs.
    """
    nt, kt = check_spmm(machine, width, height, n, k, m)
    address = dense_layout(nt, kt, m)
    check_memory(machine, address["end"])
    generator = np.random.default_rng(seed)
    a = generator.standard_normal((n, k)).astype(np.float32)
    b = generator.standard_normal((k, m)).astype(np.float32)

    def fill(region: Region, x: int, y: int) -> None:
        region.write(x, y, address["A"], a[y * nt : (y + 1) * nt, x * kt : (x + 1) * kt])

    def kernel(code: Code) -> None:
        code.work(machine.timing_frame)
        emit_dense(code, address, nt, kt, m)

    run = _grid(machine, width, height, nt, kt, m, address, b, kernel, fill, forward=True)
    run.result = (run.result.reshape(n, m), a, b)
    return run


def dense_layout(nt: int, kt: int, m: int) -> dict[str, int]:
    address = {"A": 0, "B": align(4 * nt * kt)}
    address["C"] = align(address["B"] + 4 * kt * m)
    address["end"] = address["C"] + 4 * nt * m
    return address


def emit_dense(code: Code, address: dict[str, int], nt: int, kt: int, m: int) -> None:
    R_K, R_JJ, R_AT, R_KT, R_M, R_T = 1, 2, 3, 4, 5, 6
    column_a, column_c = code.memory(address["A"], nt, kt), code.memory(address["C"], nt, m)
    code.li(R_K, 0)
    code.li(R_KT, kt)
    code.li(R_M, m)
    code.li(R_AT, 0)
    with code.loop(R_K, R_KT, section="line"):
        code.mul(R_T, R_K, 4)
        code.set_base(column_a, address["A"], R_T)
        code.li(R_JJ, 0)
        with code.loop(R_JJ, R_M, section="nonzero"):
            code.load_f(0, address["B"], R_AT)
            code.add(R_AT, R_AT, imm=1)
            code.mul(R_T, R_JJ, 4, cycles=2 * code.machine.alu_cycles)
            code.set_base(column_c, address["C"], R_T)
            code.vector("fmac", column_c, column_c, column_a, 0)


def _grid(
    machine: Machine, width: int, height: int, nt: int, kt: int, m: int, address: dict[str, int], b: np.ndarray,
    kernel: Callable[[Code], None], fill: Callable[[Region, int, int], None], forward: bool = False,
) -> Run:  # fmt: skip
    """Columns receive their part of B, compute, rows sum up C into the last column; stamps 0 and 1 frame the kernel.

    `forward`: PEs pass B on to the south themselves inside the timed window, one after the other.
    """
    region = Region(machine, width, height)
    size_b, size_c = kt * m, nt * m
    codes: dict[tuple, int] = {}
    for y in range(height):
        for x in range(width):
            role = (
                min(x, 1) + (x == width - 1) + 3 * (x % 2),
                min(y, 1) + (y == height - 1) + 3 * (y % 2 if forward else 0),
            )
            sends_b = height > 1 and (y == 0 or (forward and y < height - 1))
            receives_b = y > 0
            down, came = (y % 2, 1 - y % 2) if forward else (0, 0)
            east, west = 2 + x % 2, 3 - x % 2
            if role not in codes:
                code = Code(machine)
                memory_b, memory_c = code.memory(address["B"], size_b), code.memory(address["C"], size_c)
                code.task()
                if receives_b:
                    code.vector("move", memory_b, code.fabric_in(0, size_b))
                elif sends_b:
                    code.vector("move", code.fabric_out(2, down, size_b), memory_b)
                code.activate(1)
                code.end()
                code.task()
                code.stamp(0)
                if forward and receives_b and sends_b:
                    code.vector("move", code.fabric_out(2, down, size_b), memory_b)
                kernel(code)
                code.stamp(1)
                code.activate(2)
                code.end()
                code.task()
                arriving = code.fabric_in(1, size_c)
                if width > 1 and x == 0:
                    code.vector("move", code.fabric_out(3, east, size_c), memory_c)
                elif x == width - 1 and x:
                    code.vector("add", memory_c, arriving, memory_c)
                elif width > 1:
                    code.vector("add", code.fabric_out(3, east, size_c), arriving, memory_c)
                code.end()
                codes[role] = region.add(code)
            if forward:
                if sends_b:
                    region.route(x, y, down, "R", "S")
                if receives_b:
                    region.route(x, y, came, "N", "R")
                    region.queue(x, y, came, 0)
            elif height > 1:
                region.route(x, y, 0, "N" if y else "R", ("R" if y else "") + ("S" if y < height - 1 else ""))
                if y:
                    region.queue(x, y, 0, 0)
            if x < width - 1:
                region.route(x, y, east, "R", "E")
            if x:
                region.route(x, y, west, "W", "R")
                region.queue(x, y, west, 1)
            region.load(x, y, codes[role])
            part = b[x * kt : (x + 1) * kt]
            region.write(x, y, address["B"], part if y == 0 else np.zeros_like(part))
            region.write(
                x, y, address["C"], np.zeros(size_c + (address["end"] - address["C"]) // 4 - size_c, np.float32)
            )
            fill(region, x, y)
            region.activate(x, y, 0)
    region.run()
    per_pe = region.stamps(1) - region.stamps(0)
    c = np.concatenate([region.read(width - 1, y, address["C"], size_c) for y in range(height)])
    return Run(int(per_pe.max()), per_pe, c, region)


# ---- dense matrix products on a square grid --------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """Byte layout of one PE's t x t tiles, columns contiguous, `padded` to 16 bytes so that banks do not collide.

    A and B have two buffers each (the tile in use and the one that arrives).
    """

    tile: int
    half: bool
    padded: bool = True

    @property
    def size(self) -> int:
        return 2 if self.half else 4

    @property
    def column(self) -> int:
        return align(self.tile * self.size, 16 if self.padded else 4)

    def a(self, buffer: int) -> int:
        return buffer * self.column * self.tile

    def b(self, buffer: int) -> int:
        return (2 + buffer) * self.column * self.tile

    @property
    def c(self) -> int:
        """One access beyond A's alignment: never in the bank that A is read from."""
        return 4 * self.column * self.tile + (8 if self.half else 4)

    @property
    def end(self) -> int:
        return self.c + self.column * self.tile


def emit_product(code: Code, layout: Product, buffer_a: int, buffer_b: int, descriptors: bool = False) -> None:
    """C += A·B on one PE: for every k and j an AXPY of column k of A into column j of C.

    `descriptors`: as csl-examples' gemm does, which loads its three descriptors for every operation, multiplies out the
    index of b and moves C's descriptor on; else they stay in registers and only base addresses move.
    """
    m, t, size = code.machine, layout.tile, layout.size
    column_a = code.memory(layout.a(buffer_a), t, half=layout.half)
    column_c = code.memory(layout.c, t, half=layout.half)
    R_K, R_J, R_T, R_LIMIT, R_B = 9, 10, 11, 12, 13
    code.li(R_LIMIT, t)
    code.li(R_K, 0)
    with code.loop(R_K, R_LIMIT, section="line"):
        code.mul(R_T, R_K, layout.column)
        code.set_base(column_a, layout.a(buffer_a), R_T)
        code.add(R_B, R_K, 0)
        code.li(R_J, 0)
        with code.loop(R_J, R_LIMIT, section="nonzero"):
            code.load_f(0, layout.b(buffer_b), R_B, half=layout.half)
            code.add(R_B, R_B, imm=layout.column // size)
            if descriptors:
                code.work(m.multiply_cycles + 2 * m.alu_cycles + 4 * m.descriptor_cycles)
                code.mul(R_T, R_J, layout.column, cycles=0)
                code.set_base(column_c, layout.c, R_T, cycles=0)
            else:
                code.mul(R_T, R_J, layout.column, cycles=2 * m.alu_cycles)
                code.set_base(column_c, layout.c, R_T)
            code.vector("fmac", column_c, column_c, column_a, 0)


def check_gemm(machine: Machine, pes: int, n: int, half: bool, padded: bool) -> Product:
    if not 2 <= pes <= min(machine.width, machine.height):
        raise UserError(
            f"a grid of {pes}x{pes} PEs does not fit: 2 to {min(machine.width, machine.height)} on {machine.name}."
        )
    if n < pes:
        raise UserError(f"--n {n} is smaller than the grid's side {pes}: some PEs would have nothing to do.")
    layout = Product(-(-n // pes), half, padded)
    check_memory(machine, layout.end)
    return layout


def _tiles(a: np.ndarray, pes: int, layout: Product) -> np.ndarray:
    """[row, column, k, i]: tiles of a zero-padded matrix, column-major with padded columns."""
    t = layout.tile
    padded = np.zeros((pes * t, pes * t), np.float16 if layout.half else np.float32)
    padded[: a.shape[0], : a.shape[1]] = a
    tiles = padded.reshape(pes, t, pes, t).transpose(0, 2, 3, 1)
    out = np.zeros((pes, pes, t, layout.column // layout.size), padded.dtype)
    out[..., :t] = tiles
    return out


def _collect(
    region: Region, pes: int, layout: Product, n: int, where: Callable[[int, int], tuple[int, int]]
) -> np.ndarray:
    t = layout.tile
    c = np.zeros((pes * t, pes * t), np.float16 if layout.half else np.float32)
    for i in range(pes):
        for j in range(pes):
            x, y = where(i, j)
            tile = region.read(x, y, layout.c, t * layout.column // layout.size, c.dtype).reshape(t, -1)[:, :t]
            c[i * t : (i + 1) * t, j * t : (j + 1) * t] = tile.T
    return c[:n, :n]


def summa(machine: Machine, a: np.ndarray, b: np.ndarray, pes: int, half: bool = False) -> Run:
    """SUMMA as in csl-examples' gemm-collectives_2d: per step, column k's tiles of A run along the rows and row k's tiles
    of B along the columns, then every PE multiplies. Routers switch to where the next root lies."""
    n = a.shape[0]
    layout = check_gemm(machine, pes, n, half, padded=False)
    t = layout.tile
    words = -(-layout.column * t // 4)
    region = Region(machine, pes, pes)
    code = Code(machine)
    R_STEP, R_X, R_Y, R_P = 1, 2, 3, 4
    COMPUTE_LOCAL = [1, 2, 3, 4]  # by where A and B lie
    # The step's task: roles in both directions, then the product waits for both streams.
    step = code.task()
    code.stamp(0)
    code.work(2 * machine.collective_setup)
    for task in COMPUTE_LOCAL:
        code.block(task)
    root_a = code.equal(R_STEP, R_X)
    for a_is_root in (False, True):
        if a_is_root:
            code.patch(root_a)
        root_b = code.equal(R_STEP, R_Y)
        for b_is_root in (False, True):
            if b_is_root:
                code.patch(root_b)
            task = COMPUTE_LOCAL[2 * a_is_root + b_is_root]
            for axis, is_root, here, arrive, r in (
                (0, a_is_root, layout.a(0), layout.a(1), R_X), (1, b_is_root, layout.b(0), layout.b(1), R_Y)
            ):  # fmt: skip
                finish: dict[str, int] = {"activate": task} if axis == 0 else {"unblock": task}
                if is_root:
                    code.switch(axis, 1)
                    code.vector("move", code.fabric_out(2 + axis, axis, words), code.memory(here, words), asynchronous=True, **finish)  # fmt: skip
                else:
                    before = code.less(R_STEP, r)
                    code.switch(axis, 2)
                    after = code.jump()
                    code.patch(before)
                    code.switch(axis, 0)
                    code.patch(after)
                    code.vector("move", code.memory(arrive, words), code.fabric_in(axis, words), asynchronous=True, **finish)  # fmt: skip
            code.end()
    for index, _ in enumerate(COMPUTE_LOCAL):
        code.task()
        code.stamp(1)
        emit_product(code, layout, 0 if index >= 2 else 1, 0 if index % 2 else 1, descriptors=True)
        code.stamp(2)
        code.add(R_STEP, R_STEP, imm=1)
        more = code.less(R_STEP, R_P)
        code.stamp(3)
        code.end()
        code.patch(more)
        code.activate(step)
        code.end()
    loaded = region.add(code)
    tiles_a, tiles_b = _tiles(a, pes, layout), _tiles(b, pes, layout)
    for y in range(pes):
        for x in range(pes):
            for axis, at, low, high in ((0, x, "W", "E"), (1, y, "N", "S")):
                to_low, to_high = (low if at else ""), (high if at < pes - 1 else "")
                root = ("R", to_low + to_high)
                region.route(
                    x, y, axis, *((low, "R" + to_high) if at else root), root, (high, "R" + to_low) if to_high else root
                )  # fmt: skip
                region.queue(x, y, axis, axis)
            region.load(x, y, loaded, [(R_X, x), (R_Y, y), (R_P, pes)])
            region.write(x, y, layout.a(0), tiles_a[y, x])
            region.write(x, y, layout.b(0), tiles_b[y, x])
            region.write(x, y, layout.c, np.zeros(words, np.float32))
            region.activate(x, y, step)
    cycles = region.run()
    product = int((region.stamps(2) - region.stamps(1)).max())
    phases = {"compute": pes * product, "broadcast_step": int((region.stamps(1) - region.stamps(0)).max())}
    return Run(cycles, region.stamps(3), _collect(region, pes, layout, n, lambda i, j: (j, i)), region, phases)


def ring_order(pes: int, interleaved: bool) -> list[int]:
    """Places on a line of the members of a ring: in order with one long way back, or no neighbour beyond two hops."""
    return [*range(0, pes, 2), *reversed(range(1, pes, 2))] if interleaved else list(range(pes))


def ring_colours(order: Sequence[int]) -> list[int]:
    """A colour per member for the way to its predecessor, such that ways of one colour share no router."""
    ways = [sorted((order[i], order[i - 1])) for i in range(len(order))]
    colours = [-1] * len(order)
    for i in sorted(range(len(order)), key=lambda i: ways[i]):
        low, high = ways[i]
        taken = {c for c, (a, b) in zip(colours, ways, strict=True) if c >= 0 and a <= high and low <= b}
        colours[i] = next(c for c in range(len(order)) if c not in taken)
    return colours


def ring_gemm(machine: Machine, a: np.ndarray, b: np.ndarray, pes: int, interleaved: bool, half: bool = False) -> Run:
    """Cannon's algorithm, or MeshGEMM (`interleaved`): tiles of A travel along rows and of B along columns, one ring
    place per step, starting skewed. Cannon multiplies, then shifts; MeshGEMM's ring has no way beyond two hops and its
    shifts run beside the product."""
    n = a.shape[0]
    layout = check_gemm(machine, pes, n, half, padded=True)
    t = layout.tile
    words = -(-layout.column * t // 4)
    order = ring_order(pes, interleaved)
    colours = ring_colours(order)
    region = Region(machine, pes, pes)
    R_STEP, R_P = 1, 4
    tiles_a, tiles_b = _tiles(a, pes, layout), _tiles(b, pes, layout)
    loaded: dict[tuple[int, int], int] = {}
    for i in range(pes):
        for j in range(pes):
            key = (colours[j], colours[i])
            if key not in loaded:
                code = Code(machine)
                _emit_ring(code, layout, words, colours[j], 8 + colours[i], interleaved, R_STEP, R_P)
                loaded[key] = region.add(code)
    for axis in (0, 1):
        for member in range(pes):
            u, v = order[member], order[member - 1]
            colour, toward = 8 * axis + colours[member], ("WE", "NS")[axis][v > u]
            back = {"W": "E", "E": "W", "N": "S", "S": "N"}[toward]
            for line in range(pes):
                for at in range(u, v + (1 if v > u else -1), 1 if v > u else -1):
                    x, y = (at, line) if axis == 0 else (line, at)
                    region.route(x, y, colour, "R" if at == u else back, "R" if at == v else toward)
                    if at == v:
                        region.queue(x, y, colour, axis)
    for i in range(pes):
        for j in range(pes):
            x, y = order[j], order[i]
            region.load(x, y, loaded[colours[j], colours[i]], [(R_P, pes)])
            region.write(x, y, layout.a(0), tiles_a[i, (i + j) % pes])
            region.write(x, y, layout.b(0), tiles_b[(i + j) % pes, j])
            region.write(x, y, layout.a(1), np.zeros(words, np.float32))
            region.write(x, y, layout.b(1), np.zeros(words, np.float32))
            region.write(x, y, layout.c, np.zeros(words, np.float32))
            region.activate(x, y, 0)
    cycles = region.run()
    product = int((region.stamps(2) - region.stamps(1)).max())
    result = _collect(region, pes, layout, n, lambda i, j: (order[j], order[i]))
    return Run(cycles, region.stamps(3), result, region, {"compute": pes * product})


def _emit_ring(
    code: Code, layout: Product, words: int, colour_a: int, colour_b: int, overlap: bool, step: int, pes: int
) -> None:
    """Even steps work on buffer 0 and receive into 1, odd steps the other way round: task 5·parity starts a step, the
    next four join its streams one by one (tasks have no counters), the last one starts the next step."""
    for parity in (0, 1):
        first = 5 * parity
        outs = [code.fabric_out(2, colour_a, words), code.fabric_out(3, colour_b, words)]
        ins = [code.fabric_in(0, words), code.fabric_in(1, words)]
        here = [code.memory(layout.a(parity), words), code.memory(layout.b(parity), words)]
        other = [code.memory(layout.a(1 - parity), words), code.memory(layout.b(1 - parity), words)]

        def shift(first: int = first, outs: Any = outs, ins: Any = ins, here: Any = here, other: Any = other) -> None:
            for join in range(1, 5):
                code.block(first + join)
            for axis in (0, 1):
                code.vector("move", outs[axis], here[axis], asynchronous=True, unblock=first + 1 + 2 * axis)
                code.vector("move", other[axis], ins[axis], asynchronous=True, unblock=first + 2 + 2 * axis)
            code.activate(first + 1)

        code.task()
        if overlap:
            shift()
        code.stamp(1)
        emit_product(code, layout, parity, parity)
        code.stamp(2)
        code.add(step, step, imm=1)
        if not overlap:
            more = code.less(step, pes)
            code.stamp(3)
            code.end()
            code.patch(more)
            shift()
        code.end()
        for join in range(1, 5):
            code.task()
            if join < 4:
                code.activate(first + join + 1)
            else:
                if overlap:
                    more = code.less(step, pes)
                    code.stamp(3)
                    code.end()
                    code.patch(more)
                code.activate(5 - first)
            code.end()


# ---- dense matrix x vector -------------------------------------------------------------------------------------------


def tree(pes: int) -> tuple[list[int], list[int]]:
    """A two-level tree on a line: groups of about sqrt(pes), and per PE the root of its group; the group roots."""
    size = max(1, round(pes**0.5))
    roots = [min(g + size // 2, pes - 1) for g in range(0, pes, size)]
    return [roots[y // size] for y in range(pes)], roots


def mesh_gemv(machine: Machine, a: np.ndarray, v: np.ndarray, pes: int, half: bool = True) -> Run:
    """y = A·v: tiles of A on pes x pes PEs (x splits the rows of A, y its columns), a local product per PE, then an
    all-reduce down the columns: groups inwards from both ends, their roots likewise, and a multicast back."""
    n = a.shape[0]
    if not 2 <= pes <= min(machine.width, machine.height):
        raise UserError(
            f"a grid of {pes}x{pes} PEs does not fit: 2 to {min(machine.width, machine.height)} on {machine.name}."
        )
    t = -(-n // pes)
    dtype = np.float16 if half else np.float32
    size = 2 if half else 4
    column = align(t * size)
    at_v, at_y = column * t, align(column * t + column) + (8 if half else 4)
    check_memory(machine, at_y + column)
    region = Region(machine, pes, pes)
    root_of, roots = tree(pes)
    top = roots[len(roots) // 2]
    padded = np.zeros((pes * t, pes * t), dtype)
    padded[:n, :n] = a
    vector = np.zeros(pes * t, dtype)
    vector[:n] = v

    def emit(y: int) -> Code:
        code = Code(machine)
        acc = code.memory(at_y, t, half=half)
        code.task()
        code.stamp(0)
        emit_gemv(code, t, column, at_v, at_y, half)
        for level, (members, center) in enumerate(
            (([z for z in range(pes) if root_of[z] == root_of[y]], root_of[y]), (roots, top))
        ):
            if y not in members:
                continue
            code.activate(len(code.entry))
            code.end()
            code.task()
            north, south = code.fabric_in(2 * level, t, half), code.fabric_in(2 * level + 1, t, half)
            if y == center:
                if members[0] < y:
                    code.vector("add", acc, north, acc)
                if members[-1] > y:
                    code.vector("add", acc, south, acc)
            else:
                colour = _tree_colour(level, members.index(y), y < center)
                end = y in (members[0], members[-1])
                sending = code.fabric_out(2 * level, colour, t, half)
                code.vector(
                    "move" if end else "add", sending, *((acc,) if end else ((north if y < center else south), acc))
                )
        code.activate(len(code.entry))
        code.end()
        code.task()
        if y == top:
            code.vector("move", code.fabric_out(4, 8, t, half), acc)
        else:
            code.vector("move", acc, code.fabric_in(4, t, half))
        code.stamp(1)
        code.end()
        return code

    codes: dict[tuple, int] = {}
    for y in range(pes):
        group = [z for z in range(pes) if root_of[z] == root_of[y]]
        place = roots.index(y) if y in roots else -1
        key = (
            y == root_of[y], y == top, y < root_of[y], y in (group[0], group[-1]), group.index(y) % 2, len(group) > 1,
            group[0] < y, group[-1] > y, y < top, y in (roots[0], roots[-1]), place % 2 if place >= 0 else -1,
        )  # fmt: skip
        if key not in codes:
            codes[key] = region.add(emit(y))
        for x in range(pes):
            for level, members, center in ((0, group, root_of[y]), (1, roots, top)):
                _tree_routes(region, x, y, level, members, center)
            back = ("S" if y < pes - 1 else "", "N" if y else "")
            if y == top:
                region.route(x, y, 8, "R", "".join(back))
            else:
                region.route(x, y, 8, "N" if y > top else "S", "R" + (back[0] if y > top else back[1]))
                region.queue(x, y, 8, 4)
            region.load(x, y, codes[key])
            tile = np.zeros((t, column // size), dtype)
            tile[:, :t] = padded[x * t : (x + 1) * t, y * t : (y + 1) * t].T
            region.write(x, y, 0, tile)
            region.write(x, y, at_v, vector[y * t : (y + 1) * t])
            region.write(x, y, at_y, np.zeros(column // size, dtype))
            region.activate(x, y, 0)
    cycles = region.run()
    result = np.stack(
        [np.concatenate([region.read(x, y, at_y, t, dtype) for x in range(pes)])[:n] for y in (0, pes - 1)]
    )
    if not np.array_equal(result[0], result[1]):
        raise RuntimeError("the all-reduce left different sums in one column.")
    return Run(cycles, region.stamps(1), result[0], region)


def emit_gemv(code: Code, t: int, column: int, at_v: int, at_y: int, half: bool) -> None:
    R_K, R_T, R_LIMIT = 1, 2, 3
    acc, column_a = code.memory(at_y, t, half=half), code.memory(0, t, half=half)
    code.li(R_LIMIT, t)
    code.li(R_K, 0)
    with code.loop(R_K, R_LIMIT, section="line"):
        code.load_f(0, at_v, R_K, half=half)
        code.mul(R_T, R_K, column, cycles=2 * code.machine.alu_cycles)
        code.set_base(column_a, 0, R_T)
        code.vector("fmac", acc, acc, column_a, 0)


def _tree_colour(level: int, place: int, southward: bool) -> int:
    return 4 * level + 2 * (not southward) + place % 2


def _tree_routes(region: Region, x: int, y: int, level: int, members: list[int], center: int) -> None:
    """Routes of one level through (x, y): from a member to the next towards the centre, passing what lies between."""
    for place, member in enumerate(members):
        if member == center:
            continue
        southward = member < center
        target = members[place + (1 if southward else -1)]
        low, high = min(member, target), max(member, target)
        if not low <= y <= high:
            continue
        colour = _tree_colour(level, place, southward)
        rx = "R" if y == member else "N" if southward else "S"
        tx = "R" if y == target else "S" if southward else "N"
        region.route(x, y, colour, rx, tx)
        if y == target:
            region.queue(x, y, colour, 2 * level + (not southward))


# ---- weight streaming ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """How a layer lies on the region: `columns` split the features, `rows` the tokens; fp16."""

    columns: int
    rows: int
    features: int  # streamed against, of all columns
    outputs: int
    tokens: int

    def __post_init__(self) -> None:
        if self.columns < 2 or self.features % self.columns or self.tokens % self.rows or self.tokens // self.rows % 4:
            raise UserError(
                f"{self.columns} columns must be at least 2 and divide {self.features} features, {self.rows} rows divide "
                f"{self.tokens} tokens into multiples of 4."
            )

    @property
    def local(self) -> int:
        """Tokens of a PE."""
        return self.tokens // self.rows

    @property
    def block(self) -> int:
        """Features of a column."""
        return self.features // self.columns


def _weights(w: np.ndarray, mask: np.ndarray, columns: slice) -> tuple[np.ndarray, np.ndarray]:
    """Wavelets (16-bit value, 16-bit index) of a column's kept weights, a command wavelet at the end of every row."""
    words, flags = [], []
    for row, kept in zip(w[:, columns], mask[:, columns], strict=True):
        index = np.flatnonzero(kept).astype(np.uint32)
        words.append(
            np.append(row[index].astype(np.float16).view(np.uint16).astype(np.uint32) << 16 | index, np.uint32(0))
        )
        flags.append(np.append(np.zeros(len(index), np.uint8), np.uint8(1)))
    return np.concatenate(words), np.concatenate(flags)


def stream_layer(machine: Machine, w: np.ndarray, mask: np.ndarray, x: np.ndarray, columns: int, rows: int) -> Run:
    """y = W·x in fp16 with the kept weights of W [outputs, features] streamed past the activations x [features, tokens].

    The forward product; with W transposed and x the output's gradient, the delta. Every weight wavelet triggers an AXPY
    on its feature's tokens; a row's command wavelet starts the sum around the ring of columns, beside the next row's
    AXPYs; it ends in the column that owns the output.
    """
    outputs, features = w.shape
    s = Stream(columns, rows, features, outputs, x.shape[1])
    n = s.local
    per_owner = -(-outputs // columns)
    at_acc = align(2 * s.block * n) + 8  # one access away from the features' banks
    at_y = align(at_acc + 4 * n)
    check_memory(machine, at_y + 2 * per_owner * n)
    order = ring_order(columns, True)
    colours = [2 + c for c in ring_colours(order)]
    region = Region(machine, columns, rows)
    codes = {colour: region.add(_stream_code(machine, s, at_acc, at_y, colour)) for colour in set(colours)}
    _ring_routes(region, order, colours)
    x16 = x.astype(np.float16)
    for member, px in enumerate(order):
        for py in range(rows):
            region.route(px, py, 0, "N", "R" + ("S" if py < rows - 1 else ""))
            region.queue(px, py, 0, 0)
            region.bind(px, py, 0, 0)
            region.bind(px, py, 0, 1, control=True)
            region.load(px, py, codes[colours[member]], [(3, member), (5, columns - 1), (6, columns), (8, 2 * n)])
            region.write(px, py, 0, x16[px * s.block : (px + 1) * s.block, py * n : (py + 1) * n])
            region.write(px, py, at_acc, np.zeros(2 * n, np.float16))
            region.write(px, py, at_y, np.zeros(per_owner * n, np.float16))
        values, control = _weights(w, mask, slice(px * s.block, (px + 1) * s.block))
        region.source(px, 0, "N", 0, values, control)
    cycles = region.run()
    y = np.zeros((columns * per_owner, s.tokens), np.float16)
    for member, px in enumerate(order):
        for py in range(rows):
            y[-member % columns :: columns, py * n : (py + 1) * n] = region.read(
                px, py, at_y, per_owner * n, np.float16
            ).reshape(per_owner, n)
    return Run(cycles, region.stats["busy"], y[:outputs], region)


def _ring_routes(region: Region, order: Sequence[int], colours: Sequence[int]) -> None:
    for member, u in enumerate(order):
        v = order[member - 1]
        way = range(u, v + (1 if v > u else -1), 1 if v > u else -1)
        back, toward = ("W", "E") if v > u else ("E", "W")
        for py in range(region.height):
            for px in way:
                region.route(px, py, colours[member], "R" if px == u else back, "R" if px == v else toward)
            region.queue(v, py, colours[member], 1)


def _stream_code(machine: Machine, s: Stream, at_acc: int, at_y: int, colour: int) -> Code:
    """Registers: r2 the row's owner, r3 this member, r5 the owner's predecessor (which starts), r7 and r8 offsets of the
    sum in use and of the other one, r9 of the next own output."""
    n = s.local
    R_INDEX, R_OWNER, R_ME, R_FIRST, R_COLUMNS, R_HERE, R_OTHER, R_Y, R_T = 1, 2, 3, 5, 6, 7, 8, 9, 10
    code = Code(machine)
    features, acc = code.memory(0, n, half=True), code.memory(at_acc, n, half=True)
    out, arriving, y = code.fabric_out(2, colour, n, True), code.fabric_in(1, n, True), code.memory(at_y, n, half=True)
    code.task(machine.trigger_cycles)  # a weight: all of it hardware, but for the AXPY's elements
    code.unpack(0, R_INDEX)
    code.mul(R_INDEX, R_INDEX, 2 * n, cycles=0)
    code.set_base(features, 0, R_INDEX, cycles=0)
    code.set_base(acc, at_acc, R_HERE, cycles=0)
    code.vector("fmac", acc, acc, features, 0, startup=0)
    code.end()
    code.task(machine.reduce_startup)  # the command: this row's sum sets out, the next row begins
    with code.section("command"):
        code.block(1)
        code.set_base(acc, at_acc, R_HERE)
        final = code.equal(R_OWNER, R_ME)
        first = code.equal(R_FIRST, R_ME)
        code.vector("add", out, arriving, acc, asynchronous=True, unblock=1)
        on = [code.jump()]
    code.patch(final)
    code.set_base(y, at_y, R_Y)
    code.add(R_Y, R_Y, imm=2 * n)
    code.vector("add", y, arriving, acc, asynchronous=True, unblock=1)
    on.append(code.jump())
    code.patch(first)
    code.vector("move", out, acc, asynchronous=True, unblock=1)
    for jump in on:
        code.patch(jump)
    with code.section("command"):
        code.add(R_T, R_HERE, 0)
        code.add(R_HERE, R_OTHER, 0)
        code.add(R_OTHER, R_T, 0)
        code.set_base(acc, at_acc, R_HERE)
        code.vector("fill", acc, scalar=1)
        # The ring's sums travel towards lower members, and so does ownership: the next row starts one place further on.
        code.add(R_OWNER, R_FIRST, 0)
        wraps = code.equal(R_FIRST, 0)
        code.add(R_FIRST, R_FIRST, imm=-1)
    code.end()
    code.patch(wraps)
    code.add(R_FIRST, R_COLUMNS, imm=-1)
    code.end()
    return code


def stream_gradient(machine: Machine, mask: np.ndarray, dy: np.ndarray, x: np.ndarray, columns: int, rows: int) -> Run:
    """dW = dy·xᵀ at kept positions only, in fp32 sums of fp16 products, streamed out at the south.

    dy [outputs, tokens] lies where the forward product left it; each of its rows is sent along the PEs' rows, the
    positions of kept weights come in like weights do, each triggers a dot over the local tokens, and at the end of a
    row the columns add up. (An assumption: no text describes the vendor's weight gradient.)
    """
    outputs, features = mask.shape
    s = Stream(columns, rows, features, outputs, x.shape[1])
    n, per_owner = s.local, -(-outputs // columns)
    at_buffer = align(2 * s.block * n) + 8
    at_dy = align(at_buffer + 2 * n) + 8
    at_sums = align(at_dy + 2 * n * per_owner)
    at_order = align(at_sums + 4 * s.block)
    check_memory(machine, at_order + 4 * columns)
    order = np.asarray(ring_order(columns, True), np.int32)
    region = Region(machine, columns, rows)
    codes = {}
    x16, dy16 = x.astype(np.float16), np.zeros((columns * per_owner, s.tokens), np.float16)
    dy16[:outputs] = dy
    for member, px in enumerate(order.tolist()):
        for py in range(rows):
            role = (py % 2, py > 0, py < rows - 1)
            if role not in codes:
                codes[role] = region.add(_gradient_code(machine, s, at_buffer, at_dy, at_sums, at_order, *role))
            region.route(px, py, 0, "N", "R" + ("S" if py < rows - 1 else ""))
            region.queue(px, py, 0, 0)
            region.bind(px, py, 0, 1)
            region.bind(px, py, 0, 2, control=True)
            west, east = ("W" if px else ""), ("E" if px < columns - 1 else "")
            root = ("R", west + east)
            region.route(px, py, 1, *(("W", "R" + east) if west else root), root, ("E", "R" + west) if east else root)
            region.queue(px, py, 1, 1)
            region.route(px, py, 2 + py % 2, "R", "S")
            if py:
                region.route(px, py, 3 - py % 2, "N", "R")
                region.queue(px, py, 3 - py % 2, 2)
            region.load(px, py, codes[role], [(3, px), (6, columns), (5, outputs)])
            region.block(px, py, 1)
            region.block(px, py, 2)
            region.write(px, py, 0, x16[px * s.block : (px + 1) * s.block, py * n : (py + 1) * n])
            region.write(px, py, at_buffer, np.zeros(n, np.float16))
            region.write(px, py, at_dy, dy16[-member % columns :: columns, py * n : (py + 1) * n])
            region.write(px, py, at_sums, np.zeros(s.block, np.float32))
            region.write(px, py, at_order, np.roll(order[::-1], 1))  # owners of rows 0, 1, ...
            region.activate(px, py, 0)
        values, control = _weights(np.zeros_like(mask, np.float16), mask, slice(px * s.block, (px + 1) * s.block))
        region.source(px, 0, "N", 0, values, control)
        region.sink(px, rows - 1, "S", 2 + (rows - 1) % 2)
    cycles = region.run()
    gradient = np.zeros((outputs, features), np.float32)
    for px in range(columns):
        block = slice(px * s.block, (px + 1) * s.block)
        _, words = region.sunk(px, rows - 1, "S", 2 + (rows - 1) % 2)
        part = np.zeros((outputs, s.block), np.float32)
        part[mask[:, block]] = words.view(np.float32)
        gradient[:, block] = part
    return Run(cycles, region.stats["busy"], gradient, region)


def _gradient_code(
    machine: Machine,
    s: Stream,
    at_buffer: int,
    at_dy: int,
    at_sums: int,
    at_order: int,
    odd: int,
    above: bool,
    below: bool,
) -> Code:
    """Registers: r2 the row's owner, r3 this column, r9 offset of the next own row of dy, r11 rows done, r12 sums made."""
    n = s.local
    R_INDEX, R_OWNER, R_ME, R_ROWS, R_COLUMNS, R_AT, R_Y, R_DONE, R_SUMS = 1, 2, 3, 5, 6, 7, 9, 11, 12
    code = Code(machine)
    features, buffer = code.memory(0, n, half=True), code.memory(at_buffer, n, half=True)
    own, dot_with = code.memory(at_dy, n, half=True), code.memory(at_buffer, n, half=True)
    sums, from_north = code.memory(at_sums, 0), code.fabric_in(2, 0)
    south = code.fabric_out(3, 2 + odd, 0)
    code.task()  # a row: its dy arrives, or sets out from here
    with code.section("row"):
        code.load(R_AT, at_order, R_OWNER)
        mine = code.equal(R_AT, R_ME)
        before = code.less(R_AT, R_ME)
        code.switch(1, 2)
        after = code.jump()
        code.patch(before)
        code.switch(1, 0)
        code.patch(after)
    code.set_base(dot_with, at_buffer, 0)
    code.vector("move", buffer, code.fabric_in(1, n, True), asynchronous=True, activate=3)
    code.end()
    code.patch(mine)
    code.switch(1, 1)
    code.set_base(own, at_dy, R_Y)
    code.set_base(dot_with, at_dy, R_Y)
    code.add(R_Y, R_Y, imm=2 * n)
    code.vector("move", code.fabric_out(2, 1, n, True), own, asynchronous=True, activate=3)
    code.end()
    code.task(machine.trigger_cycles)  # a kept position
    code.unpack(0, R_INDEX)
    code.mul(R_INDEX, R_INDEX, 2 * n, cycles=0)
    code.set_base(features, 0, R_INDEX, cycles=0)
    code.vector("dot", features, features, dot_with, 1, startup=0)
    code.store_f(1, at_sums, R_SUMS, cycles=0)
    code.add(R_SUMS, R_SUMS, imm=1, cycles=0)
    code.end()
    code.task(machine.reduce_startup)  # the row's end: add up down the column, go on to the next row
    with code.section("command"):
        for dsr in (sums, from_north, south):
            code.set_length(dsr, R_SUMS)
        code.li(R_SUMS, 0)
        for task in (0, 1, 2):
            code.block(task)
        code.vector(
            "add" if above else "move", south, *((from_north, sums) if above else (sums,)), asynchronous=True, unblock=0
        )
        code.add(R_OWNER, R_OWNER, imm=1)
        wrapped = code.less(R_OWNER, R_COLUMNS)
    code.li(R_OWNER, 0)
    code.patch(wrapped)
    with code.section("command"):
        code.add(R_DONE, R_DONE, imm=1)
        more = code.less(R_DONE, R_ROWS)
    code.end()
    code.patch(more)
    code.activate(0)
    code.end()
    code.task()  # dy is here
    with code.section("ready"):
        code.unblock(1)
        code.unblock(2)
    code.end()
    return code
