import math
import re
from itertools import pairwise

import pytest

import vspdf
from vspdf.config.settings import PhaseConfig
from vspdf.errors import UserError
from vspdf.runs.record import PhaseRecord
from vspdf.shapes import Shape, linear_layers
from vspdf.sparsity import courses, schedule
from vspdf.sparsity.amounts import _warn
from vspdf.sparsity.schedule import Phase
from vspdf.train.schedule import Position, position


def phase(**settings):
    return PhaseConfig(**{"steps": 100, "lr": 1e-3, "lr_end": 1e-4, "warmup_steps": 10, "batch_size": 4, **settings})


def test_warm_up_reaches_the_peak_and_decay_ends_at_the_end():
    rates = [phase().resolved("phases.0").learning_rate(step, 1e-3) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4) and rates[4] == pytest.approx(5e-4)
    assert rates[9] == rates[10] == max(rates) == 1e-3
    assert rates[99] == pytest.approx(1e-4, rel=1e-12)
    assert all(a > b for a, b in pairwise(rates[10:]))
    steps = [a - b for a, b in pairwise(rates[10:])]
    assert max(steps) == pytest.approx(min(steps))  # linear


def test_cosine_passes_the_middle_at_half_way_and_constant_stays():
    cosine = phase(decay="cosine", steps=111).resolved("phases.0")
    assert cosine.learning_rate(60, 1e-3) == pytest.approx((1e-3 + 1e-4) / 2)
    assert cosine.learning_rate(110, 1e-3) == pytest.approx(1e-4)
    assert cosine.learning_rate(35, 1e-3) == pytest.approx(1e-4 + 9e-4 * (1 + math.cos(math.pi / 4)) / 2)
    constant = phase(decay="constant", lr_end=None).resolved("phases.0")
    assert {constant.learning_rate(step, 1e-3) for step in range(10, 100)} == {1e-3}


def test_multiples_scale_the_peak_but_not_the_end():
    """The published 6.7B recipe: 3 x 1.2e-4, down to 1.2e-5 over 62,523 steps."""
    sparse = phase(steps=62_523, lr=1.2e-4, lr_multiple=3.0, lr_end=1.2e-5, warmup_steps=177).resolved("phases.0")
    assert sparse.learning_rate(176, 1e-3) == pytest.approx(3.6e-4)
    assert sparse.learning_rate(62_522, 1e-3) == pytest.approx(1.2e-5)


@pytest.mark.parametrize("warmup", [0, 1, 99, 100])
def test_any_warm_up_within_the_phase(warmup):
    rates = [phase(warmup_steps=warmup).resolved("phases.0").learning_rate(step, 1e-3) for step in range(100)]
    assert max(rates) == pytest.approx(1e-3) and min(rates) > 0


def test_what_a_phase_leaves_open_follows_from_the_optimizer():
    first = Phase(sparsity=0.9, steps=100, lr_multiple=3).resolved("phases.0")
    rates = [first.learning_rate(step, 1e-3) for step in range(150)]
    assert rates[4] == max(rates) == pytest.approx(3e-3) and rates[0] == pytest.approx(3e-3 / 5)  # 5 % of warm-up
    assert rates[99:] == pytest.approx([1e-4] * 51)  # a tenth of the optimizer's, and that from there on
    switched = Phase(steps=100, lr=5e-5).resolved("phases.1", first)
    rates = [switched.learning_rate(step, 1e-3) for step in range(100)]
    assert rates[0] == pytest.approx(5e-6) and rates[9:] == pytest.approx([5e-5] * 91)  # never above its own peak


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.0}, {"lr_multiple": -1.0}, {"lr_end": -1e-5}, {"decay": "exp"}, {"warmup_steps": 11}], ids=str
)
def test_rates_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError, match=rf"phases\.3.*{next(iter(wrong))}"):
        Phase(steps=10, **wrong).resolved("phases.3")


def test_a_single_step():
    assert phase(steps=1, warmup_steps=0).resolved("phases.0").learning_rate(0, 1e-3) == 1e-3


def test_positions_and_the_global_count_of_samples():
    phases = [phase(steps=3, batch_size=4), phase(steps=2, batch_size=10), phase(steps=1, batch_size=1)]
    assert [position(phases, step) for step in range(7)] == [
        Position(0, 0, 0), Position(0, 1, 4), Position(0, 2, 8), Position(1, 0, 12), Position(1, 1, 22),
        Position(2, 0, 32), Position(3, 0, 33),
    ]  # fmt: skip


