"""Conversion to and from Hugging Face's layout, and the loader of any checkpoint."""

import dataclasses
import json
import random
import shutil

import pytest
import torch
import torch.nn.utils.prune as prune
import transformers
from safetensors.torch import load_file, save_file

import vspdf
from vspdf.config import loading
from vspdf.data.tokenizer import Tokenizer
from vspdf.errors import UserError
from vspdf.interop import checkpoints, hugging_face
from vspdf.model import GPT
from vspdf.runs import checkpoint
from vspdf.shapes import MODELS, Shape
from vspdf.sparsity.layer import SparseLinear, sparse_layers
from vspdf.train.trainer import train

TEXT = "def f(x):\n\treturn  x  # don't — 世界"
SEVEN = [name for name in MODELS if name.startswith("cerebras-gpt")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_config):
    """A run with checkpoints of its sparse (12, 20) and its dense (28) steps."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = ["train.checkpoint_every=4", "train.keep_checkpoints=9"]
    train(loading.load(tiny_config(folder), overrides), say=lambda line: None)
    return folder / "run"


def step(run, number):
    return run / "checkpoints" / f"step-{number:08d}"


def logits(model, tokens):
    with torch.no_grad():
        out = model.eval()(tokens)
    return out if torch.is_tensor(out) else out.logits


def some_tokens(vocab_size=257, length=16):
    return torch.randint(vocab_size, (3, length), generator=torch.Generator().manual_seed(0))


# -- to Hugging Face and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [12, 20, 28], ids=["90 % sparse", "half sparse", "dense"])
def test_hugging_face_reads_our_model_and_its_logits_are_ours(trained, tmp_path, vspdf, number):
    status, out, err = vspdf("convert", step(trained, number), tmp_path / "hf", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["kind"] == "checkpoint" and found["to"] == "hugging-face" and found["step"] == number
    assert len(found["layers"]) == (0 if number == 28 else 8)
    ours, tokenizer, _ = checkpoints.load(step(trained, number))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(logits(theirs, some_tokens()), logits(ours, some_tokens()), rtol=1e-5, atol=1e-6)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = words(TEXT)["input_ids"]
    assert ids == tokenizer.encode(TEXT).tolist() and words.decode(ids) == TEXT
    assert words.eos_token_id == theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 256


def test_there_and_back_every_bit_is_the_same(trained, tmp_path, vspdf):
    vspdf("convert", trained, tmp_path / "hf")
    status, out, _ = vspdf("convert", tmp_path / "hf", tmp_path / "again")
    assert status == 0 and "a Hugging Face folder" in out and "wrote" in out
    ours, again = checkpoints.load(trained), checkpoints.load(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), again.model.parameters(), strict=True))
    assert again.tokenizer.to_json() == ours.tokenizer.to_json() and again.model.shape.mlp == "gelu"
    direct = checkpoints.load(tmp_path / "hf")
    assert torch.equal(logits(direct.model, some_tokens()), logits(ours.model, some_tokens()))


def test_sparse_to_dense_of_our_own(trained, tmp_path, vspdf):
    status, _, _ = vspdf("convert", step(trained, 12), tmp_path / "dense", "--to", "dense")
    assert status == 0
    sparse, dense = checkpoints.load(step(trained, 12)), checkpoints.load(tmp_path / "dense")
    assert len(sparse_layers(sparse.model)) == 8 and not sparse_layers(dense.model) and dense.state["step"] == 12
    for name, layer in sparse_layers(sparse.model).items():
        assert torch.equal(dense.model.get_submodule(name).weight, layer.weight)
    assert dense.state["corpus"] == sparse.state["corpus"]


def test_at_90_percent_sparsified_tensors_take_a_fifth_of_their_dense_size(trained):
    tensors = load_file(step(trained, 12) / "model.safetensors")
    layers = sparse_layers(checkpoints.load(step(trained, 12)).model)
    stored = sum(tensors[f"{name}.{part}"].nbytes for name in layers for part in ("values", "pattern"))
    dense = sum(4 * layer.pattern.numel for layer in layers.values())
    assert 0.1 < stored / dense < 0.2
    moments = load_file(step(trained, 12) / "optimizer.safetensors")
    for name, layer in layers.items():
        assert moments[f"{name}.values:exp_avg"].shape == (layer.pattern.nnz,)


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


TINY = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_inner": 96, "vocab_size": 61, "n_positions": 24}


def theirs(folder, save=True, **settings):
    """A random GPT-2 of transformers with every parameter drawn, and its folder."""
    torch.manual_seed(0)
    made = transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY, bos_token_id=1, eos_token_id=1, **settings))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if save:
        made.save_pretrained(folder)
    return made.eval()


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
def test_their_gpt2_becomes_ours_with_equal_logits(tmp_path, settings):
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


def test_shards_and_pickles_without_code_are_read_too(tmp_path):
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
def test_mup_scales_are_folded_into_the_weights(tmp_path, keys):
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
def test_what_our_gpt_does_not_cover_is_refused_by_name(tmp_path, change, message):
    theirs(tmp_path, activation_function="gelu")
    body = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(body | change))
    with pytest.raises(UserError, match=message):
        checkpoints.load(tmp_path)


def test_a_bent_configuration_is_read_or_refused(tmp_path):
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


def test_an_output_head_of_its_own(tmp_path):
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


# -- the Cerebras stack -----------------------------------------------------------------------------------------------

STACK = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "filter_size": 96, "max_position_embeddings": 24,
    "vocab_size": 61, "position_embedding_type": "learned", "share_embedding_weights": True, "dropout_rate": 0.1,
    "nonlinearity": "gelu", "layer_norm_epsilon": 1e-5, "use_bias_in_output": False,
}  # fmt: skip


STACK_NAMES = {
    "wte.": "embedding_layer.word_embeddings.", "wpe.": "embedding_layer.position_embeddings.", "ln_1": "norm1",
    "ln_2": "norm3", "ln_f": "transformer_decoder.norm", "mlp.c_fc": "ffn.ffn.0.linear_layer",
    "mlp.c_proj": "ffn.ffn.1.linear_layer", "attn.c_proj": "self_attn.proj_output_dense_layer",
}  # fmt: skip


def stack_names(tensors, since_21=False):
    """A GPT-2 of transformers as the Cerebras stack's state dict: names of its own, Q, K and V apart, [out, in]."""
    found = {}
    for name, tensor in tensors.items():
        name, tensor = name.removeprefix("transformer."), tensor.clone()
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T.contiguous()
        for ours, theirs in STACK_NAMES.items():
            name = name.replace(ours, theirs)
        name = f"transformer_decoder.layers.{name[2:]}" if name.startswith("h.") else name
        if since_21:
            name = name.replace("position_embeddings.", "position_embeddings.embed.")
        parts = {name: tensor}
        if "attn.c_attn" in name:
            chunks = zip("qkv", tensor.chunk(3), strict=True)
            parts = {name.replace("attn.c_attn", f"self_attn.proj_{x}_dense_layer"): part for x, part in chunks}
        found.update(parts)
    found["ln_f.weight"], found["ln_f.bias"] = (found[f"transformer_decoder.norm.{k}"] for k in ("weight", "bias"))
    return found


