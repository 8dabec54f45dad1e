"""Level 1: programs for a region of the fabric, event by event.

A program is `Code` (tasks made of instructions, vector operations on descriptors), loaded into the PEs of a `Region`
with routes for its colours. The C++ core runs it: it computes the values and counts the cycles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from vspdf.errors import BackendUnavailable, UserError
from vspdf.simulator.machine import Machine

try:
    from vspdf import _C
except ImportError as _error:  # not built
    raise BackendUnavailable(
        f"the simulator needs vspdf's compiled part, which is missing ({_error}); reinstall vspdf with a C++17 "
        "compiler present."
    ) from None

_core = _C.fabric
Deadlock = _core.Deadlock
PORTS = {"W": 0, "E": 1, "N": 2, "S": 3, "R": 4}
EVENT_KINDS = ("task switch", "vector operation", "streaming operation", "scalar instructions")
OPERATIONS = ("move", "fill", "add", "multiply", "multiply-add", "dot")
MOST_EVENTS = 500_000
_OP, _ARITH = _core.Op, _core.Arith


def _mask(ports: str) -> int:
    try:
        return sum(1 << PORTS[p] for p in ports)
    except KeyError as error:
        raise UserError(f"unknown port {error} in '{ports}': ports are W, E, N, S and R (the ramp).") from None


def vector_cycles(
    machine: Machine, arith: str, dst: tuple[int, int], src0: tuple[int, int] = (0, 1), src1: tuple[int, int] = (0, 1),
    *, length: int, half: bool = False, pair: bool = False,
) -> int:  # fmt: skip
    """Cycles of one vector operation on SRAM after its start-up: what datapath and banks allow, whichever is less.

    Operands are (byte address, stride in elements); an FMAC adds to `src0` the product of `src1` and a scalar.
    """
    operands = (dst, src0, src1)
    return _core.vector_cycles(
        machine.fabric(), getattr(_ARITH, arith), [o[0] for o in operands], [o[1] for o in operands], length, half, pair
    )


_tracing: ContextVar[bool] = ContextVar("tracing", default=False)


@contextmanager
def tracing(on: bool = True) -> Iterator[None]:
    """Regions made inside note their events (`Region.trace_events`)."""
    token = _tracing.set(on)
    try:
        yield
    finally:
        _tracing.reset(token)


class Code:
    """An assembler: tasks, scalar instructions at the machine's costs, vector operations on descriptors.

    Registers r0..r15 hold integers (r0 stays 0 by convention), f0..f7 floats. Every instruction's cost is added to the
    open `section`, so that the aggregate model reads the same counts (`costs`).
    """

    def __init__(self, machine: Machine):
        self.machine = machine
        self.instrs: list[list[Any]] = []
        self.vectors: list[Any] = []
        self.dsrs: list[dict[str, Any]] = []
        self.entry: list[int] = []
        self.entry_cycles: list[int] = []
        self.costs: dict[str, int] = {}
        self._section: list[str] = []
        self._free = False

    # -- descriptors --

    def _dsr(self, **fields: Any) -> int:
        self.dsrs.append({"half": False, "base": 0, "length": 0, "stride": 1, "queue": 0, "colour": 0} | fields)
        return len(self.dsrs) - 1

    def memory(self, base: int, length: int, stride: int = 1, half: bool = False) -> int:
        """SRAM operand: `length` elements from byte `base`, `stride` elements apart (0 repeats one)."""
        return self._dsr(kind="memory", base=base, length=length, stride=stride, half=half)

    def fabric_in(self, queue: int, length: int, half: bool = False) -> int:
        return self._dsr(kind="in", queue=queue, length=length, half=half)

    def fabric_out(self, queue: int, colour: int, length: int, half: bool = False) -> int:
        return self._dsr(kind="out", queue=queue, colour=colour, length=length, half=half)

    # -- structure --

    def task(self, cycles: int = -1) -> int:
        """Starts a new task; end it with `end`. `cycles` until its first instruction: -1, the machine's task switch."""
        self.entry.append(len(self.instrs))
        self.entry_cycles.append(cycles)
        return len(self.entry) - 1

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Costs emitted inside are summed up under `name`."""
        self._section.append(name)
        self.costs.setdefault(name, 0)
        yield
        self._section.pop()

    @contextmanager
    def free(self) -> Iterator[None]:
        """Instructions inside cost nothing: a state machine does them, or `work` counted them in one sum."""
        self._free = True
        yield
        self._free = False

    @property
    def here(self) -> int:
        return len(self.instrs)

    def _emit(self, op: Any, a: int = 0, b: int = 0, c: int = 0, imm: int = 0, cycles: int = 0) -> int:
        cycles = 0 if self._free else cycles
        self.instrs.append([op, a, b, c, imm, cycles])
        if self._section:
            self.costs[self._section[-1]] += cycles
        return len(self.instrs) - 1

    def patch(self, instr: int) -> None:
        """Makes a forward branch land here."""
        self.instrs[instr][4] = self.here

    # -- instructions; `cycles` defaults to the machine's cost --

    def work(self, cycles: int) -> None:
        """Instructions without a result that matters here."""
        self._emit(_OP.work, cycles=cycles)

    def li(self, r: int, value: int, cycles: int | None = None) -> None:
        self._emit(_OP.li, r, imm=value, cycles=self.machine.alu_cycles if cycles is None else cycles)

    def add(self, r: int, a: int, b: int = 0, imm: int = 0, wide: bool = False, cycles: int | None = None) -> None:
        """r = a + b + imm; `wide`: 32 bits, two instructions."""
        self._emit(_OP.add, r, a, b, imm, self.machine.alu_cycles * (1 + wide) if cycles is None else cycles)

    def mul(self, r: int, a: int, imm: int, cycles: int | None = None) -> None:
        self._emit(_OP.mul, r, a, imm=imm, cycles=self.machine.multiply_cycles if cycles is None else cycles)

    def load(self, r: int, address: int, index: int) -> None:
        """r = word at address + 4·r[index]."""
        self._emit(_OP.load, r, index, imm=address, cycles=self.machine.load_cycles)

    def load_f(self, f: int, address: int, index: int, half: bool = False) -> None:
        self._emit(_OP.load_f, f, index, int(half), address, self.machine.load_cycles)

    def store_f(self, f: int, address: int, index: int, cycles: int | None = None) -> None:
        self._emit(_OP.store_f, f, index, imm=address, cycles=self.machine.load_cycles if cycles is None else cycles)

    def unpack(self, f: int, r: int) -> None:
        """The wavelet that triggered the task: 16-bit value to f, 16-bit index to r; part of the trigger's cost."""
        self._emit(_OP.unpack, f, r)

    def set_base(self, dsr: int, base: int, r: int, cycles: int | None = None) -> None:
        self._emit(_OP.set_base, dsr, r, imm=base, cycles=self.machine.alu_cycles if cycles is None else cycles)

    def set_length(self, dsr: int, r: int) -> None:
        self._emit(_OP.set_length, dsr, r, cycles=self.machine.alu_cycles)

    def less(self, a: int, b: int, target: int = -1, wide: bool = False) -> int:
        m = self.machine
        return self._emit(_OP.less, a, b, imm=target, cycles=m.alu_cycles * (1 + wide) + m.branch_cycles)

    def equal(self, a: int, b: int, target: int = -1) -> int:
        return self._emit(_OP.equal, a, b, imm=target, cycles=self.machine.alu_cycles + self.machine.branch_cycles)

    def jump(self, target: int = -1) -> int:
        return self._emit(_OP.jump, imm=target, cycles=self.machine.branch_cycles)

    def activate(self, task: int) -> None:
        self._emit(_OP.activate, task, cycles=self.machine.alu_cycles)

    def block(self, task: int) -> None:
        self._emit(_OP.block, task, cycles=self.machine.alu_cycles)

    def unblock(self, task: int) -> None:
        self._emit(_OP.unblock, task, cycles=self.machine.alu_cycles)

    def switch(self, colour: int, position: int) -> None:
        """Moves this router's switch, once no wavelet of the colour is inside."""
        self._emit(_OP.switch, colour, position, cycles=self.machine.alu_cycles)

    def send(self, f: int, queue: int, colour: int, control: bool = False) -> None:
        self._emit(_OP.send, f, queue, colour, int(control), self.machine.alu_cycles)

    def stamp(self, slot: int) -> None:
        """Notes the cycle; free of cost."""
        self._emit(_OP.stamp, slot)

    def end(self) -> None:
        self._emit(_OP.end)

    def vector(
        self, arith: str, dst: int, src0: int = 0, src1: int = 0, scalar: int = 0, *, asynchronous: bool = False,
        pair: bool = False, low: bool = False, activate: int = -1, unblock: int = -1, chained: bool = False, cycles: int
        = 0,
    ) -> None:  # fmt: skip
        """dst = src0 (move), f (fill), src0 + src1, src0 · src1, src0 + src1 · f (fmac); f = src0 · src1 (dot).

        Operands are descriptor numbers, `scalar` an f register. With a fabric operand the operation streams:
        `asynchronous` as a micro-thread beside the task, which at its end activates or unblocks a task, and which takes
        turns with the task on the datapath, or with `low` priority only what the task leaves idle. `chained`:
        follows its like without a gap, as data-triggered operations do: no start-up, the pipeline stays full.
        """
        kind = getattr(_ARITH, arith)
        self.vectors.append(
            _core.Vector(kind, dst, src0, src1, scalar, chained, asynchronous, pair, low, activate, unblock)
        )
        self._emit(_OP.vector, len(self.vectors) - 1, cycles=cycles)

    @contextmanager
    def map(self, r: int, limit: int, section: str) -> Iterator[None]:
        """A loop whose descriptors advance by themselves, as `@map` runs them: a step costs its branch and its body."""
        start = self.here
        with self.section(section):
            yield
            self.add(r, r, imm=1, cycles=0)
            self._emit(_OP.less, r, limit, imm=start, cycles=self.machine.branch_cycles)

    @contextmanager
    def loop(self, r: int, limit: int, wide: bool = False, section: str = "") -> Iterator[None]:
        """Runs the body for r = r, r + 1, ... while r < r[limit]; the count is checked at the end, as compilers do."""
        start = self.here
        if section:
            with self.section(section):
                yield
                self.add(r, r, imm=1, wide=wide)
                self.less(r, limit, start, wide)
        else:
            yield
            self.add(r, r, imm=1, wide=wide)
            self.less(r, limit, start, wide)


