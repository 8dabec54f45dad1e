"""What a kept weight is worth, and studies whose arms train for equally long."""

import json

import pytest

from vspdf.compare import budget, definition, results, runner, worker
from vspdf.compare.multiplier import multipliers
from vspdf.config import loading
from vspdf.errors import UserError
from vspdf.runs.folder import Run


def arm(name, kept, weights, losses, seconds=None):
    runs = [
        {"seed": seed, "test_loss": loss, "cpu_seconds": seconds, "tokens": 1000} for seed, loss in enumerate(losses)
    ]
    return {"name": name, "kept": kept, "weights": weights, "runs": runs}


DENSE = [arm("d1", 100.0, 100, [2.0, 2.1], 1.0), arm("d2", 400.0, 400, [1.5, 1.6], 3.0)]


def test_m_is_the_size_of_the_dense_model_of_equal_loss_over_what_is_kept():
    found = multipliers([*DENSE, arm("set", 100.0, 400, [1.75, 1.85], 2.0)], ["d1", "d2"])
    (only,) = found
    assert only["method"] == "set" and only["m"] == pytest.approx(2.0)  # half way between 1 and 4, in logarithms
    assert only["low"] == pytest.approx(2.0) and only["high"] == pytest.approx(2.0) and only["seeds"] == [0, 1]
    assert only["break_even"] == pytest.approx(2.0) and not only["extrapolated"]
    assert only["at_equal_time"]["mean"] == pytest.approx(0.0, abs=1e-12)


def test_at_equal_time_the_loss_is_held_against_the_dense_model_of_equal_steps_on_each_seed():
    (only,) = multipliers([*DENSE, arm("set", 100.0, 400, [1.65, 1.80], 2.0)], ["d1", "d2"])
    between = [1.75, 1.85]  # the dense model half way, in logarithms of weights
    assert only["at_equal_time"]["mean"] == pytest.approx((1.65 - between[0] + 1.80 - between[1]) / 2)
    assert only["at_equal_time"]["low"] < only["at_equal_time"]["mean"] < only["at_equal_time"]["high"]
    (slow,) = multipliers([*DENSE, arm("set", 100.0, 400, [1.5, 1.6], 4.0)], ["d1", "d2"])  # beyond the family
    assert slow["at_equal_time"]["mean"] == pytest.approx(0.25) and slow["break_even"] == pytest.approx(8.0)
    (unknown,) = multipliers([*DENSE, arm("set", 100.0, 400, [1.5, 1.6])], ["d1", "d2"])
    assert unknown["at_equal_time"]["mean"] is None and unknown["break_even"] is None


def test_intervals_are_of_seeds_and_what_lies_beyond_the_family_is_said():
    (only,) = multipliers([*DENSE, arm("rigl", 50.0, 400, [1.75, 1.8])], ["d1", "d2"])
    assert only["low"] < only["m"] < only["high"] and only["break_even"] is None
    (only,) = multipliers([*DENSE, arm("best", 100.0, 400, [1.25, 1.35])], ["d1", "d2"])
    assert only["m"] == pytest.approx(8.0) and only["extrapolated"]
    assert multipliers([*DENSE, arm("dense-too", 400, 400, [1.0, 1.0])], ["d1", "d2"]) == []
    flat = [arm("d1", 100.0, 100, [1.5]), arm("d2", 400.0, 400, [1.5])]
    assert multipliers([*flat, arm("set", 100.0, 400, [1.4])], ["d1", "d2"]) == []


STUDY = """
seeds: [1, 2]
tuning_seeds: [100]
seconds: 60
tuning_seconds: 15
common:
  model: {n_layer: 1, d_model: 32, n_head: 2, sequence_length: 16}
  data: {corpus: stdlib, test_fraction: 0.1}
  train: {threads: 1}
arms:
  dense: {phases: [{steps: 100}], tune: {optimizer.lr: [1.0e-3, 2.0e-3]}}
  set-then-dense: {phases: [{sparsity: 0.75, steps: 80, algorithm: set}, {steps: 20}]}
"""


def test_steps_fill_the_time_with_the_moves_of_masks_counted():
    pace = [{"step": 0.1, "update": 0.5}, {"step": 0.2, "update": 0.0}]
    body = {"model": {"n_layer": 1, "d_model": 8, "n_head": 1, "sequence_length": 8}, "data": {"test_fraction": 0.1},
            "phases": [{"sparsity": 0.75, "steps": 80, "algorithm": "set"}, {"steps": 20}]}  # fmt: skip
    sparse, dense = budget._filling(definition.Arm("set", body, {}, "here"), pace, 300.0)
    moves = len(range(50, int(0.75 * sparse), 50))  # by default; the first before the first step, which moves none
    assert sparse * 0.1 + moves * 0.5 + dense * 0.2 == pytest.approx(300, rel=0.01)
    assert sparse / dense == pytest.approx(4, rel=0.01)
    with pytest.raises(UserError, match=r"here: a step takes too long to fill 0.1 seconds with 2 phases"):
        budget._filling(definition.Arm("set", body, {}, "here"), pace, 0.1)


def test_trials_are_shorter_and_what_was_measured_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    calls = []
    pace = {"dense": [{"step": 0.1, "update": 0.0}], "set-then-dense": [{"step": 0.05, "update": 0.1}] * 2}
    monkeypatch.setattr(budget, "_pace", lambda arm: calls.append(arm.name) or pace[arm.name])
    for _ in range(2):
        study = budget.settle(definition.load(path), tmp_path / "runs")
    assert calls == ["dense", "set-then-dense"]
    dense = study.arms["dense"]
    assert [dense.configure({}, seed).phases[0].steps for seed in (1, 100)] == [600, 150]
    assert len(study.arms["set-then-dense"].configure({}, 1).phases) == 2


def test_once_trials_are_done_steps_are_by_what_they_took(tmp_path, corpus, monkeypatch):
    path, root, said = tmp_path / "study.yaml", tmp_path / "runs", []
    path.write_text(STUDY.replace("corpus: stdlib", f"corpus: {corpus}").replace("seeds: [1, 2]", "seeds: [1]"))
    changes = ["seconds=1", "tuning_seconds=0.5", "common.data.repeat=true", "common.train.measure_dense=0",
               "arms.dense.tune={optimizer.lr: [0.001, .01]}", "arms.set-then-dense.phases=[{steps: 100}]"]  # fmt: skip
    pace = {"dense": [{"step": 0.005, "update": 0.0}], "set-then-dense": [{"step": 0.005, "update": 0.0}]}
    monkeypatch.setattr(budget, "_pace", lambda arm: pace[arm.name])
    monkeypatch.setattr(runner, "TOLERANCE", 10.0)  # so short a run is never as long as another
    assert budget.settle(definition.load(path, changes), root).arms["dense"].steps == (200,)
    found = runner.run(path, root, 1, changes=changes, say=said.append)
    arm = budget.settle(definition.load(path, changes), root).arms["dense"]
    trials = [Run(arm.folder(root, {"optimizer.lr": lr}, 100)).lines[-1] for lr in (0.001, 0.01)]
    assert trials[0]["step"] == trials[1]["step"] == 100 == arm.trial_steps[0] and found["complete"]
    fastest = min(trial["training_cpu_seconds"] for trial in trials)
    assert arm.steps[0] == pytest.approx(100 / fastest, abs=1)
    assert found["arms"][0]["phases"][0]["steps"] == arm.steps[0] == found["arms"][0]["runs"][0]["tokens"] / 8 / 16
    told = [line for line in said if "by what its trials took" in line]
    assert told[0] == f"dense: {arm.steps[0]:,} steps fill 1 s, by what its trials took; 200 by the first measurement"
    assert len(told) == 1  # an arm without trials keeps what was measured first
    assert runner.run(path, root, 1, changes=changes)["arms"] == found["arms"]
    tried = "arms.dense.tune={optimizer.lr: [0.001, .01, 1.0e-9]}"  # a value tried afterwards
    more = [*changes[:4], tried, changes[-1]]
    again = runner.run(path, root, 1, changes=more)
    assert again["complete"] and again["arms"][0]["runs"] == found["arms"][0]["runs"]
    assert budget.settle(definition.load(path, more), root).arms["dense"].steps == arm.steps


def test_arms_are_measured_beside_each_other_where_they_will_run_so(tmp_path, corpus, monkeypatch):
    path, said, begun, start = tmp_path / "study.yaml", [], [], worker.start
    path.write_text(STUDY.replace("corpus: stdlib", f"corpus: {corpus}"))
    monkeypatch.setattr(worker, "start", lambda *how: begun.append(start(*how)) or begun[-1])
    budget.settle(definition.load(path), tmp_path / "runs", jobs=2, say=said.append)
    names = ["dense", "set-then-dense"]
    assert said == [f"{a}: measuring what a step takes beside {b}" for b in names for a in names]
    known = json.loads((tmp_path / "runs" / budget.CALIBRATION).read_text())
    assert [known[name]["beside"] for name in names] == [1, 1] and known["dense"]["phases"][0]["step"] > 0
    assert len(begun) == 2 and all(process.returncode is not None for process in begun)

    monkeypatch.setattr(worker, "_PROGRAM", "import sys; sys.stdin.readline(); sys.exit('no memory')")
    with pytest.raises(UserError, match=r"arm 'dense': no memory$"):
        budget.settle(definition.load(path), tmp_path / "others", jobs=2)


@pytest.mark.parametrize(
    "change, message",
    [
        ("seconds=-1", r"'seconds' must be a number of CPU seconds, not -1"),
        ("tuning_seeds=[1]", r"'tuning_seconds' goes with 'seconds', and with tuning_seeds apart from seeds"),
        ("common.train.threads=2", r"CPU seconds of one thread"),
        ("arms.dense.phases=[{tokens: 1000}]", r"with 'seconds', phases have steps"),
        ("multiplier=[dense]", r"at least two dense arms"),
        ("multiplier=[dense, set-then-dense]", r"arm 'set-then-dense' is not dense"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, change, message):
    (tmp_path / "study.yaml").write_text(STUDY)
    with pytest.raises(UserError, match=message):
        definition.load(tmp_path / "study.yaml", [change])


def test_arms_that_ended_apart_are_not_told_apart():
    uneven = results._apart([arm("a", 1, 1, [1.0], 100.0), arm("b", 1, 1, [1.0], 104.0)], 100.0)
    assert uneven["arms"] == ["b", "a"] and uneven["share"] == pytest.approx(0.04)
    pair = {"a": "a", "b": "b", "verdict": "lower"}
    assert results._refused(pair, uneven)["verdict"] == "refused: times 4.0% apart"
    assert results._refused(pair, None)["verdict"] == "lower"


def test_a_model_within_a_size_is_stored_in_what_its_values_and_masks_take():
    study = definition.load("size-cap")
    for name, ends in study.arms.items():
        config = ends.configure({}, 1)
        layers = sum(loading_layers(config).values())
        shape = results.resolve.model_shape(config.model, 257)
        assert results._stored(layers, 1 - config.phases[-1].end, shape.parameters) <= 4 * 104_000, name


def loading_layers(config):
    return results.resolve.linear_layers(config.model)


@pytest.mark.parametrize("name", [path.stem for path in loading.shipped("studies")])
def test_studies_that_ship_can_be_read(name):
    arms = [arm for arm in definition.load(name).arms.values() if not arm.untrained]
    assert arms and all(arm.configure({}, 0).steps for arm in arms)
