"""Named models: their sizes, and the dense runs that were published for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from vspdf.errors import UserError, check_whole, did_you_mean, one_of, require

STATE_BYTES = 16  # a weight, its gradient and two AdamW moments, float32; in mixed precision they are no less
# What a path of the kernels keeps beside them: bytes for every position of a sparse matrix, kept or not, and for every
# kept weight. "cpu": a bit, and `Plan.nbytes` with AVX-512, all products run, on layers of 512² to 2048²: 17.5 a kept
# weight at 50 %, 19 at 75 %, 23 at 90 %, 37 at 99 %; the line meets the state within 7 % up to 98 %, at 99 % it is 17 %
# above. On a GPU "dense" and "2:4" have bits and prefix sums, "triton" the gathers' indices (sides of up to 65,536).
PATH_BYTES = {"cpu": (0.425, 18.5), "dense": (3 / 16, 0.0), "2:4": (3 / 16, 0.0), "triton": (0.0, 10.0)}

# ---------------------------------------------------------------------------------------------------------------------
# Model shapes
# ---------------------------------------------------------------------------------------------------------------------

NORMS = ("layer", "rms")
POSITIONS = ("learned", "rope")
MLPS = ("gelu", "gelu_tanh", "relu2", "swiglu")  # exact; GPT-2's, by tanh; squared ReLU; gated by SiLU
BIASES = (True, False, "qkv")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched over more tokens than a model was first trained for.

    Attributes
    ----------
    type : {"linear", "llama3"}
        Positions divided by `factor`; or wavelengths of more than ``original_length / low_freq_factor`` tokens times
        `factor`, those of less than ``original_length / high_freq_factor`` kept, those between in between (Llama 3.1).
    """

    type: str = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> RopeScaling:
        """From the same names in a mapping; numbers may be written as whole ones.

        Raises
        ------
        UserError
            If it has other names, or values that are no numbers.
        """
        known = {field.name: field.type for field in fields(cls)}
        for key, value in body.items():
            require(key in known, f"unknown setting 'model.rope_scaling.{key}'.{did_you_mean(str(key), known)}")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            require(number or key == "type", f"model.rope_scaling.{key} must be a number, not {value!r}.")
        said: dict[str, Any] = {key: float(v) if known[key] == "float" else v for key, v in body.items()}
        return cls(**said)


