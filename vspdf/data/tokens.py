"""The split into training, validation and test text, and the token cache: a memory-mapped file, made once."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import struct
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vspdf.data.corpora import Corpus
from vspdf.data.tokenizer import Tokenizer
from vspdf.errors import UserError
from vspdf.files import draft, lock

log = logging.getLogger("vspdf")

_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class _Survey:
    """What one pass over a corpus tells."""

    sha256: str  # of names and bytes
    keys: np.ndarray  # uint64 [documents], of each document's bytes
    sizes: np.ndarray  # int64 [documents], bytes

    @classmethod
    def of(cls, corpus: Corpus) -> _Survey:
        whole, keys, sizes = hashlib.sha256(), array("Q"), array("q")
        for name, text in corpus:
            content = text.encode()
            whole.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape"))  # names may be no UTF-8
            whole.update(content)
            keys.append(_key(content))
            sizes.append(len(content))
        return cls(whole.hexdigest(), np.array(keys, np.uint64), np.array(sizes, np.int64))


def _key(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def held_out(keys: np.ndarray, sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Chooses the documents for validation, by their content alone.

    In the order of their hash, each document that `fraction` of all bytes still has room for. Equal documents go to the
    same side. At least one goes to either side.

    Parameters
    ----------
    keys : ndarray, shape (documents,), uint64
        Hash of each document.
    sizes : ndarray, shape (documents,), int64
        Bytes of each document.
    fraction : float

    Returns
    -------
    ndarray, shape (documents,), bool

    Raises
    ------
    ValueError
        If there are not two different documents.
    """
    distinct, group = np.unique(keys, return_inverse=True)
    if len(distinct) < 2:
        raise ValueError("Expected at least two different documents.")
    group_sizes = np.bincount(group, weights=sizes)
    chosen = np.zeros(len(distinct), bool)
    room, smallest = fraction * sizes.sum(), group_sizes.min()
    for i, size in enumerate(group_sizes):
        if room < smallest:
            break
        if size <= room:
            chosen[i] = True
            room -= size
    if not chosen.any():
        chosen[group_sizes.argmin()] = True
    return chosen[group]


TRAIN, VALIDATION, TEST = range(3)


def split(keys: np.ndarray, sizes: np.ndarray, validation: float, test: float = 0.0) -> np.ndarray:
    """Assigns each document to its part: those for the test are chosen like those for validation, from what is left.

    Validation documents are the same with and without a test part.

    Returns
    -------
    ndarray, shape (documents,), uint8
        `TRAIN`, `VALIDATION` or `TEST`.

    Raises
    ------
    ValueError
        If there are not as many different documents as parts.
    """
    parts = held_out(keys, sizes, validation).astype(np.uint8)
    if test:
        rest = parts == TRAIN
        share = min(test * sizes.sum() / sizes[rest].sum(), 1 - 1e-9)  # below all of it: something is left to train on
        parts[rest] = TEST * held_out(keys[rest], sizes[rest], share)
    return parts


# --- The token cache -------------------------------------------------------------------------------------------------
# One file: training, validation and test tokens, then a JSON footer, its checksum and length, and a magic word.

_MAGIC = b"vspdftk1"
_TAIL = struct.Struct("<IQ8s")


