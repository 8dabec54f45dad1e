"""Studies: a tiny one from end to end, killed on the way; those that ship; bad input."""

import csv
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest
import torch
from scipy import stats

from vspdf.compare import definition, runner
from vspdf.compare.results import _apart, collect
from vspdf.config import loading
from vspdf.data.text import prepare
from vspdf.errors import UserError
from vspdf.evaluate.loss import evaluate
from vspdf.files import remove
from vspdf.interop import checkpoints
from vspdf.report import study_page, tables
from vspdf.runs.folder import Run
from vspdf.train.trainer import train

STUDY = """
    about: Whether the machinery works.
    seeds: [0, 1]
    tuning_seeds: [7]
    common:
      model: {n_layer: 1, d_model: 16, n_head: 2, sequence_length: 16}
      data: {corpus: CORPUS, validation_fraction: 0.05, test_fraction: 0.05}
      optimizer: {lr: 3.0e-3}
      train:
        batch_size: 8
        threads: 1
        log_every: 1
        eval_every: 10
        eval_tokens: 512
        sample_tokens: 0
        checkpoint_every: 5
        measure_dense: 0
    arms:
      dense:
        phases: [{steps: 12}]
        tune: {optimizer.lr: [1.0e+30, 3.0e-3]}
      variable:
        phases: [{sparsity: 0.75, steps: 100, lr_multiple: 3}, {steps: 4}]
"""


