"""What is left out follows from the rest; what cannot be is refused."""

from __future__ import annotations

import dataclasses
import math
import re

from vspdf import shapes
from vspdf.config.settings import Config, ModelConfig
from vspdf.errors import check_device, one_of, require


def model_shape(model: ModelConfig, vocab_size: int | None = None) -> shapes.Shape:
    """Shape of the configured model; `vocab_size` is the tokenizer's, for where the configuration leaves it open."""
    vocab_size = model.vocab_size or vocab_size
    assert vocab_size and model.n_layer and model.d_model and model.n_head and model.d_ff and model.sequence_length
    return shapes.Shape(model.n_layer, model.d_model, model.n_head, model.d_ff, vocab_size, model.sequence_length)


def linear_layers(model: ModelConfig) -> dict[str, int]:
    """The layers of the configured model that can be sparse, and how many weights each has."""
    assert model.n_layer and model.d_model and model.d_ff
    return shapes.linear_layers(model.n_layer, model.d_model, model.d_ff)


def resolve(config: Config) -> None:
    """Fills in, in place, what follows from other settings, and checks every value.

    Raises
    ------
    UserError
        Naming the setting, its value and what was expected.
    """
    resolve_model(config.model)
    train, optimizer = config.train, config.optimizer
    one_of("train.precision", train.precision, ("fp32", "bf16"))
    one_of("train.backend", train.backend, ("auto", "cpu", "reference", "triton"))
    check_device("train.device", train.device)
    for backend, device in (("cpu", "cuda"), ("triton", "cpu")):
        require(
            train.backend != backend or not train.device.startswith(device),
            f"train.backend = '{backend}' does not run on train.device = '{train.device}'.",
        )
    train.micro_batch_size = train.batch_size if train.micro_batch_size is None else train.micro_batch_size
    for key in ("batch_size", "micro_batch_size", "log_every", "keep_checkpoints"):
        require(getattr(train, key) >= 1, f"train.{key} must be at least 1, not {getattr(train, key)}.")
    for key in ("eval_every", "eval_tokens", "sample_tokens", "checkpoint_every", "measure_dense"):
        require(getattr(train, key) >= 0, f"train.{key} must not be negative, is {getattr(train, key)}.")
    require(train.threads is None or train.threads >= 1, f"train.threads must be at least 1, not {train.threads}.")
    require(0 < optimizer.lr < math.inf, f"optimizer.lr must be positive, not {optimizer.lr}.")
    for key in ("eps", "weight_decay", "clip"):
        value = getattr(optimizer, key)
        require(0 <= value < math.inf, f"optimizer.{key} must not be negative, is {value}.")
    require(config.seed >= 0, f"seed must not be negative, is {config.seed}.")
    first = config.data.first_sequence
    require(first is None or first >= 0, f"data.first_sequence must not be negative, is {first}.")
    for key in ("beta1", "beta2"):
        require(0 <= getattr(optimizer, key) < 1, f"optimizer.{key} must lie in [0, 1), not {getattr(optimizer, key)}.")
    fraction = config.data.validation_fraction
    require(0 < fraction < 1, f"data.validation_fraction must lie between 0 and 1, is {fraction}.")
    test = config.data.test_fraction
    require(0 <= test < 1 - fraction, f"data.test_fraction must lie in [0, {1 - fraction:.4g}), is {test}.")
    require(bool(re.fullmatch(r"\w[\w.-]*", config.name)), f"name = '{config.name}' must be usable as a folder's name.")
    require(
        bool(config.phases), "phases: at least one phase is needed, e.g. [{sparsity: 0.9, steps: 250}, {steps: 50}]."
    )
    config.run_dir = config.run_dir or f"runs/{config.name}"
    _resolve_task(config)
    for i in range(len(config.phases)):
        _resolve_phase(config, i)


def _resolve_task(config: Config) -> None:
    """Fine-tuning: a task to learn and a model to start from, both or neither."""
    data, longest = config.data, config.model.sequence_length
    require(
        config.start is None or data.path is not None,
        "data.path is not set: give the task's file, data.path=FILE (DART, WebNLG, E2E, or JSONL).",
    )
    if data.path is None:
        return
    require(config.init_from is None, "init_from is for pre-training; fine-tuning names its checkpoint first.")
    require(config.start is not None, "data.path is for fine-tuning: vspdf finetune CHECKPOINT CONFIG data.path=FILE.")
    one_of("data.format", data.format, ("auto", "dart", "webnlg", "e2e", "jsonl"))
    one_of("data.overlong", data.overlong, ("refuse", "cut", "drop"))
    assert longest is not None
    data.length = longest if data.length is None else data.length
    require(
        4 <= data.length <= longest,
        f"data.length = {data.length} must lie between 4 and the model's sequence length of {longest}.",
    )
    require(not any(phase.sparsity for phase in config.phases), "fine-tuning is dense: phases must have no sparsity.")


