"""Causal attention of our own (`vspdf.attention`) against torch's, in float32 and in bfloat16.

    python benchmarks/attention.py [--tokens 128 256 512] [--widths 32 48 64 128] [--threads 1] [--rounds 15]

Four heads, 1,024 tokens in all where a sequence is no longer, forward and backward, the one and the other in turns;
whole rounds are compared: medians of their ratios. Queries, keys and values are parts of one matrix, as in a model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from gelu import ratio
from torch import Tensor

from vspdf.attention import causal_attention, plain
from vspdf.bench.rounds import on_threads
from vspdf.kernels import cpu
from vspdf.kernels.hardware import keep_freed_memory

HEADS = 4


def both_ways(tokens: int, width: int, dtype: torch.dtype, rounds: int) -> str:
    """Torch's time over ours, forward and backward, with its interval."""
    batch = max(1, 1024 // tokens)
    whole = torch.randn(batch, tokens, 3 * HEADS * width, dtype=dtype, requires_grad=True)
    upstream = torch.randn(batch, HEADS, tokens, width, dtype=dtype)

    def run(attention: Callable[..., Tensor]) -> None:
        parts = (part.view(batch, tokens, HEADS, width).transpose(1, 2) for part in whole.chunk(3, dim=2))
        torch.autograd.grad(attention(*parts), whole, upstream)

    return ratio(lambda: run(plain), lambda: run(causal_attention), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Causal attention of our own against torch's.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 48, 64, 128])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    keep_freed_memory()  # as `vspdf train` and `vspdf bench` do
    torch.manual_seed(0)
    with on_threads(arguments.threads) as threads:
        print(f"{cpu.cpu_name()}, {cpu.isa()}, {threads} threads, torch {torch.__version__}: torch's time over ours")
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in arguments.tokens:
                found = [
                    f"{width} wide {both_ways(tokens, width, dtype, arguments.rounds)}" for width in arguments.widths
                ]
                print(f"{str(dtype)[6:]:9} {tokens:>5} tokens: {', '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
