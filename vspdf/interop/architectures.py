"""The architectures of transformers that our GPT covers: what their config.json says, and their names of modules.

Both ways: a configuration becomes a `Shape`, and a shape the configuration of the first architecture that says all of
it. µP's words are in `hugging_face`; tensors are renamed in `architecture_tensors`. No torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vspdf.errors import UserError
from vspdf.shapes import RopeScaling, Shape

log = logging.getLogger("vspdf")

# Activations of their configurations that our GPT has; the three forms by tanh are one function.
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
# Keys of models whose weights are no plain tensors, as they are where there is nothing of it.
REFUSED = {"quantization_config": None, "sparsity_config": None, "compression_config": None}
GPT2 = ("gpt2", "btlm", "jais")  # the latter two are GPT-2 with µP keys; what else they may ask for is refused
GPT2_SIZES = {"n_layer": "n_layer", "d_model": "n_embd", "n_head": "n_head", "d_ff": "n_inner",
              "vocab_size": "vocab_size", "sequence_length": "n_positions"}  # fmt: skip
_SIZES = {"n_layer": "num_hidden_layers", "d_model": "hidden_size", "n_head": "num_attention_heads",
          "d_ff": "intermediate_size", "vocab_size": "vocab_size",
          "sequence_length": "max_position_embeddings"}  # fmt: skip
_NEOX_PART = 0.25  # of a head, where a GPT-NeoX's configuration does not say it


class Layout(NamedTuple):
    """How an architecture names what a model is made of.

    Attributes
    ----------
    classes : str
        Of the causal model.
    prefix : str
        Before the names of all tensors but the head's.
    top, block : dict
        Our names of modules by theirs, outside blocks and inside one.
    read, write : callable
        Between a configuration and a shape.
    """

    classes: str
    prefix: str
    top: dict[str, str]
    block: dict[str, str]
    read: Callable[[Mapping[str, Any], str], Shape]
    write: Callable[[Shape, str], dict[str, Any]]


def whole_number(value: Any, key: str, where: str) -> int:
    """A value that must be a positive whole number.

    Raises
    ------
    UserError
        If it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {key} must be a whole number of at least 1, not {value!r}.")
    return value


