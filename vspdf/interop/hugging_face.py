"""Between our GPT and folders of Hugging Face transformers, both ways; configurations by `architectures`.

What GPT-2's configuration can say and our GPT cannot (scaled embeddings, scaled logits, attention divided by something
else than the root of the head's width, as under µP) is folded into the weights, so that the function stays the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from vspdf.config.loading import read_yaml
from vspdf.data.tokenizer import KNOWN_BEGINS, Tokenizer, check_tokenizer
from vspdf.errors import UserError
from vspdf.files import read_json
from vspdf.interop import cerebras, cerebras_tensors
from vspdf.interop.architecture_tensors import to_ours, to_theirs
from vspdf.interop.architectures import (
    ACTIVATIONS,
    ARCHITECTURES,
    GPT2,
    GPT2_SIZES,
    LAYOUTS,
    read_gpt2,
    read_shape,
    written_as,
)  # fmt: skip
from vspdf.interop.masks import MASK, canonical, finalize, name_zeros
from vspdf.interop.tensors import read_folder
from vspdf.model import GPT
from vspdf.pattern import Pattern
from vspdf.shapes import MODELS, Shape
from vspdf.sparsity.layer import sparse_layers
from vspdf.sparsity.stored import from_state

log = logging.getLogger("vspdf")

_LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # [in, out] there
_BUFFERS = (".attn.bias", ".attn.masked_bias")
_LARGEST = 1e30  # of scales


# ---------------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------------


class Scales(NamedTuple):
    """Factors of a configuration that our GPT does not have: of embeddings, logits and scores."""

    embeddings: float
    logits: float
    score: float
    by_layer: bool  # scores of the layer i, counted from 0, are divided by i + 1 as well


def configuration_of(shape: Shape) -> tuple[str, dict[str, Any]]:
    """The architecture of transformers that is our GPT of a shape, and the content of its config.json.

    Raises
    ------
    UserError
        If there is none.
    """
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    config: dict[str, Any] = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
        **{theirs: getattr(shape, ours) for ours, theirs in GPT2_SIZES.items()},
        "activation_function": names.get(shape.mlp, ""), "layer_norm_epsilon": shape.norm_eps,
        "tie_word_embeddings": shape.tie, "scale_attn_weights": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }  # fmt: skip
    kind = "gpt2"
    if shape.mlp not in names or read_gpt2(config, "") != shape:
        found = written_as(shape)
        if found is None:
            part = f" with rope_fraction {shape.rope_fraction} (gpt_neox alone has one)" * (shape.rope_fraction != 1)
            raise UserError(
                f"no architecture of transformers that is written here (gpt2, {', '.join(LAYOUTS)}) is a model of "
                f"norm {shape.norm}, position {shape.position}{part}, mlp {shape.mlp}, bias {shape.bias}, qk_norm "
                f"{shape.qk_norm} and {shape.n_head} heads of {shape.head_dim} in {shape.d_model}."
            )
        kind, config = found
    return kind, config | {"initializer_range": 0.02, "torch_dtype": "float32"}


def read_configuration(config: Mapping[str, Any], where: str = "config.json") -> tuple[Shape, Scales | None]:
    """Shape of a Hugging Face configuration; and of a GPT-2 its scales, µP keys included.

    Raises
    ------
    UserError
        Naming the key, if it asks for what our GPT does not have.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{where}: model_type '{kind}' is not covered; expected one of {', '.join(ARCHITECTURES)}. Other models "
            "train through vspdf.sparsify and vspdf.densify in place."
        )
    shape = read_shape(config, where)
    return shape, _scales(config, shape, where) if kind in GPT2 else None


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
    named = {GPT2_SIZES[key]: value for key, value in sizes.items()}
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


def known_name(shape: Shape) -> str | None:
    """Name of the model with this shape, e.g. cerebras-gpt-111m; of GPT-2's own, only with GELU by tanh."""
    for name, known in MODELS.items():
        if (replace(known, mlp="gelu_tanh") if name.startswith("gpt") else known) == shape:
            return name
    return None


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
    shape, scales = read_configuration(config, where)
    end = next(iter(_ids(config.get("eos_token_id"))), None)
    if tokenizer is None:
        tokenizer = _tokenizer(folder, config)
    if tokenizer is not None:
        check_tokenizer(tokenizer, shape, str(folder), end)
    kind = config["model_type"]
    stored = read_folder(folder)
    turned = [name for name in stored if kind in GPT2 and name.endswith(_LINEAR)]
    found = canonical(with_masks(stored, turned), str(folder)).tensors
    tensors, masks = finalize(cerebras_tensors.from_cerebras(found, str(folder)), str(folder))
    name_zeros(tensors, masks, str(folder))
    if kind in LAYOUTS:
        tensors, masks = to_ours(kind, shape, tensors), to_ours(kind, shape, masks)
    model, patterns = from_tensors(shape, tensors, masks, scales, str(folder), gpt2=kind in GPT2)
    state = {"step": 0, "model": asdict(shape)}
    return model, tokenizer, state, patterns


