"""Checkpoints: a folder written whole or not at all.

``checkpoints/step-00000100/`` holds `model.safetensors` (values row-major, packed patterns as ``NAME.pattern``),
`optimizer.safetensors` (``PARAMETER:KEY``, patterns before the last switch as ``revived:LAYER``, and of masks
that move, as bits, ``moved:KIND:LAYER``, see `vspdf.sparsity.turnover`) and `state.json`
(step, model, data, what was done so far, and the SHA-256 of the other files).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vspdf.errors import UserError
from vspdf.files import flush, remove, why_not
from vspdf.pattern import Pattern
from vspdf.runs.digests import of_body, of_file
from vspdf.runs.folder import CHECKPOINTS, STATE, damaged, read_state, steps
from vspdf.sparsity.layer import SparseLinear, patterns_of, require_whole
from vspdf.sparsity.surgery import sparsify

MODEL, OPTIMIZER = FILES = ("model.safetensors", "optimizer.safetensors")
_EXTRA = "._extra_state"  # how torch names a module's own state
_PATTERN = ".pattern"
_REVIVED = "revived:"
_MOVED = "moved:"


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's state by name; sparse layers as values, bias and packed pattern.

    Raises
    ------
    UserError
        If the model is sharded over processes.
    """
    for parameter in model.parameters():
        require_whole(parameter)
    bits = {name + _PATTERN: torch.from_numpy(p.bits.copy()) for name, p in patterns_of(model).items()}
    rest = model.state_dict().items()
    return {name: tensor.contiguous() for name, tensor in rest if not name.endswith(_EXTRA)} | bits


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as ``PARAMETER:KEY`` tensors."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}:{key}": torch.as_tensor(value).contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes
    ----------
    folder : Path
    state : dict
        What `state.json` holds.
    tensors : dict of str to Tensor
        The model's, as `model_tensors` names them.
    moments : dict of str to Tensor
        The optimizer's, as `optimizer_tensors` names them; empty where there was none.
    revived : dict of str to Tensor
        Packed patterns of the layers before the last switch, while the weights it added warm up.
    moved : dict of str to Tensor
        Of masks that move, what `vspdf.sparsity.turnover.Turnover.tensors` gave.
    """

    folder: Path
    state: dict[str, Any]
    tensors: dict[str, Tensor]
    moments: dict[str, Tensor]
    revived: dict[str, Tensor]
    moved: dict[str, Tensor]

    def restore(self, model: nn.Module, backend: str = "auto") -> None:
        """Brings a fresh dense model into the stored form, sparse layers included, and loads its weights."""
        packed = {name.removesuffix(_PATTERN): t for name, t in self.tensors.items() if name.endswith(_PATTERN)}
        if packed:
            sparsify(model, _patterns(model, packed), backend=backend)
        model.load_state_dict({
            name.removesuffix(_PATTERN) + _EXTRA if name.endswith(_PATTERN) else name: tensor
            for name, tensor in self.tensors.items()
        })  # fmt: skip

    def restore_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Loads stored moments into an optimizer over the parameters of a restored model."""
        parameters = dict(model.named_parameters())
        for name, tensor in self.moments.items():
            parameter, _, key = name.rpartition(":")
            optimizer.state[parameters[parameter]][key] = tensor.to(parameters[parameter].device)

    def before_switch(self, model: nn.Module) -> dict[str, Pattern]:
        """Patterns before the last switch, by layer of a restored model; empty once its new weights are warm."""
        return _patterns(model, self.revived)


