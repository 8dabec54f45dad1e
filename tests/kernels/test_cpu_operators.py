"""The operators `torch.ops.vspdf.*` check what they are given; float32 weights beside bfloat16 tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vspdf
from vspdf.errors import UserError
from vspdf.kernels import cpu, dense, ops
from vspdf.pattern import Pattern

PATTERN = Pattern.random((6, 10), 0.5, seed=5)
PATHS = ("cpu", "auto", "reference")


def arguments(**change):
    """Tensors that fit PATTERN, by name, with some of them changed."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (7, 10), "grad_output": (7, 6), "values": (PATTERN.nnz,), "bias": (6,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | change


def call(product, given, backend="cpu"):
    names = {
        "linear": ("x", "values", "bias"),
        "grad_input": ("grad_output", "values"),
        "grad_values": ("grad_output", "x"),
    }
    tensors = [given[name] for name in names[product]]
    return getattr(ops, product)(*tensors, PATTERN.digest, backend)


CHANGES = {
    "short values": ("values", lambda t: t[:10], r"values of shape \(10,\) do not fit .*: expected \(30,\)"),
    "long values": ("values", lambda t: t.repeat(2), r"values of shape \(60,\)"),
    "matrix of values": ("values", lambda t: t[None], r"values of shape \(1, 30\)"),
    "bf16 values": ("values", lambda t: t.bfloat16(), "values torch.bfloat16 on cpu and .* torch.float32 on cpu must"),
    "values elsewhere": ("values", lambda t: t.to("meta"), "values torch.float32 on meta and .* must agree"),
    "sparse values": ("values", lambda t: t.to_sparse(), "values is stored as torch.sparse_coo"),
    "wide x": ("x", lambda t: t.repeat(1, 2), r"x of shape \(7, 20\) .*: its last size must be 10"),
    "scalar x": ("x", lambda t: t[0, 0], r"x of shape \(\)"),
    "integer x": ("x", lambda t: t.long(), "x is torch.int64: expected a floating-point tensor"),
    "quantised x": ("x", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "x is torch.qint8"),
    "sparse x": ("x", lambda t: t.to_sparse(), "x is stored as torch.sparse_coo: expected a dense"),
    "CSR x": ("x", lambda t: t.to_sparse_csr(), "x is stored as torch.sparse_csr"),
    "x elsewhere": ("x", lambda t: t.to("meta"), "on meta.* must agree"),
    "long bias": ("bias", lambda t: t.repeat(2), r"bias of shape \(12,\) does not fit"),
    "fp64 bias": ("bias", lambda t: t.double(), "bias torch.float64 on cpu and x torch.float32 on cpu must agree"),
    "narrow gradient": (
        "grad_output",
        lambda t: t[:, :5],
        r"grad_output of shape \(7, 5\) .* size must be 6",
    ),
    "bf16 gradient": ("grad_output", lambda t: t.bfloat16(), "torch.bfloat16 .* must agree"),
    "sparse gradient": ("grad_output", lambda t: t.to_sparse(), "grad_output is stored as torch.sparse_coo"),
    "other tokens": ("grad_output", lambda t: t[:3], "differ in tokens"),
}
USERS = {
    "x": ("linear", "grad_values"),
    "values": ("linear", "grad_input"),
    "bias": ("linear",),
    "grad_output": ("grad_input", "grad_values"),
}
ACCEPTED = {("other tokens", "grad_input"), ("bf16 gradient", "grad_input")}  # valid where x takes no part


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says that CSR and quantisation are young
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", PATHS)
def test_what_does_not_fit_is_named(change, backend):
    name, alter, message = CHANGES[change]
    given = arguments()
    given[name] = alter(given[name])
    for product in USERS[name]:
        if (change, product) not in ACCEPTED:
            with pytest.raises(UserError, match=message):
                call(product, given, backend)


@pytest.mark.parametrize("backend", PATHS)
def test_what_fits_is_computed(backend):
    given = arguments()
    weight = torch.zeros(6, 10).masked_scatter(PATTERN.mask(), given["values"])
    wanted = {
        "linear": nn.functional.linear(given["x"], weight, given["bias"]),
        "grad_input": given["grad_output"] @ weight,
        "grad_values": (given["grad_output"].T @ given["x"])[PATTERN.mask()],
    }
    for product, result in wanted.items():
        torch.testing.assert_close(call(product, given, backend), result)


