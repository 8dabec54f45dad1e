"""Arms that train for equally long: what a step of each takes here, and how many of them fill the time.

Times are CPU seconds of the training steps, moves of masks included, measured on short runs of each arm one after the
other. A run beside shares memory and caches, and slows some arms more than others: where runs will go side by side,
each arm is measured beside each arm in turn. What else the machine does should be little. The measurement is kept in
the study's folder, so that the study may be stopped and started. Half a minute says less than an arm's trials do, which
last minutes beside other runs: with `tuning_seconds`, what the fastest took decides the steps of the arm's other runs,
once and for all: values that are added to `tune` later leave them as they are.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vspdf.compare import worker
from vspdf.compare.definition import Arm, Study
from vspdf.compare.results import TOLERANCE
from vspdf.compare.tuning import tuned
from vspdf.config import loading
from vspdf.config.resolved import ResolvedConfig
from vspdf.errors import UserError
from vspdf.files import read_json, write_whole
from vspdf.kernels.hardware import keep_freed_memory
from vspdf.runs import forms
from vspdf.runs.folder import LOG, Run
from vspdf.train.trainer import train

CALIBRATION = "calibration.json"
_STEPS = 28  # of each phase that are timed, all but the first two
_EVERY = 4  # steps between moves of masks meanwhile
_ENDLESS = 10**6  # steps of a run that is there to be measured beside
_QUIET = {"log_every": 1, "eval_every": 0, "eval_tokens": 1024, "checkpoint_every": 0, "measure_dense": 0,
          "sample_tokens": 0}  # fmt: skip

Pace = list[dict[str, float]]


def _more_than(least: float) -> Callable[[Any], bool]:
    """Whether a value is a finite number above one."""
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and least < value < math.inf


# Of an arm in the file.
_FORM: forms.Form = {
    "digest": lambda value: isinstance(value, str), "took?": _more_than(0.0),
    "phases": [{"step": _more_than(0.0), "update": _more_than(-1e-9)}],
}  # fmt: skip


def settle(study: Study, root: Path, jobs: int = 1, say: Callable[[str], None] = lambda line: None) -> Study:
    """The study with as many steps in every phase of its arms as fill its `seconds`, `jobs` runs at a time; the
    steps as written say in which proportion. Measures what is not known yet. A study without `seconds`, or whose steps
    earlier results have, as it is. Once an arm's trials with `tuning_seconds` are done, its other runs' steps are by
    the time that the fastest took.

    Raises
    ------
    UserError
        If an arm is too slow for its phases to have a step each.
    """
    if study.seconds is None or all(arm.earlier for arm in study.arms.values()):
        return study
    file = root / CALIBRATION
    digests = {
        name: hashlib.sha256(json.dumps([arm.body, _STEPS], sort_keys=True).encode()).hexdigest()
        for name, arm in study.arms.items()
    }
    known = _known(file, study, digests)
    new = [arm for name, arm in study.arms.items() if known.get(name, {}).get("digest") != digests[name]]
    if new:
        for name, pace in _measured(new, list(study.arms.values()), jobs - 1, say).items():
            known[name] = {"digest": digests[name], "beside": jobs - 1, "phases": pace}
        root.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(known, indent=1))
    before = copy.deepcopy(known)
    arms = {}
    for name, arm in study.arms.items():
        pace = known[name]["phases"]
        if study.tuning_seconds is None:
            arms[name] = replace(arm, steps=_filling(arm, pace, study.seconds))
            continue
        trial = _filling(arm, pace, study.tuning_seconds)
        tried = replace(arm, trial_steps=trial, trial_seeds=frozenset(study.tuning_seeds))
        # How many times the expected seconds; 1 where nothing is known.
        took = known[name].get("took") or _trials_took(study, root, tried, _taken(arm, trial, pace))
        if took:
            known[name]["took"] = took
        arms[name] = replace(tried, steps=_filling(arm, pace, study.seconds / (took or 1.0)))
    if known != before:
        write_whole(file, json.dumps(known, indent=1))
    return replace(study, arms=arms)


def _known(file: Path, study: Study, digests: dict[str, str]) -> dict[str, Any]:
    """What was measured before, by arm; of the study's own arms in the form in which it is written.

    Raises
    ------
    UserError
        If it is not.
    """
    known = read_json(file) if file.exists() else {}
    for name, arm in study.arms.items():
        if name not in known:
            continue
        why = forms.wrong(known[name], _FORM)
        if why is None and known[name]["digest"] == digests[name]:
            found, has = len(known[name]["phases"]), len(arm.body["phases"])
            why = f"it has {found} phases of {has}" if found != has else None
        if why:
            raise UserError(f"{file}, arm '{arm.name}' cannot be read: {why}. Without the file it is measured again.")
    return known


def _trials_took(study: Study, root: Path, arm: Arm, expected: float) -> float | None:
    """How many times the CPU seconds expected of an arm's trials the fastest took that went to its end; None while any
    is missing. What else the machine's host does only adds to the others, and to some arms' more than to others'."""
    found = tuned(study, root, arm)
    if found.chosen is None or not found.trials:
        return None
    runs = [Run(arm.folder(root, trial.values, seed)) for trial in found.trials for seed in study.tuning_seeds]
    return float(min(run.lines[-1]["training_cpu_seconds"] for run in runs if run.finished)) / expected


