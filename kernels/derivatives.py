"""Derivatives of the three products, each by the others: backward, backward of backward, forward mode, `torch.func`.

With y = x Wᵀ + b, where W holds `values` at kept positions, all three are bilinear: linear(x, values), grad_input(g,
values) = g W, and grad_values(g, x) = gᵀ x where kept. The derivative of any is one of the three at other arguments.
The operators themselves are defined in `ops`; here is what autograd knows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vspdf import ledger
from vspdf.kernels import cpu
from vspdf.kernels.gpu.gather import packed_once
from vspdf.onlookers import compiling, forward_mode, modes, nobody, plain, stored, tracing, transformed, watched
from vspdf.pattern import Pattern

# The operators as Python functions, by name: `ops` defines them, and enters them here.
RUN: dict[str, Callable[..., Tensor]] = {}

_profiled = torch.autograd._profiler_enabled

# Usual calls go through a door in C++, which asks what `_alone`, `_recording` and the operators' checks ask, in a
# fraction of the time: by name of this module, as above.
_door = cpu.door
if not cpu.unavailable():
    cpu.extension().know_torch(
        {
            "tensor": Tensor, "parameter": torch.nn.Parameter, "float32": torch.float32, "bfloat16": torch.bfloat16,
            "strided": torch.strided, "watchers": [tracing, modes, transformed, _profiled],
            "grad_enabled": torch.is_grad_enabled, "forward_ad": torch.autograd.forward_ad,
            "threads": torch.get_num_threads, "tallies": ledger.TALLIES, "record": ledger.record,
        }
    )  # fmt: skip


def _alone(inputs: tuple[Any, ...]) -> bool:
    """Whether nobody looks on, no profiler either, and all are plain CPU tensors.

    The dispatcher, which goes through Python and back for operators like these, would then only take 5 us, as long as a
    small product.
    """
    a, b, bias = inputs[:3]
    return nobody() and not _profiled() and plain(a) and plain(b) and (not isinstance(bias, Tensor) or plain(bias))


def _recording(inputs: tuple[Any, ...]) -> bool:
    """Whether autograd must see the product; tensors among its inputs are the first two and perhaps the third."""
    if forward_mode():
        return True
    if not torch.is_grad_enabled():
        return False
    a, b, bias = inputs[:3]
    return a.requires_grad or b.requires_grad or (isinstance(bias, Tensor) and bias.requires_grad)


def _operate(name: str, inputs: tuple[Any, ...], alone: bool) -> Tensor:
    """The product itself, no derivative asked for."""
    a, b, bias = inputs[:3]
    alone = alone and stored(a) and stored(b) and (not isinstance(bias, Tensor) or stored(bias))
    with torch._C._AutoDispatchBelowAutograd():  # so that a view of the result is none to autograd
        return (RUN[name] if alone else getattr(torch.ops.vspdf, name).default)(*inputs)


def _call(function: type[_Product], operator: Callable[..., Tensor], *inputs: Any) -> Tensor:
    if _alone(inputs):
        return function.apply(*inputs) if _recording(inputs) else _operate(function.name, inputs, True)
    return function.apply(*inputs) if watched() else operator(*inputs)


def linear(x: Tensor, values: Tensor, bias: Tensor | None, key: str, backend: str) -> Tensor:
    """``x @ W.T + bias`` of the pattern with digest `key`; differentiable in x, values and bias."""
    if not compiling() and (y := _door(0, x, values, bias, key, backend)) is not None:
        return y
    return _call(Linear, torch.ops.vspdf.linear, x, values, bias, key, backend)


def grad_input(grad: Tensor, values: Tensor, key: str, backend: str) -> Tensor:
    """``grad @ W``; differentiable in both."""
    if not compiling() and (found := _door(1, grad, values, None, key, backend)) is not None:
        return found
    return _call(GradInput, torch.ops.vspdf.grad_input, grad, values, key, backend)


def grad_values(grad: Tensor, x: Tensor, key: str, backend: str, dtype: torch.dtype | None = None) -> Tensor:
    """``grad.T @ x`` at kept positions, shape (nnz,), of `dtype` or that of x; differentiable in both."""
    if not compiling() and (found := _door(2, grad, x, dtype, key, backend)) is not None:
        return found
    return _call(GradValues, torch.ops.vspdf.grad_values, grad, x, key, backend, dtype)


def differentiable(name: str) -> Callable[..., Tensor]:
    """What the dispatcher's Autograd key runs: the Function where a derivative is asked for, else the operator."""
    function = {"linear": Linear, "grad_input": GradInput, "grad_values": GradValues}[name]

    def run(*inputs: Any) -> Tensor:
        return function.apply(*inputs) if _recording(inputs) else _operate(name, inputs, False)

    return run


@contextmanager
def _outer_tangents(ctx: Any) -> Iterator[list[Tensor]]:
    """The inputs without this level's tangents, while forward mode is on: torch runs `jvp` with it off, and levels
    around this one would take the products in there for constants.
    """
    forward_ad = torch.autograd.forward_ad
    with forward_ad._set_fwd_grad_enabled(True):
        yield [forward_ad.unpack_dual(saved).primal for saved in ctx.saved_tensors]


