"""Task data as training samples: what is a target, what fits, what is held out."""

import json

import pytest
import torch

from vspdf.config.resolve import resolve_task
from vspdf.config.settings import DataConfig
from vspdf.data import pairs
from vspdf.data.tokenizer import Tokenizer
from vspdf.errors import UserError
from vspdf.evaluate.loss import evaluate
from vspdf.model import GPT
from vspdf.shapes import Shape

TOKENIZER = Tokenizer.bytewise()
END = 256


def write(folder, rows, name="pairs.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps({"context": c, "completion": r}) + "\n" for c, r in rows))
    return str(path)


def config(path, **changes):
    data = {"path": path, "length": 24, "validation_fraction": 0.3, **changes}
    return resolve_task(DataConfig(**data), longest=64)


ROWS = [("ab", ["xyz", "w"]), ("cde", ["v"]), ("f", ["uuuuuu"]), ("ghij", ["st", "r", "q"]), ("k", ["p"])]


def everything(data):
    """All samples of the first epoch."""
    tokens, targets = data.batch(0, data.n_samples)
    return [
        (row[row != END].tolist(), target[target >= 0].tolist()) for row, target in zip(tokens, targets, strict=True)
    ]


def test_only_completions_and_their_end_are_targets(tmp_path):
    data = pairs.prepare(config(write(tmp_path, [("ab", "xyz"), ("c", "d")]), validation_fraction=0.5), 0, TOKENIZER)
    both = [data.batch(0, 1), tuple(next(data.validation_batches(4)))[:2]]
    both.sort(key=lambda item: -item[0].shape[1])
    tokens, targets = both[0]
    assert tokens.tolist() == [[*b"ab", END, *b" xyz"]]
    assert targets.tolist() == [[-100, -100, *b" xyz", END]]


def test_a_batch_is_as_wide_as_its_longest_pair(tmp_path):
    data = pairs.prepare(config(write(tmp_path, ROWS)), 0, TOKENIZER)
    tokens, targets = data.batch(0, data.n_samples)
    lengths = (tokens != END).sum(1) + 1  # the end after the context; filler is END too
    assert tokens.shape == targets.shape and tokens.shape[1] == int(lengths.max())
    assert data.tokens(data.n_samples) == int(lengths.sum())
    assert data.tokens(0) == 0 and data.tokens(1) == int(lengths[0])
    assert all((target[int(n) :] == -100).all() for target, n in zip(targets, lengths, strict=True))
    assert all(int((target >= 0).sum()) for target in targets)


def test_contexts_are_held_out_whole_and_epochs_differ(tmp_path):
    data = pairs.prepare(config(write(tmp_path, ROWS), repeat=True), 0, TOKENIZER)
    contexts = {chr(int(row[0])) for row in data.batch(0, data.n_samples)[0]}
    held = {chr(int(row[0])) for batch in data.validation_batches(3) for row in batch.tokens}
    assert contexts | held == set("acfgk") and not contexts & held
    n = data.n_samples
    assert sorted(data.window_ids(n, n)) == sorted(data.window_ids(0, n))
    assert data.tokens(2 * n + 1) == 2 * data.tokens(n) + len(data._train[data.window_ids(2 * n, 1)[0]].ids) - 1
    other = pairs.prepare(config(write(tmp_path, ROWS)), 1, TOKENIZER)
    assert other.manifest["order"] != data.manifest["order"]
    assert [b.tokens.tolist() for b in other.validation_batches(9)] == [
        b.tokens.tolist() for b in data.validation_batches(9)
    ]


def test_loss_is_the_mean_over_targets_whatever_the_batch(tmp_path):
    data = pairs.prepare(config(write(tmp_path, ROWS)), 0, TOKENIZER)
    model = GPT(Shape(1, 16, 2, 32, 257, 24), init_std=0.3)
    nats = count = size = 0
    for pair in data._validation:
        ids = torch.from_numpy(pair.ids)
        logprobs = model(ids[None, :-1])[0].log_softmax(-1).detach()
        nats -= float(sum(logprobs[i - 1, ids[i]] for i in range(pair.begin, len(ids))))
        count += len(ids) - pair.begin
        size += len(ids) - pair.begin - 1
    for batch_size in (1, 2, 64):
        loss, bits = evaluate(model, data, batch_size)
        assert loss == pytest.approx(nats / count, rel=1e-5)
        assert bits == pytest.approx(nats / 0.6931471805599453 / size, rel=1e-5)


LONG = [("c" * 30, "abc"), ("short", "abc"), ("d" * 30, "e"), ("f", "g" * 40)]


def test_overlong_pairs_are_refused_with_their_number(tmp_path):
    with pytest.raises(
        UserError, match=r"[123] of [123] pairs for \w+ are longer than data.length = 24 tokens.*overlong=cut"
    ):
        pairs.prepare(config(write(tmp_path, LONG)), 0, TOKENIZER)


@pytest.mark.parametrize("overlong", ["cut", "drop"])
def test_overlong_pairs_are_cut_or_dropped_and_that_is_said(tmp_path, caplog, overlong):
    held = write(tmp_path, [("v", "w")], "held.jsonl")
    settings = config(write(tmp_path, LONG), overlong=overlong, validation_path=held)
    data = pairs.prepare(settings, 0, TOKENIZER)
    found = sorted(everything(data))
    if overlong == "drop":
        assert len(found) == 1 and "3 of 4 pairs for train are longer than data.length = 24 and left out" in caplog.text
    else:
        assert "2 of 4 pairs for train: the end of the context is cut" in caplog.text
        assert "1 of 4 pairs for train are longer" in caplog.text  # its completion alone
        rows = [bytes(row) for row, _ in found]
        assert rows == [b"c" * 19 + b" abc", b"d" * 21 + b" e", b"short abc"]
        assert all(len(row) + 1 <= 24 for row in rows)


def test_what_teaches_nothing_is_left_out_and_counted(tmp_path, caplog):
    rows = [("", "x"), (" ", "y"), ("a", []), ("b", ["", "z"]), ("c", "w")]
    data = pairs.prepare(config(write(tmp_path, rows)), 0, TOKENIZER)
    assert "2 of 5 examples have no context and are left out" in caplog.text
    assert "1 of 5 examples have no reference and are left out" in caplog.text
    assert data.manifest["train"]["documents"] + data.manifest["validation"]["documents"] == 2
    with pytest.raises(UserError, match="no example with both a context and a reference"):
        pairs.prepare(config(write(tmp_path, rows[:3])), 0, TOKENIZER)
    with pytest.raises(UserError, match="has a single context"):
        pairs.prepare(config(write(tmp_path, [("a", "x"), ("a", "y")])), 0, TOKENIZER)


def test_a_part_for_the_test_leaves_validation_as_it_is(tmp_path):
    rows = [(f"context {i // 2}", f"answer {i}") for i in range(80)]
    path, other = write(tmp_path, rows), write(tmp_path, ROWS, "other.jsonl")
    contexts = lambda some: {example.context for example in some}  # noqa: E731
    without = pairs.parts(config(path))
    found = pairs.parts(config(path, test_fraction=0.2))
    assert found["validation"] == without["validation"] and "test" not in without
    assert contexts(without["train"]) == contexts(found["train"]) | contexts(found["test"])
    assert 5 <= len(contexts(found["test"])) <= 8 and not contexts(found["train"]) & contexts(found["test"])
    beside = pairs.parts(config(path, validation_path=other, test_fraction=0.2))
    assert len(beside["validation"]) == len(ROWS) and len(contexts(beside["train"])) >= 32
    data = pairs.prepare(config(path, test_fraction=0.2), 0, TOKENIZER)
    assert data.manifest["test"]["documents"] == len(found["test"]) == sum(1 for _ in data.for_test()._validation) // 2
    with pytest.raises(UserError, match=r"no test pairs: data.test_fraction is 0"):
        pairs.prepare(config(path), 0, TOKENIZER).for_test()
    two = write(tmp_path, [("a", "x"), ("b", "y")], "two.jsonl")
    with pytest.raises(UserError, match="has 2 contexts: expected at least 3, one to train on and one to hold out and"):
        pairs.parts(config(two, test_fraction=0.2))


def test_running_out_of_pairs(tmp_path):
    data = pairs.prepare(config(write(tmp_path, ROWS)), 0, TOKENIZER)
    with pytest.raises(UserError, match=r"'pairs.jsonl' has \d pairs, the run wants 100.*data.repeat=true"):
        data.check(100)


def test_the_tokenizer_is_the_models(tmp_path):
    assert pairs.tokenizer_for(config("pairs.jsonl"), TOKENIZER, "run") is TOKENIZER
    with pytest.raises(
        UserError, match=r"'folder' has no tokenizer: put a tokenizer.json beside its weights, or give data.t"
    ):
        pairs.tokenizer_for(config("pairs.jsonl"), None, "folder")
    with pytest.raises(UserError, match="would learn a new one"):
        pairs.tokenizer_for(config("pairs.jsonl", tokenizer="bpe:300"), None, "folder")
    trained = Tokenizer.train(["some words, some more words"] * 3, 260)
    trained.save(tmp_path / "tokenizer.json")
    asked = config("pairs.jsonl", tokenizer=str(tmp_path / "tokenizer.json"))
    assert pairs.tokenizer_for(asked, trained, "run").vocab_size == 260
    assert pairs.tokenizer_for(asked, None, "folder").vocab_size == 260
    with pytest.raises(UserError, match=r"is not that of 'run' \(bytes\)"):
        pairs.tokenizer_for(asked, TOKENIZER, "run")