def with_masks(tensors: Mapping[str, Tensor], turned: Iterable[str]) -> dict[str, Tensor]:
    """What `save_pretrained` wrote of a sparse model, with a mask beside each weight in place of values and pattern.

    `turned` names the weights that lie [in, out].
    """
    found, turned = dict(tensors), set(turned)
    for name in [name.removesuffix("._extra_state") for name in tensors if name.endswith("._extra_state")]:
        weight = tensors.get(f"{name}.weight")
        if weight is None or f"{name}.values" not in tensors or weight.dim() != 2:
            continue
        out, into = reversed(weight.shape) if f"{name}.weight" in turned else weight.shape
        mask = from_state(tensors[f"{name}._extra_state"], (out, into)).mask()
        found[f"{name}.weight{MASK}"] = mask.T if f"{name}.weight" in turned else mask
        del found[f"{name}._extra_state"], found[f"{name}.values"]
    return found


def from_tensors(
    shape: Shape,
    tensors: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    scales: Scales | None = None,
    where: str = "the checkpoint",
    gpt2: bool = True,
) -> tuple[GPT, dict[str, Pattern]]:
    """Our dense GPT from tensors under our names, and patterns from masks of them; `gpt2`: in its layout and names.

    Raises
    ------
    UserError
        If tensors are missing, too many or of another shape, or the output head is not the embedding.
    """
    given = {
        name.removeprefix("transformer."): tensor for name, tensor in tensors.items() if not name.endswith(_BUFFERS)
    }
    head = given.get("lm_head.weight")
    if shape.tie:
        given.pop("lm_head.weight", None)
    elif head is None and "wte.weight" in given:
        given["lm_head.weight"] = given["wte.weight"]  # one tensor in the file, whatever the configuration says
    if shape.parameters > 2 * (held := sum(tensor.numel() for tensor in given.values())):  # nothing is built for it
        raise UserError(f"{where}: of a model of {shape.parameters:,} parameters, {held:,} are here.")
    with torch.device("meta"):
        model = GPT(shape)
    wanted, what = dict(model.named_parameters()), "GPT-2" if gpt2 else "model"
    if missing := [name for name in wanted if name not in given]:
        raise UserError(f"{where}: {len(missing)} tensors are missing, the first is '{missing[0]}'.")
    if extra := [name for name in given if name not in wanted]:
        raise UserError(f"{where}: '{extra[0]}' is no tensor of a {what} of {shape.n_layer} layers.")
    if shape.tie and head is not None and not torch.equal(head, given["wte.weight"]):
        raise UserError(
            f"{where}: its output head differs from its embeddings, while its configuration says that the two are one "
            "tensor (tie_word_embeddings)."
        )
    turn = lambda name, t: t.T if gpt2 and name.endswith(_LINEAR) and t.dim() == 2 else t  # noqa: E731
    may_be_masked = tuple(f"{name}.weight" for name in shape.block)
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
        if not name.endswith(may_be_masked):
            if bool(mask.all()):
                continue
            raise UserError(f"{where}: '{name}' is masked; only projections and FFN matrices are sparse here.")
        patterns[name.removesuffix(".weight")] = Pattern.from_mask(turn(name, mask).contiguous())
    return model, patterns


