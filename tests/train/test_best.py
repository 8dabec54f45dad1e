"""The best checkpoint, patience, and where else curves are drawn."""

import re
import signal
import sys
import types
from pathlib import Path

import pytest

from vspdf.config import loading
from vspdf.errors import Interrupted, UserError
from vspdf.interop import checkpoints
from vspdf.report import run_page
from vspdf.runs.folder import Run
from vspdf.train.trainer import train

# The last phase learns nothing: its first evaluation is its best.
PHASES = "phases=[{sparsity: 0.9, steps: 4}, {steps: 30, lr: 1.0e-30, lr_end: 0, warmup_steps: 0}]"
PATIENT = (
    PHASES, "train.eval_every=2", "train.patience=3", "train.keep_best=true", "train.keep_checkpoints=1",
    "train.checkpoint_every=3", "train.log_every=1",
)  # fmt: skip


def run(path, *overrides, resume=False, until=None):
    """Trains in this process; returns the summary, what was said and the directory. `until`: stops after that step."""
    settings, said = loading.load(path, overrides), []

    def say(line):
        said.append(line)
        if until and re.match(rf"step +{until}/", line):
            signal.raise_signal(signal.SIGINT)

    return train(settings, resume=resume, say=say), said, Path(settings.run_dir)


def test_a_run_out_of_patience_ends_with_its_best_checkpoint_kept(tiny):
    summary, said, folder = run(tiny, *PATIENT)
    assert summary["best"] == {"phase": 1, "step": 6, "val_loss": summary["val_loss"], "since": 3}
    assert [path.name for path in Run(folder).checkpoints] == ["step-00000006", "step-00000012"]
    sparse, dense = summary["phases"]
    assert (sparse["steps"], dense["steps"], summary["tokens"]) == (4, 8, sparse["tokens"] + dense["tokens"])
    assert summary["tokens"] == Run(folder).lines[-1]["tokens"]
    assert any("ended after step 12 of 34: train.patience = 3 evaluations in a row" in line for line in said)
    assert checkpoints.load(folder / "checkpoints" / "step-00000006").state["step"] == 6
    assert "12 of 34" not in run_page.write([folder], folder / "page.html").read_text()


@pytest.mark.parametrize("until", [7, 8, 10])
def test_patience_and_the_best_survive_an_interruption(tiny, tmp_path, until):
    whole, _, _ = run(tiny, *PATIENT)
    again = (*PATIENT, f"run_dir={tmp_path}/again")
    with pytest.raises(Interrupted):
        run(tiny, *again, until=until)
    summary, _, folder = run(tiny, *again, resume=True)
    assert summary["best"] == whole["best"] and summary["tokens"] == whole["tokens"]
    assert [path.name for path in Run(folder).checkpoints] == ["step-00000006", "step-00000012"]
    finished, _, _ = run(tiny, *again, resume=True)
    assert finished["tokens"] == whole["tokens"]


@pytest.mark.parametrize("judged", ["train.patience=3", "train.keep_best=true"])
@pytest.mark.parametrize("change", ["train.eval_every=1", "train.eval_tokens=0"])
def test_what_the_best_goes_by_stays_in_a_resumed_run(tiny, judged, change):
    settings = ("phases=[{sparsity: 0.9, steps: 6}]", "train.eval_every=2", judged)
    with pytest.raises(Interrupted):
        run(tiny, *settings, until=2)
    key, _, now = change.partition("=")
    with pytest.raises(UserError, match=rf"cannot resume '.*': {key} was \d+, is now {now}\."):
        run(tiny, *settings, change, resume=True)


def test_the_best_of_a_phase_alone_counts_and_patience_is_for_the_last(tiny):
    phases = "phases=[{sparsity: 0.9, steps: 12, lr: 1.0e-30, lr_end: 0}, {steps: 4, lr: 1.0e-3}]"
    summary, _, folder = run(tiny, phases, *PATIENT[1:], "train.patience=2")
    assert summary["best"]["phase"] == 1 and summary["best"]["step"] > 12 and len(summary["phases"]) == 2
    assert Run(folder).checkpoints[0].name == f"step-{summary['best']['step']:08d}"


@pytest.mark.parametrize(
    "wrong, words",
    [(["train.patience=-1"], "train.patience must not be negative, is -1"),
     (["train.patience=2", "train.eval_every=0"], "it needs train.eval_every above 0"),
     (["train.patience=2", "train.eval_every=1", "phases=[{sparsity: 0.9, schedule: linear, steps: 20}]"],
          "needs schedule: constant")],
    ids=["negative", "never evaluated", "a schedule"],
)  # fmt: skip
def test_patience_that_cannot_be_is_refused(tiny, wrong, words):
    with pytest.raises(UserError, match=words):
        loading.load(tiny, wrong)


@pytest.mark.parametrize("name, module", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_board_that_is_not_installed_is_named_before_anything_is_written(tiny, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    settings = loading.load(tiny, [f"train.{name}=true"])
    with pytest.raises(UserError, match=rf"train.{name} needs the package '{name}': pip install {name}."):
        train(settings)
    assert not Run(Path(settings.run_dir)).begun


def test_wandb_gets_what_is_logged_and_a_resumed_run_stays_one(tiny, tmp_path, monkeypatch):
    """Stands in for the package, which is no dependency."""
    logged, begun = [], []

    class Board:
        def log(self, numbers, step):
            logged.append((step, set(numbers)))

    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(init=lambda **settings: begun.append(settings) or Board())
    )
    run(tiny, "phases=[{steps: 2}]", "train.wandb=true", "train.log_every=1")
    run(tiny, "phases=[{steps: 2}]", "train.wandb=true", "train.log_every=1", resume=True)
    assert [step for step, _ in logged] == [1, 2] and {"loss", "lr", "val_loss"} <= logged[-1][1]
    assert begun[0]["id"] == begun[1]["id"] and begun[0]["config"]["phases"][0]["steps"] == 2
