"""A plain dense GPT in the few forms that people train: GPT-2's, Llama's, and mixtures. It knows nothing of sparsity.

By default Cerebras-GPT's (arXiv:2304.03208): pre-LN, exact GELU, biases, learnt positions, tied embeddings. `Shape` has
every choice. No dropout. Module names are GPT-2's, or Llama's where GPT-2 has no such matrix, so that conversion is
renaming. Shape suffixes: B batch, T tokens, D d_model, H heads, K heads of keys, d width of a head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vspdf.activation import gelu
from vspdf.attention import causal_attention
from vspdf.cache import Cache as Cache
from vspdf.errors import UserError
from vspdf.rotary import Rotation, rotate, rotation
from vspdf.shapes import Shape

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}
# From the keys and values of new tokens to those of all tokens, and which of them each new token sees.
Past = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def norm(shape: Shape, width: int) -> nn.Module:
    """The norm that a shape has, over `width` features."""
    if shape.norm == "rms":
        return nn.RMSNorm(width, eps=shape.norm_eps)
    return nn.LayerNorm(width, eps=shape.norm_eps, bias=shape.bias is True)


def linear(shape: Shape, name: str) -> nn.Linear:
    """The matrix of a block that `Shape.block` has under a name."""
    out, into = shape.block[name]
    return nn.Linear(into, out, bias=shape.biased(name))


class Attention(nn.Module):
    """Causal self-attention; queries, keys and values come from one matrix where they are alike (`Shape.fused`)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.fused = shape.n_head, shape.n_kv_head, shape.fused
        if self.fused:
            self.c_attn = linear(shape, "attn.c_attn")
            self.c_proj = linear(shape, "attn.c_proj")
        else:
            self.q_proj = linear(shape, "attn.q_proj")
            self.k_proj = linear(shape, "attn.k_proj")
            self.v_proj = linear(shape, "attn.v_proj")
            self.o_proj = linear(shape, "attn.o_proj")
        self.q_norm, self.k_norm = (
            nn.RMSNorm(shape.head_dim, eps=shape.norm_eps) if shape.qk_norm else nn.Identity() for _ in "qk"
        )
        self.attend = causal_attention  # a benchmark puts torch's in its place

    def forward(self, x_BTD: Tensor, by: Rotation | None = None, past: Past | None = None) -> Tensor:
        B, T, _ = x_BTD.shape
        if self.fused:
            q_BTd, k_BTd, v_BTd = self.c_attn(x_BTD).chunk(3, dim=2)
        else:
            q_BTd, k_BTd, v_BTd = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        q, k, v = (
            part.view(B, T, heads, -1).transpose(1, 2)
            for part, heads in ((q_BTd, self.heads), (k_BTd, self.kv_heads), (v_BTd, self.kv_heads))
        )
        q, k = rotate(self.q_norm(q), by), rotate(self.k_norm(k), by)
        shared = self.heads // self.kv_heads
        if past is not None:
            y_BHTd = _seen(q, *past(k, v))
        elif shared > 1:
            y_BHTd = self.attend(q, k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1))
        else:
            y_BHTd = self.attend(q, k, v)
        y_BTD = y_BHTd.transpose(1, 2).reshape(B, T, -1)
        return self.c_proj(y_BTD) if self.fused else self.o_proj(y_BTD)