def _fold(model: GPT, scales: Scales) -> None:
    """Multiplies scales into weights: embeddings into both tables, scores into queries, logits into the last norm."""
    model.wte.weight.mul_(scales.embeddings)
    if model.wpe is not None:
        model.wpe.weight.mul_(scales.embeddings)
    for parameter in model.ln_f.parameters():  # a tied head is the table of embeddings, already scaled
        parameter.mul_(scales.logits / (scales.embeddings if model.shape.tie else 1))
    for i, block in enumerate(model.h):
        for parameter in block.attn.c_attn.parameters():  # type: ignore[union-attr]
            parameter[: model.shape.d_model].mul_(scales.score / (i + 1 if scales.by_layer else 1))


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> Tokenizer | None:
    """A folder's tokenizer, with what other files of the folder say of it.

    Documents end with the first ``eos_token_id``, if it is a special token; answers with any, as in generation.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        special = {token["id"]: token["content"] for token in _added(file) if token.get("special")}
        own = _body(folder / "tokenizer_config.json")
        ends = _ids(config.get("eos_token_id"))
        others = [*ends[1:], *_ids(_body(folder / "generation_config.json").get("eos_token_id"))]
        named = _named(_body(folder / "special_tokens_map.json") | own)
        end = special.get(ends[0]) if ends else None
        if end is not None:
            named.setdefault("eos_token", end)
        if "bos_token" not in named:
            usual = (special.get(i, "") for i in _ids(config.get("bos_token_id")))
            named["bos_token"] = next((token for token in (*usual, *KNOWN_BEGINS) if token in special.values()), "")
        about = {
            "end_token": end,
            "other_ends": [special[i] for i in dict.fromkeys(others) if i in special and i not in ends[:1]],
            "named_tokens": named,
            "chat_template": _chat_template(folder, own),
        }
        return Tokenizer.load(file, {key: value for key, value in about.items() if value})
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return Tokenizer.gpt2(folder)
    return None


def _body(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _added(file: Path) -> list[dict[str, Any]]:
    """The tokens that a tokenizer.json adds to its vocabulary; none where it is damaged: `Tokenizer.load` says so."""
    try:
        return [one for one in read_json(file)["added_tokens"] if {"id", "content"} <= one.keys()]
    except (UserError, LookupError, TypeError, AttributeError):
        return []


def _ids(said: Any) -> list[int]:
    return [i for i in (said if isinstance(said, list) else [said]) if type(i) is int]


def _named(said: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens as a tokenizer's configuration names them; "" where it says that there is none."""
    named = {key: one for key, one in said.items() if key.endswith("_token")}
    texts = {key: one.get("content") if isinstance(one, dict) else one for key, one in named.items()}
    return {key: text or "" for key, text in texts.items() if isinstance(text, str | None)}


def _chat_template(folder: Path, own: Mapping[str, Any]) -> str | None:
    """How a folder says that a conversation is written: a file of its own, or in its tokenizer's configuration."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"'{file}' is not UTF-8: {error}.") from None
    said = own.get("chat_template")
    if isinstance(said, list):  # several, by name
        said = next(
            (one.get("template") for one in said if isinstance(one, dict) and one.get("name") == "default"), None
        )
    return said if isinstance(said, str) else None


# ---------------------------------------------------------------------------------------------------------------------
# To Hugging Face
# ---------------------------------------------------------------------------------------------------------------------


def to_tensors(model: GPT, kind: str = "gpt2") -> dict[str, Tensor]:
    """A GPT's weights under the names of an architecture and in its layout; masked weights are zeros."""
    layers = sparse_layers(model)
    dense = {name: parameter.detach() for name, parameter in model.named_parameters() if not name.endswith(".values")}
    with torch.no_grad():
        dense |= {f"{name}.weight": layer.weight for name, layer in layers.items()}
    if kind in LAYOUTS:
        return to_theirs(kind, model.shape, dense)
    head = {} if model.lm_head is None else {"lm_head.weight": dense.pop("lm_head.weight")}
    return head | {
        f"transformer.{name}": (tensor.T if name.endswith(_LINEAR) else tensor).contiguous()
        for name, tensor in dense.items()
    }


def write_hugging_face(model: GPT, tokenizer: Tokenizer | None, folder: Path) -> None:
    """Fills a folder that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    kind, config = configuration_of(model.shape)
    folder.mkdir(parents=True)
    files = {"config.json": config}
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        named = {key: token or None for key, token in tokenizer.named_tokens.items()}
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.shape.sequence_length,
        }
        if tokenizer.chat_template is not None:
            files["tokenizer_config.json"]["chat_template"] = tokenizer.chat_template
        ends = tokenizer.ends if len(tokenizer.ends) > 1 else tokenizer.end_of_document
        ids = {"bos_token_id": tokenizer.vocabulary.get(named["bos_token"] or ""), "eos_token_id": ends}
        config |= ids
        files["generation_config.json"] = ids
    for name, body in files.items():
        (folder / name).write_text(json.dumps(body, indent=2) + "\n")
    save_file(to_tensors(model, kind), folder / "model.safetensors", metadata={"format": "pt"})
