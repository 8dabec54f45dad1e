"""Which kind of linear layer a module is, and its sides: asked without importing its class."""

from __future__ import annotations

from torch import Tensor, nn


def is_conv1d(module: nn.Module | None) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer whose weight is [in, out]; asks without importing it."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_sparse(module: nn.Module) -> bool:
    """Whether a module is a `SparseLinear`, for what that class itself is built on."""
    return "_pattern" in vars(module)


def sides(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer, sparse or dense, transformers' Conv1D too."""
    if is_sparse(layer):
        return vars(layer)["_pattern"].shape
    weight = layer.weight
    assert isinstance(weight, Tensor)
    out_features, in_features = reversed(weight.shape) if is_conv1d(layer) else weight.shape
    return out_features, in_features