class _Product(torch.autograd.Function):
    """A bilinear product of its first two inputs; the rest is a bias and how to run it."""

    name: str

    @classmethod
    def apply(cls, *inputs: Any) -> Any:
        """Torch's own looks for defaults by the signature of `forward`, which takes 15 us; here there are none."""
        outer = torch.autograd.Function
        return super().apply(*inputs) if watched() else super(outer, cls).apply(*inputs)  # type: ignore[misc]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])
        at = 2 if isinstance(inputs[2], str) else 3
        ctx.pattern = Pattern.find(inputs[at])  # the object, so that it lives as long as the graph
        ctx.backend = inputs[at + 1]

    @classmethod
    def over_batch(cls, size: int, dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> tuple[Tensor, int]:
        """Sample by sample, where a batch of the second input does not fold into the tokens of the first."""
        take = lambda i: [v if d is None else v.select(d, i) for v, d in zip(inputs, dims, strict=True)]  # noqa: E731
        if size == 0:  # the sum of no samples is zero, of a sample's shape, and autograd still knows where it is from
            one = [v if d is None else v.sum(d) for v, d in zip(inputs, dims, strict=True)]
            return cls.apply(*one).unsqueeze(0)[:0], 0
        return torch.stack([cls.apply(*take(i)) for i in range(size)]), 0


class Linear(_Product):
    """``linear`` as autograd knows it."""

    name = "linear"

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        y = _door(0, *inputs)  # again, now that autograd has taken note
        return _operate("linear", inputs, _alone(inputs)) if y is None else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, values = ctx.saved_tensors
        key, needs = ctx.pattern.digest, ctx.needs_input_grad
        with packed_once:
            grad_x = grad_input(grad, values, key, ctx.backend) if needs[0] else None
            grad_v = grad_values(grad, x, key, ctx.backend, values.dtype) if needs[1] else None
        grad_b = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=values.dtype) if needs[2] else None
        return grad_x, grad_v, grad_b, None, None

    @staticmethod
    def jvp(ctx: Any, t_x: Tensor | None, t_values: Tensor | None, t_bias: Tensor | None, *_: Any) -> Tensor:
        key, parts = ctx.pattern.digest, []
        with _outer_tangents(ctx) as (x, values):
            if t_x is not None:
                parts.append(linear(t_x, values, t_bias, key, ctx.backend))
            if t_values is not None:
                parts.append(linear(x, t_values, None if parts else t_bias, key, ctx.backend))
            return sum(parts[1:], parts[0]) if parts else t_bias.to(x.dtype).expand(*x.shape[:-1], -1)  # type: ignore[union-attr]

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        if dims[1] is not None or dims[0] is None:
            return Linear.over_batch(info.batch_size, dims, inputs)
        x, values, bias, key, backend = inputs
        x = x.movedim(dims[0], 0)
        if dims[2] is None:
            return linear(x, values, bias, key, backend), 0
        bias = bias.movedim(dims[2], 0)
        y = linear(x, values, None, key, backend) + bias.view(len(bias), *[1] * (x.dim() - 2), bias.shape[-1])
        return y.to(x.dtype), 0  # a bias may be wider than x


class GradInput(_Product):
    """``grad_input`` as autograd knows it."""

    name = "grad_input"

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _operate("grad_input", inputs, _alone(inputs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        g, values = ctx.saved_tensors
        key, needs = ctx.pattern.digest, ctx.needs_input_grad
        return (
            linear(grad, values, None, key, ctx.backend) if needs[0] else None,
            grad_values(g, grad, key, ctx.backend, values.dtype) if needs[1] else None,
            None, None,
        )  # fmt: skip

    @staticmethod
    def jvp(ctx: Any, t_g: Tensor | None, t_values: Tensor | None, *_: Any) -> Tensor:
        with _outer_tangents(ctx) as (g, values):
            pairs = ((a, b) for a, b in ((t_g, values), (g, t_values)) if a is not None and b is not None)
            parts = [grad_input(a, b, ctx.pattern.digest, ctx.backend) for a, b in pairs]
            return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        if dims[1] is not None or dims[0] is None:
            return GradInput.over_batch(info.batch_size, dims, inputs)
        return grad_input(inputs[0].movedim(dims[0], 0), *inputs[1:]), 0


class GradValues(_Product):
    """``grad_values`` as autograd knows it."""

    name = "grad_values"

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _operate("grad_values", inputs, _alone(inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Product.setup_context(ctx, inputs, output)
        ctx.dtype = inputs[4] if len(inputs) > 4 else None  # a default that is left out is not among them

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        g, x = ctx.saved_tensors
        key, needs = ctx.pattern.digest, ctx.needs_input_grad
        return (
            linear(x, grad, None, key, ctx.backend) if needs[0] else None,
            grad_input(g, grad, key, ctx.backend) if needs[1] else None,
            None, None, None,
        )  # fmt: skip

    @staticmethod
    def jvp(ctx: Any, t_g: Tensor | None, t_x: Tensor | None, *_: Any) -> Tensor:
        with _outer_tangents(ctx) as (g, x):
            pairs = ((a, b) for a, b in ((t_g, x), (g, t_x)) if a is not None and b is not None)
            parts = [grad_values(a, b, ctx.pattern.digest, ctx.backend, ctx.dtype) for a, b in pairs]
            return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return GradValues.over_batch(info.batch_size, dims, inputs)
