"""Checkpoints: equal to the last bit, whole or not at all, every byte verified."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import vspdf
from vspdf.errors import UserError
from vspdf.runs import checkpoint
from vspdf.sparsity.layer import sparse_layers

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(12, 30), nn.LayerNorm(30), nn.Linear(30, 12))
    vspdf.sparsify(made, 0.7)
    return made


def trained():
    made = model()
    optimizer = torch.optim.AdamW(made.parameters(), fused=True)
    for _ in range(2):
        made(torch.randn(4, 12)).square().mean().backward()
        optimizer.step()
    return made, optimizer


@pytest.fixture
def saved(tmp_path):
    """A run's folder of checkpoints, of steps 1 and 2, and what was saved."""
    made, optimizer = trained()
    for step in (1, 2):
        checkpoint.save(tmp_path, step, made, optimizer, {"note": "héllo", "loss": 0.1})
    return tmp_path / "checkpoints", made, optimizer


def test_what_is_read_is_what_was_written(saved):
    folder, made, optimizer = saved
    stored = checkpoint.read(folder / "step-00000002")
    assert (stored.state["step"], stored.state["note"], stored.state["loss"]) == (2, "héllo", 0.1)
    dense = nn.Sequential(nn.Linear(12, 30), nn.LayerNorm(30), nn.Linear(30, 12))
    stored.restore(dense)
    assert [layer.pattern for layer in sparse_layers(dense).values()] == [
        layer.pattern for layer in sparse_layers(made).values()
    ]
    for (name, a), (other, b) in zip(made.state_dict().items(), dense.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    restored = torch.optim.AdamW(dense.parameters(), fused=True)
    stored.restore_optimizer(dense, restored)
    x = torch.randn(4, 12)
    for one, its in ((made, optimizer), (dense, restored)):
        one.zero_grad()
        one(x).square().mean().backward()
        its.step()
    for a, b in zip(made.parameters(), dense.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_holds_values_patterns_and_moments_alone(saved):
    folder, made, _ = saved
    stored = checkpoint.read(folder / "step-00000002")
    assert set(stored.tensors) == {
        "0.values", "0.bias", "0.pattern", "1.weight", "1.bias", "2.values", "2.bias", "2.pattern",
    }  # fmt: skip
    nnz = made[0].pattern.nnz
    assert stored.tensors["0.values"].shape == stored.moments["0.values:exp_avg"].shape == (nnz,)
    assert stored.tensors["0.pattern"].dtype == torch.uint8 and stored.tensors["0.pattern"].numel() == 45
    assert stored.revived == {}


def test_patterns_before_a_switch_stand_beside_the_moments(tmp_path):
    made, optimizer = trained()
    before = {name: layer.pattern for name, layer in sparse_layers(made).items()}
    checkpoint.save(tmp_path, 1, made, optimizer, {}, before)
    stored = checkpoint.read(tmp_path)
    assert stored.before_switch(made) == before and not any("revived" in name for name in stored.moments)


def test_the_latest_is_found_and_old_ones_go(saved):
    folder, made, optimizer = saved
    for step in (10, 9):
        checkpoint.save(folder.parent, step, made, optimizer, {})
    (folder / ".draft-00000011").mkdir()
    assert checkpoint.resolve(folder).name == checkpoint.resolve(folder.parent).name == "step-00000010"
    assert checkpoint.resolve(folder / "step-00000001").name == "step-00000001"
    checkpoint.prune(folder.parent, 2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000009", "step-00000010"]


@pytest.mark.parametrize("name", ["step-backup", "step-00000010.bad", "step-00000003 (copy)"])
def test_a_folder_of_another_name_is_no_checkpoint(saved, name):
    folder, made, optimizer = saved
    checkpoint.save(folder.parent, 10, made, optimizer, {})
    shutil.copytree(folder / "step-00000001", folder / name)
    assert checkpoint.resolve(folder).name == "step-00000010"
    checkpoint.prune(folder.parent, 2)
    assert {path.name for path in folder.iterdir()} == {"step-00000002", "step-00000010", name}


def test_no_checkpoint_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"no checkpoint in '.*': expected a run directory or one of its"):
            checkpoint.resolve(path)


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "emptied": lambda data: b"",
    "a bit flipped early": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "a bit flipped in the middle": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
    ),
    "a bit flipped late": lambda data: data[:-9] + bytes([data[-9] ^ 128]) + data[-8:],
    "a byte more": lambda data: data + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_the_cure_named(saved, name, damage):
    folder, _, _ = saved
    file = folder / "step-00000002" / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        UserError,
        match=rf"step-00000002/{name} is damaged .*; move that folder out of checkpoints/ to resume from step-00000001",
    ):
        checkpoint.read(folder / "step-00000002")
    checkpoint.read(folder / "step-00000001")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{}"])
def test_a_state_of_another_form_is_damage(saved, text):
    folder, _, _ = saved
    (folder / "step-00000002" / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"state.json is damaged"):
        checkpoint.read(folder / "step-00000002")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved, name):
    folder, _, _ = saved
    (folder / "step-00000002" / name).unlink()
    with pytest.raises(UserError, match=rf"has no {name}; it is not whole"):
        checkpoint.read(folder / "step-00000002")


def test_altered_numbers_in_the_state_are_found(saved):
    folder, _, _ = saved
    file = folder / "step-00000002" / "state.json"
    body = json.loads(file.read_text())
    file.write_text(json.dumps({**body, "step": 3}))
    with pytest.raises(UserError, match=r"state.json is damaged"):
        checkpoint.read(folder / "step-00000002")


def test_a_state_that_cannot_be_read_is_one_line(saved):
    folder, _, _ = saved
    (folder / "step-00000002" / "state.json").unlink()
    (folder / "step-00000002" / "state.json").mkdir()
    with pytest.raises(UserError, match=r"state.json cannot be read: Is a directory\.$"):
        checkpoint.read(folder / "step-00000002")


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import trained
from vspdf.runs import checkpoint
from vspdf.errors import UserError
made, optimizer = trained()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    checkpoint.save(Path(sys.argv[1]).parent, 3, made, optimizer, {})
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [100, 3000], ids=["nothing fits", "the model fits"])
def test_a_file_that_cannot_be_written_leaves_the_earlier_ones(saved, request, limit):
    """A real failure of the write: the process may make no file longer than `limit`."""
    folder, _, _ = saved
    sizes = [(folder / "step-00000002" / name).stat().st_size for name in FILES]
    assert sizes[0] < 3000 < sizes[1]
    arguments = [sys.executable, "-c", LIMITED, str(folder), str(request.path.parent), str(limit)]
    printed = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert printed.startswith(f"checkpoint of step 3 was not written to {folder}: ") and printed.count("\n") == 1
    assert printed.rstrip().endswith("; earlier ones are kept.")
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]
    checkpoint.read(folder / "step-00000002")


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
    ids=["Python's", "safetensors'"],
)
def test_a_full_disk_is_called_one(saved, monkeypatch, error):
    folder, made, optimizer = saved

    def full(*arguments):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"step 3 was not written .*: no space left on the disk; earlier ones are kept"):
        checkpoint.save(folder.parent, 3, made, optimizer, {})
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]


def test_the_same_step_again_replaces_it(saved):
    folder, made, optimizer = saved
    checkpoint.save(folder.parent, 2, made, optimizer, {"note": "again"})
    assert checkpoint.read(folder / "step-00000002").state["note"] == "again"
