"""Answers of a model to prompts: the one way for `vspdf generate`, for studies, and for a score by BLEU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vspdf.data import chat, tasks
from vspdf.data.rows import Conversation, said_in
from vspdf.data.tokenizer import Tokenizer
from vspdf.errors import Interrupted, UserError, one_of
from vspdf.evaluate.bleu import corpus_bleu
from vspdf.evaluate.generate import Decoding, generate
from vspdf.model import GPT

OVERLONG = ("refuse", "cut")
_LOWERED = "relations of triples are in lower case, as in the fine-tuning (data.lower_relations)"


class Prompts(NamedTuple):
    """Texts that a model is to answer, or to go on from.

    Attributes
    ----------
    texts : list of str
        A `Conversation` goes through the model's chat template, if it has one.
    answering : bool
        Whether an end of document stands between text and answer, as in fine-tuning on tasks.
    name : str
        What a message calls the prompt of a number, with a ``{}`` for it.
    """

    texts: list[str]
    answering: bool
    name: str = "prompt {}"


class Answers(NamedTuple):
    """The answers of a model: a line of text for each prompt, spaces joined, and how many tokens all of them were."""

    lines: list[str]
    tokens: int


def read_prompts(
    path: Path, format: str, task: dict[str, Any] | None, limit: int | None, say: Callable[[str], None]
) -> Prompts:
    """Prompts of a file: lines, or the contexts of a task file.

    Parameters
    ----------
    path : Path
    format : {"auto", "lines", "dart", "webnlg", "e2e", "jsonl"}
    task : dict, optional
        What the model was fine-tuned to do, as its checkpoint says: it then answers lines too.
    limit : int, optional
        Only so many, the first.
    say : callable
        Told where relations are put in lower case, as in the fine-tuning.

    Raises
    ------
    UserError
        If the file is missing, or not of that format.
    """
    lower = bool(task and task["lower_relations"])
    examples = tasks.read(path, format, lower_relations=lower)[:limit]
    if lower and not all(said_in(example.context) for example in examples):
        say(_LOWERED)
    answering = bool(task) or any(example.references for example in examples) or format not in ("auto", "lines")
    return Prompts([example.context for example in examples], answering, f"prompt {{}} of '{path}'")


def one_prompt(text: str | None, task: dict[str, Any] | None, say: Callable[[str], None]) -> Prompts:
    """A prompt as given, or none: the beginning of a document; `task` and `say` as of `read_prompts`.

    Raises
    ------
    UserError
        If a model that was fine-tuned to answer is asked nothing.
    """
    if text is None:
        if task:
            raise UserError("the model was fine-tuned to answer: give `prompt` a context, or `input` a task file.")
        return Prompts([""], True, "the prompt")
    if text.encode(errors="replace").decode() != text:
        raise UserError("`prompt` is no UTF-8 text.")
    if task and task.get("chat"):
        text = Conversation.of(text, (("user", text),))
    elif task and task["lower_relations"] and (lowered := tasks.lowered(text)) != text:
        say(_LOWERED)
        text = lowered
    return Prompts([text], bool(task), "the prompt")


def answer(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Prompts,
    decoding: Decoding,
    *,
    overlong: str = "cut",
    batch_size: int = 16,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int], None] = lambda done: None,
) -> Answers:
    """Lets a model answer each prompt, on one line.

    Parameters
    ----------
    overlong : {"refuse", "cut"}
        What becomes of prompts that leave no room for an answer in the model's window. Of a context its beginning is
        kept, of a text to go on from its end.
    batch_size : int
        Prompts at a time.
    say : callable
        Told how many prompts were cut.
    progress : callable
        Called with the number of answers done.

    Raises
    ------
    UserError
        If a text to go on from is empty, a prompt too long, or no prompt can leave room for an answer.
    """
    ids, closed = _encoded(tokenizer, prompts)
    room = model.shape.sequence_length - decoding.max_tokens - closed
    fitted = _fitted(ids, room, overlong, keep_end=not closed, say=say)
    answers = _generated(model, tokenizer, fitted, closed, decoding, batch_size, progress)
    return Answers([" ".join(tokenizer.decode(one).split()) for one in answers], sum(map(len, answers)))


def go_on(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Prompts,
    decoding: Decoding,
    *,
    overlong: str = "refuse",
    say: Callable[[str], None] = lambda line: None,
) -> Answers:
    """Lets a model go on from one text, and returns both as they stand; sampling may leave the model's window behind.

    Parameters
    ----------
    overlong : {"refuse", "cut"}
        For beam search, which needs room: as of `answer`.

    Raises
    ------
    UserError
        As of `answer`.
    """
    ids, closed = _encoded(tokenizer, prompts)
    if decoding.beams > 1:
        room = model.shape.sequence_length - decoding.max_tokens - closed
        ids = _fitted(ids, room, overlong, keep_end=not closed, say=say)
    (found,) = _generated(model, tokenizer, ids, closed, decoding, 1, lambda done: None)
    begun, text = prompts.texts[0], tokenizer.decode(found)
    if prompts.answering and begun:
        return Answers([f"{begun} {text.lstrip(' ')}"], len(found))
    return Answers([tokenizer.decode([*ids[0], *found]) if begun else text], len(found))


def _encoded(tokenizer: Tokenizer, prompts: Prompts) -> tuple[list[list[int]], bool]:
    """Ids of each prompt, and whether an end of document is to stand between it and its answer."""
    if tokenizer.chat_template is not None and all(map(said_in, prompts.texts)):
        return [chat.encode(tokenizer, said_in(text))[0].tolist() for text in prompts.texts], False
    ids = [tokenizer.encode(text).tolist() for text in prompts.texts]
    for number, one in enumerate(ids, 1):
        if not one and not prompts.answering:
            raise UserError(f"{prompts.name.format(number)} is empty: give at least one character.")
    return ids, prompts.answering


def _generated(
    model: GPT, tokenizer: Tokenizer, ids: list[list[int]], closed: bool, decoding: Decoding, batch_size: int,
    progress: Callable[[int], None],
) -> list[list[int]]:  # fmt: skip
    prompts = [[*one, tokenizer.end_of_document] if closed else one for one in ids]
    try:
        return generate(model, prompts, decoding, tokenizer.ends, batch_size, progress)
    except KeyboardInterrupt:
        raise Interrupted("stopped; no answer was written.") from None


def _fitted(
    prompts: list[list[int]], room: int, overlong: str, keep_end: bool, say: Callable[[str], None]
) -> list[list[int]]:
    """Prompts of at most `room` tokens."""
    one_of("`overlong`", overlong, OVERLONG)
    if room < 1:
        raise UserError(
            f"`max_tokens` leaves no room for a prompt in the model's window: lower it by at least {1 - room}."
        )
    long = sum(len(ids) > room for ids in prompts)
    if long and overlong == "refuse":
        raise UserError(
            f"{long} of {len(prompts)} prompts have more than {room} tokens, which leaves no room for an answer in the "
            "model's window: lower `max_tokens`, or set `overlong` cut."
        )
    if long:
        side = "end" if keep_end else "beginning"
        say(f"{long} of {len(prompts)} prompts are cut to {room} tokens: their {side} is kept")
    return [ids[-room:] if keep_end else ids[:room] for ids in prompts]


def scored(answers: Sequence[str], examples: Sequence[tasks.Example], protocol: str) -> dict[str, Any]:
    """BLEU of answers to the contexts of examples, and of the contexts as they are: what copying would score.

    Parameters
    ----------
    answers : sequence of str
        A line for each example.
    protocol : {"multi-bleu", "lora", "mteval-13a"}

    Returns
    -------
    dict
        ``bleu``, as of `corpus_bleu`, and ``bleu_of_contexts``.
    """
    references = [example.references for example in examples]
    contexts = [example.context for example in examples]
    mine, copied = (corpus_bleu(texts, references, protocol) for texts in (answers, contexts))
    return {"bleu": mine.to_json(), "bleu_of_contexts": copied.bleu}
