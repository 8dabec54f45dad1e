"""Checkpoint files of others: NaN sentinels, masks, pickles, damage."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from vspdf.errors import UserError
from vspdf.interop.tensors import finalize, finalize_tree, flatten, read, read_folder, unshared

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


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch, vspdf):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a.weight": torch.ones(2, 2)}, "x": Evil()}, "evil.pt")
    status, _, err = vspdf("convert", "evil.pt", "out.pt")
    assert status == 2 and "reading that could run code: refused" in err
    assert not (tmp_path / "owned").exists()


DAMAGED = {
    "truncated pickle": ("a.pt", lambda data: data[: len(data) // 2], r"a.pt is no whole checkpoint"),
    "empty pickle": ("a.pt", lambda data: b"", r"a.pt is no whole checkpoint"),
    "text": ("a.bin", lambda data: b"hello", r"a.bin is no whole checkpoint"),
    "HDF5": ("a.mdl", lambda data: b"\x89HDF\r\n\x1a\n rest", r"a.mdl is HDF5, as the Cerebras stack writes it now"),
    "another ending": ("a.npz", lambda data: data, r"expected a .safetensors file, or a pickle"),
}


@pytest.mark.parametrize("name, damage, message", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_said_to_be(tmp_path, name, damage, message):
    torch.save({"a.weight": torch.randn(40, 40)}, tmp_path / "whole")
    (tmp_path / name).write_bytes(damage((tmp_path / "whole").read_bytes()))
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(UserError, match=r"names '../secret.safetensors': expected files of its own folder"):
        read_folder(tmp_path)
