"""Who is timed: our kernels, dense opponents, other libraries, and kernels of others by name.

A candidate is a class without arguments. It has any of ``forward(x, values)``, ``grad_input(grad, values)``,
``grad_values(grad, x)`` and ``layer(x, grad, values)`` (all three results at once, for libraries that do not split
their backward pass), and may have ``prepare(pattern)``, which is timed apart. ``values`` are the kept weights,
row-major; with ``dense = True`` in the class the whole matrix with zeros instead. Tensors are torch's, results may be
NumPy's. Packages name theirs by an entry point of the group `GROUP`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vspdf.bench.rounds import PRODUCTS
from vspdf.errors import UserError, did_you_mean, in_one_line
from vspdf.kernels import cpu, ops
from vspdf.kernels.hardware import slow_bf16
from vspdf.pattern import Pattern

GROUP = "vspdf.candidates"  # of entry points


class Vspdf:
    """The sparse kernels, whatever `auto` would choose."""

    def prepare(self, pattern: Pattern) -> None:
        pattern.packed.pop("cpu", None)
        self.pattern = pattern
        cpu.prepare([pattern])

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        return cpu.forward(x, values, None, self.pattern)[0]

    def grad_input(self, grad: Tensor, values: Tensor) -> Tensor:
        return cpu.grad_input(grad, values, self.pattern)[0]

    def grad_values(self, grad: Tensor, x: Tensor) -> Tensor:
        return cpu.grad_values(grad, x, self.pattern)[0]


class Auto:
    """What users get: the operators with their dispatch."""

    def prepare(self, pattern: Pattern) -> None:
        self.pattern = pattern  # kept alive: operators know it by its digest
        self.key = pattern.digest

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        return ops.linear(x, values, None, self.key, "auto")

    def grad_input(self, grad: Tensor, values: Tensor) -> Tensor:
        return ops.grad_input(grad, values, self.key, "auto")

    def grad_values(self, grad: Tensor, x: Tensor) -> Tensor:
        return ops.grad_values(grad, x, self.key, "auto")


class Dense:
    """torch's GEMM on the whole matrix, ready as it is."""

    dense = True

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def grad_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        return grad @ weight

    def grad_values(self, grad: Tensor, x: Tensor) -> Tensor:
        return grad.T @ x


class DenseOneDnn(Dense):
    """Dense by oneDNN instead of MKL, which is twice as fast where MKL does not know the processor."""

    dtypes = ("float32",)

    @staticmethod
    def _times(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._times(x, weight)

    def grad_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        return self._times(grad, weight.T)

    def grad_values(self, grad: Tensor, x: Tensor) -> Tensor:
        return self._times(grad.T, x.T)


class DenseBf16(Dense):
    """Dense in bfloat16, by oneDNN on AMX or AVX512_BF16."""

    dtype = "bfloat16"


class DenseCompiled(Dense):
    """Dense under torch.compile, tuned for each shape."""

    def __init__(self) -> None:
        compiled = lambda run: torch.compile(run, dynamic=False, mode="max-autotune-no-cudagraphs")  # noqa: E731
        self.forward = compiled(lambda x, weight: F.linear(x, weight))  # type: ignore[method-assign]
        self.grad_input = compiled(lambda grad, weight: grad @ weight)  # type: ignore[method-assign]
        self.grad_values = compiled(lambda grad, x: grad.T @ x)  # type: ignore[method-assign]


class DenseMask(Dense):
    """Dense times mask, what masked training usually does: it multiplies by zeros."""

    def prepare(self, pattern: Pattern) -> None:
        self.masks = {dtype: pattern.mask().to(dtype) for dtype in (torch.float32, torch.bfloat16)}

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight * self.masks[x.dtype])

    def grad_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        return grad @ (weight * self.masks[grad.dtype])

    def grad_values(self, grad: Tensor, x: Tensor) -> Tensor:
        return (grad.T @ x) * self.masks[x.dtype]


class _Csr:
    """Indices of W and of its transpose, and the order of the transpose's values."""

    dtypes = ("float32",)

    def prepare(self, pattern: Pattern) -> None:
        self.shape, self.turned = pattern.shape, pattern.shape[::-1]
        self.rows, self.columns = (torch.from_numpy(part.astype(np.int32)) for part in pattern.csr())
        mask = pattern.mask()
        order = torch.zeros(pattern.shape, dtype=torch.int64)
        order[mask] = torch.arange(pattern.nnz)
        self.order = order.T[mask.T]
        turned = Pattern.from_mask(mask.T.contiguous()).csr()
        self.t_rows, self.t_columns = (torch.from_numpy(part.astype(np.int32)) for part in turned)


