"""What loss to expect, and what a kept weight is worth: against the studies that ship."""

import math

import pytest

from vspdf.compare import definition, results
from vspdf.plan import advice, law
from vspdf.shapes import Shape

STUDIES = ("multiplier-128", "multiplier", "frontier-256", "frontier-longer", "same-size")
DENSE = [
    (study, arm["name"], arm["kept"], arm["phases"][0]["tokens"], arm["test_loss"]["mean"])
    for study in STUDIES
    for arm in results.read(definition.load(study))["arms"]
    if arm["test_loss"]["mean"] and len(arm["phases"]) == 1 and arm["kept"] == arm["weights"]
]


def test_the_size_of_a_dense_model_follows_from_its_loss():
    assert law.size(law.loss(3.1e5, 8e6), 8e6) == pytest.approx(3.1e5)
    assert math.isnan(law.size(0.6, 3.87e6))  # below what endless weights reach


@pytest.mark.parametrize("study, arm, weights, tokens, measured", DENSE, ids=lambda v: v if isinstance(v, str) else "")
def test_the_law_has_dense_models_of_every_study_within_four_percent(study, arm, weights, tokens, measured):
    assert law.loss(weights, tokens) == pytest.approx(measured, rel=0.04)


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


@pytest.mark.parametrize("faster, method", [(4.0, "set"), (1.0, "dense")], ids=["ideal", "no faster"])
def test_advice_follows_the_time_of_a_step(monkeypatch, faster, method):
    def pace(progress):
        return lambda shape, sparsity: 1e-10 * shape.linear / (faster if sparsity else 1.0)

    monkeypatch.setattr(advice, "_pace", pace)
    found = advice.advise(0.05)
    assert found.method == method
    assert isinstance(found.shape, Shape) and found.low < found.expected_loss < found.high
    assert set(found.others) == {"dense", *law.METHODS}
