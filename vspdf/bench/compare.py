"""Two results of one benchmark: what became faster or slower, beyond what two runs of one build differ by."""

from __future__ import annotations

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
    rows = body.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "ratio_to_dense" in row for row in rows):
        raise UserError(f"'{path}' holds no result to compare with: expected what vspdf bench ... --json printed.")
    return body


def compare(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What changed, row by row, in ratios to dense of the same run: those of another machine say nothing.

    Returns
    -------
    dict
        ``faster`` and ``slower``, each a list of the row's own keys with ``change`` (new over old), ``old`` and ``new``
        ratio, the largest change first; how many rows are the ``same``, ``unclear`` (an interval wider than noise), or
        in one result only (``unmatched``); ``verdict`` in words.

    Raises
    ------
    UserError
        If no row is in both, or the processors differ.
    """
    if (a := old.get("hardware", {}).get("cpu")) != (b := new["hardware"]["cpu"]):
        raise UserError(f"the earlier result is of another machine ({a}), this one is {b}: ratios differ by machine.")
    before = {_of(row): row for row in old["rows"]}
    found: dict[str, Any] = {"faster": [], "slower": [], "same": 0, "unclear": 0, "unmatched": 0}
    for row in new["rows"]:
        was = before.get(_of(row))
        if was is None or None in (row["ratio_to_dense"], was["ratio_to_dense"]):
            found["unmatched"] += was is None
            continue
        if row["ratio_low"] == row["ratio_high"] == 1:
            continue  # the base itself
        if row.get("noisy") or was.get("noisy"):
            found["unclear"] += 1
            continue
        if row["ratio_low"] > was["ratio_high"] * (1 + BETWEEN):
            found["faster"].append(_change(row, was))
        elif row["ratio_high"] < was["ratio_low"] / (1 + BETWEEN):
            found["slower"].append(_change(row, was))
        else:
            found["same"] += 1
    if not any(found.values()) or found["unmatched"] == len(new["rows"]):
        raise UserError("no row of the earlier result is in this one: time the same shapes, sparsities and threads.")
    for kind in ("faster", "slower"):
        found[kind].sort(key=lambda row: -abs(math.log(row["change"])))
    found["verdict"] = _verdict(found)
    return found


def _of(row: dict[str, Any]) -> tuple:
    return tuple(row.get(key) for key in _OF)


def _change(row: dict[str, Any], was: dict[str, Any]) -> dict[str, Any]:
    new, old = row["ratio_to_dense"], was["ratio_to_dense"]
    return {key: row[key] for key in _OF if key in row} | {"old": old, "new": new, "change": new / old}


def _verdict(found: dict[str, Any]) -> str:
    rest = f"{found['same']} rows alike" + (f", {found['unclear']} too noisy to tell" if found["unclear"] else "")
    if not found["faster"] and not found["slower"]:
        return f"no difference: {rest}"
    return f"{len(found['faster'])} faster, {len(found['slower'])} slower, {rest}"
