"""Derivatives of the three products beyond backward: any order, forward mode, and torch.func, against masked dense."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import vspdf
from vspdf.kernels import cpu
from vspdf.pattern import Pattern

PATTERN = Pattern.random((5, 7), 0.5)


def drawn(requires_grad=False):
    torch.manual_seed(0)
    shapes = ((3, 7), (PATTERN.nnz,), (5,))
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad) for shape in shapes)


def sparse(x, values, bias):
    return vspdf.sparse_linear(x, values, PATTERN, bias)


def dense(x, values, bias):
    weight = torch.zeros(35, dtype=values.dtype).index_copy(0, PATTERN.positions(), values)
    return nn.functional.linear(x, weight.view(5, 7), bias)


def test_gradients_backward_and_forward():
    assert torch.autograd.gradcheck(
        sparse, drawn(True), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


def test_gradients_of_gradients():
    assert torch.autograd.gradgradcheck(sparse, drawn(True), check_fwd_over_rev=True, check_rev_over_rev=True)


X, VALUES, BIAS = drawn()
ONE = torch.ones((), dtype=torch.float64)


def second_derivative(function):
    return jvp(lambda s: jvp(function, (s,), (ONE,))[1], (torch.zeros_like(ONE),), (ONE,))[1]


MANY_X = X.expand(4, 3, 7).transpose(0, 1)
TRANSFORMS = {
    "jvp in x": lambda f: jvp(lambda x: f(x, VALUES, BIAS), (X,), (X.cos(),)),
    "jvp in bias": lambda f: jvp(lambda b: f(X, VALUES, b), (BIAS,), (BIAS.cos(),)),
    "jvp in all": lambda f: jvp(f, (X, VALUES, BIAS), (X.cos(), VALUES.cos(), BIAS.cos())),
    "grad": lambda f: grad(lambda v: f(X, v, BIAS).pow(3).sum())(VALUES),
    "hessian": lambda f: hessian(lambda v: f(X, v, BIAS).pow(3).sum())(VALUES),
    "jacfwd": lambda f: jacfwd(f, 1)(X, VALUES, BIAS),
    "jacrev": lambda f: jacrev(f, (0, 1, 2))(X, VALUES, BIAS),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(lambda x, v: f(x, v, BIAS).pow(3).sum(), 0), 1)(X, VALUES),
    "jvp of jvp along a line": lambda f: second_derivative(
        lambda s: f(X + s * X.cos(), VALUES + s * VALUES.cos(), BIAS + s * BIAS.cos()).pow(3).sum()
    ),
    "jacfwd of jacfwd of grad": lambda f: jacfwd(
        jacfwd(lambda s: grad(lambda x: f(x, s * VALUES, BIAS).pow(3).sum())(s * X))
    )(ONE),
    "gradients per sample": lambda f: vmap(grad(lambda v, x: f(x, v, BIAS).pow(2).sum()), (None, 0))(VALUES, X),
    "vmap over x and bias": lambda f: vmap(f, (1, None, 0))(
        X.expand(4, 3, 7).transpose(0, 1), VALUES, BIAS.expand(4, 5)
    ),
    "an ensemble of values": lambda f: vmap(f, (None, 0, None))(X, torch.stack([VALUES, VALUES.cos()]), BIAS),
    "no bias": lambda f: vmap(grad(lambda x: f(x, VALUES, None).pow(2).sum()))(X),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_torch_func_sees_through(transform):
    torch.testing.assert_close(transform(sparse), transform(dense))


def test_a_whole_model_under_functional_call_and_forward_mode():
    model = nn.Sequential(nn.Linear(48, 96))
    vspdf.sparsify(model, 0.8)
    x, tangent = torch.randn(6, 48), torch.randn(6, 48)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    loss = lambda p, row: functional_call(model, p, (row[None],)).pow(2).sum()  # noqa: E731
    assert vmap(grad(loss), (None, 0))(parameters, x)["0.values"].shape == (6, model[0].pattern.nnz)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
    torch.testing.assert_close(found, tangent @ model[0].weight.detach().T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)], ids=["one token", "tokens", "batch of tokens"])
def test_the_output_may_be_edited_in_place_as_that_of_a_linear(shape):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True))
    vspdf.sparsify(model, 0.5)
    plain = copy.deepcopy(model)
    plain[1].inplace = False
    x = torch.randn(shape)
    for one in (model, plain):
        y = one[0](x)
        y += 1
        one[1](y).square().sum().backward()
    assert torch.equal(model[0].values.grad, plain[0].values.grad)


@pytest.mark.parametrize("by", [0, 1, 2], ids=["x", "values", "bias"])
def test_tangents_of_gradients_keep_the_precision_that_gradients_have(by):
    x, values, bias = (t.float() for t in drawn())
    given = (x.bfloat16(), values, bias)

    def gradients(*inputs):
        return grad(lambda *a: sparse(*a).float().pow(2).sum(), argnums=(0, 1, 2))(*inputs)

    directions = [torch.ones_like(t) if i == by else torch.zeros_like(t) for i, t in enumerate(given)]
    found, tangents = jvp(gradients, given, tuple(directions))
    assert [t.dtype for t in found] == [t.dtype for t in tangents] == [t.dtype for t in given]
    assert hessian(lambda v: sparse(given[0], v, bias).float().pow(2).sum())(values).dtype == torch.float32


def test_vmap_over_bias_keeps_the_dtype_of_x():
    x, values, bias = (t.float() for t in drawn())
    many = torch.stack([bias, bias.sin(), bias.cos()])
    found = vmap(lambda x, b: sparse(x, values, b))(x.bfloat16(), many)
    one_by_one = torch.stack([sparse(one, values, b) for one, b in zip(x.bfloat16(), many, strict=True)])
    assert found.dtype == one_by_one.dtype == torch.bfloat16
    torch.testing.assert_close(found, one_by_one, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("function", [sparse, dense], ids=["sparse", "dense"])
def test_vmap_over_no_samples(function):
    x, values, bias = drawn()
    none = values.new_zeros(0, len(values)).requires_grad_()
    y = vmap(function, (None, 0, None))(x, none, bias)
    assert y.shape == (0, 3, 5) and y.dtype == x.dtype
    assert torch.autograd.grad(y.sum(), none)[0].shape == none.shape
    gradients = vmap(grad(lambda v: function(x, v, bias).sum()))(none)
    assert gradients.shape == none.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_batched_gradients_are_those_one_by_one(backend, dtype):
    if backend == "cpu" and cpu.unavailable():
        pytest.skip("the kernels are not built")
    inputs = [t.to(dtype).requires_grad_() for t in drawn()]
    many = torch.stack([X.sin()[:, :5], X.cos()[:, :5]]).to(dtype)
    for _ in range(2):  # the second time the door in C++ is open
        y = vspdf.sparse_linear(inputs[0], inputs[1], PATTERN, inputs[2], backend=backend)
        found = torch.autograd.grad(y, inputs, many, is_grads_batched=True, retain_graph=True)
        single = [torch.autograd.grad(y, inputs, one, retain_graph=True) for one in many]
        for batched, each in zip(found, zip(*single, strict=True), strict=True):
            torch.testing.assert_close(batched, torch.stack(each))
