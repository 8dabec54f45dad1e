"""What is importable, how light it is, and that imports only run downwards."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vspdf

ROOT = Path(__file__).resolve().parents[1]

# Highest first. A module imports only from levels below its own; what shares a level shares nothing.
LEVELS = [
    {"cli"},
    {"cli_simulate", "cli_tasks", "cli_programs", "cli_compare", "cli_bench"},
    {"compare"},
    {"evidence_page"},
    {"evidence"},
    {"plan", "report", "worker"},
    {"study", "calibrate"},
    {"bench", "bench_gpu", "bleu", "harness"},
    {"train", "convert", "callback"},
    {"hub", "pairs", "phases", "records"},
    {"evaluate", "checkpoint", "foreign", "generate", "info", "schedule"},
    {"data", "sparse", "tasks"},
    {"corpora"},
    {"model", "kernels.ops", "tokenizer"},
    {"kernels.dispatch", "kernels.dense"},
    {"kernels.gpu_24"},
    {"kernels.cpu", "kernels.reference", "kernels.gpu", "kernels.gpu_model"},
    {"kernels.gpu_kernels"},
    {"simulator.validate"},
    {"simulator.dispatch"},
    {"simulator.runs"},
    {"simulator.estimates"},
    {"simulator.step", "simulator.layer_events"},
    {"simulator.layer"},
    {"simulator.wafer", "simulator.pictures"},
    {"simulator.programs"},
    {"simulator.programs.streaming"},
    {
        "simulator.programs.collectives",
        "simulator.programs.spmm",
        "simulator.programs.matmul",
        "simulator.programs.matvec",
    },
    {"simulator.programs.common"},
    {"simulator.fabric"},
    {"simulator.machine"},
    {"pattern", "config", "cache", "allocator", "svg", "page", "files", "console"},
    {"_C"},
    {"ledger", "cerebras"},
    {"errors"},
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}


def sources():
    files = {f"{path.stem}": path for path in (ROOT / "vspdf").glob("*.py") if path.stem != "__init__"}
    files |= {f"kernels.{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}
    files |= {f"simulator.{path.stem}": path for path in (ROOT / "simulator").glob("*.py") if path.stem != "__init__"}
    programs = {path.stem: path for path in (ROOT / "simulator" / "programs").glob("*.py")}
    files |= {f"simulator.programs.{stem}".removesuffix(".__init__"): path for stem, path in programs.items()}
    return files


def imports(path):
    """Modules of vspdf that a file imports anywhere, for type checkers alone excepted."""
    found = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node):
            if ast.unparse(node.test) != "TYPE_CHECKING":
                self.generic_visit(node)

        def visit_Import(self, node):
            found.update(name.name.removeprefix("vspdf.") for name in node.names if name.name.startswith("vspdf."))

        def visit_ImportFrom(self, node):
            assert node.level == 0, f"{path}: relative import"
            package, _, module = (node.module or "").partition(".")
            if package == "vspdf":
                names = {f"{module}.{name.name}".lstrip(".") for name in node.names}
                found.update(name if name in LEVEL else module for name in names)

    Visitor().visit(ast.parse(path.read_text()))
    return found - {""}


@pytest.mark.parametrize("module", sorted(sources()))
def test_imports_run_downwards(module):
    assert module in LEVEL, f"{module} has no level yet"
    for other in imports(sources()[module]):
        assert other in LEVEL, f"{module} imports {other}, which has no level"
        assert LEVEL[other] > LEVEL[module], f"{module} imports {other}, which is not below it"


def run(code, **how):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **how)


def test_import_is_light():
    result = run("import vspdf, sys; print(sorted({'torch', 'numpy', 'omegaconf', 'rich'} & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("name", [name for name in vspdf.__all__ if name != "__version__"])
def test_every_public_name_is_there_and_documented(name):
    public = getattr(vspdf, name)
    assert public.__doc__ and name in dir(vspdf)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match=r"module 'vspdf' has no attribute 'spars'"):
        vspdf.spars  # noqa: B018
    assert vspdf.__version__[0].isdigit()


FROM_THE_ROOT = """
import importlib.util, torch, transformers
config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8)
model = transformers.GPT2LMHeadModel(config)
tokens = torch.arange(8)[None]
assert model(tokens, labels=tokens).loss > 0
found = importlib.util.find_spec("kernels")
assert found is None or found.origin is None, found  # a folder at most, no package

import vspdf
vspdf.sparsify(model, 0.5)
model(tokens, labels=tokens).loss.backward()
"""


@pytest.mark.parametrize("built", [True, False], ids=["extension built", "not built"])
def test_transformers_works_from_the_repository_root(built):
    """The name `kernels` is Hugging Face's: the folder of that name here must not pass for it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = FROM_THE_ROOT if built else "import sys; sys.modules['vspdf._C'] = None\n" + FROM_THE_ROOT
    result = run(code, cwd=ROOT)
    assert result.returncode == 0, result.stderr


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["vspdf._C"] = None  # as if it had not been built
import torch, vspdf
pattern = vspdf.Pattern.random((6, 8), 0.5)
x, values = torch.randn(3, 8), torch.randn(pattern.nnz)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = vspdf.sparse_linear(x, values, pattern)
weight = torch.zeros(6, 8).masked_scatter(pattern.mask(), values)
torch.testing.assert_close(y, x @ weight.T)
assert "run dense: the compiled kernels are missing" in str(caught[0].message), caught
try:
    vspdf.sparse_linear(x, values, pattern, backend="cpu")
except vspdf.BackendUnavailable as error:
    assert "reinstall vspdf with a C++17 compiler" in str(error)
else:
    raise AssertionError
"""


def test_without_the_extension_auto_runs_dense_and_says_so():
    result = run(WITHOUT_EXTENSION)
    assert result.returncode == 0, result.stderr
