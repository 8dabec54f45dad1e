"""Dense matrix products on a square grid: SUMMA, Cannon, MeshGEMM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vspdf.errors import UserError
from vspdf.simulator.events.fabric import Code, Region
from vspdf.simulator.events.programs.common import Outcome, align, check_memory
from vspdf.simulator.machine import Machine


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
        return 4 * self.column * self.tile

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
        raise UserError(f"`n` {n} is smaller than the grid's side {pes}: some PEs would have nothing to do.")
    layout = Product(-(-n // pes), half, padded)
    check_memory(machine, layout.end + 8, "a larger `grid` or a smaller `n`")
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


def summa(machine: Machine, a: np.ndarray, b: np.ndarray, pes: int, half: bool = False) -> Outcome:
    """SUMMA: per step, column k's tiles of A run along the rows and row k's tiles of B along the columns, then every PE
    multiplies. Routers switch to where the next root lies."""
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
                if is_root:
                    code.switch(axis, 1)
                    dst, src = code.fabric_out(2 + axis, axis, words), code.memory(here, words)
                else:
                    before = code.less(R_STEP, r)
                    code.switch(axis, 2)
                    after = code.jump()
                    code.patch(before)
                    code.switch(axis, 0)
                    code.patch(after)
                    dst, src = code.memory(arrive, words), code.fabric_in(axis, words)
                ends = (task, -1) if axis == 0 else (-1, task)
                code.vector("move", dst, src, asynchronous=True, activate=ends[0], unblock=ends[1])
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
    region.conserve_fmacs((pes * t) ** 3)
    product = int((region.stamps(2) - region.stamps(1)).max())
    phases = {"compute": pes * product, "broadcast_step": int((region.stamps(1) - region.stamps(0)).max())}
    return Outcome(cycles, region.stamps(3), _collect(region, pes, layout, n, lambda i, j: (j, i)), region, phases)


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


def ring_gemm(
    machine: Machine, a: np.ndarray, b: np.ndarray, pes: int, interleaved: bool, half: bool = False
) -> Outcome:
    """Cannon's algorithm, or MeshGEMM (`interleaved`): tiles of A travel along rows and of B along columns, one ring
    place per step, starting skewed.

    Cannon multiplies, rotates A and rotates B in lock step, as the textbook has it: a rotation is over when the tile of
    the first PE has come all the way back to the last, which tells its row or column by a multicast of one wavelet.
    MeshGEMM's ring has no way beyond two hops, so nobody waits for anyone but its neighbours, and its shifts run
    beside the product.
    """
    n = a.shape[0]
    layout = check_gemm(machine, pes, n, half, padded=True)
    t = layout.tile
    words = -(-layout.column * t // 4)
    order = ring_order(pes, interleaved)
    colours = ring_colours(order)
    region = Region(machine, pes, pes)
    tiles_a, tiles_b = _tiles(a, pes, layout), _tiles(b, pes, layout)
    loaded: dict[tuple[int, ...], int] = {}
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
            key = (colours[j], colours[i], x == pes - 1, y == pes - 1)
            if key not in loaded:
                code = Code(machine)
                _emit_ring(code, layout, words, (colours[j], 8 + colours[i]), interleaved, (x == pes - 1, y == pes - 1))
                loaded[key] = region.add(code)
            if not interleaved:
                for axis, at, low, high in ((0, x, "W", "E"), (1, y, "N", "S")):
                    colour = _OVER + 8 * axis
                    region.route(
                        x,
                        y,
                        colour,
                        "R" if at == pes - 1 else high,
                        ("R" if at < pes - 1 else "") + (low if at else ""),
                    )
                    if at < pes - 1:
                        region.queue(x, y, colour, 4 + axis)
            region.load(x, y, loaded[key], [(_R_P, pes)])
            region.write(x, y, layout.a(0), tiles_a[i, (i + j) % pes])
            region.write(x, y, layout.b(0), tiles_b[(i + j) % pes, j])
            region.write(x, y, layout.a(1), np.zeros(words, np.float32))
            region.write(x, y, layout.b(1), np.zeros(words, np.float32))
            region.write(x, y, layout.c, np.zeros(words, np.float32))
            region.write(x, y, layout.end, np.zeros(2, np.float32))
            region.activate(x, y, 0)
    cycles = region.run()
    region.conserve_fmacs((pes * t) ** 3)
    product = int((region.stamps(2) - region.stamps(1)).max())
    result = _collect(region, pes, layout, n, lambda i, j: (order[j], order[i]))
    return Outcome(cycles, region.stamps(3), result, region, {"compute": pes * product})


_R_STEP, _R_P = 1, 4
_OVER = 5  # the colour that says that a rotation is over, + 8 along columns


def _emit_ring(
    code: Code, layout: Product, words: int, colours: tuple[int, int], overlap: bool, last: tuple[bool, bool]
) -> None:
    """Even steps work on buffer 0 and receive into 1, odd steps the other way round. The first task of either parity
    starts a step; those after it join what the step waits for, one by one (tasks have no counters); the last one
    starts the next step."""
    joins = 4 if overlap else 6
    for parity in (0, 1):
        first = (joins + 1) * parity
        outs = [code.fabric_out(2, colours[0], words), code.fabric_out(3, colours[1], words)]
        ins = [code.fabric_in(0, words), code.fabric_in(1, words)]
        here = [code.memory(layout.a(parity), words), code.memory(layout.b(parity), words)]
        other = [code.memory(layout.a(1 - parity), words), code.memory(layout.b(1 - parity), words)]
        note = [code.memory(layout.end + 4 * axis, 1) for axis in (0, 1)]

        def shift(axis: int, join: int, moves: Any = (outs, here, other, ins)) -> None:
            """One tile leaves, one arrives: tasks `join` and the next wait for that."""
            out, mine, next_, came = (each[axis] for each in moves)
            code.block(join)
            code.block(join + 1)
            code.vector("move", out, mine, asynchronous=True, unblock=join)
            code.vector("move", next_, came, asynchronous=True, unblock=join + 1)

        def over(axis: int, join: int, note: Any = note) -> None:
            """The rotation along this axis: the last PE says that it is over, the others wait for that."""
            code.block(join)
            if last[axis]:
                sending = code.fabric_out(4 + axis, _OVER + 8 * axis, 1)
                code.vector("move", sending, note[axis], asynchronous=True, unblock=join)
            else:
                code.vector("move", note[axis], code.fabric_in(4 + axis, 1), asynchronous=True, unblock=join)

        def finish() -> None:
            more = code.less(_R_STEP, _R_P)
            code.stamp(3)
            code.end()
            code.patch(more)

        code.task()
        if overlap:
            shift(0, first + 1)
            shift(1, first + 3)
            code.activate(first + 1)
        code.stamp(1)
        emit_product(code, layout, parity, parity)
        code.stamp(2)
        code.add(_R_STEP, _R_STEP, imm=1)
        if not overlap:
            finish()
            shift(0, first + 1)
            code.activate(first + 1)
        code.end()
        for join in range(1, joins + 1):
            code.task()
            if not overlap and join == 3:  # the rows are through: now the columns
                shift(1, first + 4)
            if not overlap and join in (2, 5):
                over(join // 3, first + join + 1)
            if overlap and join == joins:
                finish()
            code.activate(first + join + 1 if join < joins else joins + 1 - first)
            code.end()
