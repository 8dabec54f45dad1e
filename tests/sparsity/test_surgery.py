"""Sparse layers in any model, and the ways between dense and sparse."""

import copy
import logging

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
from vspdf.kernels import cpu
from vspdf.pattern import Pattern, kept_count
from vspdf.sparsity.layer import SparseLinear, build_plans, sparse_layers, training_state_bytes
from vspdf.sparsity.optimizer import RevivedWarmup
from vspdf.sparsity.surgery import sparsify

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


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 30), nn.GELU(), nn.Linear(30, 12))


def adam_steps(model, optimizer, count=3, width=12):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(8, width, generator=generator)).square().mean().backward()
        optimizer.step()


def masked(model, patterns):
    """A dense model's state with zeros outside of `patterns`."""
    state = copy.deepcopy(model.state_dict())
    for name, pattern in patterns.items():
        conv1d = isinstance(model.get_submodule(name), Conv1D)
        state[f"{name}.weight"] *= pattern.mask().T if conv1d else pattern.mask()
    return state


# -- one layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_from_linear_and_back(bias):
    linear = nn.Linear(10, 6, bias=bias).eval()
    pattern = Pattern.random((6, 10), 0.7)
    layer = SparseLinear.from_linear(linear, pattern)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == (
        {"values": (pattern.nnz,)} | ({"bias": (6,)} if bias else {})
    )
    assert torch.equal(layer.values, linear.weight[pattern.mask()]) and not layer.training
    back = layer.to_linear()
    assert type(back) is nn.Linear and not back.training
    assert torch.equal(back.weight, linear.weight * pattern.mask()) and torch.equal(layer.weight, back.weight)
    x = torch.randn(3, 10)
    torch.testing.assert_close(layer(x), back(x))
    with torch.no_grad():  # copies, not views
        layer.values.zero_()
    assert linear.weight.abs().sum() > 0 and back.weight.abs().sum() > 0
    assert "sparsity=0.7" in repr(layer) and f"bias={bias}" in repr(layer)


def test_code_that_reads_a_layers_weight_gets_one_that_learns():
    layer = SparseLinear.from_linear(nn.Linear(10, 6), Pattern.random((6, 10), 0.7))
    x = torch.randn(3, 10)
    by_hand = torch.autograd.grad(nn.functional.linear(x, layer.weight, layer.bias).sum(), layer.values)
    torch.testing.assert_close(by_hand, torch.autograd.grad(layer(x).sum(), layer.values))


def test_a_layer_moves_between_dtypes():
    layer = SparseLinear.from_linear(nn.Linear(10, 6), Pattern.random((6, 10), 0.7)).bfloat16()
    assert (
        layer(torch.randn(3, 10).bfloat16()).dtype == torch.bfloat16
        and layer.to_linear().weight.dtype == torch.bfloat16
    )


def test_a_state_dict_with_another_number_of_weights_is_refused():
    layer = SparseLinear.from_linear(nn.Linear(10, 6), Pattern.random((6, 10), 0.7))
    other = SparseLinear.from_linear(nn.Linear(10, 6), Pattern.random((6, 10), 0.5))
    with pytest.raises(UserError, match=r"the stored pattern has 30 weights, this layer 18"):
        layer.load_state_dict(other.state_dict())


def test_a_pattern_of_another_shape_is_refused():
    with pytest.raises(UserError, match=r"Pattern\(10x6, .*\) does not fit a layer of shape \(6, 10\) \(out, in\)"):
        SparseLinear.from_linear(nn.Linear(10, 6), Pattern.random((10, 6), 0.5))
    with pytest.raises(UserError, match=r"values of shape \(3,\)"):
        SparseLinear(Pattern.random((10, 6), 0.5), torch.ones(3))


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


def test_masks_depend_on_seed_and_name_alone():
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


def test_rescale_is_the_density_aware_init():
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


def test_biases_stay_the_same_parameters_frozen_or_tied():
    model = mlp()
    model[0].bias.requires_grad_(False)
    biases = model[0].bias, model[2].bias
    vspdf.sparsify(model, 0.5)
    vspdf.densify(model)
    assert model[0].bias is biases[0] and model[2].bias is biases[1] and not model[0].bias.requires_grad


def test_frozen_values_stay_frozen():
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


def test_explain_has_a_line_per_product_of_every_layer():
    model = mlp()
    assert vspdf.explain(model, 8).startswith("no sparse layer")
    vspdf.sparsify(model, 0.9)
    lines = vspdf.explain(model, 8).splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["0", "2"]
    for i, product in enumerate(("forward", "grad_input", "grad_values")):
        assert lines[1 + i].startswith(f"  {product}: auto chose ")
    assert vspdf.explain(model[0], 8).startswith("forward: ")


