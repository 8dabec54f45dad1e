"""Run directories: one that an older version wrote is read, drawn and gone on with; masks are read without torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vspdf.config import loading
from vspdf.errors import UserError
from vspdf.interop import checkpoints
from vspdf.pattern import Pattern
from vspdf.report import run_page
from vspdf.runs import masks
from vspdf.runs.folder import Run, of_checkpoint
from vspdf.runs.writer import Writer
from vspdf.train.trainer import train

# Written before the package was laid out in wings, killed right after step 17 of 24: 12 sparse steps (0.9, 0.7, 0.5),
# 12 dense ones whose revived weights warm up over 6. Its last checkpoint is of step 14, within that ramp.
OLD = Path(__file__).parent / "data" / "old-run"
# The same version went on with it to these losses, on one thread.
LOSSES = [
    4.8702778816, 4.8470554352, 4.8377671242, 4.7642159462, 4.8263773918, 4.6777110100, 4.7434024811, 4.6761798859,
    4.6277461052, 4.7882580757,
]  # fmt: skip
VAL_LOSSES = {15: 4.9150389433, 20: 4.7511700392, 24: 4.6996102333}
FLOPS = {"dense": 141852672, "useful": 122032128, "executed": 122216448}


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of that run, beside its text."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_an_old_run_is_read():
    run = Run(OLD / "run").require()
    assert (run.step, run.total_steps, run.finished, run.summary, run.evaluation) == (17, 24, False, {}, {})
    assert [line["step"] for line in run.evaluations] == [5, 10, 12, 15]
    assert run.checkpoint == OLD / "run" / "checkpoints" / "step-00000014" and run.state["step"] == 14
    assert of_checkpoint(run.checkpoint).folder == run.folder and run.tokenizer.is_file()
    assert run.shape.d_model == 16 and run.manifest["tokenizer"]["name"] == "bytes"
    sparse, dense = run.phases
    assert (sparse["steps"], dense["steps"]) == (12, 5) and sparse["val_loss"] == run.evaluations[2]["val_loss"]
    ratios = [b / a for a, b in run.state["records"][0]["paired_seconds"]]
    assert sparse["speedup"]["low"] == min(ratios) and "speedup" not in dense
    assert len(run.patterns) == len(run.masks(0)) == 4 and not run.masks(1)
    for name, pattern in run.patterns.items():
        assert np.array_equal(pattern.mask().numpy(), run.masks(0)[name])
        assert pattern.sparsity == pytest.approx(0.9, abs=0.01)


def test_an_old_run_is_drawn(old):
    page = run_page.write([old]).read_text()
    assert "not finished: step 17 of 24" in page and "Revived weights" in page and "Step speed-up, sparse" in page


def test_a_checkpoint_of_an_old_run_loads(old):
    loaded = checkpoints.load(old)
    assert loaded.state["step"] == 14 and loaded.tokenizer is not None


def test_an_old_run_goes_on_as_it_would_have(old):
    before = Run(old).lines[:14]
    summary = train(loading.load(old / "config.yaml"), resume=True)
    lines = Run(old).lines
    assert lines[:14] == before and [line["step"] for line in lines] == list(range(1, 25))
    assert [line["loss"] for line in lines[14:]] == pytest.approx(LOSSES, rel=1e-5)
    found = {line["step"]: line["val_loss"] for line in lines[14:] if "val_loss" in line}
    assert found == pytest.approx(VAL_LOSSES, rel=1e-5)
    assert lines[-1]["flops"] == summary["flops"] == FLOPS and summary["phases"][0]["speedup"]
    assert Run(old).summary == summary and Run(old).finished


NO_TORCH = """
import sys
from pathlib import Path
from vspdf.runs.folder import Run
run = Run(Path(sys.argv[1]))
assert run.phases and all(mask.any() for mask in run.masks(0).values())
assert "torch" not in sys.modules
"""


def test_masks_and_metrics_are_read_without_torch():
    result = subprocess.run([sys.executable, "-c", NO_TORCH, OLD / "run"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("shape", [(3, 5), (8, 8), (1, 1)], ids=str)
def test_masks_are_read_as_they_were_written(tmp_path, shape):
    patterns = {f"h.{seed}": Pattern.random(shape, 0.4, seed) for seed in range(2)}
    Writer(tmp_path).masks(1, patterns)
    run = Run(tmp_path)
    assert run.masks(0) == {} and list(run.masks(1)) == list(patterns)
    for name, pattern in patterns.items():
        assert run.masks(1)[name].dtype == bool and np.array_equal(run.masks(1)[name], pattern.mask().numpy())


def test_bits_that_do_not_fit_their_shape_are_damage(tmp_path):
    path = tmp_path / "patterns.npz"
    np.savez(path, **{"h.0": np.zeros(2, np.uint8), "h.0.shape": np.array([8, 8])})
    with pytest.raises(UserError, match=r"patterns.npz is damaged: 'h.0' is no mask of 8 x 8"):
        masks.read(path)


def test_going_on_drops_later_lines_and_half_of_one(tmp_path):
    writer = Writer(tmp_path)
    for step in (1, 2, 3):
        writer.append({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert Run(tmp_path).step == 3
    writer.go_on_from(2)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert Run(tmp_path).step == 2


def test_a_directory_without_a_run_says_what_is_near(tmp_path, old):
    assert Run(old).begun and not Run(tmp_path).begun and Run(tmp_path).step == 0
    with pytest.raises(UserError, match=rf"holds no run: .* Did you mean '{old}'\?"):
        Run(tmp_path).require()
    with pytest.raises(UserError, match=r"no run directory '.*ran'\. Did you mean '.*run'\?"):
        Run(tmp_path / "ran").require()
    with pytest.raises(UserError, match=r"has no summary.json: the run is not finished"):
        Run(old).require(finished=True)


@pytest.mark.parametrize("content, why", [("{", "is no JSON"), ("[]", "expected a JSON object"), ("{}", "'phases'")])
def test_a_broken_summary_is_named(old, content, why):
    (old / "summary.json").write_text(content)
    with pytest.raises(UserError, match=rf"summary.json cannot be read: .*{why}|summary.json {why}"):
        _ = Run(old).summary


LINE = {
    "step": 2, "phase": "sparse", "sparsity": 0.9, "tokens": 64, "loss": 4.5, "training_seconds": 2.0,
    "step_seconds": 1.0, "flops": {"dense": 20, "useful": 4, "executed": 6},
}  # fmt: skip
BENT_LINES = {
    "no object": ("[1]", "it is no JSON object"),
    "deep": ("[" * 100_000, "expected a JSON object"),
    "digits": ('{"step": ' + "9" * 10_000 + "}", "expected a JSON object"),
    "text for a loss": ({"loss": "low"}, "its 'loss' is 'low'"),
    "NaN": ({"loss": float("nan")}, "its 'loss' is 'nan'"),
    "truth for a step": ({"step": True}, "its 'step' is 'True'"),
    "flops of no column": ({"flops": {"dense": 20, "useful": 4}}, "in 'flops', it has no 'executed'"),
    "no flops": ({"flops": {"dense": 20, "useful": 4, "executed": 0}}, "in 'flops', its 'executed' is '0'"),
    "half an evaluation": ({"val_loss": 4.5}, "it has no 'val_bits_per_byte'"),
    "a step again": ({"step": 1}, "step 1 after step 1"),
    "fewer tokens": ({"tokens": 31}, "31 tokens after 32"),
    "fewer flops": ({"flops": {"dense": 20, "useful": 1, "executed": 6}}, "1 useful FLOPs after 2"),
}


@pytest.mark.parametrize("bent, why", BENT_LINES.values(), ids=BENT_LINES)
def test_a_bent_line_of_metrics_is_named(tmp_path, bent, why):
    first = LINE | {
        "step": 1,
        "tokens": 32,
        "training_seconds": 1.0,
        "flops": {"dense": 10, "useful": 2, "executed": 3},
    }
    second = bent if isinstance(bent, str) else json.dumps(LINE | bent)
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(first)}\n{second}\n")
    with pytest.raises(UserError, match=rf"metrics.jsonl, line 2 is broken: .*{why}"):
        _ = Run(tmp_path).lines


PHASE = {"name": "a", "sparsity": 0.5, "steps": 3, "tokens": 9, "flops": {"dense": 3, "useful": 2, "executed": 2}}
BENT_SUMMARIES = {
    "deep": ("[" * 100_000, "nests too deep"),
    "no phase": ({"phases": []}, "its 'phases' are none"),
    "phases by name": ({"phases": {"a": PHASE}}, "its 'phases' are no list"),
    "no step": ({"phases": [PHASE | {"steps": 0}]}, "in 'phases', its 'steps' is '0'"),
    "all masked": ({"phases": [PHASE | {"sparsity": 1}]}, "in 'phases', its 'sparsity' is '1'"),
    "hardware": ({"phases": [PHASE], "hardware": "x"}, "its 'hardware' is 'x'"),
    "samples": ({"phases": [PHASE], "samples": [1]}, "in 'samples', it is no JSON object"),
    "comparison": ({"phases": [PHASE], "comparison": [{"phase": "a"}]}, "in 'comparison', it has no 'sparsity'"),
}


@pytest.mark.parametrize("bent, why", BENT_SUMMARIES.values(), ids=BENT_SUMMARIES)
def test_a_bent_summary_is_named(tmp_path, bent, why):
    (tmp_path / "summary.json").write_text(bent if isinstance(bent, str) else json.dumps(bent))
    with pytest.raises(UserError, match=rf"summary.json .*{why}"):
        _ = Run(tmp_path).summary


def test_a_bent_evaluation_is_named(tmp_path):
    body = {"val_loss": 2.5, "val_bits_per_byte": 3.6}
    Writer(tmp_path).evaluation(body)
    assert Run(tmp_path).evaluation == body
    path = tmp_path / "evaluation.json"
    path.write_text(path.read_text().replace("2.5", "2.4"))
    with pytest.raises(UserError, match=r"evaluation.json is damaged: without it, `vspdf compare` measures it again"):
        _ = Run(tmp_path).evaluation
