"""From settings as written to those a run is taken with: what is left out follows, what cannot be is refused."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import asdict
from typing import Any

from vspdf import shapes
from vspdf.config.resolved import (
    ResolvedConfig,
    ResolvedData,
    ResolvedModel,
    ResolvedOptimizer,
    ResolvedPhase,
    ResolvedTask,
    ResolvedTrain,
)
from vspdf.config.settings import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    TrainConfig,
)
from vspdf.errors import UserError, check_device, one_of, require
from vspdf.files import at_home
from vspdf.sparsity.schedule import warn_once


def usable(name: str) -> bool:
    """Whether a name is a folder's, and of nothing but letters, digits, `_`, `.` and `-`."""
    return bool(re.fullmatch(r"\w[\w.-]*", name))


def resolve(config: Config) -> ResolvedConfig:
    """Every setting, those that follow from others included, and checked; `config` stays as it is.

    Raises
    ------
    UserError
        Naming the setting, its value and what was expected.
    """
    model = resolve_model(config.model)
    train = _train(config.train)
    optimizer = _optimizer(config.optimizer)
    require(config.seed >= 0, f"seed must not be negative, is {config.seed}.")
    require(config.seed < 2**64, f"seed must be below 2^64, is {config.seed}.")  # torch's generators take no more
    require(usable(config.name), f"name = '{config.name}' must be usable as a folder's name.")
    require(
        bool(config.phases), "phases: at least one phase is needed, e.g. [{sparsity: 0.9, steps: 250}, {steps: 50}]."
    )
    _check_paths(config)
    found = ResolvedConfig(
        name=config.name,
        run_dir=f"runs/{config.name}" if config.run_dir is None else config.run_dir,
        init_from=config.init_from,
        seed=config.seed,
        start=config.start,
        model=model,
        data=_data(config, model.sequence_length),
        optimizer=optimizer,
        train=train,
        phases=(),
    )
    for written in config.phases:
        found = dataclasses.replace(found, phases=(*found.phases, _phase(written, found)))
    for i, phase in enumerate(found.phases if found.task else ()):
        amounts = [*phase.layers.values(), *(stage.sparsity for stage in phase.stages())]
        require(
            not any(amounts) and phase.algorithm == "static",
            f"phases.{i}: fine-tuning is dense: expected no sparsity, no levels or layers above 0, no moving masks.",
        )
    require(
        not train.patience or found.phases[-1].schedule == "constant",
        f"train.patience = {train.patience} may end the last phase early: that needs schedule: constant, "
        f"not {found.phases[-1].schedule}.",
    )
    return _at_home(found)


def _at_home(config: ResolvedConfig) -> ResolvedConfig:
    """The same run with paths whose ``~`` is the home that it stands for: of ``key=~/x`` and YAML no shell makes it."""

    def found(path: str | None) -> Any:
        return str(at_home(path)) if path and path.startswith("~") else path

    data = dataclasses.replace(
        config.data, path=found(config.data.path), validation_path=found(config.data.validation_path)
    )
    phases = tuple(dataclasses.replace(phase, init_file=found(phase.init_file)) for phase in config.phases)
    run_dir, init_from, start = map(found, (config.run_dir, config.init_from, config.start))
    return dataclasses.replace(config, run_dir=run_dir, init_from=init_from, start=start, data=data, phases=phases)


def _check_paths(config: Config) -> None:
    """A path that is empty, as of a shell variable that is not set, is no way to say that there is none."""
    for key in ("init_from", "run_dir", "start", "data.path", "data.validation_path", "data.cache_dir"):
        path = getattr(config.data if key.startswith("data.") else config, key.removeprefix("data."))
        require(path is None or bool(path.strip()), f"{key} is empty: expected a path, or null for none.")


