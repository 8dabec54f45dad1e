"""What a run will cost before it is run: phases, tokens, FLOPs, memory, time; and the other way, the run for a wish.

A plan compares against one dense run (`Plan.dense`) and says which. Arithmetic only, without torch; time on this
machine is measured by `vspdf.calibrate`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from vspdf import config as configuration
from vspdf import ledger, schedule
from vspdf.calibrate import Calibration, calibrate
from vspdf.config import Config, ModelConfig, PhaseConfig
from vspdf.errors import UserError, did_you_mean, near_path
from vspdf.ledger import Shape

SPLITS = ("add-on", "fixed-budget")
SPARSITY, EFFECTIVE = 0.9, 0.75  # of the published Variable SPDF recipe
LR_MULTIPLE = 3.0  # of both its stages: 3.6e-4 against the dense run's 1.2e-4
WISHED = (0.9, 0.95, 0.98, 0.99)  # first stages tried for a wish, mildest first; nobody is known to train beyond
TOKENS_PER_PARAMETER = 20  # compute-optimal (arXiv:2203.15556), as Cerebras-GPT was trained

STATE_BYTES = 16  # a weight, its gradient and two AdamW moments, float32
PATTERN_BYTES = 1 / 8  # one bit for every position, kept or not
# What kernel plans take for every kept weight once all three products have run (AVX-512): 28 at 50 %, 33 at 90 %, 48 at
# 99 %, measured with `Plan.nbytes` on layers of 512² to 4096².
PLAN_BYTES = 33


class Published(NamedTuple):
    """The dense run of a published model: sequences a step, steps, peak learning rate."""

    batch_size: int
    steps: int
    lr: float


# Cerebras-GPT, arXiv:2304.03208. The 13B run changed its batch on the way: its tokens, at the batch of 6.7B.
PUBLISHED: dict[str, Published] = {
    "cerebras-gpt-111m": Published(120, 9_037, 6e-4),
    "cerebras-gpt-256m": Published(264, 9_468, 6e-4),
    "cerebras-gpt-590m": Published(264, 21_836, 2e-4),
    "cerebras-gpt-1.3b": Published(528, 24_334, 2e-4),
    "cerebras-gpt-2.7b": Published(528, 49_041, 2e-4),
    "cerebras-gpt-6.7b": Published(1040, 62_522, 1.2e-4),
    "cerebras-gpt-13b": Published(1040, 120_709, 1.2e-4),
}


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A phase, or the dense run. `state_bytes` is the whole model's, as the function of that name counts it."""

    name: str
    sparsity: float
    steps: int
    tokens: int
    flops: float
    state_bytes: float
    step_seconds: float | None  # None: not measured

    @property
    def seconds(self) -> float | None:
        return None if self.step_seconds is None else self.step_seconds * self.steps


