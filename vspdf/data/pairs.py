"""Contexts and completions as training samples of a task; the loss is on the completion only."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vspdf.config.resolved import ResolvedTask
from vspdf.config.settings import DataConfig
from vspdf.data import chat
from vspdf.data.rows import said_in
from vspdf.data.samples import Samples, ValidationBatch
from vspdf.data.tasks import Example, read
from vspdf.data.tokenizer import Tokenizer, tokenizer_maker
from vspdf.data.tokens import TEST, held_out, split
from vspdf.errors import UserError
from vspdf.files import at_home

log = logging.getLogger("vspdf")

NO_TARGET = -100  # what torch's cross-entropy leaves out


class Pair(NamedTuple):
    """Context, end of document, completion, end of document; `begin` is where the completion begins."""

    ids: np.ndarray
    begin: int


def parts(config: ResolvedTask) -> dict[str, list[Example]]:
    """Examples of a task file by part: "train", "validation" and, where one is held out, "test".

    Contexts are held out whole: equal ones are in the same part.

    Raises
    ------
    UserError
        If a file is missing or unfit, or has too few contexts.
    """
    examples = _usable(Path(config.path), config)
    content = [json.dumps([example.context]).encode() for example in examples]
    keys = np.array([int.from_bytes(hashlib.sha256(c).digest()[:8], "little") for c in content], np.uint64)
    sizes = np.array([sum(map(len, example.references)) for example in examples], np.int64)
    held = [] if config.validation_path is not None else ["one to hold out"]
    held += ["one for the test"] if config.test_fraction else []
    if (distinct := len(set(keys.tolist()))) <= len(held):
        raise UserError(
            f"'{config.path}' has {'a single context' if distinct == 1 else f'{distinct} contexts'}: expected at least "
            f"{len(held) + 1}, one to train on and {' and '.join(held)}, or data.validation_path."
        )
    if config.validation_path is None:
        of = split(keys, sizes, config.validation_fraction, config.test_fraction)
    else:
        of = TEST * (held_out(keys, sizes, config.test_fraction) if config.test_fraction else np.zeros(len(keys), bool))
    found = {
        name: [example for example, part in zip(examples, of.tolist(), strict=True) if part == number]
        for number, name in enumerate(("train", "validation", "test"))
    }
    if config.validation_path is not None:
        found["validation"] = _usable(Path(config.validation_path), config)
    return {name: some for name, some in found.items() if some}


def prepare(config: ResolvedTask, seed: int, tokenizer: Tokenizer) -> Pairs:
    """Training pairs of a task file, one for each reference, and held-out ones.

    Examples without a context or without a reference teach nothing and are left out; how many is said, and so is what
    becomes of pairs above `config.length`.

    Raises
    ------
    UserError
        If a file is missing or unfit, nothing is left to train on or to hold out, or a pair is too long.
    """
    sides = parts(config)
    pairs = {side: _pairs(some, config, tokenizer, side) for side, some in sides.items()}
    order = hashlib.sha256(json.dumps([config.length, seed]).encode())
    for pair in pairs["train"]:
        order.update(pair.ids.tobytes())
    manifest = {
        "corpus": {
            "name": Path(config.path).name,
            "sha256": _digest(config.path, config.validation_path),
            "documents": sum(map(len, sides.values())),
            "bytes": sum(len(text.encode()) for some in sides.values() for item in some for text in item.references),
        },
        "tokenizer": tokenizer.about,
        **{
            side: {
                "documents": len(sides[side]),
                "bytes": sum(len(text.encode()) for item in sides[side] for text in item.references),
                "tokens": sum(len(pair.ids) - 1 for pair in pairs[side]),
            }
            for side in sides
        },
        "samples": len(pairs["train"]),
        "order": order.hexdigest(),
    }
    spoken = tokenizer.chat_template is not None and any(said_in(item.context) for item in sides["train"])
    return Pairs(pairs, tokenizer, manifest, seed, config.repeat, spoken)


def _digest(*paths: str | None) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(at_home(path).read_bytes() if path else b"")
    return digest.hexdigest()


def _usable(path: Path, config: ResolvedTask) -> list[Example]:
    examples = read(path, config.format, lower_relations=config.lower_relations)
    kept = [
        Example(example.context, tuple(text for text in example.references if text.strip()))
        for example in examples
        if example.context.strip()
    ]
    for count, what in (
        (len(examples) - len(kept), "context"),
        (sum(not example.references for example in kept), "reference"),
    ):
        if count:
            log.warning("%s: %d of %d examples have no %s and are left out.", path, count, len(examples), what)
    kept = [example for example in kept if example.references]
    if not kept:
        raise UserError(f"'{path}' has no example with both a context and a reference.")
    return kept


def _encoded(examples: Sequence[Example], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Context, what stands between, and completion with its end, of every reference; a chat template says its own."""
    end = np.array([tokenizer.end_of_document])
    contexts = tokenizer.encode_batch([example.context for example in examples])
    texts = [" " + text.strip() for example in examples for text in example.references]
    completions = iter(tokenizer.encode_batch(texts))
    for example, context in zip(examples, contexts, strict=True):
        for text in example.references:
            completion = next(completions)
            if (said := said_in(example.context)) and tokenizer.chat_template is not None:
                context, completion = chat.encode(tokenizer, said, text)
                yield context, end[:0], completion
            else:
                yield context, end, np.append(completion, end)


