"""One sparse layer: from a dense one and back, its states, its plans, and the bytes that it takes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import vspdf
from vspdf.errors import UserError
from vspdf.kernels import cpu
from vspdf.pattern import Pattern
from vspdf.sparsity.layer import SparseLinear, build_plans, sparse_layers, training_state_bytes
from vspdf.sparsity.surgery import sparsify


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_from_linear_and_back(bias):
    linear = nn.Linear(10, 6, bias=bias).eval()
    pattern = Pattern.random((6, 10), 0.7)
    layer = SparseLinear.from_linear(linear, pattern)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == (
        {"values": (pattern.nnz,)} | ({"bias": (6,)} if bias else {})
    )
    assert torch.equal(layer.values, linear.weight[pattern.mask()]) and not layer.training
    back = layer.to_linear()
    assert type(back) is nn.Linear and not back.training
    assert torch.equal(back.weight, linear.weight * pattern.mask()) and torch.equal(layer.weight, back.weight)
    x = torch.randn(3, 10)
    torch.testing.assert_close(layer(x), back(x))
    with torch.no_grad():  # copies, not views
        layer.values.zero_()
    assert linear.weight.abs().sum() > 0 and back.weight.abs().sum() > 0
    assert "sparsity=0.7" in repr(layer) and f"bias={bias}" in repr(layer)


def test_code_that_reads_a_layers_weight_gets_one_that_learns():
    layer = SparseLinear.from_linear(nn.Linear(10, 6), Pattern.random((6, 10), 0.7))
    x = torch.randn(3, 10)
    by_hand = torch.autograd.grad(nn.functional.linear(x, layer.weight, layer.bias).sum(), layer.values)
    torch.testing.assert_close(by_hand, torch.autograd.grad(layer(x).sum(), layer.values))


def penalty(layer):
    return (layer.weight * torch.arange(60.0).reshape(6, 10)).square().sum()


LOOKING_ON = {
    "compiled": lambda layer: torch.autograd.grad(
        torch.compile(penalty, backend="eager", fullgraph=True)(layer), layer.values
    )[0],
    "torch.func": lambda layer: torch.func.grad(
        lambda values: torch.func.functional_call(Penalty(layer), {"layer.values": values}, ())
    )(layer.values.detach()),
}


class Penalty(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self):
        return penalty(self.layer)


@pytest.mark.parametrize("gradient", LOOKING_ON.values(), ids=LOOKING_ON)
def test_the_weight_is_read_by_compilers_and_transforms(gradient):
    layer = SparseLinear.from_linear(nn.Linear(10, 6), Pattern.random((6, 10), 0.7))
    torch.testing.assert_close(gradient(layer), *torch.autograd.grad(penalty(layer), layer.values))


def test_a_layer_moves_between_dtypes():
    layer = SparseLinear.from_linear(nn.Linear(10, 6), Pattern.random((6, 10), 0.7)).bfloat16()
    assert (
        layer(torch.randn(3, 10).bfloat16()).dtype == torch.bfloat16
        and layer.to_linear().weight.dtype == torch.bfloat16
    )


def test_a_layer_whose_values_are_pruned_takes_its_own_state():
    layers = [SparseLinear.from_linear(nn.Linear(10, 6), Pattern.random((6, 10), 0.7)) for _ in range(2)]
    for layer in layers:
        prune.l1_unstructured(layer, "values", 0.5)
    layers[1].load_state_dict(layers[0].state_dict())
    assert torch.equal(layers[1](x := torch.randn(3, 10)), layers[0](x))


def test_a_state_dict_with_another_number_of_weights_is_refused():
    layer = SparseLinear.from_linear(nn.Linear(10, 6), Pattern.random((6, 10), 0.7))
    other = SparseLinear.from_linear(nn.Linear(10, 6), Pattern.random((6, 10), 0.5))
    with pytest.raises(UserError, match=r"the stored pattern has 30 weights, this layer 18"):
        layer.load_state_dict(other.state_dict())


MASK = torch.ones(4, 6, dtype=torch.bool)
MISUSES = {
    "sizes, as nn.Linear takes them": (lambda p, v: SparseLinear(6, 4, p), "expected a vspdf.Pattern, got a int"),
    "a mask": (lambda p, v: SparseLinear(MASK, v), r"got a Tensor. Did you mean vspdf.Pattern.from_mask\(...\)"),
    "a mask of a layer": (lambda p, v: SparseLinear.from_linear(nn.Linear(6, 4), MASK), "Pattern.from_mask"),
    "a mask for the product": (lambda p, v: vspdf.sparse_linear(torch.randn(3, 6), v, MASK), "Pattern.from_mask"),
    "a mask for a model": (lambda p, v: sparsify(nn.Sequential(nn.Linear(6, 4)), MASK), "Pattern.from_mask"),
    "a mask by name": (lambda p, v: sparsify(nn.Sequential(nn.Linear(6, 4)), {"0": MASK}), "Pattern.from_mask"),
    "values in a list": (lambda p, v: SparseLinear(p, v.tolist()), r"values of type list .*shape \(24,\)"),
    "whether it has a bias": (lambda p, v: SparseLinear(p, v, True), r"bias of type bool .*shape \(4,\)"),
    "a bias of another width": (lambda p, v: SparseLinear(p, v, v[:5]), r"bias of shape \(5,\) .*shape \(4,\)"),
    "another backend": (lambda p, v: SparseLinear(p, v, backend="gpu"), "Did you mean 'cpu'"),
    "one side of a pattern": (lambda p, v: Pattern.random(4, 0.5), r"shape is \(out_features, in_features\).*not 4"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "words"), MISUSES.values(), ids=MISUSES)
def test_what_is_no_pattern_and_what_does_not_fit_is_said_at_once(make, words):
    with pytest.raises(UserError, match=words):
        make(Pattern.from_mask(MASK), torch.randn(24))


def test_a_pattern_of_another_shape_is_refused():
    with pytest.raises(UserError, match=r"Pattern\(10x6, .*\) does not fit a layer of shape \(6, 10\) \(out, in\)"):
        SparseLinear.from_linear(nn.Linear(10, 6), Pattern.random((10, 6), 0.5))
    with pytest.raises(UserError, match=r"values of shape \(3,\)"):
        SparseLinear(Pattern.random((10, 6), 0.5), torch.ones(3))


def test_state_bytes_count_what_exists(mlp):
    model = mlp()
    patterns = vspdf.sparsify(model, 0.9)
    sizes = training_state_bytes(model)
    nnz, numel = sum(p.nnz for p in patterns.values()), sum(p.numel for p in patterns.values())
    assert sizes["sparsified"]["dense"] == 16 * numel
    assert sizes["sparsified"]["sparse"] == 16 * nnz + sum(p.bits.nbytes for p in patterns.values())
    assert sizes["model"]["dense"] == 16 * (numel + 42)


def test_low_memory_is_loops_with_a_quarter_of_the_bytes():
    model = nn.Sequential(nn.Linear(256, 512))
    sparsify(model, 0.75, memory="low", seed=17)
    layer, x = model[0], torch.randn(80, 256)
    wanted = layer(x)
    assert "row loops" in vspdf.explain(model, 80)
    build_plans(model)
    assert layer.pattern.packed["cpu"].nbytes < 6 * layer.pattern.nnz
    vspdf.set_sparsity(model, 0.5)
    assert layer.memory == "low" and "row loops" in vspdf.explain(model, 80)
    build_plans(model, "normal")
    if cpu.isa() == "avx512":
        assert "generated code" in vspdf.explain(model, 80)
    torch.testing.assert_close(layer(x), wanted)
    with pytest.raises(UserError, match=r"unknown memory 'lo'.*'low'"):
        layer.memory = "lo"


def test_training_state_of_layers_counts_their_code():
    """The weights, gradients, moments, pattern and plan of sparse layers against the same dense."""
    for sparsity, most in ((0.75, 0.55), (0.9, 0.25)):
        model = nn.Sequential(nn.Linear(768, 3072))
        sparsify(model, sparsity, seed=3)
        build_plans(model)
        layers = training_state_bytes(model)["sparsified"]
        assert 0.1 < layers["sparse"] / layers["dense"] < most


def test_build_plans_builds_every_plan_that_a_kernel_may_use():
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 32))
    sparsify(model, 0.9)
    model[2].backend = "reference"
    build_plans(model)
    sizes = [layer.pattern.packed["cpu"].nbytes for layer in model[:2]]
    model(torch.randn(80, 64, requires_grad=True)).sum().backward()
    assert sizes == [layer.pattern.packed["cpu"].nbytes for layer in model[:2]]
    assert "cpu" not in model[2].pattern.packed


# -- values that came with another mask -------------------------------------------------------------------------------


AVERAGES = {
    "SWA": {},
    "SWA of buffers": {"use_buffers": True},
    "EMA of buffers": {"use_buffers": True, "multi_avg_fn": get_ema_multi_avg_fn(0.9999)},
    "one's own of buffers": {"use_buffers": True, "avg_fn": lambda mean, new, count: 0.999 * mean + 0.001 * new},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", AVERAGES.values(), ids=AVERAGES)
def test_averages_go_on_under_one_mask_and_are_refused_once_it_moved(how, dtype, sparse_one):
    model, x = sparse_one().to(dtype), torch.randn(4, 48, dtype=dtype)
    average = AveragedModel(model, **how)
    for _ in range(20):
        average.update_parameters(model)
    torch.testing.assert_close(average(x), model(x))
    vspdf.evolve(model, None, 0.3, seed=1)
    average.update_parameters(model)
    with pytest.raises(UserError, match="came from one with another mask"):
        average(x)


def test_a_layer_pickled_when_its_digest_was_two_integers_goes_on(sparse_one):
    model, x = sparse_one(), torch.randn(4, 48)
    expected = model(x)
    for layer in sparse_layers(model).values():
        layer._buffers["mask_digest"] = torch.zeros(2, dtype=torch.int64)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model)).double().float()(x), expected)


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)], ids=["one mask", "two"])
def test_stacked_models_have_the_same_masks_or_are_refused(seeds, sparse_one):
    from torch.func import functional_call, stack_module_state, vmap

    models, x = [sparse_one(seed=seed) for seed in seeds], torch.randn(4, 48)
    stacked = vmap(lambda *of: functional_call(models[0], of, (x,)))
    if seeds[0] == seeds[1]:
        return torch.testing.assert_close(stacked(*stack_module_state(models))[1], models[1](x))
    with pytest.raises(UserError, match="came from one with another mask"):
        stacked(*stack_module_state(models))


@pytest.mark.parametrize("how", ["assigned", "to_empty"])
def test_a_layer_that_was_on_meta_knows_its_mask(how, sparse_one):
    model, x = sparse_one(), torch.randn(4, 48)
    with torch.device("meta"):
        other = sparse_one()
    if how == "to_empty":
        other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), assign=how == "assigned")
    assert torch.equal(other.to("cpu")(x), model(x)) and torch.equal(other[0].mask_digest, model[0].mask_digest)


def test_a_layer_made_in_inference_mode_runs(sparse_one):
    with torch.inference_mode():
        assert sparse_one()(torch.ones(2, 48)).shape == (2, 96)


@pytest.mark.parametrize("made", ["before", "within"])
def test_the_dense_weight_is_read_and_edited_in_inference_mode(made, sparse_one):
    layer = sparse_one()[0] if made == "before" else torch.inference_mode()(sparse_one)()[0]
    x = torch.randn(4, 48)
    with torch.inference_mode():
        assert layer.weight.dtype == torch.float32 and layer.weight.shape == (96, 48)
        torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
        for n, edit in enumerate((
            lambda w, n: w.fill_(n), lambda w, n: w.data.T.fill_(n), lambda w, n: w.detach()[:].fill_(n),
            lambda w, n: torch.full((96, 48), n, out=w), lambda w, n: nn.init.constant_(w, n),
        )):  # fmt: skip
            edit(layer.weight, float(n))
            assert (layer.values == n).all() and torch.equal(layer.weight, n * layer.pattern.mask())


def test_the_input_goes_by_its_name_in_torch(sparse_one):
    layer, x = sparse_one()[0], torch.randn(4, 48)
    assert torch.equal(layer(input=x), layer(x))


def test_a_dense_view_is_saved_and_copied_as_a_tensor(sparse_one, tmp_path):
    weight = sparse_one()[0].weight.detach()
    torch.save({"w": weight}, tmp_path / "w.pt")
    for found in (torch.load(tmp_path / "w.pt")["w"], copy.deepcopy(weight)):
        assert type(found) is torch.Tensor and torch.equal(found, torch.Tensor(weight))


def test_what_is_frozen_stays_frozen_there_and_back():
    for weight, bias in ((True, False), (False, True), (False, False), (True, True)):
        linear = nn.Linear(10, 6)
        linear.weight.requires_grad_(weight), linear.bias.requires_grad_(bias)
        layer = SparseLinear.from_linear(linear, Pattern.random((6, 10), 0.5))
        assert (layer.values.requires_grad, layer.bias.requires_grad) == (weight, bias)
        back = layer.to_linear()
        assert (back.weight.requires_grad, back.bias.requires_grad) == (weight, bias)


def swapped(model):
    """A state with the two layers' parts exchanged, as nothing but their shapes forbids."""
    return {f"{1 - int(key[0])}{key[1:]}": tensor for key, tensor in model.state_dict().items()}


