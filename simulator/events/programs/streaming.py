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


def _stream(w: np.ndarray, mask: np.ndarray, columns: range, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Wavelets (16-bit value, 16-bit index) of the kept weights of some columns, that share an edge link, and a command
    wavelet at the end of every row. Columns take turns, so that no queue has to hold a column's whole row."""
    features = np.arange(block)[:, None] + block * np.arange(len(columns))  # [turn, member]: the index on the wire
    order = (block * columns[0] + features).ravel()
    kept, index = mask[:, order], features.ravel().astype(np.uint32)
    words = w[:, order].astype(np.float16).view(np.uint16).astype(np.uint32) << 16 | index
    ends = np.zeros((len(mask), 1), np.uint32)
    all_words, sent = np.hstack([words, ends]), np.hstack([kept, ends == 0])
    control = np.zeros_like(all_words, np.uint8)
    control[:, -1] = 1
    return all_words[sent], control[sent]


def _feed(region: Region, s: Stream, w: np.ndarray, mask: np.ndarray, share: int) -> int:
    """Streams enter at the north, one for `share` columns; returns the region's row in which the layer begins.

    A shared stream runs east along a row of routers of its own and down every column, past a filter that lets through
    the column's own indices: a column that is full holds up those that share its stream.
    """
    top = int(share > 1)
    for px in range(s.columns):
        member = px % share
        for py in range(s.rows + top):
            ways = ("R" if py >= top else "") + ("S" if py < s.rows + top - 1 else "")
            if not py and member < share - 1 and px < s.columns - 1:
                ways += "E"
            region.route(px, py, 0, "W" if member and not py else "N", ways)
            if py >= top:
                region.queue(px, py, 0, 0)
        if top:
            region.filter(px, 0, 0, "S", member * s.block, (member + 1) * s.block)
        if not member:
            columns = range(px, min(px + share, s.columns))
            region.source(px, 0, "N", 0, *_stream(w, mask, columns, s.block))
    return top


def _take_weight(code: Code, features: int, member: int, s: Stream, index: int = 1) -> None:
    """The arriving weight to f0, and the descriptor to its feature's tokens: all of it hardware."""
    with code.free():
        code.unpack(0, index)
        code.mul(index, index, 2 * s.local)
        code.set_base(features, -2 * s.local * s.block * member, index)


def sums_held(machine: Machine, s: Stream) -> int:
    """Partial sums that a column holds: what the machine is said to, and no more than the layer has rows for."""
    return max(2, min(machine.sums_held, s.outputs + 1))


def stream_layout(machine: Machine, s: Stream) -> tuple[int, int]:
    """Byte addresses of the sums and of the outputs; features start at 0."""
    at_acc = align(2 * s.block * s.local) + 4  # a word off the features' alignment: the two reads never meet
    return at_acc, align(at_acc + 2 * s.local * sums_held(machine, s))


def gradient_layout(s: Stream) -> tuple[int, int, int, int]:
    """Byte addresses of the row of dy that came in, of the own rows, of a row's sums and of the owners' order."""
    at_buffer = align(2 * s.block * s.local) + 8
    at_dy = align(at_buffer + 2 * s.local) + 8
    at_sums = align(at_dy + 2 * s.local * -(-s.outputs // s.columns))
    return at_buffer, at_dy, at_sums, align(at_sums + 4 * s.block)


def stream_layer(
    machine: Machine, w: np.ndarray, mask: np.ndarray, x: np.ndarray, columns: int, rows: int, share: int = 1
) -> Outcome:
    """y = W·x in fp16: the kept weights of W [outputs, features] stream past the activations x [features, tokens].

    The forward product; with W transposed and x the output's gradient, grad_input. Every weight wavelet triggers an
    AXPY on its feature's tokens; a row's command wavelet starts the sum around the ring of columns, beside the next
    row's AXPYs; it ends in the column that owns the output. `share` columns are fed by one link of the edge.
    """
    outputs, features = w.shape
    s = Stream(columns, rows, features, outputs, x.shape[1])
    n = s.local
    per_owner = -(-outputs // columns)
    at_acc, at_y = stream_layout(machine, s)
    check_memory(machine, at_y + 2 * per_owner * n, "fewer `tokens` or features")
    order = ring_order(columns, True)
    colours = [2 + c for c in ring_colours(order)]
    region = Region(machine, columns, rows + (share > 1))
    codes: dict[tuple[int, int], int] = {}
    x16 = x.astype(np.float16)
    top = _feed(region, s, w, mask, share)
    lines = range(top, top + rows)
    _ring_routes(region, lines, order, colours)
    for member, px in enumerate(order):
        role = (colours[member], px % share)
        if role not in codes:
            codes[role] = region.add(stream_code(machine, s, at_acc, at_y, *role))
        for line, py in enumerate(lines):
            region.bind(px, py, 0, 0)
            region.bind(px, py, 0, 1, control=True)
            region.load(px, py, codes[role], [(3, member), (5, columns - 1), (6, columns)])
            region.write(px, py, 0, x16[px * s.block : (px + 1) * s.block, line * n : (line + 1) * n])
            region.write(px, py, at_acc, np.zeros(n * sums_held(machine, s), np.float16))
            region.write(px, py, at_y, np.zeros(per_owner * n, np.float16))
    cycles = region.run()
    region.conserve_fmacs(int(mask.sum()) * s.tokens)
    y = np.zeros((columns * per_owner, s.tokens), np.float16)
    for member, px in enumerate(order):
        for line, py in enumerate(lines):
            y[-member % columns :: columns, line * n : (line + 1) * n] = region.read(
                px, py, at_y, per_owner * n, np.float16
            ).reshape(per_owner, n)
    return Outcome(cycles, region.stats["busy"], y[:outputs], region)


def _ring_routes(region: Region, lines: range, order: Sequence[int], colours: Sequence[int]) -> None:
    for member, u in enumerate(order):
        v = order[member - 1]
        way = range(u, v + (1 if v > u else -1), 1 if v > u else -1)
        back, toward = ("W", "E") if v > u else ("E", "W")
        for py in lines:
            for px in way:
                region.route(px, py, colours[member], "R" if px == u else back, "R" if px == v else toward)
            region.queue(v, py, colours[member], 1)


def stream_code(machine: Machine, s: Stream, at_acc: int, at_y: int, colour: int, fed: int = 0) -> Code:
    """`fed`: the column's place among those of its stream.

    A column holds several sums: one is added to, the others wait for their turn in the ring, and only when all are
    taken does the column wait. Registers: r2 the owner of the row to send next, r3 this member, r5 the owner's
    predecessor (which starts), r7 and r8 offsets of the sum in use and of the next to send, r9 of the next own output.
    """
    n, slots = s.local, sums_held(machine, s)
    R_OWNER, R_ME, R_FIRST, R_COLUMNS, R_HERE, R_NEXT, R_Y, R_WAITING, R_MOST, R_END = 2, 3, 5, 6, 7, 8, 9, 10, 11, 12
    code = Code(machine)
    features, acc = code.memory(0, n, half=True), code.memory(at_acc, n, half=True)
    out, arriving, y = code.fabric_out(2, colour, n, True), code.fabric_in(1, n, True), code.memory(at_y, n, half=True)
    done = code.memory(at_acc, n, half=True)
    code.task(machine.trigger_cycles)  # a weight
    _take_weight(code, features, fed, s)
    with code.free():
        code.set_base(acc, at_acc, R_HERE)
        code.vector("fmac", acc, acc, features, 0, chained=True)
    code.end()
    code.task(machine.reduce_startup)  # the command: this row's sum gets in line, the next row begins
    code.work(machine.command_cycles)
    with code.free():
        code.li(R_END, 2 * n * slots)
        code.li(R_MOST, slots - 1)
        code.add(R_WAITING, R_WAITING, imm=1)
        room = code.less(R_WAITING, R_MOST)
        code.block(1)
        code.patch(room)
        code.activate(2)
        _advance(code, R_HERE, 2 * n, R_END)
        code.set_base(acc, at_acc, R_HERE)
        code.vector("fill", acc, scalar=1)
    code.end()
    code.task(0)  # the oldest sum's turn
    with code.free():
        code.block(2)
        code.set_base(done, at_acc, R_NEXT)
        final = code.equal(R_OWNER, R_ME)
        first = code.equal(R_FIRST, R_ME)
        code.vector("add", out, arriving, done, asynchronous=True, low=True, activate=3)
        code.end()
        code.patch(final)
        code.set_base(y, at_y, R_Y)
        code.add(R_Y, R_Y, imm=2 * n)
        code.vector("add", y, arriving, done, asynchronous=True, low=True, activate=3)
        code.end()
        code.patch(first)
        code.vector("move", out, done, asynchronous=True, low=True, activate=3)
        code.end()
    code.task(0)  # it has left
    with code.free():
        _advance(code, R_NEXT, 2 * n, R_END)
        code.unblock(1)
        code.unblock(2)
        _turn(code, R_OWNER, R_FIRST, R_COLUMNS)
        code.add(R_WAITING, R_WAITING, imm=-1)
        none = code.equal(R_WAITING, 0)
        code.activate(2)
        code.patch(none)
    code.end()
    return code


def _turn(code: Code, owner: int, first: int, columns: int) -> None:
    """The ring's sums travel towards lower members, and so does ownership: the next row starts one place further on."""
    code.add(owner, first, 0)
    wraps = code.equal(first, 0)
    code.add(first, first, imm=-1)
    on = code.jump()
    code.patch(wraps)
    code.add(first, columns, imm=-1)
    code.patch(on)


def _advance(code: Code, r: int, by: int, end: int) -> None:
    """r += by, and back to 0 at r[end]."""
    code.add(r, r, imm=by)
    inside = code.less(r, end)
    code.li(r, 0)
    code.patch(inside)


def stream_gradient(
    machine: Machine, mask: np.ndarray, dy: np.ndarray, x: np.ndarray, columns: int, rows: int, share: int = 1
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
    region = Region(machine, columns, rows + (share > 1))
    codes: dict[tuple[int, bool, bool, int], int] = {}
    top = _feed(region, s, np.zeros_like(mask, np.float16), mask, share)
    x16, dy16 = x.astype(np.float16), np.zeros((columns * per_owner, s.tokens), np.float16)
    dy16[:outputs] = dy
    for member, px in enumerate(order.tolist()):
        for line, py in enumerate(range(top, top + rows)):
            role = (line % 2, line > 0, line < rows - 1, px % share)
            if role not in codes:
                codes[role] = region.add(gradient_code(machine, s, at_buffer, at_dy, at_sums, at_order, *role))
            region.bind(px, py, 0, 1)
            region.bind(px, py, 0, 2, control=True)
            west, east = ("W" if px else ""), ("E" if px < columns - 1 else "")
            root = ("R", west + east)
            region.route(px, py, 1, *(("W", "R" + east) if west else root), root, ("E", "R" + west) if east else root)
            region.queue(px, py, 1, 1)
            region.route(px, py, 2 + line % 2, "R", "S")
            if line:
                region.route(px, py, 3 - line % 2, "N", "R")
                region.queue(px, py, 3 - line % 2, 2)
            region.load(px, py, codes[role], [(3, px), (6, columns), (5, outputs)])
            region.block(px, py, 1)
            region.block(px, py, 2)
            region.write(px, py, 0, x16[px * s.block : (px + 1) * s.block, line * n : (line + 1) * n])
            region.write(px, py, at_buffer, np.zeros(n, np.float16))
            region.write(px, py, at_dy, dy16[-member % columns :: columns, line * n : (line + 1) * n])
            region.write(px, py, at_sums, np.zeros(s.block, np.float32))
            region.write(px, py, at_order, np.roll(order[::-1], 1))  # owners of rows 0, 1, ...
            region.activate(px, py, 0)
        region.sink(px, top + rows - 1, "S", 2 + (rows - 1) % 2)
    cycles = region.run()
    region.conserve_fmacs(int(mask.sum()) * s.tokens)
    gradient = np.zeros((outputs, features), np.float32)
    for px in range(columns):
        block = slice(px * s.block, (px + 1) * s.block)
        _, words = region.sunk(px, top + rows - 1, "S", 2 + (rows - 1) % 2)
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
    fed: int = 0,
) -> Code:
    """Registers: r2 the row's owner, r3 this column, r9 offset of the next own row of dy, r11 rows, r12 sums done."""
    n = s.local
    R_INDEX, R_OWNER, R_ME, R_ROWS, R_COLUMNS, R_AT, R_Y, R_DONE, R_SUMS = 1, 2, 3, 5, 6, 7, 9, 11, 12
    code = Code(machine)
    features, buffer = code.memory(0, n, half=True), code.memory(at_buffer, n, half=True)
    own, dot_with = code.memory(at_dy, n, half=True), code.memory(at_buffer, n, half=True)
    sums, from_north = code.memory(at_sums, 0), code.fabric_in(2, 0)
    south = code.fabric_out(3, 2 + odd, 0)
    code.task(machine.trigger_cycles)  # a row: its dy arrives, or sets out from here
    with code.free():
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
    _take_weight(code, features, fed, s, R_INDEX)
    with code.free():
        code.vector("dot", features, features, dot_with, 1, chained=True)
        code.store_f(1, at_sums, R_SUMS)
        code.add(R_SUMS, R_SUMS, imm=1)
        code.end()
    code.task(machine.reduce_startup)  # the row's end: add up down the column, go on to the next row
    code.work(machine.command_cycles)
    with code.free():
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
        code.add(R_DONE, R_DONE, imm=1)
        more = code.less(R_DONE, R_ROWS)
        code.end()
        code.patch(more)
        code.activate(0)
        code.end()
    code.task(machine.trigger_cycles)  # dy is here
    with code.free():
        code.unblock(1)
        code.unblock(2)
        code.end()
    return code
