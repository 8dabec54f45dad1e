"""What a study is: arms on the same data in the same order, over seeds, and what is tuned for each; read from YAML."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vspdf.compare import relations
from vspdf.config import loading
from vspdf.config.resolve import resolve_task, usable
from vspdf.config.resolved import ResolvedConfig, ResolvedTask
from vspdf.config.settings import DataConfig, ModelConfig, TrainConfig
from vspdf.data import pairs
from vspdf.data.tasks import Example
from vspdf.errors import UserError, did_you_mean
from vspdf.evaluate.bleu import PROTOCOLS
from vspdf.evaluate.generate import Decoding
from vspdf.files import at_home
from vspdf.interop.cerebras import translated
from vspdf.runs.folder import START

KEYS = ("name", "about", "seeds", "tuning_seeds", "common", "arms", "pairs", "folder", "finetune", "tasks",
        "multiplier", "seconds", "tuning_seconds")  # fmt: skip
# An arm that set one of these would not be the same study: the seed is the study's, the data are common to all arms.
NOT_OF_AN_ARM = ("name", "run_dir", "seed", "data", "model.sequence_length", "model.vocab_size")
_NOT_COMMON = ("name", "run_dir", "seed")
_LONGEST = 255  # bytes of a folder's name, as file systems have it
_OF_A_TASK = ("protocol", "decoding", "source")  # what is said of a task beside settings of its fine-tuning

Values = dict[str, Any]  # of tuned settings, by dotted key
Form = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Contexts to answer, and how answers are made and scored.

    Attributes
    ----------
    data : ResolvedTask
        Its file and the parts held out: "validation" to tune on, "test" to score.
    protocol : str
        A key of `vspdf.bleu.PROTOCOLS`.
    source : str
        Where users get the file.
    """

    name: str
    data: ResolvedTask
    protocol: str
    decoding: Decoding
    source: str

    @cached_property
    def parts(self) -> dict[str, list[Example]]:
        """Examples by part.

        Raises
        ------
        UserError
            If the file is not there or unfit; says where it comes from.
        """
        try:
            return pairs.parts(self.data)
        except UserError as error:
            source = f" It comes from {self.source}." if self.source else ""
            raise UserError(f"task '{self.name}': {error}{source} `folder=FOLDER` says where task files are.") from None

    @property
    def pairs(self) -> int:
        """Pairs of a context and a reference to train on."""
        return sum(len(example.references) for example in self.parts["train"])


@dataclass(frozen=True)
class Arm:
    """One way to train: a configuration, and the values to try for some of its settings.

    Attributes
    ----------
    body : dict
        The configuration as written, common settings included.
    tune : dict of str to list
        Values to try by dotted key; "epochs" stands for the steps that a task's pairs take so many times.
    untrained : bool
        The initial weights as they are drawn, for fine-tuning to begin with.
    steps, trial_steps, trial_seeds
        Of a study with `seconds`: steps of each phase, those of the runs that settings are chosen by, and their seeds.
    earlier : dict, optional
        What results whose runs are gone hold of it (`vspdf.compare.earlier`): its values, trials and runs.
    task, of, begin, model
        Of an arm's fine-tuning, whose `name` is the task's: the task, the arm's name, the checkpoint that each seed
        begins with, and its shape.
    """

    name: str
    body: Form
    tune: dict[str, list[Any]]
    where: str  # for error messages
    untrained: bool = False
    steps: tuple[int, ...] = ()
    trial_steps: tuple[int, ...] = ()
    trial_seeds: frozenset[int] = frozenset()
    earlier: Form | None = None
    task: Task | None = None
    of: str = ""
    begin: Callable[[int], Path] = field(default=lambda seed: Path(START))
    model: ModelConfig = field(default_factory=ModelConfig)

    @property
    def title(self) -> str:
        return f"{self.of} on {self.name}" if self.of else self.name

    def configure(self, values: Values, seed: int, run_dir: Path | None = None) -> ResolvedConfig:
        """The configuration of one run."""
        body = {**self.body, "name": f"{self.of}-{self.name}" if self.of else self.name, "seed": seed}
        if run_dir is not None:
            body["run_dir"] = str(run_dir)
        settings = {key: value for key, value in values.items() if key != "epochs"}
        if "epochs" in self.tune:
            settings["phases.0.steps"] = self._steps(values["epochs"]) if "epochs" in values else 1
        fill = self.trial_steps if seed in self.trial_seeds else self.steps
        settings |= {f"phases.{i}.steps": steps for i, steps in enumerate(fill)}
        start = (str(self.begin(seed)), self.model) if self.task else None
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        try:
            return loading.build(body, self.where, overrides, start=start)
        except UserError as error:
            message = str(error)
            raise UserError(message if message.startswith(self.where) else f"{self.where}: {message}") from None

    @property
    def digest(self) -> str:
        """Of the configuration as written: equal where two studies' arms train alike, but for values tried."""
        return hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()

    @property
    def held(self) -> dict[int, Form]:
        """Runs that earlier results have, by seed."""
        return {run["seed"]: run for run in self.earlier["runs"]} if self.earlier else {}

    def _steps(self, epochs: float) -> int:
        assert self.task is not None
        batch_size = self.body.get("train", {}).get("batch_size", TrainConfig.batch_size)
        return max(1, round(epochs * self.task.pairs / batch_size))

    def folder(self, root: Path, values: Values, seed: int) -> Path:
        """The run directory of one run; fine-tunings of an arm lie beside its seeds."""
        spelled = ",".join(f"{key}={value}" for key, value in values.items())
        if any(len(os.fsencode(part)) > _LONGEST for part in Path(spelled).parts):  # a list of phases
            spelled = f"values-{hashlib.sha256(spelled.encode()).hexdigest()[:16]}"
        return root / self.of / self.name / spelled / f"seed-{seed}"

    def trials(self) -> int:
        """How many values, or for a task combinations of them, are tried."""
        sizes = [len(values) for values in self.tune.values()]
        return (math.prod(sizes) if self.task else sum(sizes)) if sizes else 0


