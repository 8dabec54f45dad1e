"""One order of addition for the gradients of a step, whatever the number of processes.

The micro-batches of a step are the leaves of a binary tree: a node's left half, the larger one, then its right half.
A process that has all leaves of a node adds them up by itself, so that processes exchange one sum each where their
number is a power of two that divides the micro-batches, and a few where it is another divisor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Span = tuple[int, int]  # a node: the micro-batches from the first number to before the second


def _middle(span: Span) -> int:
    return (span[0] + span[1] + 1) // 2


def spans(span: Span, mine: range) -> list[Span]:
    """The largest nodes from `span` downwards whose micro-batches are all `mine`, in order."""
    if mine.start <= span[0] and span[1] <= mine.stop:
        return [span]
    if span[1] <= mine.start or mine.stop <= span[0]:
        return []
    middle = _middle(span)
    return spans((span[0], middle), mine) + spans((middle, span[1]), mine)


def accumulate(span: Span, backward: Callable[[int], object], parameters: Sequence[Tensor]) -> None:
    """Leaves the sum of a node's gradients in ``.grad``, which is empty before; holds one set a level of the tree.

    Parameters
    ----------
    backward : callable
        Takes the number of a micro-batch and adds its gradient to ``.grad``, as autograd does.
    """
    if span[1] - span[0] == 1:
        backward(span[0])
        return
    middle = _middle(span)
    accumulate((span[0], middle), backward, parameters)
    if span[1] - middle == 1:  # autograd's own addition is the tree's
        backward(middle)
        return
    left = taken(parameters)
    accumulate((middle, span[1]), backward, parameters)
    right = [parameter.grad for parameter in parameters]
    both = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    for parameter, gradient in zip(parameters, left, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad
    if both:
        torch._foreach_add_([b for _, b in both], [a for a, _ in both])


def taken(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients; ``.grad`` is empty after."""
    found = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


def add(span: Span, parts: Mapping[Span, Tensor]) -> Tensor:
    """The sum of a node, of those below it that are given; they are written over."""
    if span in parts:
        return parts[span]
    middle = _middle(span)
    return add((span[0], middle), parts).add_(add((middle, span[1]), parts))
