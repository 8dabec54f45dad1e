"""The model that is planned for: by name, from a configuration, or from a Hugging Face folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from vspdf import shapes
from vspdf.config import loading, resolve
from vspdf.config.resolved import ResolvedModel, ResolvedPhase
from vspdf.config.settings import Config, ModelConfig
from vspdf.errors import UserError, check_whole, did_you_mean, near_path, require
from vspdf.files import read_json
from vspdf.interop import load_config
from vspdf.interop.architectures import ARCHITECTURES, read_shape
from vspdf.shapes import PUBLISHED, Shape, _nearest

TOKENS_PER_PARAMETER = 20  # compute-optimal (arXiv:2203.15556), as Cerebras-GPT was trained


# ---------------------------------------------------------------------------------------------------------------------
# Models and their dense runs
# ---------------------------------------------------------------------------------------------------------------------

# Hugging Face architectures whose blocks hold 4·d² + 2·d·d_ff weights, though our GPT is none of them, and what their
# configurations call things.
HF_TYPES = ("gptj", "gpt_neo", "opt", "bert")
_OF_OTHERS = ("gpt-j", "bert")  # models by name
HF_KEYS = {
    "n_layer": ("n_layer", "num_hidden_layers", "num_layers"),
    "d_model": ("n_embd", "hidden_size"),
    "n_head": ("n_head", "num_attention_heads", "num_heads"),
    "d_ff": ("n_inner", "intermediate_size", "ffn_dim"),
    "vocab_size": ("vocab_size",),
    "sequence_length": ("n_positions", "max_position_embeddings"),
}


class Source(NamedTuple):
    """What is planned for: settings to be changed into the planned run's, and what they say so far.

    Of a configuration they say all of it; of a model alone its phases, and the batch, are still open.
    """

    name: str
    settings: Config
    model: ResolvedModel
    phases: tuple[ResolvedPhase, ...] = ()
    by_size: bool = False  # whether it is another architecture than ours, of which the sizes are taken alone

    @property
    def notes(self) -> list[str]:
        """What is to be said of the model."""
        alone = f"{self.name} is planned by its sizes alone: what trains here, by --write, is our GPT of them."
        return [alone] if self.by_size else []

    @property
    def shape(self) -> Shape:
        """Shape of the model; where the tokenizer decides on the vocabulary, by its name."""
        return _shape(self.model, self.settings.data.tokenizer)

    def at(self, length: int | None) -> Source:
        """The same with sequences of so many tokens; None: of its own."""
        if length is None:
            return self
        require(not self.phases, f"`sequence` is for models: {self.name} has model.sequence_length.")
        check_whole("`sequence`", length)
        self.settings.model.sequence_length = int(length)
        return self._replace(model=resolve.resolve_model(self.settings.model))


def _source(model: str | Path) -> Source:
    path, name = Path(model), str(model)
    if name in shapes.MODELS:
        return _template(ModelConfig(name=name), name)._replace(by_size=name.startswith(_OF_OTHERS))
    if path.is_dir() and name:  # "" would be the current directory
        if not (path / "config.json").is_file():
            raise UserError(f"'{model}' holds no config.json: expected a Hugging Face folder.")
        return _from_hugging_face(path)._replace(name=path.resolve().name)
    if not path.is_file() and name not in {file.stem for file in loading.shipped()}:
        known = [*shapes.MODELS, *(file.stem for file in loading.shipped())]
        hint = (name and near_path(path)) or did_you_mean(name, known)
        raise UserError(f"unknown model '{model}': neither a name, a configuration nor a Hugging Face folder.{hint}")
    config = load_config(path if path.is_file() else name)
    return Source(config.name, resolve.written(config), config.model, config.phases)


def model_and_batch(model: str | Path) -> tuple[Shape, int | None]:
    """Shape of a named model, a configuration or a Hugging Face folder, and sequences a step where that is known.

    Raises
    ------
    UserError
        If there is no such model.
    """
    source = _source(model)
    own = source.settings.train.batch_size if source.phases else None
    return source.shape, PUBLISHED[source.name].batch_size if source.name in PUBLISHED else own


def _from_hugging_face(folder: Path) -> Source:
    file = folder / "config.json"
    body = read_json(file)
    kind = body.get("model_type")
    if kind in ARCHITECTURES:
        model = resolve.settings_of(read_shape(body, str(file)))
        return _of_folder(_template(model, _usable_name(folder)), folder)
    if kind not in HF_TYPES:
        known = [*ARCHITECTURES, *HF_TYPES]
        raise UserError(f"{file}: the sizes of model_type '{kind}' are not known. Known: {', '.join(known)}.")
    sizes: dict[str, Any] = {}
    for key, names in HF_KEYS.items():
        sizes[key] = next((body[name] for name in names if body.get(name) is not None), None)
        if (sizes[key] is None and key != "d_ff") or not isinstance(sizes[key], int | None):
            raise UserError(f"{file}: expected a whole number as {' or '.join(names)}, not {sizes[key]}.")
    return _of_folder(_template(ModelConfig(**sizes), _usable_name(folder)), folder)._replace(by_size=True)


def _usable_name(folder: Path) -> str:
    return re.sub(r"[^\w.-]", "-", folder.resolve().name)


def _of_folder(source: Source, folder: Path) -> Source:
    if (folder / "tokenizer.json").is_file():
        source.settings.data.tokenizer = str(folder / "tokenizer.json")
    return source


def _template(model: ModelConfig, name: str) -> Source:
    """What a configuration of a model alone starts from; like gpt2-small-variable, it runs on the embedded corpus."""
    found = resolve.resolve_model(model)
    config = Config(name=name, model=resolve.settings_of(found))
    config.data.repeat = True
    config.train.eval_every = config.train.checkpoint_every = 500
    config.train.micro_batch_size = 1
    config.data.tokenizer = "bytes" if found.vocab_size is None or found.vocab_size < 8192 else "bpe:8192"
    source = Source(name, config, found)
    config.optimizer.lr = _nearest(source.shape)[1].lr
    return source


def _shape(model: ResolvedModel, tokenizer: str) -> Shape:
    size = 257 if tokenizer == "bytes" else int(tokenizer[4:]) if re.fullmatch(r"bpe:\d+", tokenizer) else None
    if model.vocab_size is None and size is None:
        raise UserError(
            f"model.vocab_size is not set and tokenizer '{tokenizer}' does not tell it by name: set it to plan."
        )
    return resolve.model_shape(model, size)


def _dense_run(
    source: Source, shape: Shape, steps: int | None, batch_size: int | None, planned: int | None
) -> tuple[int, str]:
    """Steps of the dense run to compare with, and where they come from; fills in the batch of a model's template.

    `planned` are the steps of phases that were asked for.
    """
    name, train = source.model.name, source.settings.train
    published = PUBLISHED.get(name) if name is not None and shape == shapes.MODELS.get(name) else None
    near, run = _nearest(shape)
    if not source.phases:
        tokens = run.batch_size * shapes.MODELS[near].sequence_length
        train.batch_size = int(batch_size or 0) or max(1, round(tokens / shape.sequence_length))
    batch = train.batch_size
    step_tokens = batch * shape.sequence_length
    if steps is not None:
        return int(steps), f"{steps:,} steps of {batch:,} x {shape.sequence_length:,} tokens, as asked for"
    if published and batch == published.batch_size:
        steps, origin = published.steps, "the published one"
    elif published and not source.phases:
        steps, origin = round(published.steps * published.batch_size / batch), "the published one's tokens"
    elif planned:
        steps, origin = planned, "the phases' own tokens"
    elif source.phases:
        steps, origin = round(sum(phase.tokens for phase in source.phases) / step_tokens), "the phases' own tokens"
    else:
        steps = round(TOKENS_PER_PARAMETER * shape.parameters / step_tokens)
        origin = f"{TOKENS_PER_PARAMETER} tokens a parameter, none being known"
    return max(1, steps), f"{max(1, steps):,} steps of {batch:,} x {shape.sequence_length:,} tokens ({origin})"
