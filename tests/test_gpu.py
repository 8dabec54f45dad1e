"""The Triton kernels without a GPU: the interpreter and compile-only checks, each in a process of its own."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "gpu"

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="Triton is for Linux")


def test_kernels_in_the_interpreter():
    """Everything in gpu/interpreted.py: values, gradients, and what is really multiplied."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--import-mode=importlib", HERE / "interpreted.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        cwd=HERE.parent.parent,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Resources of every kernel by target, freshly compiled."""
    cache = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    result = subprocess.run(
        [sys.executable, HERE / "compile_only.py"], env={**os.environ, **cache}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


BUDGET = json.loads((HERE / "budget.json").read_text())
TESTED = BUDGET.pop("triton")


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
