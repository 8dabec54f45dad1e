"""Where else a run's curves are drawn: TensorBoard, Weights & Biases."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from vspdf.config import loading
from vspdf.config.resolved import ResolvedConfig
from vspdf.errors import UserError
from vspdf.runs.folder import TENSORBOARD

Board = Callable[[Mapping[str, float], int], object]  # takes numbers by name, and the step they belong to


def boards(config: ResolvedConfig) -> list[Board]:
    """What takes a run's numbers, as its configuration wants.

    Raises
    ------
    UserError
        If the package for one is not installed.
    """
    made: list[Board] = []
    if config.train.tensorboard:
        made.append(_tensorboard(config))
    if config.train.wandb:
        made.append(_wandb(config))
    return made


def _package(setting: str, module: str) -> Any:
    name = module.split(".")[0]
    name = "tensorboard" if name == "torch" else name
    try:
        return import_module(module)
    except ImportError:
        raise UserError(f"train.{setting} needs the package '{name}': pip install {name}.") from None


def _tensorboard(config: ResolvedConfig) -> Board:
    writer = _package("tensorboard", "torch.utils.tensorboard").SummaryWriter(str(Path(config.run_dir) / TENSORBOARD))

    def draw(numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return draw


def _wandb(config: ResolvedConfig) -> Board:
    folder = Path(config.run_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    run = _package("wandb", "wandb").init(
        project="vspdf", name=config.name, dir=str(folder), config=loading.to_dict(config),
        id=hashlib.sha256(str(folder).encode()).hexdigest()[:16], resume="allow",  # a run that is resumed stays one
    )  # fmt: skip
    return lambda numbers, step: run.log(dict(numbers), step=step)
