"""Phases in transformers' Trainer, with resume."""

import logging

import pytest
import torch
import transformers

import vspdf
from vspdf.errors import UserError
from vspdf.sparsity.layer import patterns_of, sparse_layers

PHASES = [(0.9, 4), (0.0, 4)]


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 16, "vocab_size": 61}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 1}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **quiet))


def texts():
    rows = torch.randint(61, (64, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]


class Watch(transformers.TrainerCallback):
    """Sees, after each step, the weights of one layer as a dense matrix."""

    def __init__(self):
        self.weights = []

    def on_optimizer_step(self, args, state, control, model=None, **others):
        layer = model.transformer.h[1].mlp.c_fc
        sparse = isinstance(layer, vspdf.SparseLinear)
        self.weights.append((sparse, (layer.weight if sparse else layer.weight.T).detach().clone()))


def trainer(folder, callback, model, *callbacks, steps=8, optimizers=(None, None), **best):
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=2,
        warmup_steps=2, lr_scheduler_type="linear", report_to=[], disable_tqdm=True, logging_steps=100, use_cpu=True,
        **best,
    )  # fmt: skip
    every, scores = [callback, *callbacks], iter([9, 1, 1, 1])
    return transformers.Trainer(
        model, args, train_dataset=texts(), eval_dataset=texts()[:2], callbacks=every, optimizers=optimizers,
        compute_metrics=(lambda _: {"x": next(scores)}) if best else None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny GPT-2 of transformers through 4 sparse and 4 dense steps of its Trainer."""
    folder, callback, watch, model = tmp_path_factory.mktemp("out"), vspdf.PhasesCallback(PHASES), Watch(), gpt2()
    callback.prepare(model)
    mask = model.transformer.h[1].mlp.c_fc.pattern.mask()
    trainer(folder, callback, model, watch).train()
    return folder, model, watch.weights, mask


def test_masked_weights_are_exactly_zero_before_the_switch_and_learn_after(trained):
    _, model, weights, mask = trained
    assert [sparse for sparse, _ in weights] == [True] * 4 + [False] * 4
    for step, (_, weight) in enumerate(weights):
        off = weight[~mask]
        assert bool((off == 0).all()) if step < 4 else bool((off != 0).any())
        assert bool((weight[mask] != 0).all())
    assert not sparse_layers(model)
    assert type(model.transformer.h[1].mlp.c_fc) is transformers.pytorch_utils.Conv1D


def test_the_end_is_an_ordinary_model(trained, tmp_path):
    _, model, _, _ = trained
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = texts()[0]["input_ids"][None]
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("stop", [2, 4, 6], ids=["sparse", "at the switch", "dense"])
def test_a_resumed_training_ends_in_the_same_weights(trained, tmp_path, stop):
    folder, model, _, _ = trained
    checkpoint = folder / f"checkpoint-{stop}"
    callback, again = vspdf.PhasesCallback(PHASES), gpt2()
    callback.prepare(again, checkpoint)
    assert len(sparse_layers(again)) == (8 if stop < 4 else 0)
    trainer(tmp_path, callback, again).train(resume_from_checkpoint=str(checkpoint))
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_optimizer_state_is_carried_over_and_ramps_work_in_the_trainer(tmp_path):
    callback, model = vspdf.PhasesCallback(PHASES, revived_warmup=2), gpt2()
    made = trainer(tmp_path, callback, callback.prepare(model), steps=5)
    made.train()
    weight = model.transformer.h[0].attn.c_attn.weight
    state = made.optimizer.state[weight]
    assert int(state["step"]) == 5 and state["exp_avg"].shape == weight.shape
    assert callback.phases.revived.done == 1


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "x"}
FORMS = {
    "one density": [(0.5, 8)],
    "masks that move": [vspdf.Phase(algorithm="set", sparsity=0.5, steps=8, update={"freq": 2})],
    "dense in the end": [(0.9, 3), (0.5, 3), (0.0, 2)],
    "denser in the end": [(0.9, 4), (0.5, 4)],
    "dense at first": [vspdf.Phase(algorithm="gmp", sparsity_end=0.8, schedule="linear", steps=8, update={"freq": 2})],
}


@pytest.mark.parametrize("form", FORMS)
def test_the_best_checkpoint_is_loaded_or_refused_before_the_first_step(form, tmp_path):
    callback, model = vspdf.PhasesCallback(FORMS[form]), gpt2()
    made = trainer(tmp_path, callback, callback.prepare(model), **BEST)
    if form in ("denser in the end", "dense at first"):
        with pytest.raises(UserError, match=r"load_best_model_at_end: .* best checkpoint may have another.*CHECKPOINT"):
            made.train()
        assert made.state.global_step == 0
        return
    made.train()
    best = made.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    tokens = texts()[0]["input_ids"][None]
    again = transformers.AutoModelForCausalLM.from_pretrained(best)
    torch.testing.assert_close(model.eval()(tokens).logits, again.eval()(tokens).logits)


def test_a_second_training_is_prepared_anew(tmp_path):
    callback, model = vspdf.PhasesCallback([(0.9, 4), (0.5, 4)]), gpt2()
    made = trainer(tmp_path, callback, callback.prepare(model))
    made.train()
    with pytest.raises(UserError, match=r"step 0 comes after step 7.*before another training call start .*prepare"):
        made.train()
    callback.prepare(model := gpt2())
    trainer(tmp_path, callback, model).train()
    assert callback.phases.sparsity == 0.5


class Rates(transformers.TrainerCallback):
    """Sees the learning rate of each step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **others):
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_the_trainer_follows_the_rates_of_phases_and_resumes(tmp_path, caplog):
    def made(folder, rates, resume_from=None):
        callback = vspdf.PhasesCallback([(0.9, 4, 3e-2), vspdf.Phase(steps=4, warmup_steps=2)])
        model = callback.prepare(gpt2(), resume_from)
        optimizer = torch.optim.AdamW(vspdf.parameter_groups(model, 0.1), lr=1e-2)
        return model, trainer(folder, callback, model, rates, optimizers=(optimizer, callback.scheduler(optimizer)))

    rates, later = Rates(), Rates()
    model, made_trainer = made(tmp_path / "whole", rates)
    made_trainer.train()
    assert rates.seen == pytest.approx([3e-2, 3e-2 - 29e-3 / 3, 3e-2 - 58e-3 / 3, 1e-3, 5e-3, 1e-2, 1e-2, 1e-3])
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    again, made_trainer = made(tmp_path / "again", later, checkpoint)
    made_trainer.train(resume_from_checkpoint=checkpoint)
    assert later.seen == rates.seen[4:] and "warm-up" not in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_rates_that_the_trainer_does_not_follow_are_named(tmp_path, caplog):
    callback, model = vspdf.PhasesCallback([(0.9, 4, 3e-2), (0.0, 4)]), gpt2()
    made = trainer(tmp_path, callback, callback.prepare(model))
    with pytest.raises(UserError, match=r"does not follow the phases' learning rates: pass optimizers=\(optimizer, "):
        made.train()
    callback, model = vspdf.PhasesCallback(PHASES), gpt2()
    trainer(tmp_path, callback, callback.prepare(model), steps=1).train()
    assert "goes through switches without a new warm-up" in caplog.text


