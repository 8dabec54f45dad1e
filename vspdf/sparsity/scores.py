"""Where a masked weight would matter: the gradient as if a layer were dense, formed on update steps only."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vspdf import ledger


class DenseGradients:
    """Collects the dense weight gradient of layers, over every backward pass until it is closed.

    One GEMM a layer and pass, which the ledger counts as executed and nothing else, since no dense training has it.

    Parameters
    ----------
    layers : mapping of str to nn.Module
        Sparse or dense linear layers by name; their outputs are watched from the next forward pass on.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}  # of gradients [out, in], and of squared inputs [in]
        self._handles = [layer.register_forward_hook(partial(self._see, name)) for name, layer in layers.items()]

    def close(self) -> None:
        """Watches no longer; what was collected stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def sums(self) -> Iterable[Tensor]:
        """What several processes, each with a part of the batch, add up in place before the masks move."""
        return (tensor for name in sorted(self._sums) for tensor in self._sums[name])

    def scores(self, normalised: bool) -> dict[str, Tensor]:
        """Magnitudes of the gradient [out, in] by layer, of those that had one.

        Parameters
        ----------
        normalised : bool
            Over the root mean square of the input that a column belongs to. A column of large activations has large
            gradients throughout; without this nearly all that grows lies in a few such columns (arXiv:2108.06277).
        """
        found = {}
        for name, (gradient, squares) in self._sums.items():
            score = gradient.abs()
            found[name] = score / squares.sqrt().clamp_min(torch.finfo(score.dtype).tiny) if normalised else score
        return found

    def _see(self, name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._take, name, inputs[0].detach()))

    @torch.no_grad()
    def _take(self, name: str, x: Tensor, gradient: Tensor) -> None:
        start = time.perf_counter()
        dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        x, gradient = (t.reshape(-1, t.shape[-1]).to(dtype) for t in (x, gradient))
        if name not in self._sums:
            self._sums[name] = (gradient.new_zeros(gradient.shape[1], x.shape[1]), x.new_zeros(x.shape[1]))
        total, squares = self._sums[name]
        total.addmm_(gradient.T, x)
        squares.add_(x.square().sum(0))
        seconds = time.perf_counter() - start if x.device.type == "cpu" else 0.0
        ledger.record("scores", 0, 0, 2 * x.shape[0] * total.numel(), seconds)
