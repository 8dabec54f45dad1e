"""Text to token ids and back: bytes, byte-level BPE learnt from the corpus, GPT-2's BPE, tokenizer.json of others.

Every tokenizer here loses nothing, so each token stands for a known number of bytes of the text and bits per byte are
exact whatever the vocabulary. Some see a text a little otherwise than it is: in Unicode's form NFC (Qwen's), or with a
space before it (Llama 2's, Mistral's); bytes are counted of what they see.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from vspdf.errors import UserError, did_you_mean, near_path
from vspdf.files import at_home
from vspdf.shapes import Shape

END_OF_DOCUMENT = "<|endoftext|>"  # GPT-2's name for it, used by the tokenizers made here
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eot|>")
KNOWN_BEGINS = ("<s>", "<|begin_of_text|>", "<bos>")
_SAID = ("end_token", "other_ends", "named_tokens", "chat_template")  # not in a tokenizer.json, see `Tokenizer.about`
_GAPS = 1 << 20  # ids that no token has
_PROBE = "Naïve  ½ café,\n\tdon't — 世界 \U0001f600 \x00 e\u0301"
# What tokenizers see of a text, in the order in which it is tried.
_SEEN: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: unicodedata.normalize("NFC", text),
    lambda text: " " + text if text else "",
    lambda text: text if text.startswith(" ") or not text else " " + text,
)
_EXPECTED = '"bytes", "bpe:VOCAB_SIZE", "gpt2:FOLDER" or the path of a tokenizer.json'


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return [chr(byte if byte in printable else 256 + rest.index(byte)) for byte in range(256)]


_BYTES = _byte_characters()


class Tokenizer:
    """A lossless tokenizer with an end-of-document token.

    Make one with `bytewise`, `train`, `gpt2` or `load`; `save` writes a tokenizer.json that `load` and Hugging Face
    libraries read. Names of special tokens inside a text are text: only `end_of_document` ends a document.

    Attributes
    ----------
    name : str
        A label for people.
    vocabulary : dict
        Ids by token.
    vocab_size : int
    end_token : str
    end_of_document : int
        Its id.
    bytes_per_token : ndarray, shape (vocab_size,), int64
        Bytes of text that each id stands for; 0 for special tokens.
    ends : tuple of int
        Ids that end an answer: `end_of_document`, and what others the folder that it came from has.
    chat_template : str or None
        Of that folder: how a conversation is written.
    """

    def __init__(self, model: tokenizers.Tokenizer, name: str, about: Mapping[str, Any] | None = None) -> None:
        self.name, self._model = name, model
        self._said = {key: value for key, value in (about or {}).items() if key in _SAID and value is not None}
        self.chat_template: str | None = self._said.get("chat_template")
        model.no_padding()
        model.no_truncation()
        model.encode_special_tokens = True
        vocabulary: dict[str, int] = model.get_vocab(with_added_tokens=True)
        self.vocabulary = vocabulary
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > 2 * len(vocabulary) + _GAPS:
            raise UserError(
                f"Tokenizer {name} numbers its {len(vocabulary):,} tokens up to {self.vocab_size - 1:,}: expected "
                "numbers without gaps."
            )
        ends = [token for token in (self._said.get("end_token"), *_KNOWN_ENDS) if token in vocabulary]
        if not ends:
            raise UserError(f"Tokenizer {name} has no end-of-document token: expected one of {', '.join(_KNOWN_ENDS)}.")
        self.end_token, self.end_of_document = ends[0], vocabulary[ends[0]]
        others = (vocabulary[token] for token in self._said.get("other_ends", ()) if token in vocabulary)
        self.ends = tuple(dict.fromkeys((self.end_of_document, *others)))

        self.bytes_per_token = np.zeros(self.vocab_size, np.int64)
        fallback = bool(getattr(model.model, "byte_fallback", False))  # of SentencePiece's kind
        for token, i in vocabulary.items():
            self.bytes_per_token[i] = _bytes_of(token) if fallback else len(token)
        for i, added in model.get_added_tokens_decoder().items():
            self.bytes_per_token[i] = 0 if added.special else len(added.content.encode())
        self.bytes_per_token[self.end_of_document] = 0
        # Ids that are the bytes themselves need no library: 100 times faster.
        self._bytewise = self.vocab_size == 257 and all(vocabulary.get(char) == i for i, char in enumerate(_BYTES))
        self.seen = self._sees()

    def _sees(self) -> Callable[[str], str]:
        """What it makes of a text, found out by a probe."""
        encoded = {text: self.encode(text) for text in (_PROBE, f" {_PROBE}")}
        kept = all(self.decode(ids) in (text, _SEEN[1](text), text.lstrip(" ")) for text, ids in encoded.items())
        for seen in _SEEN if kept else ():
            if all(self.bytes_per_token[ids].sum() == len(seen(text).encode()) for text, ids in encoded.items()):
                return seen
        raise UserError(
            f"Tokenizer {self.name} does not keep text exactly: expected one without normalisation (but NFC) or added "
            "spaces (but one before a text), as those of GPT-2, Llama, Mistral and Qwen."
        )

    @classmethod
    def bytewise(cls) -> Tokenizer:
        """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document."""
        vocabulary = {char: byte for byte, char in enumerate(_BYTES)} | {END_OF_DOCUMENT: 256}
        return cls(_byte_level(models.BPE(vocabulary, []), use_regex=False), "bytes")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE of exactly `vocab_size` tokens, learnt from `texts`; equal texts give equal tokenizers.

        Raises
        ------
        UserError
            If `vocab_size` is below 257 or the texts are too few for it.
        """
        if vocab_size < 257:
            raise UserError(f"Tokenizer bpe:{vocab_size}: expected at least 257, all bytes and the end of a document.")
        model = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        if (found := model.get_vocab_size()) < vocab_size:
            raise UserError(f"Tokenizer bpe:{vocab_size}: the training text yields {found} tokens; expected no more.")
        return cls(model, f"bpe:{vocab_size}")

    @classmethod
    def gpt2(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """GPT-2's BPE (or one of its kind) from the `vocab.json` and `merges.txt` in `folder`."""
        vocabulary, merges = _gpt2_files(Path(folder))
        with _reading(f"{vocabulary} and {merges.name}", "GPT-2's vocab.json and merges.txt"):
            return cls(_byte_level(models.BPE.from_file(str(vocabulary), str(merges))), "gpt2")

    @classmethod
    def load(cls, path: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> Tokenizer:
        """Read a tokenizer.json, from `save` or from elsewhere; `about`: what is not in that file, see there."""
        path = Path(path)
        if path.is_dir():
            inside = path / "tokenizer.json"
            near = f" Did you mean '{inside}'?" if inside.is_file() else ""
            raise UserError(f"Tokenizer '{path}' is a folder: expected {_EXPECTED}.{near}")
        if not path.is_file():
            raise UserError(f"Tokenizer '{path}' not found: expected {_EXPECTED}.{near_path(path)}")
        with _reading(str(path), "a tokenizer.json of Hugging Face tokenizers"):
            return cls.from_json(path.read_text(encoding="utf-8"), path.name, about)

    @classmethod
    def from_json(cls, text: str, name: str, about: Mapping[str, Any] | None = None) -> Tokenizer:
        """The inverse of `to_json`."""
        return cls(tokenizers.Tokenizer.from_str(text), name, about)

    @property
    def special_tokens(self) -> dict[int, str]:
        """Tokens that stand for no text, by their ids."""
        return {i: token.content for i, token in self._model.get_added_tokens_decoder().items() if token.special}

    @property
    def about(self) -> dict[str, Any]:
        """Name and size, and what a tokenizer.json does not tell but its folder did, in a manifest; `load` takes it.

        ``end_token`` ends a document, ``other_ends`` answers too; ``chat_template`` writes conversations, with
        ``named_tokens``, such as ``bos_token``, by name.
        """
        return {"name": self.name, "vocab_size": self.vocab_size} | self._said

    @property
    def named_tokens(self) -> dict[str, str]:
        """Special tokens by the names that chat templates have for them: what its folder said, else the one end."""
        return {"bos_token": self.end_token, "eos_token": self.end_token} | self._said.get("named_tokens", {})

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        return self._model.to_str()

    def same_vocabulary(self, other: Tokenizer) -> bool:
        """Tells whether each id stands for the same token in both."""
        return self._model.get_vocab(with_added_tokens=True) == other._model.get_vocab(with_added_tokens=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a tokenizer.json."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, int64, without an end of document."""
        return self.encode_batch([text])[0]

    def encode_rendered(self, text: str) -> np.ndarray:
        """Ids of a text in which names of special tokens are these tokens, as a chat template writes it."""
        self._model.encode_special_tokens = False
        try:
            return np.array(self._model.encode(text, add_special_tokens=False).ids, np.int64)
        finally:
            self._model.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, on all cores."""
        if self._bytewise:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]
        encoded = self._model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, np.int64) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens vanish, bytes that are no UTF-8 become U+FFFD."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)


def _bytes_of(token: str) -> int:
    """Of text that a token of a vocabulary with byte fallback stands for."""
    return 1 if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else len(token.replace("\u2581", " ").encode())


def _byte_level(model: models.BPE, use_regex: bool = True) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    if model.token_to_id(END_OF_DOCUMENT) is not None:
        tokenizer.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
    return tokenizer


def _gpt2_files(folder: Path) -> tuple[Path, Path]:
    files = folder / "vocab.json", folder / "merges.txt"
    for file in files:
        if not file.is_file():
            raise UserError(
                f"Tokenizer file '{file}' not found: expected gpt2:FOLDER with vocab.json, merges.txt.{near_path(file)}"
            )
    return files


@contextmanager
def _reading(what: str, expected: str) -> Iterator[None]:
    """One line for whatever a damaged file raises in the library, which knows only `Exception`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's, of the library
            raise
        raise UserError(f"Cannot read {what}: expected {expected} ({' '.join(str(error).split())}).") from None


def tokenizer_maker(spec: str) -> tuple[str, Callable[[Iterable[str]], Tokenizer]]:
    """Finds what `data.tokenizer` asks for.

    Returns
    -------
    key : str
        Equal for equal tokenizers on equal text, without making one.
    make : callable
        From the training texts to the tokenizer; reads them only where it learns from them.

    Raises
    ------
    UserError
        If `spec` names no tokenizer, or files are missing.
    """
    kind, _, rest = spec.partition(":")
    if spec == "bytes":
        return "bytes", lambda texts: Tokenizer.bytewise()
    if kind == "bpe":
        if not rest.isascii() or not rest.isdigit() or len(rest) > 7:
            raise UserError(f"Tokenizer '{spec}': expected a vocabulary size after 'bpe:', as in bpe:8192.")
        return f"{spec} by tokenizers {tokenizers.__version__}", lambda texts: Tokenizer.train(texts, int(rest))
    if kind == "gpt2":
        if not rest:
            raise UserError(f"Tokenizer '{spec}': expected gpt2:FOLDER, where vocab.json and merges.txt are.")
        folder = at_home(rest)
        return f"gpt2 {_digest(*_gpt2_files(folder))}", lambda texts: Tokenizer.gpt2(folder)
    path = at_home(spec)
    if not path.exists() and not path.suffix and len(path.parts) == 1:
        raise UserError(
            f"Unknown tokenizer '{spec}': expected {_EXPECTED}.{did_you_mean(kind, ['bytes', 'bpe', 'gpt2'])}"
        )
    loaded = Tokenizer.load(path)
    return f"json {_digest(path)}", lambda texts: loaded


def _digest(*files: Path) -> str:
    parts = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return json.dumps(parts)


def check_tokenizer(tokenizer: Tokenizer, shape: Shape, where: str, end: Any = None) -> None:
    """Refuses a tokenizer that does not fit a model; `end` is the token that ends documents where that is known.

    Raises
    ------
    UserError
        If it has more tokens than the model, or ends documents otherwise; where their end is not known, if it has fewer
        tokens than padding explains.
    """
    padded = shape.vocab_size - 256 < tokenizer.vocab_size or end == tokenizer.end_of_document
    if not padded or tokenizer.vocab_size > shape.vocab_size:
        raise _mismatch(tokenizer, f"the model of {where} has {shape.vocab_size}")
    if isinstance(end, int) and end < shape.vocab_size and end != tokenizer.end_of_document:
        raise UserError(
            f"tokenizer '{tokenizer.name}' does not match the model: it ends documents with token "
            f"{tokenizer.end_of_document}, {where} with {end}."
        )


def _mismatch(tokenizer: Tokenizer, has: str) -> UserError:
    return UserError(
        f"tokenizer '{tokenizer.name}' does not match the model: it has {tokenizer.vocab_size} tokens, {has}."
    )
