"""Hugging Face's `save_pretrained` of a model that is sparse: the folder holds dense weights, zeros where masked."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vspdf.kernels import reference
from vspdf.sparsity.attached import place
from vspdf.sparsity.kinds import is_conv1d, is_sparse
from vspdf.sparsity.stored import patterns_in

log = logging.getLogger("vspdf")


def teach_save_pretrained() -> None:
    """Lets models of transformers and of the hub's mixin save themselves while sparse, so that ``from_pretrained``
    gives the same function.

    Their loaders know no `SparseLinear` and would draw the missing weights at random. Nothing changes for dense models,
    and nothing is imported: asked wherever a sparse layer comes to be, made or unpickled.
    """
    kind: Any = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if kind is not None and not hasattr(kind.save_pretrained, "_knows_sparse"):
        kind.save_pretrained = _knowing(kind.save_pretrained)
    kind = getattr(sys.modules.get("huggingface_hub.hub_mixin"), "PyTorchModelHubMixin", None)
    if kind is not None and not hasattr(kind._save_pretrained, "_knows_sparse"):
        kind._save_pretrained = _as_dense(kind._save_pretrained)


def _knowing(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        state = bound.arguments.get("state_dict")
        if state is None:
            if not any(map(is_sparse, self.modules())):
                return original(self, *args, **kwargs)
            state = self.state_dict()
        if dense := _dense_weights(state, self):
            bound.arguments["state_dict"] = {**state, **dense}
            log.info(
                "save_pretrained: %d sparse layers are written with a dense weight, zeros at masked positions, beside "
                "their values and pattern: from_pretrained takes the former (and names the latter unexpected).",
                len(dense),
            )  # fmt: skip
        return original(*bound.args, **bound.kwargs)

    save_pretrained._knows_sparse = True  # type: ignore[attr-defined]
    return save_pretrained


def _dense_weights(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of a state's sparse layers by name, under the masks that it holds itself: the model may be further on."""
    found = {}
    for name, (layer, pattern) in patterns_in(state, model, _is_linear).items():
        dense = reference.materialise(state[f"{name}.values"].detach(), pattern)
        turned = is_conv1d(getattr(layer, "origin", layer))
        found[f"{name}.weight"] = dense.T.contiguous() if turned else dense
    return found


def _is_linear(module: nn.Module) -> bool:
    """Whether a state may hold a sparse layer in its place: sparse now, or dense again."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _as_dense(original: Any) -> Any:
    """The mixin takes the state from the model itself: a dense copy is saved in its place."""

    @functools.wraps(original)
    def _save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        count = sum(map(is_sparse, self.modules()))
        if not count:
            return original(self, *args, **kwargs)
        dense = copy.deepcopy(self)
        layer: Any
        for layer in [module for module in dense.modules() if is_sparse(module)]:
            place(dense, layer, layer.to_original())
        log.info("save_pretrained: %d sparse layers are written dense, zeros at masked positions.", count)
        return original(dense, *args, **kwargs)

    _save_pretrained._knows_sparse = True  # type: ignore[attr-defined]
    return _save_pretrained
