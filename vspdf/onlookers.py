"""Whether anybody looks on who must see operators of torch's, where a kernel would write into memory unseen."""

from __future__ import annotations

import torch
from torch import Tensor

compiling = torch.compiler.is_compiling  # by names of this module: looked up where the caches are cold
tracing = torch._C._is_tracing
modes = torch._C._len_torch_dispatch_stack
transformed = torch._C._are_functorch_transforms_active
stored = torch._C._has_storage  # tensors of autograd's own vmap (batched gradients) are plain, and have no memory
_PLAIN = (Tensor, torch.nn.Parameter)


def nobody() -> bool:
    """No compiler, tracer, mode or transform of `torch.func`."""
    return not (compiling() or tracing() or modes() or transformed())


def watched() -> bool:
    """Whether a transform of `torch.func` (grad, vmap, jvp) looks on, which must meet a Function and no operator."""
    return not compiling() and transformed()


def plain(x: Tensor) -> bool:
    """Whether it is memory on a CPU and nothing else: no subclass, no promise to negate it or to make it of zeros."""
    return type(x) in _PLAIN and x.is_cpu and not (x.is_neg() or x._is_zerotensor())


def forward_mode() -> bool:
    """Whether derivatives are carried along with values."""
    return torch.autograd.forward_ad._current_level >= 0
