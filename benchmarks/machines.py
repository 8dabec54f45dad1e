"""Two ranks on two cores against one on one, and gradients over a slow link: real processes, gloo.

    python benchmarks/machines.py                # tokens a second, about a minute on two cores
    python benchmarks/machines.py --micro 1      # one sequence at a time: the tree of sums has more to add
    python benchmarks/machines.py --link 1       # gradients between two network namespaces, at 1 Gb/s: needs root

A GPT of 86M parameters (12 layers, d = 768, T = 512), four sequences a step, two at a time. For the speed, a loop that
knows of no ranks, rank 0 alone, and both together take turns in the same processes, a thread each; the figure is the
median of the rounds. Over the link the sums of whole gradients are timed, as the trainer exchanges them,
beside the seconds of a plan.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from vspdf import gemm
from vspdf.config import loading
from vspdf.kernels import hardware
from vspdf.model import GPT
from vspdf.parallel.environment import from_environment
from vspdf.parallel.traffic import sent
from vspdf.parallel.world import ALONE, World
from vspdf.plan.machines import PAYLOAD
from vspdf.shapes import Shape
from vspdf.sparsity.layer import build_plans
from vspdf.sparsity.surgery import sparsify
from vspdf.train.step import adamw, optimise

SHAPE = Shape(12, 768, 12, 3072, 257, 512)
BATCH = 4


def speed(world: World, sparsity: float, rounds: int, micro: int) -> dict[str, object]:
    """Seconds of a step, rank 0 alone and all together in turns."""
    config = loading.build(
        {
            "model": {"n_layer": 12, "d_model": 768, "n_head": 12, "sequence_length": 512},
            "train": {"batch_size": BATCH, "micro_batch_size": micro},
            "phases": [{"steps": 1, "sparsity": sparsity}],
        },
        "the benchmark",
    )
    torch.set_num_threads(1)
    model = GPT(SHAPE, 0.02, 0)
    if sparsity:
        sparsify(model, sparsity, backend="cpu")
        build_plans(model)
    optimizer = adamw(model, config.optimizer, config.phases[0])
    net = world.wrapped(model)
    chance = torch.Generator().manual_seed(0)
    batch = tuple(torch.randint(257, (BATCH, 512), generator=chance) for _ in "xy")

    def loop() -> None:
        for x, y in zip(*(part.split(micro) for part in batch), strict=True):
            with gemm.faster():
                (model(x, y) * (micro / BATCH)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def trainer(what: torch.nn.Module, who: World) -> Callable[[], object]:
        return lambda: optimise(what, optimizer, batch, 0.0, config.train, 1.0, world=who)

    ways = {"loop": loop, "alone": trainer(model, ALONE), "exact": trainer(model, world), "ddp": trainer(net, world)}
    times: dict[str, list[float]] = {way: [] for way in ways}
    waits: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, step in ways.items():
            world.wait()
            world.spent()
            start = time.perf_counter()
            if way in ("exact", "ddp") or world.first:
                step()
            if number:  # the first warms up
                times[way].append(time.perf_counter() - start)
                waits[way].append(world.spent()[0])
    tokens = BATCH * 512
    median = {way: statistics.median(column) for way, column in times.items()}
    return {
        "sparsity": sparsity, "step_seconds": times, "communication_seconds": waits,
        "tokens_per_second": {way: tokens / seconds for way, seconds in median.items()},
        "ratio": {way: ratios(times["alone"], times[way]) for way in ("loop", "exact", "ddp")},
    }  # fmt: skip


def ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times as fast, round by round: a slow minute of the machine hits all ways of a round alike."""
    found = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(found), "low": min(found), "high": max(found)}


def link(world: World, sparsity: float, rounds: int, gigabits: float) -> dict[str, object]:
    """Seconds in which the gradients of a step are summed."""
    model = GPT(SHAPE, 0.02, 0)
    if sparsity:
        sparsify(model, sparsity)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    seconds, size = [], 0
    for number in range(rounds + 1):
        world.wait()
        world.spent()
        gradients = [parameter.grad for parameter in parameters]
        world.sum(parameters, world.size, {(world.rank, world.rank + 1): gradients})
        took, size = world.spent()
        if number:
            seconds.append(took)
    planned = sent(round(SHAPE.parameters - sparsity * SHAPE.linear), world.size)
    return {
        "sparsity": sparsity, "parameters": sum(p.numel() for p in parameters), "bytes": size, "planned_bytes": planned,
        "seconds": seconds, "median": statistics.median(seconds),
        "planned_seconds": 8 * planned / (PAYLOAD * gigabits * 1e9),
    }  # fmt: skip


def work(options: argparse.Namespace) -> None:
    """What each rank does."""
    with from_environment() as world:
        for sparsity in map(float, options.sparsity.split(",")):
            found = (
                link(world, sparsity, options.rounds, options.link)
                if options.link
                else speed(world, sparsity, options.rounds, options.micro)
            )
            if world.first:
                print(json.dumps(found), flush=True)


def between_namespaces(command: list[str], gigabits: float) -> None:
    """Two ranks, each in a network of its own, with a link of so many gigabits a second between them."""
    names = ("vspdf-a", "vspdf-b")
    run = lambda *words: subprocess.run(words, check=True)  # noqa: E731
    try:
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for i, name in enumerate(names):
            inside = ("ip", "netns", "exec", name)
            run(*inside, "ip", "addr", "add", f"10.99.0.{i + 1}/24", "dev", "veth0")
            run(*inside, "ip", "link", "set", "veth0", "up")
            run(*inside, "ip", "link", "set", "lo", "up")
            shaped = ("rate", f"{gigabits}gbit", "burst", "512kb", "latency", "50ms")
            run(*inside, "tc", "qdisc", "add", "dev", "veth0", "root", "tbf", *shaped)
        told = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "10.99.0.1", "MASTER_PORT": "29511",
                "GLOO_SOCKET_IFNAME": "veth0", "OMP_NUM_THREADS": "1"}  # fmt: skip
        ranks = [
            subprocess.Popen(["ip", "netns", "exec", name, *command], env=told | {"RANK": str(i)})
            for i, name in enumerate(names)
        ]
        for rank in ranks:
            rank.wait()
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", type=float, default=0.0, help="gigabits a second; default: no link, speed")
    parser.add_argument("--sparsity", default="", help="default 0.9; with --link 0,0.75,0.9")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro", type=int, default=2, help="sequences at a time, of four a step")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sparsity = options.sparsity or ("0,0.75,0.9" if options.link else "0.9")
    if options.work:
        return work(options)
    print(json.dumps({"hardware": hardware.hardware(), "versions": hardware.versions()}), flush=True)
    work_of = [__file__, "--work", "--link", str(options.link), "--sparsity", options.sparsity,
               "--rounds", str(options.rounds), "--micro", str(options.micro)]  # fmt: skip
    if options.link:
        return between_namespaces([sys.executable, *work_of], options.link)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, *work_of], check=True)


if __name__ == "__main__":
    main()
