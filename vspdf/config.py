"""Every setting and its default: dataclasses, read from YAML with `key=value` overrides.

Defaults carry their reason. Training defaults are the published recipe of Cerebras-GPT (arXiv:2304.03208); those of the
switch from sparse to dense come from small-scale studies (see docs/method.md).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vspdf import cerebras, ledger
from vspdf.cerebras import INIT_METHODS
from vspdf.errors import UserError, did_you_mean

SCHEDULES = ("constant", "linear", "exp", "power", "cosine", "cycling")


@dataclass
class ModelConfig:
    """A dense GPT-2-shaped GPT. `name` starts from a preset; other keys override it."""

    name: str | None = None
    n_layer: int | None = None
    d_model: int | None = None
    n_head: int | None = None
    d_ff: int | None = None  # default 4 · d_model
    sequence_length: int | None = None
    vocab_size: int | None = None  # default: what the tokenizer needs
    activation: str = "gelu"  # exact, as in Cerebras-GPT; "gelu_tanh": GPT-2's
    init_std: float = 0.02  # published; narrow models want about 0.5 / sqrt(d_model)


@dataclass
class DataConfig:
    """Text, its tokenizer and its order."""

    # A file, a folder, FILE.jsonl, "hf:DATASET[:CONFIG]", or of the Python that runs this: "stdlib" (sources of
    # top-level modules), "stdlib-all" (all sources, tests included), "stdlib-docs" (docstrings and help topics:
    # English); several with " + " between them
    corpus: str = "stdlib"
    text_field: str = "text"  # of JSONL lines and Hugging Face rows
    # "bytes", "bpe:VOCAB_SIZE" (trained on the corpus), "gpt2:FOLDER" (vocab.json, merges.txt) or a tokenizer.json
    tokenizer: str = "bytes"
    validation_fraction: float = 0.05  # of the text, held out as whole documents
    test_fraction: float = 0.0  # likewise, for figures that no choice was made by; training and tuning never read it
    repeat: bool = False  # False: running out of unseen samples is an error
    # Fine-tuning: a file of contexts with completions instead of a corpus (see vspdf.tasks)
    path: str | None = None
    format: str = "auto"  # "dart", "webnlg", "e2e", "jsonl"
    validation_path: str | None = None  # default: validation_fraction of the examples in `path`
    length: int | None = None  # tokens of a context with its completion; default and limit: model.sequence_length
    overlong: str = "refuse"  # what is longer: "refuse", "cut" (the end of the context) or "drop"
    lower_relations: bool = False  # of triples, as the preparation script of the LoRA paper does for DART
    # Where the stream of samples begins; default 0, and after init_from where that run stopped, if it had this text
    first_sequence: int | None = None
    cache_dir: str | None = None  # default: vspdf's folder in the user's cache


@dataclass
class OptimizerConfig:
    """AdamW as published for Cerebras-GPT (arXiv:2304.03208)."""

    lr: float = 6e-4  # peak, of dense training; phases scale it
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-9
    weight_decay: float = 0.1
    clip: float = 1.0  # global gradient norm; 0: off


@dataclass
class PhaseConfig:
    """One stage of training, at one sparsity or densifying in steps. Give `steps` or `tokens`."""

    name: str | None = None  # default: "sparse 90 %" or "dense"
    sparsity: float = 0.0  # at the phase's start
    # How it falls within the phase: "constant", "linear", "exp" (density grows by a factor), "power" (cubic), "cosine",
    # or "cycling" through `levels`; weights are only ever added
    schedule: str = "constant"
    sparsity_end: float | None = None  # from the last update on; default 0, for a schedule that is not constant
    levels: list[float] = field(default_factory=list)  # of "cycling", e.g. [0.9, 0.75, 0.5, 0]
    update_every: int | None = None  # steps between updates; default: ten updates, or one per level
    layers: dict[str, float] = field(default_factory=dict)  # glob over layers to sparsity, the first match counts
    init_method: str = "random"  # of the first masks: "random", "topk", "from_zeros" or "checkerboard"
    count: str = "round"  # kept weights: numel − round(s·numel); "truncate": int((1−s)·numel), as the Cerebras stack
    steps: int | None = None
    tokens: int | None = None
    lr: float | None = None  # peak; default optimizer.lr
    lr_multiple: float = 1.0  # of `lr`; at 90 % about 3 (published, and best of 3, 5 and 8 in study "toy")
    # SµPar (arXiv:2405.15743): learning rate of sparse weights x 1/density, their init x 1/sqrt(density)
    s_mu_par: bool = False
    lr_end: float | None = None  # default: a tenth of optimizer.lr, as published
    decay: str = "linear"  # "linear", "cosine" or "constant"
    warmup_steps: int | None = None  # default: a tenth of the phase after a switch, else 5 %
    batch_size: int | None = None  # sequences a step; default train.batch_size
    weight_decay: float | None = None
    beta2: float | None = None
    moments: str = "keep"  # "keep" or "reset": Adam moments of the weights that were there before the switch
    revived_warmup: int = 0  # steps over which the updates of newly added weights ramp up; 50-100 where beta2 > 0.98


@dataclass
class TrainConfig:
    """How a step is taken and what is measured beside it."""

    batch_size: int = 8  # sequences a step
    micro_batch_size: int | None = None  # sequences at a time (gradient accumulation); default batch_size
    precision: str = "fp32"  # "fp32" or "bf16" (autocast)
    device: str = "cpu"  # or "cuda", "cuda:1"
    threads: int | None = None  # default: what torch uses
    backend: str = "auto"  # of the sparse products: "auto", "cpu", "reference", "triton"
    log_every: int = 10  # steps
    eval_every: int = 100  # steps; 0: only at the end of each phase
    eval_tokens: int = 65536  # of the validation text; 0: all of it
    sample_tokens: int = 120  # of text generated at the end of each phase; 0: none
    checkpoint_every: int = 200  # steps; 0: only at the end
    keep_checkpoints: int = 2
    measure_dense: int = 3  # dense steps timed beside each sparse phase, on the same batches; 0: off
    tensorboard: bool = False


@dataclass
class Config:
    """A whole run."""

    name: str = "run"
    run_dir: str | None = None  # default runs/NAME
    init_from: str | None = None  # a run, checkpoint or Hugging Face folder whose weights (and moments) to start from
    seed: int = 0
    start: str | None = None  # fine-tuning: the checkpoint or Hugging Face folder that it begins with
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    phases: list[PhaseConfig] = field(default_factory=list)


def load(source: str | Path, overrides: Sequence[str] = (), *, start: tuple[str, ModelConfig] | None = None) -> Config:
    """Reads a configuration, applies overrides, fills in what follows from the rest, and checks it.

    Parameters
    ----------
    source : path of a YAML file, or the name of a config that ships with vspdf ("quickstart")
    overrides : sequence of "key=value"
        Dotted keys; list items by index: ``phases.0.steps=100``.
    start : (str, ModelConfig), optional
        Fine-tuning: where the model to begin with is, and its shape; the configuration itself names none, or the same.

    Raises
    ------
    UserError
        For a missing file, an unknown key, a wrong type or an impossible value; one line that names the key.
    """
    path = find_config(source)
    return build(read_yaml(path), str(path), overrides, start=start)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, interpolations not yet resolved.

    Raises
    ------
    UserError
        If it cannot be read or is no YAML.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except OmegaConfBaseException as error:
        raise _explained(error, str(path)) from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {_first_line(error)}.") from None


def build(
    body: Any, where: str, overrides: Sequence[str] = (), *, start: tuple[str, ModelConfig] | None = None
) -> Config:
    """As `load`, from what a file holds; `where` begins error messages."""
    body = _from_cerebras(body, where, fine_tuning=start is not None)
    try:
        _check_form(body, Config, "", where)
        tree = OmegaConf.merge(OmegaConf.structured(Config), body)
    except OmegaConfBaseException as error:
        raise _explained(error, where) from None
    for override in overrides:
        key, value = parse_override(override)
        try:
            _check_path(tree, key)
            _check_form(OmegaConf.to_container(value)["value"], _hint(key), key, f"override '{override}'")  # type: ignore[call-overload,index]
            OmegaConf.update(tree, re.sub(r"\.(\d+)", r"[\1]", key), value.value)
        except OmegaConfBaseException as error:
            raise _explained(error, f"override '{override}'") from None
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise _explained(error, where) from None
    assert isinstance(config, Config)
    if start is not None:
        config.start, shape = start
        for key, value in dataclasses.asdict(shape).items():
            mine = getattr(config.model, key)
            if key != "init_std" and mine not in (None, value, getattr(ModelConfig(), key)):
                raise UserError(f"model.{key} = {mine}, but the model to start from has {value}: leave it out.")
        config.model = shape
    resolve(config)
    return config


def parse_override(override: str) -> tuple[str, DictConfig | ListConfig]:
    """The dotted key of ``key=value``, and its value under "value".

    Raises
    ------
    UserError
        If it is not of that form, or the value is no YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}' is not of the form key=value.")
    try:
        return key, OmegaConf.create(f"value: {text}") if text else OmegaConf.create({"value": ""})
    except YAMLError:
        raise UserError(f"override '{override}': its value is not valid YAML.") from None
    except OmegaConfBaseException as error:
        raise _explained(error, f"override '{override}'") from None


