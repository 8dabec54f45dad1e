"""A plan, or an advice, as a configuration that `vspdf train` takes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from vspdf.config import resolve
from vspdf.config.settings import Config
from vspdf.errors import UserError
from vspdf.files import new_whole

if TYPE_CHECKING:
    from vspdf.plan.advice import Advice
    from vspdf.plan.planner import Plan

# ---------------------------------------------------------------------------------------------------------------------
# The configuration that trains it
# ---------------------------------------------------------------------------------------------------------------------


def write(found: Plan, path: str | Path) -> None:
    """Writes the YAML that `vspdf train` runs: what differs from the defaults and does not follow from other settings.

    Raises
    ------
    UserError
        If the file exists or cannot be written.
    """
    path = Path(path)
    config = resolve.written(found.config)
    if _names_a_run(path):
        config.name, config.run_dir = path.stem, None
    _drop_what_follows(config)
    comment = (
        f"# Planned by `vspdf plan` for {found.model}: {found.flops_saved_fraction:.2%} fewer training FLOPs "
        f"(convention {found.convention})\n# than a dense run of {found.baseline}.\n"
        "# lr_multiple is the published one at 90 % sparsity: lower it for milder ones, and after a short one.\n"
        "# Your own text: data.corpus.\n"
    )
    _save(path, comment, _differing(config, Config()))


def write_advice(found: Advice, path: str | Path) -> None:
    """Writes the YAML by which `vspdf train` trains the model that was advised.

    Raises
    ------
    UserError
        If the file exists or cannot be written.
    """
    path = Path(path)
    comment = (
        f"# Advised by `vspdf plan --hours` on the machine where it ran: {found.expected_loss:.3f} nats a byte "
        f"({found.low:.3f} to {found.high:.3f}).\n# Your own text: data.corpus.\n"
    )
    _save(path, comment, ({"name": path.stem} if _names_a_run(path) else {}) | found.configuration())


def _names_a_run(path: Path) -> bool:
    """Whether a file's name, without its ending, will do as a run's."""
    return re.fullmatch(r"\w[\w.-]*", path.stem) is not None


def _save(path: Path, comment: str, settings: dict[str, Any]) -> None:
    with new_whole(path) as draft:
        draft.write_text(comment + OmegaConf.to_yaml(OmegaConf.create(settings)), encoding="utf-8")


def _drop_what_follows(config: Config) -> None:
    """Empties, in place, every setting that resolving would fill in again."""
    whole = resolve.resolve(config)
    for phase in config.phases:
        phase.tokens = None  # rather than steps
    parts: list[Any] = [config, config.model, config.train, *config.phases]
    for part in parts:
        for f in dataclasses.fields(part):
            value = getattr(part, f.name)
            if f.default is not None or value is None:
                continue
            setattr(part, f.name, None)
            try:
                follows = resolve.resolve(config) == whole
            except UserError:
                follows = False
            if not follows:
                setattr(part, f.name, value)


def _differing(value: Any, default: Any) -> Any:
    """Settings that are not at their default."""
    if isinstance(value, list):
        return [_differing(item, type(item)()) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    pairs = {f.name: (getattr(value, f.name), getattr(default, f.name)) for f in dataclasses.fields(value)}
    return {name: _differing(mine, other) for name, (mine, other) in pairs.items() if mine != other}
