"""Which weights exist: the one home of positions.

A pattern is immutable and small: one bit per position of the dense weight matrix. What the kernels derive from it (row
pointers, packed order, generated code) they keep in `Pattern.packed`.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib import import_module
from os import PathLike
from typing import Any

import numpy as np
import torch

from vspdf import mask_forms, mask_tensors
from vspdf.errors import UserError, check_sparsity, check_whole, require

log = logging.getLogger("vspdf")
_alive: weakref.WeakValueDictionary[str, Pattern] = weakref.WeakValueDictionary()
_making = threading.Lock()


def kept_count(numel: int, sparsity: float, truncate: bool = False) -> int:
    """Number of kept weights: ``numel − round(sparsity · numel)``, Python's round of the exact product.

    With `truncate` it is ``int((1 − sparsity) · numel)`` in binary floating point, as the Cerebras stack counts now.

    Raises
    ------
    UserError
        If `sparsity` is outside [0, 1].
    """
    check_sparsity("sparsity", sparsity, all_masked=True)
    if truncate:
        return int((1 - sparsity) * numel)
    # The decimal as written (0.9), not its binary neighbour, so that ties round as on paper.
    return numel - round(Fraction(repr(float(sparsity))) * numel)


def pack(mask: np.ndarray) -> np.ndarray:
    """Bits of a boolean array as a pattern holds them: uint8, row-major, little-endian within a byte."""
    return np.packbits(mask.reshape(-1), bitorder="little")


def unpack(bits: np.ndarray, numel: int) -> np.ndarray:
    """What `pack` packed, as `numel` booleans in one dimension."""
    return np.unpackbits(bits, count=numel, bitorder="little").view(np.bool_)


def ones(bits: np.ndarray) -> int:
    """How many of the bits are set."""
    count = getattr(np, "bitwise_count", np.unpackbits)  # numpy 2 has the former
    whole = len(bits) // 8 * 8 if count is not np.unpackbits else 0
    return int(count(bits[:whole].view(np.uint64)).sum() + count(bits[whole:]).sum())


def _sides(shape: tuple[int, int]) -> tuple[int, int]:
    sides = np.ravel(shape)
    if len(sides) != 2 or sides.dtype.kind not in "iu" or min(sides) < 1:
        raise UserError(f"a pattern's shape is (out_features, in_features), both at least 1, not {shape}.")
    return int(sides[0]), int(sides[1])


class Pattern:
    """Positions of the weights that exist in a matrix of shape (out_features, in_features).

    Equal patterns are one object while alive, copies are the object itself, pickling carries shape and bits only.

    Parameters
    ----------
    shape : (out_features, in_features)
    bits : uint8 array, shape (ceil(out · in / 8),)
        As the attribute; copied.

    Raises
    ------
    UserError
        If a side is below 1, or `bits` do not fit the shape.

    Attributes
    ----------
    shape : tuple of int, (out_features, in_features)
    nnz : int
        Kept weights.
    bits : uint8 array, shape (ceil(out · in / 8),)
        Row-major mask, little-endian within a byte.
    digest : str
        Content hash of shape and bits.
    packed : dict
        What backends derived from this pattern, by backend name; see `derived`.
    """

    shape: tuple[int, int]
    nnz: int
    bits: np.ndarray
    digest: str
    packed: dict[str, Any]
    __slots__ = ("__weakref__", "bits", "digest", "nnz", "packed", "shape")

    def __new__(cls, shape: tuple[int, int], bits: np.ndarray) -> Pattern:
        out_features, in_features = shape = _sides(shape)
        numel = out_features * in_features
        bits = np.array(bits)  # its own: the caller's memory may change
        if bits.shape != ((numel + 7) // 8,) or bits.dtype != np.uint8:
            need = f"{(numel + 7) // 8} bytes of bits"
            raise UserError(f"a pattern of {shape} needs {need}, got {bits.dtype} of shape {bits.shape}.")
        if numel % 8 and bits[-1] >> (numel % 8):
            raise UserError("a pattern's unused trailing bits must be zero.")
        digest = hashlib.sha256(repr(shape).encode() + bits.data).hexdigest()[:32]  # by the processor's instructions
        with _making:  # two threads must not make two of one pattern
            self = _alive.get(digest)
            if self is None:
                self = super().__new__(cls)
                bits.setflags(write=False)
                self.shape, self.bits, self.digest = shape, bits, digest
                self.nnz = ones(bits)
                self.packed = {}
                _alive[digest] = self
        return self

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(self, name):
            raise UserError(f"a pattern is immutable: its {name} cannot be set.")
        super().__setattr__(name, value)

    @classmethod
    def random(
        cls, shape: tuple[int, int], sparsity: float, seed: int = 0, *, truncate: bool = False, fits: str | None = None
    ) -> Pattern:
        """Static random mask of ``numel − round(sparsity · numel)`` weights, unstructured (SPDF, arXiv:2303.10464).

        Parameters
        ----------
        shape : (out_features, in_features)
        sparsity : float in [0, 1]
        seed : int
            The same seed, shape and sparsity give the same mask.
        truncate : bool
            How kept weights are counted, see `kept_count`.
        fits : str, optional
            A form that the mask is to have, and is as uniform as it allows. "2:4": at most two of every four
            neighbours, along rows and along columns, as sparse tensor cores multiply them forward and backward; every
            mask of that form and count is equally likely. Where more is to be kept (half of the positions, if four
            divides the sides), the mask is the plain one, and a warning says so. "ROWSxCOLUMNS", e.g. "16x16" or
            "128x1": whole blocks of the grid, kept or masked, and at most one kept in part, so that the count is exact.

        Raises
        ------
        UserError
            If `sparsity` is outside [0, 1], `seed` or a side no whole number, or too small, or `fits` no such form.
        """
        shape = _sides(shape)
        check_whole("seed", seed, least=0)
        numel = shape[0] * shape[1]
        keep = kept_count(numel, sparsity, truncate)
        if fits is not None:
            fitting = mask_forms.draw(shape, keep, fits, np.random.default_rng(seed))
            if fitting is not None:
                return cls.from_mask(fitting)
            log.warning("no mask of %d x %d that keeps %d weights fits %s: it is drawn without.", *shape, keep, fits)
        mask = np.zeros(numel, dtype=bool)
        mask[np.random.default_rng(seed).choice(numel, keep, replace=False, shuffle=False)] = True
        return cls(shape, pack(mask))

    @classmethod
    def from_mask(cls, mask: torch.Tensor | np.ndarray) -> Pattern:
        """Pattern of a boolean matrix [out_features, in_features]; True means kept.

        Raises
        ------
        UserError
            If `mask` is not a two-dimensional boolean array.
        """
        if isinstance(mask, torch.Tensor):
            if mask.layout != torch.strided or mask.dtype != torch.bool or mask.is_meta:
                what = f"{mask.dtype}, {mask.layout}, on {mask.device}".replace("torch.", "")
                raise UserError(f"a mask must be a boolean matrix [out, in], got {what}.")
            mask = mask.detach().cpu().numpy()
        array = np.asarray(mask)
        if array.ndim != 2 or array.dtype != np.bool_:
            raise UserError(f"a mask must be a boolean matrix [out, in], got {array.dtype} of shape {array.shape}.")
        return cls((array.shape[0], array.shape[1]), pack(array))

    @classmethod
    def from_positions(
        cls, shape: tuple[int, int], rows: np.ndarray, columns: np.ndarray, where: str = "positions", *,
        unique: bool = False,
    ) -> Pattern:  # fmt: skip
        """Pattern that keeps the positions (rows[i], columns[i]), in any order.

        Raises
        ------
        UserError
            Beginning with `where`, if one lies outside the shape or, with `unique`, comes twice.
        """
        shape = _sides(shape)
        for name, indices, size in (("row", rows, shape[0]), ("column", columns, shape[1])):
            if len(indices) and not (0 <= indices.min() and indices.max() < size):
                raise UserError(f"{where}: a {name} index lies outside of 0 to {size - 1}.")
        mask = np.zeros(shape, dtype=bool)
        mask[rows, columns] = True
        if unique and np.count_nonzero(mask) != len(rows):
            raise UserError(f"{where}: {len(rows) - np.count_nonzero(mask)} positions come more than once.")
        return cls(shape, pack(mask))

    @classmethod
    def from_sparse(cls, matrix: Any) -> Pattern:
        """Pattern of the entries that a sparse matrix [out_features, in_features] stores, explicit zeros included.

        Parameters
        ----------
        matrix : torch.Tensor of layout COO, CSR, CSC, BSR or BSC, or any scipy.sparse matrix or array
            Of blocks all entries count as stored.

        Raises
        ------
        UserError
            If it is no sparse matrix of two dimensions, or its indices do not fit its shape.
        """
        if isinstance(matrix, torch.Tensor) and matrix.layout != torch.strided:
            if matrix.dim() != 2 or matrix.dense_dim():
                raise UserError(f"a sparse tensor of shape {tuple(matrix.shape)}: expected a matrix (out, in).")
            return cls.from_mask(mask_tensors.stored(matrix.detach().cpu()))
        if not hasattr(matrix, "tocoo") or getattr(matrix, "ndim", 0) != 2:
            what = f"a dense tensor of {matrix.dtype}" if isinstance(matrix, torch.Tensor) else type(matrix).__name__
            raise UserError(f"expected a sparse matrix of torch or scipy, got {what}; Pattern.from_mask takes masks.")
        try:
            if hasattr(matrix, "check_format"):
                matrix.check_format(full_check=True)  # what scipy does with wrong indices reaches beyond its memory
            entries = matrix.tocoo()
        except ValueError as error:
            raise UserError(f"a sparse matrix whose indices do not fit it: {error}.") from None
        return cls.from_positions(entries.shape, entries.row, entries.col, "a sparse matrix")

    @classmethod
    def read(cls, path: str | PathLike[str], *, name: str | None = None) -> Pattern:
        """The mask in a file, whoever wrote it, or of a layer in a folder.

        Takes ``.smtx`` (DLMC), ``.mtx`` (Matrix Market, symmetric ones made whole), ``.npz`` (scipy.sparse, arrays of
        booleans or of 0 and 1, a run's masks), ``.pt`` and ``.safetensors`` (one mask or many; ``NAME_mask`` beside
        NAME, torch.nn.utils.prune's and torchao's forms, sparse tensors, NaN or zeros in the place of masked weights),
        a Hugging Face folder, a run directory (its first masks) or a checkpoint of one. No code in a file is run.

        Parameters
        ----------
        path : str or path
        name : str, optional
            Of the layer or tensor, where there are several; ``.weight`` behind it, and what stands before it in the
            file alone, may be left away.

        Returns
        -------
        Pattern, shape (out_features, in_features)
            Rows of a matrix are output features; weights that lie [in, out], as GPT-2's Conv1D has them, are turned.

        Raises
        ------
        UserError
            If there is no mask of that name, more than one without a name, or the file is damaged, too large for what
            it holds, or of another kind; the message names the form that was expected.
        """
        return import_module("vspdf.interop.mask_files").read(path, name)

    def write(self, path: str | PathLike[str]) -> None:
        """Writes the mask as ``.smtx``, ``.mtx``, ``.npz`` (scipy.sparse), ``.pt`` or ``.safetensors``.

        The latter two hold a boolean tensor, in ``.safetensors`` by the name "mask".

        Raises
        ------
        UserError
            If the name ends in something else, or the file cannot be written.
        """
        import_module("vspdf.interop.mask_files").write(self, path)

    @classmethod
    def topk(cls, weight: torch.Tensor, sparsity: float, *, truncate: bool = False) -> Pattern:
        """Positions of the largest magnitudes of a matrix [out_features, in_features]; of equal ones the first.

        Raises
        ------
        UserError
            If `sparsity` is outside [0, 1], or `weight` no matrix of finite numbers.
        """
        order = mask_tensors.by_magnitude(weight)
        mask = np.zeros(len(order), dtype=bool)
        mask[order[: kept_count(len(order), sparsity, truncate)]] = True
        return cls((weight.shape[0], weight.shape[1]), pack(mask))

    @classmethod
    def checkerboard(cls, shape: tuple[int, int], sparsity: float, *, truncate: bool = False) -> Pattern:
        """Positions at equal distances, each row shifted by one against the row above: at 50 % a chessboard.

        Raises
        ------
        UserError
            If `sparsity` is outside [0, 1] or a side is below 1.
        """
        shape = _sides(shape)
        keep = kept_count(shape[0] * shape[1], sparsity, truncate)
        return cls(shape, pack(mask_forms.checkerboard(shape, keep)))

    def grow(self, sparsity: float, seed: int = 0) -> Pattern:
        """This pattern plus random positions, until its sparsity is `sparsity`; no position is dropped.

        Raises
        ------
        UserError
            If that would need fewer positions than are kept now, or `seed` is no whole number of at least 0.
        """
        check_whole("seed", seed, least=0)
        add = kept_count(self.numel, sparsity) - self.nnz
        now = f"a pattern can only grow: its sparsity is {self.sparsity:.6g}"
        require(add >= 0, f"{now}, {sparsity} would drop weights.")
        flat = self._flat()
        flat[np.random.default_rng(seed).choice(np.flatnonzero(~flat), add, replace=False, shuffle=False)] = True
        return Pattern(self.shape, pack(flat))

    def exchange(
        self, drop: Sequence[int] | np.ndarray | torch.Tensor, add: Sequence[int] | np.ndarray | torch.Tensor
    ) -> Pattern:
        """This pattern without the positions `drop` and with the positions `add`; the count of kept weights may change.

        Parameters
        ----------
        drop, add : sequence, array or tensor of int, one-dimensional
            Flat row-major positions, ``row · in_features + column``, in any order: of kept weights, and of masked ones
            or of such as are dropped too (which then stay).

        Raises
        ------
        UserError
            If a position is out of range, given twice, not there to be dropped, or there already.
        """
        flat = self._flat()
        for name, given, before, what in (("drop", drop, True, "masked"), ("add", add, False, "kept")):
            positions, count = self._positions(name, given), np.count_nonzero(flat)
            if (wrong := flat[positions] != before).any():
                raise UserError(f"`{name}`: position {positions[wrong][0]} is {what} already.")
            flat[positions] = not before
            if abs(np.count_nonzero(flat) - count) < len(positions):
                twice = int(np.argmax(np.bincount(positions) > 1))
                raise UserError(f"`{name}` has position {twice} twice.")
        return Pattern(self.shape, pack(flat))

    def _positions(self, name: str, given: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
        """Flat positions within the matrix, as int64."""
        found = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
        if found.ndim != 1 or not (found.size == 0 or np.issubdtype(found.dtype, np.integer)):
            raise UserError(f"`{name}` must be a list of flat positions, not {found.dtype} of shape {found.shape}.")
        if found.size and not 0 <= found.min() <= found.max() < self.numel:
            raise UserError(
                f"`{name}`: positions lie between 0 and {self.numel - 1}, not {found.min()} to {found.max()}."
            )
        return found.astype(np.int64)

    @staticmethod
    def find(digest: str) -> Pattern:
        """The living pattern with this digest: how it travels through custom operators, which take no objects.

        Raises
        ------
        UserError
            If no such pattern is alive.
        """
        try:
            return _alive[digest]
        except KeyError:
            raise UserError(
                "a sparse layer's pattern is not alive in this process. Of a model that was exported or traced: keep, "
                "or load first, the model that it was made from, or densify before exporting."
            ) from None

    @property
    def out_features(self) -> int:
        """Rows of the dense weight matrix."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the dense weight matrix."""
        return self.shape[1]

    @property
    def numel(self) -> int:
        """All positions of the matrix, kept or not."""
        return self.shape[0] * self.shape[1]

    @property
    def density(self) -> float:
        """The fraction of positions that is kept."""
        return self.nnz / self.numel

    @property
    def sparsity(self) -> float:
        """The fraction of positions that is not kept."""
        return 1 - self.density

    def derived(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` derives from this pattern: made at first use, then kept in `packed` under `key`."""
        if (found := self.packed.get(key)) is None:
            found = self.packed.setdefault(key, make())  # of two threads that make it, both get the same
        return found

    def _flat(self) -> np.ndarray:
        return unpack(self.bits, self.numel)

    def mask(self) -> torch.Tensor:
        """Boolean tensor [out_features, in_features] on the CPU; True means kept."""
        return torch.from_numpy(self._flat().reshape(self.shape))

    def positions(self) -> torch.Tensor:
        """Row-major flat indices of the kept weights, int64, shape (nnz,)."""
        return torch.from_numpy(np.flatnonzero(self._flat()))

    def csr(self) -> tuple[np.ndarray, np.ndarray]:
        """Row pointers int64 [out_features + 1] and column indices int32 [nnz], sorted within each row."""
        mask = self._flat().reshape(self.shape)
        rows = np.zeros(self.out_features + 1, dtype=np.int64)
        np.cumsum(np.count_nonzero(mask, axis=1), out=rows[1:])
        return rows, np.nonzero(mask)[1].astype(np.int32)

    def issuperset(self, other: Pattern) -> bool:
        """Tells whether every position of `other` is kept here too."""
        return self.shape == other.shape and not np.any(other.bits & ~self.bits)

    def __copy__(self) -> Pattern:
        return self

    def __deepcopy__(self, memo: dict) -> Pattern:
        return self

    def __reduce__(self):
        return Pattern, (self.shape, self.bits)

    def __repr__(self) -> str:
        return f"Pattern({self.shape[0]}x{self.shape[1]}, nnz={self.nnz}, sparsity={self.sparsity:.4g})"
