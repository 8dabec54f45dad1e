"""Ramps for weights that come in at a switch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vspdf.pattern import Pattern
from vspdf.sparsity.kinds import is_conv1d
from vspdf.sparsity.layer import SparseLinear, is_sharded


def inner(optimizer: Any) -> Any:
    """The optimizer within accelerate's wrapper, which has no hooks of its own, or the very one that was given."""
    return getattr(optimizer, "optimizer", optimizer)


def take_step(optimizer: torch.optim.Optimizer) -> bool:
    """Calls ``optimizer.step()``; whether a step was taken, which accelerate's passes over while gradients accumulate,
    and where its GradScaler finds an overflow."""
    own, taken = inner(optimizer), []
    if own is optimizer or not hasattr(own, "register_step_post_hook"):
        optimizer.step()
        return True
    handle = own.register_step_post_hook(lambda *_: taken.append(True))
    try:
        optimizer.step()
    finally:
        handle.remove()
    return bool(taken)


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
    done : int
        Steps of it that were taken before, where a run is resumed.
    """

    def __init__(self, model: nn.Module, before: Mapping[str, Pattern], steps: int, done: int = 0) -> None:
        self.steps, self.done = steps, done
        self.before = dict(before)
        self._places: list[tuple[nn.Module, str, Tensor]] = []
        for name, old in self.before.items():
            layer = model.get_submodule(name)
            if isinstance(layer, SparseLinear):
                self._places.append((layer, "values", ~old.mask()[layer.pattern.mask()]))
            else:
                self._places.append((layer, "weight", ~(old.mask().T if is_conv1d(layer) else old.mask())))
        self._old: list[Tensor] = []
        self._handles: list[Any] = []

    def follow(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Ramps the steps of an optimizer, whoever takes them (a GradScaler, say), until the ramp is over."""
        if self.done >= self.steps:  # not within the hooks themselves, which others may follow
            self.close()
        optimizer = inner(optimizer)
        if isinstance(optimizer, torch.optim.Optimizer) and not self._handles and self.done < self.steps:
            self._handles = [
                optimizer.register_step_pre_hook(lambda *_: self.begin()),
                optimizer.register_step_post_hook(lambda *_: self.end()),
            ]

    def close(self) -> None:
        """Follows no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """``optimizer.step()`` with the updates of revived weights scaled by ``(done + 1) / (steps + 1)``.

        False where the optimizer has passed the step over: the ramp stays where it is.
        """
        self.begin()
        taken = take_step(optimizer)
        if taken:
            self.end()
        self._old = []
        return taken

    def begin(self) -> None:
        """Before a step of the optimizer; a second time changes nothing."""
        self._old = [weight.detach().clone() for weight, _ in self._weights()] if self.done < self.steps else []

    def end(self) -> None:
        """After it."""
        if not self._old:
            return
        self.done += 1
        ramp = self.done / (self.steps + 1)
        with torch.no_grad():
            for (weight, revived), start in zip(self._weights(), self._old, strict=True):
                weight.copy_(torch.where(revived, torch.lerp(start, weight, ramp), weight))
        self._old = []

    def _weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights as they are now (FSDP and ``load_state_dict(assign=True)`` exchange them), and which revived."""
        for layer, name, revived in self._places:
            weight = layer._parameters[name]
            assert weight is not None
            flags = revived.to(weight.device)
            if is_sharded(weight):
                from vspdf.sparsity.sharded import shard_like

                flags = shard_like(weight)(flags)
            yield weight, flags
