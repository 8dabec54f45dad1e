"""What users hand over (hooks, attributes, lists, edits, states, models of any kind) is carried over or refused."""

import copy
import logging
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.nn.utils import prune

import vspdf
from vspdf.errors import UserError
from vspdf.pattern import Pattern
from vspdf.sparsity.layer import SparseLinear, sparse_layers

# -- hooks, attributes, places ----------------------------------------------------------------------------------------


def test_hooks_run_and_their_handles_remove_them_through_all_forms(one):
    model, seen = one(), []
    forward = model[0].register_forward_hook(lambda *a: seen.append("forward"))
    model[0].register_forward_pre_hook(lambda *a, **k: seen.append("before"), with_kwargs=True)
    model[0].register_full_backward_hook(lambda *a: seen.append("backward"))
    model[0].register_state_dict_post_hook(lambda *a: seen.append("saved"))
    for change in (
        lambda: vspdf.sparsify(model, 0.5),
        lambda: vspdf.set_sparsity(model, 0.2),
        lambda: vspdf.densify(model),
    ):
        change()
        seen.clear()
        model(torch.randn(4, 48, requires_grad=True)).sum().backward()
        model.state_dict()
        assert seen == ["before", "forward", "backward", "saved"]
    forward.remove()
    seen.clear()
    model(torch.randn(4, 48))
    assert seen == ["before"]


def test_attributes_buffers_and_gradients_stay(one):
    model = one()
    model[0].role, model[0].weight.no_decay = "up", True
    model[0].register_buffer("scale", torch.ones(3))
    model(torch.ones(2, 48)).sum().backward()
    gradient = model[0].weight.grad.clone()
    pattern = vspdf.sparsify(model, 0.5)["0"]
    assert model[0].role == "up" and model[0].values.no_decay and "0.scale" in model.state_dict()
    assert torch.equal(model[0].values.grad, gradient[pattern.mask()])
    model[0].later = 1
    vspdf.densify(model)
    assert type(model[0]) is nn.Linear and model[0].role == "up" and model[0].weight.no_decay and model[0].later == 1
    assert torch.equal(model[0].weight.grad, gradient * pattern.mask()) and "0.scale" in model.state_dict()


def test_a_hook_on_the_weight_itself_is_named(caplog, one):
    model = one()
    model[0].weight.register_hook(lambda g: g)
    with caplog.at_level(logging.WARNING, "vspdf"):
        vspdf.sparsify(model, 0.5)
    assert "'0': hooks on the weight itself are gone" in caplog.text


def test_hooks_around_load_state_dict_get_the_layer_that_is_there(one):
    model, seen = one(), []
    model[0].register_load_state_dict_pre_hook(lambda module, *a: seen.append(module))
    model[0].register_load_state_dict_post_hook(lambda module, *a: seen.append(module))
    for change in (lambda: vspdf.sparsify(model, 0.5), lambda: vspdf.densify(model)):
        change()
        seen.clear()
        model.load_state_dict(model.state_dict())
        assert seen == [model[0], model[0]]


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.plain, self.nested, self.fixed = [self.a, self.b], {"x": [self.a]}, (self.a, self.b)
        self.method, self.methods = self.b.forward, (self.a.forward,)

    def forward(self, x):
        for layer in (*self.plain, *self.nested["x"], *self.fixed, self.method, *self.methods):
            x = layer(x)
        return x


def test_lists_dicts_and_tuples_of_a_model_follow():
    model = Listed()
    for change, kind in ((lambda: vspdf.sparsify(model, 0.5), SparseLinear), (lambda: vspdf.densify(model), nn.Linear)):
        change()
        assert model.plain[0] is model.nested["x"][0] is model.fixed[0] is model.a and type(model.a) is kind
        assert model.method.__self__ is model.b and model.methods[0].__self__ is model.a
    model(torch.randn(2, 8)).sum().backward()
    assert model.a.weight.grad is not None


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_reducer_that_was_made_before_the_model_became_sparse_is_named_and_refused(group, caplog, one):
    model = one()
    net = nn.parallel.DistributedDataParallel(model)
    vspdf.sparsify(nn.Sequential(one()), 0.5)
    assert not caplog.records
    vspdf.sparsify(model, 0.5)
    assert "sparsify: DistributedDataParallel was made before" in caplog.text
    with pytest.raises(UserError, match="wrap the model anew"):
        net(torch.ones(1, 48))
    nn.parallel.DistributedDataParallel(model)(torch.ones(1, 48))


