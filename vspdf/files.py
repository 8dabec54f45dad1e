"""Where vspdf keeps what it can make again: token caches and the kernels' tuning table."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vspdf.errors import UserError

log = logging.getLogger("vspdf")


def user_cache() -> Path:
    """vspdf's folder in the user's cache, created if missing.

    ``$VSPDF_CACHE`` if set, else ``vspdf`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``. Where that cannot be written,
    a temporary folder that lasts as long as the process, and one line of warning.
    """
    try:
        folder = _wanted_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        return _temporary_folder(str(error))


def _wanted_folder() -> Path:
    if own := os.environ.get("VSPDF_CACHE"):
        return Path(own).expanduser()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))  # the standard says to ignore relative paths
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "vspdf"


_temporary: list[tempfile.TemporaryDirectory[str]] = []  # kept alive until the process ends


@cache
def _temporary_folder(why: str) -> Path:
    if not _temporary:
        _temporary.append(tempfile.TemporaryDirectory(prefix="vspdf-cache-"))
    folder = Path(_temporary[0].name)
    log.warning("Cache folder not writable (%s): using %s this time. Set VSPDF_CACHE to a writable one.", why, folder)
    return folder


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces a file at once, or leaves it as it was.

    Raises
    ------
    UserError
        If it cannot be written.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


@contextmanager
def new_whole(final: Path) -> Iterator[Path]:
    """A hidden draft beside `final`, to be filled in the block as a file or a folder, then flushed and renamed to it.

    Raises
    ------
    UserError
        If `final` exists already, or the disk is full or not writable; nothing is left behind then.
    """
    if final.is_symlink() or final.exists():
        raise UserError(f"'{final}' exists already: nothing is overwritten; name another or move it away.")
    draft = final.with_name(f".{final.name}.draft")
    try:
        remove(draft)
        final.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        for path in [*(draft.rglob("*") if draft.is_dir() else ()), draft]:
            flush(path)
        draft.rename(final)
        flush(final.parent)
    except (OSError, SafetensorError) as error:
        remove(draft)
        raise UserError(f"'{final}' was not written: {why_not(error)}.") from None
    except BaseException:
        remove(draft)
        raise


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def why_not(error: Exception) -> str:
    """Why something could not be written, in the user's words."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    return "no space left on the disk" if full else str(error)


def flush(path: Path) -> None:
    """Waits until a file or a folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot flush a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_json(text: str, what: str) -> Any:
    """Reads what a JSON text holds; `what` names it.

    Raises
    ------
    UserError
        If it is no JSON, nests too deep, or holds half a character or a number of thousands of digits.
    """
    try:
        body = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(body, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UserError(f"{what} is no JSON ({error}).") from None
    except RecursionError:
        raise UserError(f"{what} nests too deep.") from None
    except UnicodeEncodeError:
        raise UserError(f"{what} holds half a surrogate pair, expected valid Unicode.") from None
    except ValueError:  # Python's limit on digits
        raise UserError(f"{what} holds a number of too many digits.") from None
    return body


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON file that holds a mapping.

    Raises
    ------
    UserError
        If it does not, or cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None
    body = parse_json(text, str(file))
    if not isinstance(body, dict):
        raise UserError(f"{file} is no mapping of settings.")
    return body
