"""Level 2 against level 1: the small rungs of the ladder (benchmarks/ladder.py climbs on)."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import vspdf as package
from vspdf.errors import UserError
from vspdf.simulator import machine as machines
from vspdf.simulator.aggregate import programs as aggregate_programs
from vspdf.simulator.events import programs

ROOT = Path(__file__).resolve().parents[2]
CS2 = machines.load("cs2")


def ladder():
    spec = importlib.util.spec_from_file_location("ladder", ROOT / "benchmarks" / "ladder.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUNGS = [(side, *rung) for side in (4, 8, 16) for rung in ladder().rungs(CS2, side)]


# Streams: how sums find gaps between AXPYs of other columns is fitted (law.GAPS); rows wait for dy in their own ways.
LOOSE = {"forward": 0.1, "grad_input": 0.1, "gradient": 0.05}


@pytest.mark.parametrize(
    "program, event, aggregate",
    [(rung[1], *rung[3:]) for rung in RUNGS],
    ids=[f"{program}, {case}, {side}x{side}" for side, program, case, *_ in RUNGS],
)
def test_the_levels_agree(program, event, aggregate):
    assert aggregate() == pytest.approx(event(), rel=LOOSE.get(program, 0.025))


# Other machines: the aggregate model knows the mechanism, not the number.
OTHERS = {
    "a cheaper trigger": {"trigger_cycles": 0},
    "a slower command": {"reduce_startup": 60},
    "slower links": {"hop_cycles": 3, "ramp_cycles": 4},
    "slow tasks": {"task_switch": 40, "vector_startup": 20},
    "slow scalars": {"branch_cycles": 9, "load_cycles": 11, "alu_cycles": 2},
    "half the SIMD": {"fmac_fp16_rate": 2},
}


@pytest.mark.parametrize("program", ["forward", "gradient", "meshgemm", "two-phase", "meshgemv", "coo"])
@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_the_levels_agree_on_other_machines(program, settings):
    machine = CS2.override(settings)
    for name, _, event, aggregate in ladder().rungs(machine, 8):
        if name == program:
            assert aggregate() == pytest.approx(event(), rel={"forward": 0.12}.get(program, 0.05))


# Groups that do not divide the PEs: the last one is shorter, of a single PE perhaps; a group of one is no chain.
UNEVEN = [
    (4, 117, 3, False), (600, 64, 550, False), (30, 126, 25, False), (28, 99, 25, True), (10, 50, 1, False),
    (7, 50, 6, False), (26, 10, 12, True), (11, 1, 3, False), (2, 9, 1, True), (12, 50, 12, False), (9, 256, 2, False),
]  # fmt: skip


@pytest.mark.parametrize("settings", [{}, *OTHERS.values()], ids=["as it is", *OTHERS])
def test_the_levels_agree_to_the_cycle_on_groups_of_any_size(settings):
    machine = CS2.override(settings)
    for pes, elements, group, everywhere in UNEVEN:
        event = programs.reduce(machine, np.ones((pes, elements), np.float32), group, everywhere).cycles
        assert aggregate_programs.reduce(machine, pes, elements, group, everywhere) == event, (pes, elements, group)


def test_a_line_longer_than_the_wafer_is_refused_at_either_level():
    for level in ("event", "aggregate", "auto"):
        with pytest.raises(UserError, match="does not fit: "):
            package.simulate("reduce", pes=10_000_000, elements=4, group=1, level=level)


# Long ways, and buffers that keep the links full all the same: what a hop costs is seen wherever it counts.
FAR = CS2.override({"hop_cycles": 20, "router_buffer": 64})
FAR_RUNGS = [
    rung
    for rung in ladder().rungs(FAR, 6)
    if rung[0] not in ("star", "coo", "csc", "csr", "ellpack", "dense", "forward", "grad_input", "gradient")
]


@pytest.mark.parametrize(
    "event, aggregate", [rung[2:] for rung in FAR_RUNGS], ids=[f"{program}, {case}" for program, case, *_ in FAR_RUNGS]
)
def test_the_levels_agree_over_long_ways(event, aggregate):
    assert aggregate() == pytest.approx(event(), rel=0.006)


def test_a_row_of_the_gradient_waits_for_routers_to_turn():
    """Without that gate level 2 is 1.6 % too fast on the mean of these masks."""
    errors = []
    for seed, columns in enumerate((16, 16, 32, 32, 24)):
        random = np.random.default_rng(seed)
        mask = random.random((32, 16 * columns)) < 0.5
        dy, x = (random.standard_normal((n, 16)) * 0.1 for n in mask.shape)
        event = programs.stream_gradient(CS2, mask, dy, x, columns, 1).cycles
        counts = mask.reshape(32, columns, 16).sum(2)
        errors.append(aggregate_programs.stream_gradient(CS2, counts, 16, 16) / event - 1)
    assert abs(np.mean(errors)) < 0.01, errors


def test_the_whole_wafer_takes_no_time_to_speak_of():
    counts = np.random.default_rng(0).binomial(16, 0.1, (64, 750))
    by_row = aggregate_programs.stream_layer(CS2, counts, 16, 32, 994, rows=12288) / 12288
    # In lock-step a row would cost its fullest column; the ring hides a part of that.
    axpy = CS2.trigger_cycles + 8
    assert counts.mean() * axpy < by_row < counts.max(1).mean() * axpy + 120
    assert aggregate_programs.gemm(CS2, "meshgemm", 720, 720 * 16, True)["cycles"] > 0
