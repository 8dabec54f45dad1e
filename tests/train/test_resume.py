"""How a run goes on: stopped or killed anywhere it is the same to the last bit; what it does not go on with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vspdf.config import loading
from vspdf.data.text import Dataset
from vspdf.errors import UserError
from vspdf.runs import checkpoint
from vspdf.runs.folder import Run
from vspdf.runs.record import PhaseRecord
from vspdf.train.trainer import train

# Wall clock; everything else in a line of metrics must be equal from run to run.
CLOCK = {"seconds", "training_seconds", "training_cpu_seconds", "step_seconds", "tokens_per_second"}


def run(path, *overrides, resume=False):
    """Trains in this process; returns the summary and the metrics without times."""
    settings = loading.load(path, overrides)
    summary = train(settings, resume=resume, say=lambda line: None)
    return summary, metrics(Path(settings.run_dir))


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def saved(folder, step):
    """Model and optimizer tensors of a checkpoint."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    return load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")


def stop_after(path, step, *overrides):
    """A run whose progress output breaks after `step`."""

    class Stop(Exception):
        pass

    def say(line):
        if line.startswith(f"step {step}/") or line.startswith(f"step  {step}/"):
            raise Stop

    with pytest.raises(Stop):
        train(loading.load(path, overrides), say=say)


# -- stopped, killed and gone on with ---------------------------------------------------------------------------------

RESUMABLE = (
    "train.threads=2",
    "train.checkpoint_every=5",
    "train.eval_every=4",
    "phases.1.revived_warmup=6",
    "phases.2.revived_warmup=6",
    "phases.2.moments=reset",
)

KILLED = """
import os, signal, sys
from vspdf import config
from vspdf.runs import checkpoint
from vspdf.runs.folder import Run
from vspdf.train import train

path, step, where, *overrides = sys.argv[1:]

def say(line):
    if where == "step" and line.strip().startswith("step") and f" {step}/" in line:
        os.kill(os.getpid(), signal.SIGKILL)

flush = checkpoint.flush
def flush_until(path):
    if where == "write" and f".draft-{int(step):08d}/optimizer" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    flush(path)

checkpoint.flush = flush_until
train(config.load(path, overrides), resume="--resume" in overrides, say=say)
"""


def kill(path, step, where, *overrides):
    """A run in a process of its own that gets a real SIGKILL at a step, or while its checkpoint is being written."""
    arguments = [sys.executable, "-c", KILLED, str(path), str(step), where, *overrides]
    assert subprocess.run(arguments, capture_output=True).returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("uninterrupted")
    summary, lines = run(tiny_config(folder), *RESUMABLE)
    return summary, lines, saved(folder / "run", 28)


@pytest.mark.parametrize(
    "step, where, last",
    [
        (3, "step", None),  # before any checkpoint: starts again
        (9, "step", 5),  # in the first phase
        (14, "step", 10),  # the switch to 0.5 is run again
        (17, "step", 15),  # inside the ramp of the first revived weights, which began at 13
        (20, "step", 15),  # at the last line before the switch to dense
        (24, "step", 20),  # the checkpoint is the very end of a phase
        (26, "step", 25),  # inside the ramp of the dense phase, its moments reset
        (15, "write", 10),  # half of a checkpoint is on disk
    ],
    ids=lambda value: str(value),
)
def test_killed_and_resumed_equals_uninterrupted_to_the_last_bit(tiny, tmp_path, uninterrupted, step, where, last):
    kill(tiny, step, where, *RESUMABLE)
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in Run(folder.parent).checkpoints][-1:] == ([f"step-{last:08d}"] if last else [])
    drafts = list(folder.glob(".draft-*"))
    assert len(drafts) == (where == "write")
    summary, lines = run(tiny, *RESUMABLE, resume=True)
    expected_summary, expected, tensors = uninterrupted
    assert lines == expected
    for key in ("tokens", "val_loss", "val_bits_per_byte", "flops"):
        assert summary[key] == expected_summary[key]
    for found, exact in zip(saved(tmp_path / "run", 28), tensors, strict=True):
        assert found.keys() == exact.keys()
        assert all(torch.equal(found[name], exact[name]) for name in exact)
    assert not list(folder.glob(".draft-*")) and len(Run(folder.parent).checkpoints) == 2