def _from_cerebras(body: Any, where: str, fine_tuning: bool) -> Any:
    """A whole file of the Cerebras stack, or its ``sparsity`` block beside our settings, as settings of ours."""
    if cerebras.is_cerebras(body):
        return {"name": re.sub(r"[^\w.-]", "-", Path(where).stem)} | cerebras.translate(body, where, fine_tuning)
    if not isinstance(body, dict) or "sparsity" not in body:
        return body
    body = dict(body)
    block, phases, model = body.pop("sparsity"), body.get("phases"), body.get("model")
    if not isinstance(phases, list) or not phases or not isinstance(phases[0], dict) or "sparsity" in phases[0]:
        raise UserError(f"{where}: a sparsity block goes with phases, the first of which has no sparsity of its own.")
    settings = model if isinstance(model, dict) else {}
    n_layer = settings.get("n_layer") or (ledger.model_shape(settings["name"]).n_layer if "name" in settings else 0)
    found = cerebras.sparsity(block, n_layer if isinstance(n_layer, int) else 0, where, older=True)
    seed = {"seed": found.pop("seed")} if "seed" in found else {}
    return body | seed | {"phases": [phases[0] | found, *phases[1:]]}


def shipped(folder: str = "configs") -> list[Path]:
    """Configurations, or what else is in a folder of YAML files, that come with vspdf."""
    return sorted(Path(__file__).parent.glob(f"{folder}/*.yaml"))


