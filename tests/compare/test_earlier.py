"""Seeds that are added to results whose runs are gone, as on another machine."""

import json
import shutil

import pytest

from vspdf.compare import budget, definition, earlier, runner
from vspdf.errors import UserError
from vspdf.report import tables

STUDY = """
    seeds: [0, 1]
    tuning_seeds: [7]
    common:
      model: {n_layer: 1, d_model: 16, n_head: 2, sequence_length: 16}
      data: {corpus: CORPUS, validation_fraction: 0.05, test_fraction: 0.05, repeat: true}
      optimizer: {lr: 3.0e-3}
      train: {batch_size: 8, threads: 1, eval_every: 4, eval_tokens: 512, sample_tokens: 0, measure_dense: 0}
    arms:
      dense:
        phases: [{steps: 12}]
        tune: {optimizer.lr: [1.0e+30, 3.0e-3]}
      variable:
        phases: [{sparsity: 0.75, steps: 20, lr_multiple: 3}, {steps: 4}]
"""
MORE = ["seeds=[0, 1, 2]"]


def losses(results):
    return {arm["name"]: {run["seed"]: run["test_loss"] for run in arm["runs"]} for arm in results["arms"]}


@pytest.fixture(scope="module")
def study(tmp_path_factory, study_file):
    """The study's file, its results over two seeds, and those over three while all runs are there."""
    folder = tmp_path_factory.mktemp("study")
    path, root = study_file(STUDY, folder), folder / "runs"
    runner.run(path, root, jobs=2)
    shutil.copy(root / "results.json", folder / "results.json")
    whole = runner.run(path, root, jobs=2, changes=MORE)
    return path, folder / "results.json", whole


@pytest.fixture
def changed(study, tmp_path):
    """The two seeds' results after a change, as a file."""

    def written(change):
        body = json.loads(study[1].read_text())
        change(body)
        file = tmp_path / "changed.json"
        file.write_text(json.dumps(body))
        return file

    return written


def test_only_seeds_that_are_missing_are_run_and_come_out_as_they_would_have(study, tmp_path):
    path, file, whole = study
    root = tmp_path / "runs"
    found = runner.run(path, root, jobs=2, changes=MORE, add_to=file)
    assert sorted(folder.name for folder in root.rglob("seed-*")) == ["seed-2", "seed-2"]
    assert losses(found) == losses(whole) and found["complete"]
    for mine, theirs in zip(found["arms"], whole["arms"], strict=True):
        assert (mine["tuned"], mine["trials"]) == (theirs["tuned"], theirs["trials"])
    assert found["paired"][0]["differences"] == whole["paired"][0]["differences"]
    again = runner.run(path, root, jobs=2, changes=MORE)  # remembers what it adds to
    assert losses(again) == losses(whole)


def test_some_arms_are_run_now_and_the_others_later(study, tmp_path):
    path, file, whole = study
    root, said = tmp_path / "runs", []
    first = runner.run(path, root, jobs=2, changes=MORE, arms=["variable"], add_to=file, say=said.append)
    assert {name: len(found) for name, found in losses(first).items()} == {"dense": 2, "variable": 3}
    assert not first["complete"] and any("mine: 1 runs, 0 of them done" in line for line in said)
    assert losses(runner.run(path, root, jobs=2, changes=MORE)) == losses(whole)
    with pytest.raises(UserError, match="there is no arm 'variabel'"):
        runner.run(path, root, jobs=2, arms=["variabel"])


def test_steps_that_fill_a_time_are_those_of_the_results(study, tmp_path, study_file, monkeypatch):
    monkeypatch.setattr(budget, "_measured", lambda *_: pytest.fail("nothing is to be measured anew"))
    path = study_file(STUDY, tmp_path, ("tuning_seeds: [7]", "tuning_seeds: [7]\nseconds: 1000\ntuning_seconds: 10"))
    monkeypatch.setattr(runner, "TOLERANCE", 1e9)
    found = runner.run(path, tmp_path / "runs", jobs=2, changes=MORE, add_to=study[1])
    assert losses(found) == losses(study[2])


