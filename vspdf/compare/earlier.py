"""Results whose runs are gone, as on another machine: a study adds seeds to them.

What they chose for an arm stands, and so do its steps: losses hang on those, not on the machine. Nothing is tried or
measured anew, a seed that they hold is not run again, and those that are added count as losses, not as times.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vspdf.compare.definition import Arm, Study
from vspdf.data.text import Dataset
from vspdf.errors import UserError
from vspdf.files import read_json, write_whole
from vspdf.runs import forms

FILE = "earlier.json"  # in the study's folder, so that the same command goes on without them


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


_NUMBER = _is(int, float)
_POINT: forms.Form = {
    "step": _is(int), "tokens": _NUMBER, "val_loss": _NUMBER, "seconds": _NUMBER,
    "cpu_seconds": _is(int, float, type(None)), "flops": {"executed": _NUMBER},
}  # fmt: skip
_RUN: forms.Form = {
    "seed": _is(int), "order": _is(str), "tokens": _is(int), "parameters": _is(int), "seconds": _NUMBER,
    "cpu_seconds": _is(int, float, type(None)), "test_loss": _is(float, type(None)), "flops": _is(dict),
    "load_average": _is(int, float, type(None)), "curve": [_POINT], "added?": {"hardware": _is(dict, type(None))},
}  # fmt: skip
_FORM: forms.Form = {
    "study": _is(str), "corpus": _is(dict), "hardware": _is(dict), "versions": _is(dict),
    "tuning_seeds": lambda value: isinstance(value, list) and all(type(seed) is int for seed in value),
    "arms": [{
        "name": _is(str), "digest?": _is(str), "tuned": _is(dict, type(None)), "phases": [{"steps": _is(int)}],
        "trials": [{"values": _is(dict), "val_loss": _is(list)}], "runs": [_RUN],
    }],
}  # fmt: skip


def take(study: Study, root: Path, source: Path | None, say: Callable[[str], None]) -> Study:
    """The study with what `source`, a `results.json`, holds of its arms, or what an earlier call left in `root`.

    Raises
    ------
    UserError
        If they are not results of this study, or `root` adds to others.
    """
    kept = root / FILE
    if source is None and not kept.exists():
        return study
    file = source or kept
    body = read_json(file)
    if why := forms.wrong(body, _FORM):
        raise UserError(f"{file} cannot be read as results of a study: {why}.")
    if study.tasks:
        raise UserError(f"{file}: seeds cannot be added to a study with 'tasks': fine-tuning begins with runs.")
    if body["study"] != study.name:
        raise UserError(f"{file} holds results of '{body['study']}', expected those of '{study.name}'.")
    held = {arm["name"]: arm for arm in body["arms"]}
    if held.keys() != study.arms.keys():
        raise UserError(f"{file} has the arms {', '.join(held)}; expected {', '.join(study.arms)}.")
    arms = {name: _with(arm, study, held[name], body, file) for name, arm in study.arms.items()}
    for name, arm in arms.items():
        tried = [trial["values"] for trial in held[name]["trials"]]
        for key, values in arm.tune.items():
            if new := [str(value) for value in values if not any(one.get(key) == value for one in tried)]:
                say(f"{name}: {key} = {', '.join(new)} was not tried in {file}, and is not now")
    if unsure := [name for name, arm in held.items() if "digest" not in arm]:
        say(f"{file} does not say how {', '.join(unsure)} were configured: taken to be as in {study.path}")
    if source is not None and kept.exists() and read_json(kept) != body:
        raise UserError(f"'{root}' adds to other results than {file}: give the study another folder.")
    return replace(study, arms=arms, tuning_seeds=_tuned_on(study, body, file))


def _tuned_on(study: Study, body: dict[str, Any], file: Path) -> tuple[int, ...]:
    """The seeds that results were tuned on: one of them that is added is reported as such.

    Raises
    ------
    UserError
        If the study says others, or is to report one whose trials were shorter than its runs.
    """
    seeds = tuple(body["tuning_seeds"])
    if not any(arm.tune for arm in study.arms.values()):
        return seeds
    if study.tuning_given and {*seeds} != {*study.tuning_seeds}:
        raise UserError(f"{file} was tuned on seeds {list(seeds)}; expected tuning_seeds {list(study.tuning_seeds)}.")
    if study.tuning_seconds is not None and (both := sorted({*seeds} & {*study.seeds})):
        why = "'tuning_seconds' goes with tuning_seeds apart from seeds"
        raise UserError(f"{file} was tuned on seed {both[0]}: {why}.")
    return seeds


def keep(root: Path, source: Path | None) -> None:
    """Has the folder of a study remember what it adds to."""
    if source is not None:
        write_whole(root / FILE, json.dumps(read_json(source), indent=1) + "\n")


def _with(arm: Arm, study: Study, held: dict[str, Any], body: dict[str, Any], file: Path) -> Arm:
    """The arm with what results hold of it, `held`, its steps set to theirs.

    Raises
    ------
    UserError
        If it is not the arm that they are of.
    """

    def differs(what: str) -> UserError:
        return UserError(f"{file}, arm '{arm.name}': {what}, so they are results of another study.")

    if held["tuned"] is None:
        raise UserError(f"{file}, arm '{arm.name}': its values were not chosen yet: tuning must be complete.")
    if held["tuned"].keys() != arm.tune.keys():
        chosen, wanted = (", ".join(some) or "nothing" for some in (held["tuned"], arm.tune))
        raise differs(f"it chose {chosen}, the study tunes {wanted}")
    if held.get("digest", arm.digest) != arm.digest:
        raise differs("it was configured otherwise than the study is now")
    if study.seconds is not None:
        arm = replace(arm, steps=tuple(phase["steps"] for phase in held["phases"]))
    if len(held["phases"]) != len(arm.body["phases"]):
        raise differs(f"it has {len(held['phases'])} phases of {len(arm.body['phases'])}")
    config = arm.configure(held["tuned"], study.seeds[0])
    for i, (phase, was) in enumerate(zip(config.phases, held["phases"], strict=True)):
        for key in ("name", "sparsity", "steps", "tokens"):
            if was.get(key) != getattr(phase, key):
                raise differs(f"its phase {i} has {key} = {was.get(key)} of {getattr(phase, key)}")
    for run in held["runs"]:
        if "diverged" not in run and run["tokens"] != sum(phase.tokens for phase in config.phases):
            raise differs(f"seed {run['seed']} read {run['tokens']:,} tokens")
    here = {key: body[key] for key in ("hardware", "versions")}
    runs = [run | {"machine": run.get("added", here), "corpus": body["corpus"]} for run in held["runs"]]
    return replace(arm, earlier=held | {"runs": runs})


def check_text(arm: Arm, data: Dataset) -> None:
    """The text that seeds are added on must be that of the arm's earlier runs.

    Raises
    ------
    UserError
        If `data` are of another corpus, tokenizer or split.
    """
    for run in arm.held.values():
        for key, was in run["corpus"].items():
            if (now := data.manifest.get(key)) != was:
                raise UserError(
                    f"{arm.where}: earlier runs had {key} = {was}, expected the same text; here it is {now}."
                )
