"""Reports: what the page says is what the runs did, bad input is one line, and a browser shows it without complaint."""

import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from vspdf.config import loading
from vspdf.draw import svg
from vspdf.errors import UserError
from vspdf.plan import cs2
from vspdf.report import comparison, run_page, run_parts, weights
from vspdf.runs import folder as runs_folder
from vspdf.simulator import machine
from vspdf.simulator.events.layer import corner
from vspdf.train.trainer import train

SWITCH = "phases=[{name: sparse, sparsity: 0.9, steps: 12}, {steps: 8}]"
THREE = "phases=[{name: sparse, sparsity: 0.9, steps: 6}, {name: half, sparsity: 0.5, steps: 4}, {steps: 2}]"
MOVING = "phases=[{name: moving, sparsity: 0.75, steps: 9, algorithm: set, update: {freq: 3}}, {steps: 3}]"
PRUNED = (
    "phases=[{layers: {'h.*.mlp.*': 0.9}, steps: 3}, {name: pruned, sparsity: 0.0, schedule: linear, "
    "sparsity_end: 0.6, algorithm: gmp, steps: 6, update: {steps: [0, 2, 4]}}]"
)
HALF = "phases=[{name: sparse, sparsity: 0.9, steps: 4}, {name: half, sparsity: 0.5, steps: 4}]"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_config):
    """Finished runs: two seeds of a sparse and of a dense arm, and others by name."""
    folder = tmp_path_factory.mktemp("runs")
    path = tiny_config(folder)

    def run(name, *overrides):
        train(loading.load(path, [f"run_dir={folder}/{name}", "train.eval_every=3", *overrides]))
        cs2.compare(folder / name)

    for seed in (0, 1):
        run(f"sparse-{seed}", SWITCH, "name=variable", f"seed={seed}", "train.measure_dense=2", "train.sample_tokens=8")
        run(f"dense-{seed}", "phases=[{steps: 16}]", "name=dense", f"seed={seed}")
    run("three", THREE)
    run("moving", MOVING)
    run("half", HALF)
    run("pruned", PRUNED, "train.measure_dense=1")
    return folder


