"""The GPU kernels without a GPU: interpreter, compile-only checks, a lint of what runs in a step, the model."""

import ast
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

import vspdf
from vspdf.kernels import ops
from vspdf.kernels.gpu import costs
from vspdf.pattern import Pattern

PRODUCTS = ("forward", "grad_input", "grad_values")
HERE = Path(__file__).parent / "gpu"
ROOT = HERE.parents[2]

linux = pytest.mark.skipif(platform.system() != "Linux", reason="Triton is for Linux")


@linux
def test_kernels_in_the_interpreter():
    """Values, gradients and what is really multiplied; host work; which path runs: a file of gpu/ each."""
    numpy = tuple(int(n) for n in version("numpy").split(".")[:2])
    if version("triton") == "3.6.0" and numpy >= (2, 4):
        pytest.skip("triton 3.6.0, which CUDA builds of torch 2.10 and 2.11 pin, cannot interpret with numpy 2.4")
    files = [HERE / f"{name}.py" for name in ("interpreted", "steps", "choices")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--import-mode=importlib", *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


BUDGET = json.loads((HERE / "budget.json").read_text())
TESTED = BUDGET.pop("triton")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Resources of every kernel by target, freshly compiled."""
    targets = list(BUDGET)
    runs = [
        subprocess.Popen(
            [sys.executable, HERE / "compile_only.py", *targets[i::2]], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        )
        for i in (0, 1)
    ]  # fmt: skip
    found = {}
    for run in runs:
        out, err = run.communicate()
        assert run.returncode == 0, err[-4000:]
        found |= json.loads(out)
    return found


@linux
@pytest.mark.parametrize("target", BUDGET)
def test_kernels_compile_within_their_budget(target, compiled):
    """Registers, shared memory, spills; `budget.json` says how much (`compile_only.py --budget` writes it)."""
    assert set(compiled[target]) == set(BUDGET[target]), "a kernel without a budget, or a budget without a kernel"
    tested = version("triton") == TESTED  # another compiler needs other registers
    for name, allowed in BUDGET[target].items():
        found = compiled[target][name]
        what = f"{name} on {target}: {found}, allowed {allowed}"
        assert found["spills"] <= allowed.get("spills", 0), what
        assert not tested or found["registers"] <= allowed["registers"], what
        assert not tested or found["shared"] <= allowed["shared"], what


# -- a step may be captured in a CUDA graph ----------------------------------------------------------------------------

# What runs in every product; what they call but once per pattern and device is not followed.
CALL_PATH = {
    "ops.py": ("_run", "_tokens", "_linear", "_grad_input", "_grad_values", "sparse_linear"),
    "dispatch.py": ("choose",),
    "derivatives.py": ("_call", "_operate", "_recording", "linear", "grad_input", "grad_values", "backward"),
    "dense.py": ("_weight", "_sample", "_working_dtype", "forward", "grad_input", "grad_values"),
    "reference.py": ("materialise", "forward", "grad_input", "grad_values"),
    "gpu/launch.py": ("takes", "tf32", "precision", "on"),
    "gpu/bitmap.py": ("bitmap", "_blocks", "expand", "sample"),
    "gpu/gather.py": ("tables", "_packed", "_words", "_gather", "forward", "grad_input", "grad_values"),
    "gpu/two_four.py": ("compress", "multiply", "_side", "_whole", "_known", "_product", "forward", "grad_input"),
}
# They wait for the device, work on the host in proportion to the layer, or copy from memory that is not pinned.
FORBIDDEN = {
    "item", "tolist", "numpy", "cpu", "cuda", "nonzero", "masked_select", "unique", "bincount", "synchronize",
    "from_numpy", "as_tensor", "tensor", "csr", "mask", "unpackbits", "packbits", "flatnonzero", "argsort", "sort",
    "pin_memory", "float", "bool", "allclose", "equal",
}  # fmt: skip


def calls(function):
    """Names of what a function calls, with lines."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield name, node


@pytest.mark.parametrize("file", CALL_PATH)
def test_nothing_in_a_step_waits_or_works_on_the_host(file):
    path = ROOT / "kernels" / file
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    assert set(CALL_PATH[file]) <= {function.name for function in functions}
    for function in functions:
        name = function.name
        for called, node in calls(function) if name in CALL_PATH[file] else ():
            where = f"kernels/{file}:{node.lineno}: {name} calls {called}"
            widens = called == "float" and isinstance(node.func, ast.Attribute) and not node.args  # values.float()
            assert called not in FORBIDDEN or widens, where
            if called == "to" and any("device" in ast.unparse(a) for a in [*node.args, *node.keywords]):
                # Of the reference path alone, where nobody keeps positions: the products do.
                assert (file, name) == ("reference.py", "materialise"), where


def test_the_lint_sees_what_it_is_for():
    bad = ast.parse("def f(x):\n    n = x.sum().item()\n    return torch.from_numpy(a).to(x.device)")
    assert {"item", "from_numpy"} <= {name for name, _ in calls(bad)} & FORBIDDEN


# -- packages beside CUDA builds of torch ------------------------------------------------------------------------------

PINNED = {"2.10.0": "3.6.0", "2.11.0": "3.6.0", "2.13.0": "3.7.1"}  # triton, by CUDA builds of torch


@pytest.mark.parametrize("torch_version, triton_version", PINNED.items())
def test_constraints_install_beside_cuda_builds(torch_version, triton_version):
    requirement = pytest.importorskip("packaging.requirements").Requirement
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    lines += re.findall(r'^    "(.*)",$', (ROOT / "pyproject.toml").read_text().split("[project.optional")[0], re.M)
    for line in filter(None, lines):
        found = requirement(line)
        if found.name in ("torch", "triton"):
            wanted = torch_version if found.name == "torch" else triton_version
            assert found.specifier.contains(wanted), f"{line} refuses {found.name} {wanted}"


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", costs.DEVICES)
def test_sparse_paths_are_predicted_to_pay_at_high_sparsity_only(name):
    device = costs.DEVICES[name]
    for product in PRODUCTS:
        for precision in ("bf16", "tf32", "fp32"):
            seconds = [
                costs.predict(device, product, (8192, 2048), round(density * 8192 * 2048), 16384, precision)
                for density in (1.0, 0.5, 0.1, 0.01, 0.0)
            ]
            assert all(all(s > 0 for s in point.values()) for point in seconds)
            column = [point["triton"] / point["dense"] for point in seconds]
            assert column == sorted(column, reverse=True)
            assert column[0] > 3 and column[1] > 1.5, "never at half the weights"


@pytest.mark.parametrize("sparsity, floor", [(0.9, 0.23), (0.95, 0.28), (0.98, 0.47), (0.99, 0.82)])
def test_the_gather_is_bound_by_l2_on_data_centre_cards(sparsity, floor):
    """0.223 / (1 - sparsity³²) of dense in bf16 on H200: no more than that floor, and not much less."""
    seconds = costs.predict(
        costs.DEVICES["H200"], "forward", (8192, 2048), round((1 - sparsity) * 8192 * 2048), 16384, "bf16"
    )
    assert 0.65 * floor < seconds["dense"] / seconds["triton"] < floor


def test_24_is_predicted_to_pay_where_tensor_cores_are_slow():
    gain = {}
    for name, device in costs.DEVICES.items():
        seconds = costs.predict(device, "forward", (8192, 2048), 8192 * 512, 16384, "bf16")
        gain[name] = seconds["dense"] / seconds["2:4"]
    assert gain["RTX 4090"] > 1.4 and gain["RTX 3090"] > 1.4 and 1.05 < gain["H200"] < 1.25


def test_dense_costs_at_most_three_percent_more_than_its_product():
    for name in ("H200", "A100"):
        device = costs.DEVICES[name]
        product = 16384 * 8192 * 2048 / device.half / costs.SUSTAINED
        for which in PRODUCTS:
            assert costs.predict(device, which, (8192, 2048), 8192 * 512, 16384, "bf16")["dense"] < 1.03 * product


def break_even(device, product, precision, shape=(8192, 2048), tokens=16384):
    """Least sparsity, to a tenth of a percent, from which the gather kernel is predicted to be as fast as dense."""
    for permille in range(1000):
        nnz = round(shape[0] * shape[1] * (1 - permille / 1000))
        seconds = costs.predict(device, product, shape, nnz, tokens, precision)
        if seconds["triton"] <= seconds["dense"]:
            return permille / 1000
    return None


def test_the_break_even_in_the_documentation_is_what_the_model_says():
    page = (ROOT / "docs" / "gpu.md").read_text()
    for name, device in costs.DEVICES.items():
        cells = []
        for precision in ("bf16", "tf32", "fp32"):
            found = [break_even(device, p, precision) for p in PRODUCTS]
            cells.append(" / ".join("-" if f is None else f"{100 * f:.1f}" for f in found))
        assert f"| {name} | {' | '.join(cells)} |" in page


# -- what is told ------------------------------------------------------------------------------------------------------


def test_explain_tells_what_runs_under_autocast(monkeypatch):
    model = nn.Sequential(vspdf.SparseLinear(Pattern.random((64, 64), 0.9), torch.zeros(410)))
    asked = []
    monkeypatch.setattr(ops, "explain", lambda pattern, tokens, dtype, *rest: asked.append(dtype) or "")
    vspdf.explain(model, tokens=8)
    with torch.autocast("cpu", torch.bfloat16):
        vspdf.explain(model, tokens=8)
        vspdf.explain(model[0].pattern, tokens=8)
        vspdf.explain(model, tokens=8, dtype=torch.float16)
    assert asked == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float16]
