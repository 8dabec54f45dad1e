"""Files of masks, whoever wrote them, as patterns by name, and patterns as files: the one reader of masks.

What a file tells is which weights exist. Sparse forms keep what they store, explicit zeros included; of each dense
matrix a mask beside the weight counts, else NaN in the place of what is gone, else zeros. Weights that lie [in, out],
as transformers' Conv1D has them, are turned, their masks with them. Nothing that is read is trusted: no code is run,
indices are checked, and no file takes far more memory than it is large.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor

from vspdf.errors import UserError, did_you_mean, in_one_line, near_path
from vspdf.files import read_json, write_whole
from vspdf.interop.cerebras_tensors import from_cerebras
from vspdf.interop.hugging_face import _LINEAR, GPT2, with_masks
from vspdf.interop.masks import EMBEDDINGS, MASK, ZEROS, canonical, is_weight, stored_in_out
from vspdf.interop.tensors import PICKLES, flatten, read_folder
from vspdf.interop.tensors import read as read_tensors
from vspdf.pattern import Pattern
from vspdf.runs import checkpoint
from vspdf.runs import masks as run_masks
from vspdf.runs.folder import Run

log = logging.getLogger("vspdf")
T = TypeVar("T")

EXPECTED = ".smtx, .mtx, .npz, .pt or .safetensors"
_SMTX = "three lines: 'rows, columns, kept', row pointers, column indices"
_LARGEST = 1 << 31  # positions of one matrix
_ROOM, _GROWTH = 64 << 20, 1000  # positions that any file may have, and by byte of it
_PACKED = 100  # bytes by byte of a compressed file
_NO_NAME = ("", "mask", "weight", "arr_0")  # of a matrix that is of no layer: none, and what writers put for one


class Masks(NamedTuple):
    """What a file tells of layers.

    Attributes
    ----------
    patterns : dict of str to Pattern
        By name; "" of a matrix without one.
    dense : set of str
        Layers whose weight is there without a mask.
    unsure : set of str
        Layers whose square weight has a mask and may lie [in, out].
    """

    patterns: dict[str, Pattern]
    dense: frozenset[str] = frozenset()
    unsure: frozenset[str] = frozenset()


def read(path: str | Path, name: str | None = None) -> Pattern:
    """Reads one mask; `vspdf.Pattern.read` is the public form."""
    path = Path(path)
    if name is not None:
        if path.suffix.lower() in (".smtx", ".mtx"):
            raise UserError(f"'{path}' holds one matrix, without names: leave name='{name}' away.")
        return named(_labelled(_everything(path, name).patterns, path), name, path)
    found = read_all(path)
    if len(found) > 1:
        names = ", ".join(f"'{each}'" for each in list(found)[:3])
        raise UserError(f"'{path}' holds {len(found)} masks ({names}{', ...' * (len(found) > 3)}): say which by name=.")
    return next(iter(found.values()))


def read_all(path: str | Path) -> dict[str, Pattern]:
    """Reads every mask of a file or a folder, by name; a matrix without a name has the file's.

    Raises
    ------
    UserError
        As `vspdf.Pattern.read`.
    """
    return _labelled(by_layer(path, generic=False).patterns, Path(path))


def by_layer(path: str | Path, generic: bool = True) -> Masks:
    """The same, with what else the file tells of layers; `generic`: one mask with a name like "mask" has none.

    Raises
    ------
    UserError
        As `vspdf.Pattern.read`.
    """
    found = _everything(Path(path))
    if not found.patterns:
        raise UserError(f"'{path}' holds no mask: no boolean matrix, no NaN, and no matrix with many zeros.")
    if generic and len(found.patterns) == 1 and next(iter(found.patterns)) in _NO_NAME:
        return Masks({"": next(iter(found.patterns.values()))}, unsure=frozenset({""} if found.unsure else ()))
    return found


def alike(names: Iterable[str], name: str) -> list[str]:
    """Names that are a name but for what stands before it in one of the two."""
    return [key for key in names if f".{key}".endswith(f".{name}") or f".{name}".endswith(f".{key}")]


def named(patterns: Mapping[str, Pattern], name: str, where: str | Path) -> Pattern:
    """The pattern of that name; what stands before or behind it in one of the two (``transformer.``, ``.weight``) is no
    difference.

    Raises
    ------
    UserError
        If there is none, or more than one.
    """
    name = name.removesuffix(".weight")
    near = alike(patterns, name)
    if name in patterns:
        return patterns[name]
    if len(near) == 1:
        return patterns[near[0]]
    if near:
        raise UserError(f"'{where}': '{name}' may be {' or '.join(near[:4])}.")
    raise UserError(f"'{where}' holds no mask of '{name}'.{did_you_mean(name, patterns)}")


def files(path: Path) -> Iterator[tuple[str, Pattern]]:
    """Every mask below a path, one after the other: of a file, of a run or a model's folder, or of a folder of files.

    Raises
    ------
    UserError
        As `read_all`, or if a folder holds no file of masks.
    """
    if not path.is_dir() or _kind(path):
        found = read_all(path)
        yield from ((path.stem if len(found) == 1 else name, pattern) for name, pattern in found.items())
        return
    inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in _WRITERS)
    if not inside:
        raise UserError(f"'{path}' holds no file of masks: expected {EXPECTED}, a run or a Hugging Face folder.")
    for file in inside:
        found, stem = read_all(file), file.relative_to(path).with_suffix("").as_posix()
        yield from ((stem if len(found) == 1 else f"{stem}:{name}", pattern) for name, pattern in found.items())


# -- what a path holds ------------------------------------------------------------------------------------------------


def _kind(folder: Path) -> str:
    """What a folder is: "run", "checkpoint", "model", or "" for any other."""
    if checkpoint.is_ours(folder):
        return "run" if Run(folder).begun else "checkpoint"
    return "model" if (folder / "config.json").is_file() or any(folder.glob("*.mdl")) else ""


def _everything(path: Path, name: str | None = None) -> Masks:
    """Masks by name; of a `name` that is asked for also what a matrix alone would not be taken for."""
    if not path.exists():
        raise UserError(f"'{path}' not found.{near_path(path)}")
    if path.is_dir():
        return _of_folder(path, name)
    suffix = path.suffix.lower()
    if path.name in ("model.safetensors", "pytorch_model.bin") and (path.parent / "config.json").is_file():
        return _of_folder(path.parent, name)
    if suffix == ".smtx":
        return Masks({"": _smtx(path)})
    if suffix == ".mtx":
        return Masks({"": _mtx(path)})
    if suffix == ".npz":
        return _npz(path, name)
    if suffix in (".safetensors", *PICKLES):
        tensors = flatten(read_tensors(path))
        found = _patterns(canonical(_labelled(tensors, path), str(path)).tensors, path, name)
        return Masks({"": found.patterns[path.stem]}) if [*tensors] == [""] and found.patterns else found
    raise UserError(f"'{path}' is no file of a mask: expected {EXPECTED}, a run or a Hugging Face folder.")


def _labelled(named: Mapping[str, T], path: Path) -> dict[str, T]:
    """What a file holds by name; one that is all of the file has the file's."""
    return {name or path.stem: one for name, one in named.items()}