def resolve_model(model: ModelConfig) -> None:
    """Fills in, in place, what a preset or other keys tell of a model, and checks its sizes."""
    if model.name is not None:
        preset = shapes.model_shape(model.name)
        for key, value in dataclasses.asdict(preset).items():
            if getattr(model, key) is None:
                setattr(model, key, value)
    for key in ("n_layer", "d_model", "n_head", "sequence_length"):
        value = getattr(model, key)
        require(
            value is not None,
            f"model.{key} is not set; give it, or model.name for a preset "
            "(fine-tuning: vspdf finetune CHECKPOINT CONFIG).",
        )
        require(value >= 1, f"model.{key} must be at least 1, not {value}.")
    assert model.d_model is not None and model.n_head is not None
    model.d_ff = 4 * model.d_model if model.d_ff is None else model.d_ff
    require(model.d_ff >= 1, f"model.d_ff must be at least 1, not {model.d_ff}.")
    require(
        model.vocab_size is None or model.vocab_size >= 1,
        f"model.vocab_size must be at least 1, not {model.vocab_size}.",
    )
    require(
        model.d_model % model.n_head == 0,
        f"model.n_head = {model.n_head} does not divide model.d_model = {model.d_model}.",
    )
    one_of("model.activation", model.activation, ("gelu", "gelu_tanh"))
    require(0 < model.init_std < math.inf, f"model.init_std must be positive, not {model.init_std}.")


def _resolve_phase(config: Config, i: int) -> None:
    key, phase, previous = f"phases.{i}", config.phases[i], config.phases[i - 1] if i else None
    phase.batch_size = config.train.batch_size if phase.batch_size is None else phase.batch_size
    require(phase.batch_size >= 1, f"{key}.batch_size must be at least 1, not {phase.batch_size}.")
    step_tokens = phase.batch_size * (config.data.length or config.model.sequence_length)  # type: ignore[operator]
    require((phase.steps is None) != (phase.tokens is None) or phase.tokens == (phase.steps or 0) * step_tokens,
             f"{key} needs steps or tokens, one of them.")  # fmt: skip
    require(phase.tokens is None or phase.tokens >= 1, f"{key}.tokens must be at least 1, not {phase.tokens}.")
    if phase.steps is None:
        phase.steps = max(1, round(phase.tokens / step_tokens))  # type: ignore[operator]
    require(phase.steps >= 1, f"{key}.steps must be at least 1, not {phase.steps}.")
    phase.tokens = phase.steps * step_tokens
    assert config.train.micro_batch_size is not None
    micro = min(config.train.micro_batch_size, phase.batch_size)
    require(
        phase.batch_size % micro == 0,
        f"train.micro_batch_size = {micro} does not divide {key}.batch_size = {phase.batch_size}.",
    )
    phase = config.phases[i] = phase.resolved(key, previous, linear_layers(config.model))
    assert phase.steps is not None
    one_of(f"{key}.decay", phase.decay, ("linear", "cosine", "constant"))
    phase.lr = config.optimizer.lr if phase.lr is None else phase.lr
    phase.lr_end = config.optimizer.lr / 10 if phase.lr_end is None else phase.lr_end
    phase.weight_decay = config.optimizer.weight_decay if phase.weight_decay is None else phase.weight_decay
    phase.beta2 = config.optimizer.beta2 if phase.beta2 is None else phase.beta2
    if phase.warmup_steps is None:
        phase.warmup_steps = phase.steps // (10 if previous else 20)
    peak = phase.lr * phase.lr_multiple
    require(phase.lr > 0 and phase.lr_multiple > 0 and peak < math.inf, f"{key}: lr and lr_multiple must be positive.")
    require(
        0 <= phase.lr_end <= peak,
        f"{key}.lr_end = {phase.lr_end:.4g} must lie between 0 and the phase's peak, {peak:.4g} (lr · lr_multiple).",
    )
    require(
        0 <= phase.warmup_steps <= phase.steps,
        f"{key}.warmup_steps = {phase.warmup_steps} must lie between 0 and the phase's {phase.steps} steps.",
    )
    require(0 <= phase.weight_decay < math.inf, f"{key}.weight_decay must not be negative, is {phase.weight_decay}.")
    require(0 <= phase.beta2 < 1, f"{key}.beta2 must lie in [0, 1), not {phase.beta2}.")


def amounts(config: Config) -> list[tuple[float, float]]:
    """(sparsity over all weights of the layers, tokens) of every stretch of a run, in order."""
    layers = linear_layers(config.model)
    return [
        (phase.mean(layers, stage.sparsity), stage.steps * (phase.tokens or 0) / (phase.steps or 1))
        for phase in config.phases
        for stage in phase.stages()
    ]
