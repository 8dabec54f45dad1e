"""Text, held-out documents, the token cache, and one deterministic order of training samples.

A corpus is a list of documents (`vspdf.corpora`). Some whole documents are held out for validation, and for a test
where one is asked for, chosen by their content, so every seed sees the same split. Tokens are made once and kept in a
memory-mapped cache file. Training windows come in an order that depends on the seed and on one global sample index
alone, so batch size, phases and resumption do not alter it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import secrets
import struct
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vspdf.cache import user_cache
from vspdf.config import DataConfig
from vspdf.corpora import Corpus, load_documents
from vspdf.errors import UserError
from vspdf.tokenizer import Tokenizer, tokenizer_maker

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
            whole.update(f"{name}\0{len(content)}\0".encode())
            whole.update(content)
            keys.append(_key(content))
            sizes.append(len(content))
        return cls(whole.hexdigest(), np.array(keys, np.uint64), np.array(sizes, np.int64))


def _key(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def held_out(keys: np.ndarray, sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are for validation, by their content alone.

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
    """Which part each document belongs to: those for the test are chosen like those for validation, from what is left.

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
    tokenizer = Tokenizer.from_json(footer["tokenizer"], footer["tokenizer_name"])
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(end.tobytes())
            for texts, parts in batches:
                for text, part, ids in zip(texts, parts, tokenizer.encode_batch(texts), strict=True):
                    if tokenizer.bytes_per_token[ids].sum() != len(text.encode()):
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
                "tokenizer": tokenizer.to_json(),
            }
            encoded = json.dumps(footer).encode()
            file.write(encoded + _TAIL.pack(zlib.crc32(encoded), len(encoded), _MAGIC))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def _cached_tokens(folder: Path, key: str, make: Callable[[Path], None]) -> _Tokens:
    path = folder / f"{key[:32]}.tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            try:
                return _read_cache(path, key)
            except _Damaged as why:
                log.warning("Token cache %s %s: made anew.", path, why)
        make(path)
        return _read_cache(path, key)
    except OSError as error:
        raise UserError(
            f"Cannot keep the token cache in '{folder}' ({error.strerror}): expected a writable folder with room; "
            "set data.cache_dir or VSPDF_CACHE."
        ) from None


# --- The dataset -----------------------------------------------------------------------------------------------------


class ValidationBatch(NamedTuple):
    """Held-out text; the last batch may be shorter than a sequence, so that nothing is padded or left out."""

    tokens: torch.Tensor  # int64 [B, T]
    targets: torch.Tensor  # int64 [B, T]
    target_bytes: int  # of text that the targets stand for


def prepare(config: DataConfig, sequence_length: int, seed: int) -> Dataset:
    """Tokenise the corpus, or find its tokens in the cache, and fix the order of samples.

    Parameters
    ----------
    config : DataConfig
    sequence_length : int
        Targets a sample.
    seed : int
        Of the order alone: all seeds share tokenizer and held-out documents.

    Raises
    ------
    UserError
        If corpus or tokenizer are missing or unfit, the corpus is shorter than a sequence, or the cache not writable.
    """
    if not config.corpus or not config.tokenizer:
        raise UserError(
            "the text is not named: give data.corpus=FILE and data.tokenizer=gpt2:FOLDER (a configuration of the "
            "Cerebras stack names files that are not read here)."
        )
    if sequence_length < 1:
        raise UserError(f"model.sequence_length is {sequence_length}: expected at least 1.")
    if seed < 0:
        raise UserError(f"seed is {seed}: expected 0 or more.")
    if not 0 < config.validation_fraction < 1:
        raise UserError(f"data.validation_fraction is {config.validation_fraction}: expected between 0 and 1.")
    if not 0 <= config.test_fraction < 1 - config.validation_fraction:
        raise UserError(
            f"data.test_fraction is {config.test_fraction}: expected at least 0, and less than 1 with validation."
        )
    tokenizer_key, make_tokenizer = tokenizer_maker(config.tokenizer)
    corpus = load_documents(config)
    survey = _Survey.of(corpus)
    n_bytes = int(survey.sizes.sum())
    if not n_bytes:
        raise UserError(f"Corpus '{corpus.name}' is empty: expected text.")
    if n_bytes + len(survey.sizes) <= sequence_length:  # no tokenizer makes more tokens than bytes
        raise _too_short(corpus.name, f"{n_bytes} bytes", sequence_length)
    distinct = len(set(survey.keys.tolist()))
    if distinct < 2:
        raise UserError(
            f"Corpus '{corpus.name}' is a single document of {n_bytes} bytes: expected at least two different ones, "
            "one to train on and one to hold out."
        )
    try:
        parts = split(survey.keys, survey.sizes, config.validation_fraction, config.test_fraction)
    except ValueError:
        raise UserError(
            f"Corpus '{corpus.name}' has {distinct} different documents, and validation leaves less than two of them: "
            "expected more, or data.test_fraction=0."
        ) from None

    def batches() -> Iterator[tuple[list[str], list[int]]]:
        return _batches(corpus, survey.keys, parts)

    def make(path: Path) -> None:
        log.info("Tokenising %s (%.1f MB) with %s.", corpus.name, n_bytes / 1e6, config.tokenizer)
        training = (text for texts, of in batches() for text, part in zip(texts, of, strict=True) if part == TRAIN)
        _write_cache(path, key, batches(), make_tokenizer(training))

    of_tokens = [survey.sha256, tokenizer_key, hashlib.sha256(parts.tobytes()).hexdigest()]
    key = hashlib.sha256(json.dumps(of_tokens).encode()).hexdigest()
    folder = user_cache() / "tokens" if config.cache_dir is None else Path(config.cache_dir).expanduser()
    tokens = _cached_tokens(folder, key, make)
    if len(tokens.train) <= sequence_length:
        raise _too_short(corpus.name, f"{len(tokens.train)} training tokens", sequence_length)

    def side(part: int, stream: np.ndarray) -> dict[str, int]:
        documents = parts == part
        return {
            "documents": int(documents.sum()),
            "bytes": int(survey.sizes[documents].sum()),
            "tokens": len(stream) - 1,
        }

    manifest: dict[str, Any] = {
        "corpus": {"name": corpus.name, "sha256": survey.sha256, "documents": len(parts), "bytes": n_bytes},
        "tokenizer": {"name": tokens.tokenizer.name, "vocab_size": tokens.tokenizer.vocab_size},
        "train": side(TRAIN, tokens.train),
        "validation": side(VALIDATION, tokens.validation),
    }
    if config.test_fraction:
        manifest["test"] = side(TEST, tokens.test)
    if corpus.python:
        manifest["corpus"]["python"] = corpus.python
    return Dataset(tokens, manifest, sequence_length, seed, config.repeat)


