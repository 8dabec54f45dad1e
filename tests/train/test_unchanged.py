"""A run goes on, and is evaluated, on the data that it began with: what was replaced under the same name is noticed."""

import json

import pytest

from vspdf.config import loading
from vspdf.data.tokenizer import Tokenizer
from vspdf.errors import UserError
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
    message = r"the tokenizer '.*' has changed since the model was trained with it: .*tokenizer.json in the run directory is a copy"
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
    with pytest.raises(UserError, match="the tokenizer '.*' has changed since the model was trained with it"):
        worker._work(settings, order)
    assert not (tmp_path / "run" / "evaluation.json").exists()
    put_back()
    worker._work(settings, order)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["val_loss"] > 0
