"""The sparsity block of the Cerebras stack in every form, its regexes among them; what cannot be kept is refused."""

import pytest
import yaml

from vspdf.errors import UserError
from vspdf.interop import load_config
from vspdf.interop.cerebras_sparsity import _check_regex, sparsity

FILTERS = ["*proj_[qkv]_dense_layer.weight", "*proj_output_dense_layer.weight", "*linear_layer.weight"]


FFN_ALONE = {"sparsity": 0.0, "layers": {"*.mlp.c_fc": 0.9, "*.mlp.c_proj": 0.9}}
ATTENTION = r"model\.transformer_decoder\.layers\.\d+\.self_attn\..*dense_layer\.weight"
BLOCKS = {
    "a number": (0.75, {"sparsity": 0.75}),
    "schedule for sparsity": ({"schedule": 0.5, "algorithm": "static"}, {"sparsity": 0.5}),
    "nothing": (None, {}),
    "topk": ({"sparsity": 0.5, "init_method": "topk", "seed": 7}, {"sparsity": 0.5, "init_method": "topk", "seed": 7}),
    "one filter": ({"sparsity": 0.9, "param_filter": "*ffn*"}, FFN_ALONE),
    "our names": ({"sparsity": 0.9, "param_filter": "*.mlp.*"}, FFN_ALONE),
    "a list, the first match counts": (
        [{"sparsity": 0.5, "param_filter": "*layers.1.ffn.ffn.0*"}, {"sparsity": 0.9, "param_filter": FILTERS}],
        {"sparsity": 0.9, "layers": {"h.1.mlp.c_fc": 0.5}},
    ),
    "regex": ({"sparsity": 0.9, "param_name_patterns": ATTENTION},
              {"sparsity": 0.9, "layers": {"*.mlp.c_fc": 0.0, "*.mlp.c_proj": 0.0}, "count": "round"}),
}  # fmt: skip


@pytest.mark.parametrize("block, expected", BLOCKS.values(), ids=BLOCKS)
def test_every_form_of_the_block(block, expected):
    found = sparsity(block, 2, "x.yaml")
    if block is not None:
        expected = {"init_method": "random", "count": "truncate"} | expected
    assert found == expected


LATE = {"freq": 10, "start": 10}
NOT_OFFERED = {
    "gmp": ({"algorithm": "gmp", "sparsity": 0.5}, r"algorithm 'gmp' needs a schedule: 0.5 never rises"),
    "rigl, older": ({"type": "rigl", "sparsity": 0.5, "drop_fraction": {"type": "cosin"}}, r"mean 'cosine'"),
    "set in a list": ([{"param_filter": "*linear_layer*", "sparsity": 0.5}, {"algorithm": "SET", "sparsity": 0.5}],
                      r"'set' and 'static' in one run"),
    "two schedules": ([{"param_filter": "*linear_layer*", "algorithm": "gmp", "sparsity": [0.0, 0.5]},
                       {"algorithm": "gmp", "sparsity": [0.0, 0.75]}], r"several schedules in one run"),
    "late and unequal": ([{"param_filter": "*linear_layer*", "algorithm": "set", "sparsity": 0.5, "update": LATE},
                          {"algorithm": "set", "sparsity": 0.75, "update": LATE}], r"masks are dense until then"),
    "balanced": ({"algorithm": "rigl", "sparsity": 0.5, "balance_in_groups": 2}, r"unknown setting"),
    "no update": ({"algorithm": "set", "sparsity": 0.5, "update": {"freq": -1}}, r"sparsity.update.freq must be"),
    "a cosine without an end": ({"algorithm": "gmp", "sparsity": {"type": "cosine", "init": 0.1, "minimum": 0.9}},
                                r"sparsity.sparsity: type: cosine needs 'half_period'"),
    "a fraction without an end": ({"algorithm": "set", "sparsity": 0.5, "drop_fraction": {"type": "cosine", "init": 1}},
                                  r"sparsity.drop_fraction: type: cosine needs 'half_period'"),
    "both words": ({"algorithm": "set", "sparsity": 0.5, "schedule": 0.5}, r"another word for sparsity.sparsity"),
    "another": ({"algorithm": "statik", "sparsity": 0.5}, r"algorithm 'statik' is not known. Did you mean 'static'"),
    "drop_fraction": ({"sparsity": 0.5, "drop_fraction": 0.3}, r"drop_fraction belongs to masks that change"),
    "update": ({"sparsity": 0.5, "update": {"freq": 100}}, r"update belongs to masks that change"),
    "a schedule": ({"sparsity": {"type": "linear"}}, r"sparsity as a schedule belongs to masks that change"),
    "out of range": (1.0, r"sparsity.sparsity must be a number in \[0, 1\), not 1.0"),
    "no sparsity": ({"init_method": "topk"}, r"sparsity.sparsity must be a number in \[0, 1\), not None"),
    "init_method": ({"sparsity": 0.5, "init_method": "balanced"}, r"init_method 'balanced' is not offered. Known"),
    "unknown key": ({"sparsity": 0.5, "param_filtr": "*"}, r"'sparsity.param_filtr'. Did you mean 'param_filter'"),
    "everything": ({"sparsity": 0.5, "param_filter": "*"}, r"also takes 'embedding_layer.word_embeddings.weight'"),
    **{
        f"{never} beside what is sparse": ({"sparsity": 0.5, "param_filter": [text, "*ffn*"]}, f"also takes '{name}'")
        for never, text, name in [
            ("positions", "*position_embeddings*", r"embedding_layer.position_embeddings.weight"),
            ("positions by the other name", "*embed.weight", r"embedding_layer.position_embeddings.embed.weight"),
            ("second norms", "*norm3.weight", r"transformer_decoder.layers.0.norm3.weight"),
            ("a later norm", "*.1.norm1*", r"transformer_decoder.layers.1.norm1.weight"),
            ("the last norm", "*decoder.norm.*", r"transformer_decoder.norm.weight"),
        ]
    },
    "Q alone": ({"sparsity": 0.5, "param_filter": "*proj_q*"}, r"Q, K and V of layer 0 0.5, 0.0, 0.0; they"),
    "nothing matches": ({"sparsity": 0.5, "param_filter": "*fc*dense"}, r"takes no weight that an earlier one has not"),
    "no regex": ({"sparsity": 0.5, "param_name_patterns": "*linear"}, r"'\*linear' is no regex"),
    "two methods": ([{"sparsity": 0.5, "param_filter": "*ffn*", "init_method": "topk"}, 0.5], r"random and topk"),
    "text": ("0.5", r"sparsity must be a number, a mapping or a list of mappings, not '0.5'"),
}  # fmt: skip


