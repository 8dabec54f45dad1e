"""Rounds of a benchmark: ratios are of one round, disturbed rounds count for nothing, what cannot be is no result."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vspdf.bench import linear, rounds
from vspdf.bench.linear import Layer
from vspdf.bench.rounds import Timed, compared
from vspdf.runs.record import beside_dense

TABLES = Path(__file__).resolve().parents[2] / "benchmarks" / "tables.py"


def quiet(*seconds):
    return [Timed(s, 2 * s) for s in seconds]


def test_a_ratio_is_the_median_of_ratios_of_one_round():
    ratio = compared(quiet(2, 4, 20), quiet(1, 2, 10))  # everything in the third took ten times as long
    assert ratio == (2, 2, 2, 0)
    assert compared(quiet(1, 2, 3), quiet(1, 1, 1)) == (2, 1.5, 2.5, 0)
    assert compared(quiet(3), quiet(1)) == (3, 3, 3, 0)


def test_rounds_in_which_others_had_the_cores_are_left_out():
    base = [*quiet(2, 2, 2), Timed(60, 4)]  # as much of the processor as ever, in thirty times the time
    assert compared(base, quiet(1, 1, 1, 1)) == (2, 2, 2, 1)
    mine = [Timed(9, 2), *quiet(1, 1, 1)]
    assert compared(quiet(2, 2, 2, 2), mine) == (2, 2, 2, 1)
    assert compared(quiet(2, 2, 2, 90), quiet(1, 1, 1, 1), [False, False, False, True]) == (2, 2, 2, 1)
    assert compared(quiet(2, 4, 4), quiet(1, 1, 1), [True, True, False]).median == 4, "too few are left: all count"


@pytest.mark.parametrize(
    "dense, mine, peak, possible",
    [(1.0, 0.26, 1e3, True), (1.0, 0.03, 1e3, False), (1.0, 0.26, 1e-9, False)],
    ids=["possible", "above the ideal", "above the peak"],
)
def test_what_cannot_be_is_no_result(dense, mine, peak, possible):
    layer = Layer(64, 32, 32, 0.75, 256, 1, "fp32")
    times = {("dense", "forward"): quiet(dense), ("vspdf", "forward"): quiet(mine)}
    row = linear._rows(layer, times, peak)[1]
    assert row.possible is possible and row.ratio_to_dense == pytest.approx(dense / mine)
    assert linear._break_even([row])[0:1] == ([] if not possible else linear._break_even([row]))


def test_an_impossible_figure_is_not_printed(vspdf, monkeypatch):
    monkeypatch.setattr(rounds, "ideal", lambda sparsity: 0.0)
    monkeypatch.setattr(linear, "ideal", lambda sparsity: 0.0)
    status, out, _ = vspdf(
        "bench", "linear", "--shapes", "8x16x16", "--sparsity", "0.5", "--rounds", 1, "--threads", 1, "--no-peers"
    )
    assert status == 0 and "(no result)" in out and "x │" not in out and "the measurement was disturbed" in out


def test_half_precision_on_a_cpu_is_measured(vspdf):
    small = ("--shapes", "8x16x16", "--sparsity", "0.5", "--rounds", 2, "--threads", 1, "--json")
    body = json.loads(vspdf("bench", "linear", *small, "--precision", "bf16,fp32")[1])
    assert {row["precision"] for row in body["rows"]} == {"bf16", "fp32"}
    assert {row["peak_fraction"] for row in body["rows"] if row["precision"] == "bf16"} == {None}
    assert all(row["ratio_low"] <= row["ratio_to_dense"] <= row["ratio_high"] for row in body["rows"])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_all_candidates_compute_the_same(precision):
    problem = linear.Problem.random(16, 32, 48, 0.5, precision=precision)
    assert problem.x.dtype == linear.PRECISIONS[precision]
    found = {name: problem.candidates([name])[name]["grad_input"]() for name in ("dense", "auto", "dense_mask")}
    for name, result in found.items():
        assert result.dtype == problem.x.dtype, name
        assert (result - found["dense"]).abs().max() < 0.05 * found["dense"].abs().max(), name


def test_a_table_of_part_of_the_shapes_and_sparsities(vspdf, tmp_path):
    path = tmp_path / "part.csv"
    assert vspdf(
        "bench", "linear", "--shapes", "8x16x16", "--sparsity", "0.5", "--rounds", 1, "--threads", 1, "--csv", path
    )[0] == 0  # fmt: skip
    with path.open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row["possible"] = str(row["product"] != "layer")
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    done = subprocess.run([sys.executable, str(TABLES), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = {line.split(" | ")[0].strip("| "): line.split("|")[3:8] for line in done.stdout.splitlines() if "|" in line}
    assert "x (" in lines["forward"][0] and [cell.strip() for cell in lines["forward"][1:]] == [""] * 4
    assert lines["layer"][0].strip() == "-"


def test_rows_of_steps_name_their_model(vspdf, tmp_path):
    path = tmp_path / "step.csv"
    small = ("--n-layer", 1, "--d-model", 16, "--n-head", 2, "--sequence-length", 8, "--batch-size", 1)
    status, out, _ = vspdf("bench", "step", *small, "--sparsity", 0.5, "--rounds", 1, "--threads", 1, "--csv", path)
    assert status == 0 and "0M" not in out
    with path.open() as stream:
        row = next(csv.DictReader(stream))
    assert (row["n_layer"], row["d_model"], row["batch_size"]) == ("1", "16", "1") and int(row["parameters"]) > 0
    done = subprocess.run([sys.executable, str(TABLES), str(path)], capture_output=True, text=True)
    assert done.returncode == 1 and "expected what vspdf bench linear --csv writes" in done.stderr


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_three_figures_beside_dense_steps_fit_each_other(count):
    pairs = [(0.155, 0.127), (0.2, 0.16), (0.1, 0.3), (0.16, 0.17)][:count]
    found = beside_dense(pairs)
    ratio = found["dense_step_seconds_median"] / found["paired_step_seconds_median"]
    assert found["speedup"]["median"] == ratio and found["pairs"] == count
    assert found["speedup"]["low"] <= ratio <= found["speedup"]["high"]