@pytest.fixture(scope="module")
def written(study_file):
    """Writes the study, changed as asked, into a folder."""
    return lambda folder, *changes: study_file(STUDY, folder, *changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, written):
    """A study that was killed in the middle of a run, and went on: its file, its folder, results, what was said."""
    folder = tmp_path_factory.mktemp("study")
    path, root = written(folder), folder / "runs"
    command = [sys.executable, "-c", "from vspdf.cli import main; main()", "compare", str(path), "--runs", str(root)]
    process = subprocess.Popen(
        [*command, "--jobs", "2"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    checkpoints = root / "variable" / "seed-0" / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with runner._alone(root):  # workers have stopped
        assert not (root / "variable" / "seed-0" / "summary.json").exists(), "they were to stop before the end"
    begun = (root / "variable" / "seed-0" / "config.yaml").stat().st_mtime_ns
    said = []
    results = runner.run(path, root, jobs=2, say=said.append)
    assert (root / "variable" / "seed-0" / "config.yaml").stat().st_mtime_ns == begun, "it was to go on, not to restart"
    return path, root, results, said


def arm(results, name):
    return next(arm for arm in results["arms"] if arm["name"] == name)


# -- end to end -------------------------------------------------------------------------------------------------------


def test_a_killed_study_goes_on_to_the_results_it_would_have_had(finished, tmp_path):
    path, root, results, _ = finished
    alone = definition.load(path).arms["variable"].configure({}, 0, tmp_path / "alone")
    summary = train(alone, say=lambda line: None)
    run = arm(results, "variable")["runs"][0]
    resumed = json.loads((root / "variable" / "seed-0" / "summary.json").read_text())
    assert resumed["val_loss"] == summary["val_loss"] and run["flops"] == summary["flops"]
    assert [p["val_loss"] for p in resumed["phases"]] == [p["val_loss"] for p in summary["phases"]]


def test_losses_are_those_of_the_checkpoints_on_all_held_out_text(finished):
    path, root, results, _ = finished
    one = definition.load(path).arms["dense"].configure({}, 1)
    data = prepare(one.data, 16, 1)
    model = checkpoints.load(root / "dense" / "optimizer.lr=0.003" / "seed-1").model
    run = arm(results, "dense")["runs"][1]
    assert run["seed"] == 1
    assert run["val_loss"] == pytest.approx(evaluate(model, data, 64).loss, rel=1e-6)
    assert run["test_loss"] == pytest.approx(evaluate(model, data.for_test(), 64).loss, rel=1e-6)
    assert run["test_loss"] != run["val_loss"]


def test_values_are_chosen_on_validation_text_and_tuning_reads_no_test(finished):
    _, root, results, said = finished
    dense = arm(results, "dense")
    assert dense["tuned"] == {"optimizer.lr": 0.003}
    diverged, good = dense["trials"]
    assert diverged["val_loss"] == [None] and math.isfinite(good["val_loss"][0])
    trials = root / "dense"
    assert "diverged" in Run(trials / "optimizer.lr=1e+30" / "seed-7").evaluation
    assert "test_loss" not in Run(trials / "optimizer.lr=0.003" / "seed-7").evaluation
    assert results["complete"] and results["paired"][0]["seeds"] == [0, 1]
    assert any("ETA" in line for line in said) and said[-1].startswith("6/6")


def test_differences_are_paired_by_data_order(finished):
    _, _, results, _ = finished
    dense, variable = arm(results, "dense")["runs"], arm(results, "variable")["runs"]
    assert [run["order"] for run in dense] == [run["order"] for run in variable]
    assert dense[0]["order"] != dense[1]["order"]
    differences = [a["test_loss"] - b["test_loss"] for a, b in zip(variable, dense, strict=True)]
    (pair,) = results["paired"]
    assert (pair["a"], pair["b"]) == ("variable", "dense") and pair["differences"] == pytest.approx(differences)
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (pair["low"], pair["high"]) == pytest.approx((expected.low, expected.high))


def test_flops_are_those_of_the_ledger(finished):
    _, root, results, _ = finished
    run = arm(results, "variable")["runs"][1]
    summary = json.loads((root / "variable" / "seed-1" / "summary.json").read_text())
    assert run["flops"] == summary["flops"] == run["curve"][-1]["flops"]
    tokens = [point["tokens"] for point in run["curve"]]
    assert tokens == sorted(tokens) and tokens[-1] == summary["tokens"]
    relative = arm(results, "variable")["relative_flops"]
    assert relative["linear"] == pytest.approx((100 * 0.25 + 4) / 12, rel=0.02)
    for name, saved in summary["flops_saved_fraction_by_convention"].items():
        of_dense = run["flops_by_convention"][name] / (1 - saved)
        assert relative[name] == pytest.approx(run["flops_by_convention"][name] / of_dense * 104 / 12)


def test_files_say_the_same(finished):
    _, root, results, _ = finished
    assert json.loads((root / "results.json").read_text()) == json.loads(json.dumps(results))
    rows = list(csv.DictReader((root / "results.csv").open()))
    assert [(row["arm"], row["seed"]) for row in rows] == [(a, s) for a in ("dense", "variable") for s in "01"]
    assert float(rows[3]["test_loss"]) == arm(results, "variable")["runs"][1]["test_loss"]
    page = (root / "comparison.html").read_text()
    assert f"{results['paired'][0]['mean']:+.4f}" in page and "Whether the machinery works." in page
    assert not re.search(r"https?:|//[a-z]|<link|@import|url\(", page)


def test_time_is_that_of_the_one_thread_where_all_runs_counted_it(finished):
    _, root, results, _ = finished
    run = arm(results, "variable")["runs"][0]
    lines = [json.loads(line) for line in (root / "variable" / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    assert run["threads"] == 1 and run["cpu_seconds"] == lines[-1]["training_cpu_seconds"]
    clock = [point["cpu_seconds"] for point in run["curve"]]
    assert clock == sorted(clock) and 0 < clock[-1] == run["cpu_seconds"] <= run["seconds"] * 1.1
    assert tables.time_axis(results["arms"]) is tables.CPU
    assert tables.CPU.name in results["paired"][0]["at_equal"]
    assert any("CPU time of a run's one thread" in note for note in tables.notes(results))
    for key, value in (("cpu_seconds", None), ("threads", 2)):
        arms = [{"runs": [run, run | {key: value}]}]
        assert tables.time_axis(arms) is tables.WALL, "one run without is enough"


def test_a_seed_that_was_tuned_on_is_not_trained_twice(finished, written, tmp_path):
    _, done, results, _ = finished
    root = tmp_path / "runs"
    shutil.copytree(done, root)
    chosen = root / "dense" / "optimizer.lr=0.003" / "seed-0"
    known = Run(chosen).evaluation
    trial = {key: known[key] for key in ("val_loss", "val_bits_per_byte")}
    (chosen / "evaluation.json").write_text(json.dumps(trial))
    trained = (chosen / "summary.json").stat().st_mtime_ns
    said = []
    again = runner.run(written(tmp_path, ("tuning_seeds: [7]", "tuning_seeds: [0]")), root, jobs=2, say=said.append)
    assert said[0].startswith("mine: 5 runs, 3 of them done")
    assert any("seed 0: chosen by tuning, so a result as it is" in line for line in said)
    assert (chosen / "summary.json").stat().st_mtime_ns == trained and Run(chosen).evaluation == {**trial, **{
        key: known[key] for key in ("test_loss", "test_bits_per_byte")
    }}  # fmt: skip
    assert arm(again, "dense")["test_loss"] == arm(results, "dense")["test_loss"]
    assert any("Seed 0 was tuned on" in note for note in tables.notes(again))


def test_what_is_done_is_kept(finished, vspdf, monkeypatch):
    path, root, results, _ = finished

    def refuse(*arguments, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    status, out, _ = vspdf("compare", path, "--runs", root, "--json")
    assert status == 0 and json.loads(out)["arms"] == json.loads(json.dumps(results))["arms"]
    status, out, _ = vspdf("compare", path, "--runs", root)
    assert status == 0 and "paired differences" in out and "(chosen)" in out


def test_runs_of_another_version_of_the_study_are_refused(finished, written, tmp_path, vspdf):
    _, root, _, _ = finished
    path = written(tmp_path, ("{sparsity: 0.75, steps: 100", "{sparsity: 0.5, steps: 100"))
    status, _, err = vspdf("compare", path, "--runs", root)
    assert status == 2 and "was trained with phases.0.name = sparse 0.75, the study says sparse 0.5" in err
    assert arm(json.loads((root / "results.json").read_text()), "variable")["runs"], "results are as they were"


def test_a_plot(finished, tmp_path, vspdf):
    path, root, _, _ = finished
    status, _, err = vspdf("compare", path, "--runs", root, "--plot", tmp_path / "plot.svg")
    assert status == 0 and "wrote" in err
    drawn = ElementTree.fromstring((tmp_path / "plot.svg").read_text())
    said = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Validation loss against tokens", "Paired differences of test losses", "variable (2 seeds)"} <= {*said}
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}polygon"))) == 6, "the seeds' spread, an arm and axis each"


@pytest.fixture
def diverged(finished, tmp_path):
    """The results of the finished study, had the runs that a glob names stopped after one step."""
    path, done, _, _ = finished

    def collected(glob):
        root = shutil.copytree(done, tmp_path / "runs")
        for folder in root.glob(glob):
            (folder / "evaluation.json").write_text('{"diverged": "the loss of step 2 is nan"}')
            for late in ("checkpoints", "summary.json", "summary.digest.json"):
                remove(folder / late)
            (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().splitlines()[0] + "\n")
        return collect(definition.load(path), root, 2)

    return collected


FIRST = "dense/*=0.003/seed-0"
ALL = "*/**/seed-[01]"


@pytest.mark.parametrize("glob", [FIRST, ALL], ids=["the first run", "all runs"])
def test_a_study_in_which_runs_diverged_is_written_like_others(finished, diverged, tmp_path, glob):
    results = diverged(glob)
    study_page.write(results, tmp_path)
    study_page.plot(results, tmp_path / "plot.svg")
    assert (tmp_path / "comparison.html").exists() and results["complete"]
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert list(rows[0]) == list(csv.DictReader((finished[1] / "results.csv").open()).fieldnames)
    known = [bool(row["test_loss"] and row["flops_linear"]) for row in rows]
    assert known == ([False, True, True, True] if glob == FIRST else [False] * 4)
    assert results["same_machine"] and results["hardware"] and results["versions"]


def test_a_run_that_diverged_is_not_drawn(finished, diverged):
    results = diverged(FIRST)
    dense = arm(results, "dense")
    left = dense | {"runs": [run for run in dense["runs"] if run["seed"] == 1]}
    drawn, alone = (ElementTree.tostring(study_page._chart([one], tables.TOKENS)) for one in (dense, left))
    assert drawn == alone and drawn.count(b"<circle") == len(arm(finished[2], "dense")["runs"][1]["curve"])


def test_a_run_that_diverged_has_no_time(finished, diverged):
    results = diverged(FIRST)
    dense, undisturbed = arm(results, "dense"), arm(finished[2], "dense")["runs"][1]
    dense["runs"][0]["cpu_seconds"] = None  # one that diverged in its first step
    assert tables.mean(dense, "cpu_seconds") == undisturbed["cpu_seconds"]
    assert tables.time_axis(results["arms"]) is tables.CPU
    assert _apart(results["arms"], 100.0)["seconds"]["dense"] == undisturbed["cpu_seconds"]


def test_a_run_that_diverged_counts_for_no_seed_and_lends_no_tokens(diverged):
    results = diverged(FIRST)
    (losses, *_), page = tables.tables(results), study_page._losses(results)
    tokens = f"{12 * 8 * 16:,}"
    for head, row, seeds in ((losses.head, losses.rows[0], "1/2"), (page["head"], page["rows"][0], "1")):
        named = dict(zip(head, row, strict=True))
        assert (named["arm"], named["seeds"], named["tokens"]) == ("dense", seeds, tokens)


def test_another_process_at_work_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_PATIENCE", 0.1)
    with runner._alone(tmp_path), pytest.raises(UserError, match=r"is in use by process \d+: another process"):  # noqa: SIM117
        with runner._alone(tmp_path):
            pass


# -- studies that ship ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [path.stem for path in loading.shipped("studies")])
def test_studies_that_ship_are_read(name):
    read = definition.load(name)
    assert read.about and len(read.arms) > 1 and read.pairs


def test_common_settings_of_another_study(written, tmp_path):
    """By its path from the study's file, changed by keys as a study's own are; by the name of one that ships."""
    written(tmp_path)
    other = tmp_path / "other.yaml"
    other.write_text("seeds: [0]\ncommon: mine.yaml\narms: {dense: {phases: [{steps: 3}]}}\n")
    got = definition.load(other, ["common.model.n_head=4"]).arms["dense"].configure({}, 0)
    assert (got.model.d_model, got.model.n_head, got.train.threads) == (16, 4, 1)
    other.write_text(other.read_text().replace("mine.yaml", "toy"))
    toy, same = (definition.load(one).arms["dense"].configure({}, 0) for one in ("toy", other))
    assert (same.model, same.data, same.train) == (toy.model, toy.data, toy.train)


def test_an_arm_may_have_a_sparsity_block_but_no_seed_of_its_own(tmp_path):
    text = """
seeds: [0, 1]
common: {model: {n_layer: 2, d_model: 32, n_head: 4, sequence_length: 16}, data: {test_fraction: 0.1}}
arms: {theirs: {sparsity: {sparsity: 0.8}, phases: [{steps: 2}, {steps: 2}]}}
"""
    (tmp_path / "theirs.yaml").write_text(text)
    config = definition.load(tmp_path / "theirs.yaml").arms["theirs"].configure({}, 1)
    assert [phase.sparsity for phase in config.phases] == [0.8, 0.0] and config.seed == 1
    (tmp_path / "theirs.yaml").write_text(text.replace("{sparsity: 0.8}", "{sparsity: 0.8, seed: 7}"))
    with pytest.raises(UserError, match=r"arm 'theirs': the seed is the study's to set, also that of a sparsity block"):
        definition.load(tmp_path / "theirs.yaml")


def test_results_that_ship_are_shown_without_running(vspdf, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in loading.shipped("studies"):
        name = path.stem
        status, out, err = vspdf("compare", name, "--results", "--json")
        if (path.parent / "results" / f"{name}.json").exists():
            body = json.loads(out)
            assert {"name", "runs"} <= body["arms"][0].keys()
            assert {"a", "b", "mean", "low", "high", "seeds"} <= body["paired"][0].keys()
        else:
            assert status == 2 and "was not run yet" in err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def on_a_cpu(corpus):
    """What makes the study for a GPU one of seconds without it."""
    return [
        f"common.data.corpus={corpus}", "common.train.device=cpu", "common.train.precision=fp32",
        "common.train.batch_size=4", "common.train.threads=1", "common.model.n_layer=1", "common.model.d_model=16",
        "common.model.sequence_length=16", "arms={dense: {phases: [{steps: 4}]}}", "pairs=[]", "seeds=[0]",
    ]  # fmt: skip


def test_a_study_for_a_gpu_goes_on_over_calls_of_limited_time(on_a_cpu, tmp_path, vspdf):
    first = vspdf("compare", "gpu", *on_a_cpu, "--runs", tmp_path, "--minutes", "0", "--json")
    assert first[0] == 0 and "time is up; the same command goes on" in first[2]
    body = json.loads(first[1])
    assert not body["complete"] and not body["arms"][0]["runs"]
    status, out, _ = vspdf("compare", "gpu", *on_a_cpu, "--runs", tmp_path, "--minutes", "10", "--json")
    body = json.loads(out)
    assert status == 0 and body["complete"] and body["arms"][0]["runs"][0]["test_loss"] > 0
    assert "common.train.device=cpu" in body["command"]


def test_a_study_for_a_gpu_says_that_there_is_none(on_a_cpu, tmp_path, vspdf):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    changes = [change for change in on_a_cpu if "device" not in change]
    status, _, err = vspdf("compare", "gpu", *changes, "--runs", tmp_path)
    assert status == 2 and "common.train.device = 'cuda': torch sees no CUDA device here" in " ".join(err.split())


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [0, 1]", "seed: [0, 1]", r"unknown key 'seed'. Did you mean 'seeds'\?"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "'seeds' must be a list of different seeds"),
        ("seeds: [0, 1]", "seeds: 3", "'seeds' must be a list of different seeds"),
        ("test_fraction: 0.05", "test_fraction: 0", "common.data.test_fraction is not set"),
        ("test_fraction: 0.05", "test_fraction: 0.97", r"arm 'dense': data.test_fraction must lie in \[0, 0.95\)"),
        ("d_model: 16", "d_modle: 16", r"arm 'dense': unknown setting 'model.d_modle'. Did you mean 'd_model'\?"),
        ("sparsity: 0.75", "sparsity: 1.5", r"arm 'variable': phases.0.sparsity must lie in \[0, 1\)"),
        ("optimizer.lr: [1.0e+30, 3.0e-3]", "optimizer.l: [1]", "arm 'dense': unknown setting 'optimizer.l'"),
        ("optimizer.lr: [1.0e+30, 3.0e-3]", "optimizer.lr: [-1]", "arm 'dense': optimizer.lr must be positive"),
        ("optimizer.lr: [1.0e+30, 3.0e-3]", "optimizer.lr: 1", "arm 'dense': 'tune' must map settings to lists"),
        ("optimizer.lr: [1.0e+30, 3.0e-3]", "seed: [1]", "arm 'dense': 'seed' must be the same for all arms"),
        ("dense:\n", "dense:\n    data: {corpus: x}\n", "arm 'dense': 'data' must be the same for all arms"),
        ("common:\n", "common: toi\nother:\n", r"no study 'toi': .* Did you mean 'toy'\?"),
        ("  variable:\n", "  a/b:\n", r"arm 'a/b': name = 'a/b' must be usable"),
        ("about:", "pairs: [[dense, varible]]\nabout:", r"no arm 'varible'. Did you mean 'variable'\?"),
        ("about:", "pairs: [dense]\nabout:", "'pairs' must be a list of pairs"),
        ("steps: 12", "steps: 120000", "arm 'dense': Corpus '.*' has .* samples of 16 tokens, the run wants 960000"),
    ],
)  # fmt: skip
def test_bad_studies_end_in_one_line(old, new, message, written, tmp_path, refused):
    refused(message, "compare", written(tmp_path, (old, new)), "--runs", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_unknown_studies_and_missing_results(written, tmp_path, vspdf):
    status, _, err = vspdf("compare", "toi")
    assert status == 2 and "no study 'toi'" in err and "Did you mean 'toy'?" in err
    status, _, err = vspdf("compare", written(tmp_path), "--results")
    assert status == 2 and "no committed results: it was not run yet" in " ".join(err.split())


TUNE = "    tune: {optimizer.lr: [1.0e+30, 3.0e-3]}\n"


def test_values_that_all_diverge_end_in_one_line(written, tmp_path, vspdf):
    path = written(tmp_path, ("1.0e+30, 3.0e-3", "1.0e+30"))
    trial = tmp_path / "runs" / "dense" / "optimizer.lr=1e+30" / "seed-7"
    trial.mkdir(parents=True)
    (trial / "evaluation.json").write_text('{"diverged": "the loss of step 2 is nan"}')
    status, _, err = vspdf("compare", path, "--runs", tmp_path / "runs")
    assert status == 2 and "arm 'dense': every value of 'tune' diverged" in " ".join(err.split())


def test_a_run_that_cannot_be_trained_is_named(written, tmp_path, vspdf):
    path, root = written(tmp_path, (TUNE, "")), tmp_path / "runs"
    (root / "dense" / "seed-0" / "checkpoints").mkdir(parents=True)  # not made by this study
    status, _, err = vspdf("compare", path, "--runs", root, "--jobs", 1)
    assert status == 2 and "dense, seed 0: run_dir" in err and "already holds a run" in err and "Traceback" not in err


def test_a_file_where_a_folder_should_be(written, tmp_path, vspdf):
    root = tmp_path / "runs"
    root.mkdir()
    (root / "dense").write_text("a file where a folder should be")
    status, _, err = vspdf("compare", written(tmp_path, (TUNE, "")), "--runs", root)
    assert status == 2 and "cannot be made or written to: Not a directory" in err and "Traceback" not in err