def _patterns(model: nn.Module, packed: Mapping[str, Tensor]) -> dict[str, Pattern]:
    """Patterns of packed bits, by layer name; shapes are those of the model's layers."""
    patterns = {}
    for name, bits in packed.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, (SparseLinear, nn.Linear))
        patterns[name] = Pattern((layer.out_features, layer.in_features), bits.numpy())
    return patterns


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
    before_switch: Mapping[str, Pattern] | None = None,
    moved: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes a checkpoint of a run: everything into a hidden folder, flushed to disk, then one rename.

    Parameters
    ----------
    run : Path
        The run directory.
    step : int
        Steps done.
    model : nn.Module
    optimizer : Optimizer, optional
    state : dict
        What else is to be known, as JSON has it.
    before_switch : mapping of str to Pattern, optional
        Patterns before the last switch, while the weights it added warm up.
    moved : mapping of str to Tensor, optional
        Of masks that move, what `vspdf.sparsity.turnover.Turnover.tensors` gives.

    Returns
    -------
    Path
        Folder of the checkpoint.

    Raises
    ------
    UserError
        If the disk is full or not writable; earlier checkpoints stay as they are.
    """
    folder = run / CHECKPOINTS
    final = folder / _name(step)
    draft = folder / f".draft-{step:08d}"
    try:
        remove(draft)
        draft.mkdir(parents=True)
        save_file(model_tensors(model), draft / MODEL)
        moments = optimizer_tensors(model, optimizer) if optimizer else {}
        revived = {_REVIVED + name: torch.from_numpy(p.bits.copy()) for name, p in (before_switch or {}).items()}
        save_file(moments | revived | {_MOVED + key: t for key, t in (moved or {}).items()}, draft / OPTIMIZER)
        body = {"step": step, **state, "sha256": {name: of_file(draft / name) for name in FILES}}
        text = json.dumps({**body, "state_sha256": of_body(body)}, indent=1)
        (draft / STATE).write_text(text)
        for name in (*FILES, STATE):
            flush(draft / name)
        flush(draft)
        _remove(final)  # the same step, reached again after a resume
        draft.rename(final)
        for place in (folder, run):  # the run, for the name of the folder itself
            flush(place)
    except (OSError, SafetensorError) as error:
        remove(draft)
        raise UserError(
            f"checkpoint of step {step} was not written to {folder}: {why_not(error)}; earlier ones are kept."
        ) from None
    return final


def _name(step: int) -> str:
    return f"step-{step:08d}"


def prune(run: Path, keep: int, best: int | None = None) -> None:
    """Removes all but the last `keep` checkpoints of a run and that of step `best`, and drafts of killed processes."""
    folder = run / CHECKPOINTS
    for draft in folder.glob(".draft-*"):
        remove(draft)
    for old in steps(folder)[:-keep]:
        if best is not None and old.name == _name(best):
            continue
        with contextlib.suppress(OSError):
            _remove(old)


def _remove(step: Path) -> None:
    """Removes a checkpoint, if it is there: under another name, so that half of one never counts as one."""
    if step.exists():
        aside = step.with_name(f".draft-old-{step.name}")
        remove(aside)
        step.rename(aside)
        remove(aside)


def is_ours(path: Path) -> bool:
    """Whether a path is a checkpoint of ours, a folder of them, or a directory laid out as a run's."""
    return (path / STATE).is_file() or (path / CHECKPOINTS).is_dir() or bool(steps(path))


def resolve(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the last one of a run directory.

    Raises
    ------
    UserError
        If there is none.
    """
    if (path / STATE).is_file() or (path / OPTIMIZER).is_file():
        return path
    for folder in (path / CHECKPOINTS, path):
        if found := steps(folder):
            return found[-1]
    raise UserError(f"no checkpoint in '{path}': expected a run directory or one of its checkpoints/step-N folders.")


def read(path: Path) -> Checkpoint:
    """One checkpoint, every byte verified; of a run directory the last.

    Raises
    ------
    UserError
        If there is none, or a file is missing, truncated or altered; the message names it.
    """
    folder = resolve(path)
    state = read_state(folder)
    tensors = []
    for name in FILES:
        file = folder / name
        if not file.is_file():
            raise UserError(f"checkpoint {folder} has no {name}; it is not whole.")
        try:
            if of_file(file) != state["sha256"][name]:
                raise damaged(file)
            tensors.append(load_file(file))
        except (OSError, RuntimeError, SafetensorError) as error:  # safetensors has each of them for an unreadable file
            raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    model, rest = tensors
    revived, moved = (
        {name.removeprefix(prefix): rest.pop(name) for name in list(rest) if name.startswith(prefix)}
        for prefix in (_REVIVED, _MOVED)
    )
    return Checkpoint(folder, state, model, rest, revived, moved)