def find_config(source: str | Path, folder: str = "configs", what: str = "configuration") -> Path:
    """Path of a configuration given by path or by the name of one that ships with vspdf."""
    path = Path(source)
    if path.is_file():
        return path
    ours = {file.stem: file for file in shipped(folder)}
    if str(source) in ours:
        return ours[str(source)]
    if path.is_dir():
        raise UserError(f"{path} is a folder; a {what} is a YAML file.")
    near = [*ours, *(str(file) for file in path.parent.glob("*.yaml"))]
    raise UserError(f"no {what} '{source}': neither a file nor one that ships.{did_you_mean(str(source), near)}")


def to_yaml(config: Config) -> str:
    """A resolved configuration as `load` reads it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _keys(node: Any) -> list[str]:
    return [str(key) for key in node] if isinstance(node, DictConfig) else []


def _check_path(tree: Any, key: str) -> None:
    """An override must name a setting that exists."""
    node, seen = tree, ""
    for part in key.split("."):
        known = _keys(node) if not isinstance(node, ListConfig) else [str(i) for i in range(len(node))]
        if part not in known:
            what = f"{seen} has {len(known)} items, no" if isinstance(node, ListConfig) else "unknown setting"
            hint = "" if isinstance(node, ListConfig) else did_you_mean(part, known)
            raise UserError(f"{what} '{seen + '.' if seen else ''}{part}' (override {key}=...).{hint}")
        node = node[int(part)] if isinstance(node, ListConfig) else node._get_node(part)
        seen = f"{seen}.{part}" if seen else part


def _hint(key: str) -> Any:
    """Type of the setting that a dotted key names."""
    hint: Any = Config
    for part in key.split("."):
        hint = get_args(hint)[0] if get_origin(hint) is list else get_type_hints(hint)[part]
    return hint


def _check_form(value: Any, hint: Any, key: str, where: str) -> None:
    """Mappings, lists and keys must be those of the dataclasses; what single values are is left to OmegaConf."""
    named = f"'{key}' must be" if key else "expected"
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where}: {named} a mapping of settings, not {_described(value)}.")
        known = get_type_hints(hint)
        for name, item in value.items():
            path = f"{key}.{name}" if key else str(name)
            if name not in known:
                raise UserError(f"{where}: unknown setting '{path}'.{did_you_mean(str(name), known)}")
            _check_form(item, known[name], path, where)
    elif get_origin(hint) is list:
        if not isinstance(value, list):
            raise UserError(f"{where}: {named} a list, not {_described(value)}.")
        for i, item in enumerate(value):
            _check_form(item, get_args(hint)[0], f"{key}.{i}", where)
    elif value is None and type(None) not in get_args(hint):
        raise UserError(f"{where}: '{key}' must not be empty.")


def _described(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return kinds.get(type(value), f"'{value}'")


def _explained(error: OmegaConfBaseException, where: str) -> UserError:
    """OmegaConf's error in one line that names the key."""
    key = re.sub(r"\[(\d+)\]", r".\1", error.full_key or str(error.key or ""))
    return UserError(f"{where}: {f'{key!r}: ' if key else ''}{_first_line(error)}.")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _one_of(key: str, value: str, known: Iterable[str]) -> None:
    known = list(known)
    _require(value in known, f"{key} = '{value}' is not known.{did_you_mean(value, known)}")