# -- more weights, step by step ---------------------------------------------------------------------------------------


def test_set_sparsity_only_adds():
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


OPTIMIZERS = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
def test_optimizer_state_travels_all_the_way(make, conv1d):
    """dense -> sparse -> less sparse -> dense: state follows its weight, positions without one hold zeros."""
    model = nn.Sequential(Conv1D(30, 12), nn.GELU(), Conv1D(12, 30)) if conv1d else mlp()
    optimizer = make(model.parameters())
    adam_steps(model, optimizer)

    def matrices(key):
        """State tensors of all weights in dense row-major form."""
        found = []
        for module in (model[0], model[2]):
            if isinstance(module, SparseLinear):
                dense = torch.zeros(module.pattern.shape)
                dense[module.pattern.mask()] = optimizer.state[module.values][key]
                found.append(dense)
            else:
                tensor = optimizer.state[module.weight][key]
                found.append(tensor.T.clone() if isinstance(module, Conv1D) else tensor.clone())
        return found

    state = optimizer.state[model[0].weight]
    keys = [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim()]
    assert keys
    dense = {key: matrices(key) for key in keys}
    patterns = list(vspdf.sparsify(model, 0.6, optimizer=optimizer).values())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} and set(map(id, optimizer.state)) == held
    for key in keys:
        for found, exact, pattern in zip(matrices(key), dense[key], patterns, strict=True):
            assert torch.equal(found, exact * pattern.mask())
    for change in (lambda: vspdf.set_sparsity(model, 0.3, optimizer), lambda: vspdf.densify(model, optimizer)):
        adam_steps(model, optimizer)
        before = {key: matrices(key) for key in keys}
        steps = [s.get("step", torch.tensor(0.0)).item() for s in optimizer.state.values()]
        change()
        for key in keys:
            assert all(torch.equal(a, b) for a, b in zip(matrices(key), before[key], strict=True))
        assert [s.get("step", torch.tensor(0.0)).item() for s in optimizer.state.values()] == steps
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
            id(p) for p in model.parameters()
        }
    adam_steps(model, optimizer)


