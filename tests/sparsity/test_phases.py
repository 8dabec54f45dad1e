"""Phases in a plain loop of one's own."""

import copy

import pytest
import torch

import vspdf
from vspdf.errors import UserError
from vspdf.sparsity.layer import sparse_layers


def loop(phases, model, optimizer, steps, seen, scheduler=None):
    for step in steps:
        phases.at(step, model, optimizer)
        seen.append(phases.sparsity)
        model(torch.randn(8, 12, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        phases.step(optimizer)
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()


@pytest.mark.parametrize(
    "method, told", [("topk", True), ("random:2:4", True), ("random", False), ("from_zeros", False)]
)
def test_a_way_to_draw_masks_that_are_there_already_is_told_to_do_nothing(mlp, caplog, method, told):
    model = mlp()
    vspdf.sparsify(model, 0.5)
    vspdf.Phases([(0.5, 2)], init_method=method).start(model)
    line = f"phases.0.init_method = {method} does nothing: the model is sparse, and its masks stay."
    assert caplog.messages == [line] * told


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
