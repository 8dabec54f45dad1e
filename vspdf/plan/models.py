"""The model that is planned for: by name, from a configuration, or from a Hugging Face folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vspdf import shapes
from vspdf.config import loading, resolve
from vspdf.config.settings import Config, ModelConfig
from vspdf.errors import UserError, did_you_mean, near_path
from vspdf.shapes import PUBLISHED, Shape, _nearest

TOKENS_PER_PARAMETER = 20  # compute-optimal (arXiv:2203.15556), as Cerebras-GPT was trained


# ---------------------------------------------------------------------------------------------------------------------
# Models and their dense runs
# ---------------------------------------------------------------------------------------------------------------------

# Hugging Face architectures whose blocks hold 4·d² + 2·d·d_ff weights, and what their configurations call things.
HF_TYPES = ("gpt2", "gptj", "gpt_neo", "gpt_neox", "opt", "bert")
HF_KEYS = {
    "n_layer": ("n_layer", "num_hidden_layers", "num_layers"),
    "d_model": ("n_embd", "hidden_size"),
    "n_head": ("n_head", "num_attention_heads", "num_heads"),
    "d_ff": ("n_inner", "intermediate_size", "ffn_dim"),
    "vocab_size": ("vocab_size",),
    "sequence_length": ("n_positions", "max_position_embeddings"),
}


def _source(model: str | Path) -> tuple[str, Config]:
    """Name and configuration, resolved where it comes from a file; models get one whose phases are still open."""
    path, name = Path(model), str(model)
    if name in shapes.MODELS:
        return name, _template(ModelConfig(name=name), name)
    if path.is_dir() and name:  # "" would be the current directory
        if not (path / "config.json").is_file():
            raise UserError(f"'{model}' holds no config.json: expected a Hugging Face folder.")
        return path.resolve().name, _from_hugging_face(path)
    if not path.is_file() and name not in {file.stem for file in loading.shipped()}:
        known = [*shapes.MODELS, *(file.stem for file in loading.shipped())]
        hint = (name and near_path(path)) or did_you_mean(name, known)
        raise UserError(f"unknown model '{model}': neither a name, a configuration nor a Hugging Face folder.{hint}")
    config = loading.load(path if path.is_file() else name)
    return config.name, config


def model_and_batch(model: str | Path) -> tuple[Shape, int | None]:
    """Shape of a named model, a configuration or a Hugging Face folder, and sequences a step where that is known.

    Raises
    ------
    UserError
        If there is no such model.
    """
    name, config = _source(model)
    batch = PUBLISHED[name].batch_size if name in PUBLISHED else config.train.batch_size if config.phases else None
    return _shape(config), batch


def _from_hugging_face(folder: Path) -> Config:
    file = folder / "config.json"
    try:
        body = json.loads(file.read_text())
        kind = body.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None
    if kind not in HF_TYPES:
        raise UserError(
            f"{file}: model_type '{kind}' is not known to have blocks of 4·d² + 2·d·d_ff weights. "
            f"Known: {', '.join(HF_TYPES)}."
        )
    sizes: dict[str, Any] = {}
    for key, names in HF_KEYS.items():
        sizes[key] = next((body[name] for name in names if body.get(name) is not None), None)
        if (sizes[key] is None and key != "d_ff") or not isinstance(sizes[key], int | None):
            raise UserError(f"{file}: expected a whole number as {' or '.join(names)}, not {sizes[key]}.")
    config = _template(ModelConfig(**sizes), re.sub(r"[^\w.-]", "-", folder.resolve().name))
    if (folder / "tokenizer.json").is_file():
        config.data.tokenizer = str(folder / "tokenizer.json")
    return config


def _template(model: ModelConfig, name: str) -> Config:
    """What a configuration of a model alone starts from; like gpt2-small-variable, it runs on the embedded corpus."""
    config = Config(name=name, model=model)
    config.data.repeat = True
    config.train.eval_every = config.train.checkpoint_every = 500
    config.train.micro_batch_size = 1
    resolve.resolve_model(model)
    config.data.tokenizer = "bpe:8192" if (model.vocab_size or 0) >= 8192 else "bytes"
    config.optimizer.lr = _nearest(_shape(config))[1].lr
    return config


def _shape(config: Config) -> Shape:
    """Shape of the configured model; where the tokenizer decides on the vocabulary, by its name."""
    text = config.data.tokenizer
    size = 257 if text == "bytes" else int(text[4:]) if re.fullmatch(r"bpe:\d+", text) else None
    if config.model.vocab_size is None and size is None:
        raise UserError(f"model.vocab_size is not set and tokenizer '{text}' does not tell it by name: set it to plan.")
    return resolve.model_shape(config.model, size)


def _dense_run(
    config: Config, shape: Shape, steps: int | None, batch_size: int | None, planned: int | None
) -> tuple[int, str]:
    """Steps of the dense run to compare with, and where they come from; fills in the batch of a model's template.

    `planned` are the steps of phases that were asked for.
    """
    name = config.model.name or ""
    published = PUBLISHED.get(name) if shape == shapes.MODELS.get(name) else None
    near, run = _nearest(shape)
    if not config.phases:
        tokens = run.batch_size * shapes.MODELS[near].sequence_length
        config.train.batch_size = batch_size or max(1, round(tokens / shape.sequence_length))
    batch = config.train.batch_size
    step_tokens = batch * shape.sequence_length
    if steps is not None:
        return steps, f"{steps:,} steps of {batch:,} x {shape.sequence_length:,} tokens, as asked for"
    if published and batch == published.batch_size:
        steps, origin = published.steps, "the published one"
    elif published and not config.phases:
        steps, origin = round(published.steps * published.batch_size / batch), "the published one's tokens"
    elif planned:
        steps, origin = planned, "the phases' own tokens"
    elif config.phases:
        steps, origin = round(sum(phase.tokens or 0 for phase in config.phases) / step_tokens), "the phases' own tokens"
    else:
        steps = round(TOKENS_PER_PARAMETER * shape.parameters / step_tokens)
        origin = f"{TOKENS_PER_PARAMETER} tokens a parameter, none being known"
    return max(1, steps), f"{max(1, steps):,} steps of {batch:,} x {shape.sequence_length:,} tokens ({origin})"
