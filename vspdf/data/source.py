"""What a configuration reads: a text, or the pairs of a task where it starts from a model."""

from __future__ import annotations

from vspdf.config.resolved import ResolvedConfig
from vspdf.data import pairs, text
from vspdf.data.tokenizer import Tokenizer


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
