"""Configurations of the Cerebras stack, in either generation's form, as configurations of ours.

The current form nests everything under ``trainer``; the older one has ``model``, ``optimizer``, ``runconfig`` and
``sparsity`` side by side. What cannot be kept is refused by name: a run that differs in silence would be worse.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vspdf import shapes
from vspdf.config.resolve import model_shape, resolve_model
from vspdf.config.settings import ModelConfig
from vspdf.errors import UserError, did_you_mean
from vspdf.interop import cerebras_rates
from vspdf.interop.architectures import whole_number
from vspdf.interop.cerebras_forms import CHOICES, NUMBERS, forms, number, number_or
from vspdf.interop.cerebras_keys import check_keys, check_off, mapping, name_unknown
from vspdf.interop.cerebras_sparsity import roles_of, sparsity

log = logging.getLogger("vspdf")
_SIZES = {"hidden_size": "d_model", "num_hidden_layers": "n_layer", "num_heads": "n_head", "filter_size": "d_ff",
          "max_position_embeddings": "sequence_length", "vocab_size": "vocab_size"}  # fmt: skip
# What our GPT is, in their words; the first is their default where the key is absent.
_MODEL = {
    "position_embedding_type": ("learned",), "share_embedding_weights": (True,), "use_ffn_bias": (True,),
    "use_projection_bias_in_attention": (True,), "use_ffn_bias_in_attention": (True,), "use_bias_in_output": (False,),
    "nonlinearity": ("gelu",), "layer_norm_epsilon": (1e-5,),
    "norm_type": ("layernorm",), "attention_type": ("scaled_dot_product",), "embedding_layer_norm": (False,),
    "use_position_embedding": (True,), "norm_first": (True,), "fixed_sparse_attention": (None,), "moe_params": (None,),
    "attention_inner_dim": (None,), "attention_sliding_window_length": (None,), "use_untied_layer_norm": (False,),
    "scale_qk_dot_by_layer_idx": (False,), "attention_qk_norm_layer": (None,), "logit_softcapping": (None,),
}  # fmt: skip
_DROPOUT = ("dropout_rate", "attention_dropout_rate", "embedding_dropout_rate", "residual_dropout_rate")
# What speaks of their machine and its numbers, or is read elsewhere.
_MODEL_BESIDE = ("name", "mixed_precision", "fp16_type", "use_bfloat16", "attention_module", "attention_softmax_fp32",
                 "attention_kernel", "compute_eval_metrics", "precision_opt_level", "boundary_casting", "tf_summary",
                 "enable_vts", "use_bfloat16_optimizer", "dtype", "loss_scaling", "loss_weight", "initializer",
                 "embedding_initializer", "output_layer_initializer")  # fmt: skip
_MUP = ("mup_base_hidden_size", "mup_base_filter_size", "embeddings_scale", "output_logits_scale",
        "output_logits_alpha", "scale_qk_dot_by_d", "attention_logits_alpha", "adjust_learning_rate")  # fmt: skip
_STD = 0.02  # of an initializer that is left out
_INITIALIZER = ("name", "mean", "std", "a", "b")
_FACTORS = ("embeddings_scale", "output_logits_scale", "output_logits_alpha", "attention_logits_alpha")  # 1: as here
_OPTIMIZER = ("optimizer_type", "betas", "beta1", "beta2", "eps", "epsilon", "weight_decay", "weight_decay_rate",
              "learning_rate", "max_gradient_norm", "correct_bias", "use_bias_correction", "adjust_learning_rate",
              "log_summaries", "loss_scaling_factor", "initial_loss_scale", "steps_per_increase", "min_loss_scale",
              "max_loss_scale")  # fmt: skip


def is_cerebras(body: Any) -> bool:
    """Tells whether a YAML file's content is a configuration of the Cerebras stack."""
    if not isinstance(body, dict):
        return False
    model = body.get("model")
    return "trainer" in body or "runconfig" in body or (isinstance(model, dict) and "hidden_size" in model)


