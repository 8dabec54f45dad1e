"""Learning rates of the Cerebras stack's configurations: stretches one after the other, as a phase of ours has them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

from vspdf.errors import UserError
from vspdf.interop.architectures import whole_number
from vspdf.interop.cerebras_keys import mapping, name_unknown

_LARGEST_RATE = 1e6
_STEPS = ("total_iters", "steps", "decay_steps")
_START = ("initial_learning_rate", "learning_rate", "val")
# Keys of each scheduler that are read or change nothing.
_KNOWN = {
    kind: ("scheduler", "main_scheduler", "param_group_tags", *_START, *_STEPS, *more)
    for kind, more in {"linear": ("end_learning_rate",), "cosine": ("end_learning_rate",), "constant": ()}.items()
}
_ROW = ("schedulers", "milestones", "param_group_tags")


class Stretch(NamedTuple):
    """One scheduler: `linear`, `cosine` or `constant`, from one rate to another in so many steps (None: to the end)."""

    kind: str
    start: float
    end: float
    steps: int | None


def current(schedulers: Any, rate: Any, where: str) -> list[Stretch]:
    """Of the current form: ``trainer.init.schedulers``, and the optimizer's own rate where there are none.

    Raises
    ------
    UserError
        Naming what a phase cannot do.
    """
    listed = schedulers or []
    listed = listed if isinstance(listed, list) else [listed]
    if len(listed) > 1:
        raise UserError(
            f"{where}: trainer.init.schedulers holds {len(listed)}, which run side by side there; expected one: "
            "SequentialLR has several in a row."
        )
    return [one for entry in listed for one in _named(entry, where)] or [_constant(rate, where)]


def older(rate: Any, where: str) -> list[Stretch]:
    """Of the older form: ``optimizer.learning_rate``, a number, a scheduler or a list of them.

    Raises
    ------
    UserError
        Naming what a phase cannot do.
    """
    listed = rate if isinstance(rate, list) else [rate]
    return [_stretch(one, where) if isinstance(one, dict) else _constant(one, where) for one in listed]


def _named(entry: Any, where: str) -> list[Stretch]:
    """``{LinearLR: {...}}``, or a SequentialLR as its parts."""
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UserError(f"{where}: a learning rate's scheduler must be one name with its settings, not {entry!r}.")
    ((name, settings),) = entry.items()
    settings = mapping(settings, str(name), where)
    if str(name).lower() != "sequentiallr":
        return [_stretch({"scheduler": str(name), **settings}, where)]
    listed = settings.get("schedulers")
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{where}: SequentialLR.schedulers must be a list of schedulers, not {listed!r}.")
    _check_tags(settings, where)
    name_unknown("SequentialLR", settings, _ROW, where)
    parts = [_named(part, where) for part in listed]
    if (milestones := settings.get("milestones")) is not None:
        ends = list(accumulate(sum(one.steps or 0 for one in part) for part in parts[:-1]))
        if milestones != ends:
            raise UserError(
                f"{where}: SequentialLR.milestones = {milestones!r} is not offered; expected {ends}, where the "
                "total_iters of the parts before end."
            )
    return [one for part in parts for one in part]


def _constant(rate: Any, where: str) -> Stretch:
    return _stretch({"scheduler": "Constant", "learning_rate": rate}, where)


def _check_tags(rate: Mapping[str, Any], where: str) -> None:
    if rate.get("param_group_tags") is not None:
        raise UserError(f"{where}: param_group_tags = {rate['param_group_tags']!r} is not offered; one rate for all.")


def _stretch(rate: Mapping[str, Any], where: str) -> Stretch:
    name = str(rate.get("scheduler", ""))
    kind = name.lower().removesuffix("lr").removesuffix("decay")
    if kind not in _KNOWN:
        raise UserError(
            f"{where}: the learning rate's scheduler '{name}' is not offered; expected Linear, CosineDecay or Constant."
        )
    together = rate.get("main_scheduler")
    if together is not None and str(together).lower().removesuffix("lr") != "sequential":
        raise UserError(f"{where}: main_scheduler = {together!r} is not offered; schedulers come one after the other.")
    _check_tags(rate, where)
    unset = {key: value for key, value in rate.items() if key != "disable_lr_steps_reset" or value}
    name_unknown(name, unset, _KNOWN[kind], where)
    start: Any = next((rate[key] for key in _START if key in rate), None)
    end = rate.get("end_learning_rate", start) if kind != "constant" else start
    for value in (start, end):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < _LARGEST_RATE:
            raise UserError(f"{where}: a learning rate must be a number of at least 0, not {value!r}.")
    steps = next((rate[key] for key in _STEPS if rate.get(key) is not None), None)
    if steps is not None:
        whole_number(steps, "total_iters of the learning rate", where)
    return Stretch(kind, float(start), float(end), steps)


def phase_rates(stretches: list[Stretch], steps: int, where: str) -> dict[str, Any]:
    """Warm-up and decay of a phase of so many steps.

    Raises
    ------
    UserError
        If the rate does more than rise from 0 and fall, or is of another length than the phase.
    """
    stretches, warmup = list(stretches), 0
    if len(stretches) > 1 and stretches[0].kind == "linear" and stretches[0].start == 0:
        warmup = whole_number(stretches[0].steps, "total_iters of the warm-up", where)
        peak = stretches.pop(0).end
    else:
        peak = stretches[0].start
    if len(stretches) == 2 and stretches[1].kind == "constant" and warmup + (stretches[0].steps or 0) >= steps - 1:
        stretches.pop()  # begins when the run has ended
    if len(stretches) != 1 or stretches[0].start != peak:
        raise UserError(f"{where}: the learning rate must warm up from 0 and then fall once, or stay.")
    last = stretches[0]
    if last.kind != "constant" and last.steps is not None and abs(warmup + last.steps - steps) > 1:
        raise UserError(
            f"{where}: the learning rate's schedule covers {warmup + last.steps:,} steps, the run has {steps:,}."
        )
    return {"lr": peak, "lr_end": last.end, "decay": last.kind, "warmup_steps": warmup}