def check_device(key: str, name: str) -> None:
    """Whether a device has a name that is known, be it here or not."""
    known = bool(re.fullmatch(r"cpu|cuda(:\d+)?", name))
    _require(known, f"{key} = '{name}' is not known.{did_you_mean(name, ('cpu', 'cuda', 'cuda:1'))}")


def model_shape(model: ModelConfig, vocab_size: int | None = None) -> ledger.Shape:
    """Shape of the configured model; `vocab_size` is the tokenizer's, for where the configuration leaves it open."""
    vocab_size = model.vocab_size or vocab_size
    assert vocab_size and model.n_layer and model.d_model and model.n_head and model.d_ff and model.sequence_length
    return ledger.Shape(model.n_layer, model.d_model, model.n_head, model.d_ff, vocab_size, model.sequence_length)


def resolve(config: Config) -> None:
    """Fills in, in place, what follows from other settings, and checks every value.

    Raises
    ------
    UserError
        Naming the setting, its value and what was expected.
    """
    resolve_model(config.model)
    train, optimizer = config.train, config.optimizer
    _one_of("train.precision", train.precision, ("fp32", "bf16"))
    _one_of("train.backend", train.backend, ("auto", "cpu", "reference", "triton"))
    check_device("train.device", train.device)
    for backend, device in (("cpu", "cuda"), ("triton", "cpu")):
        _require(
            train.backend != backend or not train.device.startswith(device),
            f"train.backend = '{backend}' does not run on train.device = '{train.device}'.",
        )
    train.micro_batch_size = train.batch_size if train.micro_batch_size is None else train.micro_batch_size
    for key in ("batch_size", "micro_batch_size", "log_every", "keep_checkpoints"):
        _require(getattr(train, key) >= 1, f"train.{key} must be at least 1, not {getattr(train, key)}.")
    for key in ("eval_every", "eval_tokens", "sample_tokens", "checkpoint_every", "measure_dense"):
        _require(getattr(train, key) >= 0, f"train.{key} must not be negative, is {getattr(train, key)}.")
    _require(train.threads is None or train.threads >= 1, f"train.threads must be at least 1, not {train.threads}.")
    _require(0 < optimizer.lr < math.inf, f"optimizer.lr must be positive, not {optimizer.lr}.")
    for key in ("eps", "weight_decay", "clip"):
        value = getattr(optimizer, key)
        _require(0 <= value < math.inf, f"optimizer.{key} must not be negative, is {value}.")
    _require(config.seed >= 0, f"seed must not be negative, is {config.seed}.")
    first = config.data.first_sequence
    _require(first is None or first >= 0, f"data.first_sequence must not be negative, is {first}.")
    for key in ("beta1", "beta2"):
        _require(
            0 <= getattr(optimizer, key) < 1, f"optimizer.{key} must lie in [0, 1), not {getattr(optimizer, key)}."
        )
    fraction = config.data.validation_fraction
    _require(0 < fraction < 1, f"data.validation_fraction must lie between 0 and 1, is {fraction}.")
    test = config.data.test_fraction
    _require(0 <= test < 1 - fraction, f"data.test_fraction must lie in [0, {1 - fraction:.4g}), is {test}.")
    _require(
        bool(re.fullmatch(r"\w[\w.-]*", config.name)), f"name = '{config.name}' must be usable as a folder's name."
    )
    _require(
        bool(config.phases), "phases: at least one phase is needed, e.g. [{sparsity: 0.9, steps: 250}, {steps: 50}]."
    )
    config.run_dir = config.run_dir or f"runs/{config.name}"
    _resolve_task(config)
    for i, phase in enumerate(config.phases):
        _resolve_phase(config, i, phase)