# -- edits of layer.weight --------------------------------------------------------------------------------------------

EDITS = {
    "nn.init": lambda layer: nn.init.constant_(layer.weight, 3.0),
    "no_grad": lambda layer: torch.no_grad()(lambda: layer.weight.fill_(3.0))(),
    "data": lambda layer: layer.weight.data.fill_(3.0),
    "data +=": lambda layer: setattr(layer.weight, "data", layer.weight.data * 0 + 3.0),
    "detach": lambda layer: layer.weight.detach().fill_(3.0),
    "rows": lambda layer: [layer.weight.data[i].fill_(3.0) for i in range(layer.out_features)],
    "transposed": lambda layer: layer.weight.data.T.fill_(3.0),
    "copy_": lambda layer: layer.weight.data.copy_(torch.full((96, 48), 3.0)),
    "out=": lambda layer: torch.full((96, 48), 3.0, out=layer.weight.detach()),
    "assigned": lambda layer: setattr(layer, "weight", nn.Parameter(torch.full((96, 48), 3.0))),
    "foreach": lambda layer: torch._foreach_copy_([layer.weight.detach()], [torch.full((96, 48), 3.0)]),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_in_place_reaches_the_values(edit, sparse_one):
    layer = sparse_one()[0]
    edit(layer)
    assert (layer.values == 3).all()
    assert torch.equal(layer.weight != 0, layer.pattern.mask())


def test_its_own_weight_may_be_assigned_and_frozen(caplog, sparse_one):
    layer = sparse_one()[0]
    before = layer.values.detach().clone()
    with caplog.at_level(logging.WARNING, "vspdf"):
        layer.weight = layer.weight
        assert torch.equal(layer.values, before) and not caplog.records
        layer.weight.requires_grad = False
        assert not layer.values.requires_grad and not layer.weight.requires_grad
        layer.weight.requires_grad_(True)
        assert layer.values.requires_grad and layer.weight.detach().requires_grad_().is_leaf
        layer.weight = nn.Parameter(torch.zeros(96, 48))
    assert "the parameter itself is no part of the layer" in caplog.text and "weight" not in dict(
        layer.named_parameters()
    )
    with pytest.raises(UserError, match=r"a weight of shape \(3, 3\) does not fit a sparse layer of Pattern\(96x48"):
        layer.weight = torch.zeros(3, 3)


def test_what_lies_outside_the_mask_is_dropped_and_said_once(caplog, sparse_one):
    layer = sparse_one()[0]
    with caplog.at_level(logging.WARNING, "vspdf"):
        layer.weight.data.fill_(1.0), layer.weight.data.fill_(2.0)
    assert len(caplog.records) == 1 and "had non-zeros at masked positions" in caplog.text


def test_edits_that_cannot_be_honoured_are_refused(sparse_one):
    layer = sparse_one()[0]
    with pytest.raises(UserError, match=r"edit it in place under torch.no_grad\(\), or change layer.values"):
        layer.weight.mul_(2)
    with pytest.raises(ValueError, match="read-only"):
        layer.weight.detach().numpy()[:] = 0
    own = nn.Parameter(layer.weight)
    before = layer.values.detach().clone()
    torch.optim.SGD([own], lr=1.0)
    with torch.no_grad():
        own.zero_()
    assert torch.equal(layer.values, before)


def test_a_sparse_layer_is_copied_and_pickled_with_what_it_was_made_from(sparse_one):
    model = sparse_one()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other[0].weight, model[0].weight)
        vspdf.densify(other)
        assert type(other[0]) is nn.Linear


# -- values under another mask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
def test_values_without_their_pattern_are_refused(strict, sparse_one):
    a, b = sparse_one(seed=1), sparse_one(seed=2)
    stripped = {key: value for key, value in a.state_dict().items() if "_extra_state" not in key}
    with pytest.raises(RuntimeError, match=r"'0.values' comes without its pattern"):
        b.load_state_dict(stripped, strict=strict)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(torch.ones(1, 48)), b(torch.ones(1, 48)))


@pytest.mark.parametrize(
    "state, said",
    [({"0._extra_state"}, "pattern that comes without its '0.values'"), (set(), "is dense, the layer sparse")],
    ids=["a pattern without values", "a dense weight"],
)
def test_half_of_a_state_is_refused_though_not_strict(state, said, one, sparse_one):
    given = sparse_one(seed=1).state_dict()
    given = {key: value for key, value in given.items() if key in state} or one().state_dict()
    with pytest.raises(RuntimeError, match=said):
        sparse_one(seed=2).load_state_dict(given, strict=False)


