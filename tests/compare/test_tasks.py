"""Studies with tasks: pre-training, fine-tuning, answers and scores of a tiny one; what is refused."""

import csv
import json
import math
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch

from vspdf.compare import definition, runner, tuning
from vspdf.config import loading, settings
from vspdf.data import pairs, tasks
from vspdf.evaluate.bleu import corpus_bleu
from vspdf.interop import checkpoints
from vspdf.model import GPT
from vspdf.report import study_page, tables

STUDY = """
    seeds: [0]
    tuning_seeds: [0]
    folder: FOLDER
    common:
      model: {n_layer: 1, d_model: 16, n_head: 2, sequence_length: 48}
      data: {corpus: CORPUS, tokenizer: "bpe:300", validation_fraction: 0.05, test_fraction: 0.05}
      optimizer: {lr: 3.0e-3}
      train: &quick
        {batch_size: 8, threads: 1, log_every: 1, eval_every: 0, eval_tokens: 512, sample_tokens: 0, measure_dense: 0}
    arms:
      variable:
        phases: [{sparsity: 0.75, steps: 3}, {steps: 1}]
      random:
        untrained: true
    finetune:
      data: {repeat: true}
      train: *quick
      phases: [{lr_end: 0, decay: cosine}]
      tune: {optimizer.lr: [1.0e-2], epochs: [0.5]}
    tasks:
      colours:
        source: the moon
        data: {path: pairs.jsonl, validation_fraction: 0.2, test_fraction: 0.2}
        protocol: lora
        decoding: {beams: 2, max_tokens: 8}
"""


@pytest.fixture(scope="module")
def written(corpus):
    def write(folder, *changes):
        rows = [
            {"context": f"{name} : {relation}", "completion": [f"{name} is {relation} now", f"so {relation} is {name}"]}
            for name in "abcdefghij"
            for relation in ("blue", "old", "near")
        ]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = textwrap.dedent(STUDY).replace("CORPUS", str(corpus)).replace("FOLDER", str(folder))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (folder / "mine.yaml").write_text(text)
        return folder / "mine.yaml"

    return write


@pytest.fixture(scope="module")
def finished(tmp_path_factory, written):
    folder = tmp_path_factory.mktemp("tasks")
    said = []
    results = runner.run(written(folder), folder / "runs", jobs=2, say=said.append)
    return folder / "mine.yaml", folder / "runs", results, said


def chosen(root, arm):
    return root / arm / "colours" / "optimizer.lr=0.01,epochs=0.5" / "seed-0"


def test_bleu_is_that_of_the_answers_to_held_out_contexts(finished):
    path, root, results, _ = finished
    (task,) = results["tasks"]
    examples = definition.load(path).tasks["colours"].parts["test"]
    for arm in task["arms"]:
        answers = tasks.read_lines(chosen(root, arm["name"]) / "answers.txt")
        (run,) = arm["runs"]
        expected = corpus_bleu(answers, [example.references for example in examples], "lora")
        assert run["bleu"] == expected.bleu == arm["bleu"]["mean"]
        assert run["hypothesis_length"] == expected.hypothesis_length > 0
    assert task["sizes"]["test"]["documents"] == len(examples)
    assert [pair["seeds"] for pair in task["paired"]] == [[0]]


def test_no_context_is_in_two_parts(finished):
    parts = definition.load(finished[0]).tasks["colours"].parts
    contexts = {name: {example.context for example in some} for name, some in parts.items()}
    assert contexts.keys() == {"train", "validation", "test"} and all(contexts.values())
    assert len(set.union(*contexts.values())) == sum(map(len, contexts.values())) == 30


def test_what_fine_tuning_begins_with(finished):
    """The pre-trained weights of the same seed, dense; or the weights as they are drawn, with the same tokenizer."""
    _, root, _, _ = finished
    model, tokenizer, _ = checkpoints.load(root / "random" / "seed-0" / "start")
    trained = checkpoints.load(root / "variable" / "seed-0")
    drawn = GPT(model.shape, 0.02, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), drawn.parameters(), strict=True))
    assert tokenizer.same_vocabulary(trained.tokenizer)
    for arm in ("variable", "random"):
        config = loading.load(
            chosen(root, arm) / "config.yaml",
            start=(str(root), settings.ModelConfig(**vars(model.shape), init_std=0.02)),
        )
        train = sum(len(e.references) for e in pairs.parts(config.data)["train"])
        assert config.phases[0].steps == round(0.5 * train / 8) and not config.phases[0].sparsity


def test_it_is_said_and_written(finished):
    _, root, results, said = finished
    assert results["complete"] and said[0].startswith("mine: 4 runs, 0 of them done") and "4/4" in "".join(said)
    assert any("chosen by tuning, so a result as it is; BLEU" in line for line in said)
    assert any("Not comparable with published scores" in note for note in tables.notes(results))
    rows = list(csv.DictReader((root / "tasks.csv").open()))
    assert [row["arm"] for row in rows] == ["variable", "random"] and float(rows[0]["bleu"]) >= 0
    page = (root / "comparison.html").read_text()
    assert "colours BLEU" in page and "contexts as they are" in page
    assert [arm["name"] for arm in results["arms"]] == ["variable"], "an untrained arm has no loss of pre-training"