class TorchCsr(_Csr):
    """torch.sparse CSR (MKL), with the transposes that row-major activations need."""

    def prepare(self, pattern: Pattern) -> None:
        super().prepare(pattern)
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        self.zeros = self._csr(self.rows, self.columns, torch.zeros(pattern.nnz), self.shape)

    @staticmethod
    def _csr(rows: Tensor, columns: Tensor, values: Tensor, shape: Any) -> Tensor:
        return torch.sparse_csr_tensor(rows, columns, values, shape, check_invariants=False)

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        return (self._csr(self.rows, self.columns, values, self.shape) @ x.T.contiguous()).T.contiguous()

    def grad_input(self, grad: Tensor, values: Tensor) -> Tensor:
        turned = self._csr(self.t_rows, self.t_columns, values[self.order], self.turned)
        return (turned @ grad.T.contiguous()).T.contiguous()

    def grad_values(self, grad: Tensor, x: Tensor) -> Tensor:
        return torch.sparse.sampled_addmm(self.zeros, grad.T.contiguous(), x, beta=0.0).values()


class TorchBsr:
    """torch.sparse BSR (MKL): blocks of 16, 8 or 4 that hold a kept weight are multiplied whole."""

    dtypes = ("float32",)

    def prepare(self, pattern: Pattern) -> None:
        size = next((n for n in (16, 8, 4, 2) if not (pattern.out_features % n or pattern.in_features % n)), 1)
        warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        numbered = torch.zeros(pattern.shape)
        mask = pattern.mask()
        numbered[mask] = torch.arange(1, pattern.nnz + 1, dtype=torch.float32)
        self.parts = [self._parts(numbered, size), self._parts(numbered.T.contiguous(), size)]

    @staticmethod
    def _parts(numbered: Tensor, size: int) -> tuple[Tensor, ...]:
        """A matrix of blocks, and where in its storage each value lies, row-major values numbered from 1."""
        blocks = numbered.to_sparse_bsr((size, size))
        number = blocks.values().flatten().long()
        slots = number.nonzero()[:, 0]
        return blocks, slots, number[slots] - 1

    def _times(self, parts: tuple[Tensor, ...], x: Tensor, values: Tensor) -> Tensor:
        blocks, slots, order = parts
        blocks.values().view(-1)[slots] = values[order]
        return (blocks @ x.T.contiguous()).T.contiguous()

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        return self._times(self.parts[0], x, values)

    def grad_input(self, grad: Tensor, values: Tensor) -> Tensor:
        return self._times(self.parts[1], grad, values)


class ScipyCsr(_Csr):
    """scipy.sparse CSR on one thread; it has no product for gradients at kept positions."""

    def forward(self, x: Tensor, values: Tensor) -> Any:
        import scipy.sparse as sp

        weight = sp.csr_matrix((values.numpy(), self.columns.numpy(), self.rows.numpy()), shape=self.shape)
        return (weight @ x.numpy().T).T.copy()

    def grad_input(self, grad: Tensor, values: Tensor) -> Any:
        import scipy.sparse as sp

        parts = (values.numpy()[self.order.numpy()], self.t_columns.numpy(), self.t_rows.numpy())
        return (sp.csr_matrix(parts, shape=self.turned) @ grad.numpy().T).T.copy()


