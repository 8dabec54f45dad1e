"""Overrides: what replaces, what is taken as typed, and what tells two configurations apart."""

import re

import pytest

from vspdf.config import loading
from vspdf.errors import UserError
from vspdf.shapes import RopeScaling

BODY = {
    "model": {"n_layer": 2, "d_model": 32, "n_head": 4, "sequence_length": 16},
    "phases": [
        {"sparsity": 0.75, "layers": {"*.mlp.*": 0.9, "h.0.*": 0.5}, "steps": 9},
        {"sparsity": 0.75, "algorithm": "set", "update": {"freq": 2}, "steps": 9},
    ],
}


def build(*overrides):
    return loading.build(BODY, "here", overrides)


def test_a_mapping_replaces_a_setting_that_is_one():
    assert build().phases[0].layers == {"*.mlp.*": 0.9, "h.0.*": 0.5}
    assert build("phases.0.layers={}").phases[0].layers == {}
    for override in ('phases.0.layers={"h.0.mlp.c_fc": 0.2}', 'phases.0={layers: {"h.0.mlp.c_fc": 0.2}}'):
        (phase, _) = build(override).phases
        assert phase.layers == {"h.0.mlp.c_fc": 0.2} and phase.sparsity == 0.75  # the first that matches would count
    assert build("phases.1.update={steps: [1, 2]}").phases[1].update == {"steps": [1, 2]}
    rope = ["model.position=rope", "model.rope_scaling={type: llama3, factor: 8, original_length: 8}"]
    assert build(*rope, "model.rope_scaling={type: linear, factor: 2}").model.rope_scaling == RopeScaling("linear", 2.0)


def test_of_a_group_of_settings_and_by_dotted_keys_the_rest_stays():
    config = build("model={n_layer: 3}", "phases.1.update.freq=3", "train={log_every: 3}", "phases.0={lr_multiple: 2}")
    assert (config.model.n_layer, config.model.d_model, config.train.log_every, config.train.batch_size) == (
        3,
        32,
        3,
        8,
    )
    assert config.phases[1].update == {"freq": 3, "start": 0, "stop": 9}
    assert config.phases[0].lr_multiple == 2 and len(config.phases[0].layers) == 2


def test_layers_in_another_order_are_another_configuration():
    orders = ("{h.0.*: 0.5, '*.c_fc': 0.9}", "{'*.c_fc': 0.9, h.0.*: 0.5}")
    old, new = (loading.to_dict(build(f"phases.0.layers={globs}")) for globs in orders)
    assert loading.differences(old, old) == {}
    assert loading.differences(old, new).keys() == {"phases.0.layers"}


TYPED = {
    "run_dir=1.10": "1.10", "name=2024_01_02": "2024_01_02", "run_dir=no": "no", "run_dir=010": "010",
    "data.corpus=foo #1.txt": "foo #1.txt", "data.corpus='foo #1.txt'": "foo #1.txt", 'data.corpus="a\\tb"': "a\tb",
    "data.corpus=a: b": "a: b", "data.corpus=[x]": "[x]", "data.corpus={": "{", "data.corpus='it''s'": "it's",
    "data.corpus='a' + 'b'": "'a' + 'b'", "data.corpus=": "", "data.corpus= x ": "x", "init_from=null": None,
    "data.cache_dir=~": None, "init_from='null'": "null", "data.cache_dir=~/cache": "~/cache",
    "seed=010": 10, "seed=0x10": 16, "train.threads=08": 8, "optimizer.lr=00.5": 0.5, "model.bias=no": False,
}  # fmt: skip


@pytest.mark.parametrize("override, value", TYPED.items(), ids=TYPED)
def test_text_is_taken_as_typed_and_digits_are_decimal(override, value):
    found = build(override)
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("override", ["train.timeout=1:30", "seed=1:30", "name=null", "data.corpus=~"])
def test_what_yaml_would_make_another_number_or_nothing_is_refused(override):
    with pytest.raises(UserError, match=r"override .* (could not be converted|must not be empty)"):
        build(override)


OPEN = {
    "a setting": ({"seed": "???"}, "seed"),
    "one of a group": ({"model": {"d_model": "???"}}, "model.d_model"),
    "a group": ({"train": "???"}, "train"),
    "of a phase, of any form": ({"phases": [{"sparsity": "???", "steps": 9}]}, "phases.0.sparsity"),
    "within such a one": ({"phases": [{"layers": {"h.*": "???"}, "steps": 9}]}, "phases.0.layers.h.*"),
    "of a list in such a one": ({"phases": [{"sparsity": [0.5, "???"], "steps": 9}]}, "phases.0.sparsity.1"),
}


@pytest.mark.parametrize("body, key", OPEN.values(), ids=OPEN)
def test_what_is_to_be_given_yet_is_no_default(body, key):
    with pytest.raises(UserError, match=rf"^here: '{re.escape(key)}' is \?\?\?, which stands for what is to be given"):
        loading.build({**BODY, **body}, "here")


@pytest.mark.parametrize("override", ["seed=???", "run_dir=???", "phases.0.sparsity=???", "phases.1.update.freq=???"])
def test_an_override_that_gives_nothing_yet_is_refused(override):
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"^override '{re.escape(override)}': '{key}' is \?\?\?, which stands"):
        build(override)


WRONG = {
    "a list of layers": ({"layers": []}, "'phases.1.layers' must be a mapping, not a list"),
    "a word for a number": ({"steps": "x"}, "'phases.1.steps': Value 'x' of type 'str' could not be converted to"),
    "a percentage": ({"lr": "9%"}, r"'phases.1.lr': Value '9%' .* to Float. Did you mean 0.09\?"),
    "a name that a run has too": ({"name": {"a": 1}}, "'phases.1.name': Cannot convert"),
}


@pytest.mark.parametrize("wrong, why", WRONG.values(), ids=WRONG)
def test_a_wrong_setting_of_a_phase_is_named_whole(wrong, why):
    first, second = BODY["phases"]
    with pytest.raises(UserError, match=f"^here: {why}"):
        loading.build({**BODY, "phases": [first, {**second, **wrong}]}, "here")


def test_a_list_in_the_place_of_a_mapping_of_the_model_is_named():
    with pytest.raises(UserError, match=r"^here: 'model.rope_scaling' must be a mapping, not a list"):
        loading.build({**BODY, "model": {**BODY["model"], "rope_scaling": []}}, "here")
