"""Models that others have wrapped; DistributedDataParallel must not go on with parameters that are gone."""

from __future__ import annotations

import gc
import logging
from typing import Any

import torch
from torch import nn

from vspdf.errors import UserError

log = logging.getLogger("vspdf")

_AGAIN = "wrap the model anew, net = DistributedDataParallel(model), after each switch or update of masks"


def begun_with(model: nn.Module, known: nn.Module | None) -> nn.Module:
    """`known` where `model` is but a wrapper of it (torch.compile's, DistributedDataParallel) or what it wraps: by its
    names layers are known."""
    if known is None or known is model:
        return model
    inside = any(part is known for part in model.modules()) or any(part is model for part in known.modules())
    return known if inside else model


def warn_of_reducers(verb: str, model: nn.Module) -> None:
    """Says so where a living DistributedDataParallel has wrapped a model whose parameters were just replaced.

    Its reducer knows nothing of the new ones: it would leave their gradients as each process has them, and say nothing
    for a step. So it also refuses to be called again.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for net in (thing for thing in gc.get_objects() if issubclass(type(thing), nn.parallel.DistributedDataParallel)):
        inside = any(module is model for module in net.modules()) or any(module is net for module in model.modules())
        if inside and not getattr(net, "_vspdf_wraps_anew", False):  # as our trainer does
            net.__dict__["_vspdf_wraps_anew"] = True
            net.register_forward_pre_hook(_refuse, prepend=True)
            log.warning("%s: DistributedDataParallel was made before and knows none of the new parameters: %s.", verb,
                        _AGAIN)  # fmt: skip


def _refuse(net: nn.Module, inputs: Any) -> None:
    raise UserError(f"the masks of a model have changed since DistributedDataParallel wrapped it: {_AGAIN}.")
