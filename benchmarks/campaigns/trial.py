"""One command of vspdf, in a fork of this process, under a plan of what shall happen to its files; and its verdict."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import importlib
import json
import os
import pkgutil
import resource
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

READ, OPEN, WRITE, SYNC, RENAME, REMOVE, MAKE, FOLDER = (1 << i for i in range(8))  # as in shim.c
CHANGES = OPEN | WRITE | SYNC | RENAME | REMOVE | MAKE | FOLDER
EXTRA_MEMORY = 3 << 30  # what a trial may take beside what torch has mapped already
HANG = 60.0  # seconds

EQUAL, REFUSED, WRONG = "equal", "refused", "wrong"


@dataclass
class Result:
    """What came of one trial: `verdict` and, where it is wrong or refused, why."""

    id: str
    verdict: str
    why: str = ""


@dataclass
class Campaign:
    """Verdicts of one campaign."""

    name: str
    results: list[Result] = field(default_factory=list)

    def to_json(self, repeat: Callable[[str], str]) -> dict[str, Any]:
        counts = {kind: sum(result.verdict == kind for result in self.results) for kind in (EQUAL, REFUSED, WRONG)}
        failures = [
            {"id": result.id, "why": result.why, "repeat": repeat(result.id)}
            for result in self.results
            if result.verdict == WRONG
        ]
        return {"campaign": self.name, "tried": len(self.results), **counts, "failures": failures}


class Arms(NamedTuple):
    """What shall happen to files below the working folder: at the operation `at` of the kinds in `mask`."""

    at: int = -1
    mask: int = CHANGES
    signal: int = 0
    failure: int = 0
    from_there_on: bool = False
    record: Path | None = None


class End(NamedTuple):
    """How a command ended; `status` is negative for a signal, None where it hung."""

    status: int | None
    out: str
    err: str
    operations: int

    @property
    def error(self) -> str:
        """The last line that it wrote to stderr."""
        return (self.err.strip().splitlines() or [""])[-1]


def preload() -> None:
    """Builds the shim and starts this program anew above it, unless it is loaded already."""
    if hasattr(ctypes.CDLL(None), "torture_arm"):
        shutil.rmtree(Path(os.environ.pop("LD_PRELOAD")).parent)  # mapped already
        return
    library = Path(tempfile.mkdtemp(prefix="torture-")) / "shim.so"
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


class Child(NamedTuple):
    """A command under way; stdout, stderr and the count of its operations go to `files`."""

    number: int
    files: list[Any]
    hang: float


def run(arguments: Sequence[Any], folder: Path, arms: Arms | None = None, hang: float = HANG) -> End:
    """`vspdf ARGUMENTS` in a fork of this process, in `folder`, with its cache in ``folder/cache``."""
    return wait(start(arguments, folder, arms, hang))


def start(arguments: Sequence[Any], folder: Path, arms: Arms | None = None, hang: float = HANG) -> Child:
    """As `run`, without waiting for the end."""
    files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115 - closed by `wait`
    child = os.fork()
    if child == 0:
        _become([str(argument) for argument in arguments], folder, arms or Arms(), files)
    return Child(child, files, hang)


def wait(child: Child) -> End:
    """The end of a command; one that hangs is killed."""
    watch = os.pidfd_open(child.number)
    in_time = bool(select.select([watch], [], [], child.hang)[0])
    os.close(watch)
    if not in_time:
        os.kill(child.number, signal.SIGKILL)
    _, status = os.waitpid(child.number, 0)
    texts = []
    for file in child.files:
        file.seek(0)
        texts.append(file.read().decode(errors="replace"))
        file.close()
    return End(os.waitstatus_to_exitcode(status) if in_time else None, texts[0], texts[1], int(texts[2] or 0))


def _become(arguments: list[str], folder: Path, arms: Arms, files: list[Any]) -> None:
    """The rest of a fork's life."""
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.environ.update(VSPDF_CACHE=str(folder / "cache"), HF_HUB_OFFLINE="1", TMPDIR=str(folder), COLUMNS="120")
        for number, file in enumerate(files[:2], 1):
            os.dup2(file.fileno(), number)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + EXTRA_MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = ["vspdf", *arguments]
        arm(folder, arms)
        status = _main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(files[2].fileno(), str(ctypes.CDLL(None).torture_count()).encode())
        os._exit(status)