def test_the_published_split_adds_dense_steps():
    assert schedule.split_add_on(62_522, 0.75, 0.9) == (62_522, 9_379)
    assert schedule.split_add_on(100, 0.9, 0.9) == (100, 0)
    assert schedule.split_add_on(100, 0.0, 0.9) == (100, 90)
    assert schedule.split_add_on(1000, 0.7, 0.8) == (1000, 100)  # 100.00000000000009 in binary


def test_the_fixed_budget_split():
    assert schedule.split_fixed_budget(62_522, 0.75, 0.9) == (52_102, 10_420)
    sparse, dense = schedule.split_fixed_budget(6000, 0.75, 0.9)
    assert (sparse, dense) == (5000, 1000)
    assert schedule.effective_sparsity(6000, [(0.9, sparse), (0.0, dense)]) == pytest.approx(0.75)


@pytest.mark.parametrize("effective, sparsity", [(0.9, 0.75), (-0.1, 0.5), (0.0, 0.0), (0.5, 1.0)])
@pytest.mark.parametrize("split", [schedule.split_add_on, schedule.split_fixed_budget], ids=["add-on", "fixed budget"])
def test_impossible_splits_are_refused(split, effective, sparsity):
    with pytest.raises(
        UserError, match=rf"effective sparsity of {effective} cannot come from a first stage at {sparsity}"
    ):
        split(100, effective, sparsity)


def test_the_published_recipe_is_75_percent_effective_and_78_over_time():
    stages = [(0.9, 62_523), (0.0, 9_379)]
    assert 1 - schedule.effective_sparsity(62_522, stages) == pytest.approx(0.2500, abs=5e-5)
    assert schedule.time_average_sparsity(stages) == pytest.approx(0.783, abs=5e-4)


# -- sparsity within a phase ------------------------------------------------------------------------------------------


def amounts(**settings):
    return [stage.sparsity for stage in Phase(**settings).resolved("phase").stages()]


def test_every_schedule_goes_from_the_start_to_the_end():
    common = {"sparsity": 0.9, "steps": 50, "update_every": 10}
    assert amounts(**common, schedule="linear") == pytest.approx([0.9, 0.675, 0.45, 0.225, 0])
    assert amounts(**common, schedule="power") == pytest.approx([0.9, 0.9 * 27 / 64, 0.9 / 8, 0.9 / 64, 0])
    assert amounts(**common, schedule="cosine") == pytest.approx(
        [0.9, 0.45 + 0.45 * math.sqrt(0.5), 0.45, 0.45 - 0.45 * math.sqrt(0.5), 0]
    )
    densities = [1 - s for s in amounts(**common, schedule="exp")]
    assert [b / a for a, b in pairwise(densities)] == pytest.approx([10**0.25] * 4)
    for name in ("linear", "exp", "power", "cosine"):
        found = amounts(**common, schedule=name)
        assert found[0] == 0.9 and found[-1] == 0.0 and all(a > b for a, b in pairwise(found))


def stages(**settings):
    return Phase(**settings).resolved("phase").stages()


def test_cycling_takes_its_levels_in_turn_and_stretches_add_up():
    assert stages(schedule="cycling", levels=[0.9, 0.75, 0.5, 0.0], steps=10, update_every=3) == [
        (0, 3, 0.9), (3, 3, 0.75), (6, 3, 0.5), (9, 1, 0.0),
    ]  # fmt: skip
    assert stages(sparsity=0.9, steps=10) == [(0, 10, 0.9)]
    assert stages(schedule="linear", sparsity=0.5, sparsity_end=0.5, steps=10, update_every=3) == [(0, 10, 0.5)]


def test_what_is_left_out_follows_and_layers_have_amounts_of_their_own():
    found = Phase(schedule="exp", sparsity=0.9, steps=25).resolved("phase")
    assert (found.sparsity_end, found.update_every, found.name) == (0.0, 3, "sparse 0.9")
    layers = linear_layers(Shape(2, 10, 1, 40, 5, 8))
    apart = Phase(sparsity=0.5, layers={"*.c_fc": 0.9, "h.0.*": 0.0}, steps=1).resolved("phase", None, layers)
    assert apart.of_layers(layers)["h.0.mlp.c_fc"] == 0.9 and apart.of_layers(layers)["h.1.attn.c_proj"] == 0.5
    assert apart.mean(layers) == pytest.approx((2 * 400 * 0.9 + (400 + 400) * 0.5) / 2400)


CYCLES = {"schedule": "cycling", "levels": [0.5, 0.9], "algorithm": "set"}


