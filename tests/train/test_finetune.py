"""The verbs after pre-training, from start to answers: fine-tuning, generation, and what they refuse."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from vspdf.cli import train as cli
from vspdf.data.tokenizer import Tokenizer
from vspdf.interop import checkpoints
from vspdf.sparsity.layer import sparse_layers

RELATIONS = {"is blue": "colour : blue", "is old": "age : old", "is near": "place : near"}
FINETUNE = """
    name: fine
    data: {overlong: cut, repeat: true, validation_fraction: 0.2}
    optimizer: {lr: 1.0e-2, beta2: 0.999, eps: 1.0e-8, weight_decay: 0.01}
    train: {batch_size: 8, threads: 1, log_every: 1, eval_every: 0, sample_tokens: 0, checkpoint_every: 5}
    phases: [{steps: 12, warmup_steps: 2, lr_end: 0, decay: cosine}]
"""


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_config):
    """Two starts, sparse and dense in Hugging Face's form; pairs; a configuration."""
    from vspdf.config import loading
    from vspdf.interop import convert
    from vspdf.train.trainer import train

    folder = tmp_path_factory.mktemp("finetune")
    settings = loading.load(
        tiny_config(folder), ["phases=[{sparsity: 0.5, steps: 2}]", "model.sequence_length=64", "train.batch_size=2"]
    )
    train(settings, say=lambda line: None)
    convert.convert(folder / "run", folder / "hf")
    rows = [
        {"context": f"{name} : {relation}", "completion": f"{name} {text}"}
        for name in "abcdefghij"
        for text, relation in RELATIONS.items()
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "fine.yaml").write_text(FINETUNE)
    return folder


def arguments(files, target, *more, start="run"):
    path = f"data.path={files / 'pairs.jsonl'}"
    return ["finetune", files / start, files / "fine.yaml", path, f"run_dir={target}", *more]


@pytest.fixture(scope="module")
def tuned(files):
    """A finished fine-tuning."""
    from vspdf.config import loading
    from vspdf.config.settings import ModelConfig
    from vspdf.train.trainer import train

    model = ModelConfig(**vars(checkpoints.shape_of(files / "run")))
    said = []
    overrides = [f"data.path={files / 'pairs.jsonl'}", f"run_dir={files / 'fine'}"]
    settings = loading.load(files / "fine.yaml", overrides, start=(str(files / "run"), model))
    summary = train(settings, say=said.append)
    return files / "fine", summary, said


def test_a_sparse_start_is_densified_and_that_is_said(tuned, files):
    folder, _, said = tuned
    assert any("keeps 50.0% of 8 layers: densified" in line for line in said)
    start, end = checkpoints.load(files / "run").model, checkpoints.load(folder).model
    assert sparse_layers(start) and not sparse_layers(end)
    masked = ~sparse_layers(start)["h.0.mlp.c_fc"].pattern.mask()
    assert end.get_submodule("h.0.mlp.c_fc").weight[masked].abs().min() > 0


def test_the_run_directory_tells_all(tuned):
    folder, summary, _ = tuned
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["lr"] == 0
    assert [line["lr"] for line in lines[:2]] == pytest.approx([5e-3, 1e-2])
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["corpus"]["name"] == "pairs.jsonl" and summary["tokens"] == lines[-1]["tokens"]
    assert summary["phases"][0]["tokens"] == summary["tokens"] < 12 * 8 * 64
    assert summary["flops"]["executed"] == summary["flops"]["dense"] > 0
    assert {"tokenizer.json", "config.yaml", "manifest.json"} <= {path.name for path in folder.iterdir()}


def test_stopped_and_resumed_equals_uninterrupted_to_the_last_bit(vspdf, tuned, files, tmp_path, monkeypatch):
    expected = tuned[0]
    say = cli.say

    def stop(line):
        say(line)
        if line.startswith("step  7/"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli, "say", stop)
    status, _, err = vspdf(*arguments(files, tmp_path / "run"))
    assert status == 130 and "stopped after step 7; a checkpoint was written: --resume goes on." in err
    before = content(tmp_path / "run")
    status, _, err = vspdf(*arguments(files, tmp_path / "run"))
    assert status == 2 and "already holds a run" in err and content(tmp_path / "run") == before
    status, out, err = vspdf(*arguments(files, tmp_path / "run", "--resume", "--json"))
    assert status == 0 and "resumed at step 7 of 12" in err
    last = "checkpoints/step-00000012"
    for name in ("model.safetensors", "optimizer.safetensors"):
        found, exact = load_file(tmp_path / "run" / last / name), load_file(expected / last / name)
        assert found.keys() == exact.keys() and all(torch.equal(found[key], exact[key]) for key in exact)
    assert json.loads(out)["val_loss"] == tuned[1]["val_loss"]


