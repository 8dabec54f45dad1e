"""`vspdf convert`: between checkpoints of ours and Hugging Face folders, sparse to dense, masks found and finalized."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vspdf.data.tokenizer import Tokenizer
from vspdf.errors import UserError, did_you_mean
from vspdf.files import must_be_new, new_whole
from vspdf.interop import checkpoints, hugging_face, sharded
from vspdf.interop.masks import finalize_tree, name_zeros
from vspdf.interop.tensors import PICKLES, flatten, read, unshared
from vspdf.kernels import hardware
from vspdf.model import GPT
from vspdf.runs import checkpoint
from vspdf.runs.folder import Run
from vspdf.sparsity.layer import sparse_layers
from vspdf.sparsity.surgery import densify

FORMS = ("hugging-face", "dense", "sparse")


def convert(
    source: str | Path, target: str | Path, to: str | None = None, tokenizer: str | Path | None = None
) -> dict[str, Any]:
    """Converts a checkpoint; what is written is new, and whole or not there.

    Parameters
    ----------
    source : path
        A run directory, a step folder, a Hugging Face folder, a folder with a checkpoint of the Cerebras stack
        and its YAML, a folder of torch.distributed.checkpoint (with a run's configuration or a config.json beside it,
        or to a file), or a single file of tensors (safetensors, or a pickle of tensors and plain values).
    target : path
        Of what is written; must not exist.
    to : {"hugging-face", "dense", "sparse"}, optional
        A Hugging Face folder, or a checkpoint of ours with dense layers or with those sparse whose masks were found.
        Default: a checkpoint of ours becomes a Hugging Face folder, that a dense checkpoint of ours. A file becomes a
        file with masked weights set to zero and masks removed, whatever its names are.
    tokenizer : path of a tokenizer.json, optional
        For a source that has none.

    Returns
    -------
    dict
        What was found and written: `source`, `kind`, `to`, `written`, `model`, `parameters`, `step`, `tokenizer`, and
        `layers` (sparsity by name).

    Raises
    ------
    UserError
        If the source is neither, damaged or not covered, the target exists, or nothing sparse was found for "sparse".
    """
    source, target = Path(source), Path(target)
    if to is not None and to not in FORMS:
        raise UserError(f"`to` '{to}' is not known.{did_you_mean(to, FORMS)}")
    must_be_new(target)  # before the work; new_whole asks again
    into_file = target.suffix in (".safetensors", *PICKLES)
    if source.is_file() or (into_file and to is None and sharded.is_sharded(source)):
        if to is not None:
            raise UserError(
                f"'{source}' is a file: it becomes a file with zeros for masked weights. For `to` {to} give the folder "
                "that holds it and its config.json, or its YAML of the Cerebras stack."
            )
        if tokenizer is not None:
            raise UserError(f"'{source}' is a file of tensors: leave `tokenizer` away, nothing would read it.")
        return _finalize_file(source, target)
    kind = checkpoints.kind(source)
    to = to or ("hugging-face" if kind == "checkpoint" else "dense")
    model, words, state = checkpoints.load(source, tokenizer=Tokenizer.load(tokenizer) if tokenizer else None)
    layers = {name: layer.pattern for name, layer in sparse_layers(model).items()}
    if to == "sparse" and not layers:
        raise UserError(
            f"'{source}' holds no mask: every weight is there and none is NaN. "
            'vspdf.sparsify(model, sparsity, init_method="from_zeros") takes zeros for masked.'
        )
    if to == "dense":
        densify(model)
    with new_whole(target) as draft:
        if to == "hugging-face":
            hugging_face.write_hugging_face(model, words, draft)
        else:
            _write_checkpoint(draft, model, words, {**state, "converted_from": str(source)})
    return {
        "source": str(source), "kind": kind, "to": to, "written": str(target), "step": state["step"],
        "model": hugging_face.known_name(model.shape), "parameters": model.shape.parameters,
        "tokenizer": words.name if words else None,
        "layers": {name: pattern.sparsity for name, pattern in layers.items()},
    }  # fmt: skip


def _write_checkpoint(folder: Path, model: GPT, tokenizer: Tokenizer | None, state: dict[str, Any]) -> None:
    """Laid out like a run directory, so that everything that reads a run reads it; without optimizer state."""
    folder.mkdir(parents=True)
    if tokenizer is not None:
        Run(folder).tokenizer.write_text(tokenizer.to_json(), encoding="utf-8")
    kept = (
        "tokenizer",
        "corpus",
        "validation_fraction",
        "test_fraction",
        "seed",
        "sequences",
        "task",
        "converted_from",
    )
    body = {key: state[key] for key in kept if key in state}
    body |= {} if tokenizer is None else {"tokenizer": tokenizer.about}
    body |= {"model": asdict(model.shape), "vspdf": hardware.versions()["vspdf"]}
    checkpoint.save(folder, state["step"], model, None, body)


def _finalize_file(source: Path, target: Path) -> dict[str, Any]:
    if target.suffix not in (".safetensors", *PICKLES):
        raise UserError(f"'{target}': expected a file ending in .safetensors or {', '.join(PICKLES)}.")
    tree, masks = finalize_tree(read(source) if source.is_file() else sharded.dense(sharded.read(source), str(source)),
                                str(source))  # fmt: skip
    tensors = flatten(tree)
    if not tensors:
        raise UserError(f"'{source}' holds no tensor.")
    name_zeros(tensors, masks, str(source))
    with new_whole(target) as draft:
        if target.suffix == ".safetensors":
            save_file(unshared(tensors), draft)
        else:
            torch.save(tree, draft)
    return {
        "source": str(source), "kind": "file", "to": "file", "written": str(target), "step": None, "model": None,
        "parameters": sum(t.numel() for t in tensors.values() if t.is_floating_point()), "tokenizer": None,
        "layers": {name: 1 - int(mask.sum()) / mask.numel() for name, mask in masks.items() if mask.numel()},
    }  # fmt: skip
