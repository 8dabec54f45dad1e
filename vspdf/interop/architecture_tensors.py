"""Tensors of the architectures of transformers under our names, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vspdf.interop.architectures import LAYOUTS
from vspdf.shapes import Shape

_BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|attention\.(masked_)?bias)")  # of older releases; no weights


def to_ours(kind: str, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, or masks of them, under our names; those that have none keep theirs."""
    layout = LAYOUTS[kind]
    found: dict[str, Tensor] = {}
    for theirs, tensor in tensors.items():
        module, _, leaf = theirs.removeprefix(layout.prefix).rpartition(".")
        if _BUFFERS.fullmatch(theirs):
            continue
        inside = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
        if inside and inside[2] in layout.block:
            name = f"h.{inside[1]}.{layout.block[inside[2]]}.{leaf}"
        else:
            name = f"{layout.top[module]}.{leaf}" if module in layout.top else theirs
        found |= _split(name, shape, tensor) if ".attn.qkv." in name else {name: tensor}
    return found


def _split(name: str, shape: Shape, tensor: Tensor) -> dict[str, Tensor]:
    """Three matrices, or biases, of one whose rows go head by head, and in each by queries, keys, values."""
    if len(tensor) != 3 * shape.d_attention:
        return {name: tensor}
    parts = tensor.reshape(shape.n_head, 3, shape.head_dim, *tensor.shape[1:]).unbind(1)
    return {name.replace("qkv", f"{part}_proj"): t.flatten(0, 1) for part, t in zip("qkv", parts, strict=True)}


def to_theirs(kind: str, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back of `to_ours`."""
    layout, tensors = LAYOUTS[kind], dict(tensors)
    found: dict[str, Tensor] = {}
    top = {ours: theirs for theirs, ours in layout.top.items()}
    block = {ours: theirs for theirs, ours in layout.block.items()}
    if "attn.qkv" in block:
        for name in [name for name in tensors if ".attn.q_proj." in name]:
            parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            heads = [part.view(shape.n_head, shape.head_dim, *part.shape[1:]) for part in parts]
            tensors[name.replace("q_proj", "qkv")] = torch.stack(heads, 1).flatten(0, 2)
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        inside = re.fullmatch(r"h\.(\d+)\.(.+)", module)
        theirs = f"layers.{inside[1]}.{block[inside[2]]}" if inside else top[module]
        found[f"{'' if module == 'lm_head' else layout.prefix}{theirs}.{leaf}"] = tensor.contiguous()
    return found
