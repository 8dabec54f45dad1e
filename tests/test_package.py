"""What is importable, how light it is, and who may take whom."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vspdf

ROOT = Path(__file__).resolve().parents[1]

# A wing, and what it may take besides the words and itself. Held by the test below; told in CONTRIBUTING.md.
MAY_TAKE = {
    "draw": (),
    "parallel": (),
    "kernels": (),
    "sparsity": ("kernels",),
    "simulator": ("draw",),
    "config": ("sparsity.schedule",),
    "data": ("config",),
    "runs": ("sparsity", "config"),
    "bench": ("kernels", "sparsity"),
    "evaluate": ("parallel", "kernels.hardware", "kernels.tuning", "sparsity.layer", "config", "data"),
    "interop": ("kernels.hardware", "sparsity", "config", "data", "runs"),
    "train": ("draw.words", "parallel", "kernels", "sparsity", "config", "data", "evaluate", "runs", "interop"),
    "plan": (
        "parallel.environment", "parallel.traffic", "sparsity.schedule", "config", "runs", "bench", "simulator",
        "interop",
    ),
    "report": ("draw", "config", "runs", "simulator"),
    "compare": (
        "draw.words", "kernels.hardware", "config", "data", "evaluate", "runs", "interop", "train", "report",
    ),
    "__main__": ("cli",),
    "cli": ("draw", "parallel", "kernels", "sparsity", "simulator", "config", "data", "runs", "bench", "evaluate",
            "interop", "train", "plan", "report", "compare"),
}  # fmt: skip
# Words that everyone may use, each below those that take it.
WORDS = {
    "errors": (), "_C": (), "shapes": ("errors",), "files": ("errors",), "mask_forms": ("errors",),
    "mask_tensors": ("errors",), "pattern": ("errors", "mask_forms", "mask_tensors"), "gemm": (), "onlookers": (),
    "attention": ("gemm", "onlookers"),
    "activation": ("_C", "errors", "onlookers"), "ledger": ("errors", "shapes"),
    "rotary": ("shapes",), "cache": (),
    "model": ("errors", "shapes", "ledger", "activation", "attention", "rotary", "cache"),
}  # fmt: skip

# Doors opened by name, against the rule and on purpose: whoever has a mask may read one, and files are interop's.
DOORS = {("pattern", "interop.mask_files"), ("sparsity.from_files", "interop.mask_files")}


def sources():
    """Every module by its dotted name below vspdf, and its file."""
    found = {}
    for root, prefix in ((ROOT / "vspdf", ()), (ROOT / "kernels", ("kernels",)), (ROOT / "simulator", ("simulator",))):
        for path in root.rglob("*.py"):
            parts = (*prefix, *path.relative_to(root).with_suffix("").parts)
            if not prefix and parts[0] in ("kernels", "simulator", "configs", "studies", "__init__"):
                continue  # links to what is walked for itself
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def imports(path):
    """Modules of vspdf that a file imports anywhere, lazy imports counted, for type checkers alone excepted."""
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
                found.update(name if name in SOURCES or name == "_C" else module for name in names)

    Visitor().visit(ast.parse(path.read_text()))
    return found - {""}


def allowed(module, other):
    wing, words = module.split(".")[0], other.split(".")[0]
    if words in WORDS:
        return words in WORDS[wing] if wing in WORDS else True
    return wing == words or any(f"{other}.".startswith(f"{name}.") for name in MAY_TAKE.get(wing, ()))


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_a_wing_takes_only_what_it_may(module):
    assert module.split(".")[0] in {**MAY_TAKE, **WORDS}, f"{module} is in no wing"
    wrong = sorted(other for other in imports(SOURCES[module]) if not allowed(module, other))
    assert not wrong, f"{module} may not take {', '.join(wrong)}"


def test_contributing_tells_the_table_that_is_held():
    """As lists of names; of the command line, which may take all, in words."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("| wing | may take", 1)[1].split("\n\n", 1)[0]
    rows = dict(line.strip("| ").split(" | ") for line in text.splitlines()[2:])
    told = {
        wing: () if names == "nothing" else tuple(names.split(", "))
        for wings, names in rows.items()
        for wing in wings.replace("\\", "").split(", ")
    }
    told["cli"] = tuple(wing for wing in MAY_TAKE if wing not in ("cli", "__main__"))
    assert told == MAY_TAKE


def test_what_is_imported_by_name_is_of_the_same_wing_or_a_known_door():
    named = re.compile(r'import_module\(\s*"vspdf\.([\w.]+)"')
    found = {(module, other) for module, path in SOURCES.items() for other in named.findall(path.read_text())}
    assert {(module, other) for module, other in found if module.split(".")[0] != other.split(".")[0]} == DOORS


def test_no_circle_of_modules():
    graph = {module: imports(path) & SOURCES.keys() for module, path in SOURCES.items()}
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    "module, heavy",
    [("sparsity", ("omegaconf", "yaml", "typer")), ("sparsity.surgery", ("omegaconf", "yaml", "typer")),
     ("sparsity.schedule", ("torch",)), ("config", ("torch", "typer")), ("plan", ("torch",)),
     ("train", ("vspdf.simulator", "vspdf.plan", "vspdf.report", "vspdf.cli"))],
    ids=lambda found: found if isinstance(found, str) else "",
)  # fmt: skip
def test_what_a_wing_does_not_bring_along(module, heavy):
    result = run(f"import vspdf.{module}, sys; print(sorted(set({heavy!r}) & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stderr


# A program for the fabric is read as one: its routes, its code and the run that both serve.
LONG_FUNCTIONS = {
    "simulator.events.programs.matmul.summa", "simulator.events.programs.matvec.mesh_gemv",
    "simulator.events.programs.spmm.emit_spmm", "simulator.events.programs.spmm._grid",
    "simulator.events.programs.streaming.gradient_code",
}  # fmt: skip


def lines_of_code(function):
    """Its lines, those of a docstring not counted: what they say of shapes and errors is not to be saved on."""
    first = function.body[0]
    doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if doc else 0)


def test_files_and_functions_are_short():
    folders = ("vspdf", "kernels", "simulator", "tests", "benchmarks", "examples", "docs")
    files = {str(path.relative_to(ROOT)): path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    files |= {str(path.relative_to(ROOT)): path for path in (ROOT / "csrc").iterdir()}
    assert {name: n for name, path in files.items() if (n := len(path.read_text().splitlines())) > 450} == {}
    functions = {
        f"{module}.{node.name}": lines_of_code(node)
        for module, path in SOURCES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: n for name, n in functions.items() if n > 60 and name not in LONG_FUNCTIONS} == {}
    assert {name for name in LONG_FUNCTIONS if functions.get(name, 0) <= 60} == set()


def run(code, **how):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **how)


def test_import_is_light():
    result = run("import vspdf, sys; print(sorted({'torch', 'numpy', 'omegaconf', 'rich'} & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stderr


DRAWS = """
import torch, vspdf
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64))
state = torch.get_rng_state()
for name in vspdf.__all__:
    getattr(vspdf, name)
vspdf.sparsify(model, 0.75)
model(torch.ones(64, 64)).sum().backward()
vspdf.evolve(model, None, 0.3)
vspdf.densify(model)
assert torch.equal(torch.get_rng_state(), state)
"""


def test_nothing_draws_from_torchs_random_numbers():
    result = run(DRAWS)  # names are imported when first asked for, within somebody's seeded script
    assert result.returncode == 0, result.stderr


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
