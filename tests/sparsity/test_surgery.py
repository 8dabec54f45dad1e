"""Sparse layers in any model, and the ways between dense and sparse."""

import copy
import logging
import re

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import vspdf
from vspdf.errors import UserError
from vspdf.pattern import Pattern, kept_count
from vspdf.sparsity.layer import SparseLinear, sparse_layers

TINY = {"vocab_size": 97, "hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
HUGGING_FACE = {
    "GPT-2 (Conv1D)": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=97, n_embd=24, n_head=4, n_layer=2, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    ),
    "GPT-NeoX": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**TINY, intermediate_size=48, max_position_embeddings=32)),
    "OPT": lambda: OPTForCausalLM(
        OPTConfig(**TINY, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=24, dropout=0.0)
    ),
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY, intermediate_size=48, max_position_embeddings=32)),
}
LAYERS_EACH = {"GPT-2 (Conv1D)": 4, "GPT-NeoX": 4, "OPT": 6, "Llama": 7}


@pytest.fixture(params=HUGGING_FACE)
def family(request):
    torch.manual_seed(0)
    return request.param, HUGGING_FACE[request.param]()


def masked(model, patterns):
    """A dense model's state with zeros outside of `patterns`."""
    state = copy.deepcopy(model.state_dict())
    for name, pattern in patterns.items():
        conv1d = isinstance(model.get_submodule(name), Conv1D)
        state[f"{name}.weight"] *= pattern.mask().T if conv1d else pattern.mask()
    return state


# -- models -----------------------------------------------------------------------------------------------------------


def test_hugging_face_models_become_sparse_and_dense_again(family):
    name, model = family
    model.eval()
    original, tokens = copy.deepcopy(model), torch.arange(20)[None] % 97
    patterns = vspdf.sparsify(model, 0.8)
    assert len(patterns) == 2 * LAYERS_EACH[name]
    assert not any("lm_head" in layer or "embed" in layer for layer in patterns)
    for layer, pattern in patterns.items():
        assert pattern.nnz == kept_count(pattern.numel, 0.8)
        assert set(dict(model.get_submodule(layer).named_parameters())) <= {"values", "bias"}

    truth = copy.deepcopy(original)
    truth.load_state_dict(masked(original, patterns))
    torch.testing.assert_close(model(tokens).logits, truth(tokens).logits, rtol=1e-4, atol=1e-5)
    loss, loss_truth = (m(tokens, labels=tokens).loss for m in (model, truth))
    loss.backward(), loss_truth.backward()
    for layer, pattern in patterns.items():
        grad = truth.get_submodule(layer).weight.grad
        grad = grad.T if isinstance(truth.get_submodule(layer), Conv1D) else grad
        torch.testing.assert_close(model.get_submodule(layer).values.grad, grad[pattern.mask()], rtol=1e-3, atol=1e-6)

    assert vspdf.densify(model) == patterns
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    back = model.state_dict()
    for key, tensor in truth.state_dict().items():
        assert torch.equal(back[key], tensor), key
    torch.testing.assert_close(model(tokens).logits, truth(tokens).logits)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_hugging_face_models_generate_and_checkpoint_activations(family):
    _, model = family
    vspdf.sparsify(model, 0.8)
    model.gradient_checkpointing_enable()
    model.train()
    tokens = torch.arange(20)[None] % 97
    model(tokens, labels=tokens).loss.backward()
    assert all(layer.values.grad.abs().sum() > 0 for layer in sparse_layers(model).values())
    model.gradient_checkpointing_disable()
    assert model.eval().generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 23)


def test_pytorch_encoder_layers_work_in_both_modes():
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    patterns = vspdf.sparsify(layer, 0.5)
    assert set(patterns) == {"linear1", "linear2"}  # attention reads its projections' weights itself
    x = torch.randn(2, 5, 16)
    trained = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), trained, rtol=1e-4, atol=1e-5)


def test_masks_depend_on_seed_and_name_alone(mlp):
    patterns = vspdf.sparsify(mlp(), 0.5, seed=3)
    assert vspdf.sparsify(mlp(), 0.5, seed=3) == patterns
    assert vspdf.sparsify(mlp(), 0.5, seed=3, include="2") == {"2": patterns["2"]}
    assert vspdf.sparsify(mlp(), 0.5, seed=4) != patterns
    square = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    assert len(set(vspdf.sparsify(square, 0.5).values())) == 2


