"""Shapes: published sizes, the model that is built, what PyTorch counts, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vspdf.config import loading
from vspdf.config.resolve import linear_layers
from vspdf.errors import UserError
from vspdf.ledger import CONVENTIONS, flops_per_token
from vspdf.model import GPT
from vspdf.shapes import MODELS, RopeScaling, Shape
from vspdf.sparsity.eligible import sparsifiable
from vspdf.train.step import dense_counts

SMALL = Shape(2, 32, 4, 48, 61, 24)
CHOICES = {
    "cerebras-gpt": {},
    "rms": {"norm": "rms"},
    "no bias": {"bias": False},
    "qkv bias": {"bias": "qkv"},
    "untied": {"tie": False},
    "grouped heads": {"n_kv_head": 2},
    "narrow attention": {"head_dim": 4},
    "qk norm": {"qk_norm": True},
    "swiglu": {"mlp": "swiglu"},
    "relu2": {"mlp": "relu2"},
    "parallel": {"parallel": True},
    "rope": {"position": "rope"},
    "rope on a part": {"position": "rope", "rope_fraction": 0.25},
    "llama": {"norm": "rms", "position": "rope", "mlp": "swiglu", "bias": False, "tie": False, "n_kv_head": 1,
              "rope_scaling": RopeScaling(original_length=16)},
}  # fmt: skip


@pytest.fixture(params=CHOICES.values(), ids=list(CHOICES))
def shape(request):
    return replace(SMALL, **{"head_dim": 0, "n_kv_head": 0, **request.param})


@pytest.mark.parametrize(
    "name, parameters",
    [("llama-3.2-1b", 1_235_814_400), ("qwen2.5-0.5b", 494_032_768), ("smollm2-135m", 134_515_008),
     ("tinyllama-1.1b", 1_100_048_384), ("llama-130m", 134_105_856)],
)  # fmt: skip
def test_presets_have_their_published_number_of_parameters(name, parameters):
    assert MODELS[name].parameters == parameters


def test_a_shape_counts_what_the_model_has(shape):
    model = GPT(shape)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    matrices = {name: module.weight.numel() for name, module in sparsifiable(model).items()}
    assert matrices == {f"h.{i}.{name}": o * n for i in range(2) for name, (o, n) in shape.block.items()}
    assert shape.linear == sum(matrices.values())


def test_conventions_count_what_pytorch_counts(shape):
    model, tokens = GPT(shape), torch.randint(61, (3, 24))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens).backward()
    counted = {str(name).removeprefix("aten."): n for name, n in counter.get_flop_counts()["Global"].items()}
    step = 6 * tokens.numel()
    assert sum(counted.get(name, 0) for name in ("mm", "addmm")) == step * (shape.linear + shape.vocabulary)
    assert counted["bmm"] == step * shape.attention
    assert sum(counted.values()) == tokens.numel() * flops_per_token(shape, convention="spdf")
    done = dense_counts(model, shape, tokens.numel())
    assert {name: count.dense for name, count in done.items()} == {
        "dense_linear": step * shape.linear, "attention": step * shape.attention,
        "vocabulary": step * shape.vocabulary,
    }  # fmt: skip


@pytest.mark.parametrize(
    "model, convention, gigaflops",
    [("llama-3.2-1b", "linear", 5.838), ("llama-3.2-1b", "spdf", 10.64), ("qwen2.5-0.5b", "spdf", 4.021),
     ("qwen2.5-0.5b", "vspdf", 4.565), ("llama-130m", "chinchilla", 0.91909),
     ("nanochat-d12", "cerebras-card", 1.46591)],
)  # fmt: skip
def test_golden_flops_per_token(model, convention, gigaflops):
    """By hand from the sizes: 6 · (linear + b · attention + c · vocabulary), and Chinchilla's softmax."""
    assert flops_per_token(MODELS[model], convention=convention) / 1e9 == pytest.approx(gigaflops, rel=5e-4)
    assert set(CONVENTIONS) == {"linear", "spdf", "vspdf", "chinchilla", "cerebras-card"}


def configured(*settings):
    base = {"n_layer": 2, "d_model": 32, "n_head": 4, "sequence_length": 16}
    keys = {setting.partition("=")[0].removeprefix("model.") for setting in settings}
    model = {key: value for key, value in base.items() if key not in keys and "name" not in keys}
    return loading.build({"model": model, "phases": [{"steps": 1}]}, "here", list(settings)).model


