"""What people read first: links lead somewhere, the site builds and stands alone, examples and the notebook run."""

import functools
import http.server
import json
import os
import pickletools
import re
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from vspdf.sparsity.layer import sparse_layers

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT)
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md"))
)


# -- links ------------------------------------------------------------------------------------------------------------


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(path):
    """As GitHub and mkdocs both make them, for headings of plain words."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code((ROOT / page).read_text())):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = ROOT / page.parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path), f"{page}: {target} has no such heading"


def test_commands_in_pages_exist():
    """Every `vspdf VERB` that a page names is a verb."""
    from typer.main import get_command

    from vspdf.cli.app import app

    verbs = set(get_command(app).commands)
    for page in PAGES:
        for verb in re.findall(r"(?:^    |`|bin/|\$ )vspdf ([a-z]+)\b", (ROOT / page).read_text(), flags=re.MULTILINE):
            assert verb in verbs, f"{page}: vspdf {verb}"


def test_the_program_on_the_fabric_runs_as_printed():
    """The page's program squares on one PE and stores on the next."""
    import numpy as np

    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "simulator-programs.md").read_text(), re.DOTALL)
    names = {}
    exec(program, names)
    np.testing.assert_array_equal(names["squared"], names["data"] ** 2)
    assert 200 < names["cycles"] < 400  # a vector of 100 twice, and start-ups


def test_the_layer_that_help_names_is_one_of_the_quick_start():
    from vspdf.cli.simulate import simulate_layer
    from vspdf.interop import load_config
    from vspdf.model import GPT
    from vspdf.plan.models import model_and_batch

    (name,) = re.findall(r"--run runs/quickstart --layer (\S+?)`", simulate_layer.__doc__)
    assert load_config("quickstart").run_dir == "runs/quickstart"
    shape, _ = model_and_batch("quickstart")
    assert name in dict(GPT(shape).named_modules())


def test_tables_are_those_of_the_results_that_are_kept(tmp_path):
    """Of studies and of benchmarked machines: `python docs/make_figures.py evidence performance` fills them in."""
    script = runpy.run_path(str(ROOT / "docs" / "make_figures.py"))
    for page in script["PAGES"]:
        same = script["filled"](page) == page.read_text()
        assert same, f"{page.name}: run docs/make_figures.py evidence performance"
    places = {page.name: {(kind, name) for _, kind, name, _ in script["PLACE"].findall(page.read_text())}
              for page in script["PAGES"]}  # fmt: skip
    assert places["evidence.md"]
    assert ("bench", "layers-of-machines") in places["README.md"] and len(places["performance.md"]) >= 8
    for machine in (ROOT / "benchmarks" / "results").glob("*.json"):  # a figure that is changed is a page that differs
        body = json.loads(machine.read_text())
        body["sections"]["layers"]["rows"] = [
            {**row, "ratio_to_dense": 2 * row["ratio_to_dense"]} if "ratio_to_dense" in row else row
            for row in body["sections"]["layers"]["rows"]
        ]
        (tmp_path / machine.name).write_text(json.dumps(body))
    script["machines"].__globals__["MACHINES"] = tmp_path
    assert script["filled"](ROOT / "README.md") != (ROOT / "README.md").read_text()


# -- the site ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (extra docs): the site is not built")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_loads_nothing_from_the_network(site):
    pages = list(site.rglob("*.html"))
    assert {"index.html", "quickstart.html", "method.html", "api.html"} <= {page.name for page in pages}
    loads = r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*rel=\"?stylesheet[^>]*href=\"?(?:https?:)?//"
    for page in pages:
        assert not re.search(loads, page.read_text()), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text()), sheet


def test_the_api_reference_has_docstrings_and_signatures(site):
    page = (site / "api.html").read_text()
    for words in (
        "Replaces linear layers of any model",
        "Linear layer that multiplies only the weights its pattern keeps",
    ):
        assert words in page
    assert page.count("<b>Parameters") + page.count("Parameters:") > 8


