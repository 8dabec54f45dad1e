"""Hugging Face's `save_pretrained` of a model that is sparse: the folder holds dense weights, zeros where masked."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from typing import Any

from torch import Tensor, nn

from vspdf.sparsity.attached import place
from vspdf.sparsity.layer import SparseLinear, sparse_layers

log = logging.getLogger("vspdf")


def teach_save_pretrained(model: nn.Module) -> None:
    """Lets models of transformers and of the hub's mixin save themselves while sparse, so that ``from_pretrained``
    gives the same function.

    Their loaders know no `SparseLinear` and would draw the missing weights at random. Nothing changes for dense models.
    """
    kinds: set[Any] = {kind for module in model.modules() for kind in type(module).__mro__}
    for kind in kinds:
        if kind.__name__ == "PreTrainedModel" and not hasattr(kind.save_pretrained, "_knows_sparse"):
            kind.save_pretrained = _knowing(kind.save_pretrained)
        if kind.__name__ == "PyTorchModelHubMixin" and not hasattr(kind._save_pretrained, "_knows_sparse"):
            kind._save_pretrained = _as_dense(kind._save_pretrained)


def _knowing(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        layers = sparse_layers(self)
        if not layers:
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments.get("state_dict")
        bound.arguments["state_dict"] = _with_dense(self.state_dict() if given is None else given, layers)
        log.info(
            "save_pretrained: %d sparse layers are written with a dense weight, zeros at masked positions, beside "
            "their values and pattern: from_pretrained takes the former (and names the latter unexpected).",
            len(layers),
        )  # fmt: skip
        return original(*bound.args, **bound.kwargs)

    save_pretrained._knows_sparse = True  # type: ignore[attr-defined]
    return save_pretrained


def _with_dense(state: dict[str, Tensor], layers: dict[str, SparseLinear]) -> dict[str, Tensor]:
    """A state with the dense weight of every sparse layer beside its values and pattern, which `adopt` goes on from."""
    state = dict(state)
    for name, layer in layers.items():
        if (values := state.get(f"{name}.values")) is not None:
            state[f"{name}.weight"] = layer.spread(values.detach())
    return state


def _as_dense(original: Any) -> Any:
    """The mixin takes the state from the model itself: a dense copy is saved in its place."""

    @functools.wraps(original)
    def _save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        layers = sparse_layers(self)
        if not layers:
            return original(self, *args, **kwargs)
        dense = copy.deepcopy(self)
        for layer in sparse_layers(dense).values():
            place(dense, layer, layer.to_original())
        log.info("save_pretrained: %d sparse layers are written dense, zeros at masked positions.", len(layers))
        return original(dense, *args, **kwargs)

    _save_pretrained._knows_sparse = True  # type: ignore[attr-defined]
    return _save_pretrained
