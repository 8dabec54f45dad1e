"""The trainer on a tiny model and a real text: what is trained, what is written down, and how a run goes on."""

import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vspdf.config import loading
from vspdf.data.text import Dataset
from vspdf.errors import Diverged, UserError
from vspdf.evaluate.loss import Evaluation
from vspdf.interop import checkpoints
from vspdf.kernels import cpu
from vspdf.ledger import CONVENTIONS
from vspdf.model import GPT
from vspdf.pattern import Pattern, kept_count
from vspdf.runs import checkpoint
from vspdf.runs.folder import Run
from vspdf.runs.record import PhaseRecord
from vspdf.sparsity.layer import SparseLinear, sparse_layers
from vspdf.train import trainer
from vspdf.train.trainer import train

LAYERS = [f"h.{i}.{name}" for i in range(2) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
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


@pytest.mark.parametrize("has_bf16", [True, False], ids=["bf16 in hardware", "none"])
def test_bf16_runs_in_fp32_where_the_processor_has_none(tiny, tmp_path, monkeypatch, has_bf16):
    monkeypatch.setattr(cpu, "has_bf16", lambda: has_bf16)
    losses, said = [], []
    for precision in ("fp32", "bf16"):
        settings = loading.load(tiny, [f"train.precision={precision}", f"run_dir={tmp_path}/{precision}"])
        train(settings, say=said.append)
        losses.append([(line["loss"], line.get("val_loss")) for line in metrics(tmp_path / precision)])
    assert (losses[0] == losses[1]) is not has_bf16
    assert sum("bf16 runs in fp32: this processor has " in line for line in said) == (not has_bf16)


def saved(folder, step):
    """Model and optimizer tensors of a checkpoint."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    return load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")


# -- what is trained --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def every_step(tmp_path_factory, tiny_config):
    """A run 0.9 -> 0.5 -> dense with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("every-step")
    summary, lines = run(tiny_config(folder), "train.checkpoint_every=1", "train.keep_checkpoints=100")
    return folder / "run", summary, lines


def test_masked_weights_stay_exactly_zero_and_nothing_dense_exists(every_step):
    folder, _, _ = every_step
    first, _ = saved(folder, 1)
    shapes = {
        name: tuple(module.weight.shape) for name, module in GPT(shape_of(folder)).named_modules() if name in LAYERS
    }
    for step in range(1, 21):
        sparsity = 0.9 if step <= 12 else 0.5
        tensors, optimizer = saved(folder, step)
        model, _, _ = checkpoints.load(folder / "checkpoints" / f"step-{step:08d}")
        assert set(sparse_layers(model)) == set(LAYERS)
        for name in LAYERS:
            out_features, in_features = shapes[name]
            nnz = kept_count(out_features * in_features, sparsity)
            pattern = Pattern(shapes[name], tensors[f"{name}.pattern"].numpy())
            assert f"{name}.weight" not in tensors
            assert tensors[f"{name}.values"].shape == (nnz,) and pattern.nnz == nnz
            for moment in ("exp_avg", "exp_avg_sq"):
                assert optimizer[f"{name}.values:{moment}"].shape == (nnz,)
            drawn = Pattern(shapes[name], first[f"{name}.pattern"].numpy())
            assert pattern is drawn if step <= 12 else pattern.issuperset(drawn)
            weight = model.get_submodule(name).to_linear().weight
            assert not weight[~pattern.mask()].any() and weight[pattern.mask()].any()


def shape_of(folder):
    return checkpoints.load(folder).model.shape


def test_kept_weights_start_as_those_of_the_dense_model(every_step):
    """After one step of warm-up at a tiny rate, kept weights are where the dense init put them, give or take a step."""
    folder, _, lines = every_step
    dense = GPT(shape_of(folder), loading.load(folder / "config.yaml").model.init_std, seed=0)
    tensors, _ = saved(folder, 1)
    for name in LAYERS:
        pattern = Pattern(tuple(dense.get_submodule(name).weight.shape), tensors[f"{name}.pattern"].numpy())
        start = dense.get_submodule(name).weight.detach()[pattern.mask()]
        assert (tensors[f"{name}.values"] - start).abs().max() <= 1.1 * lines[0]["lr"]


def test_switches_carry_weights_and_moments_and_revive_the_rest(every_step):
    """Between the last step of a phase and the first of the next, a weight moves by one update and no more."""
    folder, _, lines = every_step
    for before, sparsity in ((12, 0.5), (20, 0.0)):
        (old, old_state), (new, new_state) = saved(folder, before), saved(folder, before + 1)
        assert old_state["wte.weight:step"] == before and new_state["wte.weight:step"] == before + 1  # never restarted
        for name in LAYERS:
            shape = tuple(GPT(shape_of(folder)).get_submodule(name).weight.shape)
            pattern = Pattern(shape, old[f"{name}.pattern"].numpy())
            dense_old = torch.zeros(shape).masked_scatter(pattern.mask(), old[f"{name}.values"])
            if sparsity:
                grown = Pattern(shape, new[f"{name}.pattern"].numpy())
                dense_new = torch.zeros(shape).masked_scatter(grown.mask(), new[f"{name}.values"])
                revived = grown.mask() & ~pattern.mask()
                second = torch.zeros(shape).masked_scatter(grown.mask(), new_state[f"{name}.values:exp_avg_sq"])
                assert new_state[f"{name}.values:step"] == before + 1
            else:
                assert f"{name}.values" not in new
                dense_new, revived = new[f"{name}.weight"], ~pattern.mask()
                second = new_state[f"{name}.weight:exp_avg_sq"]
                assert new_state[f"{name}.weight:step"] == before + 1
            assert (dense_new - dense_old).abs().max() <= 8 * lines[before]["lr"]
            # Zeros that learn; a unit none of whose outgoing weights was kept gets no gradient yet.
            assert (dense_new[revived] != 0).float().mean() > 0.9
            old_second = torch.zeros(shape).masked_scatter(pattern.mask(), old_state[f"{name}.values:exp_avg_sq"])
            kept = pattern.mask()
            assert (second[kept] >= 0.95 * old_second[kept] * (1 - 1e-6)).all()  # beta2 of the old, plus the new


def test_losses_fall_and_lines_tell(every_step):
    _, summary, lines = every_step
    assert [line["step"] for line in lines] == list(range(1, 29))
    assert [line["phase"] for line in lines] == ["sparse"] * 12 + ["half"] * 8 + ["dense"] * 8
    assert [line["tokens"] for line in lines] == [128 * step for step in range(1, 29)]
    assert abs(lines[0]["loss"] - math.log(257)) < 0.1 and lines[-1]["loss"] < lines[0]["loss"] - 1
    assert summary["val_loss"] < lines[11]["val_loss"] < math.log(257)
    assert summary["val_bits_per_byte"] == lines[-1]["val_bits_per_byte"]
    assert 0.9 < summary["val_bits_per_byte"] * math.log(2) / summary["val_loss"] < 1.1  # bytes, and ends of documents
    assert max(line["lr"] for line in lines) == pytest.approx(6e-3)


def test_the_summary_accounts_for_every_flop(every_step):
    folder, summary, lines = every_step
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["model"]["parameters"] == sum(p.numel() for p in GPT(shape_of(folder)).parameters())
    assert summary["tokens"] == 28 * 128 and len(summary["corpus"]["sha256"]) == 64
    shape = shape_of(folder)
    for phase, (sparsity, steps) in zip(summary["phases"], [(0.9, 12), (0.5, 8), (0.0, 8)], strict=True):
        tokens = steps * 128
        nnz = sum(kept_count(n, sparsity) for n in (32 * 96, 32 * 32, 32 * 128, 32 * 128)) * 2
        rest = 6 * tokens * (shape.attention + shape.vocabulary)
        assert (phase["sparsity"], phase["steps"], phase["tokens"]) == (sparsity, steps, tokens)
        assert phase["flops"]["dense"] == 6 * tokens * shape.linear + rest
        assert phase["flops"]["useful"] == 6 * tokens * nnz + rest
        assert phase["flops"]["useful"] <= phase["flops"]["executed"] <= phase["flops"]["dense"]
        assert sum(phase["time_fractions"].values()) == pytest.approx(1)
    assert summary["flops"] == lines[-1]["flops"]
    assert set(summary["flops_saved_fraction_by_convention"]) == set(CONVENTIONS)
    weights = (12 * 0.9 + 8 * 0.5) / 28
    assert summary["flops_saved_fraction_by_convention"]["linear"] == pytest.approx(weights)
    assert summary["effective_sparsity"] == pytest.approx(weights)


def test_patterns_are_exported_for_tools_without_torch(every_step):
    folder, _, _ = every_step
    tensors, _ = saved(folder, 1)
    with np.load(folder / "patterns.npz") as exported:
        for name in LAYERS:
            np.testing.assert_array_equal(exported[name], tensors[f"{name}.pattern"].numpy())
            assert kept_count(int(np.prod(exported[f"{name}.shape"])), 0.9) == np.unpackbits(exported[name]).sum()


def test_seeds_change_weights_masks_and_order(tiny, tmp_path):
    phases = "phases=[{sparsity: 0.5, steps: 2}]"
    (_, a), (_, b), (_, c) = (
        run(tiny, phases, f"run_dir={tmp_path}/{i}", f"seed={seed}") for i, seed in enumerate((0, 0, 1))
    )
    assert a == b and a[0]["loss"] != c[0]["loss"]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_gradient_accumulation_equals_the_whole_batch(tiny, tmp_path, micro):
    phases = "phases=[{sparsity: 0.8, steps: 4}]"
    _, whole = run(tiny, phases)
    _, parts = run(tiny, phases, f"train.micro_batch_size={micro}", f"run_dir={tmp_path}/parts")
    for a, b in zip(whole, parts, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert b["flops"] == a["flops"] or b["flops"]["useful"] == a["flops"]["useful"]


def test_clipping_decay_and_phase_overrides_reach_the_optimizer(tiny, tmp_path):
    base = "phases=[{sparsity: 0.5, steps: 3, warmup_steps: 0}]"
    _, plain = run(tiny, base)
    changes = {
        "decay": "phases=[{sparsity: 0.5, steps: 3, warmup_steps: 0, weight_decay: 0.9}]",
        "beta2": "phases=[{sparsity: 0.5, steps: 3, warmup_steps: 0, beta2: 0.5}]",
        "s_mu_par": "phases=[{sparsity: 0.5, steps: 3, warmup_steps: 0, s_mu_par: true}]",
        "clip": "optimizer.clip=0.1",
    }
    for name, change in changes.items():
        _, lines = run(tiny, base, change, f"run_dir={tmp_path}/{name}")
        assert lines[-1]["loss"] != plain[-1]["loss"], name


def test_output_layers_begin_with_a_deviation_of_their_own(tiny, tmp_path):
    run(tiny, "model.output_init_std=0.5", "phases=[{steps: 1}]", f"run_dir={tmp_path}/own")
    tensors = saved(tmp_path / "own", 1)[0]
    assert tensors["h.0.mlp.c_proj.weight"].std() > 0.3 > 10 * tensors["h.0.mlp.c_fc.weight"].std()


def test_s_mu_par_scales_init_and_learning_rate(tiny, tmp_path):
    phases = "phases=[{{sparsity: 0.75, steps: 2, warmup_steps: 0, s_mu_par: {}}}]"
    every = ("train.checkpoint_every=1", "optimizer.weight_decay=0.0")
    for name in ("false", "true"):
        run(tiny, phases.format(name), f"run_dir={tmp_path}/{name}", *every)
    plain, scaled = (saved(tmp_path / name, 1)[0] for name in ("false", "true"))
    dense = GPT(shape_of(tmp_path / "true"), loading.load(tiny).model.init_std, seed=0)
    for name in LAYERS:
        weight = dense.get_submodule(name).weight.detach()
        start = weight[Pattern(tuple(weight.shape), plain[f"{name}.pattern"].numpy()).mask()]
        # Adam's first update is one learning rate: 4 times as much at a density of a quarter, from twice the init
        moved, moved_scaled = plain[f"{name}.values"] - start, scaled[f"{name}.values"] - 2 * start
        assert moved.abs().median() == pytest.approx(3e-3, rel=0.01)
        assert moved_scaled.abs().median() == pytest.approx(12e-3, rel=0.01)


def test_bf16(tiny, tmp_path):
    _, exact = run(tiny, "train.backend=reference")
    _, lines = run(tiny, "train.precision=bf16", f"run_dir={tmp_path}/bf16")
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    assert lines[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.01) and lines[0]["loss"] != exact[0]["loss"]
    tensors, _ = saved(tmp_path / "bf16", 28)
    assert {t.dtype for name, t in tensors.items() if not name.endswith("pattern")} == {torch.float32}


def test_the_process_keeps_its_threads(tiny):
    before = torch.get_num_threads()
    run(tiny, "phases=[{steps: 1}]", "train.threads=1")
    assert torch.get_num_threads() == before


def test_measuring_dense_steps_feeds_nothing_back(tiny, tmp_path):
    phases = "phases=[{sparsity: 0.9, steps: 9}, {steps: 3}]"
    _, plain = run(tiny, phases)
    summary, measured = run(tiny, phases, "train.measure_dense=3", f"run_dir={tmp_path}/measured")
    assert measured == plain
    sparse, dense = summary["phases"]
    assert sparse["dense_step_seconds_median"] > 0 and "dense_step_seconds_median" not in dense
    assert sparse["speedup"]["low"] <= sparse["speedup"]["median"] * 1.5 and sparse["dense_threads"] >= 1


def test_samples_of_text_and_tensorboard(tiny, tmp_path):
    summary, _ = run(tiny, "phases=[{steps: 2}]", "train.sample_tokens=20", "train.tensorboard=true")
    assert summary["samples"][0]["phase"] == "dense" and len(summary["samples"][0]["text"]) > 10
    assert list((tmp_path / "run" / "tensorboard").iterdir())


# -- data -------------------------------------------------------------------------------------------------------------


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


def stop_after(path, step, *overrides):
    """A run whose progress output breaks after `step`."""

    class Stop(Exception):
        pass

    def say(line):
        if line.startswith(f"step {step}/") or line.startswith(f"step  {step}/"):
            raise Stop

    with pytest.raises(Stop):
        train(loading.load(path, overrides), say=say)


def test_running_out_of_data_is_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(UserError, match=r"the run wants 80000: give more text, or set data.repeat=true"):
        run(tiny, "phases=[{steps: 10000}]")
    assert not (tmp_path / "run").exists()


# -- how a run goes on ------------------------------------------------------------------------------------------------

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


def test_a_model_that_no_memory_holds_is_refused_before_it_is_made(tiny, tmp_path):
    with pytest.raises(UserError, match=r"^the weights of [\d,]{18,} parameters take [\d,.]+ GB, this machine has "):
        train(loading.load(tiny, ["model.d_model=4000000", "model.n_layer=100"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_gpu_that_is_not_here_is_named(tiny, tmp_path, device):
    if torch.cuda.device_count() > (0 if device == "cuda" else 7):
        pytest.skip("it is here")
    with pytest.raises(UserError, match=rf"train.device = '{device}': torch sees .*; cpu runs anywhere"):
        run(tiny, f"train.device={device}")
    assert not (tmp_path / "run").exists()


def test_a_half_written_line_of_metrics_is_dropped(tiny, tmp_path):
    phases = "phases=[{steps: 6}]"
    stop_after(tiny, 5, phases, "train.checkpoint_every=3")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    _, lines = run(tiny, phases, "train.checkpoint_every=3", resume=True)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


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
    _, lines = run(tiny, "train.log_every=7", "train.eval_every=9", "train.keep_checkpoints=5", resume=True)
    assert lines[-1]["step"] == 28


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


def test_a_vocabulary_below_the_tokenizers_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match=r"model.vocab_size = 100 is less than the tokenizer's 257"):
        run(tiny, "model.vocab_size=100")
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_cannot_be_made(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir '.*/file/run' cannot be made: Not a directory"):
        run(tiny, f"run_dir={tmp_path}/file/run")


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(tiny, tmp_path, clip):
    with pytest.raises(
        UserError, match=r"of step (\d+) is (nan|inf): training stopped, .* Lower optimizer.lr\?"
    ) as caught:
        run(tiny, "optimizer.lr=1e18", "train.checkpoint_every=1", f"optimizer.clip={clip}")
    step = int(str(caught.value).split("of step ")[1].split()[0])
    assert f"the checkpoint of step {step - 1} is intact" in str(caught.value)
    stored = checkpoint.read(tmp_path / "run")
    assert stored.state["step"] == step - 1
    assert all(torch.isfinite(tensor).all() for tensor in stored.tensors.values())


def test_a_gradient_that_is_no_number_reaches_no_weight(tiny, tmp_path, monkeypatch):
    """The loss is finite, its gradient is not: the step is not taken, so that no checkpoint keeps its result."""
    forward, calls = GPT.forward, []

    def poisoned(self, tokens, targets=None):
        loss = forward(self, tokens, targets)
        calls.append(1)
        if len(calls) == 3:
            loss.register_hook(lambda grad: grad * float("nan"))
        return loss

    monkeypatch.setattr(GPT, "forward", poisoned)
    with pytest.raises(UserError, match=r"the gradient norm of step 3 is nan: .* checkpoint of step 2 is intact"):
        run(tiny, "train.checkpoint_every=1")
    stored = checkpoint.read(tmp_path / "run")
    assert all(torch.isfinite(t).all() for t in (*stored.tensors.values(), *stored.moments.values()))


@pytest.mark.parametrize("seen", [True, False], ids=["by the validation loss", "by the weights"])
def test_a_last_update_that_overflows_is_no_success(tiny, tmp_path, monkeypatch, seen):
    """No later loss tells of it: nothing is summed up, and no checkpoint keeps it."""
    if not seen:
        monkeypatch.setattr(trainer, "evaluate", lambda *arguments: Evaluation(1.0, 1.0))
    what = "the validation loss after step 1 is nan" if seen else "after step 1, '.*' or its moments are not finite"
    with pytest.raises(Diverged, match=f"^{what}: training stopped, no checkpoint was written yet"):
        run(tiny, "phases=[{steps: 1, warmup_steps: 0, decay: constant}]", "optimizer.lr=3e38")
    assert not (tmp_path / "run" / "summary.json").exists() and not Run(tmp_path / "run").checkpoints
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_clock_that_stands_still_divides_nothing_by_zero(tiny, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 5.0)
    monkeypatch.setattr(time, "process_time", lambda: 5.0)
    summary, lines = run(tiny, "phases=[{sparsity: 0.75, steps: 8}]", "train.measure_dense=1")
    assert len(lines) == 8 and summary["phases"][0]["speedup"]["median"] == pytest.approx(1.0)


def test_low_memory_reaches_the_layers_of_every_phase(tiny):
    alive = lambda: [thing for thing in gc.get_objects() if type(thing) is SparseLinear]  # noqa: E731
    others, seen = alive(), set()

    def look(_):
        mine = [layer for layer in alive() if not any(layer is other for other in others)]
        seen.update((layer.pattern.sparsity, layer.memory, layer.pattern.packed.get("memory")) for layer in mine)

    settings = ["train.memory=low", "train.eval_every=10", "phases.0.steps=10", "phases.1.steps=10"]
    train(loading.load(tiny, settings), on_evaluation=look)
    assert {round(sparsity, 1) for sparsity, *_ in seen} == {0.9, 0.5}
    assert {(memory, packed) for _, memory, packed in seen} == {("low", "low")}
