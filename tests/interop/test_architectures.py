"""Folders of transformers' architectures: the same function both ways, in every precision; and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

import vspdf as public
from vspdf.data.tokenizer import Tokenizer
from vspdf.errors import UserError
from vspdf.evaluate.generate import Decoding, generate
from vspdf.interop import checkpoints, hugging_face, mask_files
from vspdf.interop.architecture_tensors import to_ours
from vspdf.interop.architectures import LAYOUTS
from vspdf.interop.convert import convert
from vspdf.model import GPT, Cache
from vspdf.shapes import MODELS, Shape
from vspdf.sparsity.layer import sparse_layers

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 40, "bos_token_id": 60, "eos_token_id": 60,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 100.0}  # fmt: skip
THEIRS = {
    "llama": ("Llama", {}),
    "llama, grouped, tied, scaled": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True,
                                               "rope_parameters": LLAMA3}),
    "llama, linear scaling": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama, biases, wide heads": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "mistral": ("Mistral", {"num_key_value_heads": 1, "sliding_window": None}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
    "gpt-neox": ("GPTNeoX", {"rotary_pct": 0.25}),
    "gpt-neox, in turn": ("GPTNeoX", {"rotary_pct": 1.0, "use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "gpt2": ("GPT2", {}),
    "gpt2, untied": ("GPT2", {"tie_word_embeddings": False}),
}  # fmt: skip


def made(name, seed=0, **more):
    """A small random model of transformers, its biases and norms random too."""
    kind, settings = THEIRS[name]
    sizes = SIZES | settings | more
    if kind == "GPT2":
        names = {"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
                 "num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}  # fmt: skip
        sizes = {names.get(key, key): value for key, value in sizes.items()}
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(
        getattr(transformers, f"{kind}Config")(**sizes, attn_implementation="eager")
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


TOKENS = torch.randint(60, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=THEIRS)
def folder(request, tmp_path):
    """A folder of one of them, and the model."""
    model = made(request.param)
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", model


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.float64, 2e-6)], ids=["float32", "float64"])
def test_forward_loss_gradients_and_cache_are_theirs(folder, dtype, close):
    """In float64 up to their rotary tables, which are float32."""
    path, theirs = folder
    ours, theirs = checkpoints.load(path).model.to(dtype), theirs.to(dtype)
    loss, expected = ours(TOKENS[:, :-1], TOKENS[:, 1:]), theirs(TOKENS, labels=TOKENS)
    torch.testing.assert_close(ours(TOKENS), expected.logits, rtol=close, atol=close)
    torch.testing.assert_close(loss, expected.loss.to(loss.dtype), rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.loss.backward()
    with torch.no_grad():
        for (name, parameter), grad in zip(ours.named_parameters(), grads(ours, theirs), strict=True):
            torch.testing.assert_close(
                parameter.grad, grad, rtol=1e-4, atol=10 * close, msg=lambda m, n=name: f"{n}: {m}"
            )
    cache = Cache(ours, torch.zeros(3, dtype=torch.long), 40)
    with torch.no_grad():
        pieces = [ours.logits(ours.hidden(part, cache)) for part in TOKENS.split([7, 1, 1, 12, 19], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), expected.logits, rtol=2 * close, atol=2 * close)


def grads(ours, theirs):
    """Gradients of their model under our names, in our order."""
    kind = theirs.config.model_type
    found = {name: p.grad for name, p in theirs.named_parameters()}
    if kind in LAYOUTS:
        found = to_ours(kind, ours.shape, found)
    else:
        found = {n.removeprefix("transformer."): g.T if "c_" in n and g.dim() == 2 else g for n, g in found.items()}
    return [found[name] for name, _ in ours.named_parameters()]


def test_back_in_transformers_it_is_the_same(folder, tmp_path):
    path, theirs = folder
    found = convert(path, tmp_path / "checkpoint")
    assert found["kind"] == "hugging-face" and found["to"] == "dense"
    convert(tmp_path / "checkpoint", tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert again.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    kind = theirs.config.model_type
    assert again.config.model_type == ("llama" if kind == "mistral" else kind)  # the same function


def test_greedy_answers_are_theirs_batched_and_beyond_one_prompt(folder):
    path, theirs = folder
    ours = checkpoints.load(path).model
    prompts = [[5, 9, 5, 9, 2], [7], [1, 2, 3, 1, 2, 3, 1, 2]]
    found = generate(ours, prompts, Decoding(max_tokens=12), ends=[])
    for prompt, answer in zip(prompts, found, strict=True):
        ids = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=12,
            min_new_tokens=12, do_sample=False, eos_token_id=[], pad_token_id=60,
        )  # fmt: skip
        assert answer == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["llama, grouped, tied, scaled", "gpt-neox"])
def test_shards_and_bfloat16(tmp_path, name):
    theirs = made(name).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = checkpoints.load(tmp_path).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gpt2"])
def test_what_a_sparse_model_saved_comes_back_sparse(tmp_path, name):
    theirs = made(name)
    patterns = public.sparsify(theirs, 0.7)
    with torch.no_grad():
        next(iter(sparse_layers(theirs).values())).values[:3] = 0  # kept, as weights that were revived are
    theirs.save_pretrained(tmp_path)
    ours = checkpoints.load(tmp_path).model
    layers = sparse_layers(ours)
    assert sum(layer.pattern.nnz for layer in layers.values()) == sum(p.nnz for p in patterns.values())
    assert len(layers) == (12 if name == "gpt-neox" else len(patterns))  # one matrix there is three here
    assert mask_files.read_all(tmp_path) == patterns
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_transformers_generates_on_a_sparse_model(tmp_path):
    """Its own `generate`, cache and all, on the folder of a sparse model."""
    ours = GPT(Shape.read(vars(made_shape())), init_std=0.3)
    public.sparsify(ours, 0.6)
    hugging_face.write_hugging_face(ours, None, tmp_path / "sparse")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    public.sparsify(theirs, 0.5, init_method="from_zeros")
    prompt = torch.tensor([[5, 9, 2, 7], [1, 2, 3, 4]])
    found = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, min_new_tokens=10,
                            do_sample=False, pad_token_id=0)  # fmt: skip
    assert found[:, 4:].tolist() == generate(ours, prompt.tolist(), Decoding(max_tokens=10), ends=[])


def made_shape():
    return Shape(2, 32, 4, 48, 61, 40, n_kv_head=2, norm="rms", position="rope", mlp="swiglu", bias=False)


def test_a_sliding_window_bounds_the_sequence(tmp_path, caplog):
    made("mistral", sliding_window=16).save_pretrained(tmp_path)
    assert checkpoints.shape_of(tmp_path).sequence_length == 16 and "slides over 16 tokens" in caplog.text


HALF = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling", "top"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_part_of_a_head_is_what_transformers_makes_of_it(tmp_path, name, where, caplog):
    """These rotate whole heads, whatever the key says; `rope_scaling` counts before `rope_parameters`, as there."""
    said = {"rope_parameters": {"rope_parameters": HALF},
            "rope_scaling": {"rope_scaling": HALF, "rope_parameters": HALF | {"rope_theta": 7.0}},
            "top": {"rope_parameters": None, "rope_theta": 100.0, "partial_rotary_factor": 0.5}}[where]  # fmt: skip
    made(name).save_pretrained(tmp_path)
    body = json.loads((tmp_path / "config.json").read_text()) | said
    (tmp_path / "config.json").write_text(json.dumps(body))
    ours = checkpoints.load(tmp_path).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert (ours.shape.rope_fraction, ours.shape.rope_base) == (1, 100)
    assert f"partial_rotary_factor = 0.5 is not read: transformers' {name} rotates whole heads" in caplog.text


@pytest.mark.parametrize("more", [{}, {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_base": 100.0}], ids=str)
def test_a_part_of_a_head_goes_out_as_gpt_neox(tmp_path, more):
    torch.manual_seed(0)
    ours = GPT(Shape(2, 32, 4, 48, 61, 40, position="rope", rope_fraction=0.5, tie=False, **more), init_std=0.3)
    hugging_face.write_hugging_face(ours, None, tmp_path / "folder")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert theirs.config.model_type == "gpt_neox"
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS), rtol=1e-5, atol=1e-5)
    assert checkpoints.load(tmp_path / "folder").model.shape == ours.shape


@pytest.mark.parametrize("said", [{"rotary_pct": None}, {"rope_theta": 7.0, "partial_rotary_factor": 0.5}], ids=str)
def test_keys_that_gpt_neox_does_not_know_change_nothing(tmp_path, said):
    made("gpt-neox").save_pretrained(tmp_path)
    body = json.loads((tmp_path / "config.json").read_text()) | {"rope_parameters": None} | said
    (tmp_path / "config.json").write_text(json.dumps({key: x for key, x in body.items() if x is not None}))
    ours = checkpoints.load(tmp_path).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (ours.shape.rope_fraction, ours.shape.rope_base) == (0.25, 10_000)
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [{}, {"bias": "qkv"}, {"qk_norm": True}], ids=["llama", "qwen2", "qwen3"])
def test_a_part_of_a_head_that_no_llama_has_is_refused(tmp_path, form):
    llama = {"norm": "rms", "position": "rope", "mlp": "swiglu", "bias": False}
    whole = Shape(2, 32, 4, 48, 61, 40, **llama | form)
    assert hugging_face.configuration_of(whole)[0] == ("qwen2" if "bias" in form else "qwen3" if form else "llama")
    with pytest.raises(UserError, match=r"position rope with rope_fraction 0.5 \(gpt_neox alone has one\), mlp swiglu"):
        hugging_face.write_hugging_face(GPT(replace(whole, rope_fraction=0.5)), None, tmp_path / "folder")


WRONG = {
    "experts": (
        {"model_type": "mixtral"},
        r"model_type 'mixtral' is not covered; expected one of gpt2, btlm, .* qwen3",
    ),
    "another activation": ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' is not supported; expected 'silu'"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"rope_type 'yarn' is not supported"),
    "a scaled part of a head": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
        r"partial_rotary_factor = 0.5 with rope_type 'linear' is not supported: transformers' llama cannot run it",
    ),
    "no factor": ({"rope_parameters": {"rope_type": "linear"}}, r"must have a factor"),
    "half of the biases": ({"mlp_bias": True}, r"mlp_bias must be as attention_bias, False"),
    "odd groups": ({"num_key_value_heads": 3}, r"n_kv_head = 3 does not divide model.n_head = 4"),
    "no layers": ({"num_hidden_layers": None}, r"num_hidden_layers must be a whole number of at least 1, not None"),
    "more layers": ({"num_hidden_layers": 3}, r"9 tensors are missing, the first is 'h.2.ln_1.weight'"),
    "quantised": ({"quantization_config": {"bits": 4}}, r"quantization_config = \{'bits': 4\} is not supported"),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=list(WRONG))
def test_what_is_not_covered_is_refused(tmp_path, change, message):
    made("llama").save_pretrained(tmp_path)
    body = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match=message):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    "name, kind",
    [("llama-3.2-1b", "llama"), ("qwen2.5-0.5b", "qwen2"), ("gpt2-small", "gpt2"), ("llama-tiny", "llama")],
)
def test_presets_have_an_architecture(name, kind):
    shape = MODELS[name]
    found, config = hugging_face.configuration_of(shape)
    assert found == kind and hugging_face.read_configuration(config)[0] == shape
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    assert sum(p.numel() for p in theirs.parameters()) == shape.parameters


def test_a_mixture_that_transformers_lacks_is_refused(tmp_path):
    model = GPT(Shape(1, 8, 2, 16, 11, 8, norm="rms"))
    with pytest.raises(UserError, match=r"no architecture of transformers .* is a model of norm rms, position learned"):
        hugging_face.write_hugging_face(model, Tokenizer.bytewise(), tmp_path / "folder")
