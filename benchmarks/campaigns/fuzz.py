"""Files of every format that is read, bent at random and given to the verbs that read them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from campaigns.formats import Format, formats
from campaigns.jobs import Bench
from campaigns.trial import EQUAL, REFUSED, WRONG, Result, died, refused, run

# What a value may turn into. Big numbers are so big that nobody can mean them.
NASTY: list[Any] = [
    None, True, "", "x", "0", "nan", -1, 0, 1, 0.5, 3, 10**9, 2**63, -(2**70), 1e308, float("inf"), float("nan"), {},
    [], [[]], [None], {"": 1}, "\x00", "é", "a" * 5000, "../../x", "!!x",
]  # fmt: skip
HANG = 20.0


# -- bending ----------------------------------------------------------------------------------------------------------


def bend(format: Format, chance: random.Random) -> bytes:
    """One to three changes: of a value anywhere in the tree, where the format has one, or of bytes."""
    if format.tree and chance.random() < 0.75:
        parse, write = format.tree
        tree = parse(format.body)
        for _ in range(chance.randint(1, 3)):
            tree = _bend_tree(tree, chance)
        try:
            return write(tree)
        except (ValueError, TypeError):  # no such value in this format
            pass
    body = bytearray(format.body)
    for _ in range(chance.randint(1, 3)):
        _bend_bytes(body, chance)
    return bytes(body)


def _bend_tree(tree: Any, chance: random.Random) -> Any:
    found = list(places(tree))
    if not found or chance.random() < 0.03:
        return chance.choice(NASTY)
    holder, key = chance.choice(found)
    how = chance.choice(("value", "value", "value", "drop", "rename", "nest"))
    if how == "value":
        holder[key] = chance.choice(NASTY)
    elif how == "nest":
        holder[key] = chance.choice(([holder[key]], {"x": holder[key]}))
    elif how == "rename" and isinstance(holder, dict):
        holder[str(key) + chance.choice(("x", " ", "\x00"))] = holder.pop(key)
    else:
        del holder[key]
    return tree


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items: Any = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from places(value)


def _bend_bytes(body: bytearray, chance: random.Random) -> None:
    where, size = chance.randrange(len(body) + 1), chance.randint(1, 16)
    how = chance.choice(("flip", "drop", "twice", "put", "cut"))
    if how == "flip" and where < len(body):
        body[where] ^= 1 << chance.randrange(8)
    elif how == "drop":
        del body[where : where + size]
    elif how == "twice":
        body[where:where] = body[where : where + size * 4]
    elif how == "put":
        body[where:where] = chance.choice(
            (b"\x00", b"\xff\xfe", b"\r", b"\n", b'"', b"[" * 50, b"{", b"||", b"]]>", b"&x;")
        )
    elif how == "cut":
        del body[where:]


def read(bench: Bench, format: Format, body: bytes, id: str, canary: Path | None = None) -> Result:
    folder = bench.room()
    if format.beside:
        shutil.copytree(format.beside, folder / Path(format.file).parent)
    path = folder / format.file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(body)
    words = [str(word).replace("FILE", str(path)).replace("FOLDER", str(path.parent)) for word in format.command]
    end = run(words, folder, hang=HANG)
    under_way = end.status is None and "step 1/" in end.err  # a long training that was asked for
    verdict = EQUAL if end.status == 0 or under_way else REFUSED if refused(end) else WRONG
    result = Result(id, verdict, died(end) if verdict == WRONG else end.error if verdict == REFUSED else "")
    if canary is not None and canary.exists():
        result = Result(id, WRONG, "what the file said was run")
    bench.clear(folder)
    return result


def _valid(bench: Bench, format: Format, id: str) -> Result:
    result = read(bench, format, format.body, id)
    return result if result.verdict == EQUAL else Result(id, WRONG, result.why or "a valid file is refused")


def fuzz(bench: Bench, among: list[str], count: int, seed: int) -> Iterator[tuple[str, Callable[[], Result]]]:
    """`count` bent files of every format: read, or refused in one line. Here "equal" is: taken."""
    for name, format in formats(bench).items():
        if among and name not in among:
            continue
        yield f"{name}/valid", lambda f=format, id=f"{name}/valid": _valid(bench, f, id)
        for number in range(count or 200):
            id = f"{name}/{number}"
            yield id, lambda f=format, id=id: read(bench, f, bend(f, random.Random(f"{seed} {id}")), id)
