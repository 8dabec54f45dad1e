"""Checkpoints: a folder written whole or not at all.

``checkpoints/step-00000100/`` holds `model.safetensors` (values row-major, packed patterns as ``NAME.pattern``),
`optimizer.safetensors` and `state.json` (step, configuration, data manifest, and the SHA-256 of the other files).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vspdf.errors import UserError
from vspdf.files import flush, why_not
from vspdf.pattern import Pattern
from vspdf.sparsity.layer import SparseLinear
from vspdf.sparsity.surgery import sparsify

FILES = ("model.safetensors", "optimizer.safetensors")
_EXTRA = "._extra_state"  # how torch names a module's own state
_PATTERN = ".pattern"


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's state by name; sparse layers as values, bias and packed pattern."""
    return {
        name.removesuffix(_EXTRA) + _PATTERN if name.endswith(_EXTRA) else name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
    }


def stored_patterns(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Pattern]:
    """Patterns in stored tensors, by layer name; shapes are those of the dense model's layers."""
    patterns = {}
    for name, bits in tensors.items():
        if name.endswith(_PATTERN):
            layer = model.get_submodule(name.removesuffix(_PATTERN))
            assert isinstance(layer, (SparseLinear, nn.Linear))
            patterns[name.removesuffix(_PATTERN)] = Pattern((layer.out_features, layer.in_features), bits.numpy())
    return patterns


def load_model_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies stored tensors into a model whose sparse layers already have the stored patterns."""
    named = {
        name.removesuffix(_PATTERN) + _EXTRA if name.endswith(_PATTERN) else name: tensor
        for name, tensor in tensors.items()
    }
    model.load_state_dict(named)


def fit(model: nn.Module, tensors: dict[str, Tensor], backend: str = "auto") -> None:
    """Brings a fresh dense model into the form of stored tensors, sparse layers included, and loads them."""
    if patterns := stored_patterns(tensors, model):
        sparsify(model, patterns, backend=backend)
    load_model_tensors(model, tensors)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as ``PARAMETER:KEY`` tensors."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}:{key}": torch.as_tensor(value).contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(":")
        optimizer.state[parameters[parameter]][key] = tensor.to(parameters[parameter].device)


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
    extra: dict[str, Tensor] | None = None,
) -> Path:
    """Writes ``folder/step-N``: everything into a hidden folder, flushed to disk, then one rename.

    `extra` tensors go beside the optimizer's.

    Raises
    ------
    UserError
        If the disk is full or not writable; earlier checkpoints stay as they are.
    """
    final = folder / f"step-{step:08d}"
    draft = folder / f".draft-{step:08d}"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        save_file(model_tensors(model), draft / FILES[0])
        moments = optimizer_tensors(model, optimizer) if optimizer else {}
        save_file({**moments, **(extra or {})}, draft / FILES[1])
        body = {"step": step, **state, "sha256": {name: _sha256(draft / name) for name in FILES}}
        text = json.dumps({**body, "state_sha256": _digest(body)}, indent=1)
        (draft / "state.json").write_text(text)
        for name in (*FILES, "state.json"):
            flush(draft / name)
        flush(draft)
        if final.exists():  # the same step, reached again after a resume
            shutil.rmtree(final)
        draft.rename(final)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise UserError(
            f"checkpoint of step {step} was not written to {folder}: {why_not(error)}; earlier ones are kept."
        ) from None
    return final


def prune(folder: Path, keep: int) -> None:
    """Removes all but the last `keep` checkpoints, and drafts that a killed process left."""
    for old in [*checkpoints(folder)[:-keep], *folder.glob(".draft-*")]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def resolve(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the last one of a run directory.

    Raises
    ------
    UserError
        If there is none.
    """
    if (path / "state.json").is_file():
        return path
    for folder in (path / "checkpoints", path):
        if found := checkpoints(folder):
            return found[-1]
    raise UserError(f"no checkpoint in '{path}': expected a run directory or one of its checkpoints/step-N folders.")


def read_state(path: Path) -> dict[str, Any]:
    """State of one checkpoint, without its tensors.

    Raises
    ------
    UserError
        If it is missing or altered.
    """
    try:
        state = json.loads((path / "state.json").read_text())
        stated = state.pop("state_sha256")
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} has no state.json; it is not whole.") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise _damaged(path / "state.json") from None
    if _digest(state) != stated:
        raise _damaged(path / "state.json")
    return state


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """State, model tensors and optimizer tensors of one checkpoint, every byte verified.

    Raises
    ------
    UserError
        If a file is missing, truncated or altered; the message names it.
    """
    state = read_state(path)
    tensors = []
    for name in FILES:
        file = path / name
        if not file.is_file():
            raise UserError(f"checkpoint {path} has no {name}; it is not whole.")
        if _sha256(file) != state["sha256"][name]:
            raise _damaged(file)
        tensors.append(load_file(file))
    return state, tensors[0], tensors[1]


def _damaged(file: Path) -> UserError:
    others = [path.name for path in checkpoints(file.parent.parent) if path != file.parent]
    cure = f"move that folder away to resume from {others[-1]}" if others else "no other checkpoint is there"
    return UserError(f"{file} is damaged (truncated or altered since it was written); {cure}.")


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _blocks(stream)


def _blocks(stream: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
