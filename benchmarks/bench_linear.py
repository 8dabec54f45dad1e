"""pytest-benchmark versions of the three products: `pytest benchmarks` groups sparse and dense side by side."""

import pytest

from vspdf.bench import candidates
from vspdf.bench.linear import SHAPES
from vspdf.bench.problem import Problem
from vspdf.bench.rounds import PRODUCTS


@pytest.mark.parametrize("candidate", ["vspdf", "dense", "torch_csr"])
@pytest.mark.parametrize("sparsity", [0.75, 0.9], ids="{:.0%}".format)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("product", PRODUCTS)
def bench_product(benchmark, product, shape, sparsity, candidate):
    benchmark.group = f"{product} {'x'.join(map(str, shape))} {sparsity:.0%}"
    problem, made = Problem.random(*shape, sparsity), candidates.find(candidate)
    problem.prepared(made)
    run = problem.calls(made)[product]
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
