"""Checkpoints of the Cerebras stack: its names become GPT-2's, its scales are folded, anything else is refused."""

import json
import shutil

import pytest
import torch

from vspdf.errors import UserError
from vspdf.interop import checkpoints
from vspdf.sparsity.layer import sparse_layers

MUP = {
    "by older names": {"embeddings_scale": 10.0, "output_logits_scale": 0.5, "scale_qk_dot_by_d": True},
    "by base sizes": {"embeddings_scale": 10.0, "output_logits_alpha": 2.0, "mup_base_hidden_size": 8,
                      "mup_base_filter_size": 24, "scale_qk_dot_by_d": True},
}  # fmt: skip


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
def test_the_stacks_names_become_gpt2s(tmp_path, vspdf, release, logits, some_tokens, theirs):
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
def test_scales_of_the_stacks_mup_are_folded_likewise(tmp_path, names, logits, some_tokens, theirs):
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
def test_what_the_stack_has_otherwise_is_refused_by_name(tmp_path, change, settings, message, theirs):
    made = theirs(tmp_path, save=False, activation_function="gelu")
    folder = stack_folder(tmp_path / "theirs", change(stack_names(made.state_dict())), **settings)
    with pytest.raises(UserError, match=message):
        checkpoints.load(folder)


def test_one_checkpoint_and_one_configuration_are_expected(tmp_path, theirs):
    made = theirs(tmp_path, save=False, activation_function="gelu")
    folder = stack_folder(tmp_path / "theirs", stack_names(made.state_dict()))
    shutil.copy(folder / "checkpoint_10.mdl", folder / "checkpoint_20.mdl")
    with pytest.raises(UserError, match=r"holds 2 checkpoints \(checkpoint_10.mdl, checkpoint_20.mdl\): expected one"):
        checkpoints.load(folder)
    (folder / "checkpoint_20.mdl").unlink()
    (folder / "params.yaml").unlink()
    with pytest.raises(UserError, match=r"holds 0 YAML files of the Cerebras stack: expected one beside the .mdl"):
        checkpoints.load(folder)
