"""Amounts that change over the steps of a phase, and the steps at which its masks move; as cstorch.sparse writes them.

An amount is written as a number, as a list (one value an update, over and over), or as ``{type: ..., ...}``. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vspdf.errors import UserError, check_sparsity, did_you_mean, percent_meant, require


def _power(step: int, init: float, beta: float) -> float:
    """``init * beta**step``; from where floats end on, infinite or 0, which is as far outside [0, 1]."""
    try:
        return init * beta**step
    except OverflowError:
        return math.inf if init > 0 and (beta > 0 or step % 2 == 0) else 0.0


# Parameters by type, with their defaults (... where there is none), and the value at a step. cosine's `half_period` is
# where masks move last, if it is left out.
_TYPES: dict[str, tuple[dict[str, Any], Callable[..., float]]] = {
    "constant": ({"value": ...}, lambda step, value: value),
    "linear": ({"init": ..., "slope": ...}, lambda step, init, slope: init + step * slope),
    "exp": (
        {"init": ..., "gamma": ..., "final": 1.0},
        lambda step, init, gamma, final: final - (final - init) * math.exp(min(step * gamma, 700.0)),
    ),
    "power": ({"init": ..., "beta": ...}, _power),
    "cosine": (
        {"init": ..., "half_period": None, "minimum": 0.0},
        lambda step, init, half_period, minimum: (
            (init + minimum) / 2 + (init - minimum) / 2 * math.cos(math.pi * step / half_period)
        ),
    ),
}
_CYCLING = "cycling"
_BOUNDED = ("value", "init", "final", "minimum")  # of the parameters, those that are amounts themselves
# Of a phase that says nothing about them: so many over its first three quarters, but no two closer than so many steps,
# for what grows needs time before it is judged; in short phases so few.
UPDATES, NEAREST, FEWEST = 60, 50, 6
_LATEST = 0.75


def is_course(written: Any) -> bool:
    """Whether an amount is written as something that changes."""
    return isinstance(written, list | tuple | Mapping)


def checked(key: str, written: Any, last: int | None, *, bounded: bool = True) -> float | dict[str, Any]:
    """An amount in its full form: a number, or a mapping with every parameter.

    Parameters
    ----------
    key : str
        What error messages call it.
    written : number, list or mapping
    last : int, optional
        Where a cosine ends that does not say; without it, it has to.
    bounded : bool
        Refuse values outside [0, 1] that are written, most likely percentages. cstorch takes 0 and 1 for them.

    Raises
    ------
    UserError
        For an unknown type or parameter, and for what is no number, or outside [0, 1].
    """
    if isinstance(written, list | tuple):
        written = {"type": _CYCLING, "values": list(written)}
    if not isinstance(written, Mapping):
        return _bounded(key, number(key, written))
    given = {str(name): value for name, value in written.items()}
    kind = str(given.pop("type", "")).lower()
    if kind == _CYCLING:
        values = given.get("values")
        if given.keys() != {"values"} or not isinstance(values, list | tuple) or not values:
            raise UserError(f"{key}: type: cycling takes `values`, a list of at least one number.")
        found = [number(f"{key}.values", value) for value in values]
        return {"type": kind, "values": [_bounded(f"{key}.values", value, bounded) for value in found]}
    if kind not in _TYPES:
        known = (*_TYPES, _CYCLING)
        raise UserError(f"{key}: expected a number, a list, or a type of {', '.join(known)}, not '{kind}'."
                        f"{did_you_mean(kind, known)}")  # fmt: skip
    parameters = _TYPES[kind][0]
    for name in given:
        require(name in parameters, f"{key}: type: {kind} has no '{name}'.{did_you_mean(name, parameters)}")
    full: dict[str, Any] = {"type": kind}
    for name, default in parameters.items():
        value = given.get(name, last if default is None else default)
        require(value not in (..., None), f"{key}: type: {kind} needs '{name}'.")
        value = number(f"{key}.{name}", value)
        full[name] = _bounded(f"{key}.{name}", value, bounded and name in _BOUNDED)
    require(full.get("half_period", 1) > 0, f"{key}.half_period must be above 0, not {full.get('half_period')}.")
    return full


def _bounded(key: str, value: float, bounded: bool = True) -> float:
    """The value, or UserError where it is to lie in [0, 1] and does not."""
    if bounded:
        check_sparsity(key, value, all_masked=True)
    return value


def number(key: str, value: Any) -> float:
    """A finite number, or UserError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{key} must be a number, not {value!r}.{percent_meant(str(value))}")
    return float(value)