def resolve_model(model: ModelConfig) -> ResolvedModel:
    """What a preset or other keys tell of a model, with its sizes checked.

    Raises
    ------
    UserError
        Naming the setting, its value and what was expected.
    """
    wished = _choices(model)
    preset = asdict(shapes.named_shape(model.name)) if model.name is not None else {}
    if preset and (wished["d_model"] or wished["n_head"]):  # what followed from these follows again
        del preset["head_dim"]
        if preset["n_kv_head"] == preset["n_head"]:
            del preset["n_kv_head"]
    sizes: dict[str, Any] = {key: preset.get(key) if value is None else value for key, value in wished.items()}
    for key in ("n_layer", "d_model", "n_head", "sequence_length"):
        require(
            sizes[key] is not None,
            f"model.{key} is not set; give it, or model.name for a preset "
            "(fine-tuning: vspdf finetune CHECKPOINT CONFIG).",
        )
    sizes["d_ff"] = 4 * sizes["d_model"] if sizes["d_ff"] is None else sizes["d_ff"]
    for key in ("n_layer", "d_model", "n_head", "sequence_length", "d_ff", "vocab_size", "n_kv_head", "head_dim"):
        require(sizes[key] is None or sizes[key] >= 1, f"model.{key} must be at least 1, not {sizes[key]}.")
    most = shapes.MOST_LAYERS
    require(sizes["n_layer"] <= most, f"model.n_layer must be at most {most:,}, not {sizes['n_layer']:,}.")
    made = shapes.Shape(**{k: v for k, v in sizes.items() if v is not None} | {"vocab_size": sizes["vocab_size"] or 1})
    sizes = {key: getattr(made, key) for key in sizes} | {"vocab_size": sizes["vocab_size"]}
    output = model.output_init_std
    output = model.init_std / math.sqrt(2 * made.n_layer) if output is None else output
    for key, std in (("init_std", model.init_std), ("output_init_std", output)):
        require(0 < std < math.inf, f"model.{key} must be positive, not {std}.")
    return ResolvedModel(name=model.name, **sizes, init_std=model.init_std, output_init_std=output)