def _pairs(examples: Sequence[Example], config: ResolvedTask, tokenizer: Tokenizer, side: str) -> list[Pair]:
    total, pairs, cut, dropped = 0, [], 0, 0
    for context, begin, completion in _encoded(examples, tokenizer):
        total += 1
        room = config.length + 1 - len(begin) - len(completion)  # the last token is a target alone
        if len(context) > room:
            if config.overlong == "cut" and room > 0 and len(begin):  # a conversation cannot lose its end
                cut += 1
            else:
                dropped += 1
                continue
        kept = context[: max(0, room)]
        pairs.append(Pair(np.concatenate((kept, begin, completion)), len(kept) + len(begin)))
    if dropped and config.overlong == "refuse":
        raise UserError(
            f"{dropped} of {total} pairs for {side} are longer than data.length = {config.length} tokens: raise it, or "
            "set data.overlong=cut (the end of the context) or drop."
        )
    if cut:
        log.warning("%d of %d pairs for %s: the end of the context is cut (data.length = %d).", cut, total, side,
                    config.length)  # fmt: skip
    if dropped:
        log.warning("%d of %d pairs for %s are longer than data.length = %d and left out.", dropped, total, side,
                    config.length)  # fmt: skip
    if not pairs:
        raise UserError(f"no pair for {side} fits into data.length = {config.length} tokens.")
    return pairs


def tokenizer_for(config: ResolvedTask, found: Tokenizer | None, start: str) -> Tokenizer:
    """The tokenizer of the model to start from, or the configured one where there is none beside it.

    Raises
    ------
    UserError
        If neither is known, or both are and differ.
    """
    if config.tokenizer == DataConfig.tokenizer:  # the default: not asked for
        if found is None:
            raise UserError(
                f"'{start}' has no tokenizer: put a tokenizer.json beside its weights, or give data.tokenizer="
                "gpt2:FOLDER or data.tokenizer=FILE.json."
            )
        return found
    if config.tokenizer.startswith("bpe:"):
        raise UserError(f"data.tokenizer = {config.tokenizer} would learn a new one: leave it out for '{start}'.")
    tokenizer = tokenizer_maker(config.tokenizer)[1](())
    if found is not None and found.vocabulary != tokenizer.vocabulary:
        raise UserError(f"data.tokenizer = {config.tokenizer} is not that of '{start}' ({found.name}): leave it out.")
    return tokenizer


class Pairs(Samples):
    """Pairs of context and completion as training samples; only the completion and its end are targets.

    Has what the trainer asks of `vspdf.data.Dataset`: see there.
    """

    def __init__(
        self,
        sides: dict[str, list[Pair]],
        tokenizer: Tokenizer,
        manifest: dict[str, Any],
        seed: int,
        repeat: bool,
        chat: bool = False,
    ) -> None:
        self._train, self._validation, self._test = (sides.get(side, []) for side in ("train", "validation", "test"))
        what = f"'{manifest['corpus']['name']}' has {len(self._train)} pairs"
        super().__init__(what, len(self._train), seed, repeat)
        self.tokenizer, self.vocab_size, self.manifest = tokenizer, tokenizer.vocab_size, manifest
        self.ends = tokenizer.ends
        self.chat = chat  # whether they are written by the tokenizer's chat template
        self._cumulated: dict[int, np.ndarray] = {}

    def for_test(self) -> Pairs:
        """These pairs with the test's in the place of those for validation."""
        if not self._test:
            raise UserError("there are no test pairs: data.test_fraction is 0.")
        other = copy.copy(self)
        other._validation = self._test
        return other

    def tokens(self, samples: int) -> int:
        """Tokens in the first `samples` samples, filler not counted."""
        epochs, rest = divmod(samples, self.n_samples)
        whole = sum(len(pair.ids) - 1 for pair in self._train)
        if epochs not in self._cumulated:
            lengths = np.array([len(pair.ids) - 1 for pair in self._train])[self._permutation(epochs)]
            self._cumulated = {epochs: np.concatenate(([0], lengths.cumsum()))}
        return epochs * whole + int(self._cumulated[epochs][rest])

    def prompt(self) -> list[int]:
        """A held-out context for a model to answer."""
        first = self._validation[0]
        return first.ids[: first.begin].tolist()

    def batch(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of `count` samples from the global sample index `start` on, as wide as the longest.

        Returns
        -------
        tokens, targets : Tensor, shape (count, longest), int64
            Targets are `NO_TARGET` over contexts and filler.
        """
        return self._padded([self._train[i] for i in self.window_ids(start, count)])

    def _padded(self, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(len(pair.ids) for pair in pairs) - 1
        tokens = torch.full((len(pairs), longest), self.tokenizer.end_of_document)
        targets = torch.full((len(pairs), longest), NO_TARGET)
        for row, (ids, begin) in enumerate(pairs):
            ids_t = torch.from_numpy(ids)
            tokens[row, : len(ids) - 1] = ids_t[:-1]
            targets[row, begin - 1 : len(ids) - 1] = ids_t[begin:]
        return tokens, targets

    def validation_batches(self, batch_size: int, max_tokens: int = 0) -> Iterator[ValidationBatch]:
        """Held-out pairs in a fixed order; where `max_tokens` is above 0, evenly chosen ones of about that many."""
        chosen = self._validation
        total = sum(len(pair.ids) - 1 for pair in chosen)
        if 0 < max_tokens < total:
            wanted = max(1, len(chosen) * max_tokens // total)
            chosen = [chosen[i * len(chosen) // wanted] for i in range(wanted)]
        for start in range(0, len(chosen), batch_size):
            tokens, targets = self._padded(chosen[start : start + batch_size])
            size = int(self.tokenizer.bytes_per_token[targets[targets != NO_TARGET].numpy()].sum())
            yield ValidationBatch(tokens, targets, size)
