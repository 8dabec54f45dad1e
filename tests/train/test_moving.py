"""Runs whose masks move: killed at any moment and resumed they are the same to the last bit; what they leave behind."""

import json
import subprocess
import sys

import numpy as np
import pytest

from vspdf.config import load
from vspdf.runs.folder import Run
from vspdf.train.trainer import train

MOVES = {
    "set": {"algorithm": "set", "sparsity": 0.75, "drop_fraction": "{type: cosine, init: 0.5}"},
    "rigl": {"algorithm": "rigl", "sparsity": 0.75},
    "gmp": {"algorithm": "gmp", "sparsity": 0.0, "schedule": "power", "sparsity_end": 0.75},
    "GraNet": {"algorithm": "rigl", "sparsity": 0.5, "schedule": "linear", "sparsity_end": 0.75, "s_mu_par": "true"},
}
VOLATILE = ("seconds", "training_seconds", "training_cpu_seconds", "step_seconds", "tokens_per_second",
            "communication_seconds", "communication_bytes")  # fmt: skip


def written(tiny, moves):
    """Overrides for a run of 20 steps of masks that move every 4th, and 4 dense ones."""
    keys = [f"phases.0.{key}={value}" for key, value in moves.items()]
    return [
        "train.backend=cpu", "train.micro_batch_size=4", "train.eval_every=6", "phases.0.steps=20",
        "phases.0.update={freq: 4}", *keys, "phases.1.sparsity=0.5", "phases.1.steps=3", "phases.2.steps=3",
    ]  # fmt: skip


class Killed(Exception):
    pass


def cut(config, step):
    """Trains until a step is taken, and dies there."""

    def say(line):
        if line.split()[:2] == ["step", f"{step}/{config.steps}"]:
            raise Killed

    with pytest.raises(Killed):
        train(config, say=say)


def lines(folder):
    return [
        {key: value for key, value in line.items() if key not in VOLATILE}
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    ]


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
def test_a_killed_run_resumes_to_the_last_bit(tiny, tmp_path, moves):
    settings = [*written(tiny, moves), "train.checkpoint_every=4", "train.keep_checkpoints=9"]
    whole = train(load(tiny, [*settings, f"run_dir={tmp_path}/whole"]))
    for stop in (7, 9, 13):
        config = load(tiny, [*settings, f"run_dir={tmp_path}/cut-{stop}"])
        cut(config, stop)
        train(config, resume=True)
        assert lines(tmp_path / f"cut-{stop}") == lines(tmp_path / "whole"), stop
    assert whole["phases"][0]["masks"]["mask_updates"] == (3 if moves["algorithm"] == "gmp" else 4)
    run = Run(tmp_path / "whole")
    assert run.lines[19]["sparsity"] == pytest.approx(0.75)
    assert ("survival" in run.lines[19]) == (moves["algorithm"] != "gmp")
    now = np.mean([mask.mean() for mask in run.end_masks(0).values()])
    assert now == pytest.approx(0.25, abs=1e-3)


def test_coverage_rises_and_the_first_masks_fade(tiny, tmp_path):
    train(load(tiny, [*written(tiny, MOVES["set"]), f"run_dir={tmp_path}/run"]))
    moving = [line for line in Run(tmp_path / "run").lines if line["phase"] == "sparse"]
    coverage = [line["coverage"] for line in moving]
    assert coverage[0] == pytest.approx(0.25, abs=1e-3) and coverage == sorted(coverage) and coverage[-1] > 0.4
    assert moving[-1]["mask_overlap"] < 0.8 and "survival" not in moving[0]
    assert all("coverage" not in line for line in Run(tmp_path / "run").lines if line["phase"] == "dense")


def test_two_ranks_move_the_masks_that_one_does(tiny, tmp_path):
    """RigL's scores are summed in the tree's order, like gradients: its choices are the same to the last bit."""
    settings = [*written(tiny, MOVES["rigl"]), "train.micro_batch_size=2"]
    train(load(tiny, [*settings, f"run_dir={tmp_path}/alone"]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vspdf"]
    done = subprocess.run(
        [*torchrun, "train", str(tiny), *settings, f"run_dir={tmp_path}/two"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert lines(tmp_path / "two") == lines(tmp_path / "alone")
    alone, two = (Run(tmp_path / name).end_masks(0) for name in ("alone", "two"))
    assert alone.keys() == two.keys() and all((alone[name] == two[name]).all() for name in alone)
