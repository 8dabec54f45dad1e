"""Phases on a training of one's own: a plain loop, and transformers' Trainer with resume."""

import copy
import logging

import pytest
import torch
import transformers

import vspdf
from vspdf.errors import UserError
from vspdf.sparsity.layer import sparse_layers

# -- a plain loop -----------------------------------------------------------------------------------------------------


def loop(phases, model, optimizer, steps, seen, scheduler=None):
    for step in steps:
        phases.at(step, model, optimizer)
        seen.append(phases.sparsity)
        model(torch.randn(8, 12, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        phases.step(optimizer)
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()


STAGES = [vspdf.Phase(schedule="cycling", levels=[0.9, 0.5], steps=6), (0.0, 4)]


def test_a_plain_loop_goes_through_its_phases_and_resumes(tmp_path, mlp):
    model, phases, seen = mlp(), vspdf.Phases(STAGES), []
    phases.start(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for stop in (2, 4, 8):
        loop(phases, model, optimizer, range(len(seen), stop), seen)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / f"{stop}.pt")
    loop(phases, model, optimizer, range(8, 10), seen)
    assert seen == [0.9] * 3 + [0.5] * 3 + [0.0] * 4 and not sparse_layers(model)
    for stop in (2, 4, 8):
        saved = torch.load(tmp_path / f"{stop}.pt", weights_only=True)
        again, phases = mlp(), vspdf.Phases(STAGES)
        phases.restore(again, saved["model"], stop)
        again.load_state_dict(saved["model"])
        optimizer = torch.optim.AdamW(again.parameters(), lr=0.01)
        optimizer.load_state_dict(saved["optimizer"])
        loop(phases, again, optimizer, range(stop, 10), [])
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)), stop


RATES = [(0.9, 20, 3e-2), (0.0, 20)]
MAKE = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-2),
}


@pytest.mark.parametrize("kind", MAKE)
def test_the_learning_rate_warms_up_again_after_a_switch_and_resumes(kind, mlp):
    def made(saved=None):
        model, phases = mlp(), vspdf.Phases(RATES)
        phases.restore(model, saved["model"], saved["step"]) if saved else phases.start(model)
        groups = vspdf.parameter_groups(model, 0.1)
        groups[1]["lr"] = 2e-2  # twice the rate for biases
        optimizer = MAKE[kind](groups)
        scheduler = phases.scheduler(optimizer)
        if saved:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
        return model, phases, optimizer, scheduler

    model, phases, optimizer, scheduler = made()
    rates, saved = [], {}
    for step in range(45):
        if step in (7, 20, 21, 33):
            body = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            saved[step] = {"step": step, **copy.deepcopy({k: v.state_dict() for k, v in body.items()})}
        rates.append([group["lr"] for group in optimizer.param_groups])
        loop(phases, model, optimizer, [step], [], scheduler)
    weights, biases = zip(*rates, strict=True)
    assert biases == pytest.approx([2 * lr for lr in weights])
    assert weights[0] == max(weights[:20]) == pytest.approx(3e-2)  # 5 % of 20 steps is one
    assert weights[19:23] == pytest.approx([1e-3, 5e-3, 1e-2, 1e-2])  # down, and up again in two steps
    assert weights[39:] == pytest.approx([1e-3] * 6)
    for step, state in saved.items():
        again, phases, optimizer, scheduler = made(state)
        assert [group["lr"] for group in optimizer.param_groups] == rates[step]
        loop(phases, again, optimizer, range(step, 45), [], scheduler)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)), step


def test_phases_need_a_rate_to_go_by(mlp):
    with pytest.raises(UserError, match=r"SGD has lr = 0: phases need a positive one"):
        vspdf.Phases(RATES).scheduler(torch.optim.SGD(mlp().parameters(), lr=0.0))