def _of_folder(folder: Path, name: str | None) -> Masks:
    kind = _kind(folder)
    if kind == "run":  # the masks it began with: at its end it may be dense
        run = Run(folder).require()
        if not run.patterns:
            raise UserError(f"'{folder}' holds no masks: its first phase is dense.")
        return Masks(dict(run.patterns))
    if kind == "checkpoint":
        from vspdf.interop.checkpoints import load
        from vspdf.sparsity.layer import sparse_layers

        return Masks({each: layer.pattern for each, layer in sparse_layers(load(folder).model).items()})
    if not kind:
        raise UserError(f"'{folder}' is no folder of a model or a run: expected one, or a file ({EXPECTED}).")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    theirs = _LINEAR if config.get("model_type", "gpt2") in GPT2 else ()  # whose matrices are [in, out]
    tensors = read_folder(folder)
    turned = {each for each in tensors if each.endswith(theirs)} | stored_in_out(tensors)[0]
    tensors = from_cerebras(canonical(with_masks(tensors, turned), str(folder)).tensors, str(folder))
    return _patterns(tensors, folder, name, theirs)


# -- tensors ----------------------------------------------------------------------------------------------------------


def _patterns(tensors: Mapping[str, Tensor], where: Path, name: str | None, in_out: tuple[str, ...] = ()) -> Masks:
    """Patterns of matrices whose masks stand beside them: those that say so, else by NaN, else by zeros.

    Weights whose names end with `in_out` are turned, as are those whose biases tell that they lie [in, out].
    """
    turned, unsure = stored_in_out(tensors)
    turned |= {key for key in tensors if key.endswith(in_out)}
    tensors = {
        key: tensor.T if tensor.dim() == 2 and key.removesuffix(MASK) in turned else tensor
        for key, tensor in tensors.items()
    }
    found: dict[str, dict[str, Pattern]] = {"mask": {}, "nan": {}, "zeros": {}}
    weights: dict[str, str] = {}
    alone = len(tensors) == 1
    for key, tensor in tensors.items():
        if key.removesuffix(MASK) in tensors and key.endswith(MASK):
            continue
        plain = key.removesuffix(".weight").removesuffix(MASK).removesuffix(".mask") or key
        asked = alone or (name is not None and (plain == name or plain.endswith(f".{name.removesuffix('.weight')}")))
        how, mask = _mask_of(tensors, key, asked, where)
        if mask is not None:
            found[how][plain] = _from_dense(mask, where)
        if is_weight(key) and tensor.dim() == 2:
            weights[plain] = key
    if name is None:
        best = next((how for how, masks in found.items() if masks), "zeros")
        for how, masks in found.items():
            found[how] = masks if how == best else {each: mask for each, mask in masks.items() if each in weights}
        _tell_of_zeros(found, where)
    patterns = {**found["zeros"], **found["nan"], **found["mask"]}
    return Masks(
        patterns,
        frozenset(weights.keys() - patterns.keys()),
        frozenset(each for each in patterns if weights.get(each) in unsure - turned),
    )


