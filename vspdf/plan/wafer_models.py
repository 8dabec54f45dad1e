"""The model of a simulated step: by name, from a configuration, or any Hugging Face folder, Llama's kind included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vspdf.errors import UserError
from vspdf.files import read_json
from vspdf.interop.architectures import ARCHITECTURES
from vspdf.plan.models import HF_TYPES, model_and_batch
from vspdf.simulator.aggregate.model import MASKED, Transformer

# Architectures beyond those that are trained here, of Llama's kind as far as sizes go, and what they call things.
# Whether such a model's vocabulary is one matrix where its configuration says nothing of it: transformers' defaults.
LLAMA_LIKE = {"gemma": True, "gemma2": True, "phi3": False, "olmo": False, "stablelm": False, "starcoder2": True}
UNGATED = ("starcoder2",)
KEYS = {
    "n_layer": "num_hidden_layers", "d_model": "hidden_size", "n_head": "num_attention_heads",
    "d_ff": "intermediate_size", "vocab_size": "vocab_size", "sequence_length": "max_position_embeddings",
}  # fmt: skip


def transformer(model: str) -> tuple[Transformer, int | None]:
    """Sizes of a model, and sequences a step where that is known.

    Raises
    ------
    UserError
        If there is no such model, or its configuration does not say what it must.
    """
    file = Path(model) / "config.json"
    if model and file.is_file():
        body = read_json(file)
        if body.get("model_type") not in (*ARCHITECTURES, *HF_TYPES):
            return _llama_like(file, body), None
        bert = body.get("model_type") == "bert"
    else:
        bert = model.startswith("bert")
    shape, batch = model_and_batch(model)
    return Transformer.of(shape, predicted=MASKED if bert else 1.0), batch


def _llama_like(file: Path, body: dict[str, Any]) -> Transformer:
    kind = body.get("model_type")
    if kind not in LLAMA_LIKE:
        known = ", ".join((*ARCHITECTURES, *HF_TYPES, *LLAMA_LIKE))
        raise UserError(f"{file}: model_type '{kind}' is not known to the simulator. Known: {known}.")
    sizes: dict[str, Any] = {name: body.get(key) for name, key in KEYS.items()}
    grouped: Any = body.get("num_key_value_heads") or body.get("num_attention_heads")
    head = body.get("head_dim") or 0
    for name, value in {**sizes, "n_kv_head": grouped, "head_dim": head}.items():
        if type(value) is not int or value < (0 if name == "head_dim" else 1):
            raise UserError(f"{file}: expected a whole number as {KEYS.get(name, name)}, not {value!r}.")
    tie = body.get("tie_word_embeddings", LLAMA_LIKE[kind])
    if not isinstance(tie, bool):
        raise UserError(f"{file}: expected true or false as tie_word_embeddings, not {tie!r}.")
    mlp = "gelu_tanh" if kind in UNGATED else "swiglu"
    return Transformer(
        **sizes, n_kv_head=grouped, head_dim=head, mlp=mlp, norm="rms", position="rope", bias=False, tie=tie
    )