def test_added_runs_count_as_losses_and_not_as_times(study, tmp_path, changed):
    def slow(body):
        body["hardware"]["cpu"] = "Another"
        for arm in body["arms"]:
            for run in arm["runs"]:
                run["cpu_seconds"] = 1000.0
                for point in run["curve"]:
                    point["cpu_seconds"] = 1000.0 * point["step"] / run["curve"][-1]["step"]

    found = runner.run(study[0], tmp_path / "runs", jobs=2, changes=MORE, add_to=changed(slow))
    assert found["hardware"]["cpu"] == "Another" and not found["same_machine"]
    assert losses(found) == losses(study[2])
    runs = found["arms"][0]["runs"]
    assert ["added" in run for run in runs] == [False, False, True]
    assert runs[2]["added"]["hardware"] == study[2]["hardware"]
    assert tables.mean(found["arms"][0], "cpu_seconds") == 1000.0
    assert found["paired"][0]["at_equal"]["CPU time of one thread"]["budget"] == 1000.0
    assert any("2 runs (seed 2) were added later" in note for note in tables.notes(found))
    # And once more, from what was put together.
    file = tmp_path / "both.json"
    file.write_text(json.dumps(found))
    third = runner.run(study[0], tmp_path / "third", jobs=2, changes=MORE, add_to=file)
    assert third["arms"] == found["arms"] and third["hardware"] == found["hardware"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.update(study="other"), "holds results of 'other', expected those of 'mine'"),
        (lambda body: body["arms"].pop(), "has the arms dense; expected dense, variable"),
        (lambda body: body["arms"][0].update(digest="0" * 64), "arm 'dense': it was configured otherwise"),
        (lambda body: body["arms"][1]["phases"][0].update(sparsity=0.5), "its phase 0 has sparsity = 0.5 of 0.75"),
        (lambda body: body["arms"][1]["phases"].pop(), "arm 'variable': it has 1 phases of 2"),
        (lambda body: body["arms"][0].update(tuned=None), "arm 'dense': its values were not chosen yet"),
        (
            lambda body: body["arms"][1].update(tuned={"optimizer.lr": 1}),
            "it chose optimizer.lr, the study tunes nothing",
        ),
        (lambda body: body["arms"][0]["runs"][0].update(tokens=7), "arm 'dense': seed 0 read 7 tokens"),
        (lambda body: body["corpus"]["corpus"].update(sha256="0"), "expected the same text"),
        (lambda body: body.update(tuning_seeds=[3]), "was tuned on seeds [3]; expected tuning_seeds [7]"),
        (lambda body: body.update(tuning_seeds=3), "its 'tuning_seeds' is '3'"),
        (lambda body: body.pop("corpus"), "cannot be read as results of a study: it has no 'corpus'"),
        (lambda body: body["arms"][0]["runs"][0].pop("order"), "it has no 'order'"),
        (lambda body: body["arms"][0]["runs"][0]["curve"][0].update(val_loss="low"), "its 'val_loss' is 'low'"),
    ],
    ids=["study", "arms", "digest", "sparsity", "phases", "untuned", "tuned", "tokens", "text",
         "seeds", "no seeds", "key", "run", "point"],
)  # fmt: skip
def test_results_of_something_else_are_refused(study, tmp_path, changed, change, message):
    with pytest.raises(UserError) as caught:
        runner.run(study[0], tmp_path / "runs", jobs=1, changes=MORE, add_to=changed(change))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("seed-*"))


def test_seeds_that_were_tuned_on_are_those_of_the_results(tmp_path, study_file, changed):
    """Not those that would follow from the seeds as they are now: one that is added is reported as tuned on."""
    file = changed(lambda body: body.update(tuning_seeds=[2]))
    path = study_file(STUDY, tmp_path, ("tuning_seeds: [7]\n", ""))
    taken = earlier.take(definition.load(path, MORE), tmp_path / "runs", file, print)
    assert taken.tuning_seeds == (2,)
    timed = definition.load(path, [*MORE, "seconds=1000", "tuning_seconds=10"])
    with pytest.raises(UserError, match="tuned on seed 2: 'tuning_seconds' goes with tuning_seeds apart from seeds"):
        earlier.take(timed, tmp_path / "runs", file, print)


def test_a_folder_adds_to_one_set_of_results(study, tmp_path, changed):
    root = tmp_path / "runs"
    with pytest.raises(UserError, match="expected the same text"):
        runner.run(study[0], root, jobs=2, add_to=changed(lambda body: body["corpus"]["corpus"].update(sha256="0")))
    runner.run(study[0], root, jobs=2, add_to=study[1])
    with pytest.raises(UserError, match="adds to other results"):
        runner.run(study[0], root, jobs=2, add_to=changed(lambda body: body.update(about="another")))


def test_older_results_that_do_not_say_how_arms_were_configured_are_taken_with_a_line(study, tmp_path, changed):
    said = []
    file = changed(lambda body: [arm.pop("digest") for arm in body["arms"]])
    more = ["arms.dense.tune={optimizer.lr: [1.0e+30, 3.0e-3, 4.0e-3]}"]
    runner.run(study[0], tmp_path / "runs", jobs=2, changes=more, add_to=file, say=said.append)
    assert any("dense: optimizer.lr = 0.004 was not tried in" in line for line in said)
    assert any("does not say how dense, variable were configured" in line for line in said)