def test_globs_choose_layers_and_the_first_match_counts():
    model = HUGGING_FACE["GPT-2 (Conv1D)"]()
    own = Pattern.random((24, 24), 0.3)
    patterns = vspdf.sparsify(
        model, {"*.0.attn.c_proj": own, "*.attn.*": 0.5, "*.1.mlp.*": 0.0, "*": 0.9}, exclude=["*.0.mlp.c_fc"]
    )
    sparsities = {name.removeprefix("transformer.h."): round(p.sparsity, 2) for name, p in patterns.items()}
    assert sparsities == {
        "0.attn.c_attn": 0.5, "0.attn.c_proj": 0.3, "0.mlp.c_proj": 0.9, "1.attn.c_attn": 0.5, "1.attn.c_proj": 0.5,
    }  # fmt: skip
    assert patterns["transformer.h.0.attn.c_proj"] is own


def test_rescale_is_the_density_aware_init(mlp):
    model, plain = mlp(), mlp()
    vspdf.sparsify(model, 0.75, rescale=True)
    vspdf.sparsify(plain, 0.75)
    for layer, other in zip(sparse_layers(model).values(), sparse_layers(plain).values(), strict=True):
        torch.testing.assert_close(layer.values, other.values / layer.pattern.density**0.5)


def test_tied_and_frozen_layers_stay_dense_and_say_so(caplog):
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(8, 4), "out": nn.Linear(4, 8), "frozen": nn.Linear(4, 4), "free": nn.Linear(4, 4)}
    )
    model["out"].weight = model["embedding"].weight
    model["frozen"].weight.requires_grad_(False)
    with caplog.at_level(logging.WARNING, "vspdf"):
        assert set(vspdf.sparsify(model, 0.5)) == {"free"}
    assert [r.getMessage().split(":")[1] for r in caplog.records] == [" 'out' stays dense", " 'frozen' stays dense"]
    assert model["out"].weight is model["embedding"].weight


def test_a_shared_module_stays_shared():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"] = model["a"]
    assert set(vspdf.sparsify(model, 0.5)) == {"a", "c"}
    assert isinstance(model["b"], SparseLinear) and model["a"] is model["b"]
    vspdf.densify(model)
    assert type(model["b"]) is nn.Linear and model["a"] is model["b"]


def test_biases_stay_the_same_parameters_frozen_or_tied(mlp):
    model = mlp()
    model[0].bias.requires_grad_(False)
    biases = model[0].bias, model[2].bias
    vspdf.sparsify(model, 0.5)
    vspdf.densify(model)
    assert model[0].bias is biases[0] and model[2].bias is biases[1] and not model[0].bias.requires_grad


def test_frozen_values_stay_frozen(mlp):
    model = mlp()
    vspdf.sparsify(model, 0.5)
    model[0].values.requires_grad_(False)
    vspdf.set_sparsity(model, 0.2)
    assert not model[0].values.requires_grad and model[2].values.requires_grad
    vspdf.densify(model)
    assert not model[0].weight.requires_grad and model[2].weight.requires_grad