@pytest.mark.parametrize(
    "settings, end",
    [
        ({**CYCLES, "steps": 12, "update": {"steps": [0, 2, 4]}}, 0.5),  # back at its first level
        ({**CYCLES, "steps": 12, "update": {"steps": [0, 2]}}, 0.9),
        ({**CYCLES, "steps": 18}, 0.5),
        ({**CYCLES, "steps": 1000}, 0.5),
        ({"schedule": "cycling", "levels": [0.9, 0.75], "steps": 8, "update_every": 7}, 0.75),
        ({"sparsity": 0.9, "schedule": "linear", "steps": 8, "update_every": 7}, 0.0),
        ({"sparsity": [0.5, 0.9], "algorithm": "set", "steps": 12, "update": {"steps": [0, 2, 4]}}, 0.5),
    ],
)
def test_the_end_of_a_phase_is_what_its_last_stage_has(settings, end):
    found = Phase(**settings).resolved("phases.0")
    assert found.end == found.stages()[-1].sparsity == end and found.sparsity_end in (None, end)
    with pytest.raises(UserError, match=rf"phases.1.sparsity = 0.95 is above the phase before \({end}\)"):
        Phase(sparsity=0.95, steps=4).resolved("phases.1", found)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"levels": [0.9, 0.75, 0.5, 0], "update_every": 7, "steps": 8},
         r"levels: 0.5 is never reached: expected an update for each of 4 values, the phase's 8 steps have 2"),
        ({"levels": [0.9, 0.75, 0.5, 0], "steps": 9}, r"phases.0.levels: 0 is never reached"),
        ({**CYCLES, "levels": [0.5, 0.9, 0.7], "update": {"steps": [1, 3]}, "steps": 9}, r"levels: 0.7 is never"),
        ({"schedule": "constant", "levels": [], "sparsity": [0.5, 0.9], "algorithm": "set", "update": {"steps": [1]},
          "steps": 9}, r"phases.0.sparsity: 0.9 is never reached"),
        ({"levels": [0.9, 0.5], "sparsity": 0.75, "steps": 8}, r"sparsity = 0.75, but the levels go from 0.9 to 0.5"),
        ({"levels": [0.9, 0.5], "sparsity_end": 0.0, "steps": 8}, r"sparsity_end = 0.0, but the levels .*leave it out"),
    ],
)  # fmt: skip
def test_levels_that_have_no_turn_and_amounts_beside_levels_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Phase(**{"schedule": "cycling", **wrong}).resolved("phases.0")


def test_a_glob_that_an_earlier_one_leaves_nothing_is_told_once(caplog):
    layers = linear_layers(Shape(2, 10, 1, 40, 5, 8))
    rules = {"*.c_fc": 0.9, "h.1.*": 0.5, "h.1.mlp.*": 0.1, "*": 0.2, "h.0.attn.*": 0.3}
    for _ in range(2):
        Phase(sparsity=0.0, layers=rules, steps=1).resolved("phases.7", None, layers)
    assert caplog.messages == [
        "phases.7.layers: 'h.1.mlp.*' never counts: all that it matches is taken by '*.c_fc' and 'h.1.*' before it; "
        "put it first, or leave it out.",
        "phases.7.layers: 'h.0.attn.*' never counts: all that it matches is taken by '*' before it; put it first, or "
        "leave it out.",
    ]
    Phase(sparsity=0.0, layers={"h.0.*": 0.5, "*.c_fc": 0.9}, steps=1).resolved("phases.7", None, layers)
    assert len(caplog.messages) == 2  # one that counts somewhere is as it is meant to be


AMOUNTS = {
    "percentages": ({"drop_fraction": [30, 20]}, r"phases.0.drop_fraction.values .* not 30.0. Did you mean 0.3\?"),
    "the start of a course": (
        {"drop_fraction": {"type": "cosine", "init": 30}},
        r"drop_fraction.init must lie in \[0, 1\], not 30.0. Did you mean 0.3\?",
    ),
    "its end": ({"drop_fraction": {"type": "exp", "init": 0.3, "gamma": 1, "final": -1}}, r"drop_fraction.final must"),
    "its least": ({"drop_fraction": {"type": "cosine", "init": 0.3, "minimum": 2}}, r"drop_fraction.minimum must"),
    "a plain one": ({"drop_fraction": 30}, r"drop_fraction must lie in \[0, 1\], not 30.0. Did you mean 0.3\?"),
    "a sparsity": ({"sparsity": [90, 80]}, r"phases.0.sparsity.values must .* not 90.0. Did you mean 0.9\?"),
    "a negative sparsity": ({"sparsity": {"type": "linear", "init": -0.5, "slope": 0.1}}, r"sparsity.init must lie"),
    "growth past all floats": (
        {"sparsity": {"type": "power", "init": 0.5, "beta": 1e200}, "update": {"steps": [2]}},
        r"phases.0.sparsity, from step 2 on must lie in \[0, 1\), not 1.0",
    ),
    "nothing to drop": ({"drop_fraction": 0}, r"phases.0.drop_fraction: nothing is dropped at any update"),
    "nothing to drop in any turn": ({"drop_fraction": [0, 0.0]}, r"phases.0.drop_fraction: nothing is dropped"),
}


