"""Which layers the masks of a file are of: by names, and by how weights lie; what cannot be told is refused."""

from itertools import count

import numpy as np
import pytest
import torch
import torch.nn.utils.prune as prune
import transformers
from torch import nn

import vspdf
from vspdf.errors import UserError
from vspdf.interop import mask_files
from vspdf.pattern import Pattern

SEEDS = count()


def square(size=16):
    """A new mask of a square layer."""
    return Pattern.random(
        (size, size), 0.5, seed=square.__dict__.setdefault("drawn", []).append(0) or len(square.drawn)
    )


def nested(*shape):
    """Square linear layers in a Sequential; `...`: one within a Sequential of its own."""
    return nn.Sequential(*[nn.Sequential(nn.Linear(16, 16)) if part is ... else nn.Linear(16, 16) for part in shape])


def pruned_by_torch(model, *names):
    masks = {name: square() for name in names}
    for name, pattern in masks.items():
        prune.custom_from_mask(model.get_submodule(name), "weight", pattern.mask())
    return masks


SHAPES = [((1, 1, 1), "0"), ((1, ..., 1), "0"), ((1, ..., 1), "1.0")]


@pytest.mark.parametrize("form", ["state_dict", "masks", "within a checkpoint"])
@pytest.mark.parametrize("shape, name", SHAPES, ids=str)
def test_a_mask_with_a_name_is_of_that_layer_alone(tmp_path, form, shape, name):
    model = nested(*shape)
    masks = pruned_by_torch(model, name)
    stored = {"masks": {name: masks[name].mask()}, "state_dict": model.state_dict()}.get(form)
    torch.save(
        stored or {"state_dict": {f"model.{key}": x for key, x in model.state_dict().items()}}, tmp_path / "m.pt"
    )
    given = tmp_path / "m.pt"
    if form == "masks" and name == "1.0":  # which may be '0' within another; of the model's other names none can tell
        with pytest.raises(
            UserError, match=r"its '1.0' would be the model's '0', and its '1.0' '1.0': .* as {GLOB: FI"
        ):
            vspdf.sparsify(nested(*shape), given)
        given = {"1.*": given}
    assert vspdf.sparsify(nested(*shape), given) == masks


NAMELESS = {
    **{f"written as {ending}": (f"m.{ending}", lambda path, pattern: pattern.write(path))
       for ending in ("smtx", "mtx", "npz", "pt", "safetensors")},
    "an array": ("m.npz", lambda path, pattern: np.savez(path, pattern.mask().numpy())),
    "a layer's own state_dict": ("m.pt", lambda path, pattern: torch.save(
        {"weight_orig": torch.ones(16, 16), "weight_mask": pattern.mask(), "bias": torch.ones(16)}, path)),
}  # fmt: skip


@pytest.mark.parametrize("name, write", NAMELESS.values(), ids=NAMELESS)
def test_a_mask_without_a_name_is_of_all_layers(tmp_path, name, write):
    write(tmp_path / name, pattern := square())
    assert vspdf.sparsify(nested(1, 1), tmp_path / name) == {"0": pattern, "1": pattern}


def test_zeros_beside_masks_are_taken_and_that_is_said(tmp_path, caplog):
    model = nested(1, 1, 1, 1)
    masks = pruned_by_torch(model, "0", "1", "2")
    prune.remove(model[2], "weight")
    stored = model.state_dict() | {"optimizer.0.exp_avg": masks["0"].mask().float()}
    torch.save(stored, tmp_path / "m.pt")
    assert vspdf.sparsify(nested(1, 1, 1, 1), tmp_path / "m.pt") == masks
    assert "beside 2 with masks, weights without one hold zeros, which are taken for masked: 2." in caplog.text


def parts(**layers):
    return nn.ModuleDict({name: parts(**sub) if sub else nn.Linear(16, 16) for name, sub in layers.items()})


AMBIGUOUS = {
    "two of a file": (["encoder.fc", "decoder.fc", "encoder.up"], {"fc": {}, "up": {}},
                      "the mask of 'fc' may be that of encoder.fc or decoder.fc"),
    "asked late": (["encoder.fc", "decoder.fc", "encoder.up"], {"up": {}, "fc": {}}, "the mask of 'fc' may be that of"),
    "two of a model": (["fc"], {"a": {"fc": {}}, "b": {"fc": {}}}, "its 'fc' would be the model's 'a.fc', and its"),
    "two beginnings": (["encoder.fc", "decoder.up"], {"fc": {}, "up": {}}, "stands before names must be the same for"),
}  # fmt: skip


@pytest.mark.parametrize("names, layers, message", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_a_mask_that_may_be_of_several_layers_is_refused(tmp_path, names, layers, message):
    torch.save({name: square().mask() for name in names}, tmp_path / "m.pt")
    model = parts(**layers)
    with pytest.raises(UserError, match=message):
        vspdf.sparsify(model, tmp_path / "m.pt")
    assert not [name for name, module in model.named_modules() if type(module) is vspdf.SparseLinear]


def test_what_stands_before_all_names_is_no_difference(tmp_path):
    masks = {"a.fc": square(), "fc": square()}
    torch.save({f"state.model.{name}": pattern.mask() for name, pattern in masks.items()}, tmp_path / "m.pt")
    assert vspdf.sparsify(parts(fc={}, a={"fc": {}}), tmp_path / "m.pt") == masks
    torch.save({name: pattern.mask() for name, pattern in masks.items()}, tmp_path / "m.pt")
    found = vspdf.sparsify(parts(whole={"a": {"fc": {}}, "fc": {}}), tmp_path / "m.pt")
    assert found == {f"whole.{name}": pattern for name, pattern in masks.items()}


def conv1d(kind="GPT2", **more):
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 11, "n_positions": 8} | more
    config = getattr(transformers, f"{kind}Config")(**sizes, bos_token_id=1, eos_token_id=1)
    return getattr(transformers, {"GPT2": "GPT2LMHeadModel", "OpenAIGPT": "OpenAIGPTLMHeadModel"}[kind])(config)


@pytest.mark.parametrize("form", ["masks", "zeros", "NaN"])
def test_masks_of_conv1d_are_turned(tmp_path, form):
    """Its weights are [in, out]; of square ones the layers beside them tell."""
    model, masks = conv1d(), {}
    for name, module in model.named_modules():
        if name.endswith(("attn.c_proj", "1.mlp.c_fc")):
            masks[name] = Pattern.random((module.nf, module.nx), 0.7, seed=len(masks))
            prune.custom_from_mask(module, "weight", masks[name].mask().T)
            if form != "masks":
                prune.remove(module, "weight")
                module.weight.data[~masks[name].mask().T] = 0 if form == "zeros" else float("nan")
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert vspdf.sparsify(conv1d(), tmp_path / "m.pt") == masks
    name = "transformer.h.1.attn.c_proj"
    assert Pattern.read(tmp_path / "m.pt", name=name) is masks[name]
    if form == "masks":
        torch.save({key: x for key, x in model.state_dict().items() if name in key}, tmp_path / "m.pt")
        with pytest.raises(UserError, match=rf"nothing tells whether its mask of '{name}' is \[in, out\]"):
            vspdf.sparsify(conv1d(), tmp_path / "m.pt")


def test_a_folder_of_another_model_with_conv1d(tmp_path):
    model = conv1d("OpenAIGPT")
    patterns = vspdf.sparsify(model, 0.6)
    model.save_pretrained(tmp_path / "saved")
    assert mask_files.read_all(tmp_path / "saved") == patterns