def test_densify_draws_no_random_numbers():
    model = HUGGING_FACE["GPT-2 (Conv1D)"]()
    vspdf.sparsify(model, 0.5)
    before = torch.get_rng_state()
    vspdf.densify(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_explain_has_a_line_per_product_of_every_layer(mlp):
    model = mlp()
    assert vspdf.explain(model, 8).startswith("no sparse layer")
    vspdf.sparsify(model, 0.9)
    lines = vspdf.explain(model, 8).splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["0", "2"]
    for i, product in enumerate(("forward", "grad_input", "grad_values")):
        assert lines[1 + i].startswith(f"  {product}: auto chose ")
    assert vspdf.explain(model[0], 8).startswith("forward: ")


# -- more weights, step by step ---------------------------------------------------------------------------------------


def test_set_sparsity_only_adds(mlp):
    model = mlp()
    first = vspdf.sparsify(model, 0.9)
    weights = {name: layer.weight.detach() for name, layer in sparse_layers(model).items()}
    for sparsity in (0.5, 0.25, 0.0):
        before = {name: layer.pattern for name, layer in sparse_layers(model).items()}
        assert vspdf.set_sparsity(model, sparsity) == before
        for name, layer in sparse_layers(model).items():
            assert layer.pattern.nnz == layer.values.numel() == kept_count(layer.pattern.numel, sparsity)
            assert layer.pattern.issuperset(before[name]) and layer.pattern.issuperset(first[name])
            assert torch.equal(layer.weight, weights[name])  # new weights are zeros


def test_training_sparse_equals_training_masked_dense(mlp, adam_steps):
    """Ten AdamW steps with decay: sparse values against a dense model whose masked weights and gradients are zeroed."""
    sparse, dense = mlp(), mlp()
    patterns = vspdf.sparsify(sparse, 0.7)
    dense.load_state_dict(masked(dense, patterns))
    for name, pattern in patterns.items():
        mask = pattern.mask()
        dense.get_submodule(name).weight.register_hook(lambda grad, mask=mask: grad * mask)
    for model in (sparse, dense):
        adam_steps(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), count=10)
    for name, pattern in patterns.items():
        torch.testing.assert_close(
            sparse.get_submodule(name).weight, dense.get_submodule(name).weight, rtol=1e-4, atol=1e-6
        )
        assert not dense.get_submodule(name).weight[~pattern.mask()].any()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\), not 1.0"),
        ({"sparsity": -0.5}, "not -0.5"),
        ({"sparsity": {"0": 1.5}}, r"the sparsity of '0' must lie in \[0, 1\), not 1.5"),
        (
            {"sparsity": {"0": Pattern.random((30, 12), 0.5), "2": Pattern.random((3, 3), 0.5)}},
            "Pattern.3x3.*does not fit",
        ),
        ({"sparsity": {"fc": 0.5}}, "'fc' matches no linear layer. Known: 0, 2."),
        ({"sparsity": 0.5, "include": "nothing*"}, "'nothing.*' matches no linear layer"),
        ({"sparsity": 0.5, "exclude": ["x"]}, "'x' matches no module"),
    ],
    ids=["1", "negative", "rule", "shape", "unknown rule", "include", "exclude"],
)
def test_sparsify_refuses_and_leaves_the_model_alone(arguments, message, mlp):
    model = mlp()
    with pytest.raises(UserError, match=message):
        vspdf.sparsify(model, **arguments)
    assert not sparse_layers(model)


def test_models_without_layers_are_refused(mlp):
    with pytest.raises(UserError, match=r"no nn.Linear or Conv1D"):
        vspdf.sparsify(nn.Sequential(nn.Embedding(3, 3)), 0.5)
    with pytest.raises(UserError, match=r"use SparseLinear.from_linear"):
        vspdf.sparsify(nn.Linear(3, 3), 0.5)
    with pytest.raises(UserError, match=r"its to_linear"):
        vspdf.densify(SparseLinear.from_linear(nn.Linear(3, 3), Pattern.random((3, 3), 0.5)))
    with pytest.raises(UserError, match=r"call vspdf.sparsify\(model, ...\) first"):
        vspdf.set_sparsity(mlp(), 0.5)


def test_set_sparsity_refuses_to_drop_and_changes_nothing(mlp):
    model = mlp()
    patterns = vspdf.sparsify(model, {"0": 0.9, "2": 0.2})
    with pytest.raises(UserError, match=r"can only grow"):
        vspdf.set_sparsity(model, 0.5)
    assert {name: layer.pattern for name, layer in sparse_layers(model).items()} == patterns
    with pytest.raises(UserError, match=r"moments = 'kep' is not known. Did you mean 'keep'"):
        vspdf.set_sparsity(model, 0.1, moments="kep")


@pytest.mark.parametrize("wrong", [None, "50%", [0.5], True, torch.nan], ids=repr)
@pytest.mark.parametrize("glob", ["*", "0"])
def test_set_sparsity_refuses_what_is_no_sparsity(mlp, wrong, glob):
    model = mlp()
    patterns = vspdf.sparsify(model, 0.9)
    named = "sparsity" if glob == "*" else "the sparsity of '0'"
    with pytest.raises(UserError, match=rf"^{named} must (be a number|lie) in \[0, 1\], not {re.escape(repr(wrong))}"):
        vspdf.set_sparsity(model, wrong if glob == "*" else {glob: wrong})
    assert {name: layer.pattern for name, layer in sparse_layers(model).items()} == patterns


# -- which weights are kept -------------------------------------------------------------------------------------------


def test_init_methods_on_every_family(family):
    name, made = family
    dense = {n: p.detach().clone() for n, p in made.named_parameters()}
    for method in ("topk", "checkerboard"):
        model = copy.deepcopy(made)
        patterns = vspdf.sparsify(model, 0.7, init_method=method)
        assert len(patterns) == 2 * LAYERS_EACH[name]
        for layer, pattern in patterns.items():
            weight = dense[f"{layer}.weight"]
            weight = weight.T if isinstance(made.get_submodule(layer), Conv1D) else weight
            expected = Pattern.topk(weight, 0.7) if method == "topk" else Pattern.checkerboard(pattern.shape, 0.7)
            assert pattern is expected
    model = copy.deepcopy(made)
    before = vspdf.sparsify(model, 0.7, seed=3)
    vspdf.densify(model)
    assert vspdf.sparsify(model, 0.1, init_method="from_zeros") == before