@pytest.fixture(scope="module")
def address(site):
    """Where a server of our own offers the site."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_site_in_chromium(browser, address, width, scheme):
    heard, asked = [], []
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    for name in ("index", "method", "flops", "api", "performance"):
        page.goto(f"{address}/{name}.html")
        root = "document.documentElement"
        assert page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth"), f"{name} is wider than the screen"
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)"), name
    assert heard == [] and not [url for url in asked if not url.startswith((address, "data:"))]
    page.close()


# -- examples ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs a file of examples/ in this process; returns what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def held_out_losses(text):
    return [
        float(loss)
        for loss in re.findall(r"held-out loss[a-z ]* (\d+\.\d+)|at the end (\d+\.\d+)", text)
        for loss in loss
        if loss
    ]


def test_sparsify_gpt2_is_better_after_its_last_phase_than_before_the_switch(example):
    out = example("sparsify_gpt2.py", 12)
    assert re.search(r"step 8: held-out loss .*, 426,700 weights\nstep 12: held-out loss .*, 3,257,856 weights", out)
    _, before, after = held_out_losses(out)
    assert after < before
    text = (ROOT / "examples" / "sparsify_gpt2.py").read_text()
    assert len(text[text.index("model = ") : text.index("    if step + 1 in")].splitlines()) <= 10, (
        "ten lines were promised"
    )


def test_the_pruned_model_says_the_same(example):
    out = example("generate_pruned.py")
    assert "28 sparse layers keep 30% of 11,796,480 weights" in out and "the same 32 tokens: True" in out


@pytest.mark.parametrize("page", ["README.md", "docs/own-model.md"])
def test_the_loop_that_people_copy_makes_the_model_better_after_the_switch(page, capsys):
    """Its code as it stands, with a model and batches put in. At the sparse stage's rate it ends worse."""
    transformers = pytest.importorskip("transformers")
    code = re.search(r"```python\n(import torch, vspdf.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)[1]
    assert "model = ..." in code and "[(0.9, 60, 3e-3), (0.0, 30, 3e-4)]" in code
    code = (
        re.sub(r"model = \.\.\..*", "model = mine", code)
        .replace("(0.9, 60,", "(0.9, 120,")
        .replace("(0.0, 30,", "(0.0, 60,")
    )
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 192, "n_head": 2, "n_positions": 64, "vocab_size": 256}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = transformers.GPT2LMHeadModel(config)
    text = torch.tensor(list(Path(pickletools.__file__).read_bytes()))
    rows = text[: len(text) // 512 * 512].view(-1, 8, 64)
    *rows, last = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    losses = []

    def batches():
        for step, row in enumerate(rows[:180]):
            if step == 120:
                losses.append(held_out(model, last))
            yield {"input_ids": row, "labels": row}

    exec(code, {"mine": model, "batches": batches()})
    losses.append(held_out(model, last))
    assert losses[1] < losses[0] and not sparse_layers(model)


@torch.no_grad()
def held_out(model, row):
    return float(model(input_ids=row, labels=row).loss)


def test_plan_train_report(example, tmp_path):
    settings = ("model={n_layer: 2, d_model: 128, n_head: 2, sequence_length: 16}", "phases=[{steps: 12}]")
    out = example("plan_train_report.py", tmp_path, *settings, "train.eval_tokens=512", "train.sample_tokens=0")
    assert "variable: 12 steps at 0.9" in out and f"wrote {tmp_path}/comparison.html" in out
    assert "All runs read the same tokens in the same order" in (tmp_path / "comparison.html").read_text()


def test_moving_masks(example):
    out = example("moving_masks.py", 8).splitlines()
    assert [line.split(":")[0] for line in out] == ["static", "set", "rigl", "gmp"]
    assert all("at a sparsity of 0.75" in line for line in out)
    assert "coverage" not in out[0] and all("coverage" in line for line in out[1:3])


def test_estimate_cs2(example, tmp_path):
    out = example("estimate_cs2.py")
    assert out.startswith("1,316M parameters, 512 sequences of 2048 tokens a step")
    assert [line for line in out.splitlines() if "sparsity" in line] and out.count("x faster (") == 2
    shape = lambda text: re.sub(r"[\d.,]+|bound by .*", "N", text)  # noqa: E731
    page = (ROOT / "docs" / "examples.md").read_text()
    assert all(f"    {shape(line)}" in shape(page) for line in out.splitlines()), "the page shows another output"
    body = {"model_type": "gpt_neox", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    body |= {"num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 32}
    (tmp_path / "config.json").write_text(json.dumps(body))
    assert ", 8 sequences of 32 tokens a step" in example("estimate_cs2.py", tmp_path, 8)


def test_the_notebook(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: the notebook is not run")
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "outputs are committed: clear them"
    changed = [cell for cell in code if "STEPS, SWITCH = 120, 80" in cell.source]
    changed[0].source = changed[0].source.replace("120, 80", "12, 8")
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "sparse 0.9: 62,522 steps" in printed and "64.18% fewer FLOPs" in printed and "report.html" in printed
    before, after = held_out_losses(printed)
    assert after < before
    figures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(figures) == 2