@dataclass(frozen=True)
class Study:
    """Arms, and over which seeds they are compared.

    Attributes
    ----------
    seeds : tuple of int
        Of the runs that are reported.
    tuning_seeds : tuple of int
        Of the runs that settings are chosen by. Where one is among `seeds`, the run that was chosen is reported.
    tuning_given : bool
        Whether they are written; else they follow from `seeds`.
    pairs : tuple of (str, str)
        Arms whose difference is reported.
    tasks : dict of str to Task
        What every arm is fine-tuned on, densely; empty where pre-training is the subject.
    changes : tuple of str
        ``key=value`` given beside the file.
    family : tuple of str
        Dense arms by whose losses the others' kept weights are valued; empty where that is not asked for.
    seconds, tuning_seconds : float, optional
        CPU time of every run, which then decides on its steps; of the runs that settings are chosen by, if they are to
        be shorter.
    """

    name: str
    path: Path
    about: str
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    pairs: tuple[tuple[str, str], ...]
    tasks: dict[str, Task] = field(default_factory=dict)
    fine_tunings: dict[str, Arm] = field(default_factory=dict)  # by task, without what they begin with
    changes: tuple[str, ...] = ()
    family: tuple[str, ...] = ()
    seconds: float | None = None
    tuning_seconds: float | None = None
    tuning_given: bool = True

    @property
    def results(self) -> Path:
        """Where results are kept that are committed beside the study."""
        return self.path.parent / "results" / f"{self.path.stem}.json"

    @property
    def command(self) -> str:
        """What to type; where task files lie is everyone's own, and the studies that ship have names."""
        changes = ("folder=FOLDER" if change.startswith("folder=") else change for change in self.changes)
        ships = self.path.resolve() in {path.resolve() for path in loading.shipped("studies")}
        return shlex.join(["vspdf", "compare", self.path.stem if ships else str(self.path), *changes])

    @property
    def root(self) -> Path:
        """Where its runs lie, and what they show, if nothing else is said."""
        return Path("runs") / self.name

    def fine_tuning(self, arm: Arm, task: str, root: Path, chosen: Values) -> Arm:
        """How an arm, pre-trained with the values chosen for it, is fine-tuned on a task."""

        def begin(seed: int) -> Path:
            folder = arm.folder(root, chosen, seed)
            return folder / START if arm.untrained else folder

        where = f"{arm.where}, task '{task}'"
        model = ModelConfig(**asdict(arm.configure(chosen, self.seeds[0]).model))
        return replace(self.fine_tunings[task], of=arm.name, where=where, begin=begin, model=model)


