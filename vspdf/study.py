"""What a study is: arms on the same data in the same order, over seeds, and what is tuned for each; read from YAML."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from vspdf import config as configuration
from vspdf.config import Config
from vspdf.errors import UserError, did_you_mean

KEYS = ("name", "about", "seeds", "tuning_seeds", "common", "arms", "pairs")
# An arm that set one of these would not be the same study: the seed is the study's, the data are common to all arms.
NOT_OF_AN_ARM = ("name", "run_dir", "seed", "data", "model.sequence_length", "model.vocab_size")
_NOT_COMMON = ("name", "run_dir", "seed")

Values = dict[str, Any]  # of tuned settings, by dotted key
Form = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to train: a configuration, and the values to try for some of its settings.

    Attributes
    ----------
    body : dict
        The configuration as written, common settings included.
    tune : dict of str to list
        Values to try by dotted key.
    """

    name: str
    body: Form
    tune: dict[str, list[Any]]
    where: str  # for error messages

    def configure(self, values: Values, seed: int, run_dir: Path | None = None) -> Config:
        """The configuration of one run."""
        body = {**self.body, "name": self.name, "seed": seed}
        if run_dir is not None:
            body["run_dir"] = str(run_dir)
        try:
            return configuration.build(body, self.where, [f"{key}={json.dumps(v)}" for key, v in values.items()])
        except UserError as error:
            message = str(error)
            raise UserError(message if message.startswith(self.where) else f"{self.where}: {message}") from None

    @cached_property
    def steps(self) -> int:
        """Of one run."""
        return sum(phase.steps or 0 for phase in self.configure({}, 0).phases)

    def folder(self, root: Path, values: Values, seed: int) -> Path:
        """The run directory of one run."""
        spelled = ",".join(f"{key}={value}" for key, value in values.items())
        return root / self.name / spelled / f"seed-{seed}"


@dataclass(frozen=True)
class Study:
    """Arms, and over which seeds they are compared.

    Attributes
    ----------
    seeds : tuple of int
        Of the runs that are reported.
    tuning_seeds : tuple of int
        Of the runs that settings are chosen by. Where one is among `seeds`, the run that was chosen is reported.
    pairs : tuple of (str, str)
        Arms whose difference is reported.
    """

    name: str
    path: Path
    about: str
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    pairs: tuple[tuple[str, str], ...]

    @property
    def results(self) -> Path:
        """Where results are kept that are committed beside the study."""
        return self.path.parent / "results" / f"{self.path.stem}.json"


def load(source: str | Path) -> Study:
    """Reads and checks a study, every value to be tried included.

    Parameters
    ----------
    source : path of a YAML file, or the name of a study that ships with vspdf ("toy")

    Raises
    ------
    UserError
        One line that names the file, the arm and the setting.
    """
    path = configuration.find_config(source, "studies", "study")
    body, where = configuration.read_yaml(path), str(path)

    def require(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(f"{where}: {message}")

    require(isinstance(body, dict), "expected a study, a mapping with 'seeds', 'common' and 'arms'.")
    for key in body:
        require(key in KEYS, f"unknown key '{key}'.{did_you_mean(str(key), KEYS)}")
    about = body.get("about") or ""
    require(isinstance(about, str), "'about' must be text.")
    seeds = _seeds(body.get("seeds"), "seeds", where)
    tuning_seeds = _seeds(body.get("tuning_seeds", [max(seeds) + 1]), "tuning_seeds", where)
    common, arms = body.get("common", {}), body.get("arms")
    require(isinstance(common, dict), "'common' must be a mapping of settings, as `vspdf train` takes them.")
    require(isinstance(arms, dict) and bool(arms), "'arms' must be a mapping of at least one name to its settings.")
    for key in _NOT_COMMON:
        require(key not in common, f"'common.{key}' is the study's to set.")
    read = {str(name): _arm(str(name), arm, common, where) for name, arm in arms.items()}
    first = next(iter(read.values()))
    require(
        first.configure({}, seeds[0]).data.test_fraction > 0,
        "common.data.test_fraction is not set: results are reported on text that tuning never saw; e.g. 0.02.",
    )
    pairs = body.get("pairs", [[name, first.name] for name in read if name != first.name])
    require(
        isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs),
        "'pairs' must be a list of pairs of arms, e.g. [[variable, spdf]].",
    )
    for pair in pairs:
        for name in pair:
            require(name in read, f"pairs: no arm '{name}'.{did_you_mean(str(name), read)}")
        require(pair[0] != pair[1], f"pairs: '{pair[0]}' is paired with itself.")
    name = str(body.get("name", path.stem))
    return Study(name, path, about.strip(), read, seeds, tuning_seeds, tuple((a, b) for a, b in pairs))


