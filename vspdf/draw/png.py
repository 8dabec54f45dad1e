"""Masks and maps as tiny PNGs in ``data:`` URIs, a pixel a value."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np


def mask_png(mask: np.ndarray, rgb: tuple[int, int, int]) -> str:
    """A boolean matrix as a ``data:`` URI of a PNG: `rgb` where true, transparent elsewhere; one bit a pixel."""
    rows, columns = mask.shape
    packed = np.packbits(mask, axis=1)  # PNG has the first pixel in the highest bit
    palette = ((b"PLTE", bytes((0, 0, 0, *rgb))), (b"tRNS", bytes((0, 255))))
    return _png(columns, rows, depth=1, kind=3, lines=packed, before=palette)


def rgba_png(pixels: np.ndarray) -> str:
    """Colours uint8 [row, column, (red, green, blue, alpha)] as a ``data:`` URI of a PNG."""
    rows, columns, _ = pixels.shape
    return _png(columns, rows, depth=8, kind=6, lines=pixels)


def _png(
    columns: int, rows: int, *, depth: int, kind: int, lines: np.ndarray, before: Sequence[tuple[bytes, bytes]] = ()
) -> str:
    content = b"".join(b"\0" + line.tobytes() for line in lines)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, depth, kind, 0, 0, 0)),
        *before,
        (b"IDAT", zlib.compress(content, 9)),
        (b"IEND", b""),
    )
    body = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return "data:image/png;base64," + base64.b64encode(body).decode()
