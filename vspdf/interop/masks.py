"""Masks as others store them: found, applied, and gone; what cannot be applied is refused by name.

NaN in the place of a masked weight, in weights and optimizer state alike (the Cerebras stack's older form), or a tensor
of zeros and ones, 1 where a weight is kept: ``NAME_mask`` beside NAME (its newer form), ``NAME_orig`` and ``NAME_mask``
(torch.nn.utils.prune), ``parametrizations.NAME.original`` and its ``mask`` (torch.ao), ``__NAME_mma_mask`` (apex),
``MODULE.mask``, and collections of masks by name beside a state dict.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vspdf import mask_tensors
from vspdf.errors import UserError
from vspdf.interop.tensors import flatten
from vspdf.sparsity.amounts import plain_name

log = logging.getLogger("vspdf")

MASK = "_mask"
_ORIGINAL = re.compile(r"(?P<module>.*\.)?parametrizations\.(?P<name>\w+)\.original")
_PARAMETRIZED = re.compile(r"(?P<module>.*\.)?parametrizations\.(?P<name>\w+)\.\d+\.mask")
_APEX = re.compile(r"(?P<module>.*\.)?__(?P<name>\w+)_mma_mask")
_PARALLEL = "module."  # before all names
_COLLECTED = {"mask", "masks"}
_DEEPEST = 16  # parts of a name that are compared
EMBEDDINGS = ("wte", "wpe", "embed", "lm_head")  # parts of names of matrices that are never sparse
ZEROS = 0.1  # a matrix with so many exact zeros was pruned
# Endings of what is no plain weight with a plain mask, and what to do.
_OTHERS = {
    "mask_scores": "holds scores of a mask that is still learnt: let its own library make the mask final",
    "bitmask": "is a weight in compressed-tensors' form: save it decompressed",
    "compressed": "is a weight in compressed-tensors' form: save it decompressed",
    "weight_packed": "is a packed weight: save it decompressed",
    "crow_indices": "is part of a sparse tensor: save it whole, dense or as torch's sparse tensor",
    "ccol_indices": "is part of a sparse tensor: save it whole, dense or as torch's sparse tensor",
}


class Finalized(NamedTuple):
    """Dense tensors by name, and a boolean mask (True: kept) of each tensor that held masked weights."""

    tensors: dict[str, Tensor]
    masks: dict[str, Tensor]


class Renamed(NamedTuple):
    """Tensors with every mask as ``NAME_mask`` beside NAME, and what became of each name (None: a mask that was)."""

    tensors: dict[str, Tensor]
    names: dict[str, str | None]


def canonical(tensors: Mapping[str, Tensor], where: str = "the checkpoint") -> Renamed:
    """Brings masks into one form, ``NAME_mask`` beside NAME and of its shape; sparse tensors too.

    Names lose what torch.compile and the wrappers of several devices put into them.

    Raises
    ------
    UserError
        Naming the tensor, if it is part of a form that cannot be read as a weight and its mask.
    """
    parallel = all(name.startswith(_PARALLEL) for name in tensors)
    bare = {name: _bare(name, parallel) for name in tensors}
    weights = {_plain(name): stored for stored, name in bare.items()}
    ends = _ends(weights) if any(_COLLECTED & {*name.split(".")} for name in weights) else {}
    owners = {stored: owner for stored, name in bare.items() if (owner := _owner(stored, name, tensors, weights, ends))}
    masks: dict[str, Tensor] = {}
    for stored, owner in owners.items():
        mask = _as_mask(stored, tensors[stored], tensors[weights[owner]], where)
        masks[owner] = mask & masks[owner] if owner in masks else mask
    found: dict[str, Tensor] = {}
    for stored, name in bare.items():
        tensor, plain = tensors[stored], _plain(name)
        if stored in owners:
            continue
        if tensor.layout != torch.strided:
            masks[plain] = mask_tensors.stored(tensor) & masks.get(plain, torch.tensor(True))
            tensor = tensor.to_dense()
        if plain not in masks:
            _refuse_other(name, weights, where)
            plain = name
        if plain in found:
            raise UserError(f"{where}: holds '{stored}' and another tensor that is '{plain}' too; expected one.")
        found[plain], bare[stored] = tensor, plain
    names = {stored: None if stored in owners else name for stored, name in bare.items()}
    return Renamed(found | {name + MASK: mask for name, mask in masks.items()}, names)


def _bare(name: str, parallel: bool) -> str:
    return plain_name(name.removeprefix(_PARALLEL) if parallel else name)


def _plain(name: str) -> str:
    """Name of a weight without what pruning libraries put into it."""
    if match := _ORIGINAL.fullmatch(name):
        return f"{match['module'] or ''}{match['name']}"
    return name.removesuffix("_orig")


def _ends(weights: Mapping[str, str]) -> dict[str, list[str]]:
    """Weights that are in no collection of masks, by every end of their names."""
    found: dict[str, list[str]] = {}
    for name in weights:
        parts = name.split(".")
        if not _COLLECTED & {*parts}:
            for i in range(max(0, len(parts) - _DEEPEST), len(parts)):
                found.setdefault(".".join(parts[i:]), []).append(name)
    return found


def _owner(
    stored: str, name: str, tensors: Mapping[str, Tensor], weights: Mapping[str, str], ends: Mapping[str, list[str]]
) -> str | None:
    """Plain name of the weight that a tensor is the mask of, or None if it is none."""
    if name.endswith(MASK):
        base = name.removesuffix(MASK)
        if base in weights:
            return base
        if (match := _APEX.fullmatch(name)) and (base := f"{match['module'] or ''}{match['name']}") in weights:
            return base
    *parents, last = name.split(".")
    if not _COLLECTED & {last, *parents}:
        return None
    if (match := _PARAMETRIZED.fullmatch(name)) and (base := f"{match['module'] or ''}{match['name']}") in weights:
        return base
    beside = ".".join([*parents, "weight"])
    if last == "mask" and beside in weights and tensors[weights[beside]].shape == tensors[stored].shape:
        return beside
    parts = parents if last == "mask" else [*parents, last]
    for i in range(max(0, len(parts) - _DEEPEST), len(parts)):  # in a collection of masks: the longest end that fits
        match ends.get(".".join(parts[i:]), []):
            case [one] if len(parts) - i > 1 or tensors[weights[one]].shape == tensors[stored].shape:
                return one
    return None


def _as_mask(name: str, mask: Tensor, weight: Tensor, where: str) -> Tensor:
    if name.endswith(".mask") and mask.dim() == 1 and weight.dim() > 1 and len(mask) == len(weight):
        mask = mask.view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape)  # of rows, as torch.ao prunes channels
    if mask.shape != weight.shape:
        raise UserError(
            f"{where}: '{name}' of shape {tuple(mask.shape)} does not fit its weight of shape {tuple(weight.shape)}."
        )
    if mask.layout != torch.strided:
        mask = mask.to_dense()
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise UserError(f"{where}: '{name}' holds values beside 0 and 1.")
    mask = mask.bool()
    if weight.layout == torch.strided and weight.is_floating_point():
        there = (weight != 0) & ~torch.isnan(weight)
        if bool(there.any()) and bool(mask.any()) and not bool(there[mask].any()):
            raise UserError(
                f"{where}: '{name}' keeps none of the values that its weight has: expected 1 for kept, 0 for masked."
            )
    return mask


def _refuse_other(name: str, names: Mapping[str, Any], where: str) -> None:
    """What has no mask here but speaks of one: taken as it is, it would be a dense weight at full value."""
    base, _, last = name.rpartition(".")
    if _ORIGINAL.fullmatch(name) and f"{base}.0._u" not in names:  # of a spectral norm
        raise UserError(
            f"{where}: '{name}' is pruned by torch.ao, and its mask is in the sparsifier, not here: call "
            "sparsifier.squash_mask() before saving."
        )
    if last.endswith("_orig") and name.removesuffix("_orig") + "_u" not in names:
        raise UserError(f"{where}: '{name}' has no '{name.removesuffix('_orig') + MASK}' beside it.")
    if last in _OTHERS:
        raise UserError(f"{where}: '{name}' {_OTHERS[last]}.")
    if last == "values" and {f"{base}._extra_state", f"{base}.pattern"} & names.keys():
        raise UserError(
            f"{where}: '{name}' holds the kept weights of a sparse layer of vspdf, which are read by its model: give "
            "the run directory, or densify(model) before saving."
        )


def finalize(tensors: Mapping[str, Tensor], where: str = "the checkpoint") -> Finalized:
    """Masked weights and their optimizer state become zeros; masks go, and weights get their plain names.

    NaN marks masked weights only in matrices named ``...weight`` that are no embedding, and in tensors that are NaN at
    exactly the positions of such a one (its optimizer state).

    Raises
    ------
    UserError
        As `canonical`, and naming the tensor if NaN stands where no mask explains it, a value is infinite, or a whole
        matrix is NaN.
    """
    return _finalize(canonical(tensors, where).tensors, where)


def _finalize(tensors: Mapping[str, Tensor], where: str) -> Finalized:
    masks = {name: tensors[name + MASK] for name in tensors if name + MASK in tensors}
    clean: dict[str, Tensor] = {}
    later: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(MASK) and name.removesuffix(MASK) in masks:
            continue
        if tensor.is_floating_point() and tensor.element_size() == 1:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{where}: '{name}' is a weight in {kind}: save it in bfloat16 or float32.")
        if not tensor.is_floating_point():
            clean[name] = tensor if name not in masks else tensor.masked_fill(~masks[name], 0)
            continue
        if name in masks:
            tensor = tensor.masked_fill(~masks[name], 0)
        if bool(torch.isfinite(tensor).all()):
            clean[name] = tensor
            continue
        if bool(torch.isinf(tensor).any()):
            raise UserError(f"{where}: '{name}' holds an infinite value; the run that wrote it had diverged.")
        nan = torch.isnan(tensor)
        if name in masks:
            raise UserError(f"{where}: '{name}' is NaN at {int(nan.sum())} positions that its mask keeps.")
        clean[name] = torch.zeros_like(tensor)  # keeps the order of names
        if tensor.dim() == 2 and is_weight(name) and not bool(nan.all()):
            masks[name] = ~nan
            clean[name] = torch.nan_to_num(tensor, nan=0.0)
        else:
            later[name] = tensor
    for name, tensor in later.items():
        nan = torch.isnan(tensor)
        state = name.rsplit(".", 1)[-1] not in ("weight", "bias")
        if not state or not any(mask.shape == nan.shape and torch.equal(mask, ~nan) for mask in masks.values()):
            raise UserError(
                f"{where}: '{name}' is NaN at {int(nan.sum())} of {nan.numel()} positions, and no mask explains it."
            )
        clean[name] = torch.nan_to_num(tensor, nan=0.0)
    return Finalized(clean, masks)


def finalize_tree(tree: Any, where: str = "the checkpoint") -> tuple[Any, dict[str, Tensor]]:
    """Does what `finalize` does to nested dicts and lists; returns the same nesting, and masks by dotted name."""
    renamed = canonical(flatten(tree), where)
    clean, masks = _finalize(renamed.tensors, where)
    return _rebuild(tree, clean, renamed.names, ""), masks


def _rebuild(tree: Any, clean: Mapping[str, Tensor], names: Mapping[str, str | None], prefix: str) -> Any:
    def inside(key: Any) -> str:
        return f"{prefix}.{key}" if prefix else str(key)

    def kept() -> Iterator[tuple[Any, Any]]:
        for key, value in tree.items():
            old = inside(key)
            if not isinstance(value, Tensor):
                yield key, _rebuild(value, clean, names, old)
            elif (new := names[old]) is not None and new in clean:
                yield key if new == old else new.removeprefix(f"{prefix}." if prefix else ""), clean[new]

    if isinstance(tree, Tensor):
        return clean.get(names[prefix] or "", tree)
    if isinstance(tree, Mapping):
        return dict(kept())
    if isinstance(tree, list | tuple):
        return [_rebuild(value, clean, names, inside(i)) for i, value in enumerate(tree)]
    return tree


def name_zeros(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], where: str) -> dict[str, float]:
    """Share of exact zeros of each matrix that has many and no mask, as pruning leaves it that stores zeros alone.

    Zeros are not taken for masked, and that is said.
    """
    found = {}
    for name, tensor in tensors.items():
        if name not in masks and tensor.dim() == 2 and tensor.is_floating_point() and is_weight(name):
            share = 1 - int(torch.count_nonzero(tensor)) / max(1, tensor.numel())
            if ZEROS <= share < 1:
                found[name] = share
    if found:
        what = "matrix without a mask holds" if len(found) == 1 else "matrices without masks hold"
        name, share = next(iter(found.items()))
        log.warning(
            "%s: %d %s zeros ('%s': %.1f %% of %s), kept as weights; vspdf.sparsify(model, sparsity, "
            'init_method="from_zeros") takes zeros for masked.',
            where, len(found), what, name, 100 * share, f"{tensors[name].numel():,}",
        )  # fmt: skip
    return found


def stored_in_out(tensors: Mapping[str, Tensor]) -> tuple[set[str], set[str]]:
    """Names of weights that lie [in, out], as transformers' Conv1D has them, and of square ones that may.

    A bias tells, as long as its layer has outputs; of a square weight those layers do whose names are alike longest.
    """
    told: dict[str, bool] = {}
    square: list[str] = []
    for name, weight in tensors.items():
        bias = tensors.get(f"{name.removesuffix('weight')}bias")
        if name.split(".")[-1] != "weight" or weight.dim() != 2 or bias is None or bias.dim() != 1:
            continue
        if weight.shape[0] == weight.shape[1] == len(bias):
            square.append(name)
        elif len(bias) in weight.shape:
            told[name] = len(bias) == weight.shape[1]
    by_beginning: dict[tuple[str, ...], set[bool]] = {}
    for name, turned in told.items():
        parts = name.split(".")
        for i in range(min(len(parts), _DEEPEST)):
            by_beginning.setdefault(tuple(parts[:i]), set()).add(turned)
    unsure = set()
    for name in square:
        parts = name.split(".")
        beginnings = (tuple(parts[:i]) for i in range(min(len(parts), _DEEPEST), -1, -1))
        found = next((by_beginning[part] for part in beginnings if part in by_beginning), {True, False})
        told[name] = found == {True}
        if len(found) > 1:
            unsure.add(name)
    return {name for name, turned in told.items() if turned}, unsure


def is_weight(name: str) -> bool:
    """Whether a tensor's name is that of a module's weight that pruning may have made sparse."""
    parts = name.split(".")
    return parts[-1] == "weight" and "optimizer" not in parts and not any(e in name for e in EMBEDDINGS)
