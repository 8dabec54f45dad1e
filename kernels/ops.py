"""The only door to the kernels: custom operators, their autograd, FLOP formulas and shape checks.

A pattern travels through an operator as its digest, a plain string, which torch.compile treats as a constant.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vspdf import ledger
from vspdf.errors import UserError
from vspdf.kernels import cpu, dense, reference
from vspdf.kernels.dispatch import choose
from vspdf.kernels.gpu import launch, two_four
from vspdf.pattern import Pattern

_PRODUCTS = ("forward", "grad_input", "grad_values")
# Sparse paths return their result and the multiply-adds executed. "sampled" (a GEMM that stores kept positions only)
# has dW alone, "2:4" has no dW.
PATHS: dict[str, dict[str, Callable[..., Any]]] = {
    name: {product: getattr(module, product) for product in _PRODUCTS if hasattr(module, product)}
    for name, module in {"cpu": cpu, "dense": dense, "reference": reference, "triton": launch, "2:4": two_four}.items()
} | {"sampled": {"grad_values": launch.sampled_grad_values}}


def _run(product: str, pattern: Pattern, backend: str, *tensors: Tensor | None) -> Tensor:
    """Runs one product on the path chosen for it and tells the ledger what was done."""
    x = tensors[0]
    assert x is not None
    tokens = x.shape[0]
    run = lambda path: PATHS[path][product](*tensors, pattern)  # noqa: E731
    choice = choose(product, pattern, tokens, x.dtype, x.device, backend, tune=run)
    start = time.perf_counter()
    result = run(choice.path)
    result, macs = result if isinstance(result, tuple) else (result, tokens * pattern.numel)
    # A GPU works on while the clock is read: its seconds are not known here.
    seconds = time.perf_counter() - start if x.device.type == "cpu" else 0.0
    ledger.record(product, 2 * tokens * pattern.numel, 2 * tokens * pattern.nnz, 2 * macs, seconds)
    return result


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x


# Defined on torch's lower level: what `torch.library.custom_op` runs in Python around every call takes as long as a
# small product, the more so as a product leaves the caches cold.
_library = torch.library.Library("vspdf", "DEF")


def _linear(x: Tensor, values: Tensor, bias: Tensor | None, pattern: str, backend: str) -> Tensor:
    found = Pattern.find(pattern)
    y = _run("forward", found, backend, _tokens(x), values, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], found.out_features)


def _grad_input(grad_output: Tensor, values: Tensor, pattern: str, backend: str) -> Tensor:
    found = Pattern.find(pattern)
    grad = _run("grad_input", found, backend, _tokens(grad_output), values)
    return grad if grad_output.dim() == 2 else grad.view(*grad_output.shape[:-1], found.in_features)


def _grad_values(grad_output: Tensor, x: Tensor, pattern: str, backend: str) -> Tensor:
    return _run("grad_values", Pattern.find(pattern), backend, _tokens(grad_output), _tokens(x))


def _fake_linear(x, values, bias, pattern, backend):
    return x.new_empty(*x.shape[:-1], Pattern.find(pattern).out_features)


def _fake_grad_input(grad_output, values, pattern, backend):
    return grad_output.new_empty(*grad_output.shape[:-1], Pattern.find(pattern).in_features)


def _fake_grad_values(grad_output, x, pattern, backend):
    return x.new_empty(Pattern.find(pattern).nnz)


def _save_for_backward(ctx, x, values, bias, pattern, backend):
    ctx.save_for_backward(x, values)
    ctx.pattern = Pattern.find(pattern)  # the object, so that it lives as long as the graph
    ctx.backend = backend
    ctx.has_bias = bias is not None


def _backward(ctx, grad_output):
    x, values = ctx.saved_tensors
    key = ctx.pattern.digest
    grad_x = grad_v = grad_b = None
    if ctx.needs_input_grad[0]:
        grad_x = grad_input(grad_output, values, key, ctx.backend)
    if ctx.needs_input_grad[1]:
        grad_v = grad_values(grad_output, x, key, ctx.backend)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_b = grad_output.sum_to_size(grad_output.shape[-1])
    return grad_x, grad_v, grad_b, None, None


def _no_double_backward(ctx, *grads):
    raise RuntimeError("vspdf: double backward through sparse_linear is not supported.")


def _operator(name: str, arguments: str, run, fake, save, backward):
    """Defines ``vspdf::name`` for every device, with its autograd."""
    _library.define(f"{name}({arguments}, str pattern, str backend) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vspdf::{name}", fake, lib=_library)
    operator = getattr(torch.ops.vspdf, name).default

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            save(ctx, *inputs)
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*inputs)

    Function.backward = staticmethod(backward)  # type: ignore[method-assign]

    def differentiable(*inputs):
        if torch.is_grad_enabled() and any(isinstance(i, Tensor) and i.requires_grad for i in inputs):
            return Function.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    _library.impl(name, differentiable, "Autograd")
    return operator


linear = _operator(
    "linear", "Tensor x, Tensor values, Tensor? bias", _linear, _fake_linear, _save_for_backward, _backward
)
grad_input = _operator(
    "grad_input", "Tensor grad_output, Tensor values", _grad_input, _fake_grad_input, lambda *_: None,
    _no_double_backward,
)  # fmt: skip
grad_values = _operator(
    "grad_values", "Tensor grad_output, Tensor x", _grad_values, _fake_grad_values, lambda *_: None, _no_double_backward
)


@register_flop_formula(torch.ops.vspdf.linear)
def _linear_flops(x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    """Useful FLOPs: ``2 · tokens · nnz``."""
    return 2 * math.prod(x_shape[:-1]) * values_shape[0]


@register_flop_formula(torch.ops.vspdf.grad_input)
def _grad_input_flops(grad_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(grad_shape[:-1]) * values_shape[0]


@register_flop_formula(torch.ops.vspdf.grad_values)
def _grad_values_flops(grad_shape, x_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(grad_shape[:-1]) * out_shape[0]


def sparse_linear(
    x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Linear layer that multiplies only the weights its pattern keeps.

    Computes ``y = x @ W.T + bias`` where ``W`` is zero outside `pattern`. The backward pass skips the same positions:
    the gradient of `x` reads only kept weights, the gradient of `values` is formed only there.

    Parameters
    ----------
    x : Tensor, shape (..., in_features), float32 or bfloat16, on GPUs float16 too
        Any layout; other float dtypes run on the dense path.
    values : Tensor, shape (pattern.nnz,), same dtype and device as `x`
        Kept weights, in the row-major order of `pattern`: ``W[pattern.mask()]``.
    pattern : Pattern, shape (out_features, in_features)
    bias : Tensor, shape (out_features,), optional
    backend : {"auto", "cpu", "reference", "triton"}
        "auto" takes the faster of the sparse kernels and dense GEMM on materialised weights, for each product;
        `explain` says which and why. "triton" gathers: CUDA and HIP devices.

    Returns
    -------
    Tensor, shape (..., out_features)

    Raises
    ------
    UserError (a ValueError)
        If shapes, dtypes or devices disagree; the message names what was given and what was expected.
    BackendUnavailable
        If the named backend cannot run here; the message says what is missing.

    Notes
    -----
    FLOPs: ``2 * tokens * nnz`` forward, twice that backward (SPDF, arXiv:2303.10464). Under autocast, inputs are cast
    to its dtype as for `torch.nn.functional.linear` (float64 is not). Double backward is not supported.
    """
    if x.dim() == 0 or x.shape[-1] != pattern.in_features:
        raise UserError(
            f"x of shape {tuple(x.shape)} does not fit a {pattern}: its last size must be {pattern.in_features}."
        )
    if values.shape != (pattern.nnz,):
        raise UserError(f"values of shape {tuple(values.shape)} do not fit a {pattern}: expected ({pattern.nnz},).")
    if bias is not None and bias.shape != (pattern.out_features,):
        raise UserError(
            f"bias of shape {tuple(bias.shape)} does not fit a {pattern}: expected ({pattern.out_features},)."
        )
    if not x.is_floating_point():
        raise UserError(f"x is {x.dtype}: expected a floating-point tensor.")
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, values = x.to(dtype), values.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for name, tensor in (("values", values), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise UserError(f"{name} {tensor.dtype} on {tensor.device} and x {x.dtype} on {x.device} must agree.")
    return linear(x, values, bias, pattern.digest, backend)


def explain(
    pattern: Pattern,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    device: torch.device | str = "cpu",
) -> str:
    """Path and reason for `tokens` rows, a line per product; `vspdf.explain` is the public form."""
    lines = []
    for product in _PRODUCTS:
        choice = choose(product, pattern, tokens, dtype, torch.device(device), backend)
        path = choice.path
        if path == "cpu":
            path = f"{path}-{cpu.isa()} ({cpu.plan(pattern).describe(tokens, torch.get_num_threads())[product]})"
        lines.append(f"{product}: {backend} chose {path}: {choice.reason}")
    return "\n".join(lines)
