"""Checkpoints that others wrote: read without trust, and masked weights found and set to zero.

Two conventions mark a masked weight: NaN in its place, in weights and optimizer state alike (the older one), and a
boolean tensor ``NAME_mask`` beside the weight (the newer one), True where a weight is kept.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vspdf.errors import UserError, near_path

PICKLES = (".pt", ".pth", ".bin", ".mdl", ".ckpt")
_HDF5 = b"\x89HDF\r\n\x1a\n"
_MASK = "_mask"
_EMBEDDINGS = ("wte", "wpe", "embed", "lm_head")  # parts of names of matrices that are never sparse


class Finalized(NamedTuple):
    """Dense tensors by name, and a boolean mask (True: kept) of each tensor that held masked weights."""

    tensors: dict[str, Tensor]
    masks: dict[str, Tensor]


def read(file: Path) -> Any:
    """Content of a checkpoint file: tensors by name from safetensors, nested dicts and lists from a pickle.

    A pickle can run code when it is read; it is read with ``torch.load(weights_only=True)``, which refuses that.

    Raises
    ------
    UserError
        If the file is missing, damaged, of an unknown kind, or a pickle of more than tensors and plain values.
    """
    if not file.is_file():
        raise UserError(f"'{file}' not found.{near_path(file)}")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is no whole safetensors file: {error}.") from None
    if file.suffix not in PICKLES:
        raise UserError(f"'{file}': expected a .safetensors file, or a pickle ({', '.join(PICKLES)}).")
    with file.open("rb") as stream:
        if stream.read(len(_HDF5)) == _HDF5:
            raise UserError(
                f"{file} is HDF5, as the Cerebras stack writes it now: convert it to safetensors or a Hugging Face "
                "folder with its own converter first."
            )
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise UserError(
                f"{file} holds more than tensors and plain values, and reading that could run code: refused. "
                "Write it as safetensors where you trust it."
            ) from None
        raise UserError(f"{file} is no whole checkpoint: {_line(error)}") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} is no whole checkpoint: {_line(error)}") from None


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Tensors by name of a Hugging Face folder: safetensors before pickles, whole or in shards; else of its one .mdl.

    Raises
    ------
    UserError
        If there are none, a shard is missing or a file is damaged.
    """
    theirs = sorted(file.name for file in folder.glob("*.mdl"))
    for name in ("model.safetensors", "pytorch_model.bin", *theirs):
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(f"{index} is damaged: expected a weight_map of tensors and files.") from None
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


def read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON file that holds a mapping.

    Raises
    ------
    UserError
        If it does not, or cannot be read.
    """
    try:
        body = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None
    if not isinstance(body, dict):
        raise UserError(f"{file} is no mapping of settings.")
    return body


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


def finalize(tensors: Mapping[str, Tensor], where: str = "the checkpoint") -> Finalized:
    """Masked weights and their optimizer state become zeros, ``NAME_mask`` tensors go.

    NaN marks masked weights only in matrices named ``...weight`` that are no embedding, and in tensors that are NaN at
    exactly the positions of such a one (its optimizer state).

    Raises
    ------
    UserError
        Naming the tensor, if NaN stands where no mask explains it, a value is infinite, a whole matrix is NaN, or a
        mask does not fit.
    """
    masks = {name: _as_mask(name, tensors, where) for name in tensors if name + _MASK in tensors}
    clean: dict[str, Tensor] = {}
    later: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_MASK) and name.removesuffix(_MASK) in masks:
            continue
        if not tensor.is_floating_point():
            clean[name] = tensor
            continue
        if name in masks:
            tensor = tensor.masked_fill(~masks[name], 0)
        if bool(torch.isfinite(tensor).all()):
            clean[name] = tensor
            continue
        if bool(torch.isinf(tensor).any()):
            raise UserError(f"{where}: '{name}' holds an infinite value; the run that wrote it had diverged.")
        nan = torch.isnan(tensor)
        if name in masks:
            raise UserError(f"{where}: '{name}' is NaN at {int(nan.sum())} positions that its mask keeps.")
        clean[name] = torch.zeros_like(tensor)  # keeps the order of names
        if tensor.dim() == 2 and _may_be_sparse(name) and not bool(nan.all()):
            masks[name] = ~nan
            clean[name] = torch.nan_to_num(tensor, nan=0.0)
        else:
            later[name] = tensor
    for name, tensor in later.items():
        nan = torch.isnan(tensor)
        state = name.rsplit(".", 1)[-1] not in ("weight", "bias")
        if not state or not any(mask.shape == nan.shape and torch.equal(mask, ~nan) for mask in masks.values()):
            raise UserError(
                f"{where}: '{name}' is NaN at {int(nan.sum())} of {nan.numel()} positions, and no mask explains it."
            )
        clean[name] = torch.nan_to_num(tensor, nan=0.0)
    return Finalized(clean, masks)


def finalize_tree(tree: Any, where: str = "the checkpoint") -> tuple[Any, dict[str, Tensor]]:
    """Does what `finalize` does to nested dicts and lists; returns the same nesting, and masks by dotted name."""
    clean, masks = finalize(flatten(tree), where)
    return _rebuild(tree, clean, ""), masks


def _rebuild(tree: Any, clean: Mapping[str, Tensor], prefix: str) -> Any:
    inside = lambda key: f"{prefix}.{key}" if prefix else str(key)  # noqa: E731
    if isinstance(tree, Tensor):
        return clean[prefix]
    if isinstance(tree, Mapping):
        kept = {k: v for k, v in tree.items() if not isinstance(v, Tensor) or inside(k) in clean}
        return {key: _rebuild(value, clean, inside(key)) for key, value in kept.items()}
    if isinstance(tree, list | tuple):
        return [_rebuild(value, clean, inside(i)) for i, value in enumerate(tree)]
    return tree


def _as_mask(name: str, tensors: Mapping[str, Tensor], where: str) -> Tensor:
    mask = tensors[name + _MASK]
    if mask.shape != tensors[name].shape:
        raise UserError(
            f"{where}: '{name + _MASK}' of shape {tuple(mask.shape)} does not fit '{name}' of "
            f"shape {tuple(tensors[name].shape)}."
        )
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise UserError(f"{where}: '{name + _MASK}' holds values beside 0 and 1.")
    return mask.bool()


def _may_be_sparse(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] == "weight" and "optimizer" not in parts and not any(e in name for e in _EMBEDDINGS)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
