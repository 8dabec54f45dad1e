"""Digests by which damage is noticed: of a JSON body within itself, of a file, of one that grows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def of_body(body: Mapping[str, Any]) -> str:
    """SHA-256 of what a JSON file holds."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def of_file(path: Path, length: int | None = None) -> str:
    """SHA-256 of a file, or of its first `length` bytes."""
    digest, left = hashlib.sha256(), float("inf") if length is None else length
    with path.open("rb") as stream:
        while block := stream.read(int(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


class Digest:
    """Length and SHA-256 of a file that grows."""

    def __init__(self, content: bytes = b"") -> None:
        self._hash, self.bytes = hashlib.sha256(), 0
        self.grow(content)

    def grow(self, content: bytes) -> None:
        """Takes in what was appended."""
        self._hash.update(content)
        self.bytes += len(content)

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint's state keeps it."""
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}