def _main() -> int:
    from vspdf import cli

    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def arm(folder: Path, arms: Arms) -> None:
    """Puts a plan into force in this process."""
    record, store = -1, b""
    if arms.record:
        arms.record.mkdir(parents=True)
        record, store = os.open(arms.record / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.fsencode(arms.record)
    library = ctypes.CDLL(None)
    library.torture_arm(
        os.fsencode(folder), arms.mask, ctypes.c_long(arms.at), arms.signal, arms.failure, int(arms.from_there_on),
        record, store,
    )  # fmt: skip


def import_all() -> None:
    """Imports vspdf's modules and what they import late, so that forks find all of it loaded."""
    import vspdf

    names = [module.name for module in pkgutil.walk_packages(vspdf.__path__, "vspdf.", lambda name: None)]
    for name in [*names, "torch._dynamo", "torch.profiler", "tokenizers"]:
        with contextlib.suppress(ImportError):  # an extra that is not installed
            importlib.import_module(name)
    torch.set_num_threads(1)  # a fork of a process with a pool of threads may hang


# -- verdicts ---------------------------------------------------------------------------------------------------------


def refused(end: End) -> bool:
    """Whether it ended as an error that the user can mend: status 2, one line, no traceback."""
    lines = end.err.strip().splitlines()
    said = [line for line in lines if line.startswith("vspdf: error: ")]
    return end.status == 2 and len(said) == 1 and lines[-1] == said[0] and "Traceback" not in end.err


def died(end: End) -> str:
    """What an end that is neither a success nor a refusal looks like, in a line."""
    if end.status is None:
        return f"hung; last words: {end.error[:200]}"
    if end.status < 0:
        return f"killed by {signal.Signals(-end.status).name}; last words: {end.error[:200]}"
    ours = [line.strip() for line in end.err.splitlines() if 'File "' in line and f"{os.sep}vspdf{os.sep}" in line]
    return f"status {end.status}: {end.error[:200]}" + (f" [{_place(ours[-1])}]" if ours else "")


def _place(line: str) -> str:
    path, number = line.split('"')[1], line.split("line ")[1].split(",")[0]
    return f"{Path(path).parent.name}/{Path(path).name}:{number}"


def errno_name(number: int) -> str:
    return errno.errorcode[number]


def without_times(body: Any) -> Any:
    """A JSON body without what a clock has measured."""
    if isinstance(body, dict):
        clock = ("seconds", "per_second", "communication")
        return {key: without_times(value) for key, value in body.items() if not key.endswith(clock)}
    return [without_times(item) for item in body] if isinstance(body, list) else body


_RESULTS = ("val_loss", "val_bits_per_byte", "tokens", "flops", "effective_sparsity")  # of summary.json
_EXACT = (".safetensors", ".yaml", ".npz", ".txt", ".jsonl")


def content(folder: Path) -> dict[str, str]:
    """Files below a folder and a digest of what must not differ between two runs: everything but times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.is_symlink():
            continue
        if path.name == "metrics.jsonl":
            text = "\n".join(json.dumps(without_times(json.loads(line))) for line in path.read_text().splitlines())
        elif path.name == "summary.json":
            body = json.loads(path.read_text())
            text = json.dumps({key: body.get(key) for key in _RESULTS})
        elif path.suffix in _EXACT or path.name == "tokenizer.json":
            text = path.read_bytes().hex()
        else:
            text = ""
        found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found


def difference(folder: Path, wanted: dict[str, str]) -> str:
    """In which file a folder differs from what it should hold; empty where in none."""
    try:
        found = content(folder)
    except (ValueError, OSError) as error:
        return f"unreadable after the end: {error}"
    for name in sorted({*found, *wanted}):
        if name not in found:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} was left behind"
        if found[name] != wanted[name]:
            return f"{name} differs"
    return ""