def _too_short(name: str, has: str, sequence_length: int) -> UserError:
    return UserError(
        f"Corpus '{name}' is too short: it has {has}, expected at least {sequence_length + 1} for one sequence "
        "(model.sequence_length + 1)."
    )


class Samples:
    """One deterministic order of training samples.

    Every epoch of `n_samples` samples is a permutation of all of them, drawn from the seed and the number of the epoch.

    Attributes
    ----------
    n_samples : int
        Samples of one epoch.
    repeat : bool
        Whether there is a second epoch.
    """

    def __init__(self, what: str, n_samples: int, seed: int, repeat: bool):
        self.n_samples, self.repeat = n_samples, repeat
        self._what, self._seed = what, seed
        self._permutations: dict[int, np.ndarray] = {}

    def check(self, total_samples: int) -> None:
        """Refuse a run of `total_samples` samples that the data cannot feed.

        Raises
        ------
        UserError
            If there are fewer and `repeat` is off.
        """
        if total_samples > self.n_samples and not self.repeat:
            raise UserError(
                f"{self._what}, the run wants {total_samples}: give more text, or set data.repeat=true to see it again."
            )

    def window_ids(self, start: int, count: int) -> np.ndarray:
        """Which windows samples `start` to `start + count - 1` are, int64: what `batch` reads."""
        if start < 0 or count < 0:
            raise UserError(f"Samples are counted from 0, not from {start} to {start + count}.")
        self.check(start + count)
        samples = np.arange(start, start + count)
        windows = np.empty(count, np.int64)
        for epoch in np.unique(samples // self.n_samples):
            here = samples // self.n_samples == epoch
            windows[here] = self._permutation(int(epoch))[samples[here] % self.n_samples]
        return windows

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            # Raw words of the generator: NumPy promises that these, unlike `permutation`, never change.
            words = np.random.PCG64(np.random.SeedSequence([self._seed, epoch])).random_raw(self.n_samples)
            self._permutations = {epoch: np.argsort(words, kind="stable")}  # one epoch at a time is in use
        return self._permutations[epoch]


class Dataset(Samples):
    """Training samples in one deterministic order, and held-out text. Made by `prepare`.

    Sample i of the run is a window of `sequence_length` + 1 training tokens; windows overlap by the one token that is
    the last target of one and the first input of the next.

    Attributes
    ----------
    tokenizer : Tokenizer
    vocab_size : int
    sequence_length : int
    end : None
        No token ends an answer: text goes on.
    manifest : dict
        `corpus` (name, sha256, documents, bytes; python for "stdlib"), `tokenizer` (name, vocab_size), `train`,
        `validation` and, where there is one, `test` (documents, bytes, tokens), `samples`, and `order`: a hash that is
        equal where the same tokens come in the same order.
    """

    end: int | None = None

    def __init__(self, tokens: _Tokens, manifest: dict[str, Any], sequence_length: int, seed: int, repeat: bool):
        self.tokenizer = tokens.tokenizer
        self.vocab_size = tokens.tokenizer.vocab_size
        self.sequence_length = sequence_length
        n_samples = (len(tokens.train) - 1) // sequence_length
        name = manifest["corpus"]["name"]
        super().__init__(
            f"Corpus '{name}' has {n_samples} samples of {sequence_length} tokens", n_samples, seed, repeat
        )
        order = hashlib.sha256(json.dumps([tokens.sha256, sequence_length, seed]).encode()).hexdigest()
        self.manifest = manifest | {"samples": self.n_samples, "order": order}
        self._tokens = tokens

    def tokens(self, samples: int) -> int:
        """Tokens in the first `samples` samples."""
        return samples * self.sequence_length

    def prompt(self) -> list[int]:
        """Held-out tokens for a model to go on from."""
        return self._tokens.validation[: min(16, self.sequence_length)].tolist()

    def batch(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of `count` samples from the global sample index `start` on.

        Returns
        -------
        tokens, targets : Tensor, shape (count, sequence_length), int64

        Raises
        ------
        UserError
            If the data end before that and `repeat` is off.
        """
        return _windows(self._tokens.train, self.window_ids(start, count), self.sequence_length)

    def for_test(self) -> Dataset:
        """The same with the test's documents in the place of those for validation.

        Raises
        ------
        UserError
            If there are none.
        """
        if not len(self._tokens.test):
            raise UserError("there is no test text: data.test_fraction is 0.")
        other = copy.copy(self)
        other._tokens = replace(self._tokens, validation=self._tokens.test)
        return other

    def validation_batches(self, batch_size: int, max_tokens: int = 0) -> Iterator[ValidationBatch]:
        """Held-out text in a fixed order; see `Text.validation_batches`."""
        held = Text(self._tokens.validation, self.tokenizer, self.sequence_length)
        return held.validation_batches(batch_size, max_tokens)


def _windows(stream: np.ndarray, windows: np.ndarray, t: int) -> tuple[torch.Tensor, torch.Tensor]:
    both = np.empty((len(windows), t + 1), np.int64)
    for row, window in zip(both, windows, strict=True):
        row[:] = stream[window * t : window * t + t + 1]
    tensor = torch.from_numpy(both)
    return tensor[:, :-1].contiguous(), tensor[:, 1:].contiguous()


class Text:
    """Text to be scored: documents one after the other, with an end of document before, between and after them.

    Parameters
    ----------
    stream : ndarray of integers
        Their tokens.
    tokenizer : Tokenizer
    sequence_length : int
        Tokens of a window.
    source : dict
        What it is: `name`, `sha256`, `documents`, `bytes`.
    """

    def __init__(
        self, stream: np.ndarray, tokenizer: Tokenizer, sequence_length: int, source: dict[str, Any] | None = None
    ) -> None:
        self.stream, self.tokenizer, self.sequence_length = stream, tokenizer, sequence_length
        self.source = {**(source or {}), "tokens": len(stream) - 1}

    @classmethod
    def read(cls, source: str, tokenizer: Tokenizer, sequence_length: int) -> Text:
        """All of a corpus, as `load_documents` knows them; a file of text is one document.

        Raises
        ------
        UserError
            If it is missing, empty or no text, or the tokenizer alters it.
        """
        corpus = load_documents(DataConfig(corpus=source), cut=False)
        texts = [text for _, text in corpus]
        if not texts:
            raise UserError(f"'{source}' is empty: expected text.")
        end = [tokenizer.end_of_document]
        parts = [part for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True) for part in (ids, end)]
        stream, size = np.concatenate([end, *parts]), sum(len(text.encode()) for text in texts)
        if int(tokenizer.bytes_per_token[stream].sum()) != size:
            raise UserError(f"tokenizer {tokenizer.name} alters the text of '{source}': expected one that keeps it.")
        what = {"name": source, "sha256": _Survey.of(corpus).sha256, "documents": len(texts), "bytes": size}
        return cls(stream, tokenizer, sequence_length, what)

    def validation_batches(self, batch_size: int, max_tokens: int = 0) -> Iterator[ValidationBatch]:
        """The text in order, every token of it a target once.

        Parameters
        ----------
        batch_size : int
        max_tokens : int
            Where above 0, about so many tokens only (at least one sequence), in windows spread evenly over the text.
        """
        t, stream = self.sequence_length, self.stream
        n_full, tail = divmod(len(stream) - 1, t)
        windows = np.arange(n_full)
        if 0 < max_tokens < len(stream) - 1 and n_full:
            wanted = min(max(max_tokens // t, 1), n_full)
            windows, tail = (np.arange(wanted) * n_full) // wanted, 0
        for start in range(0, len(windows), batch_size):
            yield self._validation_batch(*_windows(stream, windows[start : start + batch_size], t))
        if tail:
            last = torch.from_numpy(stream[n_full * t :].astype(np.int64))[None]
            yield self._validation_batch(last[:, :-1].contiguous(), last[:, 1:].contiguous())

    def _validation_batch(self, tokens: torch.Tensor, targets: torch.Tensor) -> ValidationBatch:
        return ValidationBatch(tokens, targets, int(self.tokenizer.bytes_per_token[targets.numpy()].sum()))
