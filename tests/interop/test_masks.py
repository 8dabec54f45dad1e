"""Masks in checkpoints of others, whatever way they are stored."""

import pytest
import torch
import torch.nn.utils.prune as prune
from safetensors.torch import load_file, save_file
from torch import nn

from vspdf.errors import UserError
from vspdf.interop.masks import finalize, finalize_tree
from vspdf.interop.tensors import flatten, unshared

NAN, INF = float("nan"), float("inf")


def kept(shape=(6, 8)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4


def sentinel(mask):
    return torch.where(mask, torch.arange(1.0, mask.numel() + 1).reshape(mask.shape), NAN)


def old_checkpoint():
    """As the Cerebras stack wrote it: NaN in weights, and at the same places in optimizer state, by index."""
    one, two = kept(), kept((8, 6))
    model = {
        "embedding.weight": torch.ones(9, 6),
        "layers.0.linear.weight": sentinel(one),
        "layers.0.linear.bias": torch.ones(6),
        "layers.1.linear.weight": sentinel(two),
    }
    state = {
        i: {"step": torch.tensor(3.0), "exp_avg": 2 * t, "exp_avg_sq": t * t} for i, t in enumerate(model.values())
    }
    return {
        "model": model,
        "optimizer": {"state": state, "param_groups": [{"lr": 0.1, "params": [0, 1, 2, 3]}]},
        "step": 3,
    }


def test_sentinels_in_weights_and_optimizer_state_become_zeros(tmp_path, vspdf):
    checkpoint = old_checkpoint()
    checkpoint["model"]["head.weight"] = checkpoint["model"]["embedding.weight"]  # tied
    torch.save(checkpoint, tmp_path / "old.mdl")
    status, out, err = vspdf("convert", tmp_path / "old.mdl", tmp_path / "new.pt")
    assert status == 0, err
    assert "2 sparse matrices" in out
    new = torch.load(tmp_path / "new.pt", weights_only=True)
    assert new["step"] == 3 and new["optimizer"]["param_groups"] == checkpoint["optimizer"]["param_groups"]
    old, found = flatten(checkpoint), flatten(new)
    assert old.keys() == found.keys()
    for name, tensor in old.items():
        assert torch.equal(found[name], torch.nan_to_num(tensor, nan=0.0)), name
    assert vspdf("convert", tmp_path / "old.mdl", tmp_path / "new.safetensors")[0] == 0
    assert load_file(tmp_path / "new.safetensors").keys() == old.keys()
    _, masks = finalize_tree(checkpoint)
    assert torch.equal(masks["model.layers.0.linear.weight"], kept()) and len(masks) == 2


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32], ids=str)
def test_mask_tensors_go_and_what_they_mask_becomes_zero(tmp_path, vspdf, dtype):
    mask = kept()
    tensors = {"a.weight": torch.full((6, 8), 2.0), "a.weight_mask": mask.to(dtype), "causal_mask": torch.ones(3, 3),
               "a.weight:exp_avg": torch.full((6, 8), 3.0), "a.weight:exp_avg_mask": mask.to(dtype)}  # fmt: skip
    save_file(unshared(tensors), tmp_path / "new.safetensors")
    status, _, err = vspdf("convert", tmp_path / "new.safetensors", tmp_path / "clean.safetensors")
    assert status == 0, err
    clean = load_file(tmp_path / "clean.safetensors")
    assert set(clean) == {"a.weight", "a.weight:exp_avg", "causal_mask"}
    assert torch.equal(clean["a.weight"], 2.0 * mask) and torch.equal(clean["a.weight:exp_avg"], 3.0 * mask)


def changed(**tensors):
    return {"a.weight": sentinel(kept()), "norm.weight": torch.ones(8), **tensors}