def _seen(q_BHTd: Tensor, k_BKLd: Tensor, v_BKLd: Tensor, visible_B1TL: Tensor) -> Tensor:
    """Attention of new tokens to all L that each sees; queries that share a head of keys are rows beside each other."""
    B, H, T, d = q_BHTd.shape
    shared = H // k_BKLd.shape[1]
    if shared > 1:
        q_BHTd = q_BHTd.reshape(B, H // shared, shared * T, d)
        visible_B1TL = visible_B1TL.repeat(1, 1, shared, 1)
    return F.scaled_dot_product_attention(q_BHTd, k_BKLd, v_BKLd, attn_mask=visible_B1TL).reshape(B, H, T, d)


class MLP(nn.Module):
    """Two matrices with an activation between."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[shape.mlp]
        self.c_fc = linear(shape, "mlp.c_fc")
        self.c_proj = linear(shape, "mlp.c_proj")

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x_BTD)))


class GatedMLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): three matrices, of which one gates another."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = linear(shape, "mlp.gate_proj")
        self.up_proj = linear(shape, "mlp.up_proj")
        self.down_proj = linear(shape, "mlp.down_proj")

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """Attention and an MLP, each after a norm and added to what came in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.parallel = shape.parallel
        self.ln_1 = norm(shape, shape.d_model)
        self.attn = Attention(shape)
        self.ln_2 = norm(shape, shape.d_model)
        self.mlp = GatedMLP(shape) if shape.gated else MLP(shape)

    def forward(self, x_BTD: Tensor, by: Rotation | None = None, past: Past | None = None) -> Tensor:
        attended = x_BTD + self.attn(self.ln_1(x_BTD), by, past)
        return attended + self.mlp(self.ln_2(x_BTD if self.parallel else attended))


_WRITES = ("c_proj.weight", "o_proj.weight", "down_proj.weight")  # matrices that write to the residual stream


class GPT(nn.Module):
    """Decoder-only language model.

    Parameters
    ----------
    shape : Shape
        Sizes, and what the blocks are made of.
    init_std : float
        Weights are drawn from a normal of this deviation cut at two deviations; the two matrices that write to the
        residual stream get ``init_std / sqrt(2 · n_layer)``. Biases are zero.
    seed : int
    output_init_std : float, optional
        Of the two matrices that write to the residual stream, instead.
    """

    def __init__(
        self, shape: Shape, init_std: float = 0.02, seed: int = 0, output_init_std: float | None = None
    ) -> None:
        super().__init__()
        self.shape = shape
        self.wte = nn.Embedding(shape.vocab_size, shape.d_model)
        self.wpe = nn.Embedding(shape.sequence_length, shape.d_model) if shape.position == "learned" else None
        self.h = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.ln_f = norm(shape, shape.d_model)
        self.lm_head = None if shape.tie else nn.Linear(shape.d_model, shape.vocab_size, bias=False)
        output = init_std / math.sqrt(2 * shape.n_layer) if output_init_std is None else output_init_std
        self._init_weights(init_std, output, seed)

    @torch.no_grad()
    def _init_weights(self, std: float, output: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                s = output if name.endswith(_WRITES) else std
                nn.init.trunc_normal_(parameter, 0.0, s, -2 * s, 2 * s, generator=generator)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V], or the mean cross-entropy in nats per target where `targets_BT` is given (-100: none)."""
        logits_BTV = self.logits(self.hidden(tokens_BT))
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())

    def hidden(self, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states after the last norm, [B, T, D]. With a cache, of tokens after those it holds; it takes them in.

        Raises
        ------
        UserError
            If that is more tokens than the model has positions for.
        """
        T, past = tokens_BT.shape[1], 0 if cache is None else cache.length
        positions = torch.arange(past, past + T, device=tokens_BT.device)
        if cache is not None:
            positions = (positions - cache.padding_B[:, None]).clamp(min=0)
        longest = past + T - (0 if cache is None else int(cache.padding_B.min()))
        if longest > self.shape.sequence_length:
            raise UserError(
                f"{longest} tokens are more than the model's sequence_length of {self.shape.sequence_length}."
            )
        x_BTD = self.wte(tokens_BT)
        if self.wpe is not None:
            x_BTD = x_BTD + self.wpe(positions)
        by = rotation(self.shape, positions)
        if cache is not None:
            cache.begin(T)
        for i, block in enumerate(self.h):
            x_BTD = block(x_BTD, by, None if cache is None else partial(cache.extend, i))
        return self.ln_f(x_BTD)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Scores of every token of the vocabulary, from `hidden`."""
        return F.linear(x_BTD, self.unembedding)

    @property
    def unembedding(self) -> Tensor:
        """Weights of the output head [V, D]: the embeddings' own where the two are tied."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight
