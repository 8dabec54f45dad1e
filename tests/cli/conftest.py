"""What the arguments of verbs name, and what can be seen of a verb at work."""

import json
import re
import shlex
from importlib.resources import files

import pytest
import torch

from vspdf.pattern import Pattern

CONFIG = """
name: one
run_dir: run
model: {n_layer: 1, d_model: 16, n_head: 2, sequence_length: 32}
data: {corpus: CORPUS, validation_fraction: 0.01}
train: {batch_size: 8, threads: 1, eval_every: 0, eval_tokens: 512, sample_tokens: 0, measure_dense: 0}
phases: [{sparsity: 0.5, steps: 2}]
"""
TASK = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: questions.json}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
STUDY = """
about: Whether options do something.
seeds: [0]
tuning_seeds: [1]
common:
  model: {n_layer: 1, d_model: 16, n_head: 2, sequence_length: 32}
  data: {corpus: CORPUS, validation_fraction: 0.05, test_fraction: 0.05}
  train: {batch_size: 8, threads: 1, eval_every: 0, eval_tokens: 512, sample_tokens: 0, measure_dense: 0}
arms:
  dense: {phases: [{steps: 1}]}
"""


@pytest.fixture(scope="session")
def one_phase():
    """A configuration of one sparse phase; CORPUS stands for its text."""
    return CONFIG


@pytest.fixture(scope="module")
def places(tmp_path_factory, corpus):
    """What the arguments name."""
    from vspdf.config import loading
    from vspdf.config.settings import ModelConfig
    from vspdf.interop import checkpoints, convert
    from vspdf.train.trainer import train

    folder = tmp_path_factory.mktemp("places")
    found = {name: folder / name for name in ("run", "tuned", "wordless", "tasks")}
    texts = {
        "config": ("config.yaml", CONFIG.replace("CORPUS", str(corpus))),
        "study": ("study.yaml", STUDY.replace("CORPUS", str(corpus))),
        "tuning": (
            "tuning.yaml",
            "name: tuned\ntrain: {batch_size: 4, threads: 1, eval_every: 0, sample_tokens: 0}\nphases: [{steps: 40}]\n"
            "optimizer: {lr: 1.0e-2}\ndata: {repeat: true}\n",
        ),
        "text": ("text.txt", "Some words to read.\n\n" * 9),
        "lines": ("lines.txt", "the sky is blue\ntwo and two\nwho knows\n"),
        "same": ("same.txt", "one size\ntwo size\nsix size\n"),  # of one length: they fit one batch
        "references": ("references.txt", "the sky is green\ntwo and three\nwho knows it\n"),
        "pairs": (
            "pairs.jsonl",
            "".join(json.dumps({"context": c, "completion": c * n}) + "\n" for c in "xyz" for n in (1, 2, 4)),
        ),
        "machine": (
            "machine.yaml",
            (files("vspdf.simulator") / "machines" / "cs2.yaml").read_text()
            .replace("hop_cycles: {value: 1", "hop_cycles: {value: 5")
            .replace("alu_cycles: {value: 1", "alu_cycles: {value: 3"),
        ),
    }  # fmt: skip
    for name, (file, text) in texts.items():
        found[name] = folder / file
        found[name].write_text(text)
    found["mask"] = folder / "mask.smtx"
    Pattern.random((96, 48), 0.7, seed=0).write(found["mask"])
    found["tasks"].mkdir()
    (found["tasks"] / "own.yaml").write_text(TASK)
    rows = [{"question": q, "choices": ["!", "?"], "answer": n % 2} for n, q in enumerate(("sky", "two", "water"))]
    (found["tasks"] / "questions.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(loading.load(found["config"], [f"run_dir={found['run']}"]))
    start = (str(found["run"]), ModelConfig(**vars(checkpoints.shape_of(found["run"]))))
    there = [f"data.path={found['pairs']}", f"run_dir={found['tuned']}"]
    train(loading.load(found["tuning"], there, start=start))
    convert.convert(found["run"], found["wordless"])
    (found["wordless"] / "tokenizer.json").unlink()
    return {name: str(path) for name, path in found.items()}


VOLATILE = re.compile(
    r"seconds|ratio|gflops|peak|possible|disturbed|break_even|load$|decoding|calibration|checkpoint$|hardware|speedup|_second"
)


def stable(body, timed):
    """What a verb printed without what differs between two runs of it."""
    if isinstance(body, dict):
        return {k: v is None if timed and VOLATILE.search(k) else stable(v, timed) for k, v in body.items()}
    return [stable(item, timed) for item in body] if isinstance(body, list) else body


@pytest.fixture(scope="module")
def seen():
    """Observations that several cases share."""
    return {}


@pytest.fixture
def observe(vspdf, places, tmp_path, monkeypatch, seen):
    """What can be seen of `vspdf ARGUMENTS` in a folder of its own: status, output, files, forward passes."""

    def look(verb, arguments, before=None):
        key = (verb, arguments, before)
        if key in seen:
            return seen[key]
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        monkeypatch.chdir(folder)
        words = lambda text: shlex.split(text.format(**places))  # noqa: E731
        if before is not None:
            assert vspdf(*verb.split(), *words(before))[0] == 0
        passes = 0

        def count(module, inputs):
            nonlocal passes
            passes += 1

        hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
        try:
            status, out, err = vspdf(*verb.split(), *words(arguments))
        finally:
            hook.remove()
        assert status in (0, 2), err
        timed = verb.split()[0] in ("bench", "plan", "train", "finetune", "generate", "compare")
        try:
            out = stable(json.loads(out), timed)
        except ValueError:
            out = "text" if timed or verb == "report" else out
        left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        seen[key] = (status, out, left, passes, err.splitlines()[-1:] if status == 2 else [])
        return seen[key]

    return look