def load(source: str | Path, changes: Sequence[str] = ()) -> Study:
    """Reads and checks a study, every value to be tried included.

    Parameters
    ----------
    source : path of a YAML file, or the name of a study that ships with vspdf ("toy")
    changes : sequence of "key=value"
        Dotted keys of the file: ``common.train.device=cuda``, ``folder=my-tasks``.

    Raises
    ------
    UserError
        One line that names the file, the arm and the setting.
    """
    path = loading.find_config(source, "studies", "study")
    body, where = loading.read_yaml(path), str(path)

    def require(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(f"{where}: {message}")

    require(isinstance(body, dict), "expected a study, a mapping with 'seeds', 'common' and 'arms'.")
    if isinstance(body.get("common"), str):
        body["common"] = _common_of(body["common"], path)
    for change in changes:
        _change(body, change)
    for key in body:
        require(key in KEYS, f"unknown key '{key}'.{did_you_mean(str(key), KEYS)}")
    about = body.get("about") or ""
    require(isinstance(about, str), "'about' must be text.")
    title = body.get("name", path.stem)
    sound = "name" not in body or (title is not None and usable(str(title)))
    require(sound, f"name = '{title}' must be usable as a folder's name.")
    seeds = _seeds(body.get("seeds"), "seeds", where)
    tuning_seeds = _seeds(body.get("tuning_seeds", [max(seeds) + 1]), "tuning_seeds", where)
    common, arms = body.get("common", {}), body.get("arms")
    require(isinstance(common, dict), "'common' must be settings as `vspdf train` takes them, or a study with such.")
    require(isinstance(arms, dict) and bool(arms), "'arms' must be a mapping of at least one name to its settings.")
    for key in _NOT_COMMON:
        require(key not in common, f"'common.{key}' is the study's to set.")
    read = {str(name): _arm(str(name), arm, common, where) for name, arm in arms.items()}
    first = next(iter(read.values()))
    require(
        first.configure({}, seeds[0]).data.test_fraction > 0,
        "common.data.test_fraction is not set: results are reported on text that tuning never saw; e.g. 0.02.",
    )
    fine_tunings = _fine_tunings(body, first, where)
    for name, arm in read.items():
        require(bool(fine_tunings) or not arm.untrained, f"arm '{name}' is untrained, and there are no 'tasks'.")
    require(
        not fine_tunings or {*tuning_seeds} <= {*seeds},
        "with 'tasks', 'tuning_seeds' must be among 'seeds': fine-tuning is tuned on runs that are there.",
    )
    return Study(
        str(title), path, about.strip(), read, seeds, tuning_seeds,
        relations.pairs(body, read, where), {name: arm.task for name, arm in fine_tunings.items() if arm.task},
        fine_tunings, tuple(changes), relations.family(body.get("multiplier", []), read, where),
        *relations.times(body, read, {*seeds} & {*tuning_seeds}, where), "tuning_seeds" in body,
    )  # fmt: skip


def _common_of(name: str, path: Path) -> Any:
    """The common settings of another study, by name or by its path from the file at `path`; it must have its own."""
    beside = path.parent / name
    other = loading.find_config(beside if beside.is_file() else name, "studies", "study")
    body = loading.read_yaml(other)
    return body.get("common", {}) if isinstance(body, dict) else None


def _change(body: Form, change: str) -> None:
    """Sets what ``key=value`` says; whether there is such a key is found out where the study is checked."""
    key, value = loading.parse_override(change)
    node: Any = body
    *above, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    try:
        for part in above:
            node = node.setdefault(part, {}) if isinstance(node, dict) else node[part]
        node[last] = OmegaConf.to_container(value)["value"]  # type: ignore[call-overload,index]
    except (TypeError, IndexError):
        raise UserError(f"'{change}': the study has no place for '{key}'.") from None


def _seeds(value: Any, key: str, where: str) -> tuple[int, ...]:
    whole = isinstance(value, list) and all(type(seed) is int and 0 <= seed < 2**64 for seed in value)
    if not whole or not value or len(set(value)) < len(value):
        raise UserError(
            f"{where}: '{key}' must be a list of different seeds, 0 or more and below 2^64, e.g. [0, 1, 2, 3, 4]."
        )
    return tuple(value)


def _arm(name: str, arm: Any, common: Form, where: str) -> Arm:
    here = f"{where}, arm '{name}'"
    if not isinstance(arm, dict):
        raise UserError(f"{here}: expected a mapping of settings.")
    own = {key: value for key, value in arm.items() if key not in ("tune", "untrained")}
    untrained, tune = arm.get("untrained", False), _values_to_try(arm.get("tune", {}), here)
    if untrained not in (True, False) or (untrained and (tune or "phases" in own)):
        raise UserError(f"{here}: 'untrained' is true or false; such an arm has neither 'phases' nor 'tune'.")
    if "epochs" in tune:
        raise UserError(f"{here}: tune.epochs is a task's to try; an arm trains for steps, phases.0.steps.")
    for key in NOT_OF_AN_ARM:
        if _has(own, key) or any(tuned == key or tuned.startswith(f"{key}.") for tuned in tune):
            raise UserError(f"{here}: '{key}' must be the same for all arms: set it in 'common'.")
    if untrained:
        own["phases"] = [{"steps": 1}]  # a configuration wants one; none is run
    read = Arm(name, _ours(_merged(common, own), here), tune, here, untrained)
    _check_values(read)
    return read


def _ours(body: Form, here: str, fine_tuning: bool = False) -> Form:
    """Settings in the Cerebras stack's form as ours."""
    found = translated(body, here, fine_tuning)
    if "seed" in found:
        raise UserError(f"{here}: the seed is the study's to set, also that of a sparsity block.")
    return found


def _values_to_try(tune: Any, here: str) -> dict[str, list[Any]]:
    if not isinstance(tune, dict) or not all(isinstance(values, list) and values for values in tune.values()):
        raise UserError(f"{here}: 'tune' must map settings to lists of values, e.g. {{optimizer.lr: [0.003, 0.006]}}.")
    for key, values in tune.items():
        if len({json.dumps(value) for value in values}) < len(values):
            raise UserError(f"{here}: tune.{key} has a value twice.")
    return {str(key): values for key, values in tune.items()}


def _check_values(arm: Arm) -> None:
    """That each is a possible one."""
    arm.configure({}, 0)
    for key, values in arm.tune.items():
        for value in values:
            if key != "epochs":
                arm.configure({key: value}, 0)
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise UserError(f"{arm.where}: tune.epochs must be numbers above 0, not {value}.")


def _fine_tunings(body: Form, first: Arm, where: str) -> dict[str, Arm]:
    """The fine-tunings by task; what they begin with is not known yet."""
    common, tasks, folder = body.get("finetune", {}), body.get("tasks", {}), body.get("folder", ".")
    for key, value in (("finetune", common), ("tasks", tasks)):
        if not isinstance(value, dict):
            raise UserError(f"{where}: '{key}' must be a mapping.")
    if not isinstance(folder, str):
        raise UserError(f"{where}: 'folder' must be the path of a folder with the task files.")
    if common and not tasks:
        raise UserError(f"{where}: 'finetune' says how, 'tasks' on what: it is missing.")
    found = {}
    for name, task in tasks.items():
        here = f"{where}, task '{name}'"
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict) or not task["data"].get("path"):
            raise UserError(f"{here}: expected a mapping with data.path, a file of contexts and references.")
        own = {key: value for key, value in task.items() if key not in _OF_A_TASK}
        own["data"] = {**own["data"], "path": str(at_home(folder) / str(own["data"]["path"]))}
        own = _merged(common, own)
        for key in ("name", "run_dir", "seed", "model", "start"):
            if key in own:
                raise UserError(f"{here}: '{key}' is not a task's to set.")
        tune = _values_to_try(own.pop("tune", {}), here)
        protocol, decoding = task.get("protocol", "multi-bleu"), task.get("decoding", {})
        if not isinstance(protocol, str) or protocol not in PROTOCOLS:
            raise UserError(f"{here}: protocol '{protocol}' is not known.{did_you_mean(str(protocol), PROTOCOLS)}")
        known = [item.name for item in fields(Decoding)]
        if not isinstance(decoding, dict) or not {*decoding} <= {*known}:
            wrong = next(iter({*decoding} - {*known})) if isinstance(decoding, dict) else decoding
            raise UserError(f"{here}: decoding has no '{wrong}'.{did_you_mean(str(wrong), known)}")
        model = first.configure({}, 0).model
        data = resolve_task(DataConfig(path=own["data"]["path"]), model.sequence_length)
        try:
            how = Decoding(**decoding)
        except UserError as error:
            raise UserError(f"{here}: decoding: {error}") from None
        about = Task(str(name), data, protocol, how, str(task.get("source", "")))
        own = _ours(own, here, fine_tuning=True)
        read = Arm(str(name), own, tune, here, task=about, model=ModelConfig(**asdict(model)))
        _check_values(read)
        settled = read.configure({}, 0).task
        if settled is None or not settled.test_fraction:
            raise UserError(f"{here}: data.test_fraction is not set: answers are scored on a part of their own.")
        if about.decoding.max_tokens + 2 > model.sequence_length:
            raise UserError(f"{here}: decoding.max_tokens leaves no room for a context of {model.sequence_length}.")
        found[str(name)] = replace(read, task=replace(about, data=settled))
    return found


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
