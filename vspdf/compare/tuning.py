"""Which settings of an arm are tried, and which of them its runs take."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from vspdf.compare.definition import Arm, Study, Values
from vspdf.runs.folder import Run

# -- tuning -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """Values that were tried, and the validation loss of each tuning seed; None where it is not known yet."""

    values: Values
    losses: tuple[float | None, ...]


@dataclass(frozen=True)
class Tuning:
    """How far the tuning of an arm is.

    Attributes
    ----------
    chosen : dict or None
        None while trials are missing, or where every one diverged.
    """

    chosen: Values | None
    trials: list[Trial]

    def at_the_edge(self, arm: Arm) -> list[str]:
        """Keys whose best value is the least or the greatest that was tried: a better one may lie outside."""
        edges = []
        for key, values in arm.tune.items():
            numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
            if self.chosen and numbers and len(values) > 1 and self.chosen[key] in (min(values), max(values)):
                edges.append(key)
        return edges


def tuning(arm: Arm, seeds: Sequence[int], loss: Callable[[Values, int], float | None]) -> Tuning:
    """Chooses an arm's values by mean validation loss.

    One setting after the other, in the order they are written; for fine-tuning all combinations, as published.

    Parameters
    ----------
    loss : callable
        Validation loss for (values, seed); None: not known yet, infinite: diverged.
    """
    keys = list(arm.tune)
    rounds = [keys] if arm.task and keys else [[key] for key in keys]
    chosen: Values = {}
    trials: list[Trial] = []
    for together in rounds:
        candidates = [
            {**chosen, **dict(zip(together, values, strict=True))}
            for values in itertools.product(*(arm.tune[key] for key in together))
        ]
        here = [Trial(values, tuple(loss(values, seed) for seed in seeds)) for values in candidates]
        trials.extend(here)
        means = [math.inf if None in trial.losses else fmean(trial.losses) for trial in here]  # type: ignore[arg-type]
        if any(None in trial.losses for trial in here) or min(means) == math.inf:
            return Tuning(None, trials)
        chosen = here[means.index(min(means))].values
    return Tuning(chosen, trials)


def planned(arm: Arm, study: Study) -> int:
    """How many trainings an arm takes in all: trials, and one for each seed that no trial was of."""
    if arm.earlier:
        return len(set(study.seeds) - arm.held.keys())
    trials = arm.trials() * len(study.tuning_seeds)
    return trials + len(set(study.seeds) - set(study.tuning_seeds if arm.tune else ()))


def tuned(study: Study, root: Path, arm: Arm) -> Tuning:
    """What the finished trials of an arm say about its values, or earlier results of it."""
    if arm.earlier:
        known = [
            Trial(trial["values"], tuple(math.inf if loss is None else loss for loss in trial["val_loss"]))
            for trial in arm.earlier["trials"]
        ]
        return Tuning(arm.earlier["tuned"], known)

    def loss(values: Values, seed: int) -> float | None:
        known = Run(arm.folder(root, values, seed)).evaluation
        return math.inf if "diverged" in known else known.get("val_loss")

    return tuning(arm, study.tuning_seeds, loss)