class SparseLab:
    """SparseLab's padded CSR; its backward pass is not split by product."""

    dtypes = ("float32",)

    def prepare(self, pattern: Pattern) -> None:
        from sparselab import layout

        numbered = torch.zeros(pattern.shape)
        numbered[pattern.mask()] = torch.arange(1, pattern.nnz + 1, dtype=torch.float32)
        self.csr = layout.from_dense(numbered)
        self.storage = torch.from_numpy(np.asarray(self.csr.values))
        self.slots = self.storage.nonzero()[:, 0]
        self.order = self.storage[self.slots].long() - 1
        self.held: int | None = None

    def _hold(self, values: Tensor) -> Tensor:
        """The storage with these values in it: a layer of theirs holds its own, and pays for no copy."""
        if self.held != values.data_ptr():
            self.storage[self.slots], self.held = values[self.order], values.data_ptr()
        return self.storage

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        from sparselab import ops as theirs

        self._hold(values)
        return theirs.spmm(self.csr, x.T.contiguous()).T

    def layer(self, x: Tensor, grad: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from sparselab import ops as theirs

        held, x = self._hold(values).requires_grad_(), x.detach().requires_grad_()
        y = theirs._SpMMFunction.apply(held, self.csr, x.T.contiguous(), "simd").T
        dx, dheld = torch.autograd.grad(y, (x, held), grad)
        held.requires_grad_(False)
        return y, dx, _Later(dheld, self.slots, self.order)  # type: ignore[return-value]


class _Later:
    """A gradient in a padded storage, brought into row-major order only when it is looked at."""

    def __init__(self, stored: Tensor, slots: Tensor, order: Tensor) -> None:
        self.parts = stored, slots, order

    def read(self) -> Tensor:
        stored, slots, order = self.parts
        return torch.empty(len(order)).index_copy(0, order, stored[slots])


class Known(NamedTuple):
    """A candidate by name: how it is made, what it needs, whether it is timed unasked."""

    make: Callable[[], Any]
    needs: str = ""  # a package
    peer: bool = True


BUILT_IN = {
    "vspdf": Known(Vspdf), "auto": Known(Auto), "dense": Known(Dense), "dense_mask": Known(DenseMask),
    "dense_onednn": Known(DenseOneDnn), "dense_bf16": Known(DenseBf16),
    "dense_compiled": Known(DenseCompiled, peer=False), "torch_csr": Known(TorchCsr), "torch_bsr": Known(TorchBsr),
    "scipy_csr": Known(ScipyCsr, "scipy"), "sparselab": Known(SparseLab, "sparselab"),
}  # fmt: skip
OWN = ("dense", "vspdf", "auto")
# Of `vspdf bench linear --device cuda`, which has its own rounds.
ON_GPUS = {"cublas": "dense", "cusparse": "torch.sparse CSR", "2:4": "cuSPARSELt, on masks that are 2:4"}


def why_missing(name: str) -> str | None:
    """Why a built-in candidate cannot run here; None if it can."""
    known = BUILT_IN[name]
    if known.needs and find_spec(known.needs) is None:
        return f"pip install {known.needs}"
    if name == "dense_onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch has no oneDNN"
    if name == "dense_bf16" and (slow := slow_bf16(torch.device("cpu"))):
        return slow
    if name == "torch_csr" and not torch.backends.mkl.is_available():
        return "this torch has no MKL"
    return None


def peers() -> tuple[list[str], dict[str, str]]:
    """Opponents and other libraries that are timed unasked, and why those that cannot be are not."""
    names = [name for name, known in BUILT_IN.items() if known.peer and name not in OWN]
    missing = {name: why for name in names if (why := why_missing(name))}
    return [name for name in names if name not in missing], missing


def find(name: str) -> Any:
    """A candidate by its name: built in, named by a package's entry point, or ``module:Class``.

    Raises
    ------
    UserError
        If there is none, it cannot be loaded, or has no product to time.
    """
    if name in BUILT_IN:
        if (why := why_missing(name)) and name != "dense_bf16":
            raise UserError(f"candidate '{name}' cannot run here: {why}.")
        return BUILT_IN[name].make()
    others = {point.name: point for point in entry_points(group=GROUP)}
    if name not in others and ":" not in name:
        raise UserError(f"candidate '{name}' is not known.{did_you_mean(name, [*BUILT_IN, *others, 'module:Class'])}")
    try:
        made = (others[name].load() if name in others else _load(name))()
    except UserError:
        raise
    except Exception as error:  # others' code
        raise UserError(
            f"candidate '{name}' cannot be loaded: {type(error).__name__}: {in_one_line(error, 200)}."
        ) from None
    if not any(hasattr(made, product) for product in (*PRODUCTS, "layer")):
        raise UserError(f"candidate '{name}' has none of forward, grad_input, grad_values and layer.")
    return made


def _load(name: str) -> Any:
    """A class by ``module:Class``; modules of the current folder count."""
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = import_module(module)
    finally:
        sys.path.remove(os.getcwd())
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"candidate '{name}': '{module}' has no '{part}'.{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    return found


def listed() -> list[tuple[str, str, str]]:
    """Every candidate by name: what it is, and "available" or what is missing."""
    about = lambda make: (make.__doc__ or "").strip().splitlines()[0]  # noqa: E731
    rows = [(n, about(known.make), why_missing(n) or "available") for n, known in BUILT_IN.items()]
    rows += [(point.name, f"{point.value}, of a package", "available") for point in entry_points(group=GROUP)]
    gpu = "available" if torch.cuda.is_available() else "torch sees no CUDA device"
    return rows + [(name, f"{what}, by --device cuda", gpu) for name, what in ON_GPUS.items()]
