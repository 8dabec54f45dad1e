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
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vspdf.config.resolve import resolve_data
from vspdf.config.resolved import ResolvedData
from vspdf.config.settings import DataConfig
from vspdf.data.corpora import load_documents
from vspdf.data.samples import Samples, ValidationBatch
from vspdf.data.tokenizer import Tokenizer, tokenizer_maker
from vspdf.data.tokens import TEST, TRAIN, VALIDATION, _batches, _cached_tokens, _Survey, _Tokens, _write_cache, split
from vspdf.errors import UserError
from vspdf.files import at_home, user_cache

log = logging.getLogger("vspdf")


def prepare(config: ResolvedData, sequence_length: int, seed: int, samples: int = 0) -> Dataset:
    """Tokenise the corpus, or find its tokens in the cache, and fix the order of samples.

    Parameters
    ----------
    config : DataConfig
    sequence_length : int
        Targets a sample.
    seed : int
        Of the order alone: all seeds share tokenizer and held-out documents.
    samples : int
        What a run wants at least: where the text cannot have as many, that is said before it is tokenised.

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
    tokenizer_key, make_tokenizer = tokenizer_maker(config.tokenizer)
    corpus = load_documents(config)
    survey = _Survey.of(corpus)
    n_bytes = int(survey.sizes.sum())
    if not n_bytes:
        raise UserError(f"Corpus '{corpus.name}' is empty: expected text.")
    if n_bytes + len(survey.sizes) <= sequence_length:  # no tokenizer makes more tokens than bytes
        raise _too_short(corpus.name, f"{n_bytes} bytes", sequence_length)
    parts = _parts(survey, corpus.name, config)
    trained = survey.sizes[parts == TRAIN]
    at_most = (int(trained.sum()) + len(trained)) // sequence_length
    has = f"Corpus '{corpus.name}' has at most {at_most} samples of {sequence_length} tokens"
    Samples(has, at_most, seed, config.repeat).check(samples)

    def batches() -> Iterator[tuple[list[str], list[int]]]:
        return _batches(corpus, survey.keys, parts)

    def make(path: Path) -> None:
        log.info("Tokenising %s (%.1f MB) with %s.", corpus.name, n_bytes / 1e6, config.tokenizer)
        training = (text for texts, of in batches() for text, part in zip(texts, of, strict=True) if part == TRAIN)
        _write_cache(path, key, batches(), make_tokenizer(training))

    of_tokens = [survey.sha256, tokenizer_key, hashlib.sha256(parts.tobytes()).hexdigest()]
    key = hashlib.sha256(json.dumps(of_tokens).encode()).hexdigest()
    folder = user_cache() / "tokens" if config.cache_dir is None else at_home(config.cache_dir)
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
        "tokenizer": tokens.tokenizer.about,
        "train": side(TRAIN, tokens.train),
        "validation": side(VALIDATION, tokens.validation),
    }
    if config.test_fraction:
        manifest["test"] = side(TEST, tokens.test)
    if corpus.python:
        manifest["corpus"]["python"] = corpus.python
    return Dataset(tokens, manifest, sequence_length, seed, config.repeat)


def _parts(survey: _Survey, name: str, config: ResolvedData) -> np.ndarray:
    """Which part every document belongs to: training, validation or test.

    Raises
    ------
    UserError
        If there are too few different documents for that.
    """
    distinct = len(set(survey.keys.tolist()))
    if distinct < 2:
        raise UserError(
            f"Corpus '{name}' is a single document of {int(survey.sizes.sum())} bytes: expected at least two different "
            "ones, one to train on and one to hold out."
        )
    try:
        return split(survey.keys, survey.sizes, config.validation_fraction, config.test_fraction)
    except ValueError:
        raise UserError(
            f"Corpus '{name}' has {distinct} different documents, and validation leaves less than two of them: "
            "expected more, or data.test_fraction=0."
        ) from None


def _too_short(name: str, has: str, sequence_length: int) -> UserError:
    return UserError(
        f"Corpus '{name}' is too short: it has {has}, expected at least {sequence_length + 1} for one sequence "
        "(model.sequence_length + 1)."
    )


class Dataset(Samples):
    """Training samples in one deterministic order, and held-out text. Made by `prepare`.

    Sample i of the run is a window of `sequence_length` + 1 training tokens; windows overlap by the one token that is
    the last target of one and the first input of the next.

    Attributes
    ----------
    tokenizer : Tokenizer
    vocab_size : int
    sequence_length : int
    ends : tuple of int
        Tokens that end an answer: none, text goes on.
    manifest : dict
        `corpus` (name, sha256, documents, bytes; python for "stdlib"), `tokenizer` (name, vocab_size), `train`,
        `validation` and, where there is one, `test` (documents, bytes, tokens), `samples`, and `order`: a hash that is
        equal where the same tokens come in the same order.
    """

    ends: tuple[int, ...] = ()

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
        """This text with the test's documents in the place of those for validation.

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
        corpus = load_documents(resolve_data(DataConfig(corpus=source)), cut=False)
        texts = [text for _, text in corpus]
        if not texts:
            raise UserError(f"'{source}' is empty: expected text.")
        end = [tokenizer.end_of_document]
        parts = [part for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True) for part in (ids, end)]
        stream, size = np.concatenate([end, *parts]), sum(len(text.encode()) for text in texts)
        seen = sum(len(tokenizer.seen(text).encode()) for text in texts)
        if int(tokenizer.bytes_per_token[stream].sum()) != seen:
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
