"""GELU by our own kernel (`vspdf.activation`) against torch's: alone, and what a training step gains by it.

    python benchmarks/gelu.py [--widths 128 256] [--threads 1] [--rounds 41]

Steps are of two layers, 8 x 128 tokens, forward, backward, clipping and AdamW, dense and 75 % sparse, the same model
with the one and the other in turns; whole rounds are compared: medians of their ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vspdf import sparsify
from vspdf.activation import gelu
from vspdf.bench.rounds import compared, on_threads, time_rounds
from vspdf.kernels import cpu
from vspdf.kernels.hardware import keep_freed_memory
from vspdf.model import GPT, MLP
from vspdf.shapes import Shape

FORMS = {"gelu": "none", "gelu_tanh": "tanh"}


def ratio(torchs: Callable[[], object], ours: Callable[[], object], rounds: int) -> str:
    """Torch's time over ours, with its interval."""
    times = time_rounds({"torch": {"layer": torchs}, "ours": {"layer": ours}}, rounds)
    found = compared(times["torch", "layer"], times["ours", "layer"])
    return f"{found.median:.2f}x ({found.low:.2f} to {found.high:.2f})"


def alone(form: str, numbers: int, rounds: int) -> tuple[str, str]:
    """Forward and backward, each of as many calls as make a quarter of a million numbers."""
    x, grad = torch.randn(numbers, requires_grad=True), torch.randn(numbers)
    sides = [partial(function, approximate=FORMS[form]) for function in (F.gelu, gelu)]
    calls = range(max(1, (1 << 18) // numbers))
    given, made = x.detach(), [side(x) for side in sides]
    forward = [lambda side=side: [side(given) for _ in calls] for side in sides]
    backward = [lambda y=y: [torch.autograd.grad(y, x, grad, retain_graph=True) for _ in calls] for y in made]
    return ratio(*forward, rounds), ratio(*backward, rounds)


def step(form: str, width: int, sparsity: float, rounds: int) -> str:
    """The same of a training step."""
    model = GPT(Shape(2, width, 4, 4 * width, 257, 128, mlp=form))
    if sparsity:
        sparsify(model, sparsity, backend="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(257, (8, 129), generator=torch.Generator().manual_seed(0))

    def run(activation: Callable[..., Tensor]) -> None:
        for module in model.modules():
            if isinstance(module, MLP):
                module.activation = partial(activation, approximate=FORMS[form])
        model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return ratio(lambda: run(F.gelu), lambda: run(gelu), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description="GELU of our own against torch's.")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=41)
    arguments = parser.parse_args()
    rounds = arguments.rounds
    keep_freed_memory()  # as `vspdf train` and `vspdf bench` do
    torch.manual_seed(0)
    with on_threads(arguments.threads) as threads:
        print(f"{cpu.cpu_name()}, {cpu.isa()}, {threads} threads, torch {torch.__version__}: torch's time over ours")
        for form in FORMS:
            for numbers in (1 << 14, 1 << 17, 1 << 20, 1 << 22):
                forward, backward = alone(form, numbers, rounds)
                print(f"{form:10} {numbers:>8} numbers: forward {forward}, backward {backward}", flush=True)
            for width in arguments.widths:
                for sparsity in (0.0, 0.75):
                    found = step(form, width, sparsity, rounds)
                    print(f"{form:10} step, d = {width}, {sparsity:.0%} sparse: {found}", flush=True)


if __name__ == "__main__":
    main()
