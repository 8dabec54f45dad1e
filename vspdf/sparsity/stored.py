"""How a state_dict holds a layer's pattern: its bits, and behind them its two sides; older ones have the bits alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from vspdf.errors import require
from vspdf.pattern import Pattern
from vspdf.sparsity.amounts import plain_name
from vspdf.sparsity.kinds import sides

_SIDES = 16  # bytes: out_features and in_features, int64, little-endian


def to_state(pattern: Pattern) -> Tensor:
    """What `from_state` reads: uint8, shape (ceil(out · in / 8) + 16,)."""
    return torch.from_numpy(np.concatenate([pattern.bits, np.array(pattern.shape, dtype="<i8").view(np.uint8)]))


def split(state: Tensor) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Bits of a state, and (out_features, in_features) that stand behind them; None where an older one has none."""
    array = state.detach().cpu().contiguous().numpy()
    if array.dtype != np.uint8 or array.ndim != 1 or len(array) <= _SIDES:
        return array, None
    out, into = (int(side) for side in array[-_SIDES:].copy().view("<i8"))
    told = min(out, into) > 0 and len(array) == (out * into + 7) // 8 + _SIDES  # bits alone are 16 bytes shorter
    return (array[:-_SIDES], (out, into)) if told else (array, None)


def from_state(state: Tensor, shape: tuple[int, int]) -> Pattern:
    """The pattern of a layer of `shape`, (out_features, in_features).

    Raises
    ------
    UserError
        If the state is of a layer of another shape, or its bits are not those of a pattern.
    """
    bits, told = split(state)
    require(
        told is None or told == tuple(shape),
        f"the stored pattern is of a layer of shape {told} (out, in), this one has {tuple(shape)}.",
    )
    return Pattern(shape, bits)


def patterns_in(
    state: Mapping[str, Tensor], model: nn.Module, takes: Callable[[nn.Module], bool]
) -> dict[str, tuple[nn.Module, Pattern]]:
    """The model's layer and the stored pattern of each sparse layer of a state, by its name there.

    Raises
    ------
    UserError
        If the model has no layer of that name that `takes` accepts, or pattern, values and layer do not fit.
    """
    modules, found = {plain_name(name): module for name, module in model.named_modules()}, {}
    for key, values in state.items():
        name = key.removesuffix(".values")
        if name == key:
            continue
        module, bits = modules.get(plain_name(name)), state.get(f"{name}._extra_state")
        if module is None or not takes(module):
            require(
                bits is None, f"the state holds a sparse layer '{name}', the model has no linear layer of that name."
            )
            continue
        if bits is None:
            require(f"{name}.weight" in state, f"'{key}' comes without its pattern ('{name}._extra_state').")
            continue
        pattern = from_state(bits, sides(module))
        require(
            values.numel() == pattern.nnz, f"'{key}' has {values.numel()} weights, the pattern beside it {pattern.nnz}."
        )
        found[name] = module, pattern
    return found
