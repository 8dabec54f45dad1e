"""Optimizers across a switch: state follows its weight or starts anew with a word; one that was forgotten is named."""

import copy
import gc
import logging

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import vspdf
from vspdf.errors import UserError
from vspdf.sparsity.layer import SparseLinear
from vspdf.sparsity.revived import RevivedWarmup

# -- moments and revived weights --------------------------------------------------------------------------------------

OPTIMIZERS = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
def test_optimizer_state_travels_all_the_way(make, conv1d, mlp, adam_steps):
    """dense -> sparse -> less sparse -> dense: state follows its weight, positions without one hold zeros."""
    model = nn.Sequential(Conv1D(30, 12), nn.GELU(), Conv1D(12, 30)) if conv1d else mlp()
    optimizer = make(model.parameters())
    adam_steps(model, optimizer)

    def matrices(key):
        """State tensors of all weights in dense row-major form."""
        found = []
        for module in (model[0], model[2]):
            if isinstance(module, SparseLinear):
                dense = torch.zeros(module.pattern.shape)
                dense[module.pattern.mask()] = optimizer.state[module.values][key]
                found.append(dense)
            else:
                tensor = optimizer.state[module.weight][key]
                found.append(tensor.T.clone() if isinstance(module, Conv1D) else tensor.clone())
        return found

    state = optimizer.state[model[0].weight]
    keys = [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim()]
    assert keys
    dense = {key: matrices(key) for key in keys}
    patterns = list(vspdf.sparsify(model, 0.6, optimizer=optimizer).values())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} and set(map(id, optimizer.state)) == held
    for key in keys:
        for found, exact, pattern in zip(matrices(key), dense[key], patterns, strict=True):
            assert torch.equal(found, exact * pattern.mask())
    for change in (lambda: vspdf.set_sparsity(model, 0.3, optimizer), lambda: vspdf.densify(model, optimizer)):
        adam_steps(model, optimizer)
        before = {key: matrices(key) for key in keys}
        steps = [s.get("step", torch.tensor(0.0)).item() for s in optimizer.state.values()]
        change()
        for key in keys:
            assert all(torch.equal(a, b) for a, b in zip(matrices(key), before[key], strict=True))
        assert [s.get("step", torch.tensor(0.0)).item() for s in optimizer.state.values()] == steps
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
            id(p) for p in model.parameters()
        }
    adam_steps(model, optimizer)


