"""Which weights exist: the one home of positions.

A pattern is immutable and small: one bit per position of the dense weight matrix. What the kernels derive from it (row
pointers, packed order, generated code) they keep in `Pattern.packed`.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from vspdf.errors import UserError

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
    if not 0 <= sparsity <= 1:
        raise UserError(f"sparsity must lie in [0, 1], not {sparsity}.")
    if truncate:
        return int((1 - sparsity) * numel)
    # The decimal as written (0.9), not its binary neighbour, so that ties round as on paper.
    return numel - round(Fraction(repr(float(sparsity))) * numel)


def _sides(shape: tuple[int, int]) -> tuple[int, int]:
    out_features, in_features = (int(n) for n in shape)
    if out_features < 1 or in_features < 1:
        raise UserError(f"a pattern's shape is (out_features, in_features), both at least 1, not {tuple(shape)}.")
    return out_features, in_features


class Pattern:
    """Positions of the weights that exist in a matrix of shape (out_features, in_features).

    Equal patterns are one object while alive (`digest` identifies it), copies are the object itself, and pickling
    carries shape and bits only. Make one with `random` or `from_mask`, or of stored `bits`.

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
        What backends derived from this pattern, by backend name.
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
        bits = np.array(bits, dtype=np.uint8)  # its own: the caller's memory may change
        if bits.shape != ((numel + 7) // 8,):
            raise UserError(
                f"a pattern of shape {shape} needs {(numel + 7) // 8} bytes of bits, got them as {bits.shape}."
            )
        if numel % 8 and bits[-1] >> (numel % 8):
            raise UserError("a pattern's unused trailing bits must be zero.")
        digest = hashlib.blake2b(repr(shape).encode() + bits.tobytes(), digest_size=16).hexdigest()
        with _making:  # two threads must not make two of one pattern
            self = _alive.get(digest)
            if self is None:
                self = super().__new__(cls)
                bits.setflags(write=False)
                self.shape, self.bits, self.digest = shape, bits, digest
                self.nnz = int(np.count_nonzero(np.unpackbits(bits)))
                self.packed = {}
                _alive[digest] = self
        return self

    @classmethod
    def random(cls, shape: tuple[int, int], sparsity: float, seed: int = 0, *, truncate: bool = False) -> Pattern:
        """Static random unstructured mask of ``numel − round(sparsity · numel)`` weights (SPDF, arXiv:2303.10464).

        Parameters
        ----------
        shape : (out_features, in_features)
        sparsity : float in [0, 1]
        seed : int
            The same seed, shape and sparsity give the same mask.
        truncate : bool
            How kept weights are counted, see `kept_count`.

        Raises
        ------
        UserError
            If `sparsity` is outside [0, 1] or a side is below 1.
        """
        shape = _sides(shape)
        numel = shape[0] * shape[1]
        keep = kept_count(numel, sparsity, truncate)
        mask = np.zeros(numel, dtype=bool)
        mask[np.random.default_rng(seed).choice(numel, keep, replace=False, shuffle=False)] = True
        return cls(shape, np.packbits(mask, bitorder="little"))

    @classmethod
    def from_mask(cls, mask: torch.Tensor | np.ndarray) -> Pattern:
        """Pattern of a boolean matrix [out_features, in_features]; True means kept.

        Raises
        ------
        UserError
            If `mask` is not a two-dimensional boolean array.
        """
        array = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
        if array.ndim != 2 or array.dtype != np.bool_:
            raise UserError(f"a mask must be a boolean matrix [out, in], got {array.dtype} of shape {array.shape}.")
        return cls((array.shape[0], array.shape[1]), np.packbits(array.reshape(-1), bitorder="little"))

    @classmethod
    def topk(cls, weight: torch.Tensor, sparsity: float, *, truncate: bool = False) -> Pattern:
        """Positions of the largest magnitudes of a matrix [out_features, in_features]; of equal ones the first.

        Raises
        ------
        UserError
            If `sparsity` is outside [0, 1].
        """
        shape = _sides((weight.shape[0], weight.shape[1]))
        keep = kept_count(weight.numel(), sparsity, truncate)
        mask = np.zeros(weight.numel(), dtype=bool)
        mask[np.argsort(-weight.detach().abs().float().cpu().numpy().reshape(-1), kind="stable")[:keep]] = True
        return cls(shape, np.packbits(mask, bitorder="little"))

    @classmethod
    def checkerboard(cls, shape: tuple[int, int], sparsity: float, *, truncate: bool = False) -> Pattern:
        """Positions at equal distances, each row shifted by one against the row above: at 50 % a chessboard.

        Raises
        ------
        UserError
            If `sparsity` is outside [0, 1] or a side is below 1.
        """
        rows, columns = shape = _sides(shape)
        numel = rows * columns
        keep = kept_count(numel, sparsity, truncate)
        i = np.arange(numel, dtype=np.int64)
        even = ((i + 1) * keep // numel > i * keep // numel).reshape(shape)
        turned = (np.arange(columns) + np.arange(rows)[:, None]) % columns
        return cls(shape, np.packbits(np.take_along_axis(even, turned, axis=1).reshape(-1), bitorder="little"))

    def grow(self, sparsity: float, seed: int = 0) -> Pattern:
        """This pattern plus random positions, until its sparsity is `sparsity`; no position is dropped.

        Raises
        ------
        UserError
            If that would need fewer positions than are kept now.
        """
        add = kept_count(self.numel, sparsity) - self.nnz
        if add < 0:
            raise UserError(
                f"a pattern can only grow: its sparsity is {self.sparsity:.6g}, {sparsity} would drop weights."
            )
        flat = self._flat()
        flat[np.random.default_rng(seed).choice(np.flatnonzero(~flat), add, replace=False, shuffle=False)] = True
        return Pattern(self.shape, np.packbits(flat, bitorder="little"))

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
        return Pattern(self.shape, np.packbits(flat, bitorder="little"))

    def _positions(self, name: str, given: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
        """Flat positions within the matrix, as int64."""
        found = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
        if found.ndim != 1 or not (found.size == 0 or np.issubdtype(found.dtype, np.integer)):
            raise UserError(f"`{name}` must be a list of flat positions, not {found.dtype} of shape {found.shape}.")
        found = found.astype(np.int64)
        if found.size and not 0 <= found.min() <= found.max() < self.numel:
            raise UserError(
                f"`{name}`: positions lie between 0 and {self.numel - 1}, not {found.min()} to {found.max()}."
            )
        return found

    @staticmethod
    def find(digest: str) -> Pattern:
        """The living pattern with this digest: how it travels through custom operators, which take no objects.

        Raises
        ------
        KeyError
            If no such pattern is alive.
        """
        return _alive[digest]

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

    def _flat(self) -> np.ndarray:
        return np.unpackbits(self.bits, count=self.numel, bitorder="little").view(np.bool_)

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
