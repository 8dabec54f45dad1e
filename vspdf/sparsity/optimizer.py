"""Optimizer state carried over where parameters are exchanged, and ramps for revived weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from vspdf.errors import UserError, did_you_mean
from vspdf.pattern import Pattern
from vspdf.sparsity.layer import SparseLinear, _is_conv1d


def _carry(
    optimizer: torch.optim.Optimizer | None,
    old: object,
    new: object,
    move: Callable[[Tensor], Tensor],
    moments: str = "keep",
) -> None:
    """Puts `new` in the place of `old` in an optimizer; state tensors shaped like `old` go through `move`."""
    assert isinstance(old, nn.Parameter) and isinstance(new, nn.Parameter)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if state and moments == "keep":
        optimizer.state[new] = {
            key: move(value).contiguous() if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in state.items()
        }


def _check_moments(moments: str) -> None:
    if moments not in ("keep", "reset"):
        raise UserError(f"moments = '{moments}' is not known.{did_you_mean(moments, ('keep', 'reset'))}")


class RevivedWarmup:
    """Ramps the updates of revived weights over the first steps after a switch.

    Adam's second moment of a weight that was masked is near zero, so with a large beta2 its first updates are too large
    (SMET, arXiv:2606.00888). Scaling the gradient would not help, Adam divides it out: this scales the update itself.

    Parameters
    ----------
    model : nn.Module
        After the switch.
    before : dict of str to Pattern
        What `densify` or `set_sparsity` returned.
    steps : int
        Length of the ramp.
    """

    def __init__(self, model: nn.Module, before: Mapping[str, Pattern], steps: int, done: int = 0) -> None:
        self.steps, self.done = steps, done
        self.before = dict(before)
        self._old: list[Tensor] = []
        self.weights: list[tuple[Tensor, Tensor]] = []
        for name, old in self.before.items():
            layer = model.get_submodule(name)
            if isinstance(layer, SparseLinear):
                self.weights.append((layer.values, ~old.mask()[layer.pattern.mask()]))
            else:
                assert isinstance(layer.weight, Tensor)
                self.weights.append((layer.weight, ~(old.mask().T if _is_conv1d(layer) else old.mask())))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """``optimizer.step()`` with the updates of revived weights scaled by ``(done + 1) / (steps + 1)``."""
        self.begin()
        optimizer.step()
        self.end()

    def begin(self) -> None:
        """Before an optimizer's step that is not taken through `step`."""
        self._old = [weight.detach().clone() for weight, _ in self.weights] if self.done < self.steps else []

    def end(self) -> None:
        """After it."""
        if not self._old:
            return
        self.done += 1
        ramp = self.done / (self.steps + 1)
        with torch.no_grad():
            for (weight, revived), start in zip(self.weights, self._old, strict=True):
                revived = revived.to(weight.device)
                weight[revived] = torch.lerp(start[revived], weight[revived], ramp)
        self._old = []
