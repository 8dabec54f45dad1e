"""Which finished runs a study takes for its own, studies that cannot be run as they are written, workers that die."""

import json
import re
import subprocess
import sys

import pytest

from vspdf.compare import budget, definition, runner, worker
from vspdf.compare.results import read
from vspdf.config import loading
from vspdf.errors import UserError
from vspdf.report import study_page

STUDY = """
    seeds: [0]
    tuning_seeds: [1]
    common:
      model: {n_layer: 1, d_model: 16, n_head: 2, sequence_length: 16}
      data: {corpus: CORPUS, validation_fraction: 0.05, test_fraction: 0.05}
      train: {batch_size: 8, threads: 1}
    arms:
      dense:
        phases: [{steps: 12}, {steps: 4}]
      sparse:
        phases: [{sparsity: 0.75, steps: 12}]
"""


@pytest.fixture
def write(tmp_path, study_file):
    """Writes the study, changed as asked."""
    return lambda *changes: study_file(STUDY, tmp_path, *changes)


# -- whose a run is ---------------------------------------------------------------------------------------------------

LEFT_OUT = {
    "init_from": ("sparse:\n", "sparse:\n    init_from: earlier\n"),
    "train.threads": ("threads: 1", "threads: 2"),
}


@pytest.mark.parametrize("key", LEFT_OUT)
def test_a_run_with_a_setting_that_the_study_no_longer_has_is_refused(write, tmp_path, key):
    """What the trainer filled in, vocabulary and place in the data, is no such setting."""
    folder, old = tmp_path / "runs" / "sparse", write(LEFT_OUT[key])
    before = definition.load(old).arms["sparse"]
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(loading.to_yaml(before.configure({}, 0, folder).with_data(257, 0)))
    runner._StudyRun(before, {}, 0, True, folder).check()
    path = write(("threads: 1", "memory: normal")) if key == "train.threads" else write()
    with pytest.raises(UserError, match=rf"was trained with {key} = .*, the study says None: remove it, or give"):
        runner._StudyRun(definition.load(path).arms["sparse"], {}, 0, True, folder).check()


def test_results_that_are_kept_are_of_the_study_as_it_is(refused, vspdf):
    refused("--results shows what was kept of the study as it is: 'seeds=.77.' is for running",
            "compare", "toy", "folder=here", "seeds=[77]", "--results")  # fmt: skip
    status, out, _ = vspdf("compare", "toy", "folder=here", "--results", "--json")
    assert status == 0 and json.loads(out)["seeds"] == [0, 1, 2, 3, 4]


@pytest.fixture
def here(write, tmp_path, monkeypatch):
    """The folder of the study's file, which is the working folder."""
    write()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_of_a_study_is_what_to_type(here, refused):
    assert definition.load("mine.yaml", ["seeds=[4]"]).command == "vspdf compare mine.yaml 'seeds=[4]'"
    for source in ("toy", loading.find_config("toy", "studies")):
        assert definition.load(source).command == "vspdf compare toy"
    refused(r"not run yet, or 'runs/mine/results.json' would have its results. `vspdf compare mine.yaml` runs it",
            "compare", "mine.yaml", "--results")  # fmt: skip


def test_results_of_a_study_of_ones_own_are_those_of_its_runs(here, vspdf):
    kept = read(definition.load("toy")) | {"study": "mine"}
    (here / "runs" / "mine").mkdir(parents=True)
    study_page.write(kept, here / "runs" / "mine")
    status, out, _ = vspdf("compare", "mine.yaml", "--results", "--json")
    assert status == 0 and json.loads(out) == kept


# -- what is refused --------------------------------------------------------------------------------------------------

TIMED = ("seeds: [0]", "seconds: 20\nseeds: [0]")
SPARSE = "    phases: [{sparsity: 0.75, steps: 12}]\n"