def _tell_of_zeros(found: Mapping[str, Mapping[str, Pattern]], where: Path) -> None:
    """Names weights whose zeros are taken for masked beside others that have masks."""
    said = found["mask"].keys() | found["nan"].keys()
    if said and (zeros := [each for each in found["zeros"] if each not in said]):
        log.warning(
            "%s: beside %d with masks, weights without one hold zeros, which are taken for masked: %s%s.",
            where, len(said), ", ".join(zeros[:4]), ", ..." * (len(zeros) > 4),
        )  # fmt: skip


def _mask_of(tensors: Mapping[str, Tensor], key: str, asked: bool, where: Path) -> tuple[str, Tensor | None]:
    """How a tensor tells its mask, and the mask; None where it tells none. What was asked for has to tell one."""
    tensor, beside = tensors[key], tensors.get(key + MASK)
    if beside is not None and beside.dim() == 2:
        return "mask", beside
    if tensor.dim() != 2 or not tensor.numel():
        if asked:
            raise UserError(f"{where}: '{key}' has the shape {tuple(tensor.shape)}: expected a matrix (out, in).")
        return "", None
    if tensor.dtype == torch.bool:
        return "mask", tensor
    if not tensor.is_floating_point():
        if not bool(((tensor == 0) | (tensor == 1)).all()):
            if not asked:
                return "", None
            raise UserError(f"{where}: '{key}' of {tensor.dtype} holds values beside 0 and 1: expected a mask.")
        return "mask", tensor != 0
    gone = torch.isnan(tensor)
    if bool(gone.any()):
        if bool(gone.all()):
            raise UserError(f"{where}: '{key}' is NaN throughout: the run that wrote it had diverged.")
        return "nan", ~gone
    zeros = 1 - int(torch.count_nonzero(tensor)) / tensor.numel()
    if asked and not zeros:
        raise UserError(f"{where}: '{key}' has no mask beside it, no NaN and no zeros: nothing of it is masked.")
    if asked or (zeros >= ZEROS and not any(part in key for part in EMBEDDINGS)):
        return "zeros", tensor != 0
    return "", None


def _from_dense(mask: Tensor, where: Path) -> Pattern:
    _check_size(mask.shape[0], mask.shape[1], where, mask.numel())
    return Pattern.from_mask(mask.contiguous())


def _check_size(rows: int, columns: int, where: Path, size: int | None = None) -> None:
    """Whether a matrix of that shape is one to hold, for the size of its file."""
    allowed = min(_LARGEST, max(_ROOM, _GROWTH * (where.stat().st_size if size is None else size)))
    if rows < 1 or columns < 1:
        raise UserError(f"{where}: a matrix of {rows} x {columns}: expected at least one row and one column.")
    if rows * columns > allowed:
        raise UserError(f"{where}: a matrix of {rows:,} x {columns:,} has more positions than {allowed:,}: refused.")


# -- text -------------------------------------------------------------------------------------------------------------


def _smtx(path: Path) -> Pattern:
    """DLMC's form (arXiv:2006.10901): sizes, row pointers and column indices as text."""
    try:
        head, _, body = path.read_text(encoding="ascii").partition("\n")
        rows, columns, kept = (int(part) for part in head.replace(",", " ").split())
        numbers = np.array(body.split(), dtype=np.int64)
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is no .smtx file ({in_one_line(error)}): expected {_SMTX}.") from None
    _check_size(rows, columns, path)
    pointers, indices = numbers[: rows + 1], numbers[rows + 1 :]
    whole = len(pointers) == rows + 1 and len(indices) == kept and pointers[0] == 0 and pointers[-1] == kept
    if not whole or (np.diff(pointers) < 0).any():
        raise UserError(
            f"{path} is no whole .smtx file: {rows} rows and {kept} kept do not fit its {len(numbers)} numbers; "
            f"expected {_SMTX}."
        )
    return Pattern.from_positions(
        (rows, columns), np.repeat(np.arange(rows), np.diff(pointers)), indices, str(path), unique=True
    )