def _resolve_task(config: Config) -> None:
    """Fine-tuning: a task to learn and a model to start from, both or neither."""
    data, longest = config.data, config.model.sequence_length
    _require(
        config.start is None or data.path is not None,
        "data.path is not set: give the task's file, data.path=FILE (DART, WebNLG, E2E, or JSONL).",
    )
    if data.path is None:
        return
    _require(config.init_from is None, "init_from is for pre-training; fine-tuning names its checkpoint first.")
    _require(config.start is not None, "data.path is for fine-tuning: vspdf finetune CHECKPOINT CONFIG data.path=FILE.")
    _one_of("data.format", data.format, ("auto", "dart", "webnlg", "e2e", "jsonl"))
    _one_of("data.overlong", data.overlong, ("refuse", "cut", "drop"))
    assert longest is not None
    data.length = longest if data.length is None else data.length
    _require(
        4 <= data.length <= longest,
        f"data.length = {data.length} must lie between 4 and the model's sequence length of {longest}.",
    )
    _require(not any(phase.sparsity for phase in config.phases), "fine-tuning is dense: phases must have no sparsity.")


def resolve_model(model: ModelConfig) -> None:
    """Fills in, in place, what a preset or other keys tell of a model, and checks its sizes."""
    if model.name is not None:
        preset = ledger.model_shape(model.name)
        for key, value in dataclasses.asdict(preset).items():
            if getattr(model, key) is None:
                setattr(model, key, value)
    for key in ("n_layer", "d_model", "n_head", "sequence_length"):
        value = getattr(model, key)
        _require(
            value is not None,
            f"model.{key} is not set; give it, or model.name for a preset "
            "(fine-tuning: vspdf finetune CHECKPOINT CONFIG).",
        )
        _require(value >= 1, f"model.{key} must be at least 1, not {value}.")
    assert model.d_model is not None and model.n_head is not None
    model.d_ff = 4 * model.d_model if model.d_ff is None else model.d_ff
    _require(model.d_ff >= 1, f"model.d_ff must be at least 1, not {model.d_ff}.")
    _require(
        model.vocab_size is None or model.vocab_size >= 1,
        f"model.vocab_size must be at least 1, not {model.vocab_size}.",
    )
    _require(
        model.d_model % model.n_head == 0,
        f"model.n_head = {model.n_head} does not divide model.d_model = {model.d_model}.",
    )
    _one_of("model.activation", model.activation, ("gelu", "gelu_tanh"))
    _require(0 < model.init_std < math.inf, f"model.init_std must be positive, not {model.init_std}.")


# The layers of our GPT that can be sparse, and their weights in units of d² and d·d_ff.
_LAYERS = {"attn.c_attn": (3, 0), "attn.c_proj": (1, 0), "mlp.c_fc": (0, 1), "mlp.c_proj": (0, 1)}