@pytest.mark.parametrize("tokens", [1, 3, 40, 300])
@pytest.mark.parametrize("backend", PATHS)
def test_float32_weights_beside_bfloat16_tokens(backend, tokens):
    """Values are not rounded, their gradient is float32 and as exact as the tokens allow."""
    pattern = Pattern.random((70, 130), 0.7, seed=3)
    generator = torch.Generator().manual_seed(tokens)
    x, grad = (torch.randn(tokens, n, generator=generator).bfloat16() for n in (130, 70))
    values, bias = (torch.randn(n, generator=generator) for n in (pattern.nnz, 70))
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    y = vspdf.sparse_linear(*leaves[:2], pattern, bias, backend=backend)
    grads = torch.autograd.grad(y, leaves, grad)
    assert [t.dtype for t in (y, *grads)] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]

    exact = [t.detach().double().requires_grad_() for t in leaves]
    weight = torch.zeros(pattern.shape, dtype=torch.float64).masked_scatter(pattern.mask(), exact[1])
    y_exact = nn.functional.linear(exact[0], weight, exact[2])
    for i, (found, truth) in enumerate(
        zip((y, *grads), (y_exact, *torch.autograd.grad(y_exact, exact, grad.double())), strict=True)
    ):
        # The reference multiplies in bfloat16; the kernels round what is stored as bfloat16, once.
        limit = 1e-2 if backend == "reference" or (i == 2 and backend == "auto") else 4e-3 if i < 2 else 1e-5
        error = (found.double() - truth).norm() / truth.norm()
        assert error < limit, (i, error)


def test_values_of_a_rounded_gradient_keep_their_precision_under_autocast():
    """The product with float32 weights is nearer the exact one than that with weights rounded to bfloat16."""
    pattern = Pattern.random((64, 512), 0.5, seed=4)
    x, values = torch.randn(100, 512).bfloat16(), torch.randn(pattern.nnz)
    weight = torch.zeros(pattern.shape, dtype=torch.float64).masked_scatter(pattern.mask(), values.double())
    exact = x.double() @ weight.T
    with torch.autocast("cpu", torch.bfloat16):
        wide = vspdf.sparse_linear(x.float(), values, pattern, backend="cpu")
    rounded = vspdf.sparse_linear(x, values.bfloat16(), pattern, backend="cpu")
    assert (wide.double() - exact).norm() < 0.8 * (rounded.double() - exact).norm()


@pytest.mark.parametrize("has_bf16", [False, True], ids=["without bf16", "with bf16"])
def test_dense_path_of_bfloat16(monkeypatch, has_bf16):
    """Processors without bfloat16 compute its dense products in float32: torch's own are many times slower there."""
    monkeypatch.setattr(cpu, "has_bf16", lambda: has_bf16)
    multiplied = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b: multiplied.append(x.dtype) or linear(x, w, b))
    given = {name: t.bfloat16() for name, t in arguments().items()}
    y = dense.forward(given["x"], given["values"], given["bias"], PATTERN)
    assert multiplied == [torch.bfloat16 if has_bf16 else torch.float32]
    weight = torch.zeros(6, 10).masked_scatter(PATTERN.mask(), given["values"].float())
    grad, x = given["grad_output"], given["x"]
    for found, wanted in (
        (y, linear(x.float(), weight, given["bias"].float())),
        (dense.grad_input(grad, given["values"], PATTERN), grad.float() @ weight),
        (dense.grad_values(grad, x, PATTERN), (grad.float().T @ x.float())[PATTERN.mask()]),
    ):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)


def test_more_than_65536_features_run():
    model = nn.Sequential(nn.Linear(16, 70_000))
    vspdf.sparsify(model, 0.9)
    x = torch.randn(4, 16, requires_grad=True)
    y = model(x)
    y.sum().backward()
    vspdf.densify(model)
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    assert isinstance(model[0], nn.Linear) and x.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 20, 200])
def test_explain_says_which_kernel_runs(tokens):
    told = vspdf.explain(PATTERN, tokens, backend="cpu")
    assert [line.split(":")[0] for line in told.splitlines()] == ["forward", "grad_input", "grad_values"]
    assert told.count(f"cpu-{cpu.isa()} (") == 3
