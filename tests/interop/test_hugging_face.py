"""GPT-2 folders of Hugging Face: their configurations, shards, scales and masks; what is refused by name."""

import json
import random
import shutil

import pytest
import torch
import torch.nn.utils.prune as prune
import transformers
from safetensors.torch import save_file

from vspdf.errors import UserError
from vspdf.interop import checkpoints, hugging_face
from vspdf.model import GPT
from vspdf.shapes import MODELS, Shape
from vspdf.sparsity.layer import SparseLinear, sparse_layers

SEVEN = [name for name in MODELS if name.startswith("cerebras-gpt")]


# -- configurations ---------------------------------------------------------------------------------------------------


def cerebras_configuration(name):
    """A Cerebras-GPT configuration as it lies on the hub."""
    shape = MODELS[name]
    return {
        "activation_function": "gelu", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.0, "bos_token_id": 50256,
        "embd_pdrop": 0.0, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2", "n_embd": shape.d_model, "n_head": shape.n_head, "n_inner": shape.d_ff,
        "n_layer": shape.n_layer, "n_positions": 2048, "reorder_and_upcast_attn": False, "resid_pdrop": 0.0,
        "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "use_cache": True, "vocab_size": 50257,
    }  # fmt: skip


@pytest.mark.parametrize("name", SEVEN)
def test_cerebras_gpt_is_known_at_all_seven_sizes(name):
    assert len(SEVEN) == 7
    shape, scales = hugging_face.read_configuration(cerebras_configuration(name))
    assert shape == MODELS[name] and hugging_face.known_name(shape) == name
    assert scales == hugging_face.Scales(1.0, 1.0, 1.0, by_layer=False)
    with torch.device("meta"):
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**hugging_face.configuration_of(shape)[1]))
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    shapes = {
        n.removeprefix("transformer."): tuple(p.shape)[::-1] if n.endswith(turned) else tuple(p.shape)
        for n, p in theirs.named_parameters()
    }
    one_layer = GPT(Shape(1, 16, 1, 64, 5, 4))  # names and roles; sizes by rule
    sizes = {16: shape.d_model, 64: shape.d_ff, 48: 3 * shape.d_model, 5: 50257, 4: 2048}
    ours = {n: tuple(sizes[s] for s in p.shape) for n, p in one_layer.named_parameters()}
    blocks = {n.replace("h.0.", f"h.{i}."): s for i in range(shape.n_layer) for n, s in ours.items() if "h.0." in n}
    assert shapes == {n: s for n, s in ours.items() if "h.0." not in n} | blocks


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_function": "gelu"},
        {"activation_function": "gelu_new"},
        {"activation_function": "gelu", "scale_attn_weights": False},
        {"activation_function": "gelu", "scale_attn_by_inverse_layer_idx": True},
        {"activation_function": "gelu", "dtype": "bfloat16"},
    ],
    ids=lambda settings: ", ".join(f"{k}={v}" for k, v in settings.items()),
)
def test_their_gpt2_becomes_ours_with_equal_logits(tmp_path, settings, logits, some_tokens, theirs):
    dtype = settings.pop("dtype", None)
    made = theirs(tmp_path, save=False, **settings)
    if dtype:
        made = made.bfloat16()
    made.save_pretrained(tmp_path)
    ours, tokenizer, state = checkpoints.load(tmp_path)
    assert tokenizer is None and state["step"] == 0
    torch.testing.assert_close(
        logits(ours, some_tokens(61, 24)), logits(made.float(), some_tokens(61, 24)), rtol=1e-4, atol=1e-5
    )


def test_shards_and_pickles_without_code_are_read_too(tmp_path, logits, some_tokens, theirs):
    made = theirs(tmp_path / "shards", save=False, activation_function="gelu")
    made.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    (tmp_path / "pickle").mkdir()
    shutil.copy(tmp_path / "shards" / "config.json", tmp_path / "pickle")
    torch.save(made.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    for folder in ("shards", "pickle"):
        ours = checkpoints.load(tmp_path / folder).model
        torch.testing.assert_close(logits(ours, some_tokens(61, 24)), logits(made, some_tokens(61, 24)))


MUP = {
    "by present names": {"mup_embeddings_scale": 10.0, "mup_output_alpha": 2.0, "mup_width_scale": 0.25,
                         "mup_scale_qk_dot_by_d": True},
    "by older names": {"embeddings_scale": 10.0, "output_logits_scale": 0.5, "scale_qk_dot_by_d": True},
    "by base sizes": {"embeddings_scale": 10.0, "output_logits_alpha": 2.0, "mup_base_hidden_size": 8,
                      "mup_base_filter_size": 24, "scale_qk_dot_by_d": True},
}  # fmt: skip


@pytest.mark.parametrize("keys", MUP.values(), ids=MUP)
def test_mup_scales_are_folded_into_the_weights(tmp_path, keys, logits, some_tokens, theirs):
    """Against a model that applies them one by one: embeddings x 10, logits x 0.5, scores / d_head."""
    made = theirs(tmp_path, activation_function="gelu")
    body = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(body | keys))
    ours = checkpoints.load(tmp_path).model
    for block in made.transformer.h:
        block.attn.scaling = 1 / 8  # d_head = 8 itself, not its root
    tokens = some_tokens(61, 24)
    seen = made.transformer.wte(tokens) * 10
    positions = made.transformer.wpe.weight[:24] * 10
    with torch.no_grad():
        made.transformer.wpe.weight.zero_()
        hidden = made.transformer(inputs_embeds=seen + positions).last_hidden_state
        expected = made.lm_head(hidden) * 0.5
    torch.testing.assert_close(logits(ours, tokens), expected, rtol=1e-4, atol=1e-4)