REFUSED = {
    "NaN in a bias": (
        changed(bias=torch.tensor([1.0, NAN])),
        r"'bias' is NaN at 1 of 2 positions, and no",
    ),
    "NaN in a norm": (
        changed(**{"norm.weight": torch.tensor([NAN, 1.0])}),
        r"'norm.weight' is NaN at 1 of 2",
    ),
    "NaN in an embedding": (changed(**{"wte.weight": sentinel(kept())}), r"'wte.weight' is NaN at .* of 48"),
    "NaN in another embedding": (changed(**{"wte.weight": sentinel(kept((5, 8)))}), r"'wte.weight' is NaN at .* of 40"),
    "a matrix of NaN alone": (changed(**{"b.weight": torch.full((4, 4), NAN)}), r"'b.weight' is NaN at 16 of 16"),
    "NaN outside of the mask": (
        changed(**{"b.weight": torch.full((6, 8), NAN), "b.weight_mask": kept()}),
        r"'b.weight' is NaN at \d+ positions that its mask keeps",
    ),
    "state with more NaN": (changed(**{"a:exp_avg": torch.full((6, 8), NAN)}), r"'a:exp_avg' is NaN at 48 of 48"),
    "infinity": (changed(**{"b.weight": torch.tensor([[1.0, INF]])}), r"'b.weight' holds an infinite"),
    "infinity beside NaN": (
        changed(**{"b.weight": torch.tensor([[NAN, -INF]])}),
        r"'b.weight' holds an infinite",
    ),
    "a mask of another shape": (
        changed(**{"a.weight_mask": kept((8, 6))}),
        r"'a.weight_mask' of shape \(8, 6\) does",
    ),
    "a mask of other numbers": (changed(**{"a.weight_mask": torch.full((6, 8), 0.5)}), r"holds values beside 0 and 1"),
}


