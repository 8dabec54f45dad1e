"""What a line of metrics and a summary hold, so that a broken file is named instead of met somewhere later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300  # no NaN, no inf


def _count(value: Any) -> bool:
    return _number(value) and isinstance(value, int) and value >= 0


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _number_or_none(value: Any) -> bool:
    return value is None or _number(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _fractions(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


Form = Mapping[str, "Callable[[Any], bool] | Form"]  # by key; one that ends in "?" may be missing

_FLOPS: Form = dict.fromkeys(("dense", "useful", "executed"), _number)
LINE: Form = {
    "step": _count, "phase": _text, "sparsity": _number, "tokens": _count, "loss": _number, "flops": _FLOPS,
    "training_seconds": _number, "step_seconds": _number, "lr?": _number, "grad_norm?": _number, "seconds?": _number,
    "tokens_per_second?": _number, "val_loss?": _number, "val_bits_per_byte?": _number,
    "training_cpu_seconds?": _number_or_none,
}  # fmt: skip
# Of a summary: what the machine models need, and what a report needs beside it.
PHASE: Form = {
    "name": _text, "sparsity": lambda value: _number(value) and 0 <= value < 1, "steps": _positive, "tokens": _count,
    "flops": dict.fromkeys(_FLOPS, _positive), "speedup?": dict.fromkeys(("median", "low", "high"), _positive),
    "dense_step_seconds_median?": _number, "paired_step_seconds_median?": _number,
}  # fmt: skip
WHOLE_PHASE: Form = {
    **PHASE, "seconds": _number, "step_seconds_median": _number, "loss": _number_or_none, "val_loss": _number_or_none,
    "val_bits_per_byte": _number_or_none, "time_fractions": _fractions,
}  # fmt: skip


def wrong(body: Any, form: Form) -> str | None:
    """What is wrong with a body, in words; None where it has the form."""
    if not isinstance(body, dict):
        return "it is no JSON object"
    for key, inner in form.items():
        name = key.removesuffix("?")
        if name not in body:
            if name == key:
                return f"it has no '{name}'"
        elif isinstance(inner, Mapping):
            if why := wrong(body[name], inner):
                return f"in '{name}', {why}"
        elif not inner(body[name]):
            return f"its '{name}' is {str(body[name])[:40]!r}"
    return None