@pytest.mark.parametrize(
    "changes, message",
    [
        ([TIMED, (SPARSE, f"{SPARSE}    tune: {{phases.0.steps: [4, 12]}}\n")],
         "arm 'sparse': tune.phases.0.steps: with 'seconds' the time decides on steps"),
        ([TIMED, (SPARSE, f"{SPARSE}    tune: {{phases: [[{{steps: 4}}], [{{steps: 12}}]]}}\n")],
         "arm 'sparse': tune.phases: with 'seconds' the time decides on steps"),
        ([(SPARSE, f"{SPARSE}    tune: {{epochs: [1, 2]}}\n")], "arm 'sparse': tune.epochs is a task's to try"),
        ([("seeds: [0]", f"seeds: [{2**64}]")],
         r"'seeds' must be a list of different seeds, 0 or more and below 2\^64"),
        ([("seeds: [0]", "pairs: [[[sparse], dense]]\nseeds: [0]")], r"pairs: no arm '\['sparse'\]'"),
        ([("seeds: [0]", "multiplier: [[dense], sparse]\nseeds: [0]")], r"multiplier: no arm '\['dense'\]'"),
        ([("seeds: [0]", "multiplier: [dense, dense]\nseeds: [0]")], "multiplier: arm 'dense' is named twice"),
        *(
            ([("seeds: [0]", f"name: {name}\nseeds: [0]")], f"name = '{said}' must be usable as a folder's name")
            for name, said in (("..", ".."), ("''", ""), ("a/b", "a/b"), ("null", "None"))
        ),
    ],
)  # fmt: skip
def test_studies_that_mean_nothing_end_in_one_line(write, tmp_path, refused, changes, message):
    path = write(*changes)
    refused(message, "compare", path, "--runs", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_steps_are_measured_without_ramps_that_are_longer_than_the_measurement():
    phases = [{"sparsity": 0.75, "steps": 600, "algorithm": "set", "warmup_steps": 50, "revived_warmup": 20}]
    body = {"model": {"n_layer": 1, "d_model": 8, "n_head": 1, "sequence_length": 8}, "phases": phases}
    short = budget._for_a_while(definition.Arm("set", body, {}, "here"), budget._STEPS)
    (phase,) = loading.build({**short, "name": "calibration"}, "here").phases
    assert phase.steps == 28 and phase.revived_warmup == 0 and body["phases"][0]["warmup_steps"] == 50


@pytest.mark.parametrize(
    "bend, message",
    [
        (lambda known: known.update(dense=[1]), "arm 'dense' cannot be read: it is no JSON object"),
        (lambda known: known["dense"].pop("phases"), "it has no 'phases'"),
        (lambda known: known["dense"]["phases"][0].update(step=0.0), "in 'phases', its 'step' is '0.0'"),
        (lambda known: known["dense"]["phases"].pop(), "it has 1 phases of 2"),
        (lambda known: known["dense"].update(took="long"), "its 'took' is 'long'"),
    ],
)
def test_a_calibration_of_another_form_is_named(write, tmp_path, refused, monkeypatch, bend, message):
    path, root = write(TIMED), tmp_path / "runs"
    monkeypatch.setattr(budget, "_pace", lambda arm: [{"step": 0.1, "update": 0.0}] * len(arm.body["phases"]))
    budget.settle(definition.load(path), root)
    file = root / budget.CALIBRATION
    known = json.loads(file.read_text())
    bend(known)
    file.write_text(json.dumps(known))
    refused(rf"calibration.json, .*{message}. Without the file it is measured again", "compare", path, "--runs", root)


# -- workers that die -----------------------------------------------------------------------------------------------

DEATHS = {
    "before its order": ("import os, sys; os.close(0); sys.exit('no torch')", r"ended with status 1 \(no torch\)"),
    "by a signal": ("import os; os.kill(os.getpid(), 9)", r"was killed by SIGKILL"),
    "of a fault": ("import sys; sys.stdin.readline(); 1 / 0", r"ended with status 1 \(ZeroDivisionError: [^)]*\)"),
}


@pytest.mark.parametrize("program, how", DEATHS.values(), ids=DEATHS)
def test_a_worker_that_dies_is_one_line_that_names_its_log(write, tmp_path, vspdf, monkeypatch, program, how):
    monkeypatch.setattr(worker, "_PROGRAM", program)
    path, root = write(), tmp_path / "runs"
    status, _, err = vspdf("compare", path, "--runs", root, "--jobs", 1)
    (line,) = (line for line in err.splitlines() if "error:" in line)
    assert status == 2 and "Traceback" not in err
    assert re.search(rf"dense, seed 0: its process {how}; the same command goes on. Log: (.*worker.log)$", line)
    assert (root / "dense" / "seed-0" / "worker.log").is_file()


def test_a_worker_runs_no_module_of_the_working_folder(tmp_path):
    (tmp_path / "random.py").write_text("open('was run', 'w')")
    command = [sys.executable, "-c", worker._PROGRAM, worker._PLACE]
    ended = subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "") and not (tmp_path / "was run").exists()
