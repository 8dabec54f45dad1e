"""Between our GPT and Hugging Face's GPT-2 layout, both ways.

What GPT-2's configuration can say and our GPT cannot (scaled embeddings, scaled logits, attention divided by something
else than the root of the head's width, as under µP) is folded into the weights, so that the function stays the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from vspdf.config.loading import read_yaml
from vspdf.data.tokenizer import Tokenizer, check_tokenizer
from vspdf.errors import UserError
from vspdf.files import read_json
from vspdf.interop import cerebras, cerebras_tensors
from vspdf.interop.masks import canonical, finalize, name_zeros
from vspdf.interop.tensors import read_folder
from vspdf.model import GPT
from vspdf.pattern import Pattern
from vspdf.shapes import MODELS, Shape
from vspdf.sparsity.layer import sparse_layers

log = logging.getLogger("vspdf")

# Activations of GPT-2's configuration that our GPT has; the three forms by tanh are one function.
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
ARCHITECTURES = ("gpt2", "btlm", "jais")  # the latter two are GPT-2 with µP keys; what else they may ask for is refused
_LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # [in, out] there
_BUFFERS = (".attn.bias", ".attn.masked_bias")
_LARGEST = 1e30  # of scales
_SIZES = {"n_layer": "n_layer", "d_model": "n_embd", "n_head": "n_head", "d_ff": "n_inner",
          "vocab_size": "vocab_size", "sequence_length": "n_positions"}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------------


class Scales(NamedTuple):
    """Factors of a configuration that our GPT does not have: of embeddings, logits and scores."""

    embeddings: float
    logits: float
    score: float
    by_layer: bool  # scores of the layer i, counted from 0, are divided by i + 1 as well


def configuration_of(shape: Shape, activation: str = "gelu", end_of_document: int | None = None) -> dict[str, Any]:
    """Content of the config.json with which transformers' GPT-2 is our GPT.

    Raises
    ------
    UserError
        If attention has a width of its own, which GPT-2 does not know.
    """
    if shape.d_attention != shape.d_model:
        raise UserError(
            f"model.d_attention = {shape.d_attention} beside d_model = {shape.d_model}: the GPT-2 layout has one width."
        )
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    ends = {} if end_of_document is None else {"bos_token_id": end_of_document, "eos_token_id": end_of_document}
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
        **{theirs: getattr(shape, ours) for ours, theirs in _SIZES.items()},
        "activation_function": names[activation], "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "scale_attn_weights": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "initializer_range": 0.02, "torch_dtype": "float32", **ends,
    }  # fmt: skip


def read_configuration(config: Mapping[str, Any], where: str = "config.json") -> tuple[Shape, str, Scales]:
    """Shape, activation and scales of a Hugging Face GPT-2 configuration, µP keys included.

    Raises
    ------
    UserError
        Naming the key, if it asks for what our GPT does not have.
    """
    if config.get("model_type") not in ARCHITECTURES:
        raise UserError(
            f"{where}: model_type '{config.get('model_type')}' is not a GPT-2 layout; expected one of "
            f"{', '.join(ARCHITECTURES)}. Other models train through vspdf.sparsify and vspdf.densify in place."
        )
    sizes = {ours: config.get(theirs) for ours, theirs in _SIZES.items()}
    if sizes["d_ff"] is None and isinstance(sizes["d_model"], int):
        sizes["d_ff"] = 4 * sizes["d_model"]
    for ours, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: {_SIZES[ours]} must be a whole number of at least 1, not {value!r}.")
    shape = Shape(**sizes)  # type: ignore[arg-type]
    expected: dict[str, tuple[Any, ...]] = {
        "position_embedding_type": ("learned", "absolute", None),
        "layer_norm_epsilon": (1e-5,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
        "sparsity_config": (None,),
        "compression_config": (None,),
    }
    for key, allowed in expected.items():
        if (value := config.get(key, allowed[0])) not in allowed:
            raise UserError(f"{where}: {key} = {value!r} is not supported; expected {allowed[0]!r}.")
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UserError(
            f"{where}: activation_function '{activation}' is not supported; expected one of {', '.join(ACTIVATIONS)}."
        )
    if config.get("tie_word_embeddings", True) is not True:
        log.warning("%s does not tie the output head to the embeddings: the two must be equal here.", where)
    return shape, ACTIVATIONS[activation], _scales(config, shape, where)


def _configuration(folder: Path) -> tuple[dict[str, Any], str]:
    """Content of a folder's config.json, or what it would be for the Cerebras stack's YAML there; and the file read."""
    if (folder / "config.json").is_file():
        return read_json(folder / "config.json"), str(folder / "config.json")
    bodies = {file: read_yaml(file) for file in sorted(folder.glob("*.y*ml"))}
    files = [file for file, body in bodies.items() if cerebras.is_cerebras(body)]
    if len(files) != 1:
        raise UserError(
            f"'{folder}' holds {len(files)} YAML files of the Cerebras stack: expected one beside the .mdl, with the "
            "model that was trained."
        )
    sizes, activation, scales = cerebras.architecture(bodies[files[0]], str(files[0]))
    if sizes.pop("d_attention") != sizes["d_model"]:
        raise UserError(f"{files[0]}: model.attention_inner_dim is trained here, weights of such a model are not read.")
    named = {_SIZES[key]: value for key, value in sizes.items()}
    return {"model_type": "gpt2", **named, "activation_function": activation, **scales}, str(files[0])


def _scales(config: Mapping[str, Any], shape: Shape, where: str) -> Scales:
    """µP (arXiv:2203.03466) as Cerebras's configurations spell it, in three generations of names."""
    known: set[str] = {"mup_base_hidden_size", "mup_base_filter_size"}  # speak of initialisation and learning rate

    def number(*names: str, default: float) -> float:
        known.update(names)
        value = next((config[name] for name in names if config.get(name) is not None), default)
        if not isinstance(value, int | float) or not 0 < value < _LARGEST:
            raise UserError(f"{where}: {names[0]} must be a positive number, not {value!r}.")
        return float(value)

    embeddings = number("mup_embeddings_scale", "embeddings_scale", default=1.0)
    width = number("mup_width_scale", default=1.0)
    if (base := config.get("mup_base_hidden_size")) and not config.get("mup_width_scale"):
        width = number("mup_base_hidden_size", default=1.0) / shape.d_model
        log.warning("%s: logits are scaled by mup_base_hidden_size / n_embd = %s / %s.", where, base, shape.d_model)
    logits = number("mup_output_alpha", "output_logits_alpha", default=1.0) * width
    logits *= number("width_scale", "output_logits_scale", default=1.0)
    known |= {"mup_scale_qk_dot_by_d", "scale_qk_dot_by_d"}
    by_width = bool(config.get("mup_scale_qk_dot_by_d") or config.get("scale_qk_dot_by_d"))
    for key in config:
        if key.startswith("mup_") and key not in known:
            raise UserError(f"{where}: the µP setting '{key}' is not known, so its effect cannot be kept.")
    head = shape.d_model / shape.n_head
    score = number("attention_logits_alpha", default=1.0) * (head**-0.5 if by_width else 1.0)
    if config.get("scale_attn_weights", True) is False:
        score *= head**0.5
    return Scales(embeddings, logits, score, by_layer=bool(config.get("scale_attn_by_inverse_layer_idx")))