def layer_sparsities(model: ModelConfig, phase: PhaseConfig, sparsity: float | None = None) -> dict[str, float]:
    """Sparsity of each layer in a phase, or where the phase's own has come to be `sparsity`."""
    amount = phase.sparsity if sparsity is None else sparsity
    names = [f"h.{i}.{name}" for i in range(model.n_layer or 0) for name in _LAYERS]
    return {name: next((s for glob, s in phase.layers.items() if fnmatchcase(name, glob)), amount) for name in names}


def mean_sparsity(model: ModelConfig, phase: PhaseConfig, sparsity: float | None = None) -> float:
    """Sparsity over all weights of those layers."""
    if not phase.layers:
        return phase.sparsity if sparsity is None else sparsity
    assert model.d_model and model.d_ff
    masked = total = 0.0
    for name, amount in layer_sparsities(model, phase, sparsity).items():
        squares, wide = _LAYERS[name.split(".", 2)[2]]
        weights = squares * model.d_model**2 + wide * model.d_model * model.d_ff
        masked, total = masked + amount * weights, total + weights
    return masked / total


def _end(phase: PhaseConfig) -> float:
    return phase.sparsity if phase.sparsity_end is None else phase.sparsity_end


def resolve_amounts(model: ModelConfig, key: str, phase: PhaseConfig, previous: PhaseConfig | None) -> None:
    """Fills in, in place, the sparsities of a phase, and checks that no weight is dropped within it or at its start.

    Raises
    ------
    UserError
        Naming the setting under `key`.
    """
    _one_of(f"{key}.schedule", phase.schedule, SCHEDULES)
    _one_of(f"{key}.init_method", phase.init_method, INIT_METHODS)
    _one_of(f"{key}.count", phase.count, ("round", "truncate"))
    assert phase.steps is not None
    cycling = phase.schedule == "cycling"
    _require(cycling or not phase.levels, f"{key}.levels belong to schedule: cycling, not to {phase.schedule}.")
    if cycling:
        _require(bool(phase.levels), f"{key}.levels: schedule: cycling needs them, e.g. [0.9, 0.75, 0.5, 0].")
        for level in phase.levels:
            _require(0 <= level < 1, f"{key}.levels must lie in [0, 1), not {level}.")
        phase.sparsity, phase.sparsity_end = phase.levels[0], min(phase.levels)
    _require(0 <= phase.sparsity < 1, f"{key}.sparsity must lie in [0, 1), not {phase.sparsity}.")
    if phase.schedule == "constant":
        _require(
            phase.sparsity_end in (None, phase.sparsity) and phase.update_every is None,
            f"{key}: sparsity_end and update_every need a schedule that is not constant, e.g. linear.",
        )
    else:
        phase.sparsity_end = 0.0 if phase.sparsity_end is None else phase.sparsity_end
        _require(
            0 <= phase.sparsity_end <= phase.sparsity,
            f"{key}.sparsity_end = {phase.sparsity_end} must lie between 0 and sparsity = {phase.sparsity}: "
            "weights are only ever added.",
        )
        _require(not phase.layers, f"{key}: layers with sparsities of their own need schedule: constant.")
        if phase.update_every is None:
            phase.update_every = -(-phase.steps // (len(phase.levels) or 10))
        _require(
            1 <= phase.update_every < phase.steps,
            f"{key}.update_every = {phase.update_every} must lie between 1 and the phase's {phase.steps} steps.",
        )
        _require(
            phase.revived_warmup <= phase.update_every,
            f"{key}.revived_warmup = {phase.revived_warmup} must end before the next update, after "
            f"{phase.update_every} steps.",
        )
        if cycling:
            seen = [phase.levels[k % len(phase.levels)] for k in range(-(-phase.steps // phase.update_every))]
            rises = next(((a, b) for a, b in pairwise(seen) if b > a), None)
            _require(
                rises is None,
                f"{key}.levels go from {rises[0] if rises else 0} up to {rises[1] if rises else 0}: that would drop "
                "weights, and weights are only ever added (dropping and growing anew is not offered).",
            )
    for glob, amount in phase.layers.items():
        _require(0 <= amount < 1, f"{key}.layers: the sparsity of '{glob}' must lie in [0, 1), not {amount}.")
        names = list(layer_sparsities(model, phase))
        _require(
            any(fnmatchcase(name, glob) for name in names),
            f"{key}.layers: '{glob}' matches no layer.{did_you_mean(glob, names)}",
        )
    _require(
        previous is None or bool(phase.layers or previous.layers) or phase.sparsity <= _end(previous),
        f"{key}.sparsity = {phase.sparsity} is above the phase before ({_end(previous) if previous else 0}): "
        "weights are only ever added.",
    )
    if previous and (phase.layers or previous.layers):
        old = layer_sparsities(model, previous, _end(previous))
        for name, amount in layer_sparsities(model, phase).items():
            _require(
                amount <= old[name],
                f"{key}: layer '{name}' would go from sparsity {old[name]} to {amount}: weights are only ever added.",
            )


def _resolve_phase(config: Config, i: int, phase: PhaseConfig) -> None:
    key, previous = f"phases.{i}", config.phases[i - 1] if i else None
    phase.batch_size = config.train.batch_size if phase.batch_size is None else phase.batch_size
    _require(phase.batch_size >= 1, f"{key}.batch_size must be at least 1, not {phase.batch_size}.")
    step_tokens = phase.batch_size * (config.data.length or config.model.sequence_length)  # type: ignore[operator]
    _require((phase.steps is None) != (phase.tokens is None) or phase.tokens == (phase.steps or 0) * step_tokens,
             f"{key} needs steps or tokens, one of them.")  # fmt: skip
    _require(phase.tokens is None or phase.tokens >= 1, f"{key}.tokens must be at least 1, not {phase.tokens}.")
    if phase.steps is None:
        phase.steps = max(1, round(phase.tokens / step_tokens))  # type: ignore[operator]
    _require(phase.steps >= 1, f"{key}.steps must be at least 1, not {phase.steps}.")
    phase.tokens = phase.steps * step_tokens
    assert config.train.micro_batch_size is not None
    micro = min(config.train.micro_batch_size, phase.batch_size)
    _require(
        phase.batch_size % micro == 0,
        f"train.micro_batch_size = {micro} does not divide {key}.batch_size = {phase.batch_size}.",
    )
    resolve_amounts(config.model, key, phase, previous)
    phase.name = phase.name or (f"sparse {phase.sparsity:.4g}" if phase.sparsity else "dense")
    _one_of(f"{key}.decay", phase.decay, ("linear", "cosine", "constant"))
    _one_of(f"{key}.moments", phase.moments, ("keep", "reset"))
    phase.lr = config.optimizer.lr if phase.lr is None else phase.lr
    phase.lr_end = config.optimizer.lr / 10 if phase.lr_end is None else phase.lr_end
    phase.weight_decay = config.optimizer.weight_decay if phase.weight_decay is None else phase.weight_decay
    phase.beta2 = config.optimizer.beta2 if phase.beta2 is None else phase.beta2
    if phase.warmup_steps is None:
        phase.warmup_steps = phase.steps // (10 if previous else 20)
    peak = phase.lr * phase.lr_multiple
    _require(phase.lr > 0 and phase.lr_multiple > 0 and peak < math.inf, f"{key}: lr and lr_multiple must be positive.")
    _require(
        0 <= phase.lr_end <= peak,
        f"{key}.lr_end = {phase.lr_end:.4g} must lie between 0 and the phase's peak, {peak:.4g} (lr · lr_multiple).",
    )
    _require(
        0 <= phase.warmup_steps <= phase.steps,
        f"{key}.warmup_steps = {phase.warmup_steps} must lie between 0 and the phase's {phase.steps} steps.",
    )
    _require(phase.revived_warmup >= 0, f"{key}.revived_warmup must not be negative, is {phase.revived_warmup}.")
    _require(0 <= phase.weight_decay < math.inf, f"{key}.weight_decay must not be negative, is {phase.weight_decay}.")
    _require(0 <= phase.beta2 < 1, f"{key}.beta2 must lie in [0, 1), not {phase.beta2}.")