def test_revived_weights_ramp_up_after_a_switch(mlp):
    steps = {}
    for ramp in (0, 3):
        model, phases = mlp(), vspdf.Phases([(0.9, 3), (0.0, 9)], revived_warmup=ramp)
        phases.start(model)
        mask = model[0].pattern.mask()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
        loop(phases, model, optimizer, range(4), [])
        steps[ramp] = model[0].weight.detach()[~mask]
    torch.testing.assert_close(steps[3], steps[0] / 4)


REFUSED = {
    "none": ([], r"at least one phase"),
    "no steps": ([(0.9, 0)], r"phases.0 needs a number of steps of at least 1, not 0"),
    "a rise": ([(0.5, 2), (0.9, 2)], r"phases.1.sparsity = 0.9 is above the phase before \(0.5\)"),
    "out of range": ([(1.0, 2)], r"phases.0.sparsity must lie in \[0, 1\), not 1.0"),
}


@pytest.mark.parametrize("phases, message", REFUSED.values(), ids=REFUSED)
def test_impossible_phases_are_refused(phases, message):
    with pytest.raises(UserError, match=message):
        vspdf.Phases(phases)


FIRST = {"sparse": (0.9, 2), "dense": vspdf.Phase(algorithm="gmp", schedule="power", sparsity_end=0.75, steps=200)}


@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
def test_options_are_those_of_sparsify_that_phases_take(first):
    for wrong, meant in (("exclud", "exclude"), ("init_metod", "init_method"), ("sed", "seed"), ("momory", "memory")):
        with pytest.raises(UserError, match=rf"^Phases has no option '{wrong}'\. Did you mean '{meant}'\?$"):
            vspdf.Phases([first], **{wrong: "0"})
    vspdf.Phases([first], include="*", exclude=(), rescale=False, backend="cpu", memory="low")


def test_rescale_without_first_masks_is_refused():
    for phase in (FIRST["dense"], (0.0, 2), vspdf.Phase(
        sparsity=0.9, steps=200, algorithm="set", rules="cstorch", update={"freq": 50, "start": 50}
    )):  # fmt: skip
        with pytest.raises(UserError, match=r"rescale = True does nothing: .* the first phase begins dense"):
            vspdf.Phases([phase], rescale=True)
    vspdf.Phases([FIRST["sparse"]], rescale=True)
    vspdf.Phases([vspdf.Phase(layers={"0": 0.5}, steps=2)], rescale=True)


def masks(model):
    return {name: layer.pattern for name, layer in sparse_layers(model).items()}


def test_layers_have_sparsities_of_their_own_and_seeds_follow_from_phase_and_stage(mlp):
    apart = vspdf.Phase(sparsity=0.9, layers={"2": 0.5}, steps=2)
    falling = vspdf.Phase(schedule="cycling", levels=[0.4, 0.2], steps=4)
    model, phases = mlp(), vspdf.Phases([apart, falling], seed=7)
    phases.start(model)
    assert [round(p.sparsity, 2) for p in masks(model).values()] == [0.9, 0.5]
    assert phases.sparsity == pytest.approx(0.7)  # both have 360 weights
    by_hand = mlp()
    vspdf.sparsify(by_hand, {"2": 0.5, "*": 0.9}, seed=7)
    for step, amount, seed in ((2, 0.4, 8), (4, 0.2, 8 + 1_000_003)):
        assert masks(model) == masks(by_hand)
        assert phases.at(step, model) and not phases.at(step + 1, model)
        vspdf.set_sparsity(by_hand, amount, seed=seed)
    assert masks(model) == masks(by_hand) and phases.now[:3] == (4, 1, 1)
    with pytest.raises(UserError, match=r"phases.0.layers: '3' matches no layer"):
        vspdf.Phases([vspdf.Phase(sparsity=0.9, layers={"3": 0.5}, steps=2)]).start(mlp())
    with pytest.raises(UserError, match=r"layer '2' would go from sparsity 0.5 to 0.8: weights are only ever added"):
        vspdf.Phases([apart, (0.8, 3)]).start(mlp())