def _choices(model: ModelConfig) -> dict[str, Any]:
    """What a configuration says of each attribute of a shape, None where nothing; other names for one thing agree."""
    found = {field.name: getattr(model, field.name) for field in dataclasses.fields(shapes.Shape)}
    if model.activation is not None:
        require(
            found["mlp"] in (None, model.activation),
            f"model.activation = {model.activation} is the older name of model.mlp = {found['mlp']}: give one of them.",
        )
        found["mlp"] = model.activation
    if (inner := model.d_attention) is not None:
        heads = model.n_head or (shapes.named_shape(model.name).n_head if model.name else 0)
        require(
            inner >= 1 and bool(heads) and inner % heads == 0,
            f"model.d_attention = {inner} must be a multiple of model.n_head = {heads or None}.",
        )
        require(
            found["head_dim"] in (None, inner // heads),
            f"model.d_attention = {inner} is not n_head · head_dim = {heads} · {found['head_dim']}: give one of them.",
        )
        found["head_dim"] = inner // heads
    return found


def _train(train: TrainConfig) -> ResolvedTrain:
    one_of("train.precision", train.precision, ("fp32", "bf16"))
    one_of("train.backend", train.backend, ("auto", "cpu", "reference", "triton"))
    one_of("train.memory", train.memory, ("normal", "low"))
    check_device("train.device", train.device)
    for backend, device in (("cpu", "cuda"), ("triton", "cpu")):
        require(
            train.backend != backend or not train.device.startswith(device),
            f"train.backend = '{backend}' does not run on train.device = '{train.device}'.",
        )
    own = train.backend in ("auto", "cpu") and not train.device.startswith("cuda")
    require(
        train.memory == "normal" or own,
        f"train.memory = '{train.memory}' is of the CPU's kernels: it does nothing with train.backend = "
        f"'{train.backend}' on train.device = '{train.device}'.",
    )
    micro = train.batch_size if train.micro_batch_size is None else train.micro_batch_size
    parallel = (
        ("ddp" if train.device.startswith("cuda") else "exact") if train.data_parallel is None else train.data_parallel
    )
    one_of("train.data_parallel", parallel, ("exact", "ddp"))
    found = ResolvedTrain(**{**vars(train), "micro_batch_size": micro, "data_parallel": parallel})
    require(0 < found.timeout < math.inf, f"train.timeout must be positive, is {found.timeout}.")
    for key in ("batch_size", "micro_batch_size", "log_every", "keep_checkpoints"):
        require(getattr(found, key) >= 1, f"train.{key} must be at least 1, not {getattr(found, key)}.")
    for key in ("eval_every", "eval_tokens", "sample_tokens", "checkpoint_every", "measure_dense", "patience"):
        require(getattr(found, key) >= 0, f"train.{key} must not be negative, is {getattr(found, key)}.")
    require(
        not found.patience or found.eval_every > 0,
        f"train.patience = {found.patience} counts evaluations: it needs train.eval_every above 0.",
    )
    require(found.threads is None or found.threads >= 1, f"train.threads must be at least 1, not {found.threads}.")
    return found


def _optimizer(optimizer: OptimizerConfig) -> ResolvedOptimizer:
    require(0 < optimizer.lr < math.inf, f"optimizer.lr must be positive, not {optimizer.lr}.")
    for key in ("eps", "weight_decay", "clip"):
        value = getattr(optimizer, key)
        require(0 <= value < math.inf, f"optimizer.{key} must not be negative, is {value}.")
    for key in ("beta1", "beta2"):
        require(0 <= getattr(optimizer, key) < 1, f"optimizer.{key} must lie in [0, 1), not {getattr(optimizer, key)}.")
    return ResolvedOptimizer(**vars(optimizer))


def _data(config: Config, longest: int) -> ResolvedData:
    """Text to pre-train on; or, of fine-tuning, a task to learn beside a model to start from, both or neither."""
    data, found = config.data, resolve_data(config.data)
    require(
        config.start is None or data.path is not None,
        "data.path is not set: give the task's file, data.path=FILE (DART, WebNLG, E2E, or JSONL).",
    )
    if data.path is None:
        for key in ("format", "validation_path", "length", "overlong", "lower_relations"):
            require(
                getattr(data, key) == getattr(DataConfig(), key),
                f"data.{key} = {getattr(data, key)} is for fine-tuning: vspdf finetune CHECKPOINT CONFIG "
                "data.path=FILE.",
            )
        return found
    require(config.init_from is None, "init_from is for pre-training; fine-tuning names its checkpoint first.")
    require(config.start is not None, "data.path is for fine-tuning: vspdf finetune CHECKPOINT CONFIG data.path=FILE.")
    for key in ("corpus", "text_field"):
        require(
            getattr(data, key) == getattr(DataConfig(), key),
            f"data.{key} = {getattr(data, key)} is for pre-training: fine-tuning learns from data.path alone.",
        )
    require(
        data.validation_path is None or data.validation_fraction == DataConfig.validation_fraction,
        f"data.validation_fraction = {data.validation_fraction} does nothing beside data.validation_path: give one.",
    )
    return resolve_task(data, longest)


def resolve_data(data: DataConfig) -> ResolvedData:
    """Data of text as they are taken.

    Raises
    ------
    UserError
        Naming the setting, its value and what was expected.
    """
    first, fraction, test = data.first_sequence, data.validation_fraction, data.test_fraction
    require(first is None or first >= 0, f"data.first_sequence must not be negative, is {first}.")
    require(0 < fraction < 1, f"data.validation_fraction must lie between 0 and 1, is {fraction}.")
    require(0 <= test < 1 - fraction, f"data.test_fraction must lie in [0, {1 - fraction:.4g}), is {test}.")
    one_of("data.format", data.format, ("auto", "dart", "webnlg", "e2e", "jsonl"))
    one_of("data.overlong", data.overlong, ("refuse", "cut", "drop"))
    return ResolvedData(**vars(data))


def resolve_task(data: DataConfig, longest: int) -> ResolvedTask:
    """A task's data as they are taken for a model whose window is `longest` tokens.

    Raises
    ------
    UserError
        Naming the setting, its value and what was expected.
    """
    length = longest if data.length is None else data.length
    require(
        4 <= length <= longest,
        f"data.length = {length} must lie between 4 and the model's sequence length of {longest}.",
    )
    return ResolvedTask(**{**vars(data), "length": length})


def _phase(phase: PhaseConfig, run: ResolvedConfig) -> ResolvedPhase:
    """The phase that follows those that `run` has."""
    key, previous = f"phases.{len(run.phases)}", run.phases[-1] if run.phases else None
    batch_size = run.train.batch_size if phase.batch_size is None else phase.batch_size
    require(batch_size >= 1, f"{key}.batch_size must be at least 1, not {batch_size}.")
    micro = min(run.train.micro_batch_size, batch_size)
    steps = _steps(phase, key, batch_size * (run.data.length or run.model.sequence_length))
    require(
        batch_size % micro == 0,
        f"train.micro_batch_size = {micro} does not divide {key}.batch_size = {batch_size}.",
    )
    optimizer = run.optimizer
    lr = optimizer.lr if phase.lr is None else phase.lr
    usual_end = min(optimizer.lr / 10, lr * phase.lr_multiple)  # as `Amounts.learning_rate` has it
    rates = {"lr": lr, "lr_end": usual_end if phase.lr_end is None else phase.lr_end}
    # A resolved phase names its end though its decay be constant, as the translated ones of the Cerebras stack do.
    plain = phase.decay == "constant" and phase.lr_end in (usual_end, lr * phase.lr_multiple)
    of_steps = dataclasses.replace(phase, steps=steps, lr_end=None if plain else phase.lr_end)
    amounts = of_steps.resolved(key, previous, linear_layers(run.model))
    found = ResolvedPhase(
        **{**vars(amounts), **rates},
        tokens=steps * batch_size * (run.data.length or run.model.sequence_length),
        s_mu_par=phase.s_mu_par,
        batch_size=batch_size,
        weight_decay=optimizer.weight_decay if phase.weight_decay is None else phase.weight_decay,
        beta2=optimizer.beta2 if phase.beta2 is None else phase.beta2,
    )
    _check_rates(found, key)
    if found.s_mu_par and found.begins_dense:
        warn_once(f"{key}.s_mu_par = true does nothing: the phase begins dense.")
    return found


def _steps(phase: PhaseConfig, key: str, step_tokens: int) -> int:
    """Steps of a phase, from whichever of steps and tokens is given; both, where they agree."""
    steps, tokens = phase.steps, phase.tokens
    if steps is None and tokens is not None:
        require(tokens >= 1, f"{key}.tokens must be at least 1, not {tokens}.")
        return max(1, round(tokens / step_tokens))
    if steps is None or tokens not in (None, steps * step_tokens):
        raise UserError(f"{key} needs steps or tokens, one of them.")
    require(steps >= 1, f"{key}.steps must be at least 1, not {steps}.")
    return steps


def _check_rates(phase: ResolvedPhase, key: str) -> None:
    peak = phase.lr * phase.lr_multiple
    require(
        0 <= phase.lr_end <= peak,
        f"{key}.lr_end = {phase.lr_end:.4g} must lie between 0 and the phase's peak, {peak:.4g} (lr · lr_multiple).",
    )
    require(0 <= phase.weight_decay < math.inf, f"{key}.weight_decay must not be negative, is {phase.weight_decay}.")
    require(0 <= phase.beta2 < 1, f"{key}.beta2 must lie in [0, 1), not {phase.beta2}.")


def written(config: ResolvedConfig) -> Config:
    """A resolved configuration as settings that say all of it, to be changed and resolved again."""
    return Config(
        name=config.name,
        run_dir=config.run_dir,
        init_from=config.init_from,
        seed=config.seed,
        start=config.start,
        model=settings_of(config.model),
        data=DataConfig(**asdict(config.data)),
        optimizer=OptimizerConfig(**asdict(config.optimizer)),
        train=TrainConfig(**asdict(config.train)),
        phases=[PhaseConfig(**{**asdict(phase), "levels": list(phase.levels)}) for phase in config.phases],
    )


def settings_of(model: ResolvedModel | shapes.Shape) -> ModelConfig:
    """A model as settings that say all of it."""
    return ModelConfig(**asdict(model))


def model_shape(model: ResolvedModel, vocab_size: int | None = None) -> shapes.Shape:
    """Shape of a configured model; `vocab_size` is the tokenizer's, for where the configuration leaves it open.

    Raises
    ------
    UserError
        If neither tells the size of the vocabulary.
    """
    vocab_size = vocab_size if model.vocab_size is None else model.vocab_size
    if vocab_size is None:
        raise UserError("model.vocab_size is not set, and no tokenizer tells it here: set it.")
    found = {field.name: getattr(model, field.name) for field in dataclasses.fields(shapes.Shape)}
    return shapes.Shape(**{**found, "vocab_size": vocab_size})


def linear_layers(model: ResolvedModel) -> dict[str, int]:
    """The layers of a configured model that can be sparse, and how many weights each has."""
    return shapes.linear_layers(model_shape(model, 1))


def amounts(config: ResolvedConfig) -> list[tuple[float, float]]:
    """(sparsity over all weights of the layers, tokens) of every stretch of a run, in order."""
    layers = linear_layers(config.model)
    return [
        (phase.mean(layers, stage.sparsity), stage.steps * phase.tokens / phase.steps)
        for phase in config.phases
        for stage in phase.stages()
    ]
