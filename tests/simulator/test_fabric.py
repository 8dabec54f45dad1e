"""Routers, queues, tasks and micro-threads of the event simulator, one rule at a time."""

import numpy as np
import pytest

from vspdf.errors import UserError
from vspdf.simulator import machine
from vspdf.simulator.events import programs
from vspdf.simulator.events.fabric import Code, Deadlock, Region

CS2 = machine.load("cs2")


def words(*values):
    return np.asarray(values, np.float32).view(np.uint32)


def sender(n, queue=2, colour=0, m=CS2, **how):
    code = Code(m)
    task = code.task(0)
    code.vector("move", code.fabric_out(queue, colour, n), code.memory(0, n), **how)
    code.stamp(1)
    code.end()
    return code, task


def receiver(n, queue=0, m=CS2):
    code = Code(m)
    task = code.task(0)
    code.vector("move", code.memory(0, n), code.fabric_in(queue, n))
    code.stamp(1)
    code.end()
    return code, task


def place(region, x, y, code_and_task, data):
    code, task = code_and_task
    region.load(x, y, region.add(code))
    region.write(x, y, 0, np.asarray(data, np.float32))
    region.activate(x, y, task)


def line(hops, n=1, m=CS2):
    """A stream of n words over so many hops."""
    region = Region(m, hops + 1, 1)
    for x in range(hops + 1):
        region.route(x, 0, 0, "W" if x else "R", "E" if x < hops else "R")
    region.queue(hops, 0, 0, 0)
    place(region, 0, 0, sender(n, m=m), np.arange(n))
    place(region, hops, 0, receiver(n, m=m), np.zeros(n))
    region.run()
    assert np.array_equal(region.read(hops, 0, 0, n), np.arange(n))
    return int(region.stamps(1)[0, hops])


def test_a_hop_takes_a_cycle_and_the_ramp_two():
    first = line(1)
    assert [line(hops) - first for hops in (2, 3, 10)] == [1, 2, 9]
    assert line(1, m=CS2.override({"hop_cycles": 3})) - first == 2
    assert line(1, m=CS2.override({"ramp_cycles": 5})) - first == 6  # up and down


@pytest.mark.parametrize("hop", [1, 3])
def test_the_hosts_stream_takes_hops_like_any_other(hop):
    region = Region(CS2.override({"hop_cycles": hop}), 1, 4)
    for y in range(4):
        region.route(0, y, 0, "N", "S")
    region.source(0, 0, "N", 0, np.arange(5))
    region.sink(0, 3, "S", 0)
    region.run()
    cycles, values = region.sunk(0, 3, "S", 0)
    np.testing.assert_array_equal(cycles, 4 * hop + np.arange(5))
    np.testing.assert_array_equal(values, np.arange(5))


def test_a_stream_flows_at_a_word_a_cycle():
    assert line(5, 300) - line(5, 100) == 200


@pytest.mark.parametrize("colours", [1, 2, 3])
def test_colours_share_a_link(colours):
    """Streams of several PEs over one link: together one word a cycle, whatever their colours."""
    n, width = 200, colours + 2
    region = Region(CS2, width, 1)
    for colour in range(colours):
        for x in range(colour, width):
            region.route(x, 0, colour, "R" if x == colour else "W", "E" if x < width - 1 else "R")
        region.queue(width - 1, 0, colour, colour)
        place(region, colour, 0, sender(n, colour=colour), np.full(n, colour))
    code = Code(CS2)
    task = code.task()
    for colour in range(colours):
        code.vector("move", code.memory(4 * n * colour, n), code.fabric_in(colour, n), asynchronous=True)
    code.end()
    place(region, width - 1, 0, (code, task), np.zeros(n * colours))
    cycles = region.run()
    received = region.read(width - 1, 0, 0, n * colours).reshape(colours, n)
    assert (received == np.arange(colours)[:, None]).all()
    assert n * colours < cycles < n * colours + 60


def test_multicast_delivers_to_every_branch_and_counts_it():
    region = Region(CS2, 3, 3)
    tree = {(1, 1): ("R", "WENS"), (0, 1): ("E", "R"), (2, 1): ("W", "R"), (1, 0): ("S", "R"), (1, 2): ("N", "R")}
    for (x, y), (rx, tx) in tree.items():
        region.route(x, y, 7, rx, tx)
        if rx != "R":
            region.queue(x, y, 7, 0)
            place(region, x, y, receiver(9), np.zeros(9))
    place(region, 1, 1, sender(9, colour=7), np.arange(9))
    region.run()
    for x, y in [place for place in tree if place != (1, 1)]:
        assert np.array_equal(region.read(x, y, 0, 9), np.arange(9))
    assert region.wavelets(7) == (9, 36)


