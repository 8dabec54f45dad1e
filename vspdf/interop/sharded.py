"""Checkpoints of torch.distributed.checkpoint (DCP), as loops with FSDP2 write them: read whole, by one process.

A folder with `.metadata`, a pickle, and `.distcp` files, of however many processes. Of the pickle nothing is believed
but what tensors there are and where.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vspdf.errors import UserError
from vspdf.model import GPT
from vspdf.shapes import Shape
from vspdf.sparsity.stored import split
from vspdf.sparsity.surgery import adopt

METADATA = ".metadata"
_VALUES, _PATTERN = ".values", "._extra_state"
_GROWTH, _ROOM = 8, 64 << 20  # what a folder may become in memory, as of other files
_PLAIN = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class _Names(pickle.Unpickler):
    """Takes what a DCP index is made of, and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "pathlib":
            return PurePath
        if (module, name) == ("builtins", "getattr"):  # as some versions of Python write members of enumerations
            return _member
        kind = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if kind or name in _PLAIN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _member(kind: Any, name: str) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError("it names builtins.getattr")
    return kind[name]


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder that torch.distributed.checkpoint wrote."""
    return (path / METADATA).is_file()


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name, whole.

    Raises
    ------
    UserError
        If it is damaged, holds more than tensors where it says what it is, or would take far more memory than it is
        large.
    """
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (folder / METADATA).open("rb") as stream:
                found = _Names(stream).load()
            found.storage_meta = found.storage_meta or StorageMeta()
            return found

    try:
        reader = Reader(folder)
        stored = reader.read_metadata().state_dict_metadata
        wanted = {name: item for name, item in stored.items() if isinstance(item, TensorStorageMetadata)}
        size = sum(item.size.numel() * item.properties.dtype.itemsize for item in wanted.values())
        there = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        if size > max(_ROOM, _GROWTH * there):
            raise UserError(f"'{folder}' has {there:,} bytes and would take {size:,} in memory: refused.")
        tensors: dict[str, Any] = {
            name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in wanted.items()
        }
        load(tensors, storage_reader=reader, no_dist=True)
    except UserError:
        raise
    except Exception as error:  # a damaged index or file can raise anything
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"'{folder}' is no whole checkpoint of torch.distributed.checkpoint: {line[:200]}.") from None
    return tensors


def load_model(folder: Path, shape: Shape, backend: str = "auto") -> GPT:
    """Our GPT of a shape with the weights of a folder: sparse where that holds masks, which are adopted first.

    Raises
    ------
    UserError
        If the folder holds no such model.
    """
    tensors, model = read(folder), GPT(shape)
    own = _model_of(tensors, folder)
    adopt(model, own, backend=backend)
    expected = model.state_dict()
    for name, tensor in expected.items():
        pattern = name.endswith(_PATTERN)  # of older folders shorter, and read by `adopt` already
        if name not in own or (own[name].shape != tensor.shape and not pattern):
            has = f"has '{name}' as {tuple(own[name].shape)}" if name in own else f"has no '{name}'"
            raise UserError(f"'{folder}' {has}; this model has it as {tuple(tensor.shape)}.")
    model.load_state_dict({name: own[name] for name in expected})
    return model


def _model_of(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The model's tensors, whatever their names are put under ("model.")."""
    heads = sorted((name for name in tensors if name.endswith("wte.weight") and "exp_avg" not in name), key=len)
    if not heads:
        raise UserError(f"'{folder}' holds no GPT of ours: no tensor is named wte.weight.")
    prefix = heads[0].removesuffix("wte.weight")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def dense(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Values and packed patterns of sparse layers as weights with zeros, each with its mask as ``NAME.weight_mask``.

    Raises
    ------
    UserError
        If an older state has a layer without a bias, by whose length its shape would be known.
    """
    found = dict(tensors)
    for key in [key for key in tensors if key.endswith(_PATTERN) and key.removesuffix(_PATTERN) + _VALUES in tensors]:
        name = key.removesuffix(_PATTERN)
        values, (bits, told) = found.pop(name + _VALUES), split(found.pop(key))
        rows = len(found.get(name + ".bias", ()))
        rows, columns = told or (rows, 8 * len(bits) // rows if rows else 0)
        kept = torch.from_numpy(np.unpackbits(bits, bitorder="little")).bool()
        if not columns or len(kept) - rows * columns > 7 or int(kept[: rows * columns].sum()) != len(values):
            raise UserError(f"{where}: the shape of sparse layer '{name}' is not known: it has no bias of its length.")
        mask = kept[: rows * columns].view(rows, columns)
        weight = torch.zeros(rows, columns, dtype=values.dtype).masked_scatter_(mask, values)
        if "transformer.h." in name and name.rpartition(".")[2] in ("c_attn", "c_proj", "c_fc"):  # Conv1D: [in, out]
            mask, weight = mask.T.contiguous(), weight.T.contiguous()
        found |= {f"{name}.weight": weight, f"{name}.weight_mask": mask}
    return found