@pytest.mark.parametrize("wrong, message", AMOUNTS.values(), ids=AMOUNTS)
def test_amounts_of_moving_masks_that_cannot_be_are_refused(wrong, message):
    settings = {"sparsity": 0.9, "algorithm": "set", "steps": 20, "update": {"freq": 2}, **wrong}
    with pytest.raises(UserError, match=message):
        Phase(**settings).resolved("phases.0")


def test_nothing_is_dropped_where_the_sparsity_alone_moves_masks():
    ramp = {"sparsity": 0.5, "schedule": "linear", "sparsity_end": 0.9}
    found = Phase(algorithm="set", steps=20, drop_fraction=0, update={"freq": 2}, **ramp).resolved("phases.0")
    assert found.end == 0.9 and not any(map(found.dropped, found.update_steps()))


GROWTH = {
    "above 1": (0.01, 1.12, 1.0),
    "below 0": (-0.01, 1.12, 0.0),
    "nothing": (0.0, 1.12, 0.0),
    "falling": (1, 0.5, 0),
}


@pytest.mark.parametrize("init, beta, far", GROWTH.values(), ids=GROWTH)
def test_a_power_ends_at_the_edge_where_floats_do(init, beta, far):
    assert courses.amount({"type": "power", "init": init, "beta": beta}, 9000, 0) == far


COSINES = {
    "the last update": ({"freq": 10, "stop": 75}, 70, 75),
    "stop past the phase": ({"freq": 10, "stop": 1000}, 90, 100),
    "listed steps": ({"steps": [10, 50]}, 50, 50),
}


@pytest.mark.parametrize("update, last, end", COSINES.values(), ids=COSINES)
def test_a_cosine_ends_where_updates_do(update, last, end):
    """A sparsity has its end at the last of them, a drop fraction falls to it at `stop`."""
    course = {"type": "cosine", "init": 0.9, "minimum": 0.5}
    found = Phase(sparsity=course, drop_fraction=course, algorithm="set", steps=100, update=update).resolved("phases.0")
    assert found.end == 0.5 and found.stages()[-1].start == last
    assert found.dropped(end) == pytest.approx(0.5) and found.drop_fraction["half_period"] == end


EXP = {"type": "exp", "init": 0, "gamma": 0.1, "final": 0.8}
DENSE = {
    "a late start": ({"sparsity": 0.75, "update": {"freq": 5, "start": 50}}, "its first update comes later"),
    "late steps": ({"sparsity": 0.5, "update": {"steps": [50]}}, "its first update comes later"),
    "a course that falls": ({"algorithm": "gmp", "sparsity": EXP}, r"the .* at 0 \(type: exp rises where gamma < 0\)"),
    "no sparsity": ({"sparsity": 0.0}, "the sparsity stays at 0"),
    "no drop": ({"sparsity": 0.6, "update": {"start": 5}, "drop_fraction": 0}, "nothing is dropped"),
}  # fmt: skip


@pytest.mark.parametrize("settings, why", DENSE.values(), ids=DENSE)
def test_a_phase_of_the_cerebras_stack_that_stays_dense_says_why(caplog, settings, why):
    _warn.cache_clear()
    found = Phase(**{"steps": 20, "algorithm": "set", "rules": "cstorch", **settings}).resolved("phases.0")
    assert [stage.sparsity for stage in found.stages()] == [0.0]
    assert re.search(rf"phases.0: algorithm: \w+ prunes nothing in the phase's 20 steps, {why}\.$", caplog.text, re.M)