@pytest.fixture
def copy(runs, tmp_path):
    """A run that a test may damage."""

    def make(name):
        shutil.copytree(runs / name, tmp_path / name)
        return tmp_path / name

    return make


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def text(page):
    """Words of a page, tags dropped."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", page.split("<body>")[1].split("<script>")[0])).split())


def page_of(*folders):
    return run_page.render(runs_folder.read(folders))


# -- one run ----------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_summary(runs):
    summary = json.loads((runs / "sparse-0" / "summary.json").read_text())
    words = text(page_of(runs / "sparse-0"))
    assert f"{summary['val_loss']:.4f} validation loss" in words
    assert f"{1 - summary['flops']['executed'] / summary['flops']['dense']:.1%} of all FLOPs really skipped" in words
    for phase in summary["phases"]:
        for column, flops in phase["flops"].items():
            assert f"{flops:.4g}" in words, column
    assert f"{summary['phases'][0]['speedup']['median']:.2f}x step speed-up, sparse" in words
    assert summary["corpus"]["sha256"] in words and summary["hardware"]["cpu"] in words
    assert "finished, 20 steps" in words and "Text it wrote after 'sparse'" in words
    for pattern in runs_folder.read([runs / "sparse-0"])[0].patterns.values():
        assert f"{pattern.sparsity:.2%}" in words
    for name, fraction in summary["flops_saved_fraction_by_convention"].items():
        assert f"{name} {fraction:.1%}" in words


def test_the_file_stands_alone(runs):
    for page in (page_of(runs / "sparse-0"), page_of(runs / "sparse-0", runs / "dense-0")):
        assert not re.search(r"https?:|//[a-z]|<link|@import|url\(", re.sub(r'base64,[^"]*', "", page))
        assert all(source.startswith("data:image/png") for source in re.findall(r'(?:src|href)="([^"]*)"', page))
        assert "default-src 'none'" in page


def test_the_wafer_at_work_on_the_runs_own_mask(runs):
    (run,) = runs_folder.read([runs / "sparse-0"])
    page = page_of(runs / "sparse-0")
    name, pattern = next(iter(run.patterns.items()))
    part = corner(machine.load(), pattern.mask().numpy())
    assert f"{name} at work, event by event" in page and f"({part.density:.1%} kept)" in page
    assert f"{part.cycles:,} cycles, {part.dense_cycles:,} with every weight kept" in page
    assert f'alt="heat map of busy over {part.region.width} x {part.region.height} PEs' in page
    assert f'aria-label="time line of 32 PEs over {part.region.cycles:,} cycles"' in page
    row = run.summary["comparison"][0]
    assert f"{row['cs2']['low']:.2f}x to {row['cs2']['high']:.2f}x this run's" in text(page)
    several = page_of(runs / "sparse-0", runs / "dense-0")  # the estimates, but nothing that takes a while
    assert "at work" not in several and "this run's" in text(several) and "On a CS-2" not in page_of(runs / "dense-0")


def test_phases_of_an_unfinished_run_agree_with_those_of_the_finished_one(copy):
    folder = copy("sparse-0")
    done = runs_folder.read([folder])[0].phases
    (folder / "summary.json").unlink()
    (run,) = runs_folder.read([folder])
    timing = {"seconds", "step_seconds_median"}
    for whole, so_far in zip(done, run.phases, strict=True):
        assert {k: v for k, v in so_far.items() if k not in timing} == {
            k: v for k, v in whole.items() if k in so_far and k not in timing
        }
        assert so_far["seconds"] == pytest.approx(whole["seconds"])


def test_sparsities_that_change_and_those_of_layers_are_told_as_they_are(copy):
    folder = copy("pruned")
    layers = 0.9 * 2 / 3  # the MLPs have two thirds of the weights
    first, pruned = json.loads((folder / "summary.json").read_text())["phases"]
    assert first["name"] == "sparse layers" and first["sparsity"] == pytest.approx(layers)
    assert pruned["sparsity"] == 0 and [stage["sparsity"] for stage in pruned["stages"]] == [0, 0.3, 0.6]
    for file in ("no file", "summary.json"):  # finished, and not
        (folder / file).unlink(missing_ok=True)
        (run,) = runs_folder.read([folder])
        assert [row[2] for row in run_parts.rows(run)] == [f"{layers:.4g}", "0 to 0.6"]
        assert "sparse layers alone, 1/(1 − sparsity) 1.43x" in text(page_of(folder))  # of 0.3, the mean of its steps


def test_an_unfinished_run_says_so(copy):
    folder = copy("sparse-0")
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints")
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(metrics[:7]) + '\n{"step": 8, "pha')  # a line half written
    words = text(page_of(folder))
    assert "not finished: step 7 of 20" in words
    assert words.count("Not known before the first checkpoint.") == 2
    (folder / "metrics.jsonl").unlink()
    assert "no step was logged yet" in text(page_of(folder))


@pytest.mark.parametrize("name", ["sparse-0", "three", "half"])
def test_revived_weights(runs, name):
    run = runs_folder.read([runs / name])[0]
    kept, revived = weights.magnitudes(run.checkpoint / "model.safetensors", run.patterns)
    tensors = load_file(run.checkpoint / "model.safetensors")
    sizes = [0, 0]
    for layer, pattern in run.patterns.items():
        mask = pattern.mask()
        if f"{layer}.weight" in tensors:
            dense = tensors[f"{layer}.weight"]
            now = np.ones(pattern.shape, dtype=bool)
        else:  # still sparse: values where the later pattern has weights
            bits = np.unpackbits(tensors[f"{layer}.pattern"].numpy(), count=pattern.numel, bitorder="little")
            now = bits.astype(bool).reshape(pattern.shape)
            dense = tensors[f"{layer}.values"].new_zeros(pattern.shape)
            dense[now] = tensors[f"{layer}.values"]
        assert np.isin(dense[mask].abs().numpy(), kept).all()
        assert np.isin(dense[now & ~mask.numpy()].abs().numpy(), revived).all()
        sizes[0] += pattern.nnz
        sizes[1] += int(now.sum()) - pattern.nnz
    assert [kept.size, revived.size] == sizes and 0 < np.median(revived) < np.median(kept)
    assert f"{revived.size:,} revived and {kept.size:,} kept weights" in text(page_of(runs / name))


def test_large_layers_are_sampled_all_over_their_rows():
    taken = np.concatenate([np.arange(50_000)[rows] for rows in weights.sample(50_000, 1000)])
    assert len(taken) == len(set(taken)) <= weights.SAMPLED / 1000
    assert taken[0] == 0 and taken[-1] == 49_999 and np.diff(taken).max() < 10_000
    assert [np.arange(9)[rows].size for rows in weights.sample(9, 3)] == [9]


def test_a_dense_run_has_no_masks(runs):
    words = text(page_of(runs / "dense-0"))
    assert "every weight was trained from the first step" in words and "Revived" not in words


def test_names_are_escaped(copy, older):
    folder = older(copy("half"))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("name: half", "name: '<script>alert(1)</script>'"))
    (folder / "summary.json").unlink()
    page = page_of(folder)
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_all_of_the_training_loss_is_within_the_axis(runs):
    (run,) = runs_folder.read([runs / "sparse-0"])
    for chart in run_page._losses(comparison.arms_of([run]))["charts"]:
        inside = next(chart.iter("svg")).find("svg")
        top, bottom = svg.TOP, svg.HEIGHT - svg.BOTTOM
        (training,) = (path for path in inside.iter("path") if "faint" in path.get("class"))
        heights = [float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", training.get("d"))]
        assert len(heights) == 20 and all(top <= y <= bottom for y in heights)


# -- several runs -----------------------------------------------------------------------------------------------------


def test_seeds_are_arms_and_losses_are_compared_at_equal_budgets(runs):
    folders = [runs / name for name in ("dense-0", "dense-1", "sparse-0", "sparse-1")]
    read = runs_folder.read(folders)
    assert [(arm.name, [run.label for run in arm.runs]) for arm in comparison.arms_of(read)] == [
        ("dense (2 runs)", ["dense-0", "dense-1"]),
        ("variable (2 runs)", ["sparse-0", "sparse-1"]),
    ]
    words = text(page_of(*folders))
    evaluated = [[line for line in lines(folder) if "val_loss" in line] for folder in folders]
    budget = min(body[-1]["flops"]["executed"] for body in evaluated)
    losses = []
    for body in evaluated:  # by hand: between the two evaluations around the budget
        i = next(i for i, line in enumerate(body) if line["flops"]["executed"] >= budget)
        (a, b) = ((line["flops"]["executed"], line["val_loss"]) for line in (body[max(i - 1, 0)], body[i]))
        losses.append(b[1] if a == b else a[1] + (b[1] - a[1]) * (budget - a[0]) / (b[0] - a[0]))
    sparse = losses[2:]
    mean, (low, high) = np.mean(sparse), comparison.interval(sparse)
    assert f"{mean:.4f} {low:.4f} to {high:.4f}" in words
    pairs = [losses[2] - losses[0], losses[3] - losses[1]]
    mean, (low, high) = np.mean(pairs), comparison.interval(pairs)
    verdict = "not told apart" if low <= 0 <= high else "higher" if low > 0 else "lower"
    assert f"{mean:+.4f} {low:+.4f} to {high:+.4f} {verdict}" in words
    orders = [json.loads((folder / "manifest.json").read_text())["order"] for folder in folders]
    assert orders[0] == orders[2] != orders[1] == orders[3]
    assert f"{orders[0][:16]} dense-0, sparse-0" in words and f"{orders[1][:16]} dense-1, sparse-1" in words
    assert "All runs read the same tokens in the same order" in text(page_of(folders[0], folders[2]))


def test_no_loss_is_made_up_outside_the_evaluations(runs):
    (run,) = runs_folder.read([runs / "dense-0"])
    points = comparison.evaluated(comparison.curve(run))
    x = [point["tokens"] for point in points]
    assert comparison.at(points, comparison.TOKENS, x[0] - 1) is None
    assert comparison.at(points, comparison.TOKENS, x[-1] + 1) is None
    assert comparison.at(points, comparison.TOKENS, x[1]) == run.evaluations[1]["val_loss"]


def test_what_cannot_be_compared_is_not(runs, copy, older):
    folder = older(copy("dense-0"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer"]["name"] = "other"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    words = text(page_of(runs / "sparse-0", folder))
    assert "Validation bits a byte, interpolated" in words and "nats" not in words.split("Figures by phase")[0]
    manifest["corpus"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    words = text(page_of(runs / "sparse-0", folder))
    assert "The corpora differ, so losses are not compared." in words and "at equal tokens" not in words


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(vspdf, runs, tmp_path, monkeypatch):
    status, out, _ = vspdf("report", runs / "half")
    assert status == 0 and out == f"wrote {runs}/half/report.html\n"
    assert (runs / "half" / "report.html").read_text() == page_of(runs / "half")
    monkeypatch.chdir(tmp_path)
    assert vspdf("report", runs / "half", runs / "dense-0")[1] == "wrote report.html\n"
    assert "2 runs" in (tmp_path / "report.html").read_text()
    assert vspdf("report", runs / "half", "--output", "mine.html")[0] == 0 and (tmp_path / "mine.html").is_file()


def no_run(folder):
    (folder / "config.yaml").unlink()
    return [folder]


def broken_line(folder):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 3', '"step" 3'))
    return [folder]


def line_without_loss(folder):
    path = folder / "metrics.jsonl"
    path.write_text(re.sub(r'("step": 2.*?)"loss"', r'\1"lost"', path.read_text()))
    return [folder]


def cut(name):
    def damage(folder):
        (path,) = folder.glob(name)
        path.write_bytes(path.read_bytes()[:100])
        return [folder]

    return damage


def without_manifest(folder):
    (folder / "manifest.json").unlink()
    return [folder]


BAD = {
    "no such directory": (lambda folder: [folder.with_name("haff")], "no run directory '{parent}/haff'. Did you mean"),
    "not a run": (no_run, "'{folder}' holds no run: expected a directory that `vspdf train` filled."),
    "one level up": (lambda folder: [folder.parent], "`vspdf train` filled. Did you mean '{folder}'?"),
    "a file": (lambda folder: [folder / "config.yaml"], "holds no run"),
    "twice": (lambda folder: [folder, folder], "'{folder}' is given twice."),
    "broken line": (broken_line, "{folder}/metrics.jsonl, line 3 is broken: expected a JSON object"),
    "line without loss": (line_without_loss, "{folder}/metrics.jsonl, line 2 is broken: it has no 'loss'."),
    "broken summary": (cut("summary.json"), "{folder}/summary.json is no JSON"),
    "broken patterns": (cut("patterns.npz"), "{folder}/patterns.npz is damaged"),
    "broken checkpoint": (cut("checkpoints/*/model.safetensors"), "model.safetensors cannot be read"),
    "no manifest": (without_manifest, "{folder}/manifest.json is missing: the run directory is not whole."),
    "output in no directory": (lambda folder: [folder, "--output", folder / "no" / "x"], "No such file or directory"),
    "output is a directory": (lambda folder: [folder, "--output", folder / "checkpoints"], "Is a directory"),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(vspdf, copy, damage, message):
    folder = copy("half")
    status, out, err = vspdf("report", *damage(folder))
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("vspdf: error: ")
    assert message.format(folder=folder, parent=folder.parent) in err
    assert not list(folder.parent.rglob("*.draft"))


def test_no_runs_at_all():
    with pytest.raises(UserError, match="at least one"):
        runs_folder.read([])


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_chromium(browser, runs, tmp_path, width, scheme):
    for i, names in enumerate((["sparse-0"], ["sparse-0", "sparse-1", "dense-0", "dense-1", "three"])):
        path = run_page.write([runs / name for name in names], tmp_path / f"{i}.html")
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        heard, asked = [], []
        page.on("console", lambda message, heard=heard: heard.append(message.text))
        page.on("pageerror", lambda error, heard=heard: heard.append(str(error)))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(Path(path).as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        page.get_by_role("button", name="Copy table").click()
        assert page.get_by_role("button", name="Copied").count() == 1
        assert page.evaluate("getSelection().toString()").startswith("run\tphase\tsparsity")
        root = "document.documentElement"
        assert page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth"), "the page is wider than the screen"
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (colour == "rgb(255, 255, 255)") == (scheme == "light")
        outer = "[...document.querySelectorAll(':not(svg) > svg')]"  # the box of an inner one is that of its curves
        boxes = page.evaluate(f"{outer}.map(s => s.getBoundingClientRect().width)")
        assert boxes and min(boxes) > 150
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert heard == [] and [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
        page.close()


SECTION = "[...document.querySelectorAll('section')].find(s => s.querySelector('h2')?.textContent === name)"


def test_what_chromium_draws(browser, runs, tmp_path):
    """Shapes on the screen, not words in the file: bands and switches of the phases, bars as long as their figures."""
    summary = json.loads((runs / "sparse-0" / "summary.json").read_text())
    path = run_page.write([runs / "sparse-0"], tmp_path / "page.html")
    page = browser.new_page(viewport={"width": 360, "height": 800})
    page.goto(path.as_uri())

    def found(section, script):
        return page.evaluate(f"(name) => {{ const section = {SECTION}; return {script} }}", section)

    for chart in range(3):
        inside = f"section.querySelectorAll('figure')[{chart}]"
        bands = found(
            "Loss", f"[...{inside}.querySelectorAll('rect.band')].map(r => [r.getBoundingClientRect().width, "
            "Number(r.getAttribute('fill-opacity'))])",
        )  # fmt: skip
        (switch,) = found("Loss", f"[...{inside}.querySelectorAll('.switch')].map(p => p.getBoundingClientRect().left)")
        assert len(bands) == 2 and min(width for width, _ in bands) > 5 and bands[0][1] > 4 * bands[1][1]
        assert found("Loss", f"{inside}.querySelectorAll('circle').length") == 7  # evaluations
        assert 0 < switch < 360
    widths = found("FLOPs", "[...section.querySelectorAll('svg rect')].map(r => r.getBoundingClientRect().width)")
    flops = [phase["flops"][column] for column in ("dense", "useful", "executed") for phase in summary["phases"]]
    assert np.array(widths) / widths[0] == pytest.approx(np.array(flops) / flops[0], abs=0.01)
    parts = found(
        "Where a step's time goes", "[...section.querySelectorAll('svg rect')].map(r => r.width.baseVal.value)"
    )
    fractions = [sum(phase["time_fractions"].values()) for phase in summary["phases"]]
    assert sum(parts) == pytest.approx(sum(fractions) * (svg.WIDTH - 4), rel=0.01)
    assert found("Step speed-up", "section.querySelectorAll('.whisker').length") == 2  # measured pairs, the CS-2's band
    assert found("Masks", "[...section.querySelectorAll('img')].map(i => i.naturalWidth)") == [32, 32, 32, 96]
    assert found("Revived weights", "section.querySelectorAll('path.line').length") == 2
    small = page.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].map(t => parseFloat(getComputedStyle(t).fontSize) "
        "* t.getScreenCTM().d).filter(size => size > 0))"
    )
    assert small > 9, "letters too small for a phone"
    page.close()


def test_masks_that_moved_are_told_and_drawn(runs, tmp_path, copy):
    run = runs_folder.Run(runs / "moving")
    page = run_page.render([run])
    figures = run.summary["phases"][0]["masks"]
    assert "Masks that move" in page and page.count('alt="mask of h.0.') >= 4
    for share in (figures["coverage"], figures["survival"], figures["mask_overlap"]):
        assert f"<td>{share:.1%}</td>" in page
    assert "Masks that move" not in run_page.render([runs_folder.Run(runs / "three")])
    (row,) = run.summary["comparison"]
    assert row["phase"] == "moving" and row["mask"] == "real"
    cut = copy("moving")  # in the middle: what the last checkpoint has
    for name in ("summary.json", "summary.digest.json", "patterns-end.npz"):
        (cut / name).unlink()
    assert "so far" in unescape(run_page.render([runs_folder.Run(cut)]))