def translate(body: Mapping[str, Any], where: str, fine_tuning: bool = False, started: bool = False) -> dict[str, Any]:
    """A configuration of ours, as YAML would hold it, without the text: theirs lies in files that are not read here.

    Parameters
    ----------
    body : mapping
        What the file holds.
    where : str
        For messages.
    fine_tuning : bool
        On pairs, of up to ``max_sequence_length`` tokens, instead of text.
    started : bool
        Whether it is said elsewhere what the run begins from.

    Raises
    ------
    UserError
        Naming the setting, if it asks for what cannot be done here.
    """
    check_keys(body, where, started or fine_tuning)
    init = mapping(mapping(body.get("trainer"), "trainer", where).get("init"), "trainer.init", where)
    now = "trainer" in body
    model = _model_block(body, where)
    steps, data, extra = _current(body, init, where) if now else _older(body, where)
    batch, length = whole_number(data.get("batch_size"), "batch_size", where), data.get("max_sequence_length")
    optimizer, rates = _optimizer(init if now else body, now, where)
    ours = _model(model, where)
    block = init.get("sparsity") if now else body.get("sparsity")
    roles = roles_of(model_shape(resolve_model(ModelConfig(**ours))).block)
    found = sparsity(block, ours["n_layer"], where, older=not now, roles=roles)
    seed = found.pop("seed", None)
    phase = {"steps": steps, **cerebras_rates.phase_rates(rates, steps, where), **found}
    if not fine_tuning and length not in (None, ours["sequence_length"]):
        raise UserError(
            f"{where}: train_input.max_sequence_length = {length} is not offered beside max_position_embeddings = "
            f"{ours['sequence_length']}: text fills the model's window."
        )
    if not now:
        _check_batch(body, ours, batch, steps, where)
    config = {
        "model": ours,
        "optimizer": optimizer,
        "phases": [phase],
        "data": {"length": length} if fine_tuning else {"corpus": "", "tokenizer": ""},
        "train": {"batch_size": batch, "micro_batch_size": math.gcd(batch, 8), **extra},
    }
    seeds = (seed, body.get("seed"), init.get("seed"), mapping(body.get("runconfig"), "runconfig", where).get("seed"))
    seed = next((found for found in seeds if found is not None), None)
    return config if seed is None else config | {"seed": seed}


def architecture(body: Mapping[str, Any], where: str) -> tuple[dict[str, int], str, dict[str, Any]]:
    """Sizes of the model of a configuration under our names, its activation, and its settings of µP.

    Raises
    ------
    UserError
        Naming the setting, if it asks for what our GPT does not have.
    """
    model = _model_block(body, where)
    return _sizes(model, where), str(model.get("nonlinearity", "gelu")), {k: model[k] for k in _MUP if k in model}