def test_a_model_that_is_sparse_already_goes_on_and_gets_no_sparser(mlp):
    model = mlp()
    before = vspdf.sparsify(model, {"0": 0.9}, seed=3)
    with pytest.raises(UserError, match=r"layer '2' is dense already and would go to 0.5: weights are only ever"):
        vspdf.Phases([(0.5, 2)]).start(model)
    with pytest.raises(UserError, match=r"layer '0' has sparsity 0.9 and would go to 0.95: weights are only ever"):
        vspdf.Phases([(0.95, 2)], exclude="2").start(model)
    vspdf.Phases([(0.5, 2)], exclude="2").start(model)
    assert masks(model)["0"].sparsity == 0.5 and masks(model)["0"].issuperset(before["0"])


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_moments_are_kept_or_forgotten_at_the_start_of_a_phase_alone(moments, mlp):
    stages = [(0.9, 2), vspdf.Phase(schedule="cycling", levels=[0.5, 0.2], steps=4)]
    model, phases = mlp(), vspdf.Phases(stages, moments=moments)
    phases.start(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loop(phases, model, optimizer, range(5), [])
    assert {int(state["step"]) for state in optimizer.state.values()} == {5 if moments == "keep" else 3}


def test_a_ramp_goes_on_after_a_resume(caplog, mlp):
    ends, stages = [], [(0.9, 3), (0.0, 9)]
    for stop in (8, 5):
        model, phases = mlp(), vspdf.Phases(stages, revived_warmup=4)
        phases.start(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        loop(phases, model, optimizer, range(stop), [])
        if stop < 8:
            (before, done), saved, state = phases.ramp, model.state_dict(), optimizer.state_dict()
            assert set(before) == {"0", "2"} and done == 2
            model, phases = mlp(), vspdf.Phases(stages, revived_warmup=4)
            phases.restore(model, saved, stop, (before, done))
            model.load_state_dict(saved)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            optimizer.load_state_dict(state)
            loop(phases, model, optimizer, range(stop, 8), [])
            assert not caplog.records
            vspdf.Phases(stages, revived_warmup=4).restore(mlp(), saved, stop)
            assert "resumed within a ramp of revived weights" in caplog.text
        ends.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_start_comes_first_and_checkpoints_belong_to_phases(mlp):
    phases = vspdf.Phases([(0.9, 2), (0.0, 2)])
    with pytest.raises(UserError, match=r"start\(model\) or restore\(...\) comes before the first step"):
        phases.at(0, mlp())
    other = mlp()
    vspdf.sparsify(other, 0.5)
    with pytest.raises(UserError, match=r"the checkpoint has a sparsity of 0.5; after 1 steps these phases have 0.9"):
        phases.restore(mlp(), other.state_dict(), 1)


# -- transformers' Trainer --------------------------------------------------------------------------------------------

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


def trainer(folder, callback, model, *callbacks, steps=8, optimizers=(None, None)):
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=2,
        warmup_steps=2, lr_scheduler_type="linear", report_to=[], disable_tqdm=True, logging_steps=100, use_cpu=True,
    )  # fmt: skip
    every = [callback, *callbacks]
    return transformers.Trainer(model, args, train_dataset=texts(), callbacks=every, optimizers=optimizers)


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
        first = masks(model)
        assert all(pattern.sparsity == 0.5 for pattern in first.values())
        optimizer = torch.optim.AdamW(vspdf.parameter_groups(model, 0.1), lr=1e-3)
        rows = torch.stack([row["input_ids"] for row in texts()[:4]])
        for step in range(8):
            phases.at(step, model, optimizer)
            model(rows, labels=rows).loss.backward()
            phases.step(optimizer)
            optimizer.zero_grad()
        assert all(pattern is not first[name] for name, pattern in masks(model).items())
