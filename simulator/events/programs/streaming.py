"""A weight-streaming layer: forward and grad_input, and grad_values at kept positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vspdf.errors import UserError
from vspdf.simulator.events.fabric import Code, Region
from vspdf.simulator.events.programs.common import Outcome, align, check_memory
from vspdf.simulator.events.programs.matmul import ring_colours, ring_order
from vspdf.simulator.machine import Machine


@dataclass(frozen=True)
class Stream:
    """The way that a layer lies on a region: `columns` split the features, `rows` the tokens; fp16."""

    columns: int
    rows: int
    features: int  # streamed against, of all columns
    outputs: int
    tokens: int

    def __post_init__(self) -> None:
        if self.columns < 2 or self.features % self.columns or self.tokens % self.rows or self.tokens // self.rows % 4:
            raise UserError(
                f"{self.columns} columns must be at least 2 and divide {self.features} features, {self.rows} rows must "
                f"divide {self.tokens} tokens into multiples of 4."
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


def stream_layout(s: Stream) -> tuple[int, int]:
    """Byte addresses of both sums and of the outputs; features start at 0."""
    at_acc = align(2 * s.block * s.local)
    return at_acc, align(at_acc + 4 * s.local)


def gradient_layout(s: Stream) -> tuple[int, int, int, int]:
    """Byte addresses of the row of dy that came in, of the own rows, of a row's sums and of the owners' order."""
    at_buffer = align(2 * s.block * s.local) + 8
    at_dy = align(at_buffer + 2 * s.local) + 8
    at_sums = align(at_dy + 2 * s.local * -(-s.outputs // s.columns))
    return at_buffer, at_dy, at_sums, align(at_sums + 4 * s.block)


def stream_layer(machine: Machine, w: np.ndarray, mask: np.ndarray, x: np.ndarray, columns: int, rows: int) -> Outcome:
    """y = W·x in fp16: the kept weights of W [outputs, features] stream past the activations x [features, tokens].

    The forward product; with W transposed and x the output's gradient, grad_input. Every weight wavelet triggers an
    on its feature's tokens; a row's command wavelet starts the sum around the ring of columns, beside the next row's
    AXPYs; it ends in the column that owns the output.
    """
    outputs, features = w.shape
    s = Stream(columns, rows, features, outputs, x.shape[1])
    n = s.local
    per_owner = -(-outputs // columns)
    at_acc, at_y = stream_layout(s)
    check_memory(machine, at_y + 2 * per_owner * n, "fewer `tokens` or features")
    order = ring_order(columns, True)
    colours = [2 + c for c in ring_colours(order)]
    region = Region(machine, columns, rows)
    codes = {colour: region.add(stream_code(machine, s, at_acc, at_y, colour)) for colour in set(colours)}
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
    return Outcome(cycles, region.stats["busy"], y[:outputs], region)


def _ring_routes(region: Region, order: Sequence[int], colours: Sequence[int]) -> None:
    for member, u in enumerate(order):
        v = order[member - 1]
        way = range(u, v + (1 if v > u else -1), 1 if v > u else -1)
        back, toward = ("W", "E") if v > u else ("E", "W")
        for py in range(region.height):
            for px in way:
                region.route(px, py, colours[member], "R" if px == u else back, "R" if px == v else toward)
            region.queue(v, py, colours[member], 1)


def stream_code(machine: Machine, s: Stream, at_acc: int, at_y: int, colour: int) -> Code:
    """Registers: r2 the row's owner, r3 this member, r5 the owner's predecessor (which starts), r7 and r8 offsets of
    the sum in use and of the other one, r9 of the next own output."""
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
    code.vector("fmac", acc, acc, features, 0, chained=True)
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


def stream_gradient(
    machine: Machine, mask: np.ndarray, dy: np.ndarray, x: np.ndarray, columns: int, rows: int
) -> Outcome:
    """grad_values: dy·xᵀ at kept positions only, in fp32 sums of fp16 products, streamed out at the south.

    dy [outputs, tokens] lies where the forward product left it; each of its rows is sent along the PEs' rows, the
    positions of kept weights come in like weights do, each triggers a dot over the local tokens, and at the end of a
    row the columns add up. (An assumption: no text describes the vendor's weight gradient.)
    """
    outputs, features = mask.shape
    s = Stream(columns, rows, features, outputs, x.shape[1])
    n, per_owner = s.local, -(-outputs // columns)
    at_buffer, at_dy, at_sums, at_order = gradient_layout(s)
    check_memory(machine, at_order + 4 * columns, "fewer `tokens` or features")
    order = np.asarray(ring_order(columns, True), np.int32)
    region = Region(machine, columns, rows)
    codes = {}
    x16, dy16 = x.astype(np.float16), np.zeros((columns * per_owner, s.tokens), np.float16)
    dy16[:outputs] = dy
    for member, px in enumerate(order.tolist()):
        for py in range(rows):
            role = (py % 2, py > 0, py < rows - 1)
            if role not in codes:
                codes[role] = region.add(gradient_code(machine, s, at_buffer, at_dy, at_sums, at_order, *role))
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
    return Outcome(cycles, region.stats["busy"], gradient, region)


def gradient_code(
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
    """Registers: r2 the row's owner, r3 this column, r9 offset of the next own row of dy, r11 rows, r12 sums done."""
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
    code.vector("dot", features, features, dot_with, 1, chained=True)
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
