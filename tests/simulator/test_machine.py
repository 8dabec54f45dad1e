"""The machine description: every number has a source, every number is live, and what is unknown is refused."""

import json
import textwrap

import numpy as np
import pytest

import vspdf as package
from vspdf.errors import UserError
from vspdf.simulator import machine, simulate, validate
from vspdf.simulator.events import programs
from vspdf.simulator.events.fabric import Region, vector_cycles

CS2 = machine.load("cs2")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_every_parameter_has_a_unit_a_source_and_a_grade():
    for name, parameter in CS2.parameters.items():
        assert parameter.grade in machine.GRADES and len(parameter.source) > 2, name
        assert isinstance(parameter.unit, str), name


# -- SRAM --------------------------------------------------------------------------------------------------------------


def cycles(m, dst, acc, src, length=200, arith="fmac", **how):
    return vector_cycles(m, arith, dst, acc, src, length=length, **how)


def test_two_reads_of_a_bank_group_take_two_cycles():
    for offset in (0, 1, 2, 4, 5, 6):
        expected = 400 if offset % 4 == 0 else 200
        assert cycles(CS2, (4 * offset, 1), (4 * offset, 1), (0, 1), arith="mul") == expected, offset


def test_a_write_holds_up_a_read_of_its_bank():
    """Three words apart and written three cycles later: the write meets the other operand, a stall leaves a gap."""
    assert cycles(CS2, (12, 1), (12, 1), (0, 1), arith="mul") == 200 + 199 // 3
    assert cycles(CS2.override({"write_delay": 2}), (12, 1), (12, 1), (0, 1), arith="mul") == 200


def test_an_fmac_loses_a_cycle_where_its_late_accumulator_meets_a_multiplicand():
    """C one word after B: every sixth cycle, whatever the rows."""
    for row in range(4):
        c, b = (4 + 16 * row, 1), (0, 1)
        assert cycles(CS2, c, c, b) == 200 + 199 // 5
    assert cycles(CS2, (8, 1), (8, 1), (0, 1)) == 200


def test_operands_aligned_alike_take_two_cycles_however_late_the_accumulator_is_read():
    """The published rule for two reads, and the slope of the SGEMM on the whole wafer (V13)."""
    for offset in (0, 16, 32):
        assert cycles(CS2, (offset, 1), (offset, 1), (0, 1)) == pytest.approx(400, rel=0.13)
    assert cycles(CS2, (0, 1), (0, 1), (0, 1)) == 400