@dataclass(frozen=True)
class Shape:
    """All that decides what a GPT computes but its weights: sizes, and what its blocks are made of.

    The defaults are Cerebras-GPT's: LayerNorm before attention and MLP, learnt positions, exact GELU, biases, one table
    for embeddings and head. Invalid combinations are refused when a shape is made.

    Attributes
    ----------
    n_kv_head : int
        Heads of keys and values, each shared by ``n_head / n_kv_head`` heads of queries; default `n_head`.
    head_dim : int
        Width of a head; default ``d_model / n_head``.
    norm : {"layer", "rms"}
    position : {"learned", "rope"}
        A table of embeddings; or queries and keys are rotated (arXiv:2104.09864).
    mlp : {"gelu", "gelu_tanh", "relu2", "swiglu"}
        The last has three matrices, the others two.
    bias : True, False or "qkv"
        Of linear layers and LayerNorm; or of queries, keys and values alone.
    tie : bool
        Whether the output head is the table of embeddings.
    qk_norm : bool
        RMSNorm of every query and key, by head, before rotation.
    parallel : bool
        Attention and MLP read the same input, and both are added to it (GPT-J, GPT-NeoX).
    rope_base, rope_fraction : float
        Base of the wavelengths, and the leading part of a head that is rotated.
    rope_scaling : RopeScaling, optional
    norm_eps : float

    Raises
    ------
    UserError
        If heads do not divide, a size is no whole number of at least 1, or a choice is unknown.
    """

    n_layer: int
    d_model: int
    n_head: int
    d_ff: int
    vocab_size: int
    sequence_length: int
    n_kv_head: int = 0
    head_dim: int = 0
    norm: str = "layer"
    position: str = "learned"
    mlp: str = "gelu"
    bias: bool | str = True
    tie: bool = True
    qk_norm: bool = False
    parallel: bool = False
    rope_base: float = 10_000.0
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        put = object.__setattr__  # frozen, and not yet made
        for name in ("n_layer", "d_model", "n_head", "d_ff", "vocab_size", "sequence_length"):
            check_whole(f"model.{name}", getattr(self, name))
        for name in ("n_kv_head", "head_dim"):
            if getattr(self, name) != 0:  # which stands for the default
                check_whole(f"model.{name}", getattr(self, name))
        if not self.head_dim:
            require(
                self.d_model % self.n_head == 0,
                f"model.n_head = {self.n_head} does not divide model.d_model = {self.d_model}.",
            )
            put(self, "head_dim", self.d_model // self.n_head)
        put(self, "n_kv_head", self.n_kv_head or self.n_head)
        require(
            self.n_head % self.n_kv_head == 0,
            f"model.n_kv_head = {self.n_kv_head} does not divide model.n_head = {self.n_head}.",
        )
        if isinstance(self.rope_scaling, Mapping):
            put(self, "rope_scaling", RopeScaling.read(self.rope_scaling))
        one_of("model.norm", self.norm, NORMS)
        one_of("model.position", self.position, POSITIONS)
        one_of("model.mlp", self.mlp, MLPS)
        require(self.bias in BIASES, f"model.bias = {self.bias!r} is not known: expected true, false or qkv.")
        require(0 < self.norm_eps < 1, f"model.norm_eps must lie between 0 and 1, not {self.norm_eps}.")
        self._check_rope()

    def _check_rope(self) -> None:
        scaling = self.rope_scaling
        rotated = self.rope_fraction * self.head_dim
        require(1 < self.rope_base < math.inf, f"model.rope_base must be above 1, not {self.rope_base}.")
        require(0 < self.rope_fraction <= 1, f"model.rope_fraction must lie in (0, 1], not {self.rope_fraction}.")
        require(
            self.position != "rope" or (int(rotated) % 2 == 0 and rotated >= 2),
            f"rotary positions need an even number of features a head, 2 at least, not {rotated:g} "
            "(model.head_dim, model.rope_fraction).",
        )
        require(
            self.position == "rope" or (self.rope_base, self.rope_fraction, scaling) == (10_000.0, 1.0, None),
            f"model.rope_base, rope_fraction and rope_scaling go with model.position = rope, not {self.position}.",
        )
        if scaling is not None:
            one_of("model.rope_scaling.type", scaling.type, ("linear", "llama3"))
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            require(scaling.factor >= 1, f"model.rope_scaling.factor must be at least 1, not {scaling.factor}.")
            require(0 < low < high, f"model.rope_scaling: low_freq_factor {low} must be below high_freq_factor {high}.")

    @classmethod
    def read(cls, body: Mapping[str, Any], activation: str | None = None) -> Shape:
        """A shape from what a file says of it; older ones say the `activation` beside it, and no more than sizes."""
        known = {field.name: body[field.name] for field in fields(cls) if field.name in body}
        return cls(**({"mlp": activation or "gelu"} | known))

    @property
    def d_attention(self) -> int:
        """Width inside attention: of all queries together."""
        return self.n_head * self.head_dim

    @property
    def d_kv(self) -> int:
        """Width of all keys together; values have as many."""
        return self.n_kv_head * self.head_dim

    @property
    def gated(self) -> bool:
        """Whether the MLP has two matrices in, one to gate the other."""
        return self.mlp == "swiglu"

    @property
    def fused(self) -> bool:
        """Whether queries, keys and values come from one matrix, as in GPT-2; else from three."""
        return self.position == "learned" and self.n_kv_head == self.n_head and not self.qk_norm

    @property
    def block(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the matrices of one block, by name: those that sparsity applies to."""
        d, f, inner, kv = self.d_model, self.d_ff, self.d_attention, self.d_kv
        if self.fused:
            attention = {"attn.c_attn": (3 * inner, d), "attn.c_proj": (d, inner)}
        else:
            attention = {"attn.q_proj": (inner, d), "attn.k_proj": (kv, d), "attn.v_proj": (kv, d),
                         "attn.o_proj": (d, inner)}  # fmt: skip
        if self.gated:
            return attention | {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
        return attention | {"mlp.c_fc": (f, d), "mlp.c_proj": (d, f)}

    # Multiply-adds per token.

    @property
    def linear(self) -> int:
        """Projection and MLP weights, the ones that sparsity applies to: ``L(4d² + 2·d·f)`` of a GPT-2."""
        return self.n_layer * sum(o * i for o, i in self.block.values())

    @property
    def attention(self) -> int:
        """QKᵀ and AV, full."""
        return 2 * self.n_layer * self.sequence_length * self.d_attention

    @property
    def vocabulary(self) -> int:
        """The unembedding."""
        return self.vocab_size * self.d_model

    def biased(self, layer: str) -> bool:
        """Whether a matrix of `block` has a bias."""
        return self.bias is True or (self.bias == "qkv" and layer in _QKV)

    @property
    def parameters(self) -> int:
        """All parameters, embeddings, norms and biases included."""
        d = self.d_model
        norm = 2 * d if self.norm == "layer" and self.bias is True else d
        biases = sum(out for name, (out, _) in self.block.items() if self.biased(name))
        block = biases + 2 * norm + 2 * self.head_dim * self.qk_norm
        tables = self.vocab_size * (1 if self.tie else 2) + self.sequence_length * (self.position == "learned")
        return self.linear + self.n_layer * block + tables * d + norm


_QKV = ("attn.c_attn", "attn.q_proj", "attn.k_proj", "attn.v_proj")
MOST_LAYERS = 10_000  # more are a slip, and their names alone would fill the memory


def linear_layers(shape: Shape) -> dict[str, int]:
    """The layers of a GPT that can be sparse, by name, and how many weights each has (`Shape.linear` is their sum)."""
    return {f"h.{i}.{name}": out * into for i in range(shape.n_layer) for name, (out, into) in shape.block.items()}


def _gpt(
    n_layer: int, d_model: int, n_head: int, d_ff: int, vocab_size: int = 50257, sequence_length: int = 2048,
    **choices: Any,
) -> Shape:  # fmt: skip
    return Shape(n_layer, d_model, n_head, d_ff, vocab_size, sequence_length, **choices)


def _llama(
    n_layer: int, d_model: int, n_head: int, d_ff: int, vocab_size: int = 32_000, sequence_length: int = 2048,
    **choices: Any,
) -> Shape:  # fmt: skip
    plain: dict[str, Any] = {"norm": "rms", "position": "rope", "mlp": "swiglu", "bias": False, "tie": False}
    return Shape(n_layer, d_model, n_head, d_ff, vocab_size, sequence_length, **(plain | choices))


# Cerebras-GPT: arXiv:2304.03208, table 1; GPT-2: Radford et al. 2019; GPT-3 XL: arXiv:2005.14165, table 2.1.
MODELS: dict[str, Shape] = {
    "cerebras-gpt-111m": _gpt(10, 768, 12, 3072),
    "cerebras-gpt-256m": _gpt(14, 1088, 17, 4352),
    "cerebras-gpt-590m": _gpt(18, 1536, 12, 6144),
    "cerebras-gpt-1.3b": _gpt(24, 2048, 16, 8192),
    "cerebras-gpt-2.7b": _gpt(32, 2560, 32, 10240),
    "cerebras-gpt-6.7b": _gpt(32, 4096, 32, 16384),
    "cerebras-gpt-13b": _gpt(40, 5120, 40, 20480),
    "gpt2-small": _gpt(12, 768, 12, 3072, sequence_length=1024),
    "gpt3-xl": _gpt(24, 2048, 16, 8192),
    "gpt-j-6b": _gpt(28, 4096, 16, 16384, vocab_size=50400),
    "bert-large": _gpt(24, 1024, 16, 4096, vocab_size=30522, sequence_length=512),
    # Llamas of the literature on pre-training small ones (arXiv:2307.05695), and one for a test or a laptop.
    "llama-tiny": _llama(4, 256, 4, 704, vocab_size=4096, sequence_length=256, n_kv_head=2, tie=True),
    "llama-60m": _llama(8, 512, 8, 1376, sequence_length=1024),
    "llama-130m": _llama(12, 768, 12, 2048, sequence_length=1024),
    "llama-350m": _llama(24, 1024, 16, 2736, sequence_length=1024),
    # As their config.json on the Hub says, but with the sequences of most of their pre-training.
    "smollm2-135m": _llama(30, 576, 9, 1536, 49_152, 2048, n_kv_head=3, tie=True, rope_base=1e5),
    "tinyllama-1.1b": _llama(22, 2048, 32, 5632, n_kv_head=4),
    "llama-3.2-1b": _llama(16, 2048, 32, 8192, 128_256, 8192, n_kv_head=8, tie=True, rope_base=5e5,
                           rope_scaling=RopeScaling(factor=32.0)),
    "qwen2.5-0.5b": _llama(24, 896, 14, 4864, 151_936, 4096, n_kv_head=2, tie=True, bias="qkv", rope_base=1e6,
                           norm_eps=1e-6),
    # nanochat's depth 12; its norms have no weights and its logits are capped, which is not offered here.
    "nanochat-d12": _llama(12, 768, 6, 3072, 65_536, mlp="relu2", qk_norm=True, norm_eps=1e-6),
}  # fmt: skip


def named_shape(name: str) -> Shape:
    """Shape of a named model.

    Raises
    ------
    UserError
        If the name is unknown.
    """
    if name not in MODELS:
        raise UserError(f"unknown model '{name}'.{did_you_mean(name, MODELS)}")
    return MODELS[name]


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


def _nearest(shape: Shape) -> tuple[str, Published]:
    """Published run of the model nearest in size."""
    distance = lambda name: abs(math.log(MODELS[name].parameters / shape.parameters))  # noqa: E731
    name = min(PUBLISHED, key=distance)
    return name, PUBLISHED[name]
