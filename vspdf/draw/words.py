"""Figures in words, for people: counts, sizes, durations, and what is not known."""

from __future__ import annotations

from typing import Any

_TIMES = ((365.25 * 86400, "years"), (86400.0, "days"), (3600.0, "h"), (60.0, "min"))
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_COUNTS = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


# -- units that suit a value ------------------------------------------------------------------------------------------


def scaled(value: float) -> tuple[float, str]:
    """Divisor and SI prefix that bring a value to 1 to 999."""
    return next(((divisor, prefix) for divisor, prefix in _PREFIXES if abs(value) >= divisor), (1.0, ""))


def scale(value: float, unit: str) -> tuple[float, str]:
    """Divisor and name of the unit that suits an axis up to a value, in seconds ("s"), "FLOP" or a count of anything.

    >>> scale(5400.0, "s"), scale(3e12, "FLOP"), scale(2e6, "tokens")
    ((3600.0, 'h'), (1000000000000.0, 'TFLOP'), (1000000.0, 'millions'))
    """
    if unit == "s":
        return next(((size, name) for size, name in _TIMES if value >= 1.5 * size), (1.0, "s"))
    if unit == "FLOP":
        divisor, prefix = scaled(value)
        return divisor, f"{prefix}FLOP"
    return next(((divisor, name) for divisor, name in _COUNTS if value >= divisor), (1.0, "count"))


# -- figures ----------------------------------------------------------------------------------------------------------


def from_to(first: float, last: float) -> str:
    """A figure that goes from one value to another, or stays."""
    return " to ".join(dict.fromkeys((f"{first:.4g}", f"{last:.4g}")))


def count(value: float) -> str:
    """A count in four digits: 12.88M parameters, 2.5B tokens."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{_digits(value / size, 4)}{unit}"
    return f"{value:g}"


def cycles(value: float) -> str:
    """Cycles of a machine in three digits: 1.25M."""
    divisor, prefix = scaled(value)
    return f"{_digits(value / divisor)}{prefix}" if prefix else f"{value:g}"


def flops(value: float) -> str:
    """FLOPs in three digits: 1.25 TFLOP."""
    divisor, prefix = scaled(value)
    return f"{_digits(value / divisor)} {prefix}FLOP"


def size(value: float) -> str:
    """Bytes in four digits: 1.25 GB, 250 MB."""
    return f"{_digits(value / 1e9, 4)} GB" if value >= 1e9 else f"{_digits(value / 1e6, 4)} MB"


def amount(value: float) -> str:
    """A whole number with all its digits, another with four or so: 1,234,567, 1,234.5, 0.1235."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def plain(value: float) -> str:
    """A figure on an axis: as short as it can be."""
    return f"{value:.6g}"


def power(exponent: float) -> str:
    """A power of ten, for axes in logarithms; nothing between whole ones."""
    return "10" + str(int(exponent)).translate(_SUPERSCRIPTS) if exponent % 1 == 0 else ""


def number(value: float | None, form: str = ".4f") -> str:
    """A figure in a format; a dash where it is not known."""
    return "–" if value is None else f"{value:{form}}"


def between(body: dict[str, Any], form: str = ".4f") -> str:
    """The interval of a mean, `low` to `high`; a dash where there is none."""
    return "–" if body["low"] is None else f"{body['low']:{form}} to {body['high']:{form}}"


ABOVE_IDEAL = (
    "* Above the ideal, which counts FLOPs alone: weights that are not there need no loading and no update either, or "
    "other programs disturbed the dense steps."
)


def speedup(times: float, ideal: float) -> str:
    """How many times faster something was, with a mark where that is more than its FLOPs allow (`ABOVE_IDEAL`)."""
    return f"{times:.2f}x{'*' if times > ideal else ''}"


def listed(value: Any) -> str:
    """A value, or the values of a list with commas between."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _digits(value: float, digits: int = 3) -> str:
    """At least so many digits, never an exponent for a large value: 999.7 is 1000 in three."""
    return f"{value:.{digits}g}" if value < 10**digits - 0.5 else f"{value:,.0f}"


# -- time -------------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """A stretch of time in the unit that suits it: 2.5 h, 3 min, 0.12 s."""
    divisor, unit = scale(seconds, "s")
    return f"{_digits(seconds / divisor)} {unit}"


def clock(seconds: float) -> str:
    """A stretch of time as a clock shows it: 3:04, 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def eta(seconds: float | None) -> str:
    """When something will be done, as lines of progress end."""
    return f"ETA {'not known yet' if seconds is None else clock(seconds)}"
