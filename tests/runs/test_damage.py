"""Damaged, cut off and doubly used run directories: found by every reader, in one line that names the file."""

import json
import os
import shutil
import signal

import pytest

from vspdf.config import loading
from vspdf.errors import UserError
from vspdf.interop import checkpoints
from vspdf.report import run_page
from vspdf.runs import checkpoint
from vspdf.runs.folder import Run
from vspdf.runs.writer import Writer
from vspdf.train import trainer
from vspdf.train.trainer import train

SETTINGS = ("phases=[{sparsity: 0.75, steps: 6}, {steps: 3}]", "train.checkpoint_every=4", "train.keep_checkpoints=1")
NAMES = ("config.yaml", "manifest.json", "tokenizer.json", "patterns.npz", "metrics.jsonl")


class Stop(Exception):
    pass


def stop_at(step):
    def say(line):
        if f"step {step}/" in line:
            raise Stop

    return say


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny_config):
    """Configuration and folder of a run with a checkpoint of step 4, dead at the line of step 6."""
    folder = tmp_path_factory.mktemp("stopped")
    path = tiny_config(folder)
    with pytest.raises(Stop):
        train(loading.load(path, SETTINGS), say=stop_at(6))
    return path, folder / "run"


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped[1], tmp_path / "run")


def resume(path, folder):
    return train(loading.load(path, [*SETTINGS, f"run_dir={folder}"]), resume=True, say=lambda line: None)


READERS = {
    "resume": resume,
    "eval, generate, convert": lambda path, folder: checkpoints.load(folder),
    "report": lambda path, folder: run_page.write([folder]),
}


def flip(data):
    middle = len(data) // 3
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


HARMS = {"a bit": flip, "the end": lambda data: data[: len(data) // 2], "all of it": lambda data: b""}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_damage_of_any_file_is_named(stopped, run, read, name, harm):
    path = run / name
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(UserError, match=rf"{name}\b") as caught:
        read(stopped[0], run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_an_older_run_has_no_digests_and_is_read(stopped, run, older, read):
    read(stopped[0], older(run))


def test_what_was_added_after_the_checkpoint_is_no_damage(stopped, run):
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 7, "los')
    resume(stopped[0], run)
    assert [line["step"] for line in Run(run).lines] == list(range(1, 10)) and Run(run).finished


@pytest.mark.parametrize("damage, why", [
    (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "line 3 is broken: step 2 after step 3"),
    (lambda lines: [lines[0], "what?", *lines[2:]], "line 2 is broken: expected a JSON object, got 'what\\?'"),
    (lambda lines: [lines[0].replace('"loss": ', '"loss": -Infinity, "x": '), *lines[1:]], "line 1 is broken: its 'l"),
], ids=["out of order", "no JSON", "no number"])  # fmt: skip
def test_a_broken_line_of_an_older_run_is_named(stopped, run, older, damage, why):
    path = older(run) / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in damage(path.read_text().splitlines())))
    with pytest.raises(UserError, match=rf"metrics.jsonl, {why}"):
        run_page.write([run])


def test_an_altered_summary_is_named(stopped, run):
    summary = resume(stopped[0], run)
    assert Run(run).summary == json.loads((run / "summary.json").read_text()) == json.loads(json.dumps(summary))
    path = run / "summary.json"
    path.write_text(path.read_text().replace('"steps": 6', '"steps": 7'))
    with pytest.raises(UserError, match=r"summary.json is damaged; `vspdf train --resume` writes it again"):
        _ = Run(run).summary
    resume(stopped[0], run)
    assert Run(run).summary["phases"][0]["steps"] == 6


# -- power cuts and kills ---------------------------------------------------------------------------------------------


def test_a_run_whose_unsynced_writes_are_lost_goes_on(tmp_path, tiny, monkeypatch):
    """Every file is as it was when it was last flushed; a file that never was is empty."""
    synced, flush = {}, os.fsync

    def note(descriptor):
        flush(descriptor)
        place = f"/proc/self/fd/{descriptor}"
        if os.path.isfile(place):
            with open(place, "rb") as file:
                synced[os.fstat(descriptor).st_ino] = file.read()

    monkeypatch.setattr(os, "fsync", note)
    settings = [*SETTINGS, "train.log_every=1"]
    with pytest.raises(Stop):
        train(loading.load(tiny, settings), say=stop_at(6))
    monkeypatch.undo()
    for path in (path for path in (tmp_path / "run").rglob("*") if path.is_file()):
        path.write_bytes(synced.get(path.stat().st_ino, b""))
    assert Run(tmp_path / "run").step >= 4
    train(loading.load(tiny, settings), resume=True)
    assert [line["step"] for line in Run(tmp_path / "run").lines] == list(range(1, 10))


def test_metrics_that_a_checkpoint_counts_on_and_that_are_gone_are_missed(stopped, run):
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics.jsonl is missing: the run directory is not whole"):
        resume(stopped[0], run)


def test_half_of_a_checkpoint_that_was_being_removed_counts_as_none(stopped, run):
    folder = run / "checkpoints"
    for step in (1, 2):
        shutil.copytree(folder / "step-00000004", folder / f"step-0000000{step}")
    child = os.fork()
    if child == 0:
        unlink = os.unlink

        def once(*arguments, **options):
            unlink(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        os.unlink = once
        checkpoint.prune(run, 1)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    whole = Run(run).checkpoints
    assert all(len(list(path.iterdir())) == 3 for path in whole) and len(whole) < 3
    resume(stopped[0], run)
    for left in ("step-00000007", ".draft-old-step-00000008"):
        shutil.copytree(folder / "step-00000009", folder / left)
    resume(stopped[0], run)  # at its end: nothing is saved any more
    assert [path.name for path in folder.iterdir()] == ["step-00000009"]


def test_a_failed_flush_keeps_the_older_checkpoints(stopped, run, monkeypatch):
    flush = os.fsync

    def fail(descriptor):
        if "optimizer" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(5, "Input/output error")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"step 8 was not written to .*Input/output error; earlier ones are kept"):
        resume(stopped[0], run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert checkpoint.read(run).state["step"] == 4


# -- two processes ----------------------------------------------------------------------------------------------------


def test_a_run_directory_in_use_is_refused_at_once(stopped, run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with Writer(run) as other:
        other.hold()
        with pytest.raises(UserError, match=rf"^run_dir '.*run' is in use by process {os.getpid()}: [^\n]*$"):
            resume(stopped[0], run)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert resume(stopped[0], run)["tokens"]
    assert not (run / ".lock").exists()


def test_of_two_that_begin_at_once_one_is_refused(tiny, tmp_path, monkeypatch):
    """Both have seen a free directory."""
    settings = loading.load(tiny, SETTINGS)
    monkeypatch.setattr(trainer.writer, "check", lambda config, resume: config)
    with Writer(tmp_path / "run") as other:
        (tmp_path / "run").mkdir()
        other.hold()
        with pytest.raises(UserError, match=r"is in use by process"):
            train(settings)
    assert not Run(tmp_path / "run").begun
    train(settings)
    with pytest.raises(UserError, match=r"already holds a run"):
        train(settings)
