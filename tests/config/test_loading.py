"""Overrides: what replaces, what is taken as typed, and what tells two configurations apart."""

from vspdf.config import loading
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
