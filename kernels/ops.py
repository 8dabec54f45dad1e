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
from vspdf.kernels import cpu, dense, hardware, reference, tuning
from vspdf.kernels.derivatives import RUN, differentiable, grad_input, grad_values, linear
from vspdf.kernels.dispatch import choose
from vspdf.kernels.gpu import gather, two_four
from vspdf.pattern import Pattern

__all__ = ["explain", "grad_input", "grad_values", "linear", "sparse_linear"]

# Sparse paths return their result and the multiply-adds executed. "2:4" has no grad_values.
PATHS: dict[str, dict[str, Callable[..., Any]]] = {
    name: {product: getattr(module, product) for product in cpu.PRODUCTS if hasattr(module, product)}
    for name, module in {"cpu": cpu, "dense": dense, "reference": reference, "triton": gather, "2:4": two_four}.items()
}


def _run(product: str, pattern: Pattern, backend: str, *tensors: Tensor | None, **how: Any) -> Tensor:
    """Runs one product on the path chosen for it and tells the ledger what was done."""
    x = tensors[0]
    assert x is not None
    tokens = x.shape[0]
    run = lambda path: PATHS[path][product](*tensors, pattern, **how)  # noqa: E731
    kept = how.get("dtype") or (tensors[1] if tensors[1] is not None else x).dtype  # of values, or of their gradient
    choice = choose(product, pattern, tokens, x.dtype, x.device, backend, tune=run, wide=kept != x.dtype)
    if choice.path == "cpu":
        cpu.open_door(product, pattern, tokens, x.dtype, kept, backend)
    start = time.perf_counter()
    result = run(choice.path)
    result, macs = result if isinstance(result, tuple) else (result, tokens * pattern.numel)
    # A GPU works on while the clock is read: its seconds are not known here.
    seconds = time.perf_counter() - start if x.is_cpu else 0.0
    ledger.record(product, 2 * tokens * pattern.numel, 2 * tokens * pattern.nnz, 2 * macs, seconds)
    return result


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x


# -- what an operator is given -----------------------------------------------------------------------------------------


def require_pattern(given: object) -> None:
    """Refuses what is no `Pattern`; of a mask the message says what makes one of it."""
    if not isinstance(given, Pattern):
        mask = " Did you mean vspdf.Pattern.from_mask(...)?" if hasattr(given, "shape") else ""
        raise UserError(f"expected a vspdf.Pattern, got a {type(given).__name__}.{mask}")


def _check_tokens(name: str, x: Tensor, features: int, pattern: Pattern) -> None:
    """A plain floating-point tensor (..., features)."""
    if x.layout is not torch.strided:
        raise UserError(f"{name} is stored as {x.layout}: expected a dense (strided) tensor.")
    if not x.is_floating_point():
        raise UserError(f"{name} is {x.dtype}: expected a floating-point tensor.")
    if x.dim() == 0 or x.shape[-1] != features:
        raise UserError(f"{name} of shape {tuple(x.shape)} does not fit a {pattern}: its last size must be {features}.")


def _check_vector(name: str, vector: Tensor, size: int, pattern: Pattern) -> None:
    if vector.shape != (size,):
        do = "does" if name == "bias" else "do"
        raise UserError(f"{name} of shape {tuple(vector.shape)} {do} not fit a {pattern}: expected ({size},).")
    if vector.layout is not torch.strided:
        raise UserError(f"{name} is stored as {vector.layout}: expected a dense (strided) tensor.")