def whole(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """The same of a key of a configuration; `default` where the key is absent or null."""
    value = config.get(key)
    return whole_number(default if value is None else value, key, where)


def _epsilon(config: Mapping[str, Any], key: str, where: str, default: float) -> float:
    """Of a norm; `default` where the key is absent."""
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{where}: {key} must be a number, not {value!r}.")
    return value


def only(config: Mapping[str, Any], allowed: Mapping[str, Any], where: str) -> None:
    """Refuses settings that are not as they are here.

    Raises
    ------
    UserError
        Naming the key.
    """
    for key, expected in allowed.items():
        if (value := config.get(key, expected)) not in (expected, None):
            raise UserError(f"{where}: {key} = {value!r} is not supported; expected {expected!r}.")


def _rope(config: Mapping[str, Any], where: str, base_key: str = "rope_theta", part_key: str = "") -> dict[str, Any]:
    """Rotary positions, as versions 4 and 5 of transformers write them and take them.

    Parameters
    ----------
    config, where
    base_key : str
        Of the base, where the object of rotary positions has none.
    part_key : str
        Of the part of a head that is rotated; "": of a kind that rotates whole heads whatever its configuration says.
    """
    said = config.get("rope_scaling") or config.get("rope_parameters") or {}  # where both are, theirs takes the former
    if not isinstance(said, Mapping):
        raise UserError(f"{where}: rope_scaling must be an object, not {said!r}.")

    def first(*found: Any) -> Any:
        return next(value for value in found if value is not None)

    base = first(said.get("rope_theta"), config.get(base_key), 10_000.0)
    kind = first(said.get("rope_type"), said.get("type"), "default")
    if part_key:
        part = first(said.get("partial_rotary_factor"), config.get(part_key), _NEOX_PART)
    else:
        part = _whole_heads(config, first(said.get("partial_rotary_factor"), config.get("partial_rotary_factor"), 1.0),
                            kind, where)  # fmt: skip
    for key, value in (("rope_theta", base), ("partial_rotary_factor", part)):
        if not isinstance(value, int | float):
            raise UserError(f"{where}: {key} must be a number, not {value!r}.")
    found: dict[str, Any] = {"position": "rope", "rope_base": float(base), "rope_fraction": float(part)}
    if kind == "default":
        return found
    if kind not in ("linear", "llama3"):
        raise UserError(f"{where}: rope_type '{kind}' is not supported; expected default, linear or llama3.")
    names = {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
             "original_length": "original_max_position_embeddings"}  # fmt: skip
    stated = {ours: said[theirs] for ours, theirs in names.items() if said.get(theirs) is not None}
    if kind == "linear":
        stated = {key: value for key, value in stated.items() if key == "factor"}
    if "factor" not in stated or not all(isinstance(value, int | float) for value in stated.values()):
        raise UserError(f"{where}: rope_scaling {dict(said)!r} must have a factor, and numbers alone.")
    return found | {"rope_scaling": RopeScaling(kind, **stated)}


def _whole_heads(config: Mapping[str, Any], part: Any, kind: str, where: str) -> float:
    """Of a kind that rotates whole heads: 1, and a line where its configuration asks for a part.

    With scaling transformers builds angles for the part alone, which then fit no head.
    """
    if part == 1:
        return 1.0
    if kind != "default":
        raise UserError(
            f"{where}: partial_rotary_factor = {part!r} with rope_type '{kind}' is not supported: transformers' "
            f"{config['model_type']} cannot run it; expected 1."
        )
    log.warning(
        "%s: partial_rotary_factor = %r is not read: transformers' %s rotates whole heads.",
        where, part, config["model_type"],
    )  # fmt: skip
    return 1.0


def _write_rope(shape: Shape, partial: bool = False) -> dict[str, Any]:
    """The same of a shape; `partial`: of a kind that may rotate a part of a head."""
    scaling = shape.rope_scaling
    said: dict[str, Any] = {"rope_theta": shape.rope_base, "rope_type": "default"}
    if scaling is not None:
        said |= {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling is not None and scaling.type == "llama3":
        said |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor,
                 "original_max_position_embeddings": scaling.original_length}  # fmt: skip
    if partial and shape.rope_fraction != 1:
        said["partial_rotary_factor"] = shape.rope_fraction
    older = {key: value for key, value in said.items() if key not in ("rope_theta", "partial_rotary_factor")}
    return {"rope_parameters": said, "rope_theta": shape.rope_base, "rope_scaling": older if scaling else None}


def _window(config: Mapping[str, Any], length: int, where: str) -> int:
    """Positions up to which attention within a sliding window is attention to all."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if isinstance(window, int) and 0 < window < length:
        log.warning("%s: attention slides over %d tokens: the model is taken up to so many positions.", where, window)
        return window
    return length


def read_gpt2(config: Mapping[str, Any], where: str) -> Shape:
    """Shape of a GPT-2's configuration, µP's keys left aside.

    Raises
    ------
    UserError
        Naming the key, if it asks for what our GPT does not have.
    """
    sizes: dict[str, Any] = {
        ours: whole(config, theirs, where) for ours, theirs in GPT2_SIZES.items() if ours != "d_ff"
    }
    sizes["d_ff"] = whole(config, "n_inner", where, 4 * sizes["d_model"])
    if config.get("position_embedding_type") != "absolute":
        only(config, {"position_embedding_type": "learned"}, where)
    only(config, {"add_cross_attention": False, **REFUSED}, where)
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UserError(
            f"{where}: activation_function '{activation}' is not supported; expected one of {', '.join(ACTIVATIONS)}."
        )
    eps = _epsilon(config, "layer_norm_epsilon", where, 1e-5)
    tie = config.get("tie_word_embeddings", True) is True
    return Shape(**sizes, mlp=ACTIVATIONS[activation], norm_eps=eps, tie=tie)


def _read_llama(config: Mapping[str, Any], where: str) -> Shape:
    kind = config["model_type"]
    bias: bool | str = "qkv" if kind == "qwen2" else bool(config.get("attention_bias"))
    only(
        config,
        {**REFUSED, "hidden_act": "silu", "attention_bias": bias if kind == "llama" else kind == "qwen2"},
        where,
    )
    if kind == "llama" and bool(config.get("mlp_bias")) != bias:
        raise UserError(f"{where}: mlp_bias must be as attention_bias, {bias}.")
    sizes: dict[str, Any] = {ours: whole(config, theirs, where) for ours, theirs in _SIZES.items()}
    tie = config.get("tie_word_embeddings", False)
    head_dim = config.get("head_dim") or (128 if kind == "qwen3" else None)
    return Shape(**sizes | {
        "sequence_length": _window(config, sizes["sequence_length"], where),
        "n_kv_head": whole(config, "num_key_value_heads", where, sizes["n_head"]),
        "head_dim": 0 if head_dim is None else whole(config, "head_dim", where, head_dim),
        "norm": "rms", "mlp": "swiglu", "bias": bias, "tie": bool(tie), "qk_norm": kind == "qwen3",
        "norm_eps": _epsilon(config, "rms_norm_eps", where, 1e-6), **_rope(config, where),
    })  # fmt: skip


def _write_llama(shape: Shape, kind: str) -> dict[str, Any]:
    biased = {"attention_bias": shape.bias is True, "mlp_bias": shape.bias is True} if kind == "llama" else {}
    return {
        **{theirs: getattr(shape, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": shape.n_kv_head, "head_dim": shape.head_dim, "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps, "tie_word_embeddings": shape.tie, "attention_dropout": 0.0,
        "use_sliding_window": False, "sliding_window": None, **biased, **_write_rope(shape),
    }  # fmt: skip


def _read_neox(config: Mapping[str, Any], where: str) -> Shape:
    only(config, REFUSED | {"attention_bias": True}, where)
    activation = config.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{where}: hidden_act '{activation}' is not supported; expected one of {', '.join(ACTIVATIONS)}."
        )
    rope = _rope(config, where, base_key="rotary_emb_base", part_key="rotary_pct")
    sizes: dict[str, Any] = {ours: whole(config, theirs, where) for ours, theirs in _SIZES.items()}
    return Shape(
        **sizes, mlp=ACTIVATIONS[activation], tie=bool(config.get("tie_word_embeddings", False)),
        parallel=bool(config.get("use_parallel_residual", True)),
        norm_eps=_epsilon(config, "layer_norm_eps", where, 1e-5), **rope,
    )  # fmt: skip


def _write_neox(shape: Shape, kind: str) -> dict[str, Any]:
    names = {theirs: ours for ours, theirs in reversed(ACTIVATIONS.items())}
    return {
        **{theirs: getattr(shape, ours) for ours, theirs in _SIZES.items()},
        "hidden_act": names.get(shape.mlp, shape.mlp), "layer_norm_eps": shape.norm_eps, "attention_bias": True,
        "use_parallel_residual": shape.parallel, "tie_word_embeddings": shape.tie, "attention_dropout": 0.0,
        "hidden_dropout": 0.0, "rotary_pct": shape.rope_fraction, "rotary_emb_base": shape.rope_base,
        **_write_rope(shape, partial=True),
    }  # fmt: skip


def _llama(classes: str) -> Layout:
    attention = {f"self_attn.{name}": f"attn.{name}" for name in
                 ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}  # fmt: skip
    return Layout(
        classes, "model.", {"embed_tokens": "wte", "norm": "ln_f", "lm_head": "lm_head"},
        {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", **attention,
         **{f"mlp.{name}": f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}},
        _read_llama, _write_llama,
    )  # fmt: skip


LAYOUTS: dict[str, Layout] = {
    "llama": _llama("LlamaForCausalLM"),
    "mistral": _llama("MistralForCausalLM"),
    "qwen2": _llama("Qwen2ForCausalLM"),
    "qwen3": _llama("Qwen3ForCausalLM"),
    "gpt_neox": Layout(
        "GPTNeoXForCausalLM", "gpt_neox.",
        {"embed_in": "wte", "final_layer_norm": "ln_f", "embed_out": "lm_head"},
        {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "attention.query_key_value": "attn.qkv",
         "attention.dense": "attn.o_proj", "mlp.dense_h_to_4h": "mlp.c_fc", "mlp.dense_4h_to_h": "mlp.c_proj"},
        _read_neox, _write_neox,
    ),
}  # fmt: skip


ARCHITECTURES = (*GPT2, *LAYOUTS)


def read_shape(config: Mapping[str, Any], where: str) -> Shape:
    """Shape of a configuration of any of `ARCHITECTURES`, µP's keys left aside.

    Raises
    ------
    UserError
        Naming the key, if it asks for what our GPT does not have.
    """
    layout = LAYOUTS.get(config["model_type"])
    return read_gpt2(config, where) if layout is None else layout.read(config, where)


def written_as(shape: Shape) -> tuple[str, dict[str, Any]] | None:
    """The first architecture whose configuration says all of a shape, and that configuration; None: there is none."""
    for kind, layout in LAYOUTS.items():
        config = {"architectures": [layout.classes], "model_type": kind, **layout.write(shape, kind)}
        try:
            if layout.read(config, "") == shape:
                return kind, config
        except UserError:
            continue
    return None