def test_back_pressure_loses_nothing():
    """A receiver that is busy elsewhere holds up a sender far away; nothing is lost and the order stays."""
    region = Region(CS2, 4, 1)
    for x in range(4):
        region.route(x, 0, 0, "W" if x else "R", "E" if x < 3 else "R")
    region.queue(3, 0, 0, 0)
    place(region, 0, 0, sender(400), np.arange(400))
    code = Code(CS2)
    task = code.task()
    code.work(5000)
    code.vector("move", code.memory(0, 400), code.fabric_in(0, 400))
    code.end()
    place(region, 3, 0, (code, task), np.zeros(400))
    assert region.run() > 5400
    assert np.array_equal(region.read(3, 0, 0, 400), np.arange(400))
    assert region.stats["back_pressure"][0, 0] > 4500


def test_a_control_wavelet_moves_the_switch_on():
    """Two senders take turns on one colour: the first one's control wavelet opens the way for the second."""
    region = Region(CS2, 3, 1)
    region.route(0, 0, 0, "R", "E")
    region.route(1, 0, 0, "R", "E", ("W", "E"))
    region.route(2, 0, 0, "W", "R")
    region.queue(2, 0, 0, 0)
    place(region, 0, 0, sender(5), np.full(5, 2.0))
    code = Code(CS2)
    task = code.task()
    code.work(300)  # the other one waits meanwhile
    code.li(1, 0)
    code.load_f(0, 0, 1)
    for i in range(5):
        code.send(0, 2, 0, control=i == 4)
    code.end()
    place(region, 1, 0, (code, task), [1.0])
    place(region, 2, 0, receiver(10), np.zeros(10))
    region.run()
    assert region.read(2, 0, 0, 10).tolist() == [1.0] * 5 + [2.0] * 5


def test_data_and_control_tasks():
    """Each wavelet runs its task to completion: a counter of data, another of commands."""
    code = Code(CS2)
    data = code.task()
    code.add(1, 1, imm=1)
    code.end()
    command = code.task()
    code.add(2, 2, imm=1)
    code.end()
    report = code.task()
    for r in (1, 2):
        code.less(0, r, code.here + 1)
    code.end()
    region = Region(CS2, 1, 1)
    region.route(0, 0, 3, "N", "R")
    region.queue(0, 0, 3, 0)
    region.bind(0, 0, 3, data)
    region.bind(0, 0, 3, command, control=True)
    region.load(0, 0, region.add(code))
    region.source(0, 0, "N", 3, np.arange(7, dtype=np.uint32), np.array([0, 0, 1, 0, 1, 0, 0], np.uint8))
    assert report == 2
    region.run()
    assert region.stats["task_switch"][0, 0] == 7 * CS2.task_switch
    assert region.stats["scalar"][0, 0] == 7 * CS2.alu_cycles


def test_micro_threads_share_the_datapath_with_the_task():
    n = 100
    region = Region(CS2, 2, 1)
    region.route(0, 0, 0, "R", "E")
    region.route(1, 0, 0, "W", "R")
    region.queue(1, 0, 0, 0)
    code = Code(CS2)
    task = code.task(0)
    code.stamp(0)
    code.vector("move", code.fabric_out(2, 0, n), code.memory(0, n), asynchronous=True)
    for _ in range(4):
        code.vector("mul", code.memory(804, n), code.memory(804, n), code.memory(400, n))
    code.stamp(1)
    code.end()
    place(region, 0, 0, (code, task), np.ones(2 * n + n + 1))
    place(region, 1, 0, receiver(n), np.zeros(n))
    region.run()
    took = int(region.stamps(1)[0, 0])
    assert took == pytest.approx(4 * (n + CS2.vector_startup) + n, abs=5)


# -- what cannot work is said ------------------------------------------------------------------------------------------


def test_a_deadlock_says_who_waits_for_whom():
    """Both send before they receive: queues fill, and neither gets to its receiving."""
    region = Region(CS2, 2, 1)
    for x, (out, back) in enumerate((("E", "E"), ("W", "W"))):
        region.route(x, 0, x, "R", out)
        region.route(x, 0, 1 - x, back, "R")
        region.queue(x, 0, 1 - x, 0)
        code = Code(CS2)
        task = code.task()
        code.vector("move", code.fabric_out(2, x, 100), code.memory(0, 100))
        code.vector("move", code.memory(400, 100), code.fabric_in(0, 100))
        code.end()
        place(region, x, 0, (code, task), np.zeros(200))
    with pytest.raises(Deadlock) as caught:
        region.run()
    text = str(caught.value)
    assert "deadlock at cycle" in text
    assert "PE (0, 0) waits to send on colour 0" in text and "PE (1, 0) waits to send on colour 1" in text
    assert "holds" in text and "in-queue 0" in text


