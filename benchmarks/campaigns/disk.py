"""Kills, signals, faults of the disk and power cuts at every file operation of a command, which is then begun again."""

from __future__ import annotations

import errno
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from campaigns.jobs import Bench, Job
from campaigns.trial import (
    CHANGES,
    EQUAL,
    FOLDER,
    MAKE,
    OPEN,
    READ,
    REFUSED,
    REMOVE,
    RENAME,
    SYNC,
    WRITE,
    WRONG,
    Arms,
    End,
    Result,
    died,
    difference,
    errno_name,
    refused,
    run,
)

# What fails, in which operations, and whether it goes on failing.
FAULTS = {
    "full": (errno.ENOSPC, OPEN | WRITE | MAKE, True),
    "quota": (errno.EDQUOT, WRITE, True),
    "fsync": (errno.EIO, SYNC, False),
    "write": (errno.EIO, WRITE, False),
    "denied": (errno.EACCES, OPEN | RENAME | REMOVE | MAKE, False),
    "unreadable": (errno.EACCES, READ, False),
    "read-only": (errno.EROFS, CHANGES & ~(SYNC | FOLDER), True),
}
CUTS = ("nothing", "names", "some")  # what survives of that which was not synced: nothing, names alone, a part


def spread(total: int, points: int, chance: random.Random) -> list[int]:
    """`points` of the numbers below `total`, one from each of as many equal parts; all of them where 0 or enough."""
    if not points or points >= total:
        return list(range(total))
    return [chance.randrange(i * total // points, (i + 1) * total // points) for i in range(points)]


def goes_on(bench: Bench, job: Job, folder: Path, id: str) -> Result:
    """Runs an interrupted command again, until it is done; its folder must then be as if nothing had happened."""
    saved = any((folder / "run").glob("checkpoints/step-*"))
    end = run(job.again(folder), folder)
    if refused(end):
        if not difference(folder, job.wanted):
            return Result(id, EQUAL)  # "exists already": it was done
        said = end.error
        if saved:
            return Result(id, WRONG, f"a checkpoint was there, and was not taken: {said[:150]}")
        # Nothing to resume, or damage that was named: the user clears it away and begins anew.
        for name in ("run", "out"):
            shutil.rmtree(folder / name, ignore_errors=True)
        end = run(job.arguments, folder)
        if end.status != 0:
            return Result(id, WRONG, f"refused ({said[:150]}), then from the start: {died(end)}")
        other = difference(folder, job.wanted)
        return Result(id, WRONG, f"begun anew, {other}") if other else Result(id, REFUSED, said)
    if end.status != 0:
        return Result(id, WRONG, f"going on: {died(end)}")
    other = difference(folder, job.wanted)
    return Result(id, WRONG, f"going on, {other}") if other else Result(id, EQUAL)


def _points(bench: Bench, jobs: list[str], count: int, seed: int) -> Iterator[tuple[Job, int]]:
    for job in bench.among(jobs):
        for at in spread(job.operations, count, random.Random(f"{seed} {job.name}")):
            yield job, at


def kills(bench: Bench, jobs: list[str], count: int, seed: int) -> Iterator[tuple[str, Callable[[], Result]]]:
    """The process dies at an operation; at a write, half of it is written."""
    for job, at in _points(bench, jobs, count, seed):
        id = f"{job.name}/{at}"
        yield id, lambda job=job, at=at, id=id: _kill(bench, job, at, signal.SIGKILL, id)


def signals(bench: Bench, jobs: list[str], count: int, seed: int) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Ctrl-C or SIGTERM at an operation."""
    for job, at in _points(bench, jobs, count, seed):
        for number in (signal.SIGINT, signal.SIGTERM):
            id = f"{job.name}/{number.name}/{at}"
            yield id, lambda job=job, at=at, number=number, id=id: _kill(bench, job, at, number, id)


def _kill(bench: Bench, job: Job, at: int, number: signal.Signals, id: str) -> Result:
    folder = bench.room()
    end = run(job.arguments, folder, Arms(at, signal=number))
    allowed = end.status in (-number, 0, 130)
    if not allowed or (end.status == 130 and "Traceback" in end.err):
        return _kept(bench, folder, Result(id, WRONG, f"when it was stopped: {died(end)}"))
    return _kept(bench, folder, goes_on(bench, job, folder, id))


def faults(bench: Bench, jobs: list[str], count: int, seed: int) -> Iterator[tuple[str, Callable[[], Result]]]:
    """An operation fails: it is refused in one line, or the results are those of an undisturbed run."""
    for job in bench.among(jobs):
        for kind, (_, mask, _) in FAULTS.items():
            folder = bench.room()
            total = run(job.arguments, folder, Arms(mask=mask)).operations
            bench.clear(folder)
            for at in spread(total, count, random.Random(f"{seed} {job.name} {kind}")):
                id = f"{job.name}/{kind}/{at}"
                yield id, lambda job=job, kind=kind, at=at, id=id: _fault(bench, job, kind, at, id)


def _fault(bench: Bench, job: Job, kind: str, at: int, id: str) -> Result:
    number, mask, from_there_on = FAULTS[kind]
    folder = bench.room()
    end = run(job.arguments, folder, Arms(at, mask, failure=number, from_there_on=from_there_on))
    if end.status not in (0, 130) and not refused(end):
        return _kept(bench, folder, Result(id, WRONG, f"{errno_name(number)}: {died(end)}"))
    if end.status == 0 and kind == "fsync" and not _spoke(end):
        return _kept(bench, folder, Result(id, WRONG, "a failed fsync went unnoticed"))
    result = goes_on(bench, job, folder, id)
    if result.verdict == EQUAL and end.status != 0:
        result = Result(id, REFUSED, end.error)
    return _kept(bench, folder, result)


def _spoke(end: End) -> bool:
    return any(word in end.err for word in ("not written", "cannot be written", "Input/output error", "not flushed"))


def _kept(bench: Bench, folder: Path, result: Result) -> Result:
    bench.clear(folder)
    return result


# -- power cuts -------------------------------------------------------------------------------------------------------


def power(bench: Bench, jobs: list[str], count: int, seed: int) -> Iterator[tuple[str, Callable[[], Result]]]:
    """The power goes at an operation: what was not synced is lost, whole or in part."""
    for job, at in _points(bench, jobs, count, seed):
        for survives in CUTS:
            id = f"{job.name}/{survives}/{at}"
            yield id, lambda job=job, at=at, survives=survives, id=id: _cut(bench, job, at, survives, id, seed)


def _cut(bench: Bench, job: Job, at: int, survives: str, id: str, seed: int) -> Result:
    folder, record = bench.room(), bench.room() / "record"
    run(job.arguments, folder, Arms(at, signal=signal.SIGKILL, record=record))
    after = bench.room()
    rebuild(folder, record, after, survives, random.Random(f"{seed} {id}"))
    result = goes_on(bench, job, after, id)
    bench.clear(folder)
    bench.clear(record.parent)
    return _kept(bench, after, result)


def rebuild(folder: Path, record: Path, after: Path, survives: str, chance: random.Random) -> None:
    """Writes to `after` what a journaling file system may hold of `folder` after a power cut.

    Names are kept in the order in which they were made: all up to the last sync of anything, then as many as `survives`
    says. Bytes of a file are kept as they were at its last sync; what came later is lost, or kept in part.
    """
    events = [line.split("\t") for line in (record / "log").read_text().splitlines()]
    last = max((i for i, event in enumerate(events) if event[0] == "sync"), default=-1)
    end = {"nothing": last + 1, "names": len(events), "some": chance.randint(last + 1, len(events))}[survives]
    names: dict[str, int | None] = {}  # of files, and None of folders
    synced: dict[int, bytes] = {}
    present: dict[str, int] = {}  # files by inode, the youngest of each
    for number, (what, count, inode, path, other) in enumerate(events[:end]):
        if what == "create":
            present[inode] = names[path] = number
        elif what == "folder":
            names[path] = None
        elif what == "remove":
            names.pop(path, None)
        elif what == "rename":
            moved = {name: file for name, file in names.items() if name == path or name.startswith(path + "/")}
            names = {name: file for name, file in names.items() if name not in moved}
            names.update({other + name[len(path) :]: file for name, file in moved.items()})
        elif what == "sync" and inode in present and (record / count).is_file():  # no folder
            file = present[inode]
            names = {name: it for name, it in names.items() if it != file} | {path: file}  # renames past the shim
            synced[file] = (record / count).read_bytes()
    now = {file: _where(folder, inode) for inode, file in present.items()}
    for path, file in sorted(names.items()):
        target = after / path
        if file is None:
            target.mkdir(parents=True, exist_ok=True)
            continue
        content, kept = (now[file].read_bytes() if now.get(file) else b""), synced.get(file, b"")
        if survives == "some" and len(content) > len(kept):
            kept = content[: chance.randint(len(kept), len(content))]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(kept)


def _where(folder: Path, inode: str) -> Path | None:
    return next((path for path in folder.rglob("*") if path.is_file() and path.stat().st_ino == int(inode)), None)
