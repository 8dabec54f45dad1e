"""Rounds of a benchmark: ratios are of one round, disturbed rounds count for nothing, what cannot be is no result."""

import csv
import random

import pytest

from vspdf.bench import linear, rounds, step
from vspdf.bench.rounds import Budget, Timed, compared, interval, time_rounds
from vspdf.pattern import Pattern
from vspdf.runs.record import beside_dense


def quiet(*seconds):
    return [Timed(s, 2 * s) for s in seconds]


def test_a_ratio_is_the_median_of_ratios_of_one_round():
    ratio = compared(quiet(2, 4, 20), quiet(1, 2, 10))  # everything in the third took ten times as long
    assert ratio == (2, 2, 2, 0)
    assert compared(quiet(1, 2, 3), quiet(1, 1, 1)) == (2, 1, 3, 0)
    assert compared(quiet(3), quiet(1)) == (3, 3, 3, 0)


def test_rounds_in_which_others_had_the_cores_are_left_out():
    base = [*quiet(2, 2, 2), Timed(60, 4)]  # as much of the processor as ever, in thirty times the time
    assert compared(base, quiet(1, 1, 1, 1)) == (2, 2, 2, 1)
    mine = [Timed(9, 2), *quiet(1, 1, 1)]
    assert compared(quiet(2, 2, 2, 2), mine) == (2, 2, 2, 1)
    assert compared(quiet(2, 2, 2, 90), quiet(1, 1, 1, 1), [False, False, False, True]) == (2, 2, 2, 1)
    assert compared(quiet(2, 4, 4), quiet(1, 1, 1), [True, True, False]).median == 4, "too few are left: all count"


def test_a_column_that_ended_earlier_is_held_against_its_own_rounds():
    assert compared(quiet(2, 2, 9, 9), quiet(1, 1)) == (2, 2, 2, 0)


@pytest.mark.parametrize(
    "count, rank", [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (100, 40), (1100, 518), (100_000, 49_690)]
)
def test_the_interval_of_a_median_is_by_ranks(count, rank):
    """Of n fair coins fewer than k fall on one side with at most 2.5 %: tables of the binomial distribution."""
    numbers = random.Random(0).sample(range(1, count + 1), count)
    assert interval(numbers) == (rank, count + 1 - rank)


def test_the_interval_holds_the_median_nineteen_times_of_twenty():
    chance = random.Random(1)
    held = sum(
        low <= 0 <= high for low, high in (interval([chance.gauss(0, 1) for _ in range(15)]) for _ in range(2000))
    )
    assert 0.95 <= held / 2000 <= 0.98


class Clock:
    """Calls that take as long as they say, in this clock's seconds."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(rounds.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(rounds.time, "process_time", lambda: self.now)

    def call(self, name, seconds):
        def run():
            self.calls.append(name)
            self.now += next(seconds) if hasattr(seconds, "__next__") else seconds

        return {"layer": run}


def test_rounds_end_when_intervals_are_narrow(monkeypatch):
    """What is settled is timed no more; what is noise goes on until time is up."""
    clock, chance = Clock(monkeypatch), random.Random(2)
    noise = iter(lambda: chance.uniform(0.5, 1.5), None)
    candidates = {
        "dense": clock.call("dense", 2.0),
        "fast": clock.call("fast", 1.0),
        "noise": clock.call("noise", noise),
    }
    times = time_rounds(candidates, Budget(seconds=100))
    assert len(times["fast", "layer"]) == 7 < len(times["noise", "layer"]) == len(times["dense", "layer"])
    assert 100 < clock.now < 120
    assert len(time_rounds(candidates, 3)["fast", "layer"]) == 3
    del candidates["noise"]
    assert len(time_rounds(candidates, Budget(seconds=100))["fast", "layer"]) == 7
    assert len(time_rounds(candidates, Budget(seconds=0))["fast", "layer"]) == 3, "time is up at once"


def test_short_calls_are_repeated_inside_a_round(monkeypatch):
    clock = Clock(monkeypatch)
    times = time_rounds({"dense": clock.call("dense", 1e-4), "slow": clock.call("slow", 0.01)}, 2)
    assert clock.calls.count("dense") == 2 + 2 * 10 and clock.calls.count("slow") == 2 + 2
    assert [timed.seconds for timed in times["dense", "layer"]] == pytest.approx([1e-4] * 2)


@pytest.mark.parametrize("peak, possible", [(1e3, True), (1e-9, False)], ids=["possible", "above the peak"])
def test_what_cannot_be_is_no_result(peak, possible):
    case = linear.Case(Pattern.random((32, 32), 0.75), 64, 0.75, None, 1)
    side = linear.Side({}, {"forward": 1e-7}, (), 0.5)
    times = {("dense float32", "forward"): quiet(1.0), ("vspdf float32", "forward"): quiet(0.26)}
    sides = {("dense", "float32"): side, ("vspdf", "float32"): side}
    row = linear._rows(case, sides, times, "float32", peak)[1]
    assert row.possible is possible and row.ratio_to_dense == pytest.approx(1 / 0.26)
    assert linear._break_even([row])[0:1] == ([] if not possible else linear._break_even([row]))
    assert bool(linear.summary([row])) is possible


def test_a_layer_knows_when_its_preparation_has_paid():
    case = linear.Case(Pattern.random((32, 32), 0.75), 64, 0.75, None, 1)
    sides = {("dense", "float32"): linear.Side({}, {}, (), 0.0), ("mine", "float32"): linear.Side({}, {}, (), 10.0)}
    base = {("dense float32", "layer"): quiet(3.0)}
    for seconds, pays in ((1.0, 5), (3.0, None), (4.0, None)):
        rows = linear._rows(case, sides, base | {("mine float32", "layer"): quiet(seconds)}, "float32", 1e9)
        assert rows[1].pays_after == pays and rows[1].prepare_seconds == 10.0


def test_an_impossible_figure_is_not_printed(vspdf, monkeypatch):
    monkeypatch.setattr(step, "ideal", lambda sparsity: 0.0)
    small = ("--n-layer", 1, "--d-model", 16, "--n-head", 2, "--sequence-length", 8, "--batch-size", 1)
    status, out, _ = vspdf("bench", "step", *small, "--sparsity", "0.5", "--rounds", 1, "--threads", 1)
    assert status == 0 and "(no result)" in out and "of steps above what the sparsity allows" in out


def test_rows_of_steps_name_their_model(vspdf, tmp_path):
    path = tmp_path / "step.csv"
    small = ("--n-layer", 1, "--d-model", 16, "--n-head", 2, "--sequence-length", 8, "--batch-size", 1)
    status, out, _ = vspdf("bench", "step", *small, "--sparsity", 0.5, "--rounds", 1, "--threads", 1, "--csv", path)
    assert status == 0 and "0M" not in out
    with path.open() as stream:
        row = next(csv.DictReader(stream))
    assert (row["n_layer"], row["d_model"], row["batch_size"]) == ("1", "16", "1") and int(row["parameters"]) > 0


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_three_figures_beside_dense_steps_fit_each_other(count):
    pairs = [(0.155, 0.127), (0.2, 0.16), (0.1, 0.3), (0.16, 0.17)][:count]
    found = beside_dense(pairs)
    ratio = found["dense_step_seconds_median"] / found["paired_step_seconds_median"]
    assert found["speedup"]["median"] == ratio and found["pairs"] == count
    assert found["speedup"]["low"] <= ratio <= found["speedup"]["high"]
