"""The trainer on a tiny model and a real text: what is trained, what is written down, and what ends a run."""

import gc
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vspdf.config import loading
from vspdf.errors import Diverged, UserError
from vspdf.evaluate.loss import Evaluation
from vspdf.interop import checkpoints
from vspdf.kernels import cpu
from vspdf.ledger import CONVENTIONS
from vspdf.model import GPT
from vspdf.pattern import Pattern, kept_count
from vspdf.runs import checkpoint
from vspdf.runs.folder import Run
from vspdf.sparsity.layer import SparseLinear, sparse_layers
from vspdf.train import trainer
from vspdf.train.trainer import train

LAYERS = [f"h.{i}.{name}" for i in range(2) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
# Wall clock; everything else in a line of metrics must be equal from run to run.
CLOCK = {"seconds", "training_seconds", "training_cpu_seconds", "step_seconds", "tokens_per_second"}


def run(path, *overrides):
    """Trains in this process; returns the summary and the metrics without times."""
    settings = loading.load(path, overrides)
    summary = train(settings, say=lambda line: None)
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


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_running_out_of_data_is_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(UserError, match=r"the run wants 80000: give more text, or set data.repeat=true"):
        run(tiny, "phases=[{steps: 10000}]")
    assert not (tmp_path / "run").exists()


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