def test_micro_batches_of_unequal_length_give_the_same_loss(vspdf, files, tuned, tmp_path):
    assert vspdf(*arguments(files, tmp_path / "run", "train.micro_batch_size=2", "phases.0.steps=2"))[0] == 0
    lines = [(folder / "metrics.jsonl").read_text().splitlines()[0] for folder in (tmp_path / "run", tuned[0])]
    mine, whole = (json.loads(line) for line in lines)
    assert (mine["loss"], mine["grad_norm"]) == pytest.approx((whole["loss"], whole["grad_norm"]), rel=1e-5)


def test_from_a_hugging_face_folder(vspdf, files, tuned, tmp_path):
    """The same weights, so the same first loss."""
    assert vspdf(*arguments(files, tmp_path / "run", "phases.0.steps=2", start="hf"))[0] == 0
    first = [
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]) for folder in (tmp_path / "run", tuned[0])
    ]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.path=null", "data.path is not set"),
        ("phases.0.sparsity=0.5", "fine-tuning is dense"),
        ("data.length=65", "data.length = 65 must lie between 4 and the model's sequence length of 64"),
        ("model.d_model=48", "model.d_model = 48, but the model to start from has 32"),
        ("data.overlong=cute", "data.overlong = 'cute' is not known. Did you mean 'cut'"),
        ("data.length=8 data.overlong=refuse", "pairs for train are longer than data.length = 8"),
        ("data.tokenizer=bpe:300", "would learn a new one"),
        ("optimizer.lr=1e18", "training stopped, no checkpoint was written yet"),
    ],
)
def test_what_is_refused(vspdf, files, tmp_path, change, message):
    status, out, err = vspdf(*arguments(files, tmp_path / "run", *change.split()))
    assert (status, out) == (2, "") and message in err.splitlines()[-1]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_start_that_is_none(vspdf, files, tmp_path):
    status, _, err = vspdf(*arguments(files, tmp_path / "run", start="rum"))
    assert status == 2 and "Did you mean" in err
    status, _, err = vspdf("train", files / "fine.yaml", "data.path=x", "model.name=gpt2-small")
    assert status == 2 and "vspdf finetune CHECKPOINT" in err


# -- texts ------------------------------------------------------------------------------------------------------------


def test_answers_to_a_task_file(vspdf, files, tuned, tmp_path):
    target = tmp_path / "new" / "answers.txt"
    how = ["--beams", 3, "--tokens", 12, "--json"]
    status, out, err = vspdf("generate", tuned[0], "--input", files / "pairs.jsonl", "--output", target, *how)
    body = json.loads(out)
    lines = target.read_text().splitlines()
    assert status == 0 and body["answers"] == len(lines) == 30 and "30/30 answers" in err and "ETA 0:00" in err
    status, out, _ = vspdf(
        "generate", tuned[0], "--input", files / "pairs.jsonl", "--limit", 2, *how, "--batch-size", 1
    )
    assert json.loads(out)["texts"] == lines[:2]
    _, out, _ = vspdf("generate", tuned[0], "--prompt", "a : colour : blue", *how)
    assert json.loads(out)["texts"][0].split() == f"a : colour : blue {lines[0]}".split()
    before = content(tmp_path)
    status, _, err = vspdf("generate", tuned[0], "--input", files / "pairs.jsonl", "--output", target)
    assert status == 2 and "exists already" in err and content(tmp_path) == before
    status, _, err = vspdf("generate", tuned[0])
    assert status == 2 and "was fine-tuned to answer: give --prompt a context, or --input a task file." in err


