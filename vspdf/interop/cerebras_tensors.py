"""Tensors of the Cerebras stack's checkpoints under the names of our GPT."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vspdf.errors import UserError
from vspdf.interop.cerebras_sparsity import ROLES
from vspdf.interop.masks import MASK

_LAYERS = "transformer_decoder.layers."
# Modules of theirs in a state dict, and ours; releases since 2.1 put `embed` behind the positions' name.
_MODULES = {
    "embedding_layer.word_embeddings": "wte", "embedding_layer.position_embeddings": "wpe",
    "embedding_layer.position_embeddings.embed": "wpe", "transformer_decoder.norm": "ln_f", "ln_f": "ln_f",
    "lm_head": "lm_head",
}  # fmt: skip
_IN_LAYER = {
    "norm1": ("ln_1", 0), "norm3": ("ln_2", 0),
    **{part: (ours, i) for ours, parts in ROLES.items() for i, part in enumerate(parts)},
}  # fmt: skip


def tensor_name(theirs: str) -> tuple[str, int] | None:
    """Our name of a tensor of the Cerebras stack's GPT, and which part of ours it is (Q, K and V: 0, 1, 2), or None.

    Without the ``model.`` that some releases put before the names.
    """
    module, _, kind = theirs.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if module in _MODULES:
        return f"{_MODULES[module]}.{kind}", 0
    number, _, role = module.removeprefix(_LAYERS).partition(".")
    if not module.startswith(_LAYERS) or not number.isdigit() or role not in _IN_LAYER:
        return None
    name, part = _IN_LAYER[role]
    return f"h.{number}.{name}.{kind}", part


def from_cerebras(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Tensors of a GPT of the Cerebras stack under GPT-2's names and in its layout: Q, K and V of a layer become one.

    Of a whole checkpoint the model alone is taken. Tensors with other names come back as they are.

    Raises
    ------
    UserError
        If only some of the names are known, parts of Q, K and V are missing, or the two names of the last norm differ.
    """
    whole = {name: t for name, t in tensors.items() if name.startswith("model.")} or tensors
    theirs = {re.sub(r"^(model\.)+", "", name): tensor for name, tensor in whole.items()}
    if not any(name.startswith("transformer_decoder.") for name in theirs):
        return dict(tensors)
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in theirs.items():
        known = tensor_name(name.removesuffix(MASK))
        if known is None:
            raise UserError(
                f"{where}: '{name}' is no tensor of a GPT of the Cerebras stack that is known here; convert it to a "
                "Hugging Face folder with its own converter first."
            )
        ours, part = known[0] + (MASK if name.endswith(MASK) else ""), known[1]
        found = parts.setdefault(ours, {})
        if part in found and not torch.equal(found[part], tensor):
            raise UserError(f"{where}: '{name}' differs from its other name's tensor, and one is kept here.")
        found[part] = tensor
    if "lm_head.weight" in parts:  # tied: some releases store it once
        parts.setdefault("wte.weight", parts["lm_head.weight"])
    for name, found in parts.items():
        if missing := [x for i, x in enumerate("QKV") if name.split(".")[-2] == "c_attn" and i not in found]:
            raise UserError(f"{where}: '{name}' lacks its part for {' and '.join(missing)}.")
    merged = {name: torch.cat([found[i] for i in sorted(found)]) for name, found in parts.items()}
    return {name: t.T if name.startswith("h.") and t.dim() == 2 else t for name, t in merged.items()}
