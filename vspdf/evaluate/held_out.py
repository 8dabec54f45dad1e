"""Loss and bits per byte of a model on what its run held out, or on a text of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vspdf.config.resolved import ResolvedConfig
from vspdf.data import source
from vspdf.data.pairs import Pairs
from vspdf.data.text import Dataset, Text
from vspdf.data.tokenizer import Tokenizer
from vspdf.evaluate.loss import Evaluation, evaluate, settle
from vspdf.model import GPT
from vspdf.parallel.world import ALONE, World

Progress = Callable[[int], None]
LONGEST = 2048  # tokens of a window of one's own text: models of 131,072 positions would make logits of gigabytes
_LOGITS = 1 << 28  # of a batch by default, at most: 1 GB


def on_run(
    model: GPT, tokenizer: Tokenizer | None, config: ResolvedConfig, manifest: Mapping[str, Any],
    progress: Callable[[int], Progress], batch_size: int | None = None, world: World = ALONE,
) -> Evaluation:  # fmt: skip
    """Mean loss over all that a run held out.

    Parameters
    ----------
    config : ResolvedConfig
        Of the run.
    manifest : mapping
        What the run wrote down of the data that it trained on.
    progress : callable
        Given the number of tokens of a held-out text, returns what is called with the number done.
    batch_size : int, optional
        Sequences at a time; default: as many as in training.
    world : World
        Who shares the text.

    Raises
    ------
    UserError
        If the corpus is missing, or it or its tokenizer has changed since.
    """

    def prepared() -> Dataset | Pairs:
        data = source.prepare(config, tokenizer)
        source.check_unchanged(data, config, manifest)
        return data

    data = world.together(prepared)
    told = (lambda done: None) if config.task else progress(data.manifest["validation"]["tokens"])
    size, precision = batch_size or config.train.micro_batch_size, config.train.precision
    settle(world, lambda: evaluate(model, data, size, 1, precision))
    return evaluate(model, data, size, precision=precision, world=world, progress=told)


def on_text(
    model: GPT, tokenizer: Tokenizer, path: str, batch_size: int | None, progress: Callable[[int], Progress],
    world: World = ALONE,
) -> tuple[Evaluation, dict[str, Any]]:  # fmt: skip
    """Mean loss over a text of one's own, and what was read: name, bytes, documents, tokens, and tokens of a window.

    Parameters
    ----------
    path : str
        A file, a folder, or ``FILE.jsonl``.
    batch_size : int, optional
        Windows at a time; default: 8, fewer where their logits would be too large.
    progress : callable
        As of `on_run`.
    world : World
        Who shares the text.

    Raises
    ------
    UserError
        If the text is missing or empty.
    """
    length = min(model.shape.sequence_length, LONGEST)
    own = world.together(lambda: Text.read(path, tokenizer, length))
    size = batch_size or max(1, min(8, _LOGITS // (length * model.shape.vocab_size)))
    settle(world, lambda: evaluate(model, own, size, 1))
    found = evaluate(model, own, size, world=world, progress=progress(own.source["tokens"]))
    return found, own.source | {"window": length}
