"""How values are chosen, and when two arms are told apart: not within the noise."""

import math

import numpy as np
import pytest
from scipy import stats

from vspdf.compare import definition, tuning
from vspdf.compare.results import _difference
from vspdf.report import comparison, tables


def of(losses):
    """A loss function for `tuning` from losses by value."""
    return lambda values, seed: losses.get(tuple(values.values()))


def arm_with(**tune):
    return definition.Arm("a", {}, {key: list(values) for key, values in tune.items()}, "a")


def test_settings_are_tuned_one_after_the_other():
    two = arm_with(lr=(1, 2, 3), std=(5, 6))
    first = tuning.tuning(two, [0], of({(1,): 3.0, (2,): 1.0}))
    assert first.chosen is None and [trial.losses for trial in first.trials] == [(3.0,), (1.0,), (None,)]
    losses = {(1,): 3.0, (2,): 1.0, (3,): math.inf, (2, 5): 1.2, (2, 6): 0.9}
    last = tuning.tuning(two, [0], of(losses))
    assert last.chosen == {"lr": 2, "std": 6} and len(last.trials) == 5
    assert last.at_the_edge(two) == ["std"]
    assert tuning.tuning(two, [0], of(dict.fromkeys([(1,), (2,), (3,)], math.inf))).chosen is None
    assert tuning.tuning(arm_with(), [0], of({})) == tuning.Tuning({}, [])


@pytest.mark.parametrize("length", [1, 40], ids=["short", "too long for a folder's name"])
def test_runs_of_each_value_have_a_folder(tmp_path, length):
    values = [{"phases": [{"sparsity": 0.75, "steps": steps}] * length} for steps in (100, 200)]
    first, second = (arm_with().folder(tmp_path, each, 0) for each in values)
    for folder in (first, second):
        folder.mkdir(parents=True)
    assert first != second and first == arm_with().folder(tmp_path, dict(values[0]), 0)
    if length == 1:
        assert first == tmp_path / "a" / "phases=[{'sparsity': 0.75, 'steps': 100}]" / "seed-0"


def test_tuning_goes_by_the_mean_over_its_seeds():
    losses = {(1, 0): 1.0, (1, 1): 4.0, (2, 0): 2.0, (2, 1): 2.5}
    chosen = tuning.tuning(arm_with(lr=(1, 2)), [0, 1], lambda values, seed: losses[values["lr"], seed]).chosen
    assert chosen == {"lr": 2}


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.1, 0.4, 0.35], [3.0] * 5, list(range(31))], ids=len)
def test_intervals_are_those_of_students_t(values):
    mean, error = np.mean(values), stats.sem(values)
    expected = stats.t.interval(0.95, len(values) - 1, mean, error) if error else (mean, mean)
    assert comparison.interval(values) == pytest.approx(expected, rel=1e-12)
    assert comparison.interval(values[:1]) is None


def results_of(*losses):
    curve = [{"tokens": 1, "flops": {"executed": 1}, "seconds": 1, "val_loss": 1}]
    runs = [[{"seed": s, "test_loss": loss, "curve": curve} for s, loss in enumerate(one)] for one in losses]
    a, b = ({"name": name, "runs": some} for name, some in zip("ab", runs, strict=True))
    return _difference(a, b, "test_loss", tables.main_axes([]))


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([1.0, 1.1, 1.2], [1.5, 1.61, 1.69], "lower"),
        ([1.5, 1.61, 1.69], [1.0, 1.1, 1.2], "higher"),
        ([1.0, 1.1, 1.2], [1.1, 1.0, 1.2], "not told apart"),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], "not told apart"),
        ([1.0], [2.0], "one seed: no interval"),
        ([1.0, None], [2.0, 1.0], "one seed: no interval"),
        ([], [1.0], "not run yet"),
    ],
    ids=["lower", "higher", "noise", "equal", "one seed", "one diverged", "none"],
)
def test_nothing_is_called_better_within_the_noise(a, b, verdict):
    assert results_of(a, b)["verdict"] == verdict