def test_killed_twice(tiny, tmp_path, uninterrupted):
    kill(tiny, 13, "step", *RESUMABLE)
    settings = loading.load(tiny, RESUMABLE)

    class Stop(Exception):
        pass

    def say(line):
        if " 23/" in line:
            raise Stop

    with pytest.raises(Stop):
        train(settings, resume=True, say=say)
    _, lines = run(tiny, *RESUMABLE, resume=True)
    assert lines == uninterrupted[1]


def test_cpu_seconds_add_up_over_a_resumption(tiny, tmp_path):
    stop_after(tiny, 9, *RESUMABLE)
    summary, _ = run(tiny, *RESUMABLE, resume=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    clock = [json.loads(line)["training_cpu_seconds"] for line in lines]
    assert clock == sorted(set(clock)) and clock[0] > 0, "it never starts again"
    assert summary["cpu_seconds"] == clock[-1] == pytest.approx(sum(p["cpu_seconds"] for p in summary["phases"]))


def test_a_checkpoint_older_than_the_count_of_cpu_seconds_makes_them_unknown():
    body = PhaseRecord(seconds=3.0, cpu_seconds=2.0).to_json()
    assert PhaseRecord.from_json(body).cpu_seconds == 2.0
    del body["cpu_seconds"]
    assert PhaseRecord.from_json(body).cpu_seconds is None


def test_a_finished_run_resumes_to_its_summary(tiny, tmp_path):
    phases = "phases=[{sparsity: 0.5, steps: 2}, {steps: 3}]"
    summary, lines = run(tiny, phases)
    again, lines_again = run(tiny, phases, resume=True)
    assert lines_again == lines
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}


def test_a_run_of_a_gpu_goes_on_without_one(tiny, tmp_path, uninterrupted, caplog, older):
    """Checkpoints and metrics know no device: the first half is taken for one of a GPU."""
    stop_after(tiny, 9, *RESUMABLE)
    stored = older(tmp_path / "run") / "config.yaml"
    stored.write_text(stored.read_text().replace("device: cpu", "device: cuda"))
    _, lines = run(tiny, *RESUMABLE, resume=True)
    assert lines == uninterrupted[1]
    assert "resuming with train.device = cpu instead of cuda: results will differ in the last bits" in caplog.text


def test_a_half_written_line_of_metrics_is_dropped(tiny, tmp_path):
    phases = "phases=[{steps: 6}]"
    stop_after(tiny, 5, phases, "train.checkpoint_every=3")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    _, lines = run(tiny, phases, "train.checkpoint_every=3", resume=True)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_no_sample_is_seen_twice(tiny, tmp_path, monkeypatch):
    """Across phases of different batch size, accumulation, an interruption and its resumption."""
    seen = []
    batch = Dataset.batch

    def spy(self, start, count):
        seen.extend(self.window_ids(start, count).tolist())
        return batch(self, start, count)

    monkeypatch.setattr(Dataset, "batch", spy)
    phases = "phases=[{sparsity: 0.9, steps: 5, batch_size: 4}, {sparsity: 0.5, steps: 3, batch_size: 6}, {steps: 4}]"
    overrides = (phases, "train.micro_batch_size=2", "train.checkpoint_every=4")
    stop_after(tiny, 6, *overrides)
    del seen[(4 * 4) :]  # the checkpoint is that of step 4: what came after it did not happen
    run(tiny, *overrides, resume=True)
    assert len(seen) == len(set(seen)) == 5 * 4 + 3 * 6 + 4 * 8


