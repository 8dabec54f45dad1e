"""A plain dense GPT-2-shaped GPT with Cerebras-GPT's conventions (arXiv:2304.03208). It knows nothing of sparsity.

Pre-LN, GELU (exact, or GPT-2's tanh form), biases, learnt positions, tied embeddings, no dropout. Module names are
GPT-2's, so that conversion is renaming. Shape suffixes: B batch, T tokens, D d_model, A d_attention, H heads, F d_ff,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vspdf.attention import causal_attention
from vspdf.errors import UserError, did_you_mean
from vspdf.shapes import Shape

ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # names here, and torch's for the approximation


class Attention(nn.Module):
    """Causal multi-head self-attention; Q, K and V are one matrix of 3·A rows."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_head = shape.n_head
        self.c_attn = nn.Linear(shape.d_model, 3 * shape.d_attention)
        self.c_proj = nn.Linear(shape.d_attention, shape.d_model)
        self.attend = causal_attention  # a benchmark puts torch's in its place

    def forward(self, x_BTD: Tensor, past: Past | None = None) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x_BTD).chunk(3, dim=2))
        if past is None:
            y_BHTd = self.attend(q, k, v)
        else:
            k, v, visible = past(k, v)
            y_BHTd = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.c_proj(y_BHTd.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, shape: Shape, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate
        self.c_fc = nn.Linear(shape.d_model, shape.d_ff)
        self.c_proj = nn.Linear(shape.d_ff, shape.d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x_BTD), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, shape: Shape, approximate: str = "none") -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.d_model)
        self.attn = Attention(shape)
        self.ln_2 = nn.LayerNorm(shape.d_model)
        self.mlp = MLP(shape, approximate)

    def forward(self, x_BTD: Tensor, past: Past | None = None) -> Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD), past)
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class GPT(nn.Module):
    """Decoder-only language model.

    Parameters
    ----------
    shape : Shape
        Layers, widths, heads, vocabulary and longest sequence.
    init_std : float
        Weights are drawn from a normal of this deviation cut at two deviations; the two matrices that write to the
        residual stream get ``init_std / sqrt(2 · n_layer)``. Biases are zero.
    seed : int
    activation : {"gelu", "gelu_tanh"}
        The exact one (Cerebras-GPT), or its approximation by tanh (GPT-2).
    output_init_std : float, optional
        Of the two matrices that write to the residual stream, instead.

    Raises
    ------
    UserError
        If the heads do not divide the width of attention, or the activation is unknown.
    """

    def __init__(
        self,
        shape: Shape,
        init_std: float = 0.02,
        seed: int = 0,
        activation: str = "gelu",
        output_init_std: float | None = None,
    ) -> None:
        super().__init__()
        if shape.d_attention % shape.n_head:
            key = "d_model" if shape.d_attention == shape.d_model else "d_attention"
            raise UserError(f"model.n_head = {shape.n_head} does not divide model.{key} = {shape.d_attention}.")
        if activation not in ACTIVATIONS:
            raise UserError(f"activation '{activation}' is not known.{did_you_mean(activation, ACTIVATIONS)}")
        self.shape, self.activation = shape, activation
        self.wte = nn.Embedding(shape.vocab_size, shape.d_model)
        self.wpe = nn.Embedding(shape.sequence_length, shape.d_model)
        self.h = nn.ModuleList(Block(shape, ACTIVATIONS[activation]) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.d_model)
        output = init_std / math.sqrt(2 * shape.n_layer) if output_init_std is None else output_init_std
        self._init_weights(init_std, output, seed)

    @torch.no_grad()
    def _init_weights(self, std: float, output: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                s = output if name.endswith("c_proj.weight") else std
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
        x_BTD = self.wte(tokens_BT) + self.wpe(positions)
        if cache is not None:
            cache.begin(T)
        for i, block in enumerate(self.h):
            x_BTD = block(x_BTD, None if cache is None else partial(cache.extend, i))
        return self.ln_f(x_BTD)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Scores of every token of the vocabulary, from `hidden`."""
        return F.linear(x_BTD, self.wte.weight)


# From the keys and values of new tokens to those of all tokens, and which of them each new token sees.
Past = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Cache:
    """Keys and values of the tokens that a model has seen, so that one more token costs one token's work.

    Rows end together and may begin apart: the first `padding_B[b]` columns of row b are filler that no token sees.

    Parameters
    ----------
    model : GPT
    padding_B : Tensor, shape (B,), int64
    capacity : int
        Columns at most.
    """

    def __init__(self, model: GPT, padding_B: Tensor, capacity: int) -> None:
        shape, weight = model.shape, model.wte.weight
        size = (len(padding_B), shape.n_head, capacity, shape.d_attention // shape.n_head)
        self.padding_B = padding_B
        self.length = 0  # columns held
        self._keys = [weight.new_zeros(size) for _ in range(shape.n_layer)]
        self._values = [weight.new_zeros(size) for _ in range(shape.n_layer)]
        self._visible = torch.empty(0)

    def begin(self, count: int) -> None:
        """Makes room for `count` columns, which `extend` then fills layer by layer."""
        columns = torch.arange(self.length + count, device=self.padding_B.device)
        mine = columns[self.length :, None]
        # Filler sees itself: with nothing to see it would be NaN, and NaN times zero reaches the others.
        visible = (columns <= mine) & (columns >= self.padding_B[:, None, None]) | (columns == mine)
        self._visible = visible[:, None]  # [B, 1, count, length]
        self.length += count

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's keys and values with those of the newest tokens, and which columns these see."""
        begin = self.length - k.shape[2]
        self._keys[layer][:, :, begin : self.length] = k
        self._values[layer][:, :, begin : self.length] = v
        return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length], self._visible

    def repeat(self, times: int) -> None:
        """Each row `times` times, beside itself."""
        self.select(torch.arange(len(self.padding_B)).repeat_interleave(times))

    def select(self, rows: Tensor, begin: int = 0) -> None:
        """Row b becomes what row ``rows[b]`` was, from column `begin` on (other than 0: as many rows as before)."""
        for tensors in (self._keys, self._values):
            for i, tensor in enumerate(tensors):
                if begin:
                    tensor[:, :, begin : self.length] = tensor[rows, :, begin : self.length]
                else:
                    tensors[i] = tensor[rows]
        if not begin:
            self.padding_B = self.padding_B[rows]
