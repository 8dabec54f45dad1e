"""Figures in words, for people: counts, sizes, durations."""

from __future__ import annotations

from typing import Any

# -- words ------------------------------------------------------------------------------------------------------------


def scale(value: float, unit: str) -> tuple[float, str]:
    """Divisor and unit that suit a value: seconds, FLOPs or a count."""
    if unit == "s":
        return (3600.0, "h") if value >= 7200 else (60.0, "min") if value >= 120 else (1.0, "s")
    divisor, prefix = scaled(value)
    if unit == "FLOP":
        return divisor, f"{prefix}FLOP"
    divisor = min(divisor, 1e9)
    return divisor, {1e9: "billions", 1e6: "millions", 1e3: "thousands", 1.0: "count"}[divisor]


def si(flops: float) -> str:
    """FLOPs in words."""
    divisor, prefix = scaled(flops)
    return f"{flops / divisor:.3g} {prefix}FLOP"


def scaled(value: float) -> tuple[float, str]:
    """Divisor and SI prefix that bring a value to 1 to 999."""
    for divisor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= divisor:
            return divisor, prefix
    return 1.0, ""


def _plain(value: float) -> str:
    return f"{value:.6g}"


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:g}"


def _bytes(number: float) -> str:
    return f"{number / 1e9:,.4g} GB" if number >= 1e9 else f"{number / 1e6:,.4g} MB"


def _duration(seconds: float) -> str:
    for unit, size in (("years", 365.25 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds:.3g} s"


def number(value: float | None, form: str = ".4f") -> str:
    """A figure in words; a dash where it is not known."""
    return "–" if value is None else f"{value:{form}}"


def between(body: dict[str, Any], form: str = ".4f") -> str:
    """The interval of a mean in words."""
    return "–" if body["low"] is None else f"{body['low']:{form}} to {body['high']:{form}}"