def stack_folder(folder, tensors, form="older", **settings):
    folder.mkdir(exist_ok=True)
    model = STACK | settings
    body = {"model": model, "runconfig": {}} if form == "older" else {"trainer": {"init": {"model": model}}}
    (folder / "params.yaml").write_text(json.dumps(body))
    (folder / "other.yaml").write_text("lr: 1")
    torch.save(tensors, folder / "checkpoint_10.mdl")
    return folder


@pytest.mark.parametrize("release", ["names alone", "under model.", "since 2.1"])
def test_the_stacks_names_become_gpt2s(tmp_path, vspdf, release):
    """Sentinels in Q, K, V and an FFN matrix, and in optimizer state, whose logits equal those of zeros there."""
    made = theirs(tmp_path, save=False, activation_function="gelu")
    masks = {n: torch.rand(made.get_parameter(n).shape) < 0.4 for n in ("transformer.h.0.attn.c_attn.weight",
             "transformer.h.1.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.weight")}  # fmt: skip
    with torch.no_grad():
        marked = {n: p.masked_fill(~masks[n], torch.nan) if n in masks else p for n, p in made.state_dict().items()}
        for name, mask in masks.items():
            made.get_parameter(name).mul_(mask)
    state = stack_names(marked, release == "since 2.1")
    if release == "under model.":  # as the releases that marked by NaN wrote it; the head and the table are stored once
        state.pop("embedding_layer.word_embeddings.weight")
        moment = {"exp_avg": torch.full((9, 9), torch.nan), "step": torch.tensor(10.0)}
        state = {
            "model": {f"model.{n}": t for n, t in state.items()},
            "optimizer": {"state": {3: moment}},
            "global_step": 10,
        }
    folder = stack_folder(tmp_path / "theirs", state, "older" if release == "under model." else "current")
    status, out, err = vspdf("convert", folder, tmp_path / "ours", "--to", "sparse")
    assert status == 0, err
    assert f"{folder}: a checkpoint of the Cerebras stack, " in out and "3 sparse matrices" in out
    ours = checkpoints.load(tmp_path / "ours").model
    for name, layer in sparse_layers(ours).items():
        assert torch.equal(layer.pattern.mask(), masks[f"transformer.{name}.weight"].T)
    torch.testing.assert_close(
        logits(ours, some_tokens(61, 24)), logits(made, some_tokens(61, 24)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("names", ["by older names", "by base sizes"])
def test_scales_of_the_stacks_mup_are_folded_likewise(tmp_path, names):
    keys = MUP[names]
    made = theirs(tmp_path / "hf", activation_function="gelu")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    folder = stack_folder(tmp_path / "theirs", stack_names(made.state_dict()), **keys)
    tokens = some_tokens(61, 24)
    assert torch.equal(
        logits(checkpoints.load(folder).model, tokens), logits(checkpoints.load(tmp_path / "hf").model, tokens)
    )


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


LAYER = "transformer_decoder.layers.1"
UNLIKE = {
    "another tensor": (lambda s: s | {f"{LAYER}.norm2.bias": torch.ones(32)}, {}, r"norm2.bias' is no tensor of a GPT"),
    "no K": (lambda s: without(s, f"{LAYER}.self_attn.proj_k_dense_layer.bias"), {}, r"bias' lacks its part for K"),
    "two norms": (lambda s: s | {"ln_f.bias": torch.ones(32)}, {}, r"'ln_f.bias' differs from its other name's tensor"),
    "head of its own": (lambda s: s | {"lm_head.weight": torch.ones(61, 32)}, {}, r"its output head differs from its"),
    "rotary": (lambda s: s, {"position_embedding_type": "rotary"}, r"position_embedding_type = 'rotary' is not off"),
    "relu": (lambda s: s, {"nonlinearity": "relu"}, r"params.yaml: model.nonlinearity = 'relu' is not offered"),
    "more layers": (lambda s: s, {"num_hidden_layers": 3}, r"12 tensors are missing, the first is 'h.2.ln_1.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("change, settings, message", UNLIKE.values(), ids=UNLIKE)
def test_what_the_stack_has_otherwise_is_refused_by_name(tmp_path, change, settings, message):
    made = theirs(tmp_path, save=False, activation_function="gelu")
    folder = stack_folder(tmp_path / "theirs", change(stack_names(made.state_dict())), **settings)
    with pytest.raises(UserError, match=message):
        checkpoints.load(folder)


def test_one_checkpoint_and_one_configuration_are_expected(tmp_path):
    made = theirs(tmp_path, save=False, activation_function="gelu")
    folder = stack_folder(tmp_path / "theirs", stack_names(made.state_dict()))
    shutil.copy(folder / "checkpoint_10.mdl", folder / "checkpoint_20.mdl")
    with pytest.raises(UserError, match=r"holds 2 checkpoints \(checkpoint_10.mdl, checkpoint_20.mdl\): expected one"):
        checkpoints.load(folder)
    (folder / "checkpoint_20.mdl").unlink()
    (folder / "params.yaml").unlink()
    with pytest.raises(UserError, match=r"holds 0 YAML files of the Cerebras stack: expected one beside the .mdl"):
        checkpoints.load(folder)


# -- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(trained, tmp_path):
    hugging_face.write_hugging_face(*checkpoints.load(trained)[:2], tmp_path / "hf")
    return tmp_path / "hf"


def test_a_tokenizer_of_another_size_does_not_match(folder, corpus):
    Tokenizer.train([corpus.read_text()], 400).save(folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"'tokenizer.json' does not match the model: it has 400 tokens, .* has 257"):
        checkpoints.load(folder)


def test_a_model_may_have_rows_to_spare(trained, tmp_path):
    """As a preset's vocabulary under a tokenizer of one's own: the same end of document tells that the two belong."""
    model, words, _ = checkpoints.load(trained)
    wide = GPT(dataclasses.replace(model.shape, vocab_size=1000))
    hugging_face.write_hugging_face(wide, words, tmp_path / "hf")
    assert checkpoints.load(tmp_path / "hf").tokenizer.vocab_size == 257
    body = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(body | {"eos_token_id": None}))
    with pytest.raises(UserError, match=r"does not match the model: it has 257 tokens, .* has 1000"):
        checkpoints.load(tmp_path / "hf")


def test_a_tokenizer_that_ends_documents_otherwise_does_not_match(folder, corpus):
    Tokenizer.train([corpus.read_text()], 257).save(folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"does not match the model: it ends documents with token 0, .* with 256"):
        checkpoints.load(folder)


def test_gpt2_vocabulary_files_do_as_well(folder):
    words = Tokenizer.bytewise()
    body = json.loads(words.to_json())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(body["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert checkpoints.load(folder).tokenizer.encode(TEXT).tolist() == words.encode(TEXT).tolist()


def test_a_folder_without_one_says_so_and_takes_one(folder, tmp_path, vspdf):
    (folder / "tokenizer.json").unlink()
    status, _, err = vspdf("convert", folder, tmp_path / "out")
    assert status == 0 and "no tokenizer was found" in err
    assert checkpoints.load(tmp_path / "out").tokenizer is None
    Tokenizer.bytewise().save(tmp_path / "words.json")
    assert vspdf("convert", folder, tmp_path / "with", "--tokenizer", tmp_path / "words.json")[0] == 0
    assert checkpoints.load(tmp_path / "with").tokenizer.vocab_size == 257


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
def test_sentinels_and_masks_become_zeros_and_the_pattern_is_recovered(tmp_path, vspdf, how):
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


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_folder_pruned_by_torch_is_sparse_here(tmp_path, vspdf):
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


def test_nothing_is_overwritten(trained, tmp_path, vspdf):
    for target in (tmp_path / "file", tmp_path / "folder"):
        target.mkdir() if target.name == "folder" else target.write_text("mine")
        status, _, err = vspdf("convert", trained, target)
        assert status == 2 and "exists already: nothing is overwritten" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failed_conversion_leaves_nothing(trained, tmp_path, monkeypatch):
    from vspdf.interop.convert import convert

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hugging_face, "save_file", full)
    with pytest.raises(UserError, match=r"'.*out' was not written: no space left on the disk"):
        convert(trained, tmp_path / "out")
    assert not list(tmp_path.iterdir())


WRONG = {
    "missing": (lambda folder: folder / "mising", r"'.*mising' not found."),
    "empty folder": (
        lambda folder: folder.mkdir() or folder,
        r"no checkpoint in '.*in': expected a run directory",
    ),
    "no weights": (
        lambda folder: made_folder(folder, "config.json"),
        r"holds no model.safetensors and no pytorch",
    ),
    "truncated": (lambda folder: made_folder(folder, cut=True), r"model.safetensors is no whole safetensors file"),
    "not JSON": (lambda folder: made_folder(folder, text="{"), r"config.json is no JSON"),
    "no mapping": (
        lambda folder: made_folder(folder, text="[]"),
        r"cannot be read: expected a JSON object",
    ),
}


def made_folder(folder, *only, cut=False, text=None):
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
def test_what_is_no_checkpoint_is_said_in_a_line(tmp_path, vspdf, make, message):
    path = make(tmp_path / "in")
    with pytest.raises(UserError, match=message):
        checkpoints.load(path)
    status, out, err = vspdf("convert", path, tmp_path / "out")
    assert status == 2 and not out and "Traceback" not in err and not (tmp_path / "out").exists()


def test_a_wrong_form_is_refused(trained, tmp_path, vspdf):
    status, _, err = vspdf("convert", trained, tmp_path / "out", "--to", "dens")
    assert status == 2 and "--to 'dens' is not known. Did you mean 'dense'?" in err


def test_the_state_of_a_run_is_kept(trained):
    model, tokenizer, state = checkpoints.load(trained)
    assert state["step"] == 28 and tokenizer.vocab_size == model.shape.vocab_size == 257
    assert checkpoint.resolve(trained) == step(trained, 28)
    assert vspdf.explain(model, 8).startswith("no sparse layer")