SWITCHES = {
    "set_sparsity": lambda model, optimizer, **how: vspdf.set_sparsity(model, 0.4, optimizer, **how),
    "densify": vspdf.densify,
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_moments_reset(switch, mlp, adam_steps):
    model = mlp()
    vspdf.sparsify(model, 0.6)
    optimizer = torch.optim.AdamW(model.parameters())
    adam_steps(model, optimizer)
    switch(model, optimizer, moments="reset")
    assert set(map(id, optimizer.state)) == {id(model[0].bias), id(model[2].bias)}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
def test_revived_weights_ramp_up(switch, conv1d, mlp, adam_steps):
    model = nn.Sequential(Conv1D(30, 12), nn.GELU(), Conv1D(12, 30)) if conv1d else mlp()
    vspdf.sparsify(model, 0.8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    adam_steps(model, optimizer)
    before = switch(model, optimizer)
    plain, plain_optimizer = copy.deepcopy((model, optimizer))

    def weights(of):
        """Dense row-major copies by layer."""
        found = {name: of.get_submodule(name) for name in before}
        return {n: (m.weight.T if isinstance(m, Conv1D) else m.weight).detach().clone() for n, m in found.items()}

    x = torch.randn(8, 12)
    warmup = RevivedWarmup(model, before, steps=3)
    for done in range(1, 6):
        for one in (model, plain):
            one.zero_grad()
            one(x).square().mean().backward()
        start, plain_start = weights(model), weights(plain)
        warmup.step(optimizer)
        plain_optimizer.step()
        if done == 1:  # from the same state: the update of revived weights is a quarter of the plain one
            for name, old in before.items():
                update, full = weights(model)[name] - start[name], weights(plain)[name] - plain_start[name]
                ramp = torch.where(old.mask(), 1.0, 0.25)
                torch.testing.assert_close(update, full * ramp, rtol=1e-3, atol=1e-7)
                assert full[~old.mask()].abs().sum() > 0
        assert warmup.done == min(done, 3)


# -- one that is forgotten, state of other forms ----------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["sparsify", "set_sparsity", "densify"])
def test_an_optimizer_that_was_forgotten_is_named(verb, caplog, one, sparse_one):
    model = one() if verb == "sparsify" else sparse_one()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    change = {"sparsify": (0.5,), "set_sparsity": (0.5,), "densify": ()}[verb]
    with caplog.at_level(logging.WARNING, "vspdf"):
        getattr(vspdf, verb)(model, *change)
    assert f"{verb}: an optimizer made before still holds 1 of the parameters" in caplog.text
    del optimizer


def test_another_optimizer_than_the_one_handed_over_is_named(caplog, one, sparse_one):
    model = sparse_one()
    forgotten, given = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    with caplog.at_level(logging.WARNING, "vspdf"):
        vspdf.set_sparsity(model, 0.5, given)
    assert "set_sparsity: an optimizer made before still holds 1" in caplog.text
    caplog.clear()
    elsewhere = torch.optim.SGD(one().parameters(), lr=0.1)
    del forgotten, given
    with caplog.at_level(logging.WARNING, "vspdf"):
        vspdf.densify(model, elsewhere)
    assert "densify: the optimizer holds none of the 1 parameters that were replaced" in caplog.text


def test_no_optimizer_no_word(caplog, sparse_one):
    with caplog.at_level(logging.WARNING, "vspdf"):
        vspdf.densify(sparse_one())
    assert not caplog.records


@pytest.mark.parametrize("make", [torch.optim.Adafactor, transformers.Adafactor], ids=["torch", "transformers"])
def test_adafactor_goes_on_after_a_switch_with_a_word(make, caplog, sparse_one):
    model = sparse_one()
    optimizer = make(model.parameters(), lr=1e-2, **({} if make is torch.optim.Adafactor else {"relative_step": False}))
    with caplog.at_level(logging.WARNING, "vspdf"):
        for change in (
            lambda: None,
            lambda: vspdf.densify(model, optimizer),
            lambda: vspdf.sparsify(model, 0.5, optimizer=optimizer),
        ):
            change()
            model(torch.randn(4, 48)).sum().backward()
            optimizer.step(), optimizer.zero_grad()
    assert [r for r in caplog.records if "Adafactor keeps state that is not element by element" in r.getMessage()]


class Own(torch.optim.Optimizer):
    """Gradient descent with state of a form of its own, which must fit the parameter at every step."""

    def __init__(self, params, make):
        super().__init__(params, {"make": make})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["own"] = group["make"](p)
                for like, tensor in zip(group["make"](p), state["own"], strict=True):
                    tensor.add_(like)
                p.sub_(p.grad, alpha=1e-2)


# What the state of a weight holds, and whether it can follow the weight into another form.
FORMS = {
    "a tuple of moments": (lambda p: (torch.ones_like(p), torch.ones_like(p)), True),
    "a matrix a side": (lambda p: [torch.eye(side) for side in p.shape], False),
    "a flat vector": (lambda p: [torch.ones(p.numel())], False),
    "blocks": (lambda p: [torch.ones(-(-p.numel() // 64))], False),
}


@pytest.mark.parametrize("make, follows", FORMS.values(), ids=FORMS)
def test_state_of_any_form_follows_or_starts_anew_with_a_word(make, follows, caplog, one):
    model = one()
    optimizer = Own(model.parameters(), make)
    with caplog.at_level(logging.WARNING, "vspdf"):
        for change in (
            lambda: None,
            lambda: vspdf.sparsify(model, 0.5, optimizer=optimizer),
            lambda: vspdf.set_sparsity(model, 0.3, optimizer),
            lambda: vspdf.densify(model, optimizer),
        ):
            change()
            model(torch.randn(4, 48)).sum().backward()
            optimizer.step(), optimizer.zero_grad()
    said = "Own keeps state that is not element by element (own)" in caplog.text
    assert said is not follows
    if follows:
        mask = model[0].weight != 0
        assert (optimizer.state[model[0].weight]["own"][0][mask] >= 2).any()


def test_lbfgs_history_is_reset_with_a_word(caplog, sparse_one):
    model = sparse_one()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    closure = lambda: (loss := model(torch.ones(4, 48)).square().mean(), optimizer.zero_grad(), loss.backward())[0]  # noqa: E731
    optimizer.step(closure)
    with caplog.at_level(logging.WARNING, "vspdf"):
        vspdf.densify(model, optimizer)
    assert "LBFGS keeps state that is not element by element" in caplog.text


def test_lbfgs_trains_the_weights_that_came(sparse_one):
    model = sparse_one()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 48)).square().mean()
        loss.backward()
        return loss

    for change in (lambda: None, lambda: vspdf.evolve(model, optimizer, 0.3), lambda: vspdf.densify(model, optimizer)):
        change()
        before = [p.detach().clone() for p in model.parameters()]
        first = optimizer.step(closure).item()
        assert closure().item() < first
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


BEGINNINGS = {
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=1.0),
}


@pytest.mark.parametrize("moments", ["keep", "reset"])
@pytest.mark.parametrize("make", BEGINNINGS.values(), ids=BEGINNINGS)
def test_new_weights_begin_with_the_state_that_the_optimizer_begins_with(make, moments, sparse_one):
    model = sparse_one()
    optimizer, x = make(model.parameters()), torch.randn(4, 48)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
    revived = ~vspdf.densify(model, optimizer, moments=moments)["0"].mask()
    start, dense = model[0].weight.detach().clone(), nn.Sequential(nn.Linear(48, 96))
    dense.load_state_dict(model.state_dict())
    anew = make(dense.parameters())
    for net, own in ((model, optimizer), (dense, anew)):
        net(x).square().mean().backward()
        own.step()
    update, wanted = (model[0].weight - start)[revived], (dense[0].weight - start)[revived]
    torch.testing.assert_close(update, wanted, rtol=1e-4, atol=1e-7)


class Quantised(torch.Tensor):
    """State of a class of its own, as 8-bit optimizers keep it: its memory is not what its shape says."""


def test_state_of_a_class_of_its_own_starts_anew_with_a_word(caplog, sparse_one):
    model = sparse_one()
    optimizer = Own(model.parameters(), lambda p: [torch.zeros_like(p).as_subclass(Quantised)])
    model(torch.randn(4, 48)).sum().backward()
    optimizer.step()
    with caplog.at_level(logging.WARNING, "vspdf"):
        vspdf.evolve(model, optimizer, 0.3)
    assert "Own keeps state that is not element by element" in caplog.text and model[0].values not in optimizer.state


def test_a_tensor_that_hangs_on_a_weight_moves_with_it(one):
    model = one()
    model[0].weight.anchor = model[0].weight.detach().clone()
    vspdf.sparsify(model, 0.5)
    for change in (lambda: None, lambda: vspdf.evolve(model, None, 0.3), lambda: vspdf.densify(model)):
        change()
        kept = model[0].values if isinstance(model[0], SparseLinear) else model[0].weight
        assert kept.anchor.shape == kept.shape and torch.equal(kept.anchor[kept != 0], kept[kept != 0])


def test_what_cannot_exchange_parameters_is_refused_before_anything_changes(sparse_one):
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        pass

    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = sparse_one()
    optimizer = ZeroRedundancyOptimizer(model.parameters())
    for change in (
        lambda: vspdf.densify(model, optimizer), lambda: vspdf.evolve(model, optimizer, 0.3),
        lambda: vspdf.set_sparsity(model, 0.5, optimizer),
    ):  # fmt: skip
        with pytest.raises(UserError, match="ZeroRedundancyOptimizer has dealt its parameters out"):
            change()
    with pytest.raises(UserError, match="FullyShardedDataParallel keeps weights in flat parameters"):
        vspdf.densify(FullyShardedDataParallel(model))
    assert isinstance(model[0], SparseLinear)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_an_optimizer_for_matrices_is_refused_before_anything_changes(one):
    model = one()
    optimizer = torch.optim.Muon([model[0].weight], lr=1e-2)
    with pytest.raises(UserError, match=r"Muon takes matrices only.*vspdf.parameter_groups"):
        vspdf.sparsify(model, 0.5, optimizer=optimizer)
    assert type(model[0]) is nn.Linear


def test_parameter_groups_decay_sparse_values_as_matrices():
    model = nn.Sequential(nn.Linear(48, 96), nn.LayerNorm(96), nn.Linear(96, 8))
    model[2].bias.requires_grad_(False)
    vspdf.sparsify(model, 0.5, include="0")
    decayed, rest = vspdf.parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert {id(p) for p in decayed["params"]} == {id(model[0].values), id(model[2].weight)}
    assert {id(p) for p in rest["params"]} == {id(model[0].bias), id(model[1].weight), id(model[1].bias)}


# -- several optimizers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["evolve", "Phases"])
def test_a_second_optimizer_that_masks_that_move_have_left_behind_is_named_once(verb, caplog, mlp):
    model = mlp()
    phases = vspdf.Phases([vspdf.Phase(sparsity=0.9, steps=20, algorithm="set", update={"freq": 5})])
    phases.start(model)
    handed, other = (torch.optim.AdamW(model[i].parameters()) for i in (0, 2))
    with caplog.at_level(logging.WARNING, "vspdf"):
        for step in range(12):
            if verb == "Phases":
                phases.at(step, model, handed)
            elif step in (5, 10):
                vspdf.evolve(model, handed, 0.3, seed=step)
    assert [record.getMessage().split(" and trains")[0] for record in caplog.records] == [
        f"{verb}: an optimizer made before still holds 1 of the parameters that were replaced"
    ]
    assert any(p is model[0].values for p in handed.param_groups[0]["params"])
    del other


def test_a_frozen_layer_that_no_optimizer_holds_costs_no_search(monkeypatch, caplog, mlp):
    model = mlp()
    vspdf.sparsify(model, 0.9)
    model[2].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[0].parameters())
    monkeypatch.setattr(gc, "get_referrers", lambda *of: pytest.fail("asked for"))
    vspdf.evolve(model, optimizer, 0.3)
    assert not caplog.records


TAKE_AN_OPTIMIZER = {
    "sparsify": lambda model, given: vspdf.sparsify(model, 0.5, optimizer=given),
    "set_sparsity": lambda model, given: vspdf.set_sparsity(model, 0.2, given),
    "evolve": lambda model, given: vspdf.evolve(model, given, 0.3),
    "densify": vspdf.densify,
    "gathered": lambda model, given: vspdf.gathered(model, given).__enter__(),
    "Phases.start": lambda model, given: vspdf.Phases([(0.0, 2)]).start(model, given),
    "Phases.at": lambda model, given: (of := vspdf.Phases([(0.8, 2)]), of.start(model), of.at(0, model, given)),
    "Phases.scheduler": lambda model, given: vspdf.Phases([(0.5, 2)]).scheduler(given),
}  # fmt: skip


@pytest.mark.parametrize("verb", TAKE_AN_OPTIMIZER.values(), ids=TAKE_AN_OPTIMIZER)
def test_what_is_no_optimizer_is_refused_before_anything_changes(verb, one, sparse_one):
    for given in ([torch.optim.SGD(one().parameters(), lr=0.1)], "AdamW"):
        model = sparse_one(0.8)
        before = model[0].values
        with pytest.raises(UserError, match=f"optimizer must be one .* or None, not of type {type(given).__name__}"):
            verb(model, given)
        assert model[0].values is before
