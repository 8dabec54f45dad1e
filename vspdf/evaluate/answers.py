"""Answers of a model to the prompts of a task, and their score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vspdf.config.resolved import ResolvedTask
from vspdf.data import pairs
from vspdf.errors import UserError
from vspdf.evaluate.bleu import corpus_bleu
from vspdf.evaluate.generate import Decoding, generate
from vspdf.files import write_whole
from vspdf.interop.checkpoints import Loaded


def _fitted(
    prompts: list[list[int]], room: int, overlong: str, keep_end: bool, say: Callable[[str], None]
) -> list[list[int]]:
    """Prompts of at most `room` tokens."""
    if room < 1:
        raise UserError(f"--tokens leaves no room for a prompt in the model's window: lower it by at least {1 - room}.")
    long = sum(len(ids) > room for ids in prompts)
    if long and overlong == "refuse":
        raise UserError(
            f"{long} of {len(prompts)} prompts have more than {room} tokens, which leaves no room for an answer in the "
            "model's window: lower --tokens, or set --overlong cut."
        )
    if long:
        side = "end" if keep_end else "beginning"
        say(f"{long} of {len(prompts)} prompts are cut to {room} tokens: their {side} is kept")
    return [ids[-room:] if keep_end else ids[:room] for ids in prompts]


def _scored(loaded: Loaded, data: ResolvedTask, task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """BLEU of the answers to the test part, and of its contexts as they are: what copying would score."""
    examples = pairs.parts(data)["test"]
    contexts = [example.context for example in examples]
    answers = _answers(loaded, contexts, Decoding(**task["decoding"]))
    write_whole(folder / "answers.txt", "".join(f"{line}\n" for line in answers))
    references = [example.references for example in examples]
    mine, copied = (corpus_bleu(texts, references, task["protocol"]) for texts in (answers, contexts))
    return {"bleu": mine.to_json(), "bleu_of_contexts": copied.bleu}


def _answers(loaded: Loaded, contexts: Sequence[str], decoding: Decoding) -> list[str]:
    """As `vspdf generate --input` makes them; the end of a context that leaves no room for an answer is cut."""
    model, tokenizer, _ = loaded
    assert tokenizer is not None
    room = model.shape.sequence_length - decoding.max_tokens - 1
    prompts = [[*tokenizer.encode(text).tolist()[:room], tokenizer.end_of_document] for text in contexts]
    answers = generate(model, prompts, decoding, tokenizer.end_of_document)
    return [" ".join(tokenizer.decode(answer).split()) for answer in answers]