def test_a_start_without_a_tokenizer_takes_one_that_fits(vspdf, files, tmp_path):
    shutil.copytree(files / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    path, more = f"data.path={files / 'pairs.jsonl'}", ["phases.0.steps=1", "phases.0.warmup_steps=0"]
    how = ["finetune", tmp_path / "hf", files / "fine.yaml", path, f"run_dir={tmp_path / 'run'}", *more]
    status, _, err = vspdf(*how)
    assert status == 2 and "has no tokenizer: put a tokenizer.json beside its weights" in err
    Tokenizer.train(["some words of a text"], 260).save(tmp_path / "wrong.json")
    status, _, err = vspdf(*how, f"data.tokenizer={tmp_path / 'wrong.json'}")
    assert status == 2 and "tokenizer 'wrong.json' does not match the model: it has 260 tokens" in err
    status, _, err = vspdf(*how, f"data.tokenizer={files / 'hf' / 'tokenizer.json'}")
    assert status == 0, err


def test_relations_are_in_lower_case_where_the_fine_tuning_had_them_so(vspdf, files, tmp_path):
    rows = [{"tripleset": [[name, "IS NEAR", "Rome"]], "annotations": [{"text": name}]} for name in "abcdefgh"]
    (tmp_path / "dart.json").write_text(json.dumps(rows))
    more = ["data.lower_relations=true", "phases.0.steps=1", "phases.0.warmup_steps=0", "phases.0.decay=constant"]
    path, target = f"data.path={tmp_path / 'dart.json'}", f"run_dir={tmp_path / 'low'}"
    status, _, err = vspdf("finetune", files / "run", files / "fine.yaml", path, target, *more)
    assert status == 0, err
    how = ["--tokens", 8, "--beams", 2, "--json"]
    said = "relations of triples are in lower case, as in the fine-tuning"
    status, out, err = vspdf("generate", tmp_path / "low", "--prompt", "A : IS NEAR : Rome | just Text", *how)
    assert status == 0 and said in err
    answer = json.loads(out)["texts"][0]
    assert answer.startswith("A : is near : Rome | just Text")
    (tmp_path / "lines.txt").write_text("A : IS NEAR : Rome | just Text\n")
    status, out, err = vspdf("generate", tmp_path / "low", "--input", tmp_path / "lines.txt", *how)
    assert status == 0 and said in err and answer.split()[9:] == json.loads(out)["texts"][0].split()
    status, out, err = vspdf("generate", tmp_path / "low", "--prompt", "no Triple : here", *how)
    assert status == 0 and said not in err and json.loads(out)["texts"][0].startswith("no Triple : here")
    status, out, err = vspdf("generate", files / "run", "--prompt", "A : IS NEAR : Rome", "--tokens", 2, "--json")
    assert status == 0 and said not in err and json.loads(out)["texts"][0].startswith("A : IS NEAR : Rome")


def test_overlong_prompts(vspdf, tuned, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("short\n" + "x" * 80 + "\n")
    status, _, err = vspdf("generate", tuned[0], "--input", prompts, "--tokens", 10)
    assert status == 2 and "1 of 2 prompts have more than 53 tokens" in err and "--overlong cut" in err
    status, out, err = vspdf("generate", tuned[0], "--input", prompts, "--tokens", 10, "--overlong", "cut", "--json")
    assert status == 0 and "1 of 2 prompts are cut to 53 tokens: their beginning is kept" in err
    assert len(json.loads(out)["texts"]) == 2
    status, _, err = vspdf("generate", tuned[0], "--input", prompts, "--tokens", 70, "--overlong", "cut")
    assert status == 2 and "no room for a prompt in the model's window: lower it by at least 8." in err


def test_a_stopped_generation_writes_nothing(vspdf, files, tuned, tmp_path, monkeypatch):
    from vspdf.evaluate import generate

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "beam_search", stop)
    target = tmp_path / "answers.txt"
    how = ["--input", files / "pairs.jsonl", "--output", target, "--tokens", 9]
    status, out, err = vspdf("generate", tuned[0], *how)
    assert (status, out) == (130, "") and "no answer was written" in err and not target.exists()


def test_lines_are_plain_prompts_for_a_model_without_a_task(vspdf, files, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def f\n\n")
    status, _, err = vspdf("generate", files / "run", "--input", prompts)
    assert status == 2 and f"prompt 2 of '{prompts}' is empty" in err
    prompts.write_text("def f\nclass\n")
    status, out, _ = vspdf("generate", files / "hf", "--input", prompts, "--tokens", 4, "--json")
    body = json.loads(out)
    assert status == 0 and len(body["texts"]) == 2 and body["decoding"]["beams"] == 1
