"""Errors that users can mend: one line that says what was wrong and what was expected."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral
from pathlib import Path

_LISTED = 60  # known words that a line names at most: all settings of a file, not all tasks of a harness


class UserError(ValueError):
    """Bad input. The command line prints the message alone and exits with status 2."""

    told = False  # of several processes that end alike, another one says it


class Diverged(UserError):
    """A loss or gradient that is not finite: training cannot go on from here."""


class RankLost(UserError):
    """Of several processes that train together, one is gone or silent."""


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says what is missing and how to get it."""


class Interrupted(Exception):
    """The user stopped a run; it can be resumed."""

    told = False  # as of a `UserError`


def first_line(error: Exception) -> str:
    """What another library's error says, cut to a line; its kind, where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The tail of an error message: `` Did you mean 'n_layer'?``, or the known words where none is near."""
    known = list(known)
    near = get_close_matches(str(word), known, n=1, cutoff=0.55)
    if near:
        return f" Did you mean '{near[0]}'?"
    more = f" and {len(known) - _LISTED:,} more" if len(known) > _LISTED else ""
    return f" Known: {', '.join(known[:_LISTED])}{more}." if known else ""


def near_path(path: Path, keywords: Iterable[str] = ()) -> str:
    """The tail of an error message on a missing file: `` Did you mean 'data/text.txt'?``, or "" where none is near."""
    missing = path
    while missing.parent != missing and not missing.parent.exists():
        missing = missing.parent
    beside = sorted(entry.name for entry in missing.parent.iterdir()) if missing.parent.is_dir() else []
    if words := get_close_matches(str(path), keywords, n=1):
        return f" Did you mean '{words[0]}'?"
    for near in get_close_matches(missing.name, beside, n=5):  # a common ending alone makes no two names alike
        if get_close_matches(missing.stem, [Path(near).stem]):
            return f" Did you mean '{missing.with_name(near) / path.relative_to(missing)}'?"
    return ""


def in_one_line(error: BaseException, most: int = 160) -> str:
    """What an error of other people's code says, in at most so many characters; its type where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def check_sparsity(key: str, value: float, *, all_masked: bool = False) -> None:
    """Refuses what is no sparsity, a number in [0, 1), or 1 too; of a percentage the message says what was meant."""
    end = "]" if all_masked else ")"
    if isinstance(value, str | bool) or not hasattr(value, "__float__"):
        meant = percent_meant(value) if isinstance(value, str) else ""
        raise UserError(f"{key} must be a number in [0, 1{end}, not {value!r}.{meant}")
    meant = f" Did you mean {value / 100:g}?" if 2 <= value < 100 else ""
    require(0 <= value < 1 or (all_masked and value == 1), f"{key} must lie in [0, 1{end}, not {value}.{meant}")


def percent_meant(text: str) -> str:
    """The tail of an error message on a text that is no number: `` Did you mean 0.9?`` for ``90%``, else ""."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*%\s*", text)
    return f" Did you mean {float(found[1]) / 100:g}?" if found else ""


def require(ok: bool, message: str) -> None:
    """Raises `UserError` with a message where a condition does not hold."""
    if not ok:
        raise UserError(message)


def check_whole(key: str, value: object, least: int = 1) -> None:
    """Refuses what is no whole number, or less than `least`."""
    good = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
    require(good, f"{key} must be a whole number of at least {least}, not {value!r}.")


def one_of(key: str, value: str, known: Iterable[str]) -> None:
    """Refuses a value that is not among those known; the message names the nearest."""
    known = list(known)
    require(value in known, f"{key} = '{value}' is not known.{did_you_mean(value, known)}")


def check_device(key: str, name: str) -> None:
    """Refuses a device whose name is not known; whether it is here is not asked."""
    known = bool(re.fullmatch(r"cpu|cuda(:\d+)?", name))
    require(known, f"{key} = '{name}' is not known.{did_you_mean(name, ('cpu', 'cuda', 'cuda:1'))}")