def test_waiting_for_what_nobody_sends_is_a_deadlock():
    region = Region(CS2, 1, 1)
    region.route(0, 0, 5, "N", "R")
    region.queue(0, 0, 5, 1)
    place(region, 0, 0, receiver(3, queue=1), np.zeros(3))
    with pytest.raises(Deadlock, match=r"PE \(0, 0\) waits for data on colour 5 \(0 of 3 elements done\)"):
        region.run()


def circle(region):
    for x, y, rx, tx in ((0, 0, "S", "E"), (1, 0, "W", "S"), (1, 1, "N", "W"), (0, 1, "E", "N")):
        region.route(x, y, 4, rx, tx)
    region.run()


def into_nothing(region):
    region.route(0, 0, 4, "R", "E")
    region.run()


def off_the_edge(region):
    region.route(1, 0, 4, "R", "E")
    region.run()


def no_queue(region):
    region.route(0, 0, 4, "R", "R")
    region.run()


def twice(region):
    region.route(0, 0, 4, "R", "E")
    region.route(0, 0, 4, "R", "S")


@pytest.mark.parametrize(
    "what, message",
    [
        (circle, "colour 4 runs in a circle through PE"),
        (into_nothing, r"colour 4 leaves to the east, but PE \(1, 0\) does not accept it from the west"),
        (off_the_edge, "off the region, where no host stream takes it"),
        (no_queue, "goes down the ramp, but has no in-queue"),
        (twice, "colour 4 already has a route"),
        (lambda r: r.route(0, 0, 24, "R", "E"), "colour 24 does not exist: this machine has colours 0 to 23"),
        (lambda r: r.route(0, 0, 1, "R", "X"), "unknown port 'X'"),
        (lambda r: r.route(2, 0, 1, "R", "E"), r"PE \(2, 0\) is outside the region of 2 x 2"),
        (lambda r: r.route(0, 0, 1, "R", "E", *[("W", "E")] * 4), "1 to 4 switch positions, not 5"),
        (lambda r: r.queue(0, 0, 1, 8), "in-queue 8 does not exist: this machine has 8"),
        (lambda r: r.bind(0, 0, 1, 0), "colour 1 has no in-queue to bind a task to"),
        (lambda r: r.write(0, 0, 49000, np.zeros(100, np.float32)), "do not fit its SRAM of 49152 bytes"),
        (lambda r: r.read(0, 0, 0, 20000), "do not fit its SRAM"),
        (lambda r: Region(CS2.override({"hop_cycles": 0}), 2, 2), "a hop and the ramp may take 1 to 63 cycles"),
        (lambda r: Region(CS2.override({"colours": 65}), 2, 2), "1 to 64 colours"),
    ],
)
def test_bad_set_up_is_one_clear_line(what, message):
    with pytest.raises(UserError, match=message) as caught:
        what(Region(CS2, 2, 2))
    assert "\n" not in str(caught.value)


def test_an_address_beyond_the_data_names_the_pe_and_the_cycle():
    region = Region(CS2, 1, 1)
    code = Code(CS2)
    task = code.task()
    code.vector("mul", code.memory(0, 5), code.memory(0, 5), code.memory(400, 5))
    code.end()
    place(region, 0, 0, (code, task), np.zeros(5))
    with pytest.raises(RuntimeError, match=r"PE \(0, 0\), cycle \d+: reads SRAM at byte 400"):
        region.run()


def test_what_is_lost_is_noticed():
    """Cycles, wavelets and multiply-adds are counted from both ends after every run."""
    w, mask, x = np.ones((6, 8), np.float32), np.ones((6, 8), bool), np.ones((8, 8), np.float32)
    region = programs.stream_layer(CS2, w, mask, x, 4, 2, 2).region
    region._conserve(region.cycles)
    region.conserve_fmacs(6 * 8 * 8)
    with pytest.raises(RuntimeError, match="lost a cycle of a PE"):
        region._conserve(region.cycles + 1)
    with pytest.raises(RuntimeError, match="did 384 multiply-adds, not 385"):
        region.conserve_fmacs(385)
    assert region._fabric.due == region._fabric.delivered  # sent x fan-out, filters counted
    sent, delivered = region.wavelets(0)
    assert sent == 6 * 8 + 6 * 2 and delivered == 2 * 6 * 8 + 2 * 4 * 6  # to two rows; commands to all four columns