@dataclass(frozen=True)
class _Tokens:
    """A valid cache file, mapped."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray  # empty where the split has no test
    tokenizer: Tokenizer
    sha256: str


class _Damaged(Exception):
    """Why a cache file cannot be used."""


def _read_cache(path: Path, key: str) -> _Tokens:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < _TAIL.size:
            raise _Damaged("is truncated")
        file.seek(size - _TAIL.size)
        checksum, length, magic = _TAIL.unpack(file.read(_TAIL.size))
        if magic != _MAGIC or length > size - _TAIL.size:
            raise _Damaged("is truncated or no token cache")
        file.seek(size - _TAIL.size - length)
        encoded = file.read(length)
    if zlib.crc32(encoded) != checksum:
        raise _Damaged("is damaged")
    footer = json.loads(encoded)
    if footer["key"] != key:
        raise _Damaged("belongs to another corpus")
    dtype = np.dtype(footer["dtype"])
    # Files of before there was a test part say nothing of it.
    ends = np.cumsum([footer["train_tokens"], footer["validation_tokens"], footer.get("test_tokens", 0)])
    if int(ends[-1]) * dtype.itemsize != size - _TAIL.size - length:
        raise _Damaged("is truncated")
    tokens = np.memmap(path, dtype, mode="r", shape=(int(ends[-1]),))
    if _sha256(tokens) != footer["sha256"]:
        raise _Damaged("is damaged")
    tokenizer = Tokenizer.from_json(footer["tokenizer"], footer["tokenizer_name"], footer.get("tokenizer_about"))
    train, validation, test, _ = np.split(tokens, ends)
    return _Tokens(train, validation, test, tokenizer, footer["sha256"])


def _sha256(tokens: np.ndarray) -> str:
    digest, step = hashlib.sha256(), 16 * _MEBIBYTE
    for start in range(0, len(tokens), step):
        digest.update(tokens[start : start + step].tobytes())
    return digest.hexdigest()


def _write_cache(path: Path, key: str, batches: Iterator[tuple[list[str], list[int]]], tokenizer: Tokenizer) -> None:
    """Tokenise what `_batches` yields into `path`, whole or not at all."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    end = np.array([tokenizer.end_of_document], dtype)
    # A stream begins with an end of document, so that the first token of every document has something to follow.
    digest, n_train = hashlib.sha256(end.tobytes()), 1
    held: dict[int, list[np.ndarray]] = {VALIDATION: [end], TEST: []}
    with draft(path) as whole, open(whole, "xb") as file:
        file.write(end.tobytes())
        for texts, parts in batches:
            for text, part, ids in zip(texts, parts, tokenizer.encode_batch(texts), strict=True):
                if tokenizer.bytes_per_token[ids].sum() != len(tokenizer.seen(text).encode()):
                    raise UserError(
                        f"Tokenizer {tokenizer.name} alters the text {text[:40]!r}: expected one that keeps it."
                    )
                stream = np.append(ids, tokenizer.end_of_document).astype(dtype)
                if part != TRAIN:
                    held[part].extend([stream] if held[part] else [end, stream])
                else:
                    file.write(stream.tobytes())
                    digest.update(stream.tobytes())
                    n_train += len(stream)
        for stream in (*held[VALIDATION], *held[TEST]):
            file.write(stream.tobytes())
            digest.update(stream.tobytes())
        footer = {
            "key": key,
            "dtype": dtype.str,
            "train_tokens": n_train,
            "validation_tokens": sum(map(len, held[VALIDATION])),
            "test_tokens": sum(map(len, held[TEST])),
            "sha256": digest.hexdigest(),
            "tokenizer_name": tokenizer.name,
            "tokenizer_about": tokenizer.about,
            "tokenizer": tokenizer.to_json(),
        }
        encoded = json.dumps(footer).encode()
        file.write(encoded + _TAIL.pack(zlib.crc32(encoded), len(encoded), _MAGIC))


def _batches(corpus: Corpus, keys: np.ndarray, parts: np.ndarray) -> Iterator[tuple[list[str], list[int]]]:
    """Documents by some megabytes, each with the part it belongs to; makes sure that they are those of the survey."""
    texts: list[str] = []
    start = size = number = 0
    for number, (name, text) in enumerate(corpus, 1):
        if number > len(keys) or _key(text.encode()) != keys[number - 1]:
            raise UserError(f"Corpus '{corpus.name}' changed while it was read ({name}): start again.")
        texts.append(text)
        size += len(text)
        if size > 4 * _MEBIBYTE:
            yield texts, parts[start:number].tolist()
            texts, start, size = [], number, 0
    if number < len(keys):
        raise UserError(
            f"Corpus '{corpus.name}' changed while it was read ({len(keys) - number} documents less): start again."
        )
    yield texts, parts[start:].tolist()


def _found(path: Path, key: str) -> _Tokens | None:
    """What a cache file holds; None if it is not there, or damaged, which is said once: it is removed."""
    try:
        return _read_cache(path, key) if path.exists() else None
    except _Damaged as why:
        log.warning("Token cache %s %s: made anew.", path, why)
        path.unlink(missing_ok=True)
        return None


def _cached_tokens(folder: Path, key: str, make: Callable[[Path], None]) -> _Tokens:
    path = folder / f"{key[:32]}.tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        guard = path.with_name(f".{path.name}.lock")
        if not guard.exists() and (found := _found(path, key)) is not None:
            return found
        with lock(guard, f"token cache {path}", patience=math.inf):
            if (found := _found(path, key)) is not None:  # another process has made it meanwhile
                return found
            make(path)
            return _read_cache(path, key)
    except OSError as error:
        raise UserError(
            f"Cannot keep the token cache in '{folder}' ({error.strerror}): expected a writable folder with room; "
            "set data.cache_dir or VSPDF_CACHE."
        ) from None