def test_a_plot_shows_differences_of_bleu(finished, tmp_path):
    study_page.plot(finished[2], tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "colours: random − variable" in drawn and "difference of BLEU" in drawn


def test_what_is_done_is_kept(finished, vspdf, monkeypatch):
    path, root, results, _ = finished

    def refuse(*arguments, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    status, out, _ = vspdf("compare", path, "--runs", root, "--json")
    assert status == 0 and json.loads(out)["tasks"] == json.loads(json.dumps(results))["tasks"]
    status, out, _ = vspdf("compare", path, "--runs", root)
    assert status == 0 and "BLEU after fine-tuning" in out and "contexts as they are" in out


def test_tasks_are_tuned_over_all_combinations(written, tmp_path):
    path = written(tmp_path, ("{optimizer.lr: [1.0e-2], epochs: [0.5]}", "{optimizer.lr: [1, 2], epochs: [3, 4]}"))
    arm = definition.load(path).fine_tunings["colours"]
    losses = {(1, 3): 2.0, (1, 4): math.inf, (2, 3): 1.5, (2, 4): 1.0}
    state = tuning.tuning(arm, [0], lambda values, seed: losses[tuple(values.values())])
    assert state.chosen == {"optimizer.lr": 2, "epochs": 4} and len(state.trials) == arm.trials() == 4
    assert state.at_the_edge(arm) == ["optimizer.lr", "epochs"]


def test_settings_may_be_changed_beside_the_file(written, tmp_path, vspdf):
    path = written(tmp_path)
    changed = definition.load(path, ["arms.variable.phases.0.steps=7", "common.optimizer.lr=1e-4", "folder=x y"])
    config = changed.arms["variable"].configure({}, 0)
    assert (config.phases[0].steps, config.optimizer.lr) == (7, 1e-4)
    assert changed.tasks["colours"].data.path == str(Path("x y") / "pairs.jsonl")
    assert changed.command.endswith("common.optimizer.lr=1e-4 folder=FOLDER")
    for change, message in (
        ("fodler=x", "unknown key 'fodler'. Did you mean 'folder'?"),
        ("folder", "override 'folder' is not of the form key=value"),
        ("arms.variable.phases.9.steps=1", "has no place for 'arms.variable.phases.9.steps'"),
        ("common.train.devise=cpu", "unknown setting 'train.devise'. Did you mean 'device'?"),
    ):
        status, _, err = vspdf("compare", path, change, "--runs", tmp_path / "runs")
        assert status == 2 and message in " ".join(err.split())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("path: pairs.jsonl", "path: pears.jsonl", "task 'colours': task file '.*pears.jsonl' not found. Did you mean "
         ".* It comes from the moon. `folder=FOLDER` says where"),
        ("data: {path: pairs.jsonl,", "data: {", "task 'colours': expected a mapping with data.path"),
        ("protocol: lora", "protocol: loar", "protocol 'loar' is not known. Did you mean 'lora'"),
        ("protocol: lora", "protocl: lora", "task 'colours': unknown setting 'protocl'"),
        ("beams: 2", "beam: 2", "decoding has no 'beam'. Did you mean 'beams'"),
        ("max_tokens: 8", "max_tokens: 48", "decoding.max_tokens leaves no room"),
        (", test_fraction: 0.2}", "}", "task 'colours': data.test_fraction is not set"),
        ("epochs: [0.5]", "epochs: [0]", "tune.epochs must be numbers above 0, not 0"),
        ("epochs: [0.5]", "epoch: [1]", "phases.0 needs steps or tokens"),
        ("tuning_seeds: [0]", "tuning_seeds: [1]", "'tuning_seeds' must be among 'seeds'"),
        ("untrained: true", "{untrained: true, phases: [{steps: 1}]}", "such an arm has neither 'phases' nor 'tune'"),
        ("phases: [{lr_end: 0, decay: cosine}]", "phases: [{sparsity: 0.5}]", "fine-tuning is dense"),
        ("tasks:", "taks:", "unknown key 'taks'. Did you mean 'tasks'"),
    ],
)  # fmt: skip
def test_bad_studies_end_in_one_line(old, new, message, written, tmp_path, refused):
    refused(message, "compare", written(tmp_path, (old, new)), "--runs", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_task_without_references(written, tmp_path, vspdf):
    path = written(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"context": "a"}\n{"context": "b"}\n')
    status, _, err = vspdf("compare", path, "--runs", tmp_path / "runs")
    assert status == 2 and "has no example with both a context and a reference" in " ".join(err.split())