@pytest.mark.parametrize(
    "stride, width", [(0, 4), (1, 4), (2, 4), (3, 4), (5, 4), (6, 4), (4, 2), (9, 2), (7, 2), (8, 1)]
)
def test_a_stride_sets_the_width(stride, width):
    """The CSL appendix's table of strides, for @fmach."""
    sums = (4, stride or 1)
    assert cycles(CS2, sums, sums, (0, stride), 400, half=True) >= 400 // width
    assert cycles(CS2, sums, sums, (0, stride), 400, half=True) <= 1.2 * (400 // width)


def test_a_column_in_one_bank_takes_two_cycles_and_three_where_both_columns_do():
    def column(bank_a, bank_c):
        return cycles(CS2, (4 * bank_c, 64), (4 * bank_c, 64), (4 * bank_a, 48)) / 200

    assert column(1, 0) == pytest.approx(2, rel=0.03)
    assert column(4, 0) == pytest.approx(2, rel=0.03)  # the other bank of the group: its read beside the write
    assert column(0, 0) == pytest.approx(3.2, rel=0.03)


@pytest.mark.parametrize("length", [0, 1, 2, 3])
@pytest.mark.parametrize("arith", ["move", "fill", "add", "mul", "fmac", "dot"])
def test_short_operations(arith, length):
    assert cycles(CS2, (4, 1), (4, 1), (0, 1), length, arith) == length


def test_rates():
    apart = ((8, 1), (8, 1), (0, 1))
    assert cycles(CS2, *apart, arith="mul", pair=True) == 100
    assert cycles(CS2, (4, 1), (4, 1), (0, 1), half=True) == 50
    assert cycles(CS2, (4, 8), (4, 8), (0, 8), half=True) >= 200  # in one bank: one by one


# -- every parameter moves something -----------------------------------------------------------------------------------


def window(m, fmt="coo", width=2):
    mask = np.random.default_rng(0).random((12, 8 * width)) < 0.4
    return programs.spmm(m, fmt, mask, 20, width, 2).cycles


def summa(m):
    return programs.summa(m, normal(12, 12), normal(12, 12, seed=1), 3).cycles


def stream(m):
    mask = np.random.default_rng(0).random((10, 12)) < 0.4
    return programs.stream_layer(m, normal(10, 12), mask, normal(12, 16, seed=1), 4, 2).cycles


def senders(m):
    """How long PEs are held up whose receivers are not ready yet."""
    return programs.reduce(m, normal(12, 64), 3).per_pe.sum()


def reduce(m, group=4):
    return programs.reduce(m, normal(8, 64), group).cycles


def vector(m, mode):
    return programs.vector_op(m, 64, mode).cycles


def fits(call):
    """1 where a call is accepted, 0 where the machine is too small for it."""

    def ask(m):
        try:
            call(m)
        except UserError:
            return 0
        return 1

    return ask


def in_bank(m):
    return cycles(m, (0, 8), (0, 8), (16, 8))


def colours_route(m):
    Region(m, 2, 1).route(0, 0, 23, "R", "E")


def positions(m):
    Region(m, 2, 1).route(0, 0, 0, "R", "E", ("W", "E"), ("R", "E"), ("W", "E"))


MOVES = {
    "width": (700, fits(lambda m: Region(m, 720, 1))),
    "height": (700, fits(lambda m: Region(m, 1, 990))),
    "clock_sdk": (1.0, lambda m: simulate.simulate("reduce", machine=m, pes=4, elements=4, group=2)["seconds"]),
    "clock_hot_chips": (1.0, lambda m: simulate.simulate("reduce", machine=m, pes=4, elements=4, group=2)["seconds"]),
    "colours": (8, fits(colours_route)),
    "switch_positions": (2, fits(positions)),
    "hop_cycles": (3, reduce),
    "ramp_cycles": (4, reduce),
    "router_buffer": (1, reduce),
    "in_queue_depth": ([1] * 8, senders),
    "out_queue_depth": ([1] * 6, reduce),
    "sram_bytes": (256, fits(window)),
    "banks": (4, in_bank),
    "read_groups": (8, lambda m: cycles(m, (16, 1), (16, 1), (0, 1), arith="mul")),
    "bank_bytes": (8, window),
    "port_bytes": (4, lambda m: vector(m, "pair")),
    "accumulator_delay": (4, window),
    "write_delay": (1, lambda m: vector(m, "single")),
    "vector_startup": (9, window),
    "pair_startup": (30, lambda m: vector(m, "pair")),
    "pair_rate": (1, lambda m: vector(m, "pair")),
    "fmac_fp32_rate": (0.5, window),
    "fmac_fp16_rate": (2, stream),
    "task_switch": (30, reduce),
    "command_cycles": (9, stream),
    "sums_held": (2, lambda m: stream(m.override({"trigger_cycles": 0}))),
    "alu_cycles": (2, window),
    "load_cycles": (5, window),
    "multiply_cycles": (7, window),
    "branch_cycles": (5, window),
    "scalar_fp_cycles": (20, lambda m: window(m, "csr")),
    "descriptor_cycles": (9, summa),
    "unroll_limit": (1, lambda m: window(m, "ellpack")),
    "timing_frame": (100, window),
    "launch_cycles": (100, reduce),
    "collective_setup": (300, summa),
    "trigger_cycles": (10, stream),
    "reduce_startup": (40, stream),
    "micro_threads": (1, lambda m: _crowded(m)),
}


def _crowded(m):
    try:
        programs.ring_gemm(m, normal(4, 4), normal(4, 4), 2, interleaved=True)
    except UserError as error:
        return str(error)
    return "fits"


@pytest.mark.parametrize("name", MOVES)
def test_a_parameter_is_live(name):
    value, result = MOVES[name]
    assert result(CS2) != result(CS2.override({name: value}))


def test_slopes_come_from_banks_delays_and_start_up():
    """Cycles per non-zero and element of COO, without any constant part."""

    def slope(m):
        masks = [np.arange(64).reshape(8, 8) < nnz for nnz in (8, 40)]
        low, high = ([programs.spmm(m, "coo", mask, width, 1, 1).cycles for mask in masks] for width in (68, 132))
        return (high[1] - high[0] - low[1] + low[0]) / 32 / 64

    def per_nonzero(m):
        few, many = (programs.spmm(m, "coo", np.arange(64).reshape(8, 8) < nnz, 68, 1, 1).cycles for nnz in (8, 40))
        return (many - few) / 32

    assert slope(CS2) == pytest.approx(1.2, abs=0.01)
    assert slope(CS2.override({"accumulator_delay": 4})) == pytest.approx(1.0, abs=0.01)
    assert slope(CS2.override({"bank_bytes": 2})) == pytest.approx(1.2, abs=0.01)  # the other vendor text, see V7
    assert slope(CS2.override({"bank_bytes": 8})) != pytest.approx(slope(CS2), abs=0.01)
    assert per_nonzero(CS2.override({"vector_startup": 16})) == per_nonzero(CS2) + 10


# -- users' own machines -----------------------------------------------------------------------------------------------


def test_a_machine_of_ones_own(tmp_path):
    path = tmp_path / "wse3.yaml"
    path.write_text(
        textwrap.dedent("""
            name: {value: wse-3, unit: "", grade: M, source: "a guess"}
            width: {value: 900, unit: PEs, grade: M, source: "a guess"}
            fmac_fp16_rate: {value: 8, unit: per cycle, grade: M, source: "a guess"}
        """)
    )
    own = machine.load(path, ["colours=32"])
    assert own.name == "wse-3 with colours=32" and own.width == 900 and own.height == CS2.height and own.colours == 32
    assert own.parameters["colours"].grade == "set"
    assert simulate.simulate("reduce", machine=path, pes=900, elements=4, group=30)["machine"] == "wse-3"


def test_a_machine_that_is_not_the_real_one_does_not_bear_its_name(tmp_path, vspdf):
    nameless, copy = tmp_path / "faster.yaml", tmp_path / "cs2.yaml"
    nameless.write_text('host_bandwidth: {value: 1.0e12, unit: bytes/s, grade: M, source: "a thought"}\n')
    copy.write_text((machine.FOLDER / "cs2.yaml").read_text())
    assert (machine.load(nameless).name, machine.load(copy).name) == ("faster", "cs2.yaml")
    assert machine.load(machine.FOLDER / "cs2.yaml").name == "cs2"
    one = machine.load("cs2", {"task_switch": 500})
    assert one.name == "cs2 with task_switch=500" and one.override({"banks": 4}).settings == {
        "task_switch": 500,
        "banks": 4,
    }
    many = machine.load("cs3", ["banks=4", "colours=9", "hop_cycles=2", "host_bandwidth=1e9"])
    assert many.name == "cs3 with 4 settings" and many.said()["settings"]["host_bandwidth"] == 1e9
    assert many.said()["note"].endswith("Set by the user: banks=4, colours=9, hop_cycles=2, host_bandwidth=1e+09.")
    assert machine.load("cs2", {"name": "mine", "banks": 4}).name == "mine with banks=4"


RESULTS = {
    "gemm": {"algorithm": "summa", "grid": "4x4", "n": 8},
    "gemv": {"grid": "4x4", "n": 8},
    "spmm": {"format": "coo", "grid": "2x2", "n": 8, "k": 8, "m": 4},
    "reduce": {"pes": 4, "elements": 8, "group": 2},
    "layer": {"tokens": 64, "in_features": 64, "out_features": 64},
    "layer event": {"tokens": 8, "in_features": 16, "out_features": 8, "level": "event"},
    "step": {"model": "gpt2-small", "batch": 8},
    "scale": {"model": "gpt2-small", "batch": 8, "systems": [1, 2]},
}


@pytest.mark.parametrize("program", RESULTS)
def test_every_result_says_of_which_machine_it_is(program):
    ask = lambda **how: package.simulate(program.split()[0], **RESULTS[program], **how)  # noqa: E731
    plain = ask()
    assert (plain["machine"], plain["note"], plain["settings"]) == ("cs2", "", {})
    assert "unvalidated" in ask(machine="cs3")["note"]
    changed = ask(settings=["task_switch=500"])
    assert changed["machine"] == "cs2 with task_switch=500" and changed["settings"] == {"task_switch": 500}
    assert "Set by the user: task_switch=500." in changed["note"]


def test_validation_says_of_which_machine_it_is(vspdf):
    _, out, _ = vspdf("validate", "--case", "V1", "--set", "bank_bytes=2", "--json")
    found = json.loads(out)
    assert found["machine"] == "cs2 with bank_bytes=2" and found["settings"] == {"bank_bytes": 2}
    _, out, _ = vspdf("simulate", "gemm", "--grid", "4x4", "--n", 8, "--machine", "cs3", "--set", "banks=4")
    assert "gemm on cs3 with banks=4" in out and "unvalidated" in out and "Set by the user: banks=4." in out


@pytest.mark.parametrize(
    "text, message",
    [
        ("bank: {value: 8, unit: count, grade: M, source: x}", "Did you mean 'banks'"),
        ("banks: 8", "needs value, unit, source and grade"),
        ("banks: {value: 8, unit: count, grade: M}", "'banks' lacks source"),
        ("banks: {value: 8, unit: count, grade: Z, source: x}", "grade 'Z'"),
        ("banks: {value: 8, unit: count, grade: M, source: x, note: y}", "unknown field 'note'"),
        ("banks: {value: eight, unit: count, grade: M, source: x}", "takes a number"),
        ("in_queue_depth: {value: 4, unit: words, grade: M, source: x}", "list of positive integers"),
        ("banks: {value: .inf, unit: count, grade: M, source: x}", "at most 1,000,000"),
        ("banks: {value: .nan, unit: count, grade: M, source: x}", "takes a number"),
        ("banks: {value: 8, unit: count, grade: [M], source: x}", "words as its grade"),
        ("banks: {value: 8, unit: 3, grade: M, source: x}", "words as its unit"),
        ("banks: {value: 8, unit: count, grade: M, source: x, range: [9, 12]}", "outside its range"),
        ("banks: {value: 8, unit: count, grade: M, source: x, range: 3}", "two numbers as its range"),
        ("base: 3", "'base' needs words"),
        ("- 1", "expected parameters"),
        ("7", "cannot be read as YAML"),
        ("a: ${b}", "cannot be read as YAML|bare"),
        ("[" * 20_000, "nests too deep|cannot be read as YAML"),
        ("a: [", "cannot be read as YAML"),
    ],
)  # fmt: skip
def test_a_bad_machine_file_is_one_clear_line(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        machine.load(path)


@pytest.mark.parametrize(
    "setting, message",
    [
        ("bank=4", "unknown machine parameter 'bank'. Did you mean 'banks'"),
        ("banks", "expected key=value"),
        ("banks=x", "takes a number"),
        ("banks=2.5", "whole number"),
        ("banks=-1", "at least 0"),
        ("banks=0", "must be above 0"),
        ("swarm_fanout=1", "at least 2"),
        ("hop_cycles=1000000000000", "a number of at least 0 and at most 1,000,000, not 1000000000000"),
        ("width=1000000000", "at most 10,000"),
        ("router_buffer=1000000", "at most 1,024"),
        ("host_bandwidth=1e16", "a number of at least 0 and at most 1e"),
        ("in_queue_depth=[6, 1000000000000]", "none above 1,024"),
        ("hop_cycles=[", "expected key=value"),
        ("hop_cycles=${a}", "expected key=value|takes a number"),
    ],
)
def test_a_bad_setting_is_one_clear_line(setting, message):
    with pytest.raises(UserError, match=message):
        machine.load("cs2", [setting])


LARGEST = [  # all but those of which the core takes less, and programs need more
    name for name, p in CS2.parameters.items()
    if isinstance(p.value, int) and name not in {"colours", "switch_positions", "hop_cycles", "ramp_cycles"}
]  # fmt: skip


@pytest.mark.parametrize("value", ["least", "most"])
def test_whole_numbers_that_are_let_in_run(value):
    """What the core cannot take is refused as a setting, in a line; all else ends in a result or such a line."""
    for name in LARGEST:
        end = machine.LEAST_OF.get(name, 1) if value == "least" else machine.MOST_OF.get(name, machine.MOST_WHOLE)
        changed = CS2.override({name: end})
        for program in ("gemm", "gemv", "spmm", "reduce", "scale"):
            if name in ("sram_bytes", "width", "height") and value == "least":
                with pytest.raises(UserError):
                    package.simulate(program, machine=changed, **RESULTS[program])
                break
            try:
                assert package.simulate(program, machine=changed, **RESULTS[program])["machine"] == changed.name
            except UserError as error:
                assert (name, program) == ("micro_threads", "gemm"), error
                assert "more micro-threads at once than this machine has, 1." in str(error)


def test_unknown_machine():
    with pytest.raises(UserError, match="Did you mean 'cs"):
        machine.load("cs4")


def test_a_cs3_ships_unvalidated_with_every_key_graded(vspdf):
    cs3 = machine.load("cs3")
    assert cs3.name == "cs3" and "unvalidated" in cs3.note and not CS2.note
    assert cs3.width * cs3.height > CS2.width * CS2.height and cs3.fmac_fp16_rate == 8
    for name, parameter in cs3.parameters.items():
        assert parameter.grade in machine.GRADES and parameter.source, name
        if parameter.source.startswith("as cs2"):
            assert parameter.grade == "M", name
    status, out, _ = vspdf("simulate", "machines", "--json")
    found = {m["name"]: m for m in json.loads(out)["machines"]}
    assert status == 0 and found["cs2"]["validated"] and not found["cs3"]["validated"]
    assert found["cs3"]["parameters"].keys() == CS2.parameters.keys()
    status, out, _ = vspdf("simulate", "machines")
    assert status == 0 and "8x sparsity" in out
    status, out, _ = vspdf("simulate", "layer", "--tokens", 64, "--in", 64, "--out", 64, "--machine", "cs3")
    assert status == 0 and "cs3" in out


def test_a_machine_starts_from_any_other(tmp_path):
    (tmp_path / "mine.yaml").write_text('base: cs3\nbanks: {value: 16, unit: count, grade: M, source: "a thought"}\n')
    (tmp_path / "later.yaml").write_text('base: mine.yaml\nnote: "a guess"\n')
    mine, later = (machine.load(tmp_path / name) for name in ("mine.yaml", "later.yaml"))
    assert mine.banks == later.banks == 16 and mine.width == machine.load("cs3").width
    assert later.note == "a guess" and "no measurement" in mine.note
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(UserError, match="cannot start from itself"):
        machine.load(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("base: cs9")
    with pytest.raises(UserError, match="no machine 'cs9'"):
        machine.load(tmp_path / "a.yaml")


def test_ranges_hold_their_values():
    for name, parameter in CS2.parameters.items():
        if parameter.range:
            low, high = parameter.range
            assert low <= parameter.value <= high and low < high, name
            assert parameter.grade != "A", name


# -- calibration -------------------------------------------------------------------------------------------------------


def test_the_calibration_rows_say_what_the_parameters_are():
    """Refitting a constant and a cost per non-zero on the four rows of COO leaves both where they are."""
    about = validate.facts()["V4"]
    rows = validate.table("coo.csv")
    left = []
    for row in about["calibrated"]:
        line = rows[row]
        n, k, m, nnz = (int(line[key]) for key in ("N", "K", "M", "nnz_per_pe"))
        work = simulate.spmm(CS2, "coo", f"{line['width']}x{line['height']}", n, k, m, float(line["density"]), nnz)
        left.append((nnz, float(line["max_cycles"]) - work.aggregate["cycles_max"]))
    nnz, rest = np.array(left).T
    per_nonzero, constant = np.polyfit(nnz, rest, 1)
    assert len(left) <= 4 and abs(per_nonzero) < 1.5 and abs(constant) < 200  # 1 % of either sum
