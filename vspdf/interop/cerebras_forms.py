"""What the blocks of a model of the Cerebras stack are made of, where it is not as in GPT-2: its zoo's Llama family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vspdf.errors import UserError
from vspdf.interop.architectures import whole_number

# Settings whose values are read here; the first is their default where the key is absent.
CHOICES: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("learned", "rotary"), "share_embedding_weights": (True, False),
    "use_ffn_bias": (True, False), "use_projection_bias_in_attention": (True, False),
    "use_ffn_bias_in_attention": (True, False), "nonlinearity": ("gelu", "swiglu"),
    "norm_type": ("layernorm", "rmsnorm"), "attention_module": ("aiayn_attention", "multiquery_attention"),
}  # fmt: skip
NUMBERS = ("layer_norm_epsilon", "attention_inner_dim", "rotary_dim", "rope_theta", "pos_scaling_factor",
           "pos_scaling_type", "pos_scaling_extra_args", "extra_attention_params", "initializer_range")  # fmt: skip
_BIASES = ("use_projection_bias_in_attention", "use_ffn_bias_in_attention", "use_ffn_bias")


def forms(model: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Choices of a `vspdf.config.ModelConfig`.

    Raises
    ------
    UserError
        For a combination that our GPT does not have.
    """

    def say(key: str) -> Any:
        value = model.get(key)
        return CHOICES[key][0] if value is None else value

    found: dict[str, Any] = _rotary(model, where) if say("position_embedding_type") == "rotary" else {}
    found |= {"mlp": "swiglu"} if say("nonlinearity") == "swiglu" else {}
    found |= {"norm": "rms"} if say("norm_type") == "rmsnorm" else {}
    found |= {"tie": False} if say("share_embedding_weights") is False else {}
    biases = [say(key) for key in _BIASES]
    if biases not in ([True] * 3, [False] * 3, [True, False, False]):
        raise UserError(
            f"{where}: {', '.join(_BIASES)} = {biases} is not offered; expected all, none, or the first alone."
        )
    if biases != [True] * 3:
        if "norm" not in found:
            raise UserError(f"{where}: model.norm_type must be rmsnorm where linear layers have no bias.")
        found["bias"] = "qkv" if biases[0] else False
    if (eps := model.get("layer_norm_epsilon")) is not None and eps != 1e-5:
        found["norm_eps"] = number(eps, "layer_norm_epsilon", where)
    if (inner := model.get("attention_inner_dim")) is not None:
        found["d_attention"] = whole_number(inner, "model.attention_inner_dim", where)
    if say("attention_module") == "multiquery_attention":
        groups = model.get("extra_attention_params") or {}
        count = groups.get("num_kv_groups", 1) if isinstance(groups, dict) else groups
        found["n_kv_head"] = whole_number(count, "model.extra_attention_params.num_kv_groups", where)
    return found


def _rotary(model: Mapping[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {"position": "rope"}
    heads, inner = model.get("num_heads"), model.get("attention_inner_dim") or model.get("hidden_size")
    if isinstance(heads, int) and isinstance(inner, int) and heads > 0 and model.get("rotary_dim") is not None:
        part = whole_number(model["rotary_dim"], "model.rotary_dim", where) / (inner / heads)
        found |= {"rope_fraction": part} if part != 1 else {}
    base = number_or(10_000.0, model.get("rope_theta"), "rope_theta", where)
    found |= {"rope_base": base} if base != 10_000.0 else {}
    factor = number_or(1.0, model.get("pos_scaling_factor"), "pos_scaling_factor", where)
    if factor == 1.0:
        return found
    extra = model.get("pos_scaling_extra_args") or {}
    if not isinstance(extra, dict):
        raise UserError(f"{where}: model.pos_scaling_extra_args must be a mapping, not {extra!r}.")
    names = {"original_max_position_embeddings": "original_length"}
    scaling = {"type": str(model.get("pos_scaling_type") or "linear").lower(), "factor": factor}
    return found | {"rope_scaling": scaling | {names.get(key, key): value for key, value in extra.items()}}


def number_or(default: float, value: Any, key: str, where: str) -> float:
    """A setting of the model that must be a number, or what it is where it is left out."""
    return default if value is None else number(value, key, where)


def number(value: Any, key: str, where: str) -> float:
    """A setting of the model that must be a number, or UserError."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{where}: model.{key} must be a number, not {value!r}.")
    return float(value)
