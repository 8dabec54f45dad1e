"""Arms that train for equally long: what a step of each takes here, and how many of them fill the time.

Times are CPU seconds of the training steps, moves of masks included, measured on short runs of each arm one after the
other: on a quiet machine, for what else runs beside makes caches and memory slower. The measurement is kept in the
study's folder, so that the study may be stopped and started.
"""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vspdf.compare.definition import Arm, Study
from vspdf.compare.results import TOLERANCE
from vspdf.config import loading
from vspdf.config.resolved import ResolvedConfig
from vspdf.errors import UserError
from vspdf.files import read_json, write_whole
from vspdf.runs.folder import Run
from vspdf.train.trainer import train

CALIBRATION = "calibration.json"
_STEPS = 28  # of each phase that are timed, all but the first two
_EVERY = 4  # steps between moves of masks meanwhile


def settle(study: Study, root: Path, say: Callable[[str], None] = lambda line: None) -> Study:
    """The study with as many steps in every phase of its arms as fill its `seconds`; the steps as written say in
    which proportion. Measures what is not known yet. A study without `seconds` as it is.

    Raises
    ------
    UserError
        If an arm is too slow for its phases to have a step each.
    """
    if study.seconds is None:
        return study
    file = root / CALIBRATION
    known = read_json(file) if file.exists() else {}
    arms = {}
    for name, arm in study.arms.items():
        digest = hashlib.sha256(json.dumps([arm.body, _STEPS], sort_keys=True).encode()).hexdigest()
        if known.get(name, {}).get("digest") != digest:
            say(f"{name}: measuring what a step takes")
            known[name] = {"digest": digest, "phases": _measured(arm)}
            root.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(known, indent=1))
        pace = known[name]["phases"]
        steps = _filling(arm, pace, study.seconds)
        trial = steps if study.tuning_seconds is None else _filling(arm, pace, study.tuning_seconds)
        trials = frozenset(() if study.tuning_seconds is None else study.tuning_seeds)
        arms[name] = replace(arm, steps=steps, trial_steps=trial, trial_seeds=trials)
    return replace(study, arms=arms)


def _measured(arm: Arm) -> list[dict[str, float]]:
    """CPU seconds of a `step` in each phase, and of an `update` of masks that move."""
    body: dict[str, Any] = copy.deepcopy(arm.body)
    for phase in body["phases"]:
        phase["steps"] = _STEPS
        if phase.get("algorithm", "static") != "static":
            phase["update"] = {"freq": _EVERY}
        phase.pop("update_every", None)
    quiet = {"log_every": 1, "eval_every": 0, "eval_tokens": 1024, "checkpoint_every": 0, "measure_dense": 0,
             "sample_tokens": 0}  # fmt: skip
    body["train"] = {**body.get("train", {}), **quiet}
    with TemporaryDirectory() as folder:
        config = loading.build({**body, "name": "calibration", "run_dir": f"{folder}/run"}, arm.where)
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


def _filling(arm: Arm, pace: Sequence[dict[str, float]], seconds: float) -> tuple[int, ...]:
    """Steps of each phase that take so long together, in the proportion in which they are written."""
    written = [phase.steps for phase in arm.configure({}, 0).phases]

    def scaled(by: float) -> tuple[int, ...]:
        return tuple(max(1, round(steps * by)) for steps in written)

    def taken(steps: tuple[int, ...]) -> float:
        config: ResolvedConfig = replace(arm, steps=steps, trial_seeds=frozenset()).configure({}, 0)
        return sum(
            phase.steps * each["step"] + sum(map(bool, phase.update_steps() if phase.update else ())) * each["update"]
            for phase, each in zip(config.phases, pace, strict=True)
        )

    by = seconds / sum(steps * each["step"] for steps, each in zip(written, pace, strict=True))
    for _ in range(4):
        by *= seconds / taken(scaled(by))
    if abs(taken(scaled(by)) / seconds - 1) > TOLERANCE / 3:
        raise UserError(f"{arm.where}: a step takes too long to fill {seconds:g} seconds with {len(written)} phases.")
    return scaled(by)