def amount(course: float | Mapping[str, Any], step: int, update: int) -> float:
    """Its value at a step of the phase, `update` being how many updates came before; never outside [0, 1]."""
    if not isinstance(course, Mapping):
        return min(max(course, 0.0), 1.0)
    if course["type"] == _CYCLING:
        value = course["values"][update % len(course["values"])]
    else:
        value = _TYPES[course["type"]][1](step, **{name: v for name, v in course.items() if name != "type"})
    return min(max(value, 0.0), 1.0)


# -- when masks move ---------------------------------------------------------------------------------------------------


def updates(key: str, written: Mapping[str, Any] | None, steps: int, *, within: bool = True) -> dict[str, Any]:
    """The steps at which masks move, in full form: ``{freq, start, stop}``, `stop` left out, or ``{steps}``.

    Parameters
    ----------
    key : str
        What error messages call it.
    written : mapping, optional
        Default: some sixty updates over the first three quarters of the phase, what grows later having no time left.
    steps : int
        Of the phase.
    within : bool
        Refuse what begins, or lists a step, after the end of the phase: most likely steps of the whole run. cstorch,
        which knows no phases, leaves masks dense then.

    Raises
    ------
    UserError
        For an unknown key and for steps outside the phase.
    """
    if written is None:
        stop = max(1, int(_LATEST * steps))
        return {"freq": max(-(-stop // UPDATES), min(NEAREST, -(-stop // FEWEST))), "start": 0, "stop": stop}
    if not isinstance(written, Mapping) or not (
        {"freq", "start", "stop"} >= written.keys() or written.keys() == {"steps"}
    ):
        raise UserError(f"{key} must be {{freq, start, stop}} or {{steps: [...]}}, not {written!r}.")
    if "steps" in written:
        listed = written["steps"]
        whole = isinstance(listed, list | tuple) and bool(listed) and all(type(step) is int for step in listed)
        require(whole and min(listed) >= 0, f"{key}.steps must be a list of steps of the phase, not {listed!r}.")
        _check_within(f"{key}.steps: {max(listed)}", max(listed), steps, within)
        return {"steps": sorted(set(listed))}
    given = {name: value for name, value in written.items() if value is not None}
    freq, start, stop = given.get("freq", 1), given.get("start", 0), given.get("stop", steps)
    for name, value, least in (("freq", freq, 1), ("start", start, 0), ("stop", stop, 1)):
        require(
            type(value) is int and value >= least,
            f"{key}.{name} must be a whole number of at least {least}, not {value!r}.",
        )
    _check_within(f"{key}.start = {start}", start, steps, within)
    stop = stop if "stop" in given else max(stop, start + 1)
    require(start < stop, f"{key}: start = {start} must come before stop = {stop}.")
    return {"freq": freq, "start": start, "stop": stop}


def _check_within(what: str, step: int, steps: int, within: bool) -> None:
    require(
        step < steps or not within,
        f"{what} lies after the phase, of {steps} steps: they count from the phase's beginning, 0 its first.",
    )


def update_steps(update: Mapping[str, Any], steps: int) -> Sequence[int]:
    """The steps of a phase of `steps` steps at which masks move, 0 being its first."""
    if "steps" in update:
        return [step for step in update["steps"] if step < steps]
    return range(update["start"], min(update["stop"], steps), update["freq"])


def last_of(update: Mapping[str, Any], steps: int) -> int:
    """The last step of a phase at which masks move: where a sparsity's cosine ends that does not say."""
    moves = update_steps(update, steps)
    return max(1, moves[-1]) if moves else steps


def end_of(update: Mapping[str, Any], steps: int) -> int:
    """The step of a phase by which masks have moved for the last time: where a drop fraction's cosine ends."""
    return min(update["stop"], steps) if "stop" in update else last_of(update, steps)
