"""Masks as PNG files: read back by hand, every chunk and every bit."""

import base64
import struct
import zlib

import numpy as np
import pytest

from vspdf.draw import png


@pytest.mark.parametrize("shape", [(8, 8), (3, 13), (1, 1)], ids=str)
def test_a_mask_survives_its_png(shape):
    mask = np.random.default_rng(0).random(shape) < 0.5
    content = base64.b64decode(png.mask_png(mask, (1, 2, 3)).partition(",")[2])
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, i = {}, 8
    while i < len(content):
        (size,) = struct.unpack_from(">I", content, i)
        kind, data = content[i + 4 : i + 8], content[i + 8 : i + 8 + size]
        assert struct.unpack_from(">I", content, i + 8 + size)[0] == zlib.crc32(kind + data)
        chunks[kind], i = data, i + 12 + size
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (shape[1], shape[0], 1, 3, 0, 0, 0)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8).reshape(shape[0], -1)
    assert not rows[:, 0].any()
    assert np.array_equal(np.unpackbits(rows[:, 1:], axis=1, count=shape[1]).astype(bool), mask)