def _model_block(body: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    init = mapping(mapping(body.get("trainer"), "trainer", where).get("init"), "trainer.init", where)
    return mapping(init.get("model") if "trainer" in body else body.get("model"), "model", where)


def _model(model: Mapping[str, Any], where: str) -> dict[str, Any]:
    check_off("model", model, where)
    for key in _MUP:
        if model.get(key) not in (None, False, *((1,) if key in _FACTORS else ())):
            raise UserError(
                f"{where}: model.{key} is µP, which is not trained here (vspdf convert takes over its weights)."
            )
    if model.get("dropout_rate") is None:
        raise UserError(
            f"{where}: model.dropout_rate is not set, which means 0.1 there; no dropout is offered: set it to 0."
        )
    for key in _DROPOUT:
        if model.get(key) not in (None, 0):
            raise UserError(f"{where}: model.{key} = {model[key]!r} is not offered; expected 0.0.")
    found: dict[str, Any] = _sizes(model, where, llama=True) | forms(model, where)
    _check_loss(model, found["sequence_length"], where)
    std, output = _std(model, "initializer", where), _std(model, "output_layer_initializer", where)
    by_range = number_or(_STD, model.get("initializer_range"), "initializer_range", where)
    if not 0 < by_range < math.inf:
        raise UserError(f"{where}: model.initializer_range must be a number above 0, not {by_range:g}.")
    std = by_range if std is None else std
    found |= {} if std == _STD else {"init_std": std}
    if (embedding := _std(model, "embedding_initializer", where)) not in (None, std):
        raise UserError(f"{where}: model.embedding_initializer.std = {embedding} is not offered; expected {std}.")
    if output is not None and not math.isclose(output, std / math.sqrt(2 * found["n_layer"]), rel_tol=1e-6):
        found["output_init_std"] = output
    return found


def _check_batch(body: Mapping[str, Any], model: Mapping[str, Any], batch: int, steps: int, where: str) -> None:
    """Asks where a batch may be that of one system, as release 1.8 wrote it; later ones write that of all.

    The forms are alike. A published model trained for its published steps tells: its batch is so many times larger.
    """
    if mapping(body.get("runconfig"), "runconfig", where).get("num_csx") == 1:
        return
    mine = model_shape(resolve_model(ModelConfig(**model)))
    for name, (published, usual, _) in shapes.PUBLISHED.items():
        if mine != shapes.MODELS[name] or not math.isclose(steps, usual, rel_tol=0.05):
            continue
        systems = published * usual / (batch * steps)
        if round(systems) >= 2 and math.isclose(systems, round(systems), rel_tol=0.02):
            tokens = batch * steps * model["sequence_length"]
            raise UserError(
                f"{where}: train_input.batch_size = {batch} makes {tokens / 1e9:.1f}B tokens of the {name} run's "
                f"published {tokens * systems / 1e9:.1f}B: release 1.8 wrote the batch of one of {round(systems)} "
                f"systems. Write batch_size: {batch * round(systems)}, or runconfig.num_csx: 1 if {batch} is all."
            )
    if mapping(body.get("optimizer"), "optimizer", where).keys() & {"beta1", "weight_decay_rate"}:
        log.warning("%s: batch_size = %d is taken for the whole; release 1.8 wrote that of one system.", where, batch)


def _sizes(model: Mapping[str, Any], where: str, llama: bool = False) -> dict[str, int]:
    """Sizes of a model that computes what a GPT-2 does; with `llama`, whose other choices `forms` reads."""
    read = (*CHOICES, *NUMBERS) if llama else ()
    for key, allowed in ({k: v for k, v in _MODEL.items() if k not in read} | (CHOICES if llama else {})).items():
        value = model.get(key, allowed[0])
        if value is not None and value not in allowed:
            raise UserError(
                f"{where}: model.{key} = {value!r} is not offered; expected {' or '.join(map(repr, allowed))}."
            )
    found: dict[str, int] = {}
    for theirs, ours in _SIZES.items():
        value = model.get(theirs)
        largest = shapes.MOST_LAYERS if theirs == "num_hidden_layers" else 1 << 31
        if isinstance(value, int) and not isinstance(value, bool) and not 0 < value <= largest:
            raise UserError(f"{where}: model.{theirs} = {value} must lie between 1 and {largest:,}.")
        if not isinstance(value, int) or isinstance(value, bool):
            near = "" if theirs in model else did_you_mean(theirs, map(str, model))
            raise UserError(f"{where}: model.{theirs} must be a whole number, not {value!r}.{near}")
        found[ours] = value
    known = (*_MODEL, *_DROPOUT, *_MUP, *_MODEL_BESIDE, *_SIZES, *read)
    name_unknown("model", model, known, where)
    return found


def _check_loss(model: Mapping[str, Any], length: int, where: str) -> None:
    """The loss is the mean over the targets here; of a batch of full windows, theirs by batch size may be the same."""
    scaling, weight = model.get("loss_scaling") or "num_tokens", model.get("loss_weight", 1.0)
    expected = {"num_tokens": 1.0, "batch_size": 1 / length}.get(str(scaling), math.nan)
    if not isinstance(weight, int | float) or not abs(weight - expected) <= 1e-9 * expected:
        raise UserError(
            f"{where}: model.loss_scaling = {scaling!r} with loss_weight = {weight!r} is not offered; the loss is the "
            f"mean over the targets: 'num_tokens' with 1.0, or 'batch_size' with 1 / {length}."
        )


def _std(model: Mapping[str, Any], key: str, where: str) -> float | None:
    value = model.get(key)
    if value is None:
        return None
    named = isinstance(value, dict) and value.get("name") == "truncated_normal" and value.get("std") is not None
    std = number(value["std"], f"{key}.std", where) if named else math.nan
    if not 0 < std < math.inf:
        raise UserError(f"{where}: model.{key} must be a truncated_normal with a std, not {value!r}.")
    name_unknown(f"model.{key}", value, _INITIALIZER, where)
    usual = {"mean": 0.0, "a": -2 * std, "b": 2 * std}
    mean, a, b = (number_or(usual[name], value.get(name), f"{key}.{name}", where) for name in usual)
    if mean:
        raise UserError(f"{where}: model.{key}.mean = {mean:g} is not offered; expected 0.0.")
    if not (math.isclose(a, -2 * std, rel_tol=1e-6) and math.isclose(b, 2 * std, rel_tol=1e-6)):
        log.warning("%s: model.%s: a = %g and b = %g are not read: weights are drawn within 2 std, %g.",
                    where, key, a, b, 2 * std)  # fmt: skip
    return std


def _current(body: Mapping[str, Any], init: Mapping[str, Any], where: str) -> tuple[int, Mapping, dict[str, Any]]:
    """Steps, where the data come from, and how often what is done."""
    loop = mapping(init.get("loop"), "trainer.init.loop", where)
    fit = mapping(mapping(body["trainer"], "trainer", where).get("fit"), "trainer.fit", where)
    data = mapping(fit.get("train_dataloader"), "trainer.fit.train_dataloader", where)
    every = {
        "checkpoint_every": mapping(init.get("checkpoint"), "trainer.init.checkpoint", where).get("steps"),
        "eval_every": loop.get("eval_frequency"),
        "log_every": mapping(init.get("logging"), "trainer.init.logging", where).get("log_steps"),
    }
    return (
        _steps(loop, "trainer.init.loop", where),
        data,
        {key: value for key, value in every.items() if value is not None},
    )


def _steps(block: Mapping[str, Any], name: str, where: str) -> int:
    """Steps of a run from its beginning: ``num_steps`` counts before ``max_steps``, as there."""
    key = "max_steps" if block.get("num_steps") is None else "num_steps"
    return whole_number(block.get(key), f"{name}.{key}", where)


def _older(body: Mapping[str, Any], where: str) -> tuple[int, Mapping, dict[str, Any]]:
    run = mapping(body.get("runconfig"), "runconfig", where)
    every = {"checkpoint_every": run.get("checkpoint_steps"), "eval_every": run.get("eval_frequency"),
             "log_every": run.get("log_steps")}  # fmt: skip
    return (
        _steps(run, "runconfig", where),
        mapping(body.get("train_input"), "train_input", where),
        {key: value for key, value in every.items() if value is not None},
    )


def _optimizer(body: Mapping[str, Any], now: bool, where: str) -> tuple[dict[str, Any], list[cerebras_rates.Stretch]]:
    """Our optimizer's settings, and the learning rate's stretches."""
    stated = mapping(body.get("optimizer"), "optimizer", where)
    if now and len(stated) > 1:
        raise UserError(f"{where}: trainer.init.optimizer must hold one optimizer, not {', '.join(map(str, stated))}.")
    kind = next(iter(stated), "") if now else stated.get("optimizer_type", "")
    if str(kind).lower() != "adamw":
        raise UserError(f"{where}: optimizer '{kind}' is not offered; expected AdamW.")
    settings = mapping(stated[kind], f"optimizer.{kind}", where) if now else stated
    for key, expected in (("correct_bias", True), ("use_bias_correction", True), ("adjust_learning_rate", None)):
        if settings.get(key, expected) not in (None, expected):
            raise UserError(f"{where}: optimizer.{key} = {settings[key]!r} is not offered; expected {expected!r}.")
    check_off("optimizer", settings, where)
    beside = ("max_gradient_norm",) if now else ()  # of the precision there, and of nothing here
    name_unknown("optimizer", settings, [key for key in _OPTIMIZER if key not in beside], where)
    betas = settings.get("betas") or [settings.get("beta1", 0.9), settings.get("beta2", 0.999)]
    if not isinstance(betas, list) or len(betas) != 2:
        raise UserError(f"{where}: optimizer.betas must be two numbers, not {betas!r}.")
    clip = (mapping(body.get("precision"), "precision", where) if now else settings).get("max_gradient_norm")
    rate = settings.get("learning_rate")
    stretches = (
        cerebras_rates.current(body.get("schedulers"), rate, where) if now else cerebras_rates.older(rate, where)
    )
    found = {"beta1": betas[0], "beta2": betas[1], "clip": clip or 0.0,
             "eps": settings.get("eps", settings.get("epsilon", 1e-6)),
             "weight_decay": settings.get("weight_decay", settings.get("weight_decay_rate", 0.0))}  # fmt: skip
    found["lr"] = max(max(one.start, one.end) for one in stretches)
    return found, stretches


def _block(settings: Mapping[str, Any]) -> Iterable[str]:
    """Names of the matrices of a block of a model that settings of ours describe."""
    forms = {key: settings[key] for key in ("position", "mlp", "qk_norm") if settings.get(key) is not None}
    if settings.get("n_kv_head") not in (None, settings.get("n_head")):
        forms["position"] = "rope"  # no more one matrix for all three
    return replace(shapes.MODELS.get(str(settings.get("name")), shapes.Shape(1, 2, 1, 1, 1, 1)), **forms).block


def translated(body: Any, where: str, fine_tuning: bool, started: bool = False) -> Any:
    """A whole file of the Cerebras stack, or its ``sparsity`` block beside our settings, as settings of ours."""
    if is_cerebras(body):
        return {"name": re.sub(r"[^\w.-]", "-", Path(where).stem)} | translate(body, where, fine_tuning, started)
    if not isinstance(body, dict) or "sparsity" not in body:
        return body
    body = dict(body)
    block, phases, model = body.pop("sparsity"), body.get("phases"), body.get("model")
    if not isinstance(phases, list) or not phases or not isinstance(phases[0], dict) or "sparsity" in phases[0]:
        raise UserError(f"{where}: a sparsity block goes with phases, the first of which has no sparsity of its own.")
    settings = model if isinstance(model, dict) else {}
    named = shapes.named_shape(str(settings["name"])).n_layer if "name" in settings else 0
    n_layer = settings.get("n_layer") or named
    if not isinstance(n_layer, int) or not 0 <= n_layer <= shapes.MOST_LAYERS:
        raise UserError(f"{where}: model.n_layer must be a whole number of layers, not {n_layer!r}.")
    found = sparsity(block, n_layer, where, older=True, roles=roles_of(_block(settings)))
    seed = {"seed": found.pop("seed")} if "seed" in found else {}
    return body | seed | {"phases": [phases[0] | found, *phases[1:]]}
