"""pytest-benchmark versions of the three products: `pytest benchmarks` groups sparse and dense side by side."""

import pytest

from vspdf.bench.linear import SHAPES, Problem
from vspdf.bench.rounds import PRODUCTS


@pytest.mark.parametrize("candidate", ["vspdf", "dense", "torch_csr"])
@pytest.mark.parametrize("sparsity", [0.75, 0.9], ids="{:.0%}".format)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("product", PRODUCTS)
def bench_product(benchmark, product, shape, sparsity, candidate):
    benchmark.group = f"{product} {'x'.join(map(str, shape))} {sparsity:.0%}"
    run = Problem.random(*shape, sparsity).candidates([candidate])[candidate][product]
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