class Region:
    """A rectangle of PEs with routes, code and data.

    Raises
    ------
    UserError
        From every method: for a grid larger than the machine, an unknown colour, queue or port, data beyond the SRAM, a
        route that leads nowhere or in a circle.
    """

    def __init__(self, machine: Machine, width: int, height: int):
        if not (1 <= width <= machine.width and 1 <= height <= machine.height):
            raise UserError(
                f"a grid of {width}x{height} PEs does not fit: {machine.name} has {machine.width}x{machine.height} "
                "(width x height) for programs."
            )
        self.machine, self.width, self.height = machine, width, height
        try:
            self._fabric = _core.Fabric(width, height, machine.fabric())
        except ValueError as error:
            raise UserError(f"{machine.name}: {error}") from None
        self._fabric.trace(MOST_EVENTS if _tracing.get() else 0)

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._fabric, method)(*arguments)
        except ValueError as error:
            raise UserError(str(error)) from None

    def route(self, x: int, y: int, colour: int, rx: str, tx: str, *more: tuple[str, str]) -> None:
        """Wavelets of `colour` that come in by a port of `rx` leave by all of `tx`; `more`: further switch places."""
        self._call("route", x, y, colour, [(_mask(r), _mask(t)) for r, t in ((rx, tx), *more)])

    def filter(self, x: int, y: int, colour: int, ports: str, low: int, high: int) -> None:
        """Data of `colour` leaves by `ports` only if its index (low 16 bits) lies in [low, high); control passes."""
        self._call("filter", x, y, colour, _mask(ports), low, high)

    def queue(self, x: int, y: int, colour: int, queue: int) -> None:
        self._call("queue", x, y, colour, queue)

    def bind(self, x: int, y: int, colour: int, task: int, control: bool = False) -> None:
        """Arriving wavelets of `colour` (or its control wavelets) each run `task`."""
        self._call("bind", x, y, colour, task, control)

    def add(self, code: Code) -> int:
        instrs = [_core.Instr(*i) for i in code.instrs]
        return self._fabric.add_code(
            instrs, code.vectors, [_core.Dsr(**d) for d in code.dsrs], code.entry, code.entry_cycles
        )

    def load(self, x: int, y: int, code: int, registers: Sequence[tuple[int, int]] = ()) -> None:
        self._call("load", x, y, code)
        for r, value in registers:
            self._fabric.set_register(x, y, r, value)

    def activate(self, x: int, y: int, task: int) -> None:
        self._fabric.activate(x, y, task)

    def block(self, x: int, y: int, task: int) -> None:
        self._fabric.block(x, y, task)

    def write(self, x: int, y: int, address: int, data: np.ndarray) -> None:
        self._call("write", x, y, address, np.ascontiguousarray(data))

    def read(self, x: int, y: int, address: int, count: int, dtype: Any = np.float32) -> np.ndarray:
        return self._call("read", x, y, address, count * np.dtype(dtype).itemsize).view(dtype)

    def source(
        self,
        x: int,
        y: int,
        port: str,
        colour: int,
        values: np.ndarray,
        control: np.ndarray | None = None,
        interval: int = 1,
    ) -> None:
        """The host streams `values` (uint32) into a router by `port`."""
        flags = np.zeros(0, np.uint8) if control is None else control.astype(np.uint8)
        self._call("source", x, y, PORTS[port], colour, values.astype(np.uint32, copy=False), flags, interval)

    def sink(self, x: int, y: int, port: str, colour: int) -> None:
        self._fabric.sink(x, y, PORTS[port], colour)

    def sunk(self, x: int, y: int, port: str, colour: int) -> tuple[np.ndarray, np.ndarray]:
        """(cycles, values) of what left the region there."""
        return self._fabric.sunk(x, y, PORTS[port], colour)

    def trace_events(self) -> np.ndarray:
        """int64 [event, (pe, begin, end, kind, id)], of `EVENT_KINDS`; id: a task's number, or one of `OPERATIONS`.

        At most `MOST_EVENTS`, the first ones.
        """
        return self._fabric.trace_events()

    def run(self, max_cycles: int = 1 << 40) -> int:
        """Cycles until nothing is left to do.

        Raises
        ------
        Deadlock
            If something is left but nothing can move; the message says who waits for whom.
        RuntimeError
            If a cycle or a wavelet was lost: the simulator would be wrong.
        """
        cycles = self._call("run", max_cycles)
        self._conserve(cycles)
        return cycles

    def _conserve(self, cycles: int) -> None:
        """Counts from both ends: cycles by the clock and by what was issued, wavelets sent and delivered."""
        s, core = self.stats, self._fabric
        lost = {
            "a cycle of a PE": s["busy"] + s["wait_data"] + s["back_pressure"] + s["idle"] - cycles,
            "a busy cycle's cause": s["vector"] + s["bank_stall"] + s["scalar"] + s["task_switch"] - s["busy"],
            "a wavelet (sent x fan-out is not what was delivered)": np.subtract(core.due, core.delivered),
        }
        for what, difference in lost.items():
            if np.any(difference):
                raise RuntimeError(f"the event simulator lost {what}: please report this program.")

    def conserve_fmacs(self, expected: int) -> None:
        """Every multiply-add that the operands ask for was done, and no other.

        Raises
        ------
        RuntimeError
            If not: the program, or the simulator, would be wrong.
        """
        done = int(self.stats["fmacs"].sum())
        if done != expected:
            raise RuntimeError(f"the event simulator did {done:,} multiply-adds, not {expected:,}.")

    def stamps(self, slot: int) -> np.ndarray:
        return self._fabric.stamps(slot)

    @property
    def stats(self) -> dict[str, np.ndarray]:
        """int64 [height, width] each.

        busy, wait_data, back_pressure, idle: their sum is the cycles. vector, bank_stall, scalar, task_switch: their
        sum is busy. fmacs, adds; sent, received, forwarded (wavelets).
        """
        return self._fabric.stats()

    def stats_at(self, slot: int) -> dict[str, np.ndarray]:
        """`stats` of every PE until the cycle of its stamp."""
        return self._fabric.stats(slot)

    @property
    def cycles(self) -> int:
        return self._fabric.cycles

    @property
    def events(self) -> int:
        return self._fabric.events

    def wavelets(self, colour: int) -> tuple[int, int]:
        """(sent, delivered) of a colour, all PEs and host streams."""
        return self._fabric.sent[colour], self._fabric.delivered[colour]
