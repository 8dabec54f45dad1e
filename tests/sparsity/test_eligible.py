"""Which layers become sparse: those of which nothing is lost by it."""

import copy
import logging

import pytest
import torch
from torch import nn

import vspdf
from vspdf.errors import UserError


class Renamed(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Adapted(nn.Linear):
    """An adapter within the layer, zero at first."""

    def __init__(self, *sides):
        super().__init__(*sides)
        self.down, self.up = nn.Parameter(torch.randn(2, sides[0])), nn.Parameter(torch.zeros(sides[1], 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class Gated(nn.Linear):
    def __init__(self, *sides):
        super().__init__(*sides)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return super().forward(x)


class Noisy(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y + torch.randn_like(y) if self.training else y


@pytest.mark.parametrize("kind", [Adapted, Gated, Noisy])
def test_a_subclass_that_does_more_stays_dense_with_a_word(kind, caplog):
    model = nn.Sequential(kind(8, 8), Renamed(8, 8))
    with caplog.at_level(logging.WARNING, "vspdf"):
        assert list(vspdf.sparsify(model, 0.5)) == ["1"]
    assert f"'0' stays dense: {kind.__name__} is a kind of its own" in caplog.text
    assert model[0].training and (kind is not Gated or not model[0].seen)


def test_looking_at_a_subclass_draws_no_random_numbers():
    state = torch.get_rng_state()
    model = nn.Sequential(Noisy(8, 8), nn.Linear(8, 8))
    torch.set_rng_state(state)
    vspdf.sparsify(model, 0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_whose_forward_was_replaced_stays_as_it_is(caplog):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = model[0].forward
    model[0].forward = lambda x: 2 * before(x)
    with caplog.at_level(logging.WARNING, "vspdf"):
        assert list(vspdf.sparsify(model, 0.5)) == ["1"]
    assert "'0' stays dense: its forward was replaced on the layer itself" in caplog.text
    own = model[1].forward
    model[1].forward = lambda x: own(x)
    with pytest.raises(UserError, match="the forward of '1' was replaced"):
        vspdf.densify(model)
    assert isinstance(model[1], vspdf.SparseLinear)


def test_hooks_of_accelerate_go_on():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    add_hook_to_module(model[0], ModelHook())
    vspdf.sparsify(model, 0.5)
    assert model(torch.ones(2, 8)).shape == (2, 8)


def test_a_layer_that_was_compiled_by_itself_goes_on_uncompiled_with_a_word(caplog):
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    for change in (lambda: vspdf.sparsify(model, 0.5), lambda: vspdf.densify(model)):
        model[0].compile(backend="eager")
        caplog.clear()
        with caplog.at_level(logging.WARNING, "vspdf"):
            change()
        assert "'0' was compiled by its own compile(): call that again" in caplog.text
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("how", ["by data", "by assignment"])
def test_weights_that_share_memory_are_tied(how, caplog):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    if how == "by data":
        model[1].weight.data = model[0].weight.data
    else:
        state = model.state_dict()
        model.load_state_dict({**state, "1.weight": state["0.weight"]}, assign=True)
    with caplog.at_level(logging.WARNING, "vspdf"):
        assert list(vspdf.sparsify(model, 0.5)) == ["2"]
    assert "'1' stays dense: its weight is tied" in caplog.text


def test_a_glob_that_never_counts_is_named(caplog):
    with caplog.at_level(logging.WARNING, "vspdf"):
        vspdf.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), {"*": 0.75, "1": 0.5})
    assert "sparsify: '1' never counts: '*' before it takes all that it matches." in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "vspdf"):
        vspdf.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), {"1": 0.5, "0": 0.75, "*": 0.9})
    assert not caplog.records


def test_every_kind_of_container_that_holds_a_layer_gets_the_new_one():
    from collections import OrderedDict, deque, namedtuple
    from functools import partial

    model = nn.Sequential(nn.Linear(8, 8))
    old, pair = model[0], namedtuple("pair", "layer width")
    model.held = [
        OrderedDict(a=old), deque([old]), {old}, pair(old, 8), partial(torch.add, old), partial(dict, layer=old),
        (old,),
    ]  # fmt: skip
    vspdf.sparsify(model, 0.5)
    new, held = model[0], model.held
    found = [held[0]["a"], held[1][0], *held[2], held[3].layer, held[4].args[0], held[5].keywords["layer"], held[6][0]]
    assert all(layer is new for layer in found) and type(held[3]) is pair and type(held[0]) is OrderedDict


def test_a_lazy_layer_is_refused_until_it_has_its_weights():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
    with pytest.raises(UserError, match="LazyLinear is not made yet: run one batch"):
        vspdf.sparsify(model, 0.5)
    with pytest.raises(UserError, match="run one batch"):
        vspdf.Phases([vspdf.Phase(sparsity=0.5, steps=2)]).start(model)
    assert set(vspdf.sparsify(copy.deepcopy(model), 0.5, exclude="1")) == {"0"}
    model(torch.ones(1, 8))
    assert set(vspdf.sparsify(model, 0.5)) == {"0", "1"}
