"""Phases that densify in steps, layers that differ, and runs that start from other checkpoints."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vspdf.config import loading
from vspdf.errors import UserError
from vspdf.interop import checkpoints
from vspdf.pattern import Pattern, kept_count
from vspdf.runs import digests
from vspdf.sparsity.layer import sparse_layers
from vspdf.train.trainer import train

CLOCK = {"seconds", "training_seconds", "training_cpu_seconds", "step_seconds", "tokens_per_second"}


def changed(path, name, **settings):
    """A configuration beside `path` with other top-level settings, and its own run directory."""
    body = yaml.safe_load(path.read_text()) | {"run_dir": str(path.parent / name)} | settings
    other = path.parent / f"{name}.yaml"
    other.write_text(yaml.safe_dump(body))
    return other


def run(path, *overrides, resume=False):
    said = []
    settings = loading.load(path, overrides)
    summary = train(settings, resume=resume, say=said.append)
    lines = [json.loads(line) for line in (Path(settings.run_dir) / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]
    return Path(settings.run_dir), summary, lines, said


def tensors(folder, step):
    path = folder / "checkpoints" / f"step-{step:08d}"
    return load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")


STEPWISE = [{"name": "steps", "schedule": "cycling", "levels": [0.9, 0.75, 0.5, 0.0], "steps": 12, "update_every": 3}]
EVERY = ("train.checkpoint_every=1", "train.keep_checkpoints=100")


@pytest.fixture(scope="module")
def stepwise(tmp_path_factory, tiny_config):
    """90 -> 75 -> 50 -> 0 % within one phase, a checkpoint of every step."""
    path = changed(tiny_config(tmp_path_factory.mktemp("stepwise")), "whole", phases=STEPWISE)
    return path, *run(path, *EVERY)


def test_positions_are_added_and_kept_values_and_moments_stay(stepwise):
    _, folder, _, lines, said = stepwise
    assert [line["sparsity"] for line in lines] == [0.9] * 3 + [0.75] * 3 + [0.5] * 3 + [0.0] * 3
    assert sum(text.startswith("densified to sparsity") for text in said) == 3
    layer = "h.1.mlp.c_fc"
    shape = (128, 32)
    old = None
    for step in range(1, 10):
        model, state = tensors(folder, step)
        pattern = Pattern(shape, model[f"{layer}.pattern"].numpy())
        assert pattern.nnz == kept_count(128 * 32, (0.9, 0.75, 0.5)[(step - 1) // 3])
        assert state[f"{layer}.values:exp_avg"].shape == (pattern.nnz,)
        assert old is None or pattern.issuperset(old)
        old = pattern
    before, _ = tensors(folder, 9)
    after, state = tensors(folder, 10)
    assert f"{layer}.weight" in after and state[f"{layer}.weight:exp_avg"].shape == shape
    revived = after[f"{layer}.weight"][~old.mask()]
    assert revived.abs().max() > 0 and revived.abs().max() < before[f"{layer}.values"].abs().max()


def test_moments_of_kept_weights_go_through_each_step(stepwise, tmp_path):
    """The same phase by hand, with set_sparsity between steps, from the checkpoint before it."""
    _, folder, _, _, _ = stepwise
    one, m_one = tensors(folder, 3)
    two, m_two = tensors(folder, 4)
    name = "h.0.attn.c_attn"
    a, b = (Pattern((96, 32), t[f"{name}.pattern"].numpy()) for t in (one, two))
    inside = a.mask()[b.mask()]
    kept = m_two[f"{name}.values:exp_avg_sq"][inside]
    assert (kept >= 0.95 * m_one[f"{name}.values:exp_avg_sq"] * (1 - 1e-5)).all()  # beta2 decays, nothing is reset
    assert int(m_two[f"{name}.values:step"]) == 4


@pytest.mark.parametrize("stop", [2, 3, 4, 9, 10], ids=lambda n: f"after step {n}")
def test_a_resumed_run_is_equal_to_the_last_bit(stepwise, tmp_path, stop, tiny_config):
    path, folder, _, lines, _ = stepwise
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    for checkpoint in (copied / "checkpoints").iterdir():
        if int(checkpoint.name[5:]) > stop:
            shutil.rmtree(checkpoint)
    _, _, again, _ = run(path, *EVERY, f"run_dir={copied}", resume=True)
    assert again == lines
    for a, b in zip(tensors(folder, 12), tensors(copied, 12), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_ledger_counts_each_stretch_at_its_own_sparsity(stepwise):
    _, _, summary, lines, _ = stepwise
    (phase,) = summary["phases"]
    assert phase["stages"] == [{"start": 3 * i, "steps": 3, "sparsity": s} for i, s in enumerate((0.9, 0.75, 0.5, 0.0))]
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 128)
    step_tokens = 8 * 16
    useful = np.diff([0] + [line["flops"]["useful"] for line in lines])
    dense = np.diff([0] + [line["flops"]["dense"] for line in lines])
    for i, sparsity in enumerate(line["sparsity"] for line in lines):
        masked = 6 * step_tokens * weights * sparsity
        assert dense[i] - useful[i] == pytest.approx(masked, rel=2e-3, abs=1)
    assert summary["effective_sparsity"] == pytest.approx((0.9 + 0.75 + 0.5) / 4)
    assert summary["flops_saved_fraction_by_convention"]["linear"] == pytest.approx((0.9 + 0.75 + 0.5) / 4)


def test_layers_may_differ(tiny):
    phases = [
        {"sparsity": 0.8, "layers": {"*.mlp.*": 0.9, "h.0.attn.c_proj": 0.0}, "steps": 3},
        {"sparsity": 0.5, "layers": {"*.c_attn": 0.8, "h.0.attn.c_proj": 0.0}, "steps": 3},
    ]
    folder, summary, _, _ = run(changed(tiny, "layers", phases=phases), *EVERY)
    first = sparse_layers(checkpoints.load(folder / "checkpoints" / "step-00000003").model)
    assert {n: round(layer.pattern.sparsity, 2) for n, layer in first.items()} == {
        "h.0.attn.c_attn": 0.8, "h.0.mlp.c_fc": 0.9, "h.0.mlp.c_proj": 0.9, "h.1.attn.c_attn": 0.8,
        "h.1.attn.c_proj": 0.8, "h.1.mlp.c_fc": 0.9, "h.1.mlp.c_proj": 0.9,
    }  # fmt: skip
    last = sparse_layers(checkpoints.load(folder).model)
    assert last["h.0.attn.c_attn"].pattern is first["h.0.attn.c_attn"].pattern
    assert last["h.1.attn.c_proj"].pattern.sparsity == pytest.approx(0.5)
    total = sum(layer.pattern.numel for layer in first.values()) + 32 * 32
    masked = sum(layer.pattern.numel - layer.pattern.nnz for layer in first.values())
    assert summary["phases"][0]["sparsity"] == pytest.approx(masked / total, abs=2e-3)


REFUSED = {
    "unknown": ([{"schedule": "linar", "steps": 4}], r"phases.0.schedule = 'linar' is not known. Did you mean 'linear"),
    "upwards": ([{"sparsity": 0.5, "sparsity_end": 0.9, "schedule": "linear", "steps": 4}],
                r"phases.0.sparsity_end = 0.9 must lie between 0 and sparsity = 0.5: weights are only ever added"),
    "cycles back": ([{"schedule": "cycling", "levels": [0.9, 0.5], "steps": 8, "update_every": 2}],
                    r"phases.0.levels go from 0.5 up to 0.9: that would drop weights"),
    "levels rise": ([{"schedule": "cycling", "levels": [0.5, 0.9], "steps": 8}], r"levels go from 0.5 up to 0.9"),
    "no levels": ([{"schedule": "cycling", "steps": 8}], r"phases.0.levels: schedule: cycling needs them"),
    "levels elsewhere": ([{"schedule": "linear", "levels": [0.5], "steps": 8}], r"levels belong to schedule: cycling"),
    "an end without": ([{"sparsity": 0.9, "sparsity_end": 0.5, "steps": 8}], r"need a schedule that is not constant"),
    "too seldom": ([{"sparsity": 0.9, "schedule": "exp", "steps": 8, "update_every": 8}],
                   r"update_every = 8 must lie between 1 and the phase's 8 steps"),
    "above the end before": ([{"sparsity": 0.9, "schedule": "exp", "steps": 8}, {"sparsity": 0.5, "steps": 2}],
                             r"phases.1.sparsity = 0.5 is above the phase before \(0.0\)"),
    "a long ramp": ([{"sparsity": 0.9, "schedule": "exp", "steps": 8, "update_every": 2, "revived_warmup": 3}],
                    r"revived_warmup = 3 must end before the next update, after 2 steps"),
    "no such layer": ([{"sparsity": 0.9, "layers": {"h.2.*": 0.5}, "steps": 8}], r"layers: 'h.2.\*' matches no layer"),
    "a layer rises": ([{"sparsity": 0.5, "steps": 2}, {"sparsity": 0.5, "layers": {"*.c_fc": 0.6}, "steps": 2}],
                      r"layer 'h.0.mlp.c_fc' would go from sparsity 0.5 to 0.6"),
    "layers and a schedule": ([{"sparsity": 0.9, "layers": {"*.c_fc": 0.6}, "schedule": "exp", "steps": 8}],
                              r"layers with sparsities of their own need schedule: constant"),
    "init_method": ([{"sparsity": 0.9, "steps": 8, "init_method": "topp"}], r"'topp' is not known. Did you mean 'top"),
}  # fmt: skip


@pytest.mark.parametrize("phases, message", REFUSED.values(), ids=REFUSED)
def test_schedules_that_would_drop_weights_and_others_are_refused(tiny, phases, message):
    with pytest.raises(UserError, match=message):
        loading.load(changed(tiny, "refused", phases=phases))


# -- a run from another's checkpoint ----------------------------------------------------------------------------------


def test_two_runs_are_one_run_cut_in_two(tmp_path, tiny_config):
    """Stage 2 in a run of its own: the same weights, moments and text as the second phase of one run."""
    path = tiny_config(tmp_path)
    sparse = {"name": "sparse", "sparsity": 0.9, "steps": 6, "lr_multiple": 2}
    dense = {"name": "dense", "steps": 6, "warmup_steps": 2}
    whole, _, lines, _ = run(changed(path, "whole", phases=[sparse, dense]))
    one, _, _, _ = run(changed(path, "one", phases=[sparse]))
    two, _, second, said = run(changed(path, "two", phases=[dense], init_from=str(one)))
    assert any("with moments, its data from sequence 48" in line for line in said)
    assert [line["loss"] for line in second] == [line["loss"] for line in lines[6:]]
    a, b = tensors(whole, 12)[0], tensors(two, 6)[0]
    assert all(torch.equal(a[key], b[key]) for key in a)
    shutil.rmtree(two / "checkpoints")  # as if it had been killed before its first
    for name in ("summary.json", "summary.digest.json"):
        (two / name).unlink()
    _, _, again, said = run(tmp_path / "two.yaml", resume=True)
    assert any(line.startswith("starting from") for line in said)
    assert [line["loss"] for line in again] == [line["loss"] for line in second]
    _, _, again, _ = run(two / "config.yaml", "train.log_every=1", f"run_dir={tmp_path / 'three'}")
    assert [line["loss"] for line in again] == [line["loss"] for line in second]


def test_a_converted_checkpoint_still_knows_its_place_in_the_data(tmp_path, tiny_config, vspdf, caplog):
    path = tiny_config(tmp_path)
    one, _, _, _ = run(changed(path, "one", phases=[{"sparsity": 0.9, "steps": 3}]))
    assert vspdf("convert", one, tmp_path / "dense", "--to", "dense")[0] == 0
    _, _, _, said = run(changed(path, "two", phases=[{"steps": 1}], init_from=str(tmp_path / "dense")))
    assert any("without moments, its data from sequence 24" in line for line in said)
    run(changed(path, "three", phases=[{"steps": 1}], init_from=str(one), seed=1))
    assert "saw this text in another order" in caplog.text


@pytest.mark.parametrize("older", [False, True], ids=["now", "before checkpoints told"])
def test_what_another_run_saw_of_the_text_held_out_here_is_said(tmp_path, tiny_config, caplog, older):
    """With other parts held out the order is another too, so that no place in it is taken."""
    path = tiny_config(tmp_path)
    one, _, _, _ = run(changed(path, "one", phases=[{"steps": 1}]))
    if older:
        file = one / "checkpoints" / "step-00000001" / "state.json"
        body = json.loads(file.read_text())
        del body["test_fraction"], body["state_sha256"]
        file.write_text(json.dumps({**body, "state_sha256": digests.of_body(body)}))
    again = changed(path, "again", phases=[{"steps": 1}], init_from=str(one))
    test, both = (["data.test_fraction=0.3"], ["data.test_fraction=0.3", "data.validation_fraction=0.2"])
    for i, (changes, was, what) in enumerate((
        ([], None, None),
        (test, "data.test_fraction = 0.0", "test"),
        ([*test, "data.first_sequence=8"], "data.test_fraction = 0.0", "test"),
        (both, "data.validation_fraction = 0.1 and data.test_fraction = 0.0", "validation or test"),
        (both[1:], "data.validation_fraction = 0.1", "validation"),
    )):  # fmt: skip
        caplog.clear()
        _, _, _, said = run(again, *changes, f"run_dir={tmp_path / str(i)}")
        assert any("its data from sequence 8" in line for line in said) == (
            not what or "data.first_sequence=8" in changes
        )
        warned = [line for line in caplog.messages if "was trained on this text with" in line]
        assert len(warned) == bool(what)
        assert not what or f"with {was}: it may have seen what is {what} text here" in warned[0]


def test_a_sparse_run_goes_on_sparse_and_cannot_get_sparser(tmp_path, tiny_config):
    path = tiny_config(tmp_path)
    one, _, _, _ = run(changed(path, "one", phases=[{"sparsity": 0.9, "steps": 2, "count": "truncate"}]))
    before = {n: layer.pattern for n, layer in sparse_layers(checkpoints.load(one).model).items()}
    on, _, _, _ = run(changed(path, "on", phases=[{"sparsity": 0.9, "steps": 2}], init_from=str(one)))
    assert {n: layer.pattern for n, layer in sparse_layers(checkpoints.load(on).model).items()} == before
    with pytest.raises(UserError, match=r"has sparsity 0.9.* and would go to 0.95: weights are only ever added"):
        run(changed(path, "up", phases=[{"sparsity": 0.95, "steps": 2}], init_from=str(one)))


def test_from_a_hugging_face_folder_by_topk(tmp_path, tiny_config, vspdf):
    path = tiny_config(tmp_path)
    one, _, _, _ = run(changed(path, "one", phases=[{"steps": 2}]))
    assert vspdf("convert", one, tmp_path / "hf")[0] == 0
    phases = [{"sparsity": 0.8, "steps": 1, "init_method": "topk"}]
    two, _, _, said = run(changed(path, "two", phases=phases, init_from=str(tmp_path / "hf")))
    assert any("without moments" in line for line in said)
    dense = checkpoints.load(tmp_path / "hf").model
    for name, layer in sparse_layers(checkpoints.load(two).model).items():
        assert layer.pattern is Pattern.topk(dense.get_submodule(name).weight, 0.8)


def test_zeros_of_a_hugging_face_folder_become_masks_again(tmp_path, tiny_config, vspdf):
    path = tiny_config(tmp_path)
    one, _, _, _ = run(changed(path, "one", phases=[{"sparsity": 0.8, "steps": 2}]))
    assert vspdf("convert", one, tmp_path / "hf")[0] == 0
    zeros = {"steps": 1, "init_method": "from_zeros"}
    two, _, _, _ = run(changed(path, "two", phases=[zeros | {"sparsity": 0.8}], init_from=str(tmp_path / "hf")))
    before, after = (sparse_layers(checkpoints.load(folder).model) for folder in (one, two))
    assert len(after) == 8 and all(after[name].pattern == layer.pattern for name, layer in before.items())
    with pytest.raises(UserError, match=r"'h.0.attn.c_attn' has 80.01% of them, its sparsity is to be 90.00%"):
        run(changed(path, "up", phases=[zeros | {"sparsity": 0.9}], init_from=str(tmp_path / "hf")))
    with pytest.raises(UserError, match=r"from_zeros takes zeros for masked: 'h.0.attn.c_attn' has 0.00% of them"):
        run(changed(path, "new", phases=[zeros | {"sparsity": 0.8}]))
    assert not (tmp_path / "new").exists() and not (tmp_path / "up").exists()


def test_what_does_not_fit_is_refused(tmp_path, tiny_config):
    path = tiny_config(tmp_path)
    one, _, _, _ = run(changed(path, "one", phases=[{"steps": 1}]))
    phases = [{"steps": 1}]
    other = changed(path, "other", phases=phases, init_from=str(one))
    for override, message in (
        ("model.d_ff=64", r"init_from '.*one': its model.d_ff is 128, here it is 64"),
        ("model.mlp=gelu_tanh", r"its model.mlp is gelu, here it is gelu_tanh"),
        (
            "data.tokenizer=bpe:300",
            r"trained with the tokenizer bytes, whose vocabulary is not that of data.tokenizer = 'bpe:300'",
        ),
        (f"init_from={tmp_path / 'nowhere'}", r"'.*nowhere' not found"),
        ("data.first_sequence=-1", r"data.first_sequence must not be negative"),
        ("data.first_sequence=100000", r"enough|unseen|samples|sequences"),
    ):
        with pytest.raises(UserError, match=message):
            run(other, override)
        assert not (tmp_path / "other").exists()
