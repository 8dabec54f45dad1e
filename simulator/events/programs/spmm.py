"""Sparse x dense in fp32, one AXPY per non-zero, and the dense product by the same flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vspdf.errors import UserError, did_you_mean
from vspdf.simulator.events.fabric import Code, Region
from vspdf.simulator.events.programs.common import Outcome, align, check_memory
from vspdf.simulator.machine import Machine

FORMATS = ("coo", "csc", "csr", "ellpack")
SMALLER = "a larger `grid` or fewer columns `m`"  # of what does not fit into a PE


@dataclass(frozen=True)
class Tile:
    """A PE's part of the sparse matrix, in the order in which its kernel reads it."""

    rows: np.ndarray  # int32
    cols: np.ndarray  # int32
    values: np.ndarray  # float32


def emit_spmm(code: Code, fmt: str, address: dict[str, int], nt: int, kt: int, m: int, stored: int, slots: int) -> None:
    """Emits the kernel C += A·B of one PE; `costs` of the code then hold cycles per non-zero and per row or column.

    `stored`: non-zeros that are processed; `slots`: of a row (ELLPACK). Row length m includes padding: rows of C lie
    one word after those of B, so that both never fall into the same bank group when m is a multiple of four.
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


def tile_counts(mask: np.ndarray, width: int, height: int, fmt: str, nnz_per_pe: int | None) -> tuple[np.ndarray, int]:
    """Non-zeros of every PE's tile [height, width], and slots of a row (ELLPACK, else 0).

    With `nnz_per_pe` the fullest PE has exactly so many and no other more.
    """
    n, k = mask.shape
    counts = mask.reshape(height, n // height, width, k // width).sum((1, 3))
    if fmt == "ellpack":
        fullest_row = int(mask.reshape(n, width, k // width).sum(2).max())
        return counts, max(1, fullest_row if nnz_per_pe is None else -(-nnz_per_pe // (n // height)))
    if nnz_per_pe is not None:
        fullest = np.unravel_index(int(counts.argmax()), counts.shape)
        counts = np.minimum(counts, nnz_per_pe)
        counts[fullest] = nnz_per_pe
    return counts, 0


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
    counts, slots = tile_counts(mask, width, height, fmt, nnz_per_pe)
    for y in range(height):
        row = []
        for x in range(width):
            part = mask[y * nt : (y + 1) * nt, x * kt : (x + 1) * kt].copy()
            if (excess := int(part.sum()) - int(counts[y, x])) != 0:
                flat = part.reshape(-1)
                change = generator.permutation(np.flatnonzero(flat == (excess > 0)))[: abs(excess)]
                flat[change] = ~flat[change]
            if fmt == "csc":
                cols, rows = np.nonzero(part.T)
            else:
                rows, cols = np.nonzero(part)
            values = generator.standard_normal(len(rows)).astype(np.float32)
            row.append(Tile(rows.astype(np.int32), cols.astype(np.int32), values))
        tiles.append(row)
    stored = nt * slots if fmt == "ellpack" else max(1, int(counts.max()))
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
        raise UserError(f"`n` {n} must be a multiple of the grid's height {height}, `k` {k} of its width {width}.")
    return n // height, k // width


def spmm(
    machine: Machine,
    fmt: str,
    mask: np.ndarray,
    m: int,
    width: int,
    height: int,
    nnz_per_pe: int | None = None,
    seed: int = 0,
) -> Outcome:
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
    check_memory(machine, address["end"], SMALLER)
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
    processed = {"coo": stored * width * height, "ellpack": nt * slots * width * height}
    kept = sum(len(tile.values) for line in tiles for tile in line)
    run.region.conserve_fmacs(processed.get(fmt, kept) * m)
    # A row of C starts one word late; what lands beyond its end is 0 (B's padding).
    run.result = (run.result.reshape(n, m)[:, 1:], a, b[:, :-1])
    return run


def dense(machine: Machine, n: int, k: int, m: int, width: int, height: int, seed: int = 0) -> Outcome:
    """C = A·B in fp32, all dense, by the same flow: for every element of B one AXPY down a column of A and of C.

    A is stored [Nt, Kt] and C [Nt, m] row by row, so both columns are strided: what the banks make of that is theirs.
    """
    nt, kt = check_spmm(machine, width, height, n, k, m)
    address = dense_layout(nt, kt, m)
    check_memory(machine, address["end"], SMALLER)
    generator = np.random.default_rng(seed)
    a = generator.standard_normal((n, k)).astype(np.float32)
    b = generator.standard_normal((k, m)).astype(np.float32)

    def fill(region: Region, x: int, y: int) -> None:
        region.write(x, y, address["A"], a[y * nt : (y + 1) * nt, x * kt : (x + 1) * kt])

    def kernel(code: Code) -> None:
        code.work(machine.timing_frame)
        emit_dense(code, address, nt, kt, m)

    run = _grid(machine, width, height, nt, kt, m, address, b, kernel, fill, forward=True)
    run.region.conserve_fmacs(n * k * m)
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
) -> Outcome:  # fmt: skip
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
    return Outcome(int(per_pe.max()), per_pe, c, region, window=(0, 1))