RANK = """
import sys

import torch
import torch.distributed as dist
from torch import nn

import vspdf
from vspdf.errors import UserError

dist.init_process_group("gloo")
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(48, 32))
vspdf.sparsify(model, 0.5, seed=int(sys.argv[2 + dist.get_rank()]))
try:
    nn.parallel.DistributedDataParallel(model)(torch.ones(1, 48))
    said = "agreed"
except UserError as error:
    said = str(error)
with open(f"{sys.argv[1]}-{dist.get_rank()}", "w") as stream:
    stream.write(said)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("seeds", [(1, 1), (1, 2)], ids=["same masks", "other masks"])
def test_ranks_with_other_masks_are_refused_by_the_one_that_differs(seeds, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run([*run, str(tmp_path / "said"), *map(str, seeds)], check=True, timeout=120)
    first, second = ((tmp_path / f"said-{rank}").read_text() for rank in (0, 1))
    assert first == "agreed"
    assert second == "agreed" if seeds[0] == seeds[1] else "came from one with another mask" in second


# -- kinds of models --------------------------------------------------------------------------------------------------


class Renamed(nn.Linear):
    """As Falcon's: a forward of its own that computes the same."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses_that_compute_the_same_are_taken(caplog):
    model = nn.Sequential(Renamed(8, 8), Scaled(8, 8), type("Plain", (nn.Linear,), {})(8, 8))
    rng = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "vspdf"):
        assert set(vspdf.sparsify(model, 0.5)) == {"0", "2"}
    assert "'1' stays dense: Scaled is a kind of its own" in caplog.text and torch.equal(rng, torch.get_rng_state())
    vspdf.densify(model)
    assert type(model[0]) is Renamed and type(model[2]).__name__ == "Plain"


def test_heads_and_experts(llama, caplog):
    head = transformers.LlamaForSequenceClassification(llama.config)
    assert not any("score" in name for name in vspdf.sparsify(head, 0.5))
    bert = transformers.BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    assert "cls.seq_relationship" not in vspdf.sparsify(transformers.BertForPreTraining(bert), 0.5)
    named = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("head", "output", "up")})  # timm's, torchtune's
    assert list(vspdf.sparsify(named, 0.5)) == ["up"]
    model = nn.ModuleDict({"up": nn.Linear(8, 8), "experts": nn.ParameterList([nn.Parameter(torch.zeros(2, 3, 4))])})
    with caplog.at_level(logging.WARNING, "vspdf"):
        assert set(vspdf.sparsify(model, 0.5)) == {"up"}
    assert "'experts.0' stays dense: a parameter of 2 x 3 x 4" in caplog.text


def test_pruned_by_torch_is_named(caplog):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prune.random_unstructured(model[0], "weight", 0.5)
    with caplog.at_level(logging.WARNING, "vspdf"):
        assert set(vspdf.sparsify(model, 0.5)) == {"1"}
    assert "torch.nn.utils.prune.remove" in caplog.text


BIASES = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "bias", 3),
    "parametrized": lambda layer: nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh()),
}


@pytest.mark.parametrize("change", BIASES.values(), ids=BIASES)
def test_a_layer_whose_bias_is_computed_stays_dense_and_is_named(change, caplog):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    change(model[1])
    with caplog.at_level(logging.WARNING, "vspdf"):
        assert set(vspdf.sparsify(model, 0.5)) == {"0"}
    assert "'1' stays dense: its bias is computed anew" in caplog.text
    model(torch.ones(1, 8)).sum().backward()


EXCHANGES = {
    "set_sparsity": lambda model, optimizer: vspdf.set_sparsity(model, 0.2, optimizer),
    "evolve": lambda model, optimizer: vspdf.evolve(model, optimizer, 0.5),
    "densify": lambda model, optimizer: vspdf.densify(model, optimizer),
}
COMPUTED = [
    *((verb, "values", lambda layer: prune.l1_unstructured(layer, "values", 3)) for verb in EXCHANGES),
    *(("densify", "bias", change) for change in BIASES.values()),
]


