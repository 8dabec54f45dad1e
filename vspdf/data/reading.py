"""Files of text, plain or gzipped; what is another kind of file is said to be one."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vspdf.errors import UserError

_GZIP = b"\x1f\x8b"
_OTHERS = {  # how a file begins: the first that matches counts
    rb"\x28\xb5\x2f\xfd": "zstd: unpack it with `zstd -d`, or use gzip",
    rb"BZh[1-9](1AY|\x17rE)": "bzip2: unpack it with `bunzip2`, or use gzip",
    rb"\xfd7zXZ": "xz: unpack it with `unxz`, or use gzip",
    rb"PK\x03\x04": "a ZIP archive: unpack it",
    rb"PAR1": "Parquet: write its rows as JSONL",
    rb"\xff\xfe\0\0|\0\0\xfe\xff": "UTF-32, not UTF-8: save it as UTF-8",
    rb"\xff\xfe|\xfe\xff": "UTF-16, not UTF-8: save it as UTF-8",
}
_AHEAD = 1 << 16  # bytes that tell how lines end
_GROWTH, _ROOM = 200, 64 << 20  # how much larger text may be than its gzip file


def ending(path: Path) -> str:
    """Returns a name's ending in lower case, of ``x.jsonl.gz`` that of what is inside."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader[Any]]:
    """Opens a file of text as bytes, unpacked.

    Raises
    ------
    UserError
        If it cannot be read, is damaged, of a kind that is no text, or a small file that unpacks without end.
    """
    try:
        with io.BufferedReader(open(path, "rb", buffering=0), _AHEAD) as file:
            head = file.peek(8)
            for magic, what in _OTHERS.items():
                if re.match(magic, head):
                    raise UserError(f"'{path}' is {what}.")
            if head.startswith(_GZIP):
                with gzip.open(file) as inside:
                    yield io.BufferedReader(_Unpacked(path, inside), _AHEAD)
            else:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"'{path}' is no whole gzip file: {error}.") from None
    except OSError as error:
        raise UserError(f"Cannot read '{path}' ({error.strerror}): expected a readable text file.") from None


class _Unpacked(io.RawIOBase):
    """What a gzip file holds, as long as it is not far more than the file."""

    def __init__(self, path: Path, stream: gzip.GzipFile) -> None:
        self._path, self._stream = path, stream
        self._left = max(_ROOM, _GROWTH * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        block = self._stream.read(len(buffer))
        self._left -= len(block)
        if self._left < 0:
            raise UserError(
                f"'{self._path}' unpacks to more than {_GROWTH} times its {self._path.stat().st_size:,} bytes: refused."
            )
        buffer[: len(block)] = block
        return len(block)


def line_end(text: str | bytes) -> str:
    r"""Returns how lines end: ``\n`` (``\r\n`` included), or a bare ``\r`` where there is no ``\n`` at all."""
    first = text[:-1] if isinstance(text, str) else text[:-1].decode("latin-1")  # the last may be half of \r\n
    return "\r" if "\r" in first and "\n" not in first and text[-1:] not in ("\n", b"\n") else "\n"


@contextmanager
def text_lines(path: Path) -> Iterator[tuple[io.TextIOWrapper, str]]:
    """Opens a file of UTF-8 to be read line by line, line ends as they are; and tells how its lines end."""
    with opened(path) as stream:
        end = line_end(stream.peek(_AHEAD))
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", newline=end), end


def whole_text(path: Path) -> str:
    """Reads a file of UTF-8.

    Raises
    ------
    UserError
        As `opened`, and if it is no UTF-8; the message names the line.
    """
    with opened(path) as stream:
        content = stream.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"'{path}' is not UTF-8 (line {line}): expected text.") from None