@dataclass(frozen=True)
class Plan:
    """What `plan` found. `config` is the configuration that trains it; `notes` are sentences for the reader."""

    model: str
    shape: Shape
    convention: str
    causal: bool
    dense: Stage
    baseline: str  # which dense run that is
    phases: list[Stage]
    config: Config
    calibration: Calibration | None
    notes: list[str]

    @property
    def tokens(self) -> int:
        return sum(phase.tokens for phase in self.phases)

    @property
    def flops(self) -> float:
        """Of the planned run, under `convention`."""
        return sum(phase.flops for phase in self.phases)

    @property
    def flops_saved_fraction(self) -> float:
        return 1 - self.flops / self.dense.flops

    @property
    def effective_sparsity(self) -> float:
        """Weight-FLOPs saved against the dense run."""
        return schedule.effective_sparsity(self.dense.tokens, self._stages())

    @property
    def time_average_sparsity(self) -> float:
        return schedule.time_average_sparsity(self._stages())

    @property
    def sparse_fraction(self) -> float:
        """Share of the run's tokens that its sparsest phase takes."""
        most = max(phase.sparsity for phase in self.phases)
        return sum(phase.tokens for phase in self.phases if phase.sparsity == most) / self.tokens

    @property
    def token_ratio(self) -> float:
        return self.tokens / self.dense.tokens

    @property
    def state_bytes(self) -> float:
        """Peak over the phases."""
        return max(phase.state_bytes for phase in self.phases)

    @property
    def seconds(self) -> float | None:
        """On this machine; None: not measured."""
        parts = [phase.seconds for phase in self.phases]
        return None if None in parts else sum(part for part in parts if part is not None)

    def _stages(self) -> list[tuple[float, float]]:
        return [(phase.sparsity, phase.tokens) for phase in self.phases]

    def by_convention(self) -> dict[str, dict[str, float]]:
        """``{convention: {"dense", "planned", "saved_fraction"}}``, FLOPs."""
        table = {}
        for name in ledger.CONVENTIONS:
            dense, planned = (
                ledger.training_flops(self.shape, stages, convention=name, causal=self.causal)
                for stages in ([(0.0, self.dense.tokens)], self._stages())
            )
            table[name] = {"dense": dense, "planned": planned, "saved_fraction": 1 - planned / dense}
        return table

    def _cs2(self) -> dict[str, Any] | None:
        try:
            return on_cs2(self)
        except UserError:
            return None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "parameters": self.shape.parameters,
            "convention": self.convention,
            "causal": self.causal,
            "dense_run": {**asdict(self.dense), "origin": self.baseline},
            "phases": [asdict(phase) for phase in self.phases],
            "flops": {"dense": self.dense.flops, "planned": self.flops},
            "flops_saved_fraction": self.flops_saved_fraction,
            "flops_by_convention": self.by_convention(),
            "effective_sparsity": self.effective_sparsity,
            "time_average_sparsity": self.time_average_sparsity,
            "sparse_fraction": self.sparse_fraction,
            "token_ratio": self.token_ratio,
            "state_bytes": {"dense": self.dense.state_bytes, "planned": self.state_bytes},
            "seconds": {"dense": self.dense.seconds, "planned": self.seconds} if self.calibration else None,
            "calibration": asdict(self.calibration) if self.calibration else None,
            "cs2": self._cs2(),
            "notes": self.notes,
        }