def two(first=(16, 64), second=(64, 16)):
    model = nn.Sequential(*(nn.Linear(i, o, bias=False) for o, i in (first, second)))
    vspdf.sparsify(model, 0.75, seed=1)
    return model


def test_a_state_of_another_shape_is_refused():
    said = r"pattern is of a layer of shape \(64, 16\) \(out, in\), this one has \(16, 64\)"
    with pytest.raises(UserError, match=said):
        two().load_state_dict(swapped(two()))
    dense = nn.Sequential(nn.Linear(64, 16, bias=False), nn.Linear(16, 64, bias=False))
    with pytest.raises(UserError, match="the stored pattern is of a layer of shape"):
        vspdf.Phases([(0.75, 4)]).restore(dense, swapped(two()), 1)
    # As many bytes as the bits alone of the other shape would be: 16 more of bits, or two sides.
    layer, other = (SparseLinear(p := Pattern.random(s, 0.9, 1), torch.ones(p.nnz)) for s in ((18, 64), (16, 64)))
    assert len(other.get_extra_state()) == len(layer.pattern.bits)
    with pytest.raises(UserError, match=r"shape \(16, 64\) \(out, in\), this one has \(18, 64\)"):
        layer.set_extra_state(other.get_extra_state())


def test_a_state_of_before_shapes_were_in_it_is_read(sparse_one):
    for saved, model in ((two(), two()), (sparse_one(seed=1), sparse_one(seed=2))):
        old = {k: v[:-16] if k.endswith("_extra_state") else v for k, v in saved.state_dict().items()}
        model.load_state_dict(old)
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(model, saved, strict=True))
