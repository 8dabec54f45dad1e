"""Every setting and its default: dataclasses, read from YAML with `key=value` overrides.

Defaults carry their reason. Training defaults are the published recipe of Cerebras-GPT (arXiv:2304.03208); those of the
switch from sparse to dense come from small-scale studies (see docs/method.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vspdf.sparsity.schedule import Phase


@dataclass
class ModelConfig:
    """A dense GPT. `name` starts from a preset; other keys override it. What a choice means: `vspdf.shapes.Shape`.

    Defaults of the choices are Cerebras-GPT's.
    """

    name: str | None = None
    n_layer: int | None = None
    d_model: int | None = None
    n_head: int | None = None
    d_ff: int | None = None  # default 4 · d_model
    sequence_length: int | None = None
    vocab_size: int | None = None  # default: what the tokenizer needs
    n_kv_head: int | None = None  # heads of keys and values, shared by groups of queries; default n_head
    head_dim: int | None = None  # default d_model / n_head
    d_attention: int | None = None  # or the width of all heads: n_head · head_dim
    norm: str | None = None  # "layer" (default) or "rms"
    position: str | None = None  # "learned" (default) or "rope"
    mlp: str | None = None  # "gelu" (exact, the default), "gelu_tanh" (GPT-2's), "relu2" or "swiglu"
    bias: bool | str | None = None  # true (default), false, or "qkv": of queries, keys and values alone
    tie: bool | None = None  # true (default): the output head is the table of embeddings
    qk_norm: bool | None = None  # false (default); true: RMSNorm of queries and keys
    parallel: bool | None = None  # false (default); true: attention and MLP side by side, as in GPT-NeoX
    rope_base: float | None = None  # default 10000
    rope_fraction: float | None = None  # of a head that is rotated; default 1
    rope_scaling: dict[str, Any] | None = None  # {type: "linear" or "llama3", factor: 8, ...}; default: none
    norm_eps: float | None = None  # default 1e-5
    activation: str | None = None  # what `mlp` was called
    init_std: float = 0.02  # published; narrow models want about 0.5 / sqrt(d_model)
    output_init_std: float | None = None  # of what writes to the residual stream; default init_std / sqrt(2 · n_layer)


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
    # Fine-tuning: a file of contexts with completions instead of a corpus (see vspdf.data.tasks)
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
class PhaseConfig(Phase):
    """One stage of training: a `vspdf.Phase`, and what only a run of one's own has.

    Give `steps` or `tokens`.
    """

    tokens: int | None = None
    # SµPar (arXiv:2405.15743): learning rate of sparse weights x 1/density, their init x 1/sqrt(density)
    s_mu_par: bool = False
    batch_size: int | None = None  # sequences a step; default train.batch_size
    weight_decay: float | None = None
    beta2: float | None = None


@dataclass
class TrainConfig:
    """How a step is taken and what is measured beside it."""

    batch_size: int = 8  # sequences a step
    micro_batch_size: int | None = None  # sequences at a time (gradient accumulation); default batch_size
    precision: str = "fp32"  # "fp32" or "bf16" (autocast)
    device: str = "cpu"  # or "cuda", "cuda:1"
    threads: int | None = None  # default: what torch uses
    backend: str = "auto"  # of the sparse products: "auto", "cpu", "reference", "triton"
    memory: str = "normal"  # of the sparse products on CPUs: "normal", or "low" for loops without generated code
    log_every: int = 10  # steps
    eval_every: int = 100  # steps; 0: only at the end of each phase
    eval_tokens: int = 65536  # of the validation text; 0: all of it
    sample_tokens: int = 120  # of text generated at the end of each phase; 0: none
    checkpoint_every: int = 200  # steps; 0: only at the end
    keep_checkpoints: int = 2
    # A checkpoint at each evaluation with the lowest validation loss of its phase so far; the last such is kept beside
    # the others, and named in summary.json
    keep_best: bool = False
    # The run ends after so many evaluations in a row without a new lowest validation loss in its last phase; 0: never
    patience: int = 0
    # On several processes (torchrun): "exact" adds gradients in one order on any number of them, equal to the last bit;
    # "ddp" is DistributedDataParallel, which exchanges beside the backward pass; default: exact on CPUs, ddp on GPUs
    data_parallel: str | None = None
    timeout: float = 300.0  # seconds that processes wait for each other in a step, before one is taken for lost
    measure_dense: int = 3  # dense steps timed beside each sparse phase, on the same batches; 0: off
    tensorboard: bool = False  # curves for `tensorboard --logdir RUN`, too
    wandb: bool = False  # curves for Weights & Biases, too, which may send them away: its own settings say where


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