def test_from_zeros_leaves_a_matrix_without_zeros_dense(caplog, mlp):
    model = mlp()
    with torch.no_grad():
        model[2].weight[0] = 0
    with caplog.at_level(logging.WARNING):
        assert set(vspdf.sparsify(model, 0.5, init_method="from_zeros")) == {"2"}
    assert "'0' stays dense: none of its weights is zero" in caplog.text


def test_an_unknown_init_method_is_refused(mlp):
    with pytest.raises(UserError, match=r"init_method 'top-k' is not known. Did you mean 'topk'\?"):
        vspdf.sparsify(mlp(), 0.5, init_method="top-k")


class Int8Linear(nn.Linear):
    """As quantising libraries do it: a subclass that multiplies otherwise."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.round(), self.bias)


class Packed(torch.Tensor):
    """As others do it: a weight of a tensor class of its own."""


def test_quantised_layers_are_skipped_with_a_word(caplog):
    model = nn.Sequential(nn.Linear(8, 8), Int8Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    model[3].weight = nn.Parameter(torch.randn(8, 8).as_subclass(Packed))
    with caplog.at_level(logging.WARNING):
        assert set(vspdf.sparsify(model, 0.5)) == {"0"}
    assert "'1' stays dense: Int8Linear is a kind of its own" in caplog.text
    assert "'2' stays dense: its weight is a Parameter of torch.int8 (quantised?)" in caplog.text
    assert "'3' stays dense: its weight is a Packed of torch.float32" in caplog.text


def test_layers_densify_at_their_own_pace(mlp):
    model = mlp()
    vspdf.sparsify(model, {"0": 0.9, "2": 0.8})
    before = vspdf.set_sparsity(model, {"2": 0.5})
    assert set(before) == {"2"} and model[0].pattern.sparsity == pytest.approx(0.9)
    assert model[2].pattern.sparsity == pytest.approx(0.5) and model[2].pattern.issuperset(before["2"])
    with pytest.raises(UserError, match=r"'3' matches no sparse layer"):
        vspdf.set_sparsity(model, {"3": 0.5})


@pytest.mark.parametrize(
    "change",
    [lambda *both: vspdf.set_sparsity(both[0], 0.5, both[1]), lambda *both: vspdf.evolve(*both, 0.3),
     lambda *both: vspdf.densify(*both)],
    ids=["set_sparsity", "evolve", "densify"],
)  # fmt: skip
def test_layers_that_share_their_values_are_named(change):
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    vspdf.sparsify(model, Pattern.random((12, 12), 0.75))
    model[1].values = model[0].values
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"^'0' and '1' share one parameter as `values`, .* give each its own first"):
        change(model, optimizer)
    assert model[0].values is model[1].values is optimizer.param_groups[0]["params"][0]


# -- seeds ------------------------------------------------------------------------------------------------------------

SEEDED = {
    "sparsify": lambda model, seed: vspdf.sparsify(model, 0.9, seed=seed),
    "set_sparsity": lambda model, seed: (vspdf.sparsify(model, 0.9), vspdf.set_sparsity(model, 0.5, seed=seed)),
    "evolve": lambda model, seed: (vspdf.sparsify(model, 0.9), vspdf.evolve(model, None, 0.5, seed=seed)),
    "Phases": lambda model, seed: vspdf.Phases([(0.9, 2)], seed=seed).start(model),
    "Pattern.grow": lambda model, seed: vspdf.sparsify(model, Pattern.random((96, 48), 0.9).grow(0.5, seed)),
}


@pytest.mark.parametrize("draw", SEEDED.values(), ids=SEEDED)
def test_a_seed_of_any_integer_type_gives_its_mask_and_what_is_none_is_named(draw, one):
    def mask(seed):
        model = one()
        draw(model, seed)
        return model[0].pattern

    wanted = mask(5)
    assert wanted is not mask(0)
    for kind in (np.uint8, np.int32, np.uint32, np.int64, np.uint64):
        assert mask(kind(5)) is wanted, kind
    for wrong in (-1, np.int32(-1), None, 1.5, True, torch.tensor(5), "5"):
        with pytest.raises(
            UserError, match=rf"^seed must be a whole number of at least 0, not {re.escape(repr(wrong))}\."
        ):
            mask(wrong)
