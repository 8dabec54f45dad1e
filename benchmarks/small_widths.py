"""Small widths: a `SparseLinear`'s forward and backward, autograd and Python included, against `nn.Linear`'s.

    python benchmarks/small_widths.py [--widths 128 192 256 320] [--sparsity 0.75 0.9] [--tokens 1024] [--rounds 101]

One thread; layers as wide in as out. Dense is plain PyTorch, and again by the faster of torch's libraries where that is
another one (`vspdf.gemm`). Whole rounds are compared: medians of their ratios. Hold everybody to AVX2 with
`VSPDF_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2` before it.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor, nn

from vspdf import Pattern, SparseLinear, gemm
from vspdf.bench.rounds import compared, on_threads, time_rounds
from vspdf.kernels import cpu
from vspdf.kernels.hardware import keep_freed_memory


def ratios(width: int, sparsity: float, tokens: int, rounds: int) -> dict[str, float]:
    """How many times faster than `nn.Linear` in plain PyTorch: sparse, and dense by the faster library."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator).requires_grad_()
    grad = torch.randn(tokens, width, generator=generator)
    dense = nn.Linear(width, width)
    sparse = SparseLinear.from_linear(dense, Pattern.random((width, width), sparsity, seed=1), backend="cpu")

    def step(layer: nn.Module) -> None:
        output: Tensor = layer(x)
        output.backward(grad)

    sides = {"dense": lambda: step(dense), "sparse": lambda: step(sparse)}
    if gemm.library() != "MKL":
        sides["dense by " + gemm.library()] = gemm.faster()(sides["dense"])
    times = time_rounds({name: {"layer": call} for name, call in sides.items()}, rounds)
    return {name: compared(times["dense", "layer"], times[name, "layer"]).median for name in sides if name != "dense"}


def main() -> None:
    parser = argparse.ArgumentParser(description="SparseLinear against nn.Linear at small widths, one thread.")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 192, 256, 320])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.75, 0.9])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=101)
    arguments = parser.parse_args()
    print(f"{arguments.tokens} tokens, one thread, {cpu.isa()}; x dense in plain PyTorch")
    print(f"{'':28}" + "".join(f"{width:>8}" for width in arguments.widths) + "    mean")
    keep_freed_memory()  # as `vspdf train` and `vspdf bench` do
    with on_threads(1):
        for sparsity in arguments.sparsity:
            found = [ratios(width, sparsity, arguments.tokens, arguments.rounds) for width in arguments.widths]
            for name in found[0]:
                row = [each[name] for each in found]
                figures = "".join(f"{value:8.2f}" for value in [*row, statistics.geometric_mean(row)])
                print(f"{f'{name}, {sparsity:.0%} mask':28}{figures}", flush=True)


if __name__ == "__main__":
    main()
