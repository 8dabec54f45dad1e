import inspect
import json
import logging
import os
import platform
import random
import subprocess
import sys
import textwrap
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vspdf.config.resolve import resolve_data
from vspdf.config.resolved import ResolvedData
from vspdf.config.settings import DataConfig
from vspdf.data import text as data_text
from vspdf.data import tokens as data_tokens
from vspdf.data.corpora import load_documents
from vspdf.data.text import Dataset, prepare
from vspdf.data.tokenizer import Tokenizer
from vspdf.data.tokens import TEST, TRAIN, VALIDATION, held_out, split
from vspdf.errors import UserError
from vspdf.files import user_cache

WORDS = ["sparse", "dense", "weight", "token", "layer", "gradient", "step", "café", "naïve", "世界", "\U0001f600"]


def prose(seed: int, paragraphs: int = 60) -> str:
    rng = random.Random(seed)
    return "\n\n".join(" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for _ in range(paragraphs)) + "\n"


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(prose(1), encoding="utf-8", newline="")
    return path


@pytest.fixture
def settings_for(tmp_path):
    def settings(corpus, **more):
        return resolve_data(DataConfig(**{"corpus": str(corpus), "cache_dir": str(tmp_path / "cache")} | more))

    return settings


@pytest.fixture
def refused(settings_for):
    """The one line with which `prepare` refuses."""

    def message(corpus, sequence_length=16, seed=0, **more) -> str:
        with pytest.raises(UserError) as error:
            prepare(settings_for(corpus, **more), sequence_length, seed)
        assert "\n" not in str(error.value)
        return str(error.value)

    return message


def texts(config: ResolvedData) -> list[str]:
    return [document.text for document in load_documents(config)]


# --- Corpora


def test_standard_library_is_its_sources(settings_for):
    names = [name for name, _ in load_documents(settings_for("stdlib"))]
    assert len(names) > 100 and names == sorted(names) and {"os.py", "logging.py"} & set(names) == {"os.py"}
    assert not any(name.startswith(("_sysconfigdata", "sitecustomize")) for name in names)
    dataset = prepare(settings_for("stdlib"), 256, 0)
    assert dataset.manifest["corpus"]["python"] == platform.python_version()
    assert dataset.manifest["corpus"]["documents"] == len(names)
    assert dataset.n_samples > 10_000
    share = dataset.manifest["validation"]["bytes"] / dataset.manifest["corpus"]["bytes"]
    assert 0.045 < share <= 0.05


def test_all_of_the_standard_library_is_more_than_its_top(settings_for):
    whole, top = ({name for name, _ in load_documents(settings_for(name))} for name in ("stdlib-all", "stdlib"))
    assert top < whole and "json/decoder.py" in whole
    assert not any("site-packages" in name or name.startswith("_sysconfigdata") for name in whole)


def test_documentation_of_the_standard_library_is_english(settings_for):
    found = dict(load_documents(settings_for("stdlib-docs")))
    assert inspect.getdoc(textwrap.dedent) in found["textwrap.py"] and "import re" not in found["textwrap.py"]
    assert "topic lambda" in found and not any("test" in name.split("/") for name in found)


def test_several_corpora_are_one_after_the_other(text_file, tmp_path, settings_for, refused):
    (tmp_path / "b.txt").write_text("bee")
    both = settings_for(f"{text_file} + {tmp_path / 'b.txt'}")
    assert texts(both) == [*texts(settings_for(text_file)), "bee"]
    assert load_documents(both).python is None and load_documents(settings_for(f"{text_file} + stdlib")).python
    assert "Corpus 'nothing.txt' not found" in refused(f"{text_file} + nothing.txt")


def test_a_file_is_cut_into_whole_paragraphs(text_file, settings_for):
    sections = texts(settings_for(text_file))
    assert "".join(sections) == prose(1)
    assert 20 < len(sections) <= 60
    assert all(section.endswith("\n\n") for section in sections[:-1])


@pytest.mark.parametrize(
    "text",
    ["x" * 100_000, "word " * 20_000, "line\n" * 2000, "\ufeffbegin\r\n\r\n" * 500, "é" * 60_000],
    ids=lambda t: ascii(t[:8]),
)
def test_any_file_is_cut_and_kept(text, tmp_path, settings_for):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    sections = texts(settings_for(tmp_path / "a.txt"))
    assert "".join(sections) == text.removeprefix("\ufeff") and len(sections) > 2


def test_a_folder_is_its_text_files_in_order(tmp_path, settings_for, caplog):
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "b.md").write_text("bee")
    (root / "a.TXT").write_text("ay")
    (root / "sub" / "c.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "two"}\n')
    (root / "empty.py").write_text("")
    (root / "picture.png").write_bytes(b"\x89PNG\xff")
    (root / ".hidden" / "d.txt").write_text("no")
    assert texts(settings_for(root)) == ["ay", "bee", "one", "two"]
    assert "1 other files ignored (.png)" in caplog.text


def test_json_lines(tmp_path, settings_for):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": f"é {i}\nx"}) + "\n" for i in range(5)))
    assert texts(settings_for(path, text_field="body")) == [f"é {i}\nx" for i in range(5)]


def test_hugging_face_dataset(tmp_path, settings_for, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": prose(i, 3)}) + "\n" for i in range(9)))
    assert texts(settings_for(f"hf:{folder}")) == [prose(i, 3) for i in range(9)]
    with pytest.raises(UserError, match="Did you mean 'text'"):
        texts(settings_for(f"hf:{folder}", text_field="texts"))


def test_unreachable_hugging_face_dataset(refused, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert "Cannot load corpus 'hf:nobody/nothing'" in refused("hf:nobody/nothing")


def test_missing_datasets_package(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refused("hf:wikitext:wikitext-2-raw-v1")


# --- Bad input


def test_missing_corpus(tmp_path, refused):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.txt").write_text("x")
    assert f"Did you mean '{tmp_path / 'corpus' / 'train.txt'}'?" in refused(tmp_path / "corpus" / "trian.txt")
    assert f"Did you mean '{tmp_path / 'corpus' / 'train.txt'}'?" in refused(tmp_path / "corpsu" / "train.txt")
    assert "Did you mean 'stdlib'?" in refused("stdlb")
    message = refused("/nowhere/at/all")
    assert "'/nowhere/at/all' not found: expected" in message and "FILE.jsonl" in message


@pytest.mark.parametrize("name", ["empty.txt", "blank.txt", "empty.jsonl", "folder"])
def test_empty_corpus(name, tmp_path, refused):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "a.txt").write_text("")
    else:
        path.write_text("  \n\n" * 5000 if name == "blank.txt" else "")
    assert f"Corpus '{path}' is empty" in refused(path)


def test_folder_without_text(tmp_path, refused):
    folder = tmp_path / "pictures"
    folder.mkdir()
    assert "has no text: expected files in .txt" in refused(folder)
    (folder / "a.png").write_bytes(b"x")
    assert "found .png" in refused(folder)


def test_not_utf8(tmp_path, refused):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\nna\xefve\n")
    assert f"'{path}' is not UTF-8 (byte 0xef" in refused(path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.txt").write_text("x", encoding="utf-16")
    assert "b.txt' is UTF-16, not UTF-8" in refused(tmp_path / "folder")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(text_file, refused):
    text_file.chmod(0)
    assert f"Cannot read '{text_file}' (Permission denied)" in refused(text_file)


@pytest.mark.parametrize(
    "line, parts",
    [
        ('{"text": ', ["line 2", "no JSON"]),
        ('["text"]', ["line 2", "no object"]),
        ('{"txt": "x"}', ["line 2", "no field 'text'", "Did you mean 'txt'?"]),
        ('{"text": 3}', ["line 2", "'text' is int, expected text"]),
        ('{"text": "\\ud800"}', ["line 2", "surrogate"]),
    ],
    ids=["no json", "no object", "no field", "no text", "surrogate"],
)
def test_unfit_json_lines(line, parts, tmp_path, refused):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' + line + "\n")
    message = refused(path)
    for part in [str(path), *parts]:
        assert part in message


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


def test_cache_that_cannot_be_written(text_file, refused):
    assert "set data.cache_dir or VSPDF_CACHE" in refused(text_file, cache_dir=str(text_file / "cache"))


def test_no_space_left(text_file, tmp_path, refused):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        message = refused(text_file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Cannot keep the token cache" in message and "room" in message
    assert cache_files(tmp_path) == []


def test_a_corpus_that_changes_while_it_is_read(text_file, refused, monkeypatch):
    class Late(data_tokens._Survey):
        @classmethod
        def of(cls, corpus):
            survey = super().of(corpus)
            text_file.write_text(prose(2), encoding="utf-8")
            return survey

    monkeypatch.setattr(data_text, "_Survey", Late)
    assert "changed while it was read" in refused(text_file)


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
def test_streams_are_whole_documents(tokenizer, text_file, settings_for):
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
def datasets(tmp_path_factory):
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
def test_every_held_out_token_is_a_target_once(tokenizer, length, tmp_path, settings_for):
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


# --- The token cache


def cache_files(tmp_path):
    return [path for path in (tmp_path / "cache").iterdir()]


def samples(dataset: Dataset) -> list:
    return [dataset.batch(0, dataset.n_samples)[0].tolist(), dataset.manifest, dataset.tokenizer.to_json()]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_tokens_are_made_once(tokenizer, text_file, tmp_path, settings_for, caplog):
    config = settings_for(text_file, tokenizer=tokenizer)
    with caplog.at_level(logging.INFO, "vspdf"):
        first = samples(prepare(config, 16, 0))
        assert "Tokenising" in caplog.text
        caplog.clear()
        (file,) = cache_files(tmp_path)
        stamp = file.stat().st_mtime_ns
        assert samples(prepare(config, 16, 0)) == first
        prepare(config, 32, 9)
    assert caplog.text == "" and file.stat().st_mtime_ns == stamp and cache_files(tmp_path) == [file]


def test_other_text_split_or_tokenizer_is_another_cache(text_file, tmp_path, settings_for):
    prepare(settings_for(text_file), 16, 0)
    prepare(settings_for(text_file, tokenizer="bpe:300"), 16, 0)
    prepare(settings_for(text_file, validation_fraction=0.3), 16, 0)
    text_file.write_text(prose(2), encoding="utf-8")
    prepare(settings_for(text_file), 16, 0)
    assert len(cache_files(tmp_path)) == 4


def test_an_edit_that_keeps_the_split_is_another_cache(tmp_path, settings_for):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "held.txt").write_text("short")
    for letter in "ab":
        (folder / "train.txt").write_text(letter * 100)
        tokens, _ = prepare(settings_for(folder), 16, 0).batch(0, 1)
        assert tokens[0, -1] == ord(letter)


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda content: b"", "truncated"),
        (lambda content: content[: len(content) // 2], "truncated"),
        (lambda content: content[:-1], "truncated"),
        (lambda content: content[1:], "truncated"),
        (lambda content: b"something else entirely, which is longer than the tail", "no token cache"),
        (lambda content: flip(content, 100), "damaged"),
        (lambda content: flip(content, len(content) - 100), "damaged"),
        (lambda content: flip(content, len(content) - 1), "no token cache"),
    ],
    ids=["empty", "half", "last byte", "first byte", "foreign", "flipped token", "flipped footer", "flipped magic"],
)
def test_a_damaged_cache_is_made_anew(harm, said, text_file, tmp_path, settings_for, caplog):
    config = settings_for(text_file)
    first = samples(prepare(config, 16, 0))
    (file,) = cache_files(tmp_path)
    content = file.read_bytes()
    file.write_bytes(harm(content))
    assert samples(prepare(config, 16, 0)) == first
    assert said in caplog.text and "made anew" in caplog.text
    assert file.read_bytes() == content


def test_the_cache_of_another_corpus_is_not_taken(text_file, tmp_path, settings_for, caplog):
    config = settings_for(text_file)
    first = samples(prepare(config, 16, 0))
    (mine,) = cache_files(tmp_path)
    (tmp_path / "other.txt").write_text(prose(9), encoding="utf-8")
    prepare(settings_for(tmp_path / "other.txt"), 16, 0)
    (other,) = (file for file in cache_files(tmp_path) if file != mine)
    mine.write_bytes(other.read_bytes())
    assert samples(prepare(config, 16, 0)) == first
    assert "belongs to another corpus" in caplog.text


PREPARE = """
import json, sys
from vspdf.config.resolve import resolve_data
from vspdf.config.settings import DataConfig
from vspdf.data.text import prepare

sys.stdin.readline()  # both start at the parent's word
config = DataConfig(corpus=sys.argv[1], tokenizer="bpe:300", cache_dir=sys.argv[2])
dataset = prepare(resolve_data(config), 16, 0)
print(json.dumps([dataset.manifest, dataset.batch(0, 20)[0].tolist()]))
"""


def test_two_processes_prepare_at_once(text_file, tmp_path):
    command = [sys.executable, "-c", PREPARE, str(text_file), str(tmp_path / "cache")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    first, second = (json.loads(worker.communicate(timeout=60)[0]) for worker in workers)
    assert first == second
    assert len(cache_files(tmp_path)) == 1


def test_large_vocabularies_take_four_bytes(text_file, tmp_path, settings_for):
    content = json.loads(Tokenizer.bytewise().to_json())
    content["model"]["vocab"]["<far>"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    dataset = prepare(settings_for(text_file, tokenizer=str(tmp_path / "tokenizer.json")), 16, 0)
    assert dataset.vocab_size == 70_001
    plain = prepare(settings_for(text_file), 16, 0)
    assert torch.equal(dataset.batch(0, 9)[0], plain.batch(0, 9)[0])
    large, small = sorted((file.stat().st_size for file in cache_files(tmp_path)), reverse=True)
    assert large - small > plain.manifest["train"]["tokens"] * 2


# --- The user's cache folder


def test_user_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("VSPDF_CACHE", str(tmp_path / "own"))
    assert user_cache() == tmp_path / "own" and user_cache().is_dir()
    monkeypatch.delenv("VSPDF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache() == tmp_path / "xdg" / "vspdf"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_cache() == tmp_path / "home" / ".cache" / "vspdf"


def test_user_cache_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VSPDF_CACHE", str(tmp_path / "file" / "cache"))
    folder = user_cache()
    assert folder.is_dir() and folder == user_cache()
    (record,) = caplog.records
    assert "not writable" in record.getMessage() and "VSPDF_CACHE" in record.getMessage()


def test_default_cache_is_the_users(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("VSPDF_CACHE", str(tmp_path / "own"))
    prepare(resolve_data(DataConfig(corpus=str(text_file))), 16, 0)
    assert len(list((tmp_path / "own" / "tokens").iterdir())) == 1
