"""One vector operation on one PE; broadcast and reductions on a line of PEs."""

from __future__ import annotations

import numpy as np

from vspdf.errors import UserError, did_you_mean
from vspdf.simulator.events.fabric import Code, Region
from vspdf.simulator.events.programs.common import Outcome, align
from vspdf.simulator.machine import Machine

VECTOR_MODES = {
    "conflict": (0, False),
    "single": (4, False),
    "pair": (8, True),
}  # shift of one operand in bytes, packed


def vector_op(machine: Machine, length: int, mode: str = "single") -> Outcome:
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
    return Outcome(int(per_pe.max()), per_pe, region.read(0, 0, at_y, length), region)


def broadcast(machine: Machine, values: np.ndarray, pes: int) -> Outcome:
    """`values` (fp32) from the first of `pes` PEs in a row to all of them by multicast."""
    if pes < 2:
        raise UserError("a broadcast needs at least 2 PEs.")
    n = len(values)
    region = Region(machine, pes, 1)
    for x in range(pes):
        code = Code(machine)
        memory = code.memory(0, n)
        task = code.task()
        code.stamp(0)
        if x == 0:
            code.vector("move", code.fabric_out(2, 0, n), memory)
            region.route(x, 0, 0, "R", "E")
        else:
            code.vector("move", memory, code.fabric_in(0, n))
            region.route(x, 0, 0, "W", "RE" if x < pes - 1 else "R")
        code.stamp(1)
        code.end()
        if x:
            region.queue(x, 0, 0, 0)
        region.load(x, 0, region.add(code))
        region.write(x, 0, 0, np.asarray(values if x == 0 else np.zeros(n), np.float32))
        region.activate(x, 0, task)
    region.run()
    result = np.stack([region.read(x, 0, 0, n) for x in range(pes)])
    per_pe = region.stamps(1) - region.stamps(0)
    return Outcome(int(region.stamps(1).max() - region.stamps(0).min()) + machine.launch_cycles, per_pe, result, region)


def reduce(machine: Machine, values: np.ndarray, group: int | str, everywhere: bool = False) -> Outcome:
    """Sum of `values` [pes, elements] (fp32), PE by PE, into the last PE; with `everywhere` broadcast back to all.

    `group` PEs form a chain that ends in a leader, the leaders form a second chain (two-phase); group = pes is one
    chain; "star" sends every vector to the root on its own.
    """
    pes, n = values.shape
    if pes < 2:
        raise UserError("a reduction needs at least 2 PEs.")
    if group != "star" and not (isinstance(group, int) and 1 <= group <= pes):
        raise UserError(f"`group` {group}: expected 1 to {pes} (the number of PEs) or 'star'.")
    region = Region(machine, pes, 1)
    root = pes - 1
    for x in range(pes):
        code = Code(machine)
        memory = code.memory(0, n)
        first = code.task()
        code.stamp(0)
        if group == "star":
            _star(code, region, x, pes, n, memory)
        else:
            _two_phase(code, region, x, pes, n, memory, int(group))
        if everywhere:
            # The multicast back: its own colour from the root westwards.
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
    return Outcome(int(region.stamps(1).max() - region.stamps(0).min()) + machine.launch_cycles, per_pe, result, region)


def _star(code: Code, region: Region, x: int, pes: int, n: int, memory: int) -> None:
    """Nearest first: every router lets its own PE's vector pass, then switches to what comes from farther west."""
    if x == pes - 1:
        region.route(x, 0, 0, "W", "R")
        region.queue(x, 0, 0, 0)
        arriving = code.fabric_in(0, n)
        for _ in range(pes - 1):
            code.vector("add", memory, arriving, memory)
        return
    region.route(x, 0, 0, "R", "E", ("W", "E"))
    code.vector("move", code.fabric_out(2, 0, n), memory)
    code.switch(0, 1)  # moves once the last of these has left


def _two_phase(code: Code, region: Region, x: int, pes: int, n: int, memory: int, group: int) -> None:
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
        return
    if number == 0 and forwards:  # what it has summed up goes straight on
        sending = code.fabric_out(3, second_out, n)
        code.vector("add" if place else "move", sending, *((arriving, memory) if place else (memory,)))
        return
    if place:
        code.vector("add", memory, arriving, memory)
    if last_group:
        code.activate(len(code.entry))
        code.end()
        code.task()
        leaders_in = code.fabric_in(1, n)
        code.vector("add", code.fabric_out(3, second_out, n) if forwards else memory, leaders_in, memory)