def known_name(shape: Shape, activation: str = "gelu") -> str | None:
    """Name of the model with this shape, e.g. cerebras-gpt-111m; Cerebras's have the exact GELU."""
    return next(
        (name for name, known in MODELS.items() if known == shape and (activation == "gelu") == ("cerebras" in name)),
        None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# From others
# ---------------------------------------------------------------------------------------------------------------------


def read_theirs(
    folder: Path, tokenizer: Tokenizer | None = None
) -> tuple[GPT, Tokenizer | None, dict[str, Any], dict[str, Pattern]]:
    """A dense model from a folder of others, and the patterns that NaN or ``_mask`` tensors told, by layer.

    Raises
    ------
    UserError
        As `load`.
    """
    config, where = _configuration(folder)
    shape, activation, scales = read_configuration(config, where)
    if tokenizer is None:
        tokenizer = _tokenizer(folder)
    if tokenizer is not None:
        check_tokenizer(tokenizer, shape, str(folder), config.get("eos_token_id"))
    found = canonical(read_folder(folder), str(folder)).tensors
    tensors, masks = finalize(cerebras_tensors.from_cerebras(found, str(folder)), str(folder))
    name_zeros(tensors, masks, str(folder))
    model, patterns = from_tensors(shape, activation, tensors, masks, scales, str(folder))
    state = {"step": 0, "model": asdict(shape), "activation": activation}
    return model, tokenizer, state, patterns


def from_tensors(
    shape: Shape,
    activation: str,
    tensors: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    scales: Scales | None = None,
    where: str = "the checkpoint",
) -> tuple[GPT, dict[str, Pattern]]:
    """Our dense GPT from tensors under GPT-2's names, and patterns from masks of them.

    Raises
    ------
    UserError
        If tensors are missing, too many or of another shape, or the output head is not the embedding.
    """
    given = {
        name.removeprefix("transformer."): tensor for name, tensor in tensors.items() if not name.endswith(_BUFFERS)
    }
    head = given.pop("lm_head.weight", None)
    if shape.parameters > 2 * (held := sum(tensor.numel() for tensor in given.values())):  # nothing is built for it
        raise UserError(f"{where}: of a model of {shape.parameters:,} parameters, {held:,} are here.")
    with torch.device("meta"):
        model = GPT(shape, activation=activation)
    wanted = dict(model.named_parameters())
    if missing := [name for name in wanted if name not in given]:
        raise UserError(f"{where}: {len(missing)} tensors are missing, the first is '{missing[0]}'.")
    if extra := [name for name in given if name not in wanted]:
        raise UserError(f"{where}: '{extra[0]}' is no tensor of a GPT-2 of {shape.n_layer} layers.")
    if head is not None and not torch.equal(head, given["wte.weight"]):
        raise UserError(
            f"{where}: its output head differs from its embeddings; here the two are one tensor (tied), so it cannot "
            "be taken over."
        )
    turn = lambda name, t: t.T if name.endswith(_LINEAR) and t.dim() == 2 else t  # noqa: E731
    for name, parameter in wanted.items():
        if turn(name, given[name]).shape != parameter.shape:
            raise UserError(
                f"{where}: '{name}' has the shape {tuple(given[name].shape)}, which does not fit its config.json."
            )
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(turn(name, given[name]))
        if scales is not None:
            _fold(model, scales)
    patterns = {}
    for name, mask in masks.items():
        name = name.removeprefix("transformer.")
        if not name.endswith(_LINEAR):
            if bool(mask.all()):
                continue
            raise UserError(f"{where}: '{name}' is masked; only projections and FFN matrices are sparse here.")
        patterns[name.removesuffix(".weight")] = Pattern.from_mask(turn(name, mask).contiguous())
    return model, patterns


def _fold(model: GPT, scales: Scales) -> None:
    """Multiplies scales into weights: embeddings into both tables, scores into queries, logits into the last norm."""
    model.wte.weight.mul_(scales.embeddings)
    model.wpe.weight.mul_(scales.embeddings)
    for parameter in model.ln_f.parameters():  # the head is the table of embeddings, already scaled
        parameter.mul_(scales.logits / scales.embeddings)
    for i, block in enumerate(model.h):
        for parameter in block.attn.c_attn.parameters():  # type: ignore[union-attr]
            parameter[: model.shape.d_model].mul_(scales.score / (i + 1 if scales.by_layer else 1))


def _tokenizer(folder: Path) -> Tokenizer | None:
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder / "tokenizer.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return Tokenizer.gpt2(folder)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# To Hugging Face
# ---------------------------------------------------------------------------------------------------------------------


def to_tensors(model: GPT) -> dict[str, Tensor]:
    """A GPT's weights under GPT-2's names and in its layout; masked weights are zeros."""
    layers = sparse_layers(model)
    dense = {name: parameter.detach() for name, parameter in model.named_parameters() if not name.endswith(".values")}
    with torch.no_grad():
        dense |= {f"{name}.weight": layer.weight for name, layer in layers.items()}
    return {
        f"transformer.{name}": (tensor.T if name.endswith(_LINEAR) else tensor).contiguous()
        for name, tensor in dense.items()
    }


def write_hugging_face(model: GPT, tokenizer: Tokenizer | None, folder: Path) -> None:
    """Fills a folder that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    folder.mkdir(parents=True)
    end = None if tokenizer is None else tokenizer.end_of_document
    config = configuration_of(model.shape, model.activation, end)
    files = {"config.json": config}
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokenizer.end_token,
            "eos_token": tokenizer.end_token,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.shape.sequence_length,
        }
        files["generation_config.json"] = {"bos_token_id": end, "eos_token_id": end}
    for name, body in files.items():
        (folder / name).write_text(json.dumps(body, indent=2) + "\n")
    save_file(to_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
