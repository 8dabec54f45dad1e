"""Long use: a model that changes its sparsity again and again, and commands one after the other in one process."""

from __future__ import annotations

import gc
import os
import random
import resource
import sys
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from campaigns.jobs import Bench
from campaigns.trial import EQUAL, WRONG, Result

RESIDENT = 24 << 20  # bytes that a process may grow by over the second half
OBJECTS = 50  # bytes of Python objects that one more round may leave
OF_LIBRARIES = 16 << 10  # so many of a round of commands: safetensors 0.8 leaves the integers of the shapes it reads


def soak(bench: Bench, among: list[str], count: int, seed: int) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Memory, open files and threads are flat over the second half of `count` rounds (0: 10,000)."""
    rounds = count or 10_000
    for id, action in (
        ("switches", lambda: _switches(seed)),
        ("masks", lambda: _masks(seed)),
        ("commands", lambda: _commands(bench)),
    ):
        if not among or id in among:
            n = max(6, rounds // 100) if id == "commands" else rounds
            yield id, lambda id=id, action=action, n=n: _flat(bench, id, action(), n)


def _flat(bench: Bench, id: str, action: Callable[[], None], rounds: int) -> Result:
    """Measures in a fork, so that nothing else of this process counts."""
    folder = bench.room()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        try:
            os.chdir(folder)
            os.environ["VSPDF_CACHE"] = str(folder / "cache")
            why = _measured(action, rounds, OF_LIBRARIES if id == "commands" else OBJECTS)
        except BaseException:
            why = traceback.format_exc().strip().splitlines()[-1]
        os.write(writer, why.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        why = stream.read()
    os.waitpid(child, 0)
    bench.clear(folder)
    return Result(id, WRONG if why else EQUAL, why)


def _measured(action: Callable[[], None], rounds: int, allowed: int) -> str:
    tracemalloc.start()
    before = (0, 0, 0, 0)
    for number in range(rounds):
        if number == rounds // 2:
            before = _held()
        action()
    after = _held()
    resident, objects, files, threads = (b - a for a, b in zip(before, after, strict=True))
    second = rounds - rounds // 2
    grown = []
    if resident > RESIDENT:
        grown.append(f"{resident / 2**20:.0f} MiB resident")
    if objects > allowed * second + (64 << 10):
        grown.append(f"{objects / second:.0f} bytes of objects a round")
    if files > 0 or threads > 0:
        grown.append(f"{files} files, {threads} threads")
    return f"grown over {second} rounds: {', '.join(grown)}" if grown else ""


def _held() -> tuple[int, int, int, int]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files, threads = (len(list(Path("/proc/self", name).iterdir())) for name in ("fd", "task"))
    return pages * resource.getpagesize(), tracemalloc.get_traced_memory()[0], files, threads


def _switches(seed: int) -> Callable[[], None]:
    """Sparse, denser, dense and trained in each form, at sparsities that never repeat."""
    import vspdf

    chance = random.Random(seed)
    torch.set_num_threads(1)

    def once() -> None:
        model = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
        vspdf.sparsify(model, chance.uniform(0.6, 0.95), seed=chance.randrange(2**31))
        optimizer = torch.optim.AdamW(model.parameters())
        for change in (lambda: vspdf.set_sparsity(model, chance.uniform(0.1, 0.5), optimizer),
                       lambda: vspdf.densify(model, optimizer), lambda: None):  # fmt: skip
            model(torch.randn(8, 48)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            change()

    return once


def _masks(seed: int) -> Callable[[], None]:
    """Products of masks that never repeat, forward and backward, by every path that `auto` may take."""
    import vspdf

    chance = random.Random(seed)
    torch.set_num_threads(1)

    def once() -> None:
        pattern = vspdf.Pattern.random((chance.randrange(8, 96), chance.randrange(8, 96)), chance.random(), seed=1)
        values = torch.randn(pattern.nnz, requires_grad=True)
        x = torch.randn(chance.randrange(1, 40), pattern.shape[1], requires_grad=True)
        vspdf.sparse_linear(x, values, pattern).sum().backward()

    return once


def _commands(bench: Bench) -> Callable[[], None]:
    """`vspdf eval` and `vspdf generate` of one run, in one process."""
    from vspdf import cli

    done = str(bench.done / "run")

    def once() -> None:
        for words in (["eval", done, "--text", str(bench.folder / "sample.txt")], ["generate", done, "--prompt", "a"]):
            sys.argv = ["vspdf", *words]
            try:
                cli.main()
            except SystemExit as end:
                if end.code:
                    raise RuntimeError(f"{words[0]} ended with {end.code}") from None

    return once
