"""Every setting of a run as it is taken: frozen, and nothing left open that the rest determines.

`vspdf.config.load` makes these from settings as written (`vspdf.config.settings`, where every setting is explained).
None means here that there is no such thing: no preset (`model.name`), no folder or file to begin with (`init_from`,
`start`, `data.path`, `data.validation_path`), no task (`data.length`), no update within a phase (`sparsity_end`,
`update_every`, and of masks that do not move `update`, `drop_fraction`, `random_share`), no wish of one's own
(`data.cache_dir`, `train.threads`). Two settings are known once the data are:
`model.vocab_size` and `data.first_sequence`, filled in by `ResolvedConfig.with_data`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vspdf.shapes import RopeScaling
from vspdf.sparsity.schedule import Amounts


@dataclass(frozen=True)
class ResolvedModel:
    """A dense GPT: a `vspdf.shapes.Shape`, but that the vocabulary may still be open, and how it is initialised."""

    name: str | None
    n_layer: int
    d_model: int
    n_head: int
    d_ff: int
    sequence_length: int
    vocab_size: int | None  # None: what the tokenizer needs, not known yet
    n_kv_head: int
    head_dim: int
    norm: str
    position: str
    mlp: str
    bias: bool | str
    tie: bool
    qk_norm: bool
    parallel: bool
    rope_base: float
    rope_fraction: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    init_std: float
    output_init_std: float

    @property
    def d_attention(self) -> int:
        """Width inside attention: of all queries together."""
        return self.n_head * self.head_dim


@dataclass(frozen=True)
class ResolvedData:
    """Text, its tokenizer and its order."""

    corpus: str
    text_field: str
    tokenizer: str
    validation_fraction: float
    test_fraction: float
    repeat: bool
    path: str | None
    format: str
    validation_path: str | None
    length: int | None
    overlong: str
    lower_relations: bool
    first_sequence: int | None  # None: where the run to begin with stopped, or 0
    cache_dir: str | None


@dataclass(frozen=True)
class ResolvedTask(ResolvedData):
    """Contexts with completions instead of text: what fine-tuning learns from."""

    path: str
    length: int


@dataclass(frozen=True)
class ResolvedOptimizer:
    """AdamW."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float


@dataclass(frozen=True)
class ResolvedTrain:
    """How a step is taken and what is measured beside it."""

    batch_size: int
    micro_batch_size: int
    precision: str
    device: str
    threads: int | None
    backend: str
    memory: str
    log_every: int
    eval_every: int
    eval_tokens: int
    sample_tokens: int
    checkpoint_every: int
    keep_checkpoints: int
    keep_best: bool
    patience: int
    data_parallel: str
    timeout: float
    measure_dense: int
    tensorboard: bool
    wandb: bool


@dataclass(frozen=True)
class ResolvedPhase(Amounts):
    """One stage of training: how much is kept, and how it learns."""

    tokens: int
    lr: float
    lr_end: float
    s_mu_par: bool
    batch_size: int
    weight_decay: float
    beta2: float


@dataclass(frozen=True)
class ResolvedConfig:
    """A whole run, as `vspdf.config.load` returns it and `vspdf.train.train` takes it."""

    name: str
    run_dir: str
    init_from: str | None
    seed: int
    start: str | None
    model: ResolvedModel
    data: ResolvedData
    optimizer: ResolvedOptimizer
    train: ResolvedTrain
    phases: tuple[ResolvedPhase, ...]

    @property
    def task(self) -> ResolvedTask | None:
        """What fine-tuning learns from; None in pre-training."""
        return self.data if isinstance(self.data, ResolvedTask) else None

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(phase.steps for phase in self.phases)

    def ended(self, steps: int) -> ResolvedConfig:
        """The same run as if it had been configured for so many steps, all but those of the last phase as they were."""
        last = self.phases[-1]
        left = last.steps - (self.steps - steps)
        cut = replace(last, steps=left, tokens=last.tokens * left // last.steps)
        return replace(self, phases=(*self.phases[:-1], cut))

    def with_data(self, vocab_size: int | None = None, first_sequence: int | None = None) -> ResolvedConfig:
        """The same run with what the data tell filled in where the configuration leaves it open."""
        model, data = self.model, self.data
        if model.vocab_size is None:
            model = replace(model, vocab_size=vocab_size)
        if data.first_sequence is None:
            data = replace(data, first_sequence=first_sequence)
        return replace(self, model=model, data=data)