@pytest.mark.parametrize("tensors, message", REFUSED.values(), ids=REFUSED)
def test_what_no_mask_explains_is_refused_by_name(tmp_path, vspdf, tensors, message):
    with pytest.raises(UserError, match=message):
        finalize(tensors)
    save_file(unshared(tensors), tmp_path / "in.safetensors")
    status, _, err = vspdf("convert", tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert status == 2 and "in.safetensors: '" in err and not (tmp_path / "out.safetensors").exists()


# -- forms of other libraries -----------------------------------------------------------------------------------------

W = torch.arange(1.0, 49).reshape(6, 8)
M = kept()


def pruned(how):
    """A state dict as torch.nn.utils.prune leaves it."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight.copy_(W)
    if how == "custom":
        prune.custom_from_mask(model[0], "weight", M)
    elif how == "structured":
        prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    else:
        prune.random_unstructured(model[0], "weight", 0.75)
        prune.l1_unstructured(model[0], "bias", 2)
    return model.state_dict(), model[0].weight.detach()


@pytest.mark.parametrize("how", ["custom", "structured", "twice"])
@pytest.mark.parametrize("wrapped", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_pruned_by_torch_come_out_pruned(tmp_path, vspdf, how, wrapped):
    state, expected = pruned(how)
    torch.save({wrapped + name: tensor for name, tensor in state.items()}, tmp_path / "in.pt")
    for out in ("out.safetensors", "out.pt"):
        status, said, err = vspdf("convert", tmp_path / "in.pt", tmp_path / out)
        assert status == 0 and "sparse matri" in said, err
    for clean in (load_file(tmp_path / "out.safetensors"), torch.load(tmp_path / "out.pt", weights_only=True)):
        assert clean.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
        assert torch.equal(clean["0.weight"], expected)


FORMS = {
    "_mask": {"a.weight": W, "a.weight_mask": M},
    "prune": {"a.weight_orig": W, "a.weight_mask": M.float()},
    "prune, in a Trainer's dict": {"state_dict": {"a.weight_orig": W, "a.weight_mask": M.float()}, "epoch": 3},
    "parametrizations": {"a.parametrizations.weight.original": W, "a.parametrizations.weight.0.mask": M},
    "two masks": {
        "a.parametrizations.weight.original": W,
        "a.parametrizations.weight.0.mask": M | (W < 20),
        "a.parametrizations.weight.1.mask": M | (W >= 20),
    },
    "in the sparsifier": {
        "model": {"a.parametrizations.weight.original": W},
        "sparsifier": {"state": {"a.weight": {"mask": M}}, "groups": [{"tensor_fqn": "a.weight"}]},
    },
    "apex": {"a.weight": W, "a.__weight_mma_mask": M},
    "mask of the module": {"a.weight": W, "a.mask": M.float()},
    "masks beside": {"state_dict": {"a.weight": W, "b.weight": W}, "masks": {"a.weight": M}},
    "masks beside a prefix": {"model": {"net.a.weight": W}, "pruner": {"mask": {"a.weight": M.to(torch.uint8)}}},
    "NaN": {"a.weight": sentinel(M)},
    "COO": {"a.weight": (W * M).to_sparse()},
    "CSR": {"a.weight": (W * M).to_sparse_csr()},
    "CSC": {"a.weight": (W * M).to_sparse_csc()},
    "compiled": {"_orig_mod.a.weight_orig": W, "_orig_mod.a.weight_mask": M},
    "compiled inside": {"a._orig_mod.weight_orig": W, "a._orig_mod.weight_mask": M},
}


@pytest.mark.parametrize("tree", FORMS.values(), ids=FORMS)
def test_every_common_form_is_one(tmp_path, tree):
    torch.save(tree, tmp_path / "in.pt")  # as it comes back from a file
    clean, masks = finalize_tree(torch.load(tmp_path / "in.pt", weights_only=True))
    (name,) = masks
    assert name.endswith("a.weight") and torch.equal(masks[name], M)
    assert torch.equal(flatten(clean)[name].isfinite() & (flatten(clean)[name] != 0), M)
    assert not any("mask" in n or "orig" in n for n in flatten(clean))


def test_masks_of_channels_are_masks_of_rows():
    rows = torch.tensor([True, False, True, True, False, False])
    tensors = {"a.parametrizations.weight.original": W, "a.parametrizations.weight.0.mask": rows}
    assert torch.equal(finalize(tensors).tensors["a.weight"], W * rows[:, None])


def test_what_only_looks_like_a_mask_stays():
    tensors = {"causal_mask": torch.ones(3, 3), "attn.mask": torch.ones(1, 4), "attn.weight": W,
               "mask.weight": torch.rand(3, 3), "attn.masked_bias": torch.tensor(-1e4), "b.weight_u": torch.ones(6),
               "b.weight_orig": W, "c.parametrizations.weight.original": W,
               "c.parametrizations.weight.0._u": torch.ones(6)}  # fmt: skip
    clean, masks = finalize(tensors)
    assert not masks and clean.keys() == tensors.keys()
    assert all(torch.equal(clean[name], tensors[name]) for name in tensors)


NOT_TAKEN = {
    "the mask is elsewhere": ({"a.parametrizations.weight.original": W}, r"sparsifier.squash_mask\(\) before saving"),
    "orig alone": ({"a.weight_orig": W}, r"'a.weight_orig' has no 'a.weight_mask' beside it"),
    "scores": ({"a.weight": W, "a.mask_scores": W}, r"'a.mask_scores' holds scores of a mask that is still learnt"),
    "packed": ({"a.weight.compressed": W, "a.weight.bitmask": M}, "compressed-tensors' form: save it decompressed"),
    "parts": ({"a.weight.crow_indices": W, "a.weight.values": W}, "is part of a sparse tensor: save it whole"),
    "ours": ({"a.values": W, "a._extra_state": M}, r"sparse layer of vspdf, .* densify\(model\) before saving"),
    "1 for masked": ({"a.weight": W * M, "a.weight_mask": ~M}, r"'a.weight_mask' keeps none of the values"),
    "both": ({"a.weight": W, "a.weight_orig": W, "a.weight_mask": M}, "another tensor that is 'a.weight' too"),
    "bits": ({"a.weight": W, "a.weight_mask": torch.ones(6, dtype=torch.uint8)}, r"of shape \(6,\) does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("tensors, message", NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_forms_that_cannot_be_applied_are_refused_by_name(tensors, message):
    with pytest.raises(UserError, match=message):
        finalize(tensors)


def test_zeros_without_a_mask_are_told(tmp_path, vspdf, caplog):
    save_file({"a.weight": W * M, "b.weight": W.clone()}, tmp_path / "in.safetensors")
    status, out, _ = vspdf("convert", tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert status == 0 and "no masked weights" in out
    share = f"{100 * float((~M).float().mean()):.1f}"
    assert f"1 matrix without a mask holds zeros ('a.weight': {share} % of 48)" in caplog.text
