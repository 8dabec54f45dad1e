"""A run goes on, and is evaluated, with the files that it began with: what was replaced or removed since is noticed."""

import json
import shutil

import pytest

from vspdf.config import loading
from vspdf.data.tokenizer import Tokenizer
from vspdf.errors import UserError
from vspdf.runs.folder import Run
from vspdf.train.trainer import train


def swapped(text):
    """A tokenizer.json in which two letters have each other's ids: of equal size, and every text has other tokens."""
    body = json.loads(text)
    vocabulary = body["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    return json.dumps(body)


@pytest.fixture(params=["file", "gpt2"])
def replaced(request, tiny, tmp_path):
    """A run of two steps of three whose tokenizer's files were replaced since: its configuration, and a way back."""
    text = Tokenizer.bytewise().to_json()
    if request.param == "file":
        path = tmp_path / "own.json"
        path.write_text(text)
        spec, other = str(path), swapped(text)
    else:
        path, spec = tmp_path / "vocab.json", f"gpt2:{tmp_path}"
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        path.write_text(json.dumps(json.loads(text)["model"]["vocab"]))
        other = json.dumps(json.loads(swapped(text))["model"]["vocab"])
    tiny.write_text(tiny.read_text().replace("data: {", f"data: {{tokenizer: '{spec}', "))
    train(loading.load(tiny, ["phases=[{steps: 2}]"]), say=lambda line: None)
    before = path.read_text()
    path.write_text(other)
    return tiny, lambda: path.write_text(before)


def test_a_tokenizer_that_was_replaced(replaced, tmp_path, refused, vspdf):
    config, put_back = replaced
    summary = (tmp_path / "run" / "summary.json").read_text()
    message = r"the tokenizer '.*' has changed since the model was trained with it: .*tokenizer.json in the run"
    refused(message, "train", config, "phases=[{steps: 2}]", "--resume")
    refused(message, "eval", tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").read_text() == summary
    put_back()
    for verb in (("eval", tmp_path / "run"), ("train", config, "phases=[{steps: 2}]", "--resume")):
        assert vspdf(*verb, "--json")[0] == 0


def test_a_trial_whose_tokenizer_was_replaced_is_no_result(replaced, tmp_path):
    """What is measured on a study's finished run later is measured with its own tokenizer."""
    from vspdf.compare import worker

    config, put_back = replaced
    settings = loading.load(config, ["phases=[{steps: 2}]"])
    order = {"test": False, "untrained": False, "task": None}
    with pytest.raises(UserError, match=r"the tokenizer '.*' has changed since the model was trained with it"):
        worker._work(settings, order)
    assert not (tmp_path / "run" / "evaluation.json").exists()
    put_back()
    worker._work(settings, order)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["val_loss"] > 0


def test_a_run_whose_checkpoints_are_gone_is_left_as_it_is(tiny, tmp_path, refused):
    """It had been trained from step 0 again, its metrics emptied. Without a summary the metrics tell."""
    run = tmp_path / "run"
    three = ("phases=[{steps: 3}]", "train.checkpoint_every=2")
    train(loading.load(tiny, three), say=lambda line: None)
    shutil.rmtree(run / "checkpoints")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    refused(r"cannot resume '.*run': the run is finished, its checkpoints/ is gone; put it back, or remove '.*run'",
            "train", tiny, *three, "--resume")  # fmt: skip
    for name in ("summary.json", "summary.digest.json"):
        (run / name).unlink()
        del before[name]
    refused("the run had come to step 3, its checkpoints/ is gone", "train", tiny, *three, "--resume")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    lines = before["metrics.jsonl"].splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:2]))  # killed while its first checkpoint was written
    train(loading.load(tiny, three), resume=True, say=lambda line: None)
    assert Run(run).finished and len(Run(run).lines) == 3