@pytest.mark.parametrize("block, message", NOT_OFFERED.values(), ids=NOT_OFFERED)
def test_blocks_that_cannot_be_kept_are_refused_with_the_reason(block, message):
    with pytest.raises(UserError, match=message):
        sparsity(block, 2, "x.yaml")


@pytest.mark.parametrize("key, idle", [("param_filter", "*fnn*"), ("param_name_patterns", ".*fnn")], ids=str)
def test_a_filter_of_several_that_takes_nothing_is_named(caplog, key, idle):
    rest = FILTERS[2:] if key == "param_filter" else [".*linear_layer"]
    sparsity({"sparsity": 0.5, key: [idle, *rest]}, 2, "x.yaml")
    assert f"x.yaml: sparsity: the filter's '{idle}' takes no weight that can be sparse here." in caplog.text
    caplog.clear()
    sparsity({"sparsity": 0.5, key: rest}, 2, "x.yaml")
    assert not caplog.text


def test_a_block_beside_our_own_settings(tiny):
    body = yaml.safe_load(tiny.read_text())
    body["phases"] = [{"steps": 2}, {"steps": 2}]
    tiny.write_text(yaml.safe_dump(body | {"sparsity": {"sparsity": 0.8, "init_method": "checkerboard"}}))
    first, second = load_config(tiny).phases
    assert (first.sparsity, first.init_method, first.count, second.sparsity) == (0.8, "checkerboard", "round", 0.0)
    body["phases"][0]["sparsity"] = 0.9
    tiny.write_text(yaml.safe_dump(body | {"sparsity": 0.8}))
    with pytest.raises(UserError, match=r"the first of which has no sparsity of its own"):
        load_config(tiny)


SLOW = ["(a+)+$", "(.*)*x", "(a?){60}", "(a|a)*b", "(?:x|[a-z])+y", ".*a.*b.*c.*d.*e", "(((a)*b)*c)*"]
SWIFT = [r".*\.layers\.\d+\.ffn\..*weight", r".*proj_(q|k|v)_dense_layer.*", r".*ffn.*|.*self_attn.*", r"[(+*]{2}\(*.*"]


@pytest.mark.parametrize("text", SLOW)
def test_a_regex_that_may_take_hours_is_refused(text):
    with pytest.raises(UserError, match=r"param_name_patterns: '.*' could take too long: expected at most 4 repeats"):
        _check_regex(text, "here")


@pytest.mark.parametrize("text", SWIFT)
def test_ordinary_regexes_are_taken(text):
    _check_regex(text, "here")
