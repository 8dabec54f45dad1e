"""Rotary positions (arXiv:2104.09864): queries and keys are turned by angles that grow with the position.

Feature i of the first half of what is rotated and feature i of the second are one pair, as transformers has them.
Angles are float32, whatever the model is. B batch, T tokens, H heads, d width of a head, r features rotated.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vspdf.shapes import RopeScaling, Shape


class Rotation(NamedTuple):
    """Cosines and sines of the angles of some positions, [B or 1, 1, T, r]."""

    cos: Tensor
    sin: Tensor


def rotation(shape: Shape, positions: Tensor) -> Rotation | None:
    """Angles of positions [T] or [B, T] for every head; None where a model has no rotary positions."""
    if shape.position != "rope":
        return None
    angles = positions.float()[..., None] * frequencies(shape, positions.device)
    angles = torch.cat((angles, angles), -1)
    angles = angles[None, None] if positions.dim() == 1 else angles[:, None]
    return Rotation(angles.cos(), angles.sin())


def frequencies(shape: Shape, device: torch.device | None = None) -> Tensor:
    """Radians a token, [r / 2], after scaling."""
    r = int(shape.rope_fraction * shape.head_dim)
    found = 1.0 / shape.rope_base ** (torch.arange(0, r, 2, device=device).float() / r)
    return found if shape.rope_scaling is None else _scaled(found, shape.rope_scaling)


def _scaled(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    slow = frequency / scaling.factor
    if scaling.type == "linear":
        return slow
    turns = scaling.original_length * frequency / (2 * math.pi)  # over the length first trained for
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * slow + share * frequency


def rotate(x_BHTd: Tensor, by: Rotation | None) -> Tensor:
    """Queries or keys, turned; features beyond the rotated ones stay."""
    if by is None:
        return x_BHTd
    r = by.cos.shape[-1]
    x, rest = x_BHTd[..., :r], x_BHTd[..., r:]
    first, second = x.chunk(2, dim=-1)
    turned = x * by.cos.to(x.dtype) + torch.cat((-second, first), -1) * by.sin.to(x.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned
