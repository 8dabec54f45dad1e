"""What loss to expect, and what a kept weight is worth: against the studies that ship."""

import math

import pytest

from vspdf.bench.calibrate import Calibration
from vspdf.compare import definition, results
from vspdf.config import loading
from vspdf.errors import UserError
from vspdf.kernels import cpu
from vspdf.plan import advice, law
from vspdf.plan.write import write_advice
from vspdf.runs.folder import Run
from vspdf.shapes import Shape
from vspdf.train.trainer import train

STUDIES = (
    "multiplier-128", "multiplier", "frontier-5min", "frontier-bf16", "frontier-256", "frontier-longer",
    "frontier-20min", "same-size",
)  # fmt: skip


def test_the_size_of_a_dense_model_follows_from_its_loss():
    assert law.size(law.loss(3.1e5, 8e6), 8e6) == pytest.approx(3.1e5)
    assert math.isnan(law.size(0.6, 3.87e6))  # below what endless weights reach


@pytest.mark.parametrize("study", STUDIES)
def test_the_law_has_dense_models_of_every_study_within_four_percent(study):
    dense = {
        arm["name"]: (law.loss(arm["kept"], arm["phases"][0]["tokens"]), arm["test_loss"]["mean"])
        for arm in results.read(definition.load(study))["arms"]
        if arm["test_loss"]["mean"] and len(arm["phases"]) == 1 and arm["kept"] == arm["weights"]
    }
    assert dense and {name: lost for name, (said, lost) in dense.items() if said != pytest.approx(lost, rel=0.04)} == {}


def test_what_a_kept_weight_is_worth_is_of_its_own_study_beside_its_dense_arms():
    (found,) = (point for point in law.points() if point.study == "same-size")
    dense, sparse = results.read(definition.load("same-size"))["arms"][:2]
    read = sparse["phases"][0]["tokens"]
    missed = dense["test_loss"]["mean"] - law.loss(1_572_864, dense["phases"][0]["tokens"])
    assert found.seen == read / 393_216
    assert law.loss(found.m * 393_216, read) + missed == pytest.approx(sparse["test_loss"]["mean"])


def test_a_kept_weight_is_worth_less_the_more_text_it_has_seen_and_more_where_masks_move():
    worth = law.worth()
    least, usual, most = worth["set"].at(25.0)
    assert least < usual < most
    assert worth["set"].at(100.0)[1] < usual
    assert worth["static"].at(25.0)[1] < usual
    for point in law.points():
        low, _, high = worth[point.method].at(point.seen)
        assert low * 0.999 <= point.m <= high * 1.001
    assert {point.method for point in law.points()} == set(law.METHODS)


def test_only_such_arms_count_as_end_dense_for_a_third_of_their_steps_as_the_advice_does():
    arms = {point.arm for point in law.points() if point.study == "multiplier"}
    assert {"set-then-dense", "set-then-dense-192"} < arms and "set-then-dense-192-late" not in arms


def timings(passes, bf16=1.0, note=""):
    """Stands in for `calibrate`: a pass over all blocks takes so many times as long as usual, in bfloat16 so many."""
    left, done = list(passes), set()

    def calibrate(shape, sparsities, tokens, precision):
        if (precision, shape.d_model) in done:
            done.clear()
            left.pop(0)
        done.add((precision, shape.d_model))
        block = 1e-10 * shape.linear / shape.n_layer * tokens * left[0] * (bf16 if precision == "bf16" else 1.0)
        return Calibration(
            tokens, 128, 3, 1, dict.fromkeys((0.0, *sparsities), block), (0, 0), 1e-9, 1e-12, note, precision
        )

    calibrate.left = left
    return calibrate


@pytest.mark.parametrize(
    "passes, taken, spread",
    [([1, 1.04, 9], 2, None), ([1, 2, 2.05, 9], 3, None), ([1, 2, 4, 8, 16, 9], 5, "16.0")],
    ids=["quiet", "begins busy", "never settles"],
)
def test_blocks_are_timed_until_two_passes_agree(monkeypatch, passes, taken, spread):
    monkeypatch.setattr(advice, "calibrate", calibrate := timings(passes))
    lines = []
    found = advice.advise(0.05, lines.append)
    assert len(lines) == taken == len(passes) - len(calibrate.left) + 1
    assert found.note == (f"Blocks took up to {spread} times as long in one pass as in another." if spread else "")


@pytest.mark.parametrize("faster, method", [(4.0, "set"), (1.0, "dense")], ids=["ideal", "no faster"])
def test_advice_follows_the_time_of_a_step(monkeypatch, faster, method):
    pace = lambda shape, sparsity: 1e-10 * shape.linear / (faster if sparsity else 1.0)  # noqa: E731
    monkeypatch.setattr(advice, "_paces", lambda progress: ({"fp32": pace}, ""))
    found = advice.advise(0.05)
    assert (found.method, found.precision) == (method, "fp32")
    assert isinstance(found.shape, Shape) and found.low < found.expected_loss < found.high
    assert set(found.others) == {"dense", *law.METHODS}


@pytest.mark.parametrize("has", [True, False])
def test_advice_takes_bfloat16_where_the_processor_has_it_and_is_faster_in_it(has, monkeypatch):
    monkeypatch.setattr(cpu, "has_bf16", lambda: has)
    monkeypatch.setattr(advice, "calibrate", timings([1.0, 1.0], bf16=0.5, note="Others."))
    found = advice.advise(0.05)
    assert found.sentences()[-1] == found.note == "Others."
    assert (found.method, found.precision) == ("dense", "bf16" if has else "fp32")
    assert found.configuration()["train"]["precision"] == found.precision
    assert f"in {found.precision}," in found.sentences()[0]
    assert ("dense in bf16" in found.others and found.others["dense"][1] > found.expected_loss) == has


@pytest.mark.parametrize("load, said", [(2.0, True), (0.1, False)], ids=["busy", "quiet"])
def test_advice_and_plans_that_were_timed_say_that_others_were_at_work(monkeypatch, vspdf, load, said):
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(advice, "_TIMED", (48, 64))
    monkeypatch.setattr(advice, "_PASSES", 2)
    line = "The machine was busy when this began: a load of 2.0 on"
    for wish in (["--hours", "0.01"], ["--model", "quickstart", "--time"]):
        status, out, _ = vspdf("plan", *wish)
        assert status == 0 and (line in " ".join(out.split())) is said


SPARSITIES = {"dense": [0.0], "static": [0.75], "set": [0.75], "set-then-dense": [0.75, 0.0]}


@pytest.mark.parametrize("method, sparsities", SPARSITIES.items(), ids=SPARSITIES)
def test_an_advice_is_written_as_a_configuration_that_trains(method, sparsities, corpus, tmp_path):
    shape = Shape(2, 32, 1, 128, 257, 128)
    found = advice.Advice(shape, sparsities[0], method, "fp32", 1.1, 1.0, 1.2, 9, False, {})
    write_advice(found, tmp_path / "mine.yaml")
    changes = [f"data.corpus={corpus}", f"run_dir={tmp_path}/run", "train.measure_dense=0", "train.sample_tokens=0"]
    config = loading.load(tmp_path / "mine.yaml", changes)
    assert [phase.sparsity for phase in config.phases] == sparsities
    assert sum(phase.steps for phase in config.phases) == 9
    rate = {"dense": 0.32, "set-then-dense": 0.54}.get(method, 0.41)
    assert config.phases[0].lr == pytest.approx(rate / 32, rel=0.05)
    assert config.phases[-1].lr_end == 1e-4 and config.model.d_model == 32 and config.data.tokenizer == "bytes"
    moves = {phase.algorithm for phase in config.phases if phase.sparsity}
    assert moves == {"dense": set(), "static": {"static"}}.get(method, {"set"})
    train(config, say=lambda line: None)
    assert Run(tmp_path / "run").lines[-1]["step"] == 9
    with pytest.raises(UserError, match=r"mine\.yaml' exists already"):
        write_advice(found, tmp_path / "mine.yaml")
