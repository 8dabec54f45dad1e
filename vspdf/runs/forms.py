"""What a line of metrics and a summary hold, so that a broken file is named instead of met somewhere later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _number(value: Any) -> bool:
    """Nothing that overflows where it is squared or divided by; no NaN either."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e100 < value < 1e100


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _steps(value: Any) -> bool:
    return _count(value) and value > 0


def _positive(value: Any) -> bool:
    return _number(value) and value > 1e-100


def _fraction(value: Any) -> bool:
    return _number(value) and 0 <= value < 1


def _number_or_none(value: Any) -> bool:
    return value is None or _number(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


# By key; one that ends in "?" may be missing. In brackets: a list of such.
Form = Mapping[str, "Callable[[Any], bool] | Form | list[Form]"]

_FLOPS: Form = dict.fromkeys(("dense", "useful", "executed"), _positive)
_SPEEDUP: Form = dict.fromkeys(("median", "low", "high"), _positive)
LINE: Form = {
    "step": _count, "phase": _text, "sparsity": _number, "tokens": _count, "loss": _number, "flops": _FLOPS,
    "training_seconds": _number, "step_seconds": _number, "lr?": _number, "grad_norm?": _number, "seconds?": _number,
    "tokens_per_second?": _number, "val_loss?": _number, "val_bits_per_byte?": _number,
    "training_cpu_seconds?": _number_or_none, "communication_seconds?": _number, "communication_bytes?": _number,
    **dict.fromkeys(("coverage?", "mask_overlap?", "survival?"), _number), "mask_updates?": _count,
}  # fmt: skip
# Of a summary: what the machine models need, and what a report needs beside it.
PHASE: Form = {
    "name": _text, "sparsity": _fraction, "steps": _steps, "tokens": _count,
    "stages?": [{"start": _count, "steps": _steps, "sparsity": _fraction}],
    "flops": _FLOPS, "speedup?": _SPEEDUP,
    "dense_step_seconds_median?": _number, "paired_step_seconds_median?": _number,
}  # fmt: skip
WHOLE_PHASE: Form = {
    **PHASE, "seconds": _number, "step_seconds_median": _number, "loss": _number_or_none, "val_loss": _number_or_none,
    "val_bits_per_byte": _number_or_none, "time_fractions": _numbers,
}  # fmt: skip
_ON_WAFER: Form = {
    "phase": _text, "sparsity": _fraction, "cpu": lambda value: value is None or not wrong(value, _SPEEDUP),
    "ideal": _number, "cs2": dict.fromkeys(("low", "central", "high"), _positive), "bound_by": _text, "central": _text,
    "machine": _text, "mask": _text,
}  # fmt: skip
SUMMARY: Form = {
    "phases": [PHASE], "comparison?": [_ON_WAFER], "samples?": [{"step": _count, "phase": _text, "text": _text}],
    "flops_saved_fraction_by_convention?": _numbers, "hardware?": _mapping, "versions?": _mapping,
    "tokens?": _count, "seconds?": _number, "cpu_seconds?": _number_or_none,
}  # fmt: skip
MANIFEST: Form = {
    "corpus": {"name": _text, "sha256": _text, "documents": _count, "bytes": _count},
    "tokenizer": {"name": _text, "vocab_size": _count}, "order": _text,
}  # fmt: skip
_LOSSES: Form = dict.fromkeys(
    (f"{part}_{figure}?" for part in ("val", "test") for figure in ("loss", "bits_per_byte")), _number
)
_BLEU: Form = dict.fromkeys(("bleu", "brevity_penalty", "hypothesis_length", "reference_length"), _number)
EVALUATION: Form = {
    **_LOSSES, "diverged?": _text, "load_average?": _number, "bleu?": _BLEU, "bleu_of_contexts?": _number
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
        elif why := _wrong_value(name, body[name], inner):
            return why
    return None


def _wrong_value(name: str, value: Any, inner: Callable[[Any], bool] | Form | list[Form]) -> str | None:
    if isinstance(inner, list):
        if not isinstance(value, list):
            return f"its '{name}' are no list"
        if not value and inner[0] is PHASE:
            return f"its '{name}' are none"
        return next((f"in '{name}', {why}" for why in (wrong(item, inner[0]) for item in value) if why), None)
    if isinstance(inner, Mapping):
        why = wrong(value, inner)
        return f"in '{name}', {why}" if why else None
    return None if inner(value) else f"its '{name}' is {str(value)[:40]!r}"


def wrong_line(line: Any, form: Form, before: Mapping[str, Any] | None) -> str | None:
    """As `wrong`, of a line of metrics that comes after another: what was spent until then only grows."""
    if why := wrong(line, form):
        return why
    if form is LINE and "val_loss" in line and "val_bits_per_byte" not in line:
        return "it has no 'val_bits_per_byte'"
    if before is None:
        return None
    if line["step"] <= before["step"]:
        return f"step {line['step']} after step {before['step']}"
    if form is not LINE:
        return None
    amounts = {key: (before[key], line[key]) for key in ("tokens", "training_seconds")}
    amounts |= {f"{key} FLOPs": (before["flops"][key], line["flops"][key]) for key in _FLOPS}
    return next((f"{b:g} {key} after {a:g}" for key, (a, b) in amounts.items() if b < a), None)
