"""Every file of a run directory and of its caches damaged, then read by every verb; two processes at the same files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from campaigns.jobs import Bench
from campaigns.trial import (
    EQUAL,
    REFUSED,
    WRONG,
    End,
    Result,
    content,
    died,
    difference,
    refused,
    run,
    start,
    wait,
    without_times,
)

HARMS = ("bit", "cut", "empty", "zeros", "tail", "gone")


def harm(path: Path, kind: str, chance: random.Random) -> None:
    """Flips a bit, cuts the end off, empties, zeroes a block, appends half a line, or removes."""
    body = bytearray(path.read_bytes())
    where = chance.randrange(max(1, len(body)))
    if kind == "gone":
        path.unlink()
        return
    if kind == "bit" and body:
        body[where] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del body[where:]
    elif kind == "empty":
        body.clear()
    elif kind == "zeros":
        body[where : where + 512] = bytes(len(body[where : where + 512]))
    elif kind == "tail":
        body += b'{"step": 9, "loss'
    path.write_bytes(body)


# What is run in a folder with run/ and cache/, and what to compare: its files, or what it prints.
READERS: dict[str, list[Any]] = {
    "resume": ["train", "../tiny.yaml", "--resume"],
    "again": ["train", "../tiny.yaml", "run_dir=other"],  # with the same token cache
    "eval": ["eval", "run", "--text", "../sample.txt", "--json"],
    "generate": ["generate", "run", "--prompt", "def ", "--temperature", "0", "--tokens", "8"],
    "convert": ["convert", "run", "out"],
    "report": ["report", "run", "--output", "out.html"],
    "simulate": ["simulate", "step", "--run", "run", "--json"],
}


def _outcome(verb: str, folder: Path, end: End) -> Any:
    """What must not differ silently."""
    if verb in ("eval", "simulate"):
        try:
            return without_times(json.loads(end.out))
        except ValueError:
            return end.out
    if verb == "report":
        report = folder / "out.html"
        return report.read_text() if report.is_file() else None
    if verb == "generate":
        return end.out
    return None


def damage(bench: Bench, among: list[str], count: int, seed: int) -> Iterator[tuple[str, Callable[[], Result]]]:
    """`count` damages of each file (0: one of each kind), each seen by every verb that could read it."""
    wanted: dict[str, Any] = {}
    for verb in READERS:
        source = bench.half if verb == "resume" else bench.done
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            name = str(path.relative_to(source))
            if name.startswith("cache") != (verb == "again") and not (verb == "resume" and name.startswith("cache")):
                continue
            if among and not any(part in f"{verb}/{name}" for part in among):
                continue
            chance = random.Random(f"{seed} {verb} {name}")
            kinds = [chance.choice(HARMS) for _ in range(count)] if count else list(HARMS)
            for number, kind in enumerate(kinds):
                id = f"{verb}/{name}/{kind}/{number}"
                yield id, lambda a=(verb, name, kind, id): _damaged(bench, *a, _undamaged(bench, a[0], wanted), seed)


def _undamaged(bench: Bench, verb: str, known: dict[str, Any]) -> Any:
    """What a verb prints and writes, and says on the way, in a run that nothing has happened to."""
    if verb not in known:
        folder = bench.room(bench.half if verb == "resume" else bench.done)
        end = run(READERS[verb], folder)
        if end.status != 0:
            raise SystemExit(f"an undamaged run: {verb}: {end.err}")
        known[verb] = (_outcome(verb, folder, end), _files(verb, folder), end.err)
        bench.clear(folder)
    return known[verb]


def _files(verb: str, folder: Path) -> dict[str, str]:
    where = {"resume": "run", "again": "other", "convert": "out"}.get(verb)
    return content(folder / where) if where else {}


def _damaged(bench: Bench, verb: str, name: str, kind: str, id: str, wanted: Any, seed: int) -> Result:
    folder = bench.room(bench.half if verb == "resume" else bench.done)
    harm(folder / name, kind, random.Random(f"{seed} {id}"))
    end = run(READERS[verb], folder)
    outcome, files, err = wanted
    result = Result(id, EQUAL)
    if refused(end):
        result = Result(id, REFUSED, end.error)
    elif end.status != 0:
        result = Result(id, WRONG, died(end))
    elif not _named(name, end.err, err):
        other = difference(folder / {"resume": "run", "again": "other"}.get(verb, "out"), files) if files else ""
        if other:
            result = Result(id, WRONG, f"silently: {other}")
        elif _outcome(verb, folder, end) != outcome:
            result = Result(id, WRONG, "silently: prints something else")
    bench.clear(folder)
    return result


def _named(file: str, err: str, usual: str) -> bool:
    """Whether a line that an undamaged run does not print names the damaged file."""
    return any(Path(file).name in line for line in set(err.splitlines()) - set(usual.splitlines()))


# -- several processes ------------------------------------------------------------------------------------------------


def together(bench: Bench, only: list[str], count: int, seed: int) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Two processes in one run directory, resumed and fresh; four in one cache."""
    parts = {
        "fresh": lambda id: _two(bench, bench.room(), id, []),
        "resume": lambda id: _two(bench, bench.room(bench.half), id, ["--resume"]),
        "cache": lambda id: _four(bench, id),
    }
    for part, trial in parts.items():
        for number in range(count or 20) if not only or part in only else ():
            yield f"{part}/{number}", lambda trial=trial, id=f"{part}/{number}": trial(id)


def _two(bench: Bench, folder: Path, id: str, more: list[str]) -> Result:
    ends = _at_once([["train", "../tiny.yaml", *more]] * 2, folder)
    wrong = [died(end) for end in ends if end.status != 0 and not refused(end)]
    finished = sum(end.status == 0 for end in ends)
    other = difference(folder, bench.job("train").wanted)
    if wrong or other or not finished or (not more and finished == 2):
        return Result(id, WRONG, "; ".join([*wrong, other, f"{finished} of 2 finished"]))
    bench.clear(folder)
    return Result(id, EQUAL)


def _four(bench: Bench, id: str) -> Result:
    folder = bench.room()
    ends = _at_once([["train", "../tiny.yaml", f"run_dir=run{i}"] for i in range(4)], folder)
    wanted = {name: digest for name, digest in bench.job("train").wanted.items() if name.startswith("run/")}
    wanted = {name.removeprefix("run/"): digest for name, digest in wanted.items() if not name.endswith("config.yaml")}
    for i, end in enumerate(ends):
        (folder / f"run{i}" / "config.yaml").unlink(missing_ok=True)  # names its folder
        other = died(end) if end.status != 0 else difference(folder / f"run{i}", wanted)
        if other:
            return Result(id, WRONG, other)
    left = difference(folder / "cache", _cache(bench))
    bench.clear(folder)
    return Result(id, WRONG, f"cache: {left}") if left else Result(id, EQUAL)


def _cache(bench: Bench) -> dict[str, str]:
    wanted = bench.job("train").wanted
    return {name.removeprefix("cache/"): digest for name, digest in wanted.items() if name.startswith("cache/")}


def _at_once(commands: list[list[Any]], folder: Path) -> list[End]:
    children = [start(arguments, folder) for arguments in commands]
    return [wait(child) for child in children]
