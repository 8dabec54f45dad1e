"""The masks file of a run directory: each sparse layer's bits and shape by name. NumPy alone, without torch."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from vspdf.errors import UserError

if TYPE_CHECKING:
    from vspdf.pattern import Pattern

_SHAPE = ".shape"


class Masks(Mapping[str, np.ndarray]):
    """Masks by layer: bool [out_features, in_features], True for kept, unpacked when looked at.

    Attributes
    ----------
    bits : dict of str to (shape, uint8 array)
        As a `vspdf.Pattern` holds them.
    """

    def __init__(self, bits: Mapping[str, tuple[tuple[int, int], np.ndarray]]) -> None:
        self.bits = dict(bits)

    def __getitem__(self, name: str) -> np.ndarray:
        (rows, columns), bits = self.bits[name]
        return np.unpackbits(bits, count=rows * columns, bitorder="little").view(np.bool_).reshape(rows, columns)

    def __iter__(self) -> Iterator[str]:
        return iter(self.bits)

    def __len__(self) -> int:
        return len(self.bits)


def packed(patterns: Mapping[str, Pattern]) -> bytes:
    """Content of a file with the positions of sparse layers, by name."""
    arrays: dict[str, np.ndarray] = {}
    for name, pattern in patterns.items():
        arrays[name] = pattern.bits
        arrays[name + _SHAPE] = np.array(pattern.shape, dtype=np.int64)
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def read(path: Path) -> Masks:
    """Reads what `packed` packed; without the file, no layer has a mask.

    Raises
    ------
    UserError
        If the file is damaged.
    """
    if not path.exists():
        return Masks({})
    found = {}
    try:
        with np.load(path) as arrays:
            for name in (name for name in arrays.files if not name.endswith(_SHAPE)):
                rows, columns = (int(n) for n in arrays[name + _SHAPE])
                bits = arrays[name]
                if bits.dtype != np.uint8 or bits.shape != ((rows * columns + 7) // 8,):
                    raise ValueError(f"'{name}' is no mask of {rows} x {columns}")
                found[name] = ((rows, columns), bits)
    except (ValueError, KeyError, OSError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    return Masks(found)
