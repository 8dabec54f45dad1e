"""What a configuration has to say: the settings that would come out otherwise if they were left out."""

from __future__ import annotations

import dataclasses
from typing import Any

from vspdf.config.resolve import resolve, written
from vspdf.config.resolved import ResolvedConfig
from vspdf.errors import UserError
from vspdf.sparsity.schedule import no_warnings


def essentials(config: ResolvedConfig) -> dict[str, dict[str, Any]]:
    """Settings of a run that neither are defaults nor follow from others, by section (``""``: the run itself).

    Phases are sections of their own, ``phases.0`` and so on. What the data tell a run (`ResolvedConfig.with_data`)
    counts as said: give the configuration as it was loaded.
    """
    plain = written(config)
    sections: dict[str, Any] = {"": plain, "model": plain.model, "data": plain.data, "optimizer": plain.optimizer,
                                "train": plain.train}  # fmt: skip
    sections |= {f"phases.{i}": phase for i, phase in enumerate(plain.phases)}
    said: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for name, section in reversed(sections.items()):  # what follows from another setting goes before that one
        for field in reversed(dataclasses.fields(section)):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value) or field.name == "phases" or value == (default := _default(field)):
                continue
            setattr(section, field.name, default)
            try:
                with no_warnings():
                    same = resolve(plain) == config
            except UserError:
                same = False
            if not same:
                setattr(section, field.name, value)
                said[name] = {field.name: value, **said[name]}
    return {name: settings for name, settings in said.items() if settings}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def lines(config: ResolvedConfig) -> list[str]:
    """The same in words, a line a section."""
    return [
        f"  {name or 'run'}: " + ", ".join(f"{key}={value}" for key, value in settings.items())
        for name, settings in essentials(config).items()
    ]
