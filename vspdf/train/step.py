"""One optimizer step."""

from __future__ import annotations

from torch import nn

from vspdf import shapes
from vspdf.ledger import Count


def dense_counts(model: nn.Module, shape: shapes.Shape, tokens: int) -> dict[str, Count]:
    """What torch itself multiplies in a step, forward and backward: nothing is skipped there, the columns agree."""
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    macs = {"dense_linear": linear, "attention": shape.attention, "vocabulary": shape.vocabulary}
    flops = {name: 6 * tokens * n for name, n in macs.items() if n}
    return {name: Count(n, n, n) for name, n in flops.items()}