@pytest.mark.parametrize(
    "verb, part, change", COMPUTED,
    ids=[*(f"{verb}, values pruned" for verb in EXCHANGES), *(f"densify, bias {change}" for change in BIASES)],
)  # fmt: skip
def test_what_is_computed_anew_at_every_call_is_not_exchanged(verb, part, change):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    vspdf.sparsify(model, 0.5)
    change(model[1])
    optimizer = torch.optim.AdamW(model.parameters())
    before, held = dict(model.named_parameters()), list(optimizer.param_groups[0]["params"])
    with pytest.raises(UserError, match=f"`{part}` of the sparse layer '1' is computed anew at every call"):
        EXCHANGES[verb](model, optimizer)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert all(a is b for a, b in zip(held, optimizer.param_groups[0]["params"], strict=True))


@pytest.mark.parametrize("algorithm", ["static", "set"])
def test_phases_stop_before_they_change_what_is_computed_anew(algorithm):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    first = {} if algorithm == "static" else {"algorithm": "set", "update": {"freq": 1}}
    phases = vspdf.Phases([vspdf.Phase(sparsity=0.5, steps=2, **first), vspdf.Phase(sparsity=0.0, steps=2)])
    phases.start(model, optimizer)
    prune.l1_unstructured(model[1], "values", 3)
    layers = list(model)
    with pytest.raises(UserError, match="`values` of the sparse layer '1'"):
        for step in range(3):
            phases.at(step, model, optimizer)
    assert list(model) == layers


def test_compiled_models_get_the_same_masks(one):
    assert list(vspdf.sparsify(torch.compile(one()), 0.8).values()) == list(vspdf.sparsify(one(), 0.8).values())


def test_globs_match_the_names_of_a_compiled_model_as_they_were_before():
    phases = [vspdf.Phase(sparsity=0.9, steps=2, layers={"0": 0.5}), vspdf.Phase(sparsity=0.2, steps=2)]
    found = []
    for wrap in (lambda model: model, torch.compile):
        model, engine = wrap(nn.Sequential(nn.Linear(48, 96), nn.Linear(96, 48))), vspdf.Phases(phases)
        engine.start(model)
        first = [layer.pattern for layer in sparse_layers(model).values()]
        vspdf.set_sparsity(model, {"1": 0.4})
        engine.at(2, model)
        found.append([*first, *(layer.pattern for layer in sparse_layers(model).values())])
    assert found[0] == found[1] and [round(p.sparsity, 1) for p in found[0]] == [0.5, 0.9, 0.2, 0.2]


def test_a_percentage_is_asked_about(one, sparse_one):
    with pytest.raises(UserError, match=r"not 90. Did you mean 0.9\?"):
        vspdf.sparsify(one(), 90)
    for call in (
        lambda: vspdf.sparsify(one(), "90%"),
        lambda: vspdf.sparsify(one(), {"*": "90%"}),
        lambda: vspdf.set_sparsity(sparse_one(0.95), "90%"),
        lambda: vspdf.Pattern.random((8, 8), "90%"),
        lambda: vspdf.Phases([("90%", 10)]),
        lambda: vspdf.training_flops("gpt2-small", tokens=1e9, sparsity="90%"),
    ):
        with pytest.raises(UserError, match=r"must be a number in \[0, 1.*, not '90%'. Did you mean 0.9\?"):
            call()


@pytest.mark.parametrize(
    "phase, said",
    [
        ((0.9, 1.5), "steps must be a whole number"),
        ((0.9, 10, "fast"), "rate must be a number"),
        (0.9, "must be .sparsity, steps"),
    ],
    ids=str,
)
def test_a_phase_that_is_none_is_named(phase, said):
    with pytest.raises(UserError, match=f"phases.0.*{said}"):
        vspdf.Phases([phase])


def test_a_model_on_the_meta_device(one, sparse_one):
    with torch.device("meta"):
        model = one()
    pattern = vspdf.sparsify(model, 0.8)["0"]
    assert (model[0].values.is_meta and pattern == Pattern.random((96, 48), 0.8, seed=0)) or pattern.nnz
    with torch.device("meta"):
        for refused in ({"init_method": "topk"}, {"rescale": True}):
            with pytest.raises(UserError, match="is on the meta device"):
                vspdf.sparsify(one(), 0.8, **refused)
    model.load_state_dict(sparse_one().state_dict(), assign=True)
    assert model(torch.ones(1, 48)).shape == (1, 96)


def test_more_than_65536_features():
    model = nn.Sequential(nn.Linear(16, 70000))
    dense = copy.deepcopy(model)
    pattern = vspdf.sparsify(model, 0.9)["0"]
    with torch.no_grad():
        dense[0].weight.mul_(pattern.mask())
    x = torch.randn(4, 16)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
