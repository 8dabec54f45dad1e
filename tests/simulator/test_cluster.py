"""Several systems: the recurrence between two steps, scaling tables, and a toy of four event-level grids."""

import json
from dataclasses import replace

import numpy as np
import pytest

from vspdf.plan import outlook
from vspdf.shapes import MODELS
from vspdf.simulator import machine as machines
from vspdf.simulator.aggregate import cluster, step
from vspdf.simulator.aggregate.cluster import Block, Cluster
from vspdf.simulator.aggregate.model import Model
from vspdf.simulator.events import programs
from vspdf.simulator.events.fabric import Code, Region

CS2 = machines.load("cs2")
CLOCK = CS2.clocks["0.85GHz"]


def test_one_system_without_a_memory_to_wait_for_only_turns_around():
    """The first matrix' gradient out and weights in: all that one system's step ever had between two steps."""
    free = CS2.override({"memory_bandwidth": 1e15, "update_bytes": 0})
    model = Model.uniform(MODELS["gpt3-xl"], 121, 0.75)
    found = step.search(free, CLOCK, model)
    turn = model.layers[0][0].nnz * (CS2.dense_weight_bytes + CS2.gradient_bytes) / CS2.host_bandwidth * CLOCK
    assert found.parts["between steps"].cycles == pytest.approx(turn, rel=1e-9)
    assert Cluster.of(CS2, 1, CLOCK).levels == 0


@pytest.mark.parametrize("systems, levels", [(1, 0), (2, 1), (4, 1), (5, 2), (16, 2), (17, 3), (192, 4)])
def test_a_tree_of_fan_out_four(systems, levels):
    assert Cluster.of(CS2, systems, CLOCK).levels == levels


def test_the_chain_by_hand():
    blocks = [Block(forward=10, backward=20, trained=100), Block(forward=10, backward=20, trained=100)]
    joined = Cluster(4, 1, hop=7, link=100, memory=50, wire=8, state=2, jitter=0)
    # Backward of both ends at 40; the first block's update follows the second's: 40 + 7 + 4 cycles, 7 down, the turn
    # of its first matrix.
    found = cluster.exposed(blocks, first=25, cluster=joined)
    assert found == {"streaming": 2, "tree": 14, "update": pytest.approx(4), "waiting": pytest.approx(0)}
    slow = cluster.exposed(blocks, 25, replace(joined, memory=1))  # 200 cycles an update, one after the other
    assert sum(slow.values()) > 150 + sum(found.values())


def test_a_slow_memory_service_binds_the_step_and_the_report_says_so():
    slow = CS2.override({"memory_bandwidth": 1e10})
    assert step.search(slow, CLOCK, Model.uniform(MODELS["gpt3-xl"], 121, 0.0, 2)).total.bound_by == "memory"


PUBLISHED = [
    ("111m", 120, 1), ("256m", 264, 1), ("590m", 264, 1), ("1.3b", 528, 4), ("2.7b", 528, 4), ("6.7b", 1040, 16),
    ("13b", 1080, 12),
]  # fmt: skip


