"""The one door to any checkpoint: ours, a Hugging Face folder, the Cerebras stack's, torch.distributed.checkpoint's."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from vspdf.data.tokenizer import Tokenizer, _mismatch
from vspdf.errors import UserError, near_path
from vspdf.interop import sharded
from vspdf.interop.hugging_face import _configuration, read_configuration, read_theirs
from vspdf.kernels.hardware import device as find_device
from vspdf.model import GPT
from vspdf.runs import checkpoint
from vspdf.runs.folder import CHECKPOINTS, CONFIG, Run, of_checkpoint
from vspdf.shapes import Shape
from vspdf.sparsity.surgery import sparsify

log = logging.getLogger("vspdf")


class Loaded(NamedTuple):
    """A checkpoint in memory.

    Attributes
    ----------
    model : GPT
        Sparse layers as stored.
    tokenizer : Tokenizer or None
        None where nothing beside the weights tells it.
    state : dict
        At least `step` (0 of all but our own) and `model` (its shape); of a run also `corpus`.
    """

    model: GPT
    tokenizer: Tokenizer | None
    state: dict[str, Any]


def kind(path: Path) -> str:
    """Names what a path holds: "checkpoint" (of ours: a run directory or a step folder), "hugging-face", "cerebras", or
    "sharded" (of torch.distributed.checkpoint, our GPT).

    Raises
    ------
    UserError
        If it is neither.
    """
    if not path.exists():
        raise UserError(f"'{path}' not found.{near_path(path)}")
    if checkpoint.is_ours(path):
        return "checkpoint"
    if (path / "config.json").is_file():
        return "hugging-face"
    if path.is_dir() and any(path.glob("*.mdl")):
        return "cerebras"
    if sharded.is_sharded(path):
        return "sharded"
    raise UserError(
        f"no checkpoint in '{path}': expected a run directory, one of its checkpoints/step-N folders, a Hugging Face "
        "folder (config.json), or a folder with a checkpoint of the Cerebras stack (.mdl) and its YAML."
    )


def load(
    path: str | Path, backend: str = "auto", tokenizer: Tokenizer | None = None, device: str = "cpu",
    shape: Shape | None = None,
) -> Loaded:  # fmt: skip
    """Model, tokenizer and state of any checkpoint that `kind` knows.

    Parameters
    ----------
    path : str or Path
        Of a run directory the last checkpoint is taken.
    backend : {"auto", "cpu", "reference", "triton"}
        Of sparse layers.
    tokenizer : Tokenizer, optional
        Instead of the stored one.
    device : str
        "cpu", "cuda" or "cuda:1".
    shape : Shape, optional
        Of the model, for a checkpoint of torch.distributed.checkpoint, which does not say it; default: that of a run's
        configuration beside it.

    Raises
    ------
    UserError
        If there is no checkpoint, it is damaged, it is of a model that our GPT does not cover, the tokenizer does not
        match the model, or the device is not here.
    """
    where, path = find_device(device), Path(path)
    if kind(path) == "sharded":
        model = sharded.load_model(path, shape or _configured(path), backend)
        return Loaded(model.to(where), tokenizer, {"step": 0, "model": asdict(model.shape)})
    if kind(path) != "checkpoint":
        model, tokenizer, state, masks = read_theirs(path, tokenizer)
        if masks:
            sparsify(model, masks, backend=backend)
        return Loaded(model.to(where), tokenizer, state)
    stored = checkpoint.read(path)
    run, state = of_checkpoint(stored.folder), stored.state
    if stored.folder.parent.name == CHECKPOINTS:
        run.check(state)
    model = GPT(_shape_in(state))
    stored.restore(model, backend)
    file = run.tokenizer
    if tokenizer is None and file.is_file():
        tokenizer = Tokenizer.load(file, state.get("tokenizer"))
    if tokenizer is not None and tokenizer.vocab_size > model.shape.vocab_size:
        raise _mismatch(tokenizer, f"the model of {stored.folder} has {model.shape.vocab_size}")
    return Loaded(model.to(where), tokenizer, state)


def _configured(path: Path) -> Shape:
    """Shape of a model, from a run's configuration in a folder or the one above."""
    for folder in (path, path.parent):
        if (run := Run(folder)).configured:
            return run.shape
    raise UserError(
        f"'{path}' is of torch.distributed.checkpoint and does not say what model it is of: put the {CONFIG} of a run "
        "of that model, or a Hugging Face config.json, beside it; init_from takes it as the configured model's."
    )


def shape_of(path: str | Path) -> Shape:
    """Shape of any checkpoint, without its weights.

    Raises
    ------
    UserError
        As `load`, as far as it can be known without the weights.
    """
    path = Path(path)
    if kind(path) == "sharded":
        return _configured(path)
    if kind(path) != "checkpoint":
        return read_configuration(*_configuration(path))[0]
    return _shape_in(checkpoint.read_state(checkpoint.resolve(path)))


def _shape_in(state: dict[str, Any]) -> Shape:
    return Shape.read(state["model"], state.get("activation"))