SWITCHES = {
    "set_sparsity": lambda model, optimizer, **how: vspdf.set_sparsity(model, 0.4, optimizer, **how),
    "densify": vspdf.densify,
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_moments_reset(switch):
    model = mlp()
    vspdf.sparsify(model, 0.6)
    optimizer = torch.optim.AdamW(model.parameters())
    adam_steps(model, optimizer)
    switch(model, optimizer, moments="reset")
    assert set(map(id, optimizer.state)) == {id(model[0].bias), id(model[2].bias)}


def test_training_sparse_equals_training_masked_dense():
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


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
def test_revived_weights_ramp_up(switch, conv1d):
    model = nn.Sequential(Conv1D(30, 12), nn.GELU(), Conv1D(12, 30)) if conv1d else mlp()
    vspdf.sparsify(model, 0.8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    adam_steps(model, optimizer)
    before = switch(model, optimizer)
    plain, plain_optimizer = copy.deepcopy((model, optimizer))

    def weights(of):
        """Dense row-major copies by layer."""
        found = {name: of.get_submodule(name) for name in before}
        return {n: (m.weight.T if isinstance(m, Conv1D) else m.weight).detach().clone() for n, m in found.items()}

    x = torch.randn(8, 12)
    warmup = RevivedWarmup(model, before, steps=3)
    for done in range(1, 6):
        for one in (model, plain):
            one.zero_grad()
            one(x).square().mean().backward()
        start, plain_start = weights(model), weights(plain)
        warmup.step(optimizer)
        plain_optimizer.step()
        if done == 1:  # from the same state: the update of revived weights is a quarter of the plain one
            for name, old in before.items():
                update, full = weights(model)[name] - start[name], weights(plain)[name] - plain_start[name]
                ramp = torch.where(old.mask(), 1.0, 0.25)
                torch.testing.assert_close(update, full * ramp, rtol=1e-3, atol=1e-7)
                assert full[~old.mask()].abs().sum() > 0
        assert warmup.done == min(done, 3)


def test_state_bytes_count_what_exists():
    model = mlp()
    patterns = vspdf.sparsify(model, 0.9)
    sizes = training_state_bytes(model)
    nnz, numel = sum(p.nnz for p in patterns.values()), sum(p.numel for p in patterns.values())
    assert sizes["sparsified"]["dense"] == 16 * numel
    assert sizes["sparsified"]["sparse"] == 16 * nnz + sum(p.bits.nbytes for p in patterns.values())
    assert sizes["model"]["dense"] == 16 * (numel + 42)


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
def test_sparsify_refuses_and_leaves_the_model_alone(arguments, message):
    model = mlp()
    with pytest.raises(UserError, match=message):
        vspdf.sparsify(model, **arguments)
    assert not sparse_layers(model)


def test_models_without_layers_are_refused():
    with pytest.raises(UserError, match=r"no nn.Linear or Conv1D"):
        vspdf.sparsify(nn.Sequential(nn.Embedding(3, 3)), 0.5)
    with pytest.raises(UserError, match=r"use SparseLinear.from_linear"):
        vspdf.sparsify(nn.Linear(3, 3), 0.5)
    with pytest.raises(UserError, match=r"its to_linear"):
        vspdf.densify(SparseLinear.from_linear(nn.Linear(3, 3), Pattern.random((3, 3), 0.5)))
    with pytest.raises(UserError, match=r"call vspdf.sparsify\(model, ...\) first"):
        vspdf.set_sparsity(mlp(), 0.5)


def test_set_sparsity_refuses_to_drop_and_changes_nothing():
    model = mlp()
    patterns = vspdf.sparsify(model, {"0": 0.9, "2": 0.2})
    with pytest.raises(UserError, match=r"can only grow"):
        vspdf.set_sparsity(model, 0.5)
    assert {name: layer.pattern for name, layer in sparse_layers(model).items()} == patterns
    with pytest.raises(UserError, match=r"moments = 'kep' is not known. Did you mean 'keep'"):
        vspdf.set_sparsity(model, 0.1, moments="kep")


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


def test_from_zeros_leaves_a_matrix_without_zeros_dense(caplog):
    model = mlp()
    with torch.no_grad():
        model[2].weight[0] = 0
    with caplog.at_level(logging.WARNING):
        assert set(vspdf.sparsify(model, 0.5, init_method="from_zeros")) == {"2"}
    assert "'0' stays dense: none of its weights is zero" in caplog.text


def test_an_unknown_init_method_is_refused():
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


def test_layers_densify_at_their_own_pace():
    model = mlp()
    vspdf.sparsify(model, {"0": 0.9, "2": 0.8})
    before = vspdf.set_sparsity(model, {"2": 0.5})
    assert set(before) == {"2"} and model[0].pattern.sparsity == pytest.approx(0.9)
    assert model[2].pattern.sparsity == pytest.approx(0.5) and model[2].pattern.issuperset(before["2"])
    with pytest.raises(UserError, match=r"'3' matches no sparse layer"):
        vspdf.set_sparsity(model, {"3": 0.5})


def test_low_memory_is_loops_with_a_quarter_of_the_bytes():
    model = nn.Sequential(nn.Linear(256, 512))
    sparsify(model, 0.75, memory="low", seed=17)
    layer, x = model[0], torch.randn(80, 256)
    wanted = layer(x)
    assert "row loops" in vspdf.explain(model, 80)
    build_plans(model)
    assert layer.pattern.packed["cpu"].nbytes < 6 * layer.pattern.nnz
    vspdf.set_sparsity(model, 0.5)
    assert layer.memory == "low" and "row loops" in vspdf.explain(model, 80)
    build_plans(model, "normal")
    if cpu.isa() == "avx512":
        assert "generated code" in vspdf.explain(model, 80)
    torch.testing.assert_close(layer(x), wanted)
    with pytest.raises(UserError, match=r"unknown memory 'lo'.*'low'"):
        layer.memory = "lo"


def test_training_state_of_layers_counts_their_code():
    """The weights, gradients, moments, pattern and plan of sparse layers against the same dense."""
    for sparsity, most in ((0.75, 0.55), (0.9, 0.25)):
        model = nn.Sequential(nn.Linear(768, 3072))
        sparsify(model, sparsity, seed=3)
        build_plans(model)
        layers = training_state_bytes(model)["sparsified"]
        assert 0.1 < layers["sparse"] / layers["dense"] < most


def test_build_plans_builds_every_plan_that_a_kernel_may_use():
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 32))
    sparsify(model, 0.9)
    model[2].backend = "reference"
    build_plans(model)
    sizes = [layer.pattern.packed["cpu"].nbytes for layer in model[:2]]
    model(torch.randn(80, 64, requires_grad=True)).sum().backward()
    assert sizes == [layer.pattern.packed["cpu"].nbytes for layer in model[:2]]
    assert "cpu" not in model[2].pattern.packed