REFUSED = {
    "bloom": ({"model_type": "bloom"}, r"model_type 'bloom' is not covered; expected one of gpt2, btlm, jais, llama, "),
    "relu": ({"activation_function": "relu"}, r"activation_function 'relu' is not supported; expected one of gelu, "),
    "no eps": ({"layer_norm_epsilon": "small"}, r"layer_norm_epsilon must be a number, not 'small'"),
    "alibi": ({"position_embedding_type": "alibi"}, r"position_embedding_type = 'alibi' is not supported"),
    "cross-attention": ({"add_cross_attention": True}, r"add_cross_attention = True is not supported"),
    "quantised": ({"quantization_config": {"bits": 4}}, r"quantization_config = \{'bits': 4\} is not supported"),
    "unknown µP": ({"mup_something": 3}, r"the µP setting 'mup_something' is not known"),
    "a scale of nothing": ({"mup_embeddings_scale": 0}, r"mup_embeddings_scale must be a positive number, not 0"),
    "no width": ({"n_embd": None}, r"n_embd must be a whole number of at least 1, not None"),
    "fewer layers": ({"n_layer": 1}, r"'h.1.attn.c_attn.bias' is no tensor of a GPT-2 of 1 layers"),
    "more layers": ({"n_layer": 3}, r"12 tensors are missing, the first is 'h.2.ln_1.weight'"),
    "a billion layers": ({"n_layer": 10**9}, r"of a model of 10,[\d,]+ parameters, [\d,]+ are here"),
    "a billion wide": ({"n_embd": 10**9}, r"of a model of [\d,]+ parameters, [\d,]+ are here"),
    "a billion positions": ({"n_positions": 10**9}, r"of a model of [\d,]+ parameters, [\d,]+ are here"),
    "a list for a name": ({"activation_function": ["gelu"]}, r"activation_function '\['gelu'\]' is not supported"),
    "a scale without end": ({"mup_output_alpha": 10**400}, r"mup_output_alpha must be a positive number"),
    "another width": ({"n_inner": 95}, r"'h.0.mlp.c_fc.weight' has the shape \(32, 96\), which does not fit"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_what_our_gpt_does_not_cover_is_refused_by_name(tmp_path, change, message, theirs):
    theirs(tmp_path, activation_function="gelu")
    body = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(body | change))
    with pytest.raises(UserError, match=message):
        checkpoints.load(tmp_path)


def test_a_bent_configuration_is_read_or_refused(tmp_path, theirs):
    chance = random.Random(0)
    theirs(tmp_path, activation_function="gelu")
    whole = json.loads((tmp_path / "config.json").read_text())
    for _ in range(150):
        body = dict(whole)
        for key in chance.sample([*whole, "mup_width_scale", "n_inner"], 2):
            body[key] = chance.choice(NASTY)
        (tmp_path / "config.json").write_text(json.dumps(body))
        try:
            checkpoints.load(tmp_path)
        except UserError as error:
            assert "\n" not in str(error)


NASTY = [None, True, "", "x", -1, 0, 1, 0.5, 10**9, 2**63, -(2**70), 1e308, float("inf"), float("nan"), {}, [], [[]],
         [None], {"": 1}, "\0", "\ud800"]  # fmt: skip


def test_an_output_head_of_its_own(tmp_path, theirs):
    """Is taken over where the configuration says so, and refused where it says otherwise."""
    made = theirs(tmp_path, save=False, activation_function="gelu", tie_word_embeddings=False)
    made.lm_head.weight = torch.nn.Parameter(torch.randn(61, 32))
    made.save_pretrained(tmp_path)
    model = checkpoints.load(tmp_path).model
    assert torch.equal(model.lm_head.weight, made.lm_head.weight) and not model.shape.tie
    body = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(body | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match=r"its output head differs from its embeddings"):
        checkpoints.load(tmp_path)


# -- masks that others left -------------------------------------------------------------------------------------------


def masked(made, how):
    """A GPT-2's tensors with 70 % of two matrices masked by NaN or by masks; and its masks in [out, in]."""
    tensors = {name: t.clone() for name, t in made.state_dict().items() if name != "lm_head.weight"}
    kept = {}
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"):
        mask = torch.rand(tensors[f"{name}.weight"].shape, generator=torch.Generator().manual_seed(3)) < 0.3
        kept[name.removeprefix("transformer.")] = mask.T
        if how == "NaN":
            tensors[f"{name}.weight"][~mask] = float("nan")
        else:
            tensors[f"{name}.weight_mask"] = mask
            tensors[f"{name}.weight"][~mask] = 7.0 if how == "masks over other values" else float("nan")
    return tensors, kept


@pytest.mark.parametrize("how", ["NaN", "masks over other values", "masks over NaN"])
def test_sentinels_and_masks_become_zeros_and_the_pattern_is_recovered(tmp_path, vspdf, how, theirs):
    made = theirs(tmp_path / "hf", activation_function="gelu")
    tensors, kept = masked(made, how)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    status, out, err = vspdf("convert", tmp_path / "hf", tmp_path / "dense")
    assert status == 0, err
    assert "2 sparse matrices" in out
    assert vspdf("convert", tmp_path / "hf", tmp_path / "sparse", "--to", "sparse")[0] == 0
    dense, sparse = checkpoints.load(tmp_path / "dense").model, checkpoints.load(tmp_path / "sparse").model
    assert not sparse_layers(dense)
    layers = sparse_layers(sparse)
    assert set(layers) == set(kept)
    for name, layer in layers.items():
        weight = made.get_submodule(f"transformer.{name}").weight.T
        assert torch.equal(layer.pattern.mask(), kept[name])
        assert torch.equal(layer.weight, torch.where(kept[name], weight, 0.0))
        assert torch.equal(dense.get_submodule(name).weight, layer.weight)
    for module in dense.modules():
        assert not isinstance(module, SparseLinear)
    assert vspdf("convert", tmp_path / "dense", tmp_path / "x", "--to", "sparse")[0] == 2


def test_a_folder_pruned_by_torch_is_sparse_here(tmp_path, vspdf, theirs):
    """torch.nn.utils.prune's names, of a compiled model; an embedding that is pruned but keeps everything is taken."""
    made = theirs(tmp_path / "in", activation_function="gelu")
    for block in made.transformer.h:
        prune.random_unstructured(block.mlp.c_fc, "weight", 0.75)
    prune.identity(made.transformer.wpe, "weight")
    (tmp_path / "in" / "model.safetensors").unlink()
    torch.save({f"_orig_mod.{n}": t for n, t in made.state_dict().items()}, tmp_path / "in" / "pytorch_model.bin")
    found = checkpoints.load(tmp_path / "in", backend="reference").model
    layers = sparse_layers(found)
    assert {*layers} == {"h.0.mlp.c_fc", "h.1.mlp.c_fc"}
    assert torch.equal(layers["h.0.mlp.c_fc"].weight, made.transformer.h[0].mlp.c_fc.weight.T)
    status, out, err = vspdf("convert", tmp_path / "in", tmp_path / "out", "--to", "sparse")
    assert status == 0 and "2 sparse matrices, 0.75 sparse" in out, err


# -- what is no checkpoint --------------------------------------------------------------------------------------------


WRONG = {
    "missing": (lambda folder, theirs: folder / "mising", r"'.*mising' not found."),
    "empty folder": (
        lambda folder, theirs: folder.mkdir() or folder,
        r"no checkpoint in '.*in': expected a run directory",
    ),
    "no weights": (
        lambda folder, theirs: made_folder(folder, theirs, "config.json"),
        r"holds no model.safetensors and no pytorch",
    ),
    "truncated": (
        lambda folder, theirs: made_folder(folder, theirs, cut=True),
        r"model.safetensors is no whole safetensors file",
    ),
    "not JSON": (lambda folder, theirs: made_folder(folder, theirs, text="{"), r"config.json is no JSON"),
    "no mapping": (
        lambda folder, theirs: made_folder(folder, theirs, text="[]"),
        r"cannot be read: expected a JSON object",
    ),
}


def made_folder(folder, theirs, *only, cut=False, text=None):
    theirs(folder, activation_function="gelu")
    for file in folder.iterdir():
        if only and file.name not in only:
            file.unlink()
    if cut:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
    if text:
        (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize("make, message", WRONG.values(), ids=WRONG)
def test_what_is_no_checkpoint_is_said_in_a_line(tmp_path, vspdf, theirs, make, message):
    path = make(tmp_path / "in", theirs)
    with pytest.raises(UserError, match=message):
        checkpoints.load(path)
    status, out, err = vspdf("convert", path, tmp_path / "out")
    assert status == 2 and not out and "Traceback" not in err and not (tmp_path / "out").exists()
