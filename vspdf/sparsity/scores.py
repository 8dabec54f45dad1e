"""Where a masked weight would matter: the gradient as if a layer were dense, formed on update steps only."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vspdf import ledger
from vspdf.sparsity.kinds import sides
from vspdf.sparsity.layer import SparseLinear


class DenseGradients:
    """Collects the dense weight gradient of layers, over every backward pass until it is closed.

    One GEMM a layer and pass, which the ledger counts as executed and nothing else, since no dense training has it.

    Parameters
    ----------
    layers : mapping of str to nn.Module
        Sparse or dense linear layers by name; their outputs are watched from the next forward pass on.

    Attributes
    ----------
    parameters : list of Tensor
        Two a layer, [out, in] and [in], in whose ``.grad`` the gradient and the squares of the inputs add up, as
        gradients of parameters do: where several processes share a batch, these are summed like those. The tensors
        themselves hold nothing.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._places: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in sorted(layers.items()):
            values = layer.values if isinstance(layer, SparseLinear) else layer.weight
            assert isinstance(values, Tensor)
            dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
            shape = sides(layer)
            place = torch.empty(
                shape, dtype=dtype, device=values.device
            )  # a plain one, also of values that are sharded
            self._places[name] = (place, place.new_empty(shape[1]))
        self._handles = [  # before hooks that change the output
            layer.register_forward_hook(partial(self._see, name), prepend=True, with_kwargs=True)
            for name, layer in layers.items()
        ]

    def __deepcopy__(self, memo: Any) -> DenseGradients:
        return DenseGradients({})  # a copy of the model is not watched

    @property
    def parameters(self) -> list[Tensor]:
        return [tensor for places in self._places.values() for tensor in places]

    def close(self) -> None:
        """Watches no longer; what was collected stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def scores(self, normalised: bool) -> dict[str, Tensor]:
        """Magnitudes of the gradient [out, in] by layer, of those that had one.

        Parameters
        ----------
        normalised : bool
            Over the root mean square of the input that a column belongs to. A column of large activations has large
            gradients throughout; without this nearly all that grows lies in a few such columns (arXiv:2108.06277).
        """
        found = {}
        for name, (place, columns) in self._places.items():
            if place.grad is None or columns.grad is None:
                continue
            score = place.grad.abs()
            rms = columns.grad.sqrt().clamp_min(torch.finfo(score.dtype).tiny)
            found[name] = score / rms if normalised else score
        return found

    def _see(
        self, name: str, layer: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Tensor
    ) -> None:
        if output.requires_grad and name in self._places:
            x = next(iter((*inputs, *named.values())))
            output.register_hook(partial(self._take, name, x.detach()))

    @torch.no_grad()
    def _take(self, name: str, x: Tensor, gradient: Tensor) -> None:
        start = time.perf_counter()
        place, columns = self._places[name]
        x, gradient = (t.reshape(-1, t.shape[-1]).to(place.dtype) for t in (x, gradient))
        for tensor, part in ((place, gradient.T @ x), (columns, x.square().sum(0))):
            tensor.grad = part if tensor.grad is None else tensor.grad.add_(part)
        seconds = time.perf_counter() - start if x.device.type == "cpu" else 0.0
        ledger.record("scores", 0, 0, 2 * x.shape[0] * place.numel(), seconds)
