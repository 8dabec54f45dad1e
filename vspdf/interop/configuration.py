"""The one door to any configuration: ours, or one of the Cerebras stack, translated as it is opened."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vspdf.config.loading import build, find_config, read_yaml
from vspdf.config.resolved import ResolvedConfig
from vspdf.config.settings import ModelConfig
from vspdf.interop.cerebras import translated


def load_config(
    source: str | Path, overrides: Sequence[str] = (), *, start: tuple[str, ModelConfig] | None = None
) -> ResolvedConfig:
    """Reads a configuration as `vspdf.config.load` does, whichever program it was written for.

    Besides ours: files of the Cerebras stack, in either generation's form, and its ``sparsity`` block beside settings
    of ours.

    Parameters
    ----------
    source : path of a YAML file, or the name of a config that ships with vspdf ("cerebras-6.7b-stage1")
    overrides : sequence of "key=value"
        Of our settings, by dotted keys: ``phases.0.steps=100``.
    start : (str, ModelConfig), optional
        Fine-tuning: where the model to begin with is, and its shape.

    Returns
    -------
    ResolvedConfig

    Raises
    ------
    UserError
        As `vspdf.config.load`, and for a setting of theirs that asks for what is not offered here.
    """
    path = find_config(source)
    started = any(re.match(r"init_from=.", override) for override in overrides)
    body = translated(read_yaml(path), str(path), fine_tuning=start is not None, started=started)
    return build(body, str(path), overrides, start=start)
