"""Named models: their sizes, and the dense runs that were published for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from vspdf.errors import UserError, did_you_mean

# ---------------------------------------------------------------------------------------------------------------------
# Model shapes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT that FLOPs depend on.

    Multiply-adds per token: ``linear``, ``attention`` (QKᵀ and AV, full), ``vocabulary``.
    """

    n_layer: int
    d_model: int
    n_head: int
    d_ff: int
    vocab_size: int
    sequence_length: int
    d_attention: int = 0  # width of all heads together; 0, as given: d_model, and that is what it then is

    def __post_init__(self) -> None:
        object.__setattr__(self, "d_attention", self.d_attention or self.d_model)

    @property
    def linear(self) -> int:
        """Projection and FFN weights: ``L(4·d·a + 2·d·f)``, the ones that sparsity applies to."""
        return self.n_layer * (4 * self.d_model * self.d_attention + 2 * self.d_model * self.d_ff)

    @property
    def attention(self) -> int:
        return 2 * self.n_layer * self.sequence_length * self.d_attention

    @property
    def vocabulary(self) -> int:
        return self.vocab_size * self.d_model

    @property
    def parameters(self) -> int:
        """All parameters of a GPT-2-shaped model with biases, learnt positions and a tied unembedding."""
        d, f, a = self.d_model, self.d_ff, self.d_attention
        # Weights, biases (3a + d of attention, f + d of the FFN) and two norms (4d).
        block = 4 * d * a + 2 * d * f + 3 * a + 6 * d + f
        return self.n_layer * block + (self.vocab_size + self.sequence_length) * d + 2 * d


MOST_LAYERS = 10_000  # more are a slip, and their names alone would fill the memory


def linear_layers(n_layer: int, d_model: int, d_ff: int, d_attention: int = 0) -> dict[str, int]:
    """The layers of a GPT that can be sparse, by name, and how many weights each has (`Shape.linear` is their sum)."""
    square, wide = d_model * (d_attention or d_model), d_model * d_ff
    block = {"attn.c_attn": 3 * square, "attn.c_proj": square, "mlp.c_fc": wide, "mlp.c_proj": wide}
    return {f"h.{i}.{name}": weights for i in range(n_layer) for name, weights in block.items()}


def _gpt(
    n_layer: int, d_model: int, n_head: int, d_ff: int, vocab_size: int = 50257, sequence_length: int = 2048
) -> Shape:
    return Shape(n_layer, d_model, n_head, d_ff, vocab_size, sequence_length)


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
}


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