@pytest.mark.parametrize("name, batch, systems", PUBLISHED, ids=[name for name, *_ in PUBLISHED])
def test_published_runs_scale_within_nine_percent(name, batch, systems):
    """Cerebras-GPT, sec. 5.3, whose runs show no fixed cost of a step (docs/simulator.md)."""
    machine = CS2.override({"step_overhead": 0.0})
    model = Model.uniform(MODELS[f"cerebras-gpt-{name}"], batch)
    (strong,) = outlook.scale(machine, model, [systems])
    (weak,) = outlook.scale(CS2, replace(model, batch=batch // systems), [systems], weak=True)
    assert strong["efficiency"] > 0.91 and 0.99 < weak["efficiency"] <= 1 + 1e-9


def test_a_batch_too_small_for_its_systems_scales_badly():
    rows = outlook.scale(CS2, Model.uniform(MODELS["cerebras-gpt-1.3b"], 16), [1, 4, 16])
    assert [row["efficiency"] for row in rows] == sorted((row["efficiency"] for row in rows), reverse=True)
    assert rows[0]["efficiency"] == 1 and rows[-1]["efficiency"] < 0.9
    assert rows[-1]["exposed"] > rows[0]["exposed"] > 0


def test_the_slowest_system_paces_all():
    model = Model.uniform(MODELS["gpt3-xl"], 1600)
    plain, uneven = (outlook.scale(m, model, [16])[0] for m in (CS2, CS2.override({"system_jitter": 0.02})))
    loss = 1 - uneven["samples_per_second"] / plain["samples_per_second"]
    assert loss == pytest.approx(0.02 * np.sqrt(2 * np.log(16)), rel=0.1)


def test_four_grids_and_a_tree_meet_the_recurrence():
    """Each system: a grid of 8 x 8 PEs, event by event, that multiplies and has a gradient at the end; the tree: PEs 8
    apart that add the four up and send the sum back. The recurrence has the systems' time, a way up and a way down."""
    machine, words, systems = CS2, 256, 4
    values = np.random.default_rng(0).standard_normal((8, words)).astype(np.float32)
    one = np.eye(32, dtype=np.float32)
    grids = [programs.summa(machine, one * (s + 1), one, 8) for s in range(systems)]
    each = grids[0].cycles
    assert all(grid.cycles == each for grid in grids)
    region = Region(machine, 8 * systems, 1)  # a system's last PE is at 8 s; the memory service at 0
    at, other = 0, align_up(4 * words)
    for s in range(systems):
        x, colour = 8 * s, s % 2
        code = Code(machine)
        own = code.memory(at, words)
        code.task(0)
        code.work(each)  # the grid's own time, as it was run
        if s == systems - 1:
            code.vector("move", code.fabric_out(2, colour, words), own)
        elif s:
            code.vector("add", code.fabric_out(2, colour, words), code.fabric_in(0, words), own)
        else:
            code.vector("add", own, code.fabric_in(0, words), own)
            code.vector("move", code.fabric_out(3, 4, words), own)
        if s:
            code.vector("move", code.memory(other, words), code.fabric_in(1, words))
        code.end()
        region.load(x, 0, region.add(code))
        region.write(x, 0, at, values[s])
        region.write(x, 0, other, np.zeros(words, np.float32))
        region.activate(x, 0, 0)
    for s in range(1, systems):
        for x in range(8 * (s - 1), 8 * s + 1):
            region.route(x, 0, s % 2, "R" if x == 8 * s else "E", "R" if x == 8 * (s - 1) else "W")
        region.queue(8 * (s - 1), 0, s % 2, 0)
    for x in range(8 * (systems - 1) + 1):
        tap = "R" if x and x % 8 == 0 else ""
        region.route(x, 0, 4, "W" if x else "R", tap + ("E" if x < 8 * (systems - 1) else ""))
        if tap:
            region.queue(x, 0, 4, 1)
    cycles = region.run()
    np.testing.assert_allclose(region.read(8, 0, other, words), values[:systems].sum(0), rtol=1e-5, atol=1e-6)
    hop = (systems - 1) * (8 * machine.hop_cycles + 2 * machine.ramp_cycles + 1) + 2 * machine.ramp_cycles
    joined = Cluster(systems, 1, hop, link=1, memory=np.inf, wire=2, state=0, jitter=0)
    found = cluster.exposed([Block(0, each, words)], first=words / 2, cluster=joined)
    assert each + sum(found.values()) + words == pytest.approx(cycles, rel=0.02)


def align_up(byte):
    return programs.align(byte)


def test_scale_on_the_command_line(vspdf, tmp_path):
    picture = tmp_path / "scale.png"
    arguments = ("scale", "--model", "gpt2-small", "--batch", 64, "--systems", "1,2,4")
    status, out, err = vspdf("simulate", *arguments, "--json", "--plot", picture)
    assert status == 0, err
    rows = json.loads(out)["rows"]
    assert [row["systems"] for row in rows] == [1, 2, 4] and picture.stat().st_size > 5_000
    assert all({"samples_per_second", "efficiency", "exposed"} <= row.keys() for row in rows)
    assert rows[0]["efficiency"] == 1 > rows[1]["efficiency"] > rows[2]["efficiency"]
    status, out, _ = vspdf("simulate", *arguments, "--weak")
    assert status == 0 and "64 sequences a system" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--systems", "1,x"), "expected whole numbers with commas"),
        (("--systems", "0"), "--systems must be a whole number of at least 1, not 0"),
        (("--systems", "128"), "128 systems share a batch of 64"),
    ],
)
def test_what_cannot_be_scaled_is_said(vspdf, arguments, message):
    status, _, err = vspdf("simulate", "scale", "--model", "gpt2-small", "--batch", 64, *arguments)
    assert status == 2 and message in err and err.count("\n") == 1