def test_settings_say_every_choice_and_come_back(tmp_path):
    said = ["model.norm=rms", "model.position=rope", "model.rope_base=5e5", "model.mlp=swiglu", "model.n_kv_head=2",
            "model.bias=qkv", "model.tie=false", "model.qk_norm=true",
            "model.rope_scaling={type: linear, factor: 4}"]  # fmt: skip
    body = {"model": {"n_layer": 2, "d_model": 32, "n_head": 4, "sequence_length": 16}, "phases": [{"steps": 1}]}
    config = loading.build(body, "here", said)
    assert config.model.bias == "qkv" and config.model.tie is False and config.model.rope_base == 5e5
    assert config.model.rope_scaling == RopeScaling("linear", 4.0)
    with pytest.raises(UserError, match=r"unknown setting 'model.rope_scaling.fator'. Did you mean 'factor'"):
        loading.build(body, "here", ["model.position=rope", "model.rope_scaling={fator: 4}"])
    (tmp_path / "config.yaml").write_text(loading.to_yaml(config))
    assert loading.load(tmp_path / "config.yaml") == config


def test_a_width_of_attention_of_ones_own():
    assert configured("model.d_attention=16").head_dim == 4
    assert configured("model.d_attention=16").d_attention == 16
    assert sum(linear_layers(configured("model.d_attention=16", "model.d_ff=40")).values()) == 2 * 32 * (64 + 80)


def test_presets_give_way_to_settings():
    assert configured("model.name=llama-3.2-1b").rope_scaling.factor == 32
    smaller = configured("model.name=llama-3.2-1b", "model.d_model=64", "model.n_head=8", "model.bias=true")
    assert (smaller.n_kv_head, smaller.head_dim, smaller.bias, smaller.mlp) == (8, 8, True, "swiglu")
    assert configured("model.name=cerebras-gpt-111m", "model.n_head=8").n_kv_head == 8
    assert configured("model.activation=gelu_tanh").mlp == "gelu_tanh"  # its older name


@pytest.mark.parametrize(
    "setting, message",
    [
        ("model.norm=rsm", "model.norm = 'rsm' is not known. Did you mean 'rms'?"),
        ("model.position=rotary", "model.position = 'rotary' is not known"),
        ("model.mlp=swigul", "model.mlp = 'swigul' is not known. Did you mean 'swiglu'?"),
        ("model.bias=kv", "model.bias = 'kv' is not known: expected true, false or qkv."),
        ("model.n_kv_head=3", "model.n_kv_head = 3 does not divide model.n_head = 4."),
        ("model.head_dim=0", "model.head_dim must be at least 1, not 0."),
        ("model.d_attention=30", "model.d_attention = 30 must be a multiple of model.n_head = 4."),
        ("model.rope_base=5e5", "go with model.position = rope, not learned"),
        ("model.norm_eps=2", "model.norm_eps must lie between 0 and 1, not 2"),
    ],
    ids=lambda value: value.split("=")[0].removeprefix("model.") if "=" in value and "model." == value[:6] else "",
)
def test_what_cannot_be_is_refused(setting, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        configured(setting)


@pytest.mark.parametrize("size", ["n_layer", "d_model", "n_head", "d_ff", "vocab_size", "sequence_length"])
@pytest.mark.parametrize("value", [0, -4, 2.5])
def test_sizes_are_whole_and_positive(size, value):
    with pytest.raises(UserError, match=rf"model\.{size} must be a whole number of at least 1, not {value}"):
        replace(SMALL, **{size: value})


@pytest.mark.parametrize("choice", [{"n_kv_head": -2}, {"head_dim": -16}])
def test_heads_are_positive_or_left_to_the_default(choice):
    with pytest.raises(UserError, match=rf"model\.{next(iter(choice))} must be a whole number of at least 1"):
        replace(SMALL, **choice)


@pytest.mark.parametrize("fraction", [0.01, 0.24])
def test_rotary_positions_rotate_something(fraction):
    with pytest.raises(UserError, match="2 at least"):
        replace(SMALL, position="rope", rope_fraction=fraction)
    assert replace(SMALL, position="rope", rope_fraction=0.25).rope_fraction == 0.25


def test_two_names_for_one_thing_must_agree():
    with pytest.raises(UserError, match=r"is the older name of model.mlp = swiglu"):
        configured("model.mlp=swiglu", "model.activation=gelu")
    with pytest.raises(UserError, match="is not n_head · head_dim = 4 · 8"):
        configured("model.d_attention=16", "model.head_dim=8")
