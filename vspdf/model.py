"""A plain dense GPT-2-shaped GPT with Cerebras-GPT's conventions (arXiv:2304.03208). It knows nothing of sparsity.

Pre-LN, GELU (exact, or GPT-2's tanh form), biases, learnt positions, tied embeddings, no dropout. Module names are
GPT-2's, so that conversion is renaming. Shape suffixes: B batch, T tokens, D d_model, H heads, F d_ff, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vspdf.errors import UserError, did_you_mean
from vspdf.ledger import Shape

ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # names here, and torch's for the approximation


class Attention(nn.Module):
    """Causal multi-head self-attention; Q, K and V are one matrix of 3·D rows."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_head = shape.n_head
        self.c_attn = nn.Linear(shape.d_model, 3 * shape.d_model)
        self.c_proj = nn.Linear(shape.d_model, shape.d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (
            part.view(B, T, self.n_head, D // self.n_head).transpose(1, 2)
            for part in self.c_attn(x_BTD).split(D, dim=2)
        )
        y_BHTd = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y_BHTd.transpose(1, 2).reshape(B, T, D))


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

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD))
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

    Raises
    ------
    UserError
        If the heads do not divide the width, or the activation is unknown.
    """

    def __init__(self, shape: Shape, init_std: float = 0.02, seed: int = 0, activation: str = "gelu") -> None:
        super().__init__()
        if shape.d_model % shape.n_head:
            raise UserError(f"model.n_head = {shape.n_head} does not divide model.d_model = {shape.d_model}.")
        if activation not in ACTIVATIONS:
            raise UserError(f"activation '{activation}' is not known.{did_you_mean(activation, ACTIVATIONS)}")
        self.shape, self.activation = shape, activation
        self.wte = nn.Embedding(shape.vocab_size, shape.d_model)
        self.wpe = nn.Embedding(shape.sequence_length, shape.d_model)
        self.h = nn.ModuleList(Block(shape, ACTIVATIONS[activation]) for _ in range(shape.n_layer))
        self.ln_f = nn.LayerNorm(shape.d_model)
        self._init_weights(init_std, seed)

    @torch.no_grad()
    def _init_weights(self, std: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                s = std / math.sqrt(2 * self.shape.n_layer) if name.endswith("c_proj.weight") else std
                nn.init.trunc_normal_(parameter, 0.0, s, -2 * s, 2 * s, generator=generator)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V], or the mean cross-entropy in nats per token where `targets_BT` is given."""
        T = tokens_BT.shape[1]
        if T > self.shape.sequence_length:
            raise UserError(f"{T} tokens are more than the model's sequence_length of {self.shape.sequence_length}.")
        x_BTD = self.wte(tokens_BT) + self.wpe(torch.arange(T, device=tokens_BT.device))
        for block in self.h:
            x_BTD = block(x_BTD)
        logits_BTV = F.linear(self.ln_f(x_BTD), self.wte.weight)
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())

    @torch.no_grad()
    def generate(self, tokens_BT: Tensor, count: int, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """`tokens_BT` followed by `count` sampled tokens; `temperature` 0 is greedy. The window slides."""
        generator = torch.Generator(tokens_BT.device).manual_seed(seed)
        for _ in range(count):
            logits_BV = self(tokens_BT[:, -self.shape.sequence_length :])[:, -1].float()
            if temperature == 0:
                next_B1 = logits_BV.argmax(-1, keepdim=True)
            else:
                next_B1 = torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)
            tokens_BT = torch.cat((tokens_BT, next_B1), dim=1)
        return tokens_BT
