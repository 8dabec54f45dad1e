"""vspdf: Variable Sparse Pre-training and Dense Fine-tuning of GPTs, with the masked FLOPs really skipped.

The public API on one screen. Everything is imported on first use, so `import vspdf` itself is light.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vspdf.errors import BackendUnavailable as BackendUnavailable
    from vspdf.errors import UserError as UserError
    from vspdf.interop.transformers_trainer import PhasesCallback as PhasesCallback
    from vspdf.kernels.ops import sparse_linear as sparse_linear
    from vspdf.ledger import training_flops as training_flops
    from vspdf.pattern import Pattern as Pattern
    from vspdf.plan.cs2 import simulate as simulate
    from vspdf.sparsity.evolve import evolve as evolve
    from vspdf.sparsity.layer import SparseLinear as SparseLinear
    from vspdf.sparsity.layer import explain as explain
    from vspdf.sparsity.optimizer import parameter_groups as parameter_groups
    from vspdf.sparsity.phases import Phases as Phases
    from vspdf.sparsity.schedule import Phase as Phase
    from vspdf.sparsity.sharded import gathered as gathered
    from vspdf.sparsity.surgery import densify as densify
    from vspdf.sparsity.surgery import set_sparsity as set_sparsity
    from vspdf.sparsity.surgery import sparsify as sparsify

_HOMES = {
    "BackendUnavailable": "vspdf.errors",
    "Pattern": "vspdf.pattern",
    "Phase": "vspdf.sparsity.schedule",
    "Phases": "vspdf.sparsity.phases",
    "PhasesCallback": "vspdf.interop.transformers_trainer",
    "SparseLinear": "vspdf.sparsity.layer",
    "UserError": "vspdf.errors",
    "densify": "vspdf.sparsity.surgery",
    "evolve": "vspdf.sparsity.evolve",
    "explain": "vspdf.sparsity.layer",
    "gathered": "vspdf.sparsity.sharded",
    "parameter_groups": "vspdf.sparsity.optimizer",
    "set_sparsity": "vspdf.sparsity.surgery",
    "simulate": "vspdf.plan.cs2",
    "sparse_linear": "vspdf.kernels.ops",
    "sparsify": "vspdf.sparsity.surgery",
    "training_flops": "vspdf.ledger",
}
__all__ = [*_HOMES, "__version__"]

try:
    __version__ = version("vspdf")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str):
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'vspdf' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
