"""Checkpoint files of others: pickles that would run code or fill the memory, damage, shards."""

import io
import os
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from vspdf.errors import UserError
from vspdf.interop.masks import finalize_tree
from vspdf.interop.tensors import flatten, read, read_folder


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


def test_an_index_beside_a_whole_file_is_an_older_ones(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert read_folder(tmp_path)["a"].tolist() == [1, 1]


def test_weights_of_eight_bits_are_refused(tmp_path, refused):
    save_file({"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    refused(
        r"'a.weight' is a weight in float8_e4m3fn", "convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    )


def shared_lists(depth=40):
    tree = [torch.zeros(1)]
    for _ in range(depth):
        tree = [tree, tree]
    return tree


def endless():
    tree = []
    tree.append(tree)
    return tree


def deep(depth=300):
    tree = [torch.zeros(1)]
    for _ in range(depth):
        tree = [tree]
    return tree


def zeros_zipped(size):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(size))
    return stream.getvalue()


def saved(tree):
    stream = io.BytesIO()
    torch.save(tree, stream)
    return stream.getvalue()


WIDE = torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (10**6, 10**6))
OUTSIDE = torch.sparse_coo_tensor(torch.tensor([[10**6], [0]]), torch.ones(1), (2, 2), check_invariants=False)
TOO_MUCH = {
    "a sparse matrix with entries outside": (
        lambda: saved({"w": OUTSIDE}),
        "no whole checkpoint: size is inconsistent",
    ),
    "lists that share lists": (lambda: saved(shared_lists()), "nests its .* bytes without end"),
    "a list in itself": (lambda: saved(endless()), "nests its .* bytes without end"),
    "lists in lists": (lambda: saved(deep()), "nests its .* bytes without end|no whole checkpoint"),
    "one number as a matrix": (
        lambda: saved({"w": torch.zeros(1).expand(60_000, 60_000)}),
        "would take 14,400,000,000",
    ),
    "one matrix by many names": (
        lambda: saved({str(i): t for t in [torch.zeros(1 << 18)] for i in range(100)}),
        "would take",
    ),
    "a wide sparse matrix": (lambda: saved({"w": WIDE}), "would take 4,000,000,000,000"),
    "a tensor without values": (lambda: saved({"w": torch.empty(9, device="meta")}), "on 'meta': expected plain ones"),
    "a quantized one": (
        lambda: saved({"w": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}),
        "is quantized: expected plain|more than tensors",
    ),
    "zeros, zipped": (lambda: zeros_zipped(100 << 20), r"unpacks to 104,857,600: refused"),
}


@pytest.mark.parametrize("make, message", TOO_MUCH.values(), ids=TOO_MUCH)
def test_small_files_cannot_fill_the_memory(tmp_path, make, message):
    (tmp_path / "a.pt").write_bytes(make())
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.pt")


def test_tied_tensors_and_shared_settings_are_no_attack(tmp_path):
    tensor, betas = torch.ones(8), (0.9, 0.95)
    tree = {"a": tensor, "b": tensor, "groups": [{"betas": betas, "lr": 1.0}, {"betas": betas, "lr": 2.0}]}
    torch.save(tree, tmp_path / "a.pt")
    assert flatten(read(tmp_path / "a.pt")).keys() == {"a", "b"}


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_bent_files_are_read_or_refused(tmp_path, ending):
    """Bytes flipped, dropped, doubled, cut: whatever comes out of the libraries comes out as one line."""
    chance, path = random.Random(0), tmp_path / f"a{ending}"
    tensors = {"l.weight": torch.ones(4, 4), "l.weight_mask": torch.eye(4), "l.bias": torch.zeros(4)}
    (torch.save if ending == ".pt" else save_file)(tensors, path)
    whole, refused = path.read_bytes(), 0
    for _ in range(60):
        body = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            where = chance.randrange(len(body))
            how = chance.randrange(4)
            if how == 0:
                body[where] ^= 1 << chance.randrange(8)
            elif how == 1:
                del body[where : where + chance.randint(1, 16)]
            elif how == 2:
                body[where:where] = body[where : where + 16]
            else:
                del body[max(1, where) :]
        path.write_bytes(body)
        try:
            finalize_tree(read(path))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 30


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[" * 100_000], ids=repr
)
def test_a_damaged_index_is_said_to_be(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        read_folder(tmp_path)
