"""Overrides: what replaces, what is taken as typed, and what tells two configurations apart."""

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