def plan(
    model: str | Path,
    *,
    sparsity: float | None = None,
    effective: float | None = None,
    split: str | None = None,
    phases: Sequence[tuple[float, int]] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    convention: str = "vspdf",
    causal: bool = False,
    save: float | None = None,
    memory: float | None = None,
    hours: float | None = None,
    time: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Plans a run against its dense run.

    Without `sparsity`, `effective`, `phases` or a wish: a configuration's own phases, else the published 0.9 and 0.75.

    Parameters
    ----------
    model : str
        A key of `ledger.MODELS`, a configuration of ours (path or shipped name), or a Hugging Face folder.
    sparsity : float in [0, 1)
        Of the first stage. Alone: of the whole run, as in SPDF.
    effective : float
        Weight-FLOPs to save against the dense run; the second stage, dense, takes what is left.
    split : {"add-on", "fixed-budget"}
        As many sparse steps as the dense run has and dense ones on top (published, the default), or the dense run's
        steps in all.
    phases : sequence of (sparsity, steps)
        Explicit stages, any number, each at most as sparse as the one before.
    steps, batch_size : int
        Of the dense run. Default: the published run, the tokens of the phases given, or 20 tokens a parameter.
    convention : str
        A key of `ledger.CONVENTIONS`.
    causal : bool
        Count half of the attention products.
    save : float in (0, 1)
        Wish: this fraction of the dense run's FLOPs is saved, under `convention`.
    memory : float
        Wish: the training state fits into so many gigabytes (10⁹ bytes) in every phase.
    hours : float
        Wish: the run ends within so many hours on this machine; measures.
    time : bool
        Measure this machine's speed (`calibrate`): seconds; at billions of parameters most of a minute.
    progress : callable
        Receives a line at a time while measuring.

    Raises
    ------
    UserError
        For an unknown model, contradicting arguments, impossible values, or a wish that cannot come true; the message
        names the nearest that can.
    """
    if split is not None and phases is not None:
        raise UserError(f"phases leave nothing to split: give them, or split = '{split}'.")
    split = "add-on" if split is None else split
    _check_arguments(sparsity, effective, split, phases, save, memory, hours, steps, batch_size)
    name, config = _source(model)
    shape = _shape(config)
    own = bool(config.phases) and sparsity is effective is phases is save is memory is hours is None
    if batch_size and config.phases:
        raise UserError(f"the batch size of {model} is in that file (train.batch_size): --batch-size is for models.")
    planned = sum(n for _, n in phases) if phases else None
    dense_steps, baseline = _dense_run(config, shape, steps, batch_size, planned)
    step_tokens = config.train.batch_size * shape.sequence_length
    run = _Wish(shape, dense_steps, step_tokens, split, sparsity, effective, convention, causal, progress)

    if not own:
        if phases is not None:
            stages = list(phases)
        elif save is not None:
            stages = run.save(save)
        elif memory is not None:
            stages = run.memory(memory * 1e9)
        elif hours is not None:
            stages = run.hours(hours)
        else:
            stages = run.split()
        multiple = LR_MULTIPLE if any(s for s, _ in stages) else 1.0
        config.phases = [PhaseConfig(sparsity=s, steps=n, lr_multiple=multiple) for s, n in stages if n]
        configuration.resolve(config)
    if time:
        run.measure([
            configuration.mean_sparsity(config.model, p, s.sparsity) for p in config.phases for s in schedule.stages(p)
        ])  # fmt: skip

    def stage(name: str, s: float, steps: int, tokens: int) -> Stage:
        flops = ledger.training_flops(shape, [(s, tokens)], convention=convention, causal=causal)
        seconds = run.calibration.step_seconds(shape, s, tokens // steps) if run.calibration else None
        return Stage(name, s, steps, tokens, flops, state_bytes(shape, s), seconds)

    return Plan(
        name, shape, convention, causal,
        stage("dense run", 0.0, dense_steps, dense_steps * step_tokens), baseline,
        [
            stage(f"{p.name} {s.sparsity:.4g}" if len(schedule.stages(p)) > 1 else p.name or "",
                  configuration.mean_sparsity(config.model, p, s.sparsity),
                  s.steps, s.steps * (p.tokens or 0) // (p.steps or 1))
            for p in config.phases
            for s in schedule.stages(p)
        ],
        config, run.calibration, run.notes,
    )  # fmt: skip


def on_cs2(found: Plan) -> dict[str, Any]:
    """Simulated seconds of the plan and of its dense run on one CS-2; `low`, `central`, `high` as speed-ups.

    Raises
    ------
    UserError
        If the model's activations do not fit the wafer.
    """
    from vspdf.simulator import estimates, machine
    from vspdf.simulator.step import Model

    wafer, batch = machine.load(), found.config.train.batch_size
    steps = {}
    for sparsity in {phase.sparsity for phase in found.phases}:
        model = Model.uniform(found.shape, batch, sparsity)
        steps[sparsity] = estimates.simulate_step(wafer, model, sensitivity=False)
    some = next(iter(steps.values()))
    second = lambda sparsity, key: steps[sparsity]["seconds"][some["clock"]]["sparse"][key]  # noqa: E731
    return {
        "machine": some["machine"],
        "clock": some["clock"],
        "central": some["central"],
        "step_seconds": [second(phase.sparsity, "central") for phase in found.phases],
        "seconds": {
            "dense": found.dense.steps * some["seconds"][some["clock"]]["dense"],
            "planned": {
                key: sum(phase.steps * second(phase.sparsity, key) for phase in found.phases)
                for key in ("low", "central", "high")
            },
        },
    }


def state_bytes(shape: Shape, sparsity: float) -> float:
    """Training state of the whole model: float32 weights, gradients, AdamW moments; patterns and plans where sparse."""
    if not sparsity:
        return STATE_BYTES * shape.parameters
    kept = (STATE_BYTES + PLAN_BYTES) * (1 - sparsity) + PATTERN_BYTES
    return STATE_BYTES * (shape.parameters - shape.linear) + kept * shape.linear


def _check_arguments(
    sparsity: float | None,
    effective: float | None,
    split: str,
    phases: Sequence[tuple[float, int]] | None,
    save: float | None,
    memory: float | None,
    hours: float | None,
    steps: int | None,
    batch_size: int | None,
) -> None:
    if split not in SPLITS:
        raise UserError(f"unknown split '{split}'.{did_you_mean(split, SPLITS)}")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise UserError(f"sparsity must lie in [0, 1), not {sparsity}.")
    if effective is not None and not 0 <= effective < 1:
        raise UserError(f"effective sparsity must lie in [0, 1), not {effective}.")
    wishes = {"save": save, "memory": memory, "hours": hours}
    given = [wish for wish, value in wishes.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"one wish at a time: {' and '.join(given)} were given.")
    if given and phases is not None:
        raise UserError(f"phases say all that {given[0]} would find out: give one of them.")
    if phases is not None and (sparsity is not None or effective is not None):
        raise UserError("phases leave nothing to split: give them, or sparsity and effective sparsity.")
    if effective is not None and (save is not None or hours is not None):
        raise UserError(f"effective sparsity is what {given[0]} finds: give one of them.")
    if save is not None and not 0 < save < 1:
        raise UserError(f"save must lie between 0 and 1 (a fraction of the dense run's FLOPs), not {save}.")
    for what, value in {"memory": memory, "hours": hours, "steps": steps, "batch size": batch_size}.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{what} must be positive, not {value}.")


@dataclass
class _Wish:
    """Ways to stages (sparsity, steps) for one model and dense run."""

    shape: Shape
    dense_steps: int
    step_tokens: int
    how: str  # one of SPLITS
    sparsity: float | None
    effective: float | None
    convention: str
    causal: bool
    progress: Callable[[str], None]
    calibration: Calibration | None = None
    notes: list[str] = field(default_factory=list)

    def split(self) -> list[tuple[float, int]]:
        """By effective sparsity."""
        if self.effective is None and self.sparsity is not None:
            return [(self.sparsity, self.dense_steps)]
        sparsity = SPARSITY if self.sparsity is None else self.sparsity
        effective = EFFECTIVE if self.effective is None else self.effective
        function = schedule.split_add_on if self.how == "add-on" else schedule.split_fixed_budget
        sparse, dense = function(self.dense_steps, effective, sparsity)
        return [(sparsity, sparse), (0.0, dense)]

    def save(self, fraction: float) -> list[tuple[float, int]]:
        cost = lambda s: ledger.flops_per_token(self.shape, s, self.convention, self.causal)  # noqa: E731
        dense = self.dense_steps * cost(0.0)
        stages = self._within(cost, (1 - fraction) * dense, self._candidates())
        if stages:
            return stages
        most = self._candidates()[-1]
        limit = "considered" if self.sparsity is None else "at that sparsity"
        raise UserError(
            f"saving {fraction:.4g} of the FLOPs (convention {self.convention}) is not possible: a run that stays at "
            f"sparsity {most:.4g} saves {1 - cost(most) / cost(0.0):.4f}, the most {limit}."
        )

    def hours(self, hours: float) -> list[tuple[float, int]]:
        budget, candidates = hours * 3600, self._candidates()
        for measured in (candidates[:1], candidates):  # the others take their time: only where they are needed
            self.measure(measured)
            if self.dense_steps * self._step_seconds(0.0) <= budget:
                self.notes.append("The dense run itself fits into that time: nothing has to be sparse.")
                return [(0.0, self.dense_steps)]
            stages = self._within(self._step_seconds, budget, measured)
            if stages:
                return stages
        fastest = min((0.0, *candidates), key=self._step_seconds)
        seconds = self._step_seconds(fastest)
        raise UserError(
            f"finishing in {hours:.4g} hours is not possible here: the fastest found, sparsity {fastest:.4g} "
            f"throughout, takes {self.dense_steps * seconds / 3600:.4g}; {hours:.4g} hours are enough "
            f"for {math.floor(budget / seconds):,} of {self.dense_steps:,} steps (--steps)."
        )

    def _step_seconds(self, sparsity: float) -> float:
        assert self.calibration is not None
        return self.calibration.step_seconds(self.shape, sparsity, self.step_tokens)

    def memory(self, budget: float) -> list[tuple[float, int]]:
        """The mildest sparsity whose state fits, to the end; with `effective`, a sparser first stage before it."""
        shape = self.shape
        if state_bytes(shape, 0.0) <= budget:
            self.notes.append("The dense model's training state fits as well: memory does not ask for sparsity.")
            return self.split()
        most = WISHED[-1]
        if state_bytes(shape, most) > budget:
            raise UserError(
                f"a training state of {budget / 1e9:.4g} GB is not possible: at sparsity {most} it is "
                f"{state_bytes(shape, most) / 1e9:.4g} GB, of which {self._fixed() / 1e9:.4g} GB are never sparse "
                f"(embeddings, norms, biases; float32, AdamW)."
            )
        kept = (budget - self._fixed()) / shape.linear - PATTERN_BYTES
        least = math.ceil((1 - kept / (STATE_BYTES + PLAN_BYTES)) * 1000 - 1e-9) / 1000
        if self.sparsity is not None and self.sparsity < least:
            raise UserError(
                f"a training state of {budget / 1e9:.4g} GB is not possible at sparsity {self.sparsity}, which takes "
                f"{state_bytes(shape, self.sparsity) / 1e9:.4g} GB: {least} is the least that fits."
            )
        self.notes.append(f"At least {least} of the projection and FFN weights have to stay away to the end.")
        if self.effective is None:
            return [(least if self.sparsity is None else self.sparsity, self.dense_steps)]
        first = max(SPARSITY, least) if self.sparsity is None else self.sparsity
        if self.effective > first:
            raise UserError(f"an effective sparsity of {self.effective} cannot come from a first stage at {first}.")
        stages = self._fit(lambda s: 1 - s, (1 - self.effective) * self.dense_steps, first, least)
        assert stages is not None
        return stages

    def measure(self, sparsities: Sequence[float]) -> None:
        """Speed at these sparsities, unless known."""
        wanted = sorted({s for s in sparsities if s})
        if self.calibration is None or not set(wanted) <= self.calibration.block_seconds.keys():
            self.calibration = calibrate(self.shape, wanted, self.step_tokens, self.progress)

    def _fixed(self) -> float:
        return STATE_BYTES * (self.shape.parameters - self.shape.linear)

    def _candidates(self) -> tuple[float, ...]:
        return WISHED if self.sparsity is None else (self.sparsity,)

    def _within(
        self, cost: Callable[[float], float], budget: float, candidates: Sequence[float]
    ) -> list[tuple[float, int]] | None:
        """Stages for a budget, from the mildest first stage that leaves room."""
        return next(filter(None, (self._fit(cost, budget, first, 0.0) for first in candidates)), None)

    def _fit(
        self, cost: Callable[[float], float], budget: float, first: float, last: float
    ) -> list[tuple[float, int]] | None:
        """As many steps at `last` as a budget allows after those at `first`; None if it is less than `first` takes."""
        steps, a, b = self.dense_steps, cost(first), cost(last)
        left = budget - steps * a
        if left < -1e-9 * budget:
            return None
        if self.how == "add-on" or first == last:
            return [(first, steps), (last, math.floor(max(0.0, left) / b + 1e-9) if first != last else 0)]
        sparse = max(0, math.ceil((steps * b - budget) / (b - a) - 1e-9))
        return [(first, sparse), (last, steps - sparse)]


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
    if name in ledger.MODELS:
        return name, _template(ModelConfig(name=name), name)
    if path.is_dir() and name:  # "" would be the current directory
        if not (path / "config.json").is_file():
            raise UserError(f"'{model}' holds no config.json: expected a Hugging Face folder.")
        return path.resolve().name, _from_hugging_face(path)
    if not path.is_file() and name not in {file.stem for file in configuration.shipped()}:
        known = [*ledger.MODELS, *(file.stem for file in configuration.shipped())]
        hint = (name and near_path(path)) or did_you_mean(name, known)
        raise UserError(f"unknown model '{model}': neither a name, a configuration nor a Hugging Face folder.{hint}")
    config = configuration.load(path if path.is_file() else name)
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
    configuration.resolve_model(model)
    config.data.tokenizer = "bpe:8192" if (model.vocab_size or 0) >= 8192 else "bytes"
    config.optimizer.lr = _nearest(_shape(config))[1].lr
    return config


def _shape(config: Config) -> Shape:
    """Shape of the configured model; where the tokenizer decides on the vocabulary, by its name."""
    text = config.data.tokenizer
    size = 257 if text == "bytes" else int(text[4:]) if re.fullmatch(r"bpe:\d+", text) else None
    if config.model.vocab_size is None and size is None:
        raise UserError(f"model.vocab_size is not set and tokenizer '{text}' does not tell it by name: set it to plan.")
    return configuration.model_shape(config.model, size)


def _nearest(shape: Shape) -> tuple[str, Published]:
    """Published run of the model nearest in size."""
    distance = lambda name: abs(math.log(ledger.MODELS[name].parameters / shape.parameters))  # noqa: E731
    name = min(PUBLISHED, key=distance)
    return name, PUBLISHED[name]


def _dense_run(
    config: Config, shape: Shape, steps: int | None, batch_size: int | None, planned: int | None
) -> tuple[int, str]:
    """Steps of the dense run to compare with, and where they come from; fills in the batch of a model's template.

    `planned` are the steps of phases that were asked for.
    """
    name = config.model.name or ""
    published = PUBLISHED.get(name) if shape == ledger.MODELS.get(name) else None
    near, run = _nearest(shape)
    if not config.phases:
        tokens = run.batch_size * ledger.MODELS[near].sequence_length
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


# ---------------------------------------------------------------------------------------------------------------------
# The configuration that trains it
# ---------------------------------------------------------------------------------------------------------------------


def write(found: Plan, path: str | Path) -> None:
    """Writes the YAML that `vspdf train` runs: what differs from the defaults and does not follow from other settings.

    Raises
    ------
    UserError
        If the file exists or cannot be written.
    """
    path = Path(path)
    config = copy.deepcopy(found.config)
    if re.fullmatch(r"\w[\w.-]*", path.stem):
        config.name, config.run_dir = path.stem, None
    _drop_what_follows(config)
    body = OmegaConf.to_yaml(OmegaConf.create(_differing(config, Config())))
    text = (
        f"# Planned by `vspdf plan` for {found.model}: {found.flops_saved_fraction:.2%} fewer training FLOPs "
        f"(convention {found.convention})\n# than a dense run of {found.baseline}.\n"
        "# lr_multiple is the published one at 90 % sparsity: lower it for milder ones. Your own text: data.corpus.\n"
    )
    try:
        with path.open("x") as stream:
            stream.write(text + body)
    except FileExistsError:
        raise UserError(f"'{path}' exists and is not overwritten: give another name.") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {error.strerror}.") from None


def _drop_what_follows(config: Config) -> None:
    """Empties, in place, every setting that resolving would fill in again."""
    configuration.resolve(config)
    whole = copy.deepcopy(config)
    for phase in config.phases:
        phase.tokens = None  # rather than steps
    parts: list[Any] = [config, config.model, config.train, *config.phases]
    for part in parts:
        for f in dataclasses.fields(part):
            value = getattr(part, f.name)
            if f.default is not None or value is None:
                continue
            setattr(part, f.name, None)
            again = copy.deepcopy(config)
            try:
                configuration.resolve(again)
            except UserError:
                again.phases = []
            if again != whole:
                setattr(part, f.name, value)


def _differing(value: Any, default: Any) -> Any:
    """Settings that are not at their default."""
    if isinstance(value, list):
        return [_differing(item, type(item)()) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    pairs = {f.name: (getattr(value, f.name), getattr(default, f.name)) for f in dataclasses.fields(value)}
    return {name: _differing(mine, other) for name, (mine, other) in pairs.items() if mine != other}