def _seeds(value: Any, key: str, where: str) -> tuple[int, ...]:
    whole = isinstance(value, list) and all(type(seed) is int and seed >= 0 for seed in value)
    if not whole or not value or len(set(value)) < len(value):
        raise UserError(f"{where}: '{key}' must be a list of different seeds, 0 or more, e.g. [0, 1, 2, 3, 4].")
    return tuple(value)


def _arm(name: str, arm: Any, common: Form, where: str) -> Arm:
    here = f"{where}, arm '{name}'"
    if not isinstance(arm, dict):
        raise UserError(f"{here}: expected a mapping of settings.")
    own = {key: value for key, value in arm.items() if key != "tune"}
    tune = arm.get("tune", {})
    if not isinstance(tune, dict) or not all(isinstance(values, list) and values for values in tune.values()):
        raise UserError(f"{here}: 'tune' must map settings to lists of values, e.g. {{optimizer.lr: [0.003, 0.006]}}.")
    for key in NOT_OF_AN_ARM:
        if _has(own, key) or any(tuned == key or tuned.startswith(f"{key}.") for tuned in map(str, tune)):
            raise UserError(f"{here}: '{key}' must be the same for all arms: set it in 'common'.")
    read = Arm(name, _merged(common, own), {str(key): values for key, values in tune.items()}, here)
    read.configure({}, 0)
    for key, values in read.tune.items():
        for value in values:
            read.configure({key: value}, 0)
        if len({json.dumps(value) for value in values}) < len(values):
            raise UserError(f"{here}: tune.{key} has a value twice.")
    return read


def _has(body: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(body, dict) or part not in body:
            return False
        body = body[part]
    return True


def _merged(common: Any, own: Any) -> Any:
    """An arm's settings over the common ones; lists (of phases) are replaced whole."""
    if isinstance(common, dict) and isinstance(own, dict):
        return {key: _merged(common.get(key), own[key]) if key in own else common[key] for key in {**common, **own}}
    return own


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
    """Chooses an arm's values by mean validation loss: one setting after the other, in the order they are written.

    Parameters
    ----------
    loss : callable
        Validation loss for (values, seed); None: not known yet, infinite: diverged.
    """
    chosen: Values = {}
    trials: list[Trial] = []
    for key, values in arm.tune.items():
        here = [
            Trial(at, tuple(loss(at, seed) for seed in seeds)) for at in ({**chosen, key: value} for value in values)
        ]
        trials.extend(here)
        means = [math.inf if None in trial.losses else fmean(trial.losses) for trial in here]  # type: ignore[arg-type]
        if any(None in trial.losses for trial in here) or min(means) == math.inf:
            return Tuning(None, trials)
        chosen = here[means.index(min(means))].values
    return Tuning(chosen, trials)


def planned(arm: Arm, study: Study) -> int:
    """How many trainings an arm takes in all: trials, and one for each seed that no trial was of."""
    trials = sum(map(len, arm.tune.values())) * len(study.tuning_seeds)
    return trials + len(set(study.seeds) - set(study.tuning_seeds if arm.tune else ()))
