"""Dense matrix x vector on a square grid: MeshGEMV."""

from __future__ import annotations

import numpy as np

from vspdf.errors import UserError
from vspdf.simulator.events.fabric import Code, Region
from vspdf.simulator.events.programs.common import Outcome, align, check_memory
from vspdf.simulator.machine import Machine


def tree(pes: int) -> tuple[list[int], list[int]]:
    """A two-level tree on a line: groups of about sqrt(pes), and per PE the root of its group; the group roots."""
    size = max(1, round(pes**0.5))
    roots = [min(g + size // 2, pes - 1) for g in range(0, pes, size)]
    return [roots[y // size] for y in range(pes)], roots


def mesh_gemv(machine: Machine, a: np.ndarray, v: np.ndarray, pes: int, half: bool = True) -> Outcome:
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
    at_v, at_y = column * t, gemv_sum(t, column)
    check_memory(machine, at_y + column, "a larger `grid` or a smaller `n`")
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
    region.conserve_fmacs((pes * t) ** 2)
    result = np.stack(
        [np.concatenate([region.read(x, y, at_y, t, dtype) for x in range(pes)])[:n] for y in (0, pes - 1)]
    )
    if not np.array_equal(result[0], result[1]):
        raise RuntimeError("the all-reduce left different sums in one column.")
    return Outcome(cycles, region.stamps(1), result[0], region)


def gemv_sum(t: int, column: int) -> int:
    """Byte address of the sums: a word off the columns' alignment, so that the two reads never meet."""
    return align(column * t + column) + 4


def emit_gemv(code: Code, t: int, column: int, at_v: int, at_y: int, half: bool) -> None:
    R_K, R_T, R_LIMIT = 1, 2, 3
    acc, column_a = code.memory(at_y, t, half=half), code.memory(0, t, half=half)
    code.li(R_LIMIT, t)
    code.li(R_K, 0)
    with code.map(R_K, R_LIMIT, section="line"):
        code.load_f(0, at_v, R_K, half=half)
        code.mul(R_T, R_K, column, cycles=0)
        code.set_base(column_a, 0, R_T, cycles=0)
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
