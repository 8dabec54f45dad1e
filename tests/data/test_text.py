"""Text as samples: held-out documents, the order, validation; and what cannot be prepared, in one line."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vspdf.config.resolve import resolve_data
from vspdf.config.resolved import ResolvedData
from vspdf.config.settings import DataConfig
from vspdf.data.corpora import load_documents
from vspdf.data.text import Dataset, prepare
from vspdf.data.tokens import TEST, TRAIN, VALIDATION, held_out, split
from vspdf.errors import UserError


def texts(config: ResolvedData) -> list[str]:
    return [document.text for document in load_documents(config)]


# --- Bad input


def test_corpus_shorter_than_a_sequence(text_file, tmp_path, refused):
    (tmp_path / "tiny.txt").write_text("tiny")
    message = refused(tmp_path / "tiny.txt", 512)
    assert "too short: it has 4 bytes, expected at least 513" in message
    size = text_file.stat().st_size
    message = refused(text_file, size - 10)  # long enough only with the validation text
    assert "training tokens" in message and f"at least {size - 9}" in message


def test_nothing_to_hold_out(tmp_path, refused):
    (tmp_path / "a.txt").write_text("one short line\n" * 10)
    assert "is a single document of 150 bytes" in refused(tmp_path / "a.txt")
    folder = tmp_path / "copies"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text("the same text in every file")
    assert "at least two different ones" in refused(folder)


def test_unfit_settings(text_file, refused):
    assert "validation_fraction must lie between 0 and 1, is 0.0" in refused(text_file, validation_fraction=0.0)
    assert "sequence_length is 0" in refused(text_file, 0)
    assert "seed is -1" in refused(text_file, seed=-1)
    assert "Did you mean 'bytes'?" in refused(text_file, tokenizer="byts")


# --- Held-out documents


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 1000)), min_size=2, max_size=60),
    st.floats(0.01, 0.99),
    st.randoms(),
)
def test_held_out_documents(documents, fraction, rng):
    sizes_of = dict(documents)  # equal documents have equal sizes
    keys = np.array([key for key, _ in documents], np.uint64)
    sizes = np.array([sizes_of[key] for key, _ in documents], np.int64)
    if len(sizes_of) < 2:
        with pytest.raises(ValueError):
            held_out(keys, sizes, fraction)
        return
    held = held_out(keys, sizes, fraction)
    assert 0 < held.sum() < len(held)
    assert not set(keys[held]) & set(keys[~held])  # no text on both sides
    groups = {key: sizes[keys == key].sum() for key in set(keys.tolist())}
    share = sizes[held].sum()
    if len(set(keys[held].tolist())) > 1:
        assert share <= fraction * sizes.sum()
    assert (
        share + min(groups[key] for key in set(keys[~held].tolist())) > fraction * sizes.sum()
    )  # nothing more would fit
    shuffled = rng.sample(range(len(keys)), len(keys))
    assert (held_out(keys[shuffled], sizes[shuffled], fraction) == held[shuffled]).all()


@pytest.mark.parametrize("test", [0.01, 0.3, 0.7999])
def test_a_test_part_is_taken_from_the_training_text(test):
    keys, sizes = np.arange(40, dtype=np.uint64)[::-1] // 2, np.full(40, 10)  # every document twice
    parts = split(keys, sizes, 0.2, test)
    assert (parts == VALIDATION).tolist() == held_out(keys, sizes, 0.2).tolist()  # as without one
    by_part = [set(keys[parts == part].tolist()) for part in (TRAIN, VALIDATION, TEST)]
    assert all(by_part) and sum(map(len, by_part)) == 20  # none is empty, no text is in two
    assert abs((parts == TEST).mean() - test) <= 0.1
    without = split(keys, sizes, 0.2)
    assert without.tobytes() == held_out(keys, sizes, 0.2).tobytes()  # what caches were keyed by before


def test_without_a_third_document_there_is_no_test_part(tmp_path, settings_for, refused):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 100)
    assert "has 2 different documents" in refused(tmp_path, test_fraction=0.1)
    with pytest.raises(UserError, match="there is no test text"):
        prepare(settings_for(tmp_path), 16, 0).for_test()


def test_test_text_is_read_once_and_apart(text_file, settings_for):
    before = prepare(settings_for(text_file), 16, 0)
    dataset = prepare(settings_for(text_file, test_fraction=0.2), 16, 0)
    assert "test" not in before.manifest and dataset.manifest["validation"] == before.manifest["validation"]
    assert dataset.manifest["order"] != before.manifest["order"]
    whole = sum(dataset.manifest[part]["bytes"] for part in ("train", "validation", "test"))
    assert whole == dataset.manifest["corpus"]["bytes"]
    batches = list(dataset.for_test().validation_batches(4))
    assert sum(batch.targets.numel() for batch in batches) == dataset.manifest["test"]["tokens"]
    assert batches[0].tokens[0, 0] == dataset.tokenizer.end_of_document
    text = dataset.tokenizer.decode([i for batch in batches for i in batch.targets.flatten().tolist()])
    documents = texts(settings_for(text_file))
    mine = [document for document in documents if document in text]
    assert sum(len(document.encode()) for document in mine) == dataset.manifest["test"]["bytes"]
    train, validation = everything(dataset)
    assert mine and not any(document in train or document in validation for document in mine)


def test_split_is_the_same_for_every_seed_length_and_tokenizer(text_file, settings_for):
    splits = [
        prepare(settings_for(text_file, tokenizer=tokenizer), length, seed).manifest
        for tokenizer, length, seed in [("bytes", 16, 0), ("bytes", 32, 5), ("bpe:300", 16, 0)]
    ]
    assert len({manifest["validation"]["bytes"] for manifest in splits}) == 1
    assert len({manifest["train"]["bytes"] for manifest in splits}) == 1


def everything(dataset: Dataset) -> tuple[str, str]:
    """Training and validation text, read through the public doors."""
    windows = {int(w): i for i, w in enumerate(dataset.window_ids(0, dataset.n_samples))}
    ids = [int(dataset.batch(windows[0], 1)[0][0, 0])]
    for window in range(dataset.n_samples):
        ids += dataset.batch(windows[window], 1)[1][0].tolist()
    held = [i for batch in dataset.validation_batches(3) for i in batch.targets.flatten().tolist()]
    return dataset.tokenizer.decode(ids), dataset.tokenizer.decode(held)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_streams_are_whole_documents(tokenizer, text_file, settings_for, prose):
    config = settings_for(text_file, tokenizer=tokenizer)
    dataset = prepare(config, 16, 0)
    train, validation = everything(dataset)
    sections = texts(config)
    held = [section for section in sections if section in validation]
    assert validation == "".join(held) and not any(section in train for section in held)
    # The rest in order, but for the end that fills no window.
    assert "".join(section for section in sections if section not in held).startswith(train.rstrip("\ufffd"))
    manifest = dataset.manifest
    assert len(validation.encode()) == manifest["validation"]["bytes"]
    assert manifest["train"]["bytes"] + manifest["validation"]["bytes"] == len(prose(1).encode())
    assert manifest["train"]["documents"] + manifest["validation"]["documents"] == len(sections)
    assert dataset.n_samples == manifest["train"]["tokens"] // 16 == manifest["samples"]


# --- The order of samples


@pytest.fixture(scope="module")
def datasets(tmp_path_factory, prose):
    """Datasets by sequence length, seed and repeat, on one small corpus."""
    folder = tmp_path_factory.mktemp("order")
    (folder / "text.txt").write_text(prose(3), encoding="utf-8")
    made: dict[tuple[int, int, bool], Dataset] = {}

    def get(length: int, seed: int, repeat: bool = False) -> Dataset:
        if (length, seed, repeat) not in made:
            config = DataConfig(corpus=str(folder / "text.txt"), cache_dir=str(folder / "cache"), repeat=repeat)
            made[length, seed, repeat] = prepare(resolve_data(config), length, seed)
        return made[length, seed, repeat]

    return get


lengths, seeds = st.sampled_from([1, 7, 64, 500]), st.integers(0, 3)


@settings(deadline=None)
@given(lengths, seeds)
def test_no_window_twice_in_an_epoch(datasets, length, seed):
    dataset = datasets(length, seed, True)
    for epoch in range(3):
        ids = dataset.window_ids(epoch * dataset.n_samples, dataset.n_samples)
        assert sorted(ids) == list(range(dataset.n_samples))


@settings(deadline=None)
@given(lengths, seeds, st.data())
def test_order_does_not_depend_on_batch_size_or_resumption(datasets, length, seed, draw):
    dataset = datasets(length, seed, True)
    total = 2 * dataset.n_samples + 5
    start = draw.draw(st.integers(0, total - 1))
    count = draw.draw(st.integers(1, min(40, total - start)))
    cuts = [0, *sorted(draw.draw(st.lists(st.integers(0, count), max_size=4))), count]
    tokens, targets = dataset.batch(start, count)
    pieces = [dataset.batch(start + a, b - a) for a, b in pairwise(cuts)]
    assert torch.equal(tokens, torch.cat([piece[0] for piece in pieces]))
    assert torch.equal(targets, torch.cat([piece[1] for piece in pieces]))
    assert tokens.shape == targets.shape == (count, length) and tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_windows_tile_the_training_text(datasets):
    dataset = datasets(7, 0)
    ids = dataset.window_ids(0, dataset.n_samples)
    tokens, targets = dataset.batch(0, dataset.n_samples)
    order = np.argsort(ids)
    assert torch.equal(tokens[order].flatten()[1:], targets[order].flatten()[:-1])
    assert tokens[order][0, 0] == dataset.tokenizer.end_of_document


def test_the_order_never_changes(datasets):
    # Written down once: a later NumPy or a rewrite must not reorder runs that are to be resumed.
    assert datasets(500, 0).window_ids(0, 8).tolist() == [11, 3, 20, 13, 2, 15, 1, 18]


def test_seeds_and_epochs_differ(datasets):
    one, two = datasets(64, 0, True), datasets(64, 1, True)
    n = one.n_samples
    assert one.window_ids(0, n).tolist() != two.window_ids(0, n).tolist()
    assert one.window_ids(0, n).tolist() != one.window_ids(n, n).tolist()
    assert one.manifest["order"] != two.manifest["order"]
    assert one.manifest["order"] == datasets(64, 0).manifest["order"]
    assert one.manifest["order"] != datasets(7, 0).manifest["order"]


def test_end_of_data(datasets):
    dataset = datasets(64, 0)
    n = dataset.n_samples
    dataset.check(n)
    dataset.batch(n - 2, 2)
    for refuse in (lambda: dataset.batch(n - 2, 3), lambda: dataset.check(n + 1)):
        with pytest.raises(UserError) as error:
            refuse()
        assert f"has {n} samples of 64 tokens, the run wants {n + 1}" in str(error.value)
        assert "more text" in str(error.value) and "data.repeat=true" in str(error.value)
    datasets(64, 0, True).check(10**9)
    with pytest.raises(UserError, match="counted from 0"):
        dataset.batch(-1, 2)


# --- Validation


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
@pytest.mark.parametrize("length", [1, 16, 10_000])
def test_every_held_out_token_is_a_target_once(tokenizer, length, tmp_path, settings_for, prose):
    (tmp_path / "long.txt").write_text(prose(5, 300), encoding="utf-8")
    dataset = prepare(settings_for(tmp_path / "long.txt", tokenizer=tokenizer), length, 0)
    batches = list(dataset.validation_batches(4))
    assert sum(batch.targets.numel() for batch in batches) == dataset.manifest["validation"]["tokens"]
    assert sum(batch.target_bytes for batch in batches) == dataset.manifest["validation"]["bytes"]
    for tokens, targets, size in batches:
        assert tokens.shape == targets.shape and tokens.shape[0] <= 4 and tokens.shape[1] <= length
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        decoded = b"".join(dataset.tokenizer._model.decode(row).encode() for row in targets.tolist())
        assert size == len(decoded) or "\ufffd" in decoded.decode()


def test_part_of_the_validation_text(text_file, settings_for):
    dataset = prepare(settings_for(text_file, validation_fraction=0.5), 16, 0)
    total = dataset.manifest["validation"]["tokens"]
    for wanted, got in [(1, 16), (16, 16), (100, 96), (total - 1, (total - 1) // 16 * 16), (total, total), (0, total)]:
        batches = list(dataset.validation_batches(4, wanted))
        assert sum(batch.targets.numel() for batch in batches) == got
    part = torch.cat([batch.targets for batch in dataset.validation_batches(4, 100)])
    assert torch.equal(part, torch.cat([batch.targets for batch in dataset.validation_batches(100, 100)]))
    whole = torch.cat([batch.targets for batch in dataset.validation_batches(1, total - 1)])
    positions = [int((whole == row).all(1).nonzero()[0]) for row in part]
    assert max(positions) > len(whole) * 2 / 3  # spread over the text, not its beginning
