"""Two results of one benchmark: what became faster or slower, beyond what two runs of one build differ by."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from vspdf.errors import UserError
from vspdf.files import read_json

# By how much medians of one build differ between processes on a quiet machine, beyond their intervals: where memory
# lies, and what the clock was.
BETWEEN = 0.08
_OF = ("tokens", "in_features", "out_features", "sparsity", "mask", "threads", "dtype", "product", "candidate",
       "attention", "compiled")  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """An earlier result, as ``--json`` printed it.

    Raises
    ------
    UserError
        If the file holds none.
    """
    body = read_json(path)
    rows, about = body.get("rows"), (body.get("hardware"), body.get("model") or {})
    if not (isinstance(rows, list) and all(map(_is_row, rows)) and all(isinstance(part, dict) for part in about)):
        raise UserError(f"'{path}' holds no result to compare with: expected what vspdf bench ... --json printed.")
    return body


def _is_row(row: Any) -> bool:
    """Whether it has the ratios that are compared: numbers, or null where a result was wrong."""
    if not isinstance(row, dict):
        return False
    ratios = [row.get(key, "") for key in ("ratio_to_dense", "ratio_low", "ratio_high")]
    return ratios == [None] * 3 or all(isinstance(ratio, int | float) for ratio in ratios)


def check_alike(old: dict[str, Any], cpu: str, model: dict[str, Any] | None) -> None:
    """Refuses an earlier result of another machine, or of steps of another model.

    Raises
    ------
    UserError
        Naming what differs.
    """
    if (a := old["hardware"].get("cpu")) != cpu:
        raise UserError(f"the earlier result is of another machine ({a}), this one is {cpu}: ratios differ by machine.")
    _check_models(old.get("model"), model)


def compare(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What changed, row by row, in ratios to dense of the same run: those of another machine say nothing.

    Returns
    -------
    dict
        ``faster`` and ``slower``, each a list of the row's own keys with ``change`` (new over old), ``old`` and ``new``
        ratio, the largest change first; ``wrong``, rows with a ratio before whose results are wrong now, with ``old``,
        and ``right``, the reverse, with ``new``; how many rows are the ``same``, ``unclear`` (an interval wider than
        noise), or in one result only (``unmatched``); ``verdict`` in words.

    Raises
    ------
    UserError
        If no row is in both, or the processors or the models differ.
    """
    check_alike(old, new["hardware"]["cpu"], new.get("model"))
    before, after = ({_of(row): row for row in result["rows"]} for result in (old, new))
    found: dict[str, Any] = {"faster": [], "slower": [], "wrong": [], "right": [], "same": 0, "unclear": 0}
    for key in filter(before.__contains__, after):
        if kind := _kind(was := before[key], row := after[key]):
            if isinstance(found[kind], list):
                found[kind].append(_change(row, was))
            else:
                found[kind] += 1
    if not any(found.values()):
        raise UserError("no row of the earlier result is in this one: time the same shapes, sparsities and threads.")
    for kind in ("faster", "slower"):
        found[kind].sort(key=lambda row: -abs(math.log(row["change"])))
    found["unmatched"] = len(before.keys() ^ after.keys())
    found["verdict"] = _verdict(found)
    return found


def _check_models(old: dict[str, Any] | None, new: dict[str, Any] | None) -> None:
    """Refuses results of steps of two models: their rows say nothing of size or batch."""
    old, new = old or {}, json.loads(json.dumps(new or {}))
    if differ := [f"{key} {old[key]}, now {new[key]}" for key in new if key in old and old[key] != new[key]]:
        raise UserError(f"the earlier result is of another model ({'; '.join(differ)}): time the same model and batch.")


def _kind(was: dict[str, Any], row: dict[str, Any]) -> str:
    """Where a row of both results is counted; "" for the base itself, and for what was wrong and still is."""
    ratios = was["ratio_to_dense"], row["ratio_to_dense"]
    if None in ratios:
        return "" if ratios == (None, None) else "right" if ratios[0] is None else "wrong"
    if row["ratio_low"] == row["ratio_high"] == 1:
        return ""
    if row.get("noisy") or was.get("noisy"):
        return "unclear"
    if row["ratio_low"] > was["ratio_high"] * (1 + BETWEEN):
        return "faster"
    return "slower" if row["ratio_high"] < was["ratio_low"] / (1 + BETWEEN) else "same"


def _of(row: dict[str, Any]) -> tuple:
    return tuple(row.get(key) for key in _OF)


def _change(row: dict[str, Any], was: dict[str, Any]) -> dict[str, Any]:
    ratios = {"old": was["ratio_to_dense"], "new": row["ratio_to_dense"]}
    ratios = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    change = {"change": ratios["new"] / ratios["old"]} if len(ratios) == 2 else {}
    return {key: row[key] for key in _OF if key in row} | ratios | change


def _verdict(found: dict[str, Any]) -> str:
    faster, slower, wrong, right = (len(found[kind]) for kind in ("faster", "slower", "wrong", "right"))
    parts = [f"{wrong} WRONG now"] * bool(wrong)
    parts += [f"{right} right that {'was' if right == 1 else 'were'} wrong"] * bool(right)
    parts += [f"{faster} faster", f"{slower} slower"] if faster or slower else []
    parts += [f"{found['same']} rows alike"]
    parts += [f"{found['unclear']} too noisy to tell"] * bool(found["unclear"])
    parts += [f"{found['unmatched']} in one result only"] * bool(found["unmatched"])
    return ("" if faster or slower or wrong or right else "no difference: ") + ", ".join(parts)