def test_what_was_forgotten_is_said(trained, tmp_path, caplog):
    with pytest.raises(UserError, match=r"prepare\(model\) comes before Trainer"):
        trainer(tmp_path, vspdf.PhasesCallback(PHASES), gpt2()).train()
    callback = vspdf.PhasesCallback(PHASES)
    callback.prepare(gpt2())
    with pytest.raises(UserError, match=r"has another model than the one that was prepared"):
        trainer(tmp_path, callback, gpt2()).train()
    with pytest.raises(UserError, match=r"is no checkpoint of the Trainer"):
        callback.prepare(gpt2(), tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"these phases have 0.8"):
        vspdf.PhasesCallback([(0.8, 9)]).prepare(gpt2(), trained[0] / "checkpoint-2")
    callback, model = vspdf.PhasesCallback(PHASES), gpt2()
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, callback, callback.prepare(model), steps=3).train()
    assert "training ends at step 3, before the last switch at step 4" in caplog.text


MOVES = {
    "set": {"algorithm": "set", "sparsity": 0.75, "update": {"freq": 2}},
    "rigl": {"algorithm": "rigl", "sparsity": 0.75, "update": {"freq": 2}},
    "gmp": {"algorithm": "gmp", "schedule": "linear", "sparsity_end": 0.75, "update": {"freq": 2}},
}


@pytest.mark.parametrize("settings", MOVES.values(), ids=MOVES)
def test_masks_move_in_the_trainer_and_resume(tmp_path, settings):
    stages = [vspdf.Phase(steps=7, **settings), (0.0, 2)]
    callback, model = vspdf.PhasesCallback(stages), gpt2()
    callback.prepare(model)
    trainer(tmp_path / "whole", callback, model, steps=8).train()
    assert not sparse_layers(model)
    for stop in (2, 4, 6):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{stop}")
        callback, again = vspdf.PhasesCallback(stages), gpt2()
        callback.prepare(again, checkpoint)
        assert len(sparse_layers(again)) == 8
        trainer(tmp_path / "again", callback, again, steps=8).train(resume_from_checkpoint=checkpoint)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)), stop


def test_pruned_models_go_on_under_any_algorithm():
    """Of N:M sparsity, as SparseGPT and others leave it: zeros are masks, which then move."""
    for settings in MOVES.values():
        model = gpt2()
        for block in model.transformer.h:
            for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                with torch.no_grad():
                    layer.weight.view(layer.weight.shape[0] // 2, 2, -1)[:, 1] = 0  # of every two inputs, one
        begun = {"sparsity": 0.5, "init_method": "from_zeros"}
        phase = vspdf.Phase(steps=8, **{**settings, **begun})
        phases = vspdf.Phases([phase])
        phases.start(model)
        first = patterns_of(model)
        assert all(pattern.sparsity == 0.5 for pattern in first.values())
        optimizer = torch.optim.AdamW(vspdf.parameter_groups(model, 0.1), lr=1e-3)
        rows = torch.stack([row["input_ids"] for row in texts()[:4]])
        for step in range(8):
            phases.at(step, model, optimizer)
            model(rows, labels=rows).loss.backward()
            phases.step(optimizer)
            optimizer.zero_grad()
        assert all(pattern is not first[name] for name, pattern in patterns_of(model).items())
