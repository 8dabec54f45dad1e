"""Every setting and its default: dataclasses, read from YAML with `key=value` overrides.

Defaults carry their reason. Training defaults are the published recipe of Cerebras-GPT (arXiv:2304.03208); those of the
switch from sparse to dense come from small-scale studies (see docs/method.md).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from vspdf.errors import UserError, did_you_mean


@dataclass
class ModelConfig:
    """A dense GPT-2-shaped GPT. `name` starts from a preset (`vspdf plan --model` lists them); other keys override it."""

    name: str | None = None
    n_layer: int | None = None
    d_model: int | None = None
    n_head: int | None = None
    d_ff: int | None = None  # default 4 · d_model
    sequence_length: int | None = None
    vocab_size: int | None = None  # default: what the tokenizer needs
    init_std: float = 0.02  # published; narrow models want about 0.5 / sqrt(d_model)


@dataclass
class DataConfig:
    """Text, its tokenizer and its order."""

    corpus: str = "stdlib"  # "stdlib" (the Python standard library's sources), a file, a folder, FILE.jsonl, or "hf:DATASET[:CONFIG]"
    text_field: str = "text"  # of JSONL lines and Hugging Face rows
    tokenizer: str = "bytes"  # "bytes", "bpe:VOCAB_SIZE" (trained on the corpus), "gpt2:FOLDER" (vocab.json and merges.txt) or a tokenizer.json
    validation_fraction: float = 0.05  # of the text, held out as whole documents
    repeat: bool = False  # False: running out of unseen samples is an error
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
    """One stage of training at one sparsity. Give `steps` or `tokens`."""

    name: str | None = None  # default: "sparse 90 %" or "dense"
    sparsity: float = 0.0
    steps: int | None = None
    tokens: int | None = None
    lr: float | None = None  # peak; default optimizer.lr
    lr_multiple: float = 1.0  # of `lr`; at 90 % about 3 (published) to 5 (toy scale)
    mu_p: bool = False  # SµPar (arXiv:2405.15743): learning rate of sparse weights x 1/density, their init x 1/sqrt(density)
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
    threads: int | None = None  # default: what torch uses
    backend: str = "auto"  # of the sparse products: "auto", "cpu", "reference"
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
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    phases: list[PhaseConfig] = field(default_factory=list)
