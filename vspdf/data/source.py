"""What a configuration reads: a text, or the pairs of a task where it starts from a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vspdf.config.resolved import ResolvedConfig
from vspdf.data import pairs, text
from vspdf.data.tokenizer import Tokenizer
from vspdf.errors import UserError


def prepare(config: ResolvedConfig, tokenizer: Tokenizer | None = None) -> text.Dataset | pairs.Pairs:
    """Samples to train on and what is held out, of a run's configuration.

    Parameters
    ----------
    config : ResolvedConfig
    tokenizer : Tokenizer, optional
        Of the model that a fine-tuning starts from; a text has its own.

    Raises
    ------
    UserError
        As `vspdf.data.text.prepare` and `vspdf.data.pairs.prepare` do.
    """
    if config.task:
        assert tokenizer is not None
        return pairs.prepare(config.task, config.seed, tokenizer)
    return text.prepare(config.data, config.model.sequence_length, config.seed)


def check_unchanged(data: text.Dataset | pairs.Pairs, config: ResolvedConfig, manifest: Mapping[str, Any]) -> None:
    """Makes sure that data are those that a run was trained on: the same text, in the same tokens and order.

    Parameters
    ----------
    data : Dataset or Pairs
        As `prepare` finds them now.
    config : ResolvedConfig
        Of the run.
    manifest : mapping
        Of the run, from when it began.

    Raises
    ------
    UserError
        If the text or its tokenizer is another: under the same name its files may have been replaced.
    """
    name = config.task.path if config.task else config.data.corpus
    was, now = manifest["corpus"]["sha256"], data.manifest["corpus"]["sha256"]
    if was != now:
        raise UserError(
            f"the corpus '{name}' has changed since the model was trained on it: sha256 was {was[:12]}..., is "
            f"{now[:12]}...."
        )
    if manifest["order"] != data.manifest["order"]:
        raise UserError(
            f"the tokenizer '{config.data.tokenizer}' has changed since the model was trained with it: it makes other "
            f"tokens of '{name}'; put its files back (tokenizer.json in the run directory is a copy)."
        )