def _check_dtypes(name: str, tensor: Tensor, x_name: str, x: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.device != x.device:
        raise UserError(f"{name} {tensor.dtype} on {tensor.device} and {x_name} {x.dtype} on {x.device} must agree.")


def _check_product(
    pattern: Pattern, name: str, x: Tensor, features: int, values: Tensor, bias: Tensor | None = None
) -> None:
    """Tokens against values and bias, which may be float32 beside bfloat16 tokens on a CPU."""
    _check_tokens(name, x, features, pattern)
    _check_vector("values", values, pattern.nnz, pattern)
    wide = x.dtype == torch.bfloat16 and values.dtype == torch.float32 and x.device.type in ("cpu", "meta")
    dtype = torch.float32 if wide else x.dtype
    _check_dtypes("values", values, name, x, dtype)
    if bias is not None:
        _check_vector("bias", bias, pattern.out_features, pattern)
        if wide and (bias.dtype != dtype or bias.device != x.device):  # x alone does not say what is wanted
            raise UserError(
                f"bias {bias.dtype} on {bias.device}: expected {dtype} on {x.device}, as values are, beside {name} "
                f"{x.dtype}."
            )
        _check_dtypes("bias", bias, name, x, dtype)


def _check_gradient(pattern: Pattern, grad_output: Tensor, x: Tensor) -> None:
    _check_tokens("grad_output", grad_output, pattern.out_features, pattern)
    _check_tokens("x", x, pattern.in_features, pattern)
    _check_dtypes("grad_output", grad_output, "x", x, x.dtype)
    if grad_output.shape[:-1] != x.shape[:-1]:
        raise UserError(
            f"grad_output of shape {tuple(grad_output.shape)} and x of shape {tuple(x.shape)} differ in tokens."
        )


# -- operators ---------------------------------------------------------------------------------------------------------

# Defined on torch's lower level: what `torch.library.custom_op` runs in Python around every call takes as long as a
# small product, the more so as a product leaves the caches cold.
_library = torch.library.Library("vspdf", "DEF")


def _shaped(y: Tensor, *shape: int) -> Tensor:
    """A result in the shape of its input; not as a view, which nobody could edit in place (``relu_``) as a Linear's."""
    return torch.ops.aten._unsafe_view.default(y, shape)


def _linear(x: Tensor, values: Tensor, bias: Tensor | None, pattern: str, backend: str) -> Tensor:
    found = Pattern.find(pattern)
    _check_product(found, "x", x, found.in_features, values, bias)
    y = _run("forward", found, backend, _tokens(x), values, bias)
    return y if x.dim() == 2 else _shaped(y, *x.shape[:-1], found.out_features)


def _grad_input(grad_output: Tensor, values: Tensor, pattern: str, backend: str) -> Tensor:
    found = Pattern.find(pattern)
    _check_product(found, "grad_output", grad_output, found.out_features, values)
    grad = _run("grad_input", found, backend, _tokens(grad_output), values)
    return grad if grad_output.dim() == 2 else _shaped(grad, *grad_output.shape[:-1], found.in_features)


def _grad_values(
    grad_output: Tensor, x: Tensor, pattern: str, backend: str, dtype: torch.dtype | None = None
) -> Tensor:
    found = Pattern.find(pattern)
    _check_gradient(found, grad_output, x)
    if dtype is None or dtype == x.dtype:
        return _run("grad_values", found, backend, _tokens(grad_output), _tokens(x))
    return _run("grad_values", found, backend, _tokens(grad_output), _tokens(x), dtype=dtype)


def _fake_linear(x, values, bias, pattern, backend):
    found = Pattern.find(pattern)
    _check_product(found, "x", x, found.in_features, values, bias)
    return x.new_empty(*x.shape[:-1], found.out_features)


def _fake_grad_input(grad_output, values, pattern, backend):
    found = Pattern.find(pattern)
    _check_product(found, "grad_output", grad_output, found.out_features, values)
    return grad_output.new_empty(*grad_output.shape[:-1], found.in_features)


def _fake_grad_values(grad_output, x, pattern, backend, dtype=None):
    found = Pattern.find(pattern)
    _check_gradient(found, grad_output, x)
    return x.new_empty(found.nnz, dtype=dtype)


def _define(name: str, arguments: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Defines ``vspdf::name`` for every device, with its autograd."""
    _library.define(f"{name}({arguments}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    RUN[name] = run
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vspdf::{name}", fake, lib=_library)
    _library.impl(name, differentiable(name), "Autograd")


_define("linear", "Tensor x, Tensor values, Tensor? bias, str pattern, str backend", _linear, _fake_linear)
_define("grad_input", "Tensor grad_output, Tensor values, str pattern, str backend", _grad_input, _fake_grad_input)
_define(
    "grad_values", "Tensor grad_output, Tensor x, str pattern, str backend, ScalarType? dtype=None", _grad_values,
    _fake_grad_values,
)  # fmt: skip


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
        Kept weights, in the row-major order of `pattern`: ``W[pattern.mask()]``. On CPUs they (and `bias`) may stay
        float32 beside a bfloat16 `x`: products and the gradient of `values` then keep their precision.
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
        If `pattern` is no Pattern, or shapes, dtypes or devices disagree; the message names what was given and what was
        expected.
    BackendUnavailable
        If the named backend cannot run here; the message says what is missing.

    Notes
    -----
    FLOPs: ``2 * tokens * nnz`` forward, twice that backward (SPDF, arXiv:2303.10464). Under autocast, inputs are cast
    to its dtype as for `torch.nn.functional.linear` (float64 is not); on CPUs float32 values and bias are not, since
    the kernels compute in float32. Derivatives of any order, forward mode
    and `torch.func` (grad, jvp, vmap over x) work.
    """
    require_pattern(pattern)
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x = x.to(dtype)
        if not (kind == "cpu" and dtype == torch.bfloat16 and values.dtype == torch.float32):
            values, bias = values.to(dtype), None if bias is None else bias.to(dtype)
        elif bias is not None:
            bias = bias.float()
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
    for product in cpu.PRODUCTS:
        choice = choose(product, pattern, tokens, dtype, torch.device(device), backend)
        path = choice.path
        if path == "cpu":
            path = f"{path}-{cpu.isa()} ({cpu.packed(pattern).describe(tokens)[product]})"
        lines.append(f"{product}: {backend} chose {path}: {choice.reason}")
        if dtype == torch.float32 and torch.device(device).type == "cpu" and backend == "auto":
            lines[-1] += tuning.faster_in_bf16(product, pattern, tokens)
    if dtype == torch.bfloat16 and torch.device(device).type == "cpu" and (slow := hardware.slow_bf16_measured()):
        lines.append(f"bfloat16 is no gain here: {slow}.")
    return "\n".join(lines)
