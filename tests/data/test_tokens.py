"""The token cache: made once, made anew where it is damaged or another's, and where it lies."""

import json
import logging
import subprocess
import sys

import pytest
import torch

from vspdf.config.resolve import resolve_data
from vspdf.config.settings import DataConfig
from vspdf.data import text as data_text
from vspdf.data import tokens as data_tokens
from vspdf.data.text import Dataset, prepare
from vspdf.data.tokenizer import Tokenizer
from vspdf.files import user_cache


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


def test_other_text_split_or_tokenizer_is_another_cache(text_file, tmp_path, settings_for, prose):
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


def test_the_cache_of_another_corpus_is_not_taken(text_file, tmp_path, settings_for, caplog, prose):
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


def test_a_corpus_that_changes_while_it_is_read(text_file, refused, monkeypatch, prose):
    class Late(data_tokens._Survey):
        @classmethod
        def of(cls, corpus):
            survey = super().of(corpus)
            text_file.write_text(prose(2), encoding="utf-8")
            return survey

    monkeypatch.setattr(data_text, "_Survey", Late)
    assert "changed while it was read" in refused(text_file)


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
