"""The Triton kernels without a GPU: the interpreter and compile-only checks, each in a process of its own."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from vspdf.kernels.gpu import costs, two_four
from vspdf.pattern import Pattern

PRODUCTS = ("forward", "grad_input", "grad_values")
HERE = Path(__file__).parent / "gpu"

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="Triton is for Linux")


def test_kernels_in_the_interpreter():
    """Everything in gpu/interpreted.py: values, gradients, and what is really multiplied."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--import-mode=importlib", HERE / "interpreted.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        cwd=HERE.parents[2],
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


BUDGET = json.loads((HERE / "budget.json").read_text())
TESTED = BUDGET.pop("triton")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Resources of every kernel by target, freshly compiled."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    runs = {
        target: subprocess.Popen(
            [sys.executable, HERE / "compile_only.py", target], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for target in BUDGET
    }  # fmt: skip
    found = {}
    for run in runs.values():
        out, err = run.communicate()
        assert run.returncode == 0, err[-4000:]
        found |= json.loads(out)
    return found


@pytest.mark.parametrize("target", BUDGET)
def test_kernels_compile_within_their_budget(target, compiled):
    """Registers, shared memory, no spills, tensor cores where they belong; `budget.json` says how much."""
    assert set(compiled[target]) == set(BUDGET[target]), "a kernel without a budget, or a budget without a kernel"
    tested = version("triton") == TESTED  # another compiler needs other registers
    for name, allowed in BUDGET[target].items():
        found = compiled[target][name]
        what = f"{name} on {target}: {found}, allowed {allowed}"
        assert found["spills"] == 0, what
        assert not tested or found["registers"] <= allowed["registers"], what
        assert not tested or found["shared"] <= allowed["shared"], what
        instructions = [i for i in found["tensor"] if i.startswith(allowed.get("tensor", "none"))]
        assert bool(instructions) == ("tensor" in allowed), what


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", costs.DEVICES)
def test_sparse_paths_are_predicted_to_pay_at_high_sparsity_only(name):
    device = costs.DEVICES[name]
    for product in ("forward", "grad_input", "grad_values"):
        for precision in ("bf16", "tf32", "fp32"):
            seconds = [
                costs.predict(device, product, (8192, 2048), round(density * 8192 * 2048), 16384, precision)
                for density in (1.0, 0.5, 0.1, 0.01, 0.0)
            ]
            assert all(all(s > 0 for s in point.values()) for point in seconds)
            column = [point["triton"] / point["dense"] for point in seconds]
            assert column == sorted(column, reverse=True)
            assert column[0] > 3 and column[1] > 1.5, "never at half the weights"


def break_even(device, product, precision, shape=(8192, 2048), tokens=16384):
    """Least sparsity, to a tenth of a percent, from which the gather kernel is predicted to be as fast as dense."""
    for permille in range(1000):
        nnz = round(shape[0] * shape[1] * (1 - permille / 1000))
        seconds = costs.predict(device, product, shape, nnz, tokens, precision)
        if seconds["triton"] <= seconds["dense"]:
            return permille / 1000
    return None


def test_the_break_even_in_the_documentation_is_what_the_model_says():
    page = (HERE.parents[2] / "docs" / "gpu.md").read_text()
    for name, device in costs.DEVICES.items():
        cells = []
        for precision in ("bf16", "tf32", "fp32"):
            found = [break_even(device, p, precision) for p in PRODUCTS]
            cells.append(" / ".join("-" if f is None else f"{100 * f:.1f}" for f in found))
        assert f"| {name} | {' | '.join(cells)} |" in page


def test_a_random_mask_leaves_what_the_formula_says_beyond_24():
    for density in (0.5, 0.1):
        _, rest = two_four.split(Pattern.random((1024, 1024), 1 - density))
        assert rest.density == pytest.approx(costs._beyond_two(density), rel=0.1)