@pytest.fixture
def started(tiny, tmp_path):
    """A `vspdf train` in a process of its own that would run for hours; its folder."""
    arguments = [sys.executable, "-c", "from vspdf.cli import main; main()", "train", str(tiny)]
    phases = "phases=[{sparsity: 0.9, steps: 1000000}]"
    errors = tmp_path / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen([*arguments, phases, "data.repeat=true"], stderr=stderr)
    try:
        path, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
        while not (path.exists() and path.read_text().count("\n") > 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        yield process, tmp_path / "run", errors
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_stops_after_the_step_with_a_checkpoint(started, number):
    process, folder, errors = started
    process.send_signal(number)
    process.wait(timeout=60)
    err = errors.read_text()
    (path,) = Run(folder).checkpoints
    step = int(path.name.removeprefix("step-"))
    assert process.returncode == 130
    assert f"stopped after step {step}; a checkpoint was written: --resume goes on." in err.splitlines()[-1]
    assert "Traceback" not in err and checkpoint.read(path).state["step"] == step == metrics(folder)[-1]["step"]


def test_kill_9_from_outside_leaves_a_run_that_goes_on(started, tiny):
    process, _, _ = started
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(UserError, match=r"already holds a run: `resume` goes on with it, run_dir=... starts another"):
        run(tiny)


# -- refusals ---------------------------------------------------------------------------------------------------------


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def stopped(tiny, tmp_path):
    """A run with checkpoints of steps 4 and 6."""
    stop_after(tiny, 7, "train.checkpoint_every=2")
    return tmp_path / "run"


def refused(tiny, folder, message, *overrides, resume=True):
    before = content(folder)
    with pytest.raises(UserError, match=message) as caught:
        run(tiny, "train.checkpoint_every=2", *overrides, resume=resume)
    assert "\n" not in str(caught.value)
    assert content(folder) == before


def test_a_directory_that_holds_a_run_is_refused(tiny, stopped):
    refused(tiny, stopped, r"already holds a run: `resume`", resume=False)


def test_nothing_to_resume(tiny, tmp_path):
    with pytest.raises(UserError, match=r"nothing to resume: '.*' holds no run"):
        run(tiny, resume=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.n_layer=3", r"cannot resume '.*': model.n_layer was 2, is now 3"),
        ("optimizer.lr=1e-4", r"optimizer.lr was 0.003, is now 0.0001"),
        ("phases.0.steps=11", r"phases.0.steps was 12, is now 11"),
        ("phases.2.beta2=0.5", r"phases.2.beta2 was 0.95, is now 0.5"),
        ("phases=[{steps: 28}]", r"phases was a list of 3, is now one of 1"),
        ("seed=1", r"seed was 0, is now 1"),
        ("train.precision=bf16", r"train.precision was fp32, is now bf16"),
    ],
    ids=lambda value: value.partition("=")[0] if "=" in value else "",
)
def test_resuming_with_other_settings_is_refused(tiny, stopped, override, message):
    refused(tiny, stopped, message, override)


def test_settings_that_touch_no_number_may_change(tiny, stopped):
    others, said = ("train.log_every=7", "train.eval_every=9", "train.keep_checkpoints=5"), []
    train(loading.load(tiny, others), resume=True, say=said.append)
    assert metrics(stopped)[-1]["step"] == 28
    assert "config.yaml, as the run began: there still train.checkpoint_every = 2, train.eval_every = " in said[1]


def test_another_corpus_is_refused(tiny, stopped, corpus):
    text = corpus.read_text()
    try:
        corpus.write_text(text + "\n\nOne more line.\n")
        refused(tiny, stopped, r"step-00000006 belongs to another corpus: sha256 was \w{12}..., is \w{12}")
    finally:
        corpus.write_text(text)


def test_a_checkpoint_of_another_model_is_refused(tiny, tmp_path, stopped):
    run(tiny, "model.d_ff=64", "phases=[{steps: 1}]", f"run_dir={tmp_path}/other")
    (tmp_path / "other" / "checkpoints" / "step-00000001").rename(stopped / "checkpoints" / "step-00000007")
    refused(tiny, stopped, r"belongs to another model: its d_ff is 64, here it is 128")
