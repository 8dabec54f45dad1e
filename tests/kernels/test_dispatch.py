"""Choices between sparse and dense: what is measured, kept, measured again and pinned."""

import gc
import json
import os
import time

import pytest
import torch

import vspdf
from vspdf.kernels import dispatch, tuning
from vspdf.pattern import Pattern

CLEAR = {"cpu": 0.001, "dense": 0.009}
CLOSE = {"cpu": 0.002, "dense": 0.002}


class Work:
    """A product whose paths take the given seconds; counts its calls."""

    def __init__(self, seconds):
        self.seconds, self.calls = seconds, 0

    def __call__(self, path):
        self.calls += 1
        time.sleep(self.seconds[path])


@pytest.fixture
def process(monkeypatch, tmp_path):
    """Starts a new process, as far as choices go; all share one cache."""
    monkeypatch.setenv("VSPDF_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "BUDGET", 0.0)  # no more rounds than needed

    def start():
        monkeypatch.setattr(tuning, "CPU", tuning._Table(tuning.Timing, tuning._machine))
        tuning.forget()

    start()
    return start


@pytest.fixture
def pattern():
    return Pattern.random((256, 256), 0.9)


def choose(pattern, work=None, tokens=128):
    return dispatch.choose("forward", pattern, tokens, torch.float32, torch.device("cpu"), tune=work)


def stored(tmp_path):
    (machine,) = json.loads((tmp_path / "tuning.json").read_text()).values()
    return machine


def test_a_choice_is_measured_once_in_a_process(process, pattern):
    work = Work(CLEAR)
    assert choose(pattern, work).path == "cpu"
    calls = work.calls
    assert choose(pattern, work).path == "cpu"
    assert work.calls == calls > 0


@pytest.mark.parametrize("slow", ["cpu", "dense"])
def test_a_path_that_has_lost_by_far_is_timed_once(process, pattern, slow):
    calls = []
    run = lambda path: (calls.append(path), time.sleep(0.02 if path == slow else 0.001))  # noqa: E731
    assert choose(pattern, run).path != slow
    assert calls.count(slow) == 2 < len(calls) / 2  # warm-up and first round


def test_wide_values_are_a_case_of_their_own(process, pattern):
    """The paths pack and cast otherwise where values stay float32."""
    narrow = vspdf.sparse_linear(*(torch.ones(n, dtype=torch.bfloat16) for n in [(128, 256), pattern.nnz]), pattern)
    wide = vspdf.sparse_linear(torch.ones(128, 256, dtype=torch.bfloat16), torch.ones(pattern.nnz), pattern)
    assert narrow.dtype == wide.dtype == torch.bfloat16
    assert [" bfloat16 " in key for key in sorted(tuning.choices())] == [True, False]
    assert " bfloat16+float32 " in sorted(tuning.choices())[1]


@pytest.mark.parametrize("tokens", [121, 127, 128])
def test_lengths_of_a_bucket_share_a_choice(process, pattern, tokens):
    choose(pattern, Work(CLEAR), tokens=125)
    work = Work(CLEAR)
    choose(pattern, work, tokens)
    assert work.calls == 0


def test_other_lengths_are_measured_for_themselves(process, pattern):
    choose(pattern, Work(CLEAR), tokens=112)
    work = Work(CLEAR)
    choose(pattern, work, tokens=113)
    assert work.calls > 0


def test_a_clear_choice_is_kept_for_later_processes(process, pattern, monkeypatch):
    monkeypatch.setattr(tuning, "NOISY", 100)
    choose(pattern, Work(CLEAR))
    process()
    work = Work(CLEAR)
    assert choose(pattern, work).path == "cpu"
    assert work.calls == 0


@pytest.mark.parametrize("why", ["close", "noisy"])
def test_an_open_choice_is_measured_by_three_processes(process, pattern, monkeypatch, why, tmp_path):
    monkeypatch.setattr(tuning, "NOISY", 1.0 if why == "noisy" else 100)
    monkeypatch.setattr(tuning, "CLEAR", 1.5 if why == "noisy" else 1000)
    calls = []
    for _ in range(5):
        process()
        work = Work(CLOSE if why == "close" else CLEAR)
        choose(pattern, work)
        calls.append(work.calls > 0)
    assert calls == [True, True, True, False, False]
    (timing,) = stored(tmp_path).values()
    assert timing[3] == 3


def test_a_choice_made_on_a_busy_machine_is_mended(process, pattern, monkeypatch):
    monkeypatch.setattr(tuning, "NOISY", 1.0)
    busy = {"cpu": 0.09, "dense": 0.009}
    assert choose(pattern, Work(busy)).path == "dense"
    process()
    assert "measures again" in choose(pattern).reason
    assert choose(pattern, Work(CLEAR)).path == "cpu"


def test_a_choice_does_not_change_within_a_process(process, pattern):
    assert choose(pattern, Work({"cpu": 0.03, "dense": 0.001})).path == "dense"
    assert choose(pattern, Work(CLEAR), tokens=127).path == "dense"


def test_pinned_choices_are_not_measured_again(process, pattern, monkeypatch):
    monkeypatch.setattr(tuning, "NOISY", 1.0)
    assert choose(pattern, Work({"cpu": 0.03, "dense": 0.002})).path == "dense"
    run = tuning.choices()
    for _ in range(3):  # the cache comes to say the opposite
        process()
        assert choose(pattern, Work(CLEAR)).path == "cpu"
    process()
    tuning.pin(run)
    work = Work(CLEAR)
    assert choose(pattern, work).path == "dense"
    assert work.calls == 0
    assert tuning.choices() == run


def test_pinning_overrules_what_this_process_decided(process, pattern):
    assert choose(pattern, Work(CLEAR)).path == "cpu"
    (key,) = tuning.choices()
    tuning.pin({key: [2.0, 1.0]})  # as stored before noise was
    assert choose(pattern, Work(CLEAR)).path == "dense"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"MACHINE": 3}', '{"MACHINE": {"KEY": ["a", "b"]}}', '{"MACHINE": {"KEY": [1]}}']
)
def test_a_damaged_table_is_measured_anew(process, pattern, tmp_path, text):
    choose(pattern, Work(CLEAR))
    (key,) = tuning.choices()
    (tmp_path / "tuning.json").write_text(text.replace("MACHINE", tuning._machine()).replace("KEY", key))
    process()
    work = Work(CLEAR)
    assert choose(pattern, work).path == "cpu"
    assert work.calls > 0
    assert key in stored(tmp_path)


def test_a_cache_that_cannot_be_written_costs_nothing_but_tuning(process, pattern, tmp_path):
    (tmp_path / "tuning.json").mkdir()
    assert choose(pattern, Work(CLEAR)).path == "cpu"
    assert not list(tmp_path.glob(".tuning*"))


def test_choices_end_with_their_pattern_and_lengths_of_text_share_one():
    tuning.forget()
    pattern = Pattern.random((20, 24), 0.5, seed=123)
    values = torch.ones(pattern.nnz)
    for tokens in range(65, 81):
        vspdf.sparse_linear(torch.ones(tokens, 24), values, pattern)
    assert [len(made) for made in tuning.MADE.values()] == [1]
    del pattern
    gc.collect()
    assert not tuning.MADE


def test_processes_that_tune_at_once_keep_each_others_timings(process, tmp_path):
    children = []
    for one in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                for key in range(10):
                    tuning.CPU.add(f"{one} {key}", tuning.Timing(1.0, 2.0))
                os._exit(0)
            finally:
                os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    (machine,) = json.loads((tmp_path / "tuning.json").read_text()).values()
    assert len(machine) == 40 and [path.name for path in tmp_path.iterdir()] == ["tuning.json"]
