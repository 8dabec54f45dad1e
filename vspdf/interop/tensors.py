"""Checkpoint files that others wrote, read without trust: no code is run, and none takes more room than it should."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vspdf.errors import UserError, in_one_line, near_path
from vspdf.files import read_json
from vspdf.interop import sharded

PICKLES = (".pt", ".pth", ".bin", ".mdl", ".ckpt")
_HDF5 = b"\x89HDF\r\n\x1a\n"
# What a file may become in memory: tied tensors are one in the file, and of a sparse one the zeros are not there.
_GROWTH, _SPARSE_GROWTH, _ROOM = 8, 1000, 64 << 20
_DEEPEST = 100  # nested dicts and lists


def read(file: Path) -> Any:
    """Content of a checkpoint file: tensors by name from safetensors, nested dicts and lists from a pickle.

    A pickle can run code when it is read; it is read with ``torch.load(weights_only=True)``, which refuses that.

    Raises
    ------
    UserError
        If the file is missing, damaged, of an unknown kind, a pickle of more than tensors and plain values, or one
        that would take far more memory than it is large.
    """
    if not file.is_file():
        raise UserError(f"'{file}' not found.{near_path(file)}")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except Exception as error:  # of damaged headers the library raises its own errors, torch's and Python's
            raise UserError(f"{file} is no whole safetensors file: {in_one_line(error, 200)}.") from None
    if file.suffix not in PICKLES:
        raise UserError(f"'{file}': expected a .safetensors file, or a pickle ({', '.join(PICKLES)}).")
    tree = _unpickled(file)
    _check_tree(tree, file)
    return tree


def _unpickled(file: Path) -> Any:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if stream.read(len(_HDF5)) == _HDF5:
            raise UserError(
                f"{file} is HDF5, as the Cerebras stack writes it now: convert it to safetensors or a Hugging Face "
                "folder with its own converter first."
            )
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(item.file_size for item in archive.infolist())
            if unpacked > max(_ROOM, _GROWTH * size):
                raise UserError(f"{file} has {size:,} bytes and unpacks to {unpacked:,}: refused.")
        with torch.sparse.check_sparse_tensor_invariants():  # indices outside would be written to
            return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise UserError(
                f"{file} holds more than tensors and plain values, and reading that could run code: refused. "
                "Write it as safetensors where you trust it."
            ) from None
        raise UserError(f"{file} is no whole checkpoint: {in_one_line(error, 200)}.") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{file} is no whole checkpoint: {in_one_line(error, 200)}.") from None


def _check_tree(tree: Any, file: Path) -> None:
    """Whether what a pickle says can be gone through: lists that share lists, and views wider than what they view."""
    size, dense, seen = file.stat().st_size, 0, 0
    for depth, node in _nodes(tree):
        seen += 1
        if depth > _DEEPEST or seen > size:
            raise UserError(f"{file} nests its {size:,} bytes without end: refused.")
        if not isinstance(node, Tensor):
            continue
        if node.device.type != "cpu" or node.is_quantized or node.is_nested:
            kind = "quantized" if node.is_quantized else "nested" if node.is_nested else f"on '{node.device.type}'"
            raise UserError(f"{file} holds a tensor that is {kind}: expected plain ones with their values.")
        strided = node.layout == torch.strided
        if strided:
            dense += node.numel() * node.element_size()
        wanted, allowed = dense, max(_ROOM, _GROWTH * size)
        if not strided:
            wanted, allowed = node.numel() * node.element_size(), max(_ROOM, _SPARSE_GROWTH * size)
        if wanted > allowed:
            raise UserError(f"{file} has {size:,} bytes and would take {wanted:,} in memory: refused.")


def _nodes(tree: Any) -> Iterator[tuple[int, Any]]:
    """Every node of nested dicts, lists and tuples with its depth, without recursion."""
    waiting = [(0, tree)]
    while waiting:
        depth, node = waiting.pop()
        yield depth, node
        inside = node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ()
        waiting.extend((depth + 1, item) for item in inside)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Tensors by name of a Hugging Face folder: safetensors before pickles, whole or in shards; else of its one .mdl.

    Raises
    ------
    UserError
        If there are none, a shard is missing or a file is damaged.
    """
    if sharded.is_sharded(folder):
        return {name.removeprefix("model."): t for name, t in sharded.dense(sharded.read(folder), str(folder)).items()}
    theirs = sorted(file.name for file in folder.glob("*.mdl"))
    for name in ("model.safetensors", "pytorch_model.bin", *theirs):
        index = folder / f"{name}.index.json"
        if index.is_file() and not (folder / name).is_file():  # else it is an older one's
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
                raise UserError(f"{index} is damaged: expected a weight_map of tensors and files.")
            files = sorted(set(listed.values()))
            if outside := [file for file in files if Path(file).name != file]:
                raise UserError(f"{index} names '{outside[0]}': expected files of its own folder.")
        elif (folder / name).is_file():
            if name in theirs[:-1]:
                raise UserError(f"'{folder}' holds {len(theirs)} checkpoints ({', '.join(theirs[:3])}): expected one.")
            files = [name]
        else:
            continue
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors.update(flatten(read(folder / file)))
        return tensors
    raise UserError(f"'{folder}' holds no model.safetensors and no pytorch_model.bin.")


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, each with memory of its own, as safetensors wants them."""
    seen: set[int] = set()
    alone: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        alone[name] = tensor
    return alone


def flatten(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of nested dicts, lists and tuples, by dotted name."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    items: Any = tree.items() if isinstance(tree, Mapping) else ()
    if isinstance(tree, list | tuple):
        items = enumerate(tree)
    found: dict[str, Tensor] = {}
    for key, value in items:
        found.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return found