def test_a_summary_has_the_sparsity_that_a_phase_begins_with():
    record = PhaseRecord()
    record.step_seconds.append(1.0)
    late = {"algorithm": "set", "rules": "cstorch", "sparsity": 0.75, "update": {"freq": 5, "start": 5}}
    found = record.summary({"a": 1}, Phase(steps=20, **late).resolved("phase"), 20)
    assert found["sparsity"] == 0.0 and [stage["sparsity"] for stage in found["stages"]] == [0.0, 0.3, 0.51, 0.657]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"algorithm": "setx"}, r"phases.0.algorithm = 'setx' is not known. Did you mean 'set'"),
        ({"algorithm": "gmp", "sparsity": 0.5}, r"gmp prunes as the sparsity rises, and it stays at 0.5"),
        ({"drop_fraction": 0.3}, r"drop_fraction belongs to algorithm: set or rigl, not to static"),
        ({"update": {"freq": 5}}, r"update belongs to algorithm: set or rigl or gmp, not to static"),
        ({"algorithm": "set", "sparsity": 0.9, "update": {"every": 5}}, r"update must be \{freq, start, stop\} or"),
        ({"algorithm": "set", "sparsity": 0.9, "update": {"freq": 0}}, r"update.freq must be a whole number of at"),
        ({"algorithm": "set", "sparsity": 0.9, "drop_fraction": 1.5}, r"drop_fraction must lie in \[0, 1\], not 1.5"),
        ({"algorithm": "set", "sparsity": {"type": "cosin", "init": 1}}, r"not 'cosin'. Did you mean 'cosine'"),
        ({"algorithm": "set", "sparsity": {"type": "exp", "init": 0.5}}, r"type: exp needs 'gamma'"),
        ({"algorithm": "set", "sparsity": {"type": "linear", "init": 0.5, "slope": 0.1}}, r"from step \d+ on must"),
        ({"algorithm": "gmp", "sparsity": 0.9, "schedule": "power", "sparsity_end": 0.5},
         r"gmp only drops weights, and the sparsity goes from 0.9 down to 0.\d+ at step \d+: expected one that rises"),
        ({"algorithm": "gmp", "sparsity": [0.5, 0.9]}, r"goes from 0.9 down to 0.5 at step \d+"),  # over and over
        ({"algorithm": "gmp", "sparsity": 0.7, "schedule": [0.8, 0.9]}, r"the schedule begins at 0.8: leave it out"),
        ({"algorithm": "set", "sparsity": 0.5, "schedule": {"type": "constant", "value": 0.7}}, r"begins at 0.7"),
        ({"sparsity": [0.9, 0.5]}, r"needs algorithm: set, rigl or gmp"),
        ({"algorithm": "gmp", "schedule": "power"}, r"sparsity_end is not set"),
        ({"sparsity": "90%"}, r"phases.0.sparsity must be a number, not '90%'. Did you mean 0.9"),
        # Steps of the whole run in the place of the phase's: masks would never move, or stop moving early.
        ({"algorithm": "gmp", "schedule": "power", "sparsity_end": 0.75, "update": {"start": 100, "stop": 200}},
         r"phases.0.update.start = 100 lies after the phase, of 100 steps: they count from the phase's beginning"),
        ({"algorithm": "set", "sparsity": 0.9, "update": {"steps": [104, 106]}}, r"update.steps: 106 lies after the"),
        ({"algorithm": "set", "sparsity": 0.9, "update": {"steps": [5, 7, 104]}}, r"update.steps: 104 lies after the"),
        ({"algorithm": "set", "sparsity": 0.9, "update": {"freq": 100}}, r"masks never move in the phase's 100 steps"),
        ({"algorithm": "set", "sparsity": 0.9, "update": {"steps": [0]}}, r"expected an update after step 0"),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_moves_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        vspdf.Phases([vspdf.Phase(steps=100, **settings)])


def test_masks_that_rise_at_a_switch_need_no_update_after_it_and_short_phases_have_none_of_their_own():
    vspdf.Phases([(0.5, 4), vspdf.Phase(sparsity=0.75, steps=4, algorithm="gmp", update={"steps": [0]}), (0.75, 4)])
    assert not any(vspdf.Phase(sparsity=0.5, steps=2, algorithm="set").resolved("phase").update_steps())


def test_a_phase_of_the_cerebras_stack_that_ends_before_its_first_update_claims_no_sparsity():
    rules = {"algorithm": "set", "rules": "cstorch", "sparsity": 0.75, "update": {"start": 100, "stop": 200}}
    found = vspdf.Phase(steps=8, **rules).resolved("phase")
    assert (found.sparsity, found.end, found.mean({"a": 1}), found.name) == (0.0, 0.0, 0.0, "set 0")
    found = vspdf.Phase(steps=101, **rules).resolved("phase")
    assert (found.sparsity, found.end, found.name) == (0.75, 0.3, "set 0.75")  # one update drops its 0.3 and no more