def _measured(arms: Sequence[Arm], others: Sequence[Arm], beside: int, say: Callable[[str], None]) -> dict[str, Pace]:
    """The pace of each of `arms` while `beside` runs of one of `others` go on, the mean over which one it is."""
    keep_freed_memory()  # as workers do
    found: dict[str, list[Pace]] = {arm.name: [] for arm in arms}
    for other in others if beside else others[:1]:
        with _company(other, beside):
            for arm in arms:
                say(f"{arm.name}: measuring what a step takes" + (f" beside {other.name}" if beside else ""))
                found[arm.name].append(_pace(arm))
    return {
        name: [
            {key: statistics.fmean(each[key] for each in phase) for key in phase[0]}
            for phase in zip(*paces, strict=True)
        ]
        for name, paces in found.items()
    }


@contextmanager
def _company(arm: Arm, count: int) -> Iterator[None]:
    """So many runs of an arm's first phase, under way until the end of the context."""
    body = _for_a_while(arm, _ENDLESS)
    body["phases"] = body["phases"][:1]
    body["data"] = {**body.get("data", {}), "repeat": True}
    with TemporaryDirectory() as folder, ExitStack() as stack:
        runs = [Run(Path(folder) / f"run-{i}") for i in range(count)]
        for run in runs:
            config = loading.build({**body, "name": "company", "run_dir": str(run.folder)}, arm.where)
            run.folder.mkdir()
            process = worker.start(
                {"config": loading.to_dict(config), "test": False, "untrained": False, "task": None}, run.folder / LOG
            )
            stack.callback(process.wait)
            stack.callback(worker.close, process)
            while run.step < 2:
                if process.poll() is not None:
                    raise UserError(f"{arm.where}: {(run.folder / LOG).read_text(errors='replace').strip()}")
                time.sleep(0.05)
        yield


def _for_a_while(arm: Arm, steps: int) -> dict[str, Any]:
    """An arm's configuration with so many steps in each phase, masks that move often, and nothing but training."""
    body: dict[str, Any] = copy.deepcopy(arm.body)
    for phase in body["phases"]:
        phase["steps"] = steps
        if phase.get("algorithm", "static") != "static":
            phase["update"] = {"freq": _EVERY}
        for absolute in ("update_every", "warmup_steps", "revived_warmup"):  # may be longer; a step takes as long
            phase.pop(absolute, None)
    body["train"] = {**body.get("train", {}), **_QUIET}
    return body


def _pace(arm: Arm) -> Pace:
    """CPU seconds of a `step` in each phase, and of an `update` of masks that move."""
    with TemporaryDirectory() as folder:
        body = {**_for_a_while(arm, _STEPS), "name": "calibration", "run_dir": f"{folder}/run"}
        config = loading.build(body, arm.where)
        train(config, say=lambda line: None)
        lines = Run(Path(folder) / "run").lines
    found = []
    for i, phase in enumerate(config.phases):
        plain, moved = list[float](), list[float]()
        for step in range(i * _STEPS + 2, (i + 1) * _STEPS):
            before, line = lines[step - 1], lines[step]
            took = line["training_cpu_seconds"] - before["training_cpu_seconds"]
            moves = phase.moves(step - i * _STEPS) or phase.moves(step - i * _STEPS + 1)  # RigL's is in the step before
            (moved if moves else plain).append(took)
        usual = statistics.median(plain) if phase.schedule == "constant" else statistics.fmean(plain)
        count = sum(phase.moves(step) for step in range(2, _STEPS))
        extra = (sum(moved) - len(moved) * usual) / count if count else 0.0
        found.append({"step": usual, "update": max(0.0, extra)})
    return found


def _filling(arm: Arm, pace: Pace, seconds: float) -> tuple[int, ...]:
    """Steps of each phase that take so long together, in the proportion in which they are written."""
    written = [phase.steps for phase in replace(arm, steps=()).configure({}, 0).phases]

    def scaled(by: float) -> tuple[int, ...]:
        return tuple(max(1, round(steps * by)) for steps in written)

    by = seconds / sum(steps * each["step"] for steps, each in zip(written, pace, strict=True))
    for _ in range(4):
        by *= seconds / _taken(arm, scaled(by), pace)
    if abs(_taken(arm, scaled(by), pace) / seconds - 1) > TOLERANCE / 3:
        raise UserError(f"{arm.where}: a step takes too long to fill {seconds:g} seconds with {len(written)} phases.")
    return scaled(by)


def _taken(arm: Arm, steps: tuple[int, ...], pace: Pace) -> float:
    """CPU seconds of a run with so many steps in each phase."""
    config: ResolvedConfig = replace(arm, steps=steps, trial_seeds=frozenset()).configure({}, 0)
    return sum(
        phase.steps * each["step"] + sum(map(bool, phase.update_steps() if phase.update else ())) * each["update"]
        for phase, each in zip(config.phases, pace, strict=True)
    )