def _mtx(path: Path) -> Pattern:
    """Matrix Market: coordinates or an array, of any field, symmetric ones made whole."""
    import scipy.io

    try:
        rows, columns, entries, *_ = scipy.io.mminfo(path)
        _check_size(rows, columns, path)
        if entries > path.stat().st_size:
            raise ValueError(f"{entries:,} entries in {path.stat().st_size:,} bytes")
        matrix = scipy.io.mmread(path)
    except UserError:
        raise
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(
            f"{path} is no whole .mtx file ({in_one_line(error)}): expected Matrix Market's form."
        ) from None
    if isinstance(matrix, np.ndarray):
        return Pattern.from_mask(np.ascontiguousarray(matrix != 0))
    return Pattern.from_sparse(matrix)


# -- NumPy's archives -------------------------------------------------------------------------------------------------


def _npz(path: Path, name: str | None) -> Masks:
    """scipy.sparse's form, a run's file of masks, or arrays by name."""
    try:
        if not is_zipfile(path):
            raise BadZipFile("it is no archive")
        with ZipFile(path) as archive:
            size, unpacked = path.stat().st_size, sum(item.file_size for item in archive.infolist())
        if unpacked > max(_ROOM, _PACKED * size):
            raise UserError(f"{path} has {size:,} bytes and unpacks to {unpacked:,}: refused.")
        with np.load(path) as archive:
            names = set(archive.files)
            if {"format", "shape"} <= names:
                return Masks({"": _scipy_npz(path, archive)})
            if any(f"{each}.shape" in names for each in names):
                return Masks({each: Pattern(*stored) for each, stored in run_masks.read(path).bits.items()})
            arrays = {each: torch.from_numpy(_plain_array(archive[each])) for each in archive.files}
    except UserError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise UserError(
            f"{path} is no whole .npz file of a mask ({in_one_line(error)}): expected scipy.sparse's or boolean arrays."
        ) from None
    return _patterns(canonical(arrays, str(path)).tensors, path, name)


def _plain_array(array: np.ndarray) -> np.ndarray:
    """An array that torch takes."""
    return array.astype(np.int32) if array.dtype in (np.uint16, np.uint32, np.uint64) else np.ascontiguousarray(array)


def _scipy_npz(path: Path, archive: Any) -> Pattern:
    import scipy.sparse

    shape = tuple(int(n) for n in archive["shape"])
    if len(shape) != 2:
        raise UserError(f"{path}: a sparse array of shape {shape}: expected a matrix.")
    _check_size(shape[0], shape[1], path)
    return Pattern.from_sparse(scipy.sparse.load_npz(path))


# -- writing ----------------------------------------------------------------------------------------------------------


def write(pattern: Pattern, path: str | Path) -> None:
    """Writes one mask; `vspdf.Pattern.write` is the public form."""
    path, suffix = Path(path), Path(path).suffix.lower()
    if suffix not in _WRITERS:
        raise UserError(f"'{path}': expected a name that ends in {EXPECTED}.")
    write_whole(path, _WRITERS[suffix](pattern))


def _write_smtx(pattern: Pattern) -> str:
    pointers, indices = pattern.csr()
    lines = [f"{pattern.out_features}, {pattern.in_features}, {pattern.nnz}"]
    return "\n".join([*lines, *(" ".join(map(str, numbers.tolist())) for numbers in (pointers, indices))]) + "\n"


def _scipy_matrix(pattern: Pattern) -> Any:
    import scipy.sparse

    pointers, indices = pattern.csr()
    return scipy.sparse.csr_matrix((np.ones(pattern.nnz, dtype=bool), indices, pointers), shape=pattern.shape)


def _write_mtx(pattern: Pattern) -> bytes:
    import scipy.io

    stream = io.BytesIO()
    scipy.io.mmwrite(stream, _scipy_matrix(pattern).tocoo(), field="pattern", symmetry="general")
    return stream.getvalue()


def _write_npz(pattern: Pattern) -> bytes:
    import scipy.sparse

    stream = io.BytesIO()
    scipy.sparse.save_npz(stream, _scipy_matrix(pattern))
    return stream.getvalue()


def _write_pt(pattern: Pattern) -> bytes:
    stream = io.BytesIO()
    torch.save(pattern.mask(), stream)
    return stream.getvalue()


def _write_safetensors(pattern: Pattern) -> bytes:
    from safetensors.torch import save

    return save({"mask": pattern.mask()})


_WRITERS: dict[str, Callable[[Pattern], str | bytes]] = {
    ".smtx": _write_smtx, ".mtx": _write_mtx, ".npz": _write_npz, ".pt": _write_pt, ".safetensors": _write_safetensors,
}  # fmt: skip
