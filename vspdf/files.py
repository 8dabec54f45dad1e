"""Files that are replaced whole or not at all, locks that end with their process, and the user's cache."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vspdf.errors import UserError

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None  # type: ignore[assignment]

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


def at_home(path: str | os.PathLike[str]) -> Path:
    """A path whose ``~`` or ``~user`` is that home.

    Raises
    ------
    UserError
        If there is no such user, or no home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"'{path}': there is no such home directory.") from None


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
    """Replaces a file at once, on disk, or leaves it as it was.

    Raises
    ------
    UserError
        If it cannot be written.
    """
    try:
        with draft(path) as whole:
            whole.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, where they are missing.

    Raises
    ------
    UserError
        If it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"'{path}' cannot be made: {error.strerror}.") from None


def must_be_new(path: Path) -> None:
    """Refuses to write where something is; drafts that a kill right after their renaming left beside it go.

    Raises
    ------
    UserError
        If something is there.
    """
    if path.is_symlink() or path.exists():
        _sweep(path.parent)
        raise UserError(f"'{path}' exists already: nothing is overwritten; name another or move it away.")


@contextmanager
def new_whole(final: Path) -> Iterator[Path]:
    """A path for a file or a folder that is new, to be filled in the block; see `draft`.

    Raises
    ------
    UserError
        If `final` exists already, or the disk is full or not writable; nothing is left behind then.
    """
    must_be_new(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with draft(final) as whole:
            yield whole
            must_be_new(final)  # another process may have been faster
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{final}' was not written: {why_not(error)}.") from None


_DRAFT = ".vspdf.draft"


@contextmanager
def draft(final: Path) -> Iterator[Path]:
    """A path to be filled in the block as a file or a folder; it is then flushed and renamed to `final`.

    It lies in a hidden folder beside `final`, of which nothing is left at the end. Those that killed processes left are
    removed on the way: nobody holds their lock.

    Raises
    ------
    OSError
        If it cannot be written: `final` is as it was.
    """
    _sweep(final.parent)
    folder, held = _draft_folder(final.parent)
    try:
        yield folder / "whole"
        for path in [*(folder / "whole").rglob("*"), folder / "whole"]:
            flush(path)
        (folder / "whole").replace(final)
        flush(final.parent)
    finally:
        remove(folder)
        if held is not None:
            os.close(held)


def _draft_folder(parent: Path) -> tuple[Path, int | None]:
    """A new folder for a draft, and the descriptor of its lock, where there are locks."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=".", suffix=_DRAFT, dir=parent))
        try:
            return folder, _locked(folder / "lock")
        except (FileNotFoundError, BlockingIOError):
            continue  # it was taken for one of a killed process before it was locked
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return folder, None
            remove(folder)
            raise


def _sweep(folder: Path) -> None:
    """Removes drafts of processes that are dead."""
    for left in folder.glob(f".*{_DRAFT}"):
        with contextlib.suppress(OSError):
            held = _locked(left / "lock")
            remove(left)
            os.close(held)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there and can be removed."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def why_not(error: Exception) -> str:
    """Why something could not be written, in the user's words."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    return "no space left on the disk" if full else str(error)


def flush(path: Path) -> None:
    """Waits until a file or a folder is on disk.

    Raises
    ------
    OSError
        If it never got there. File systems that cannot flush a folder are taken as they are.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno == errno.EIO or not path.is_dir():
            raise


# -- locks ------------------------------------------------------------------------------------------------------------

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def lock(path: Path, what: str, patience: float = 0.0) -> Iterator[int | None]:
    """Holds a lock file. The kernel lets go of it when the process ends, however it ends.

    Parameters
    ----------
    path : Path
        Made where it is missing, and removed at the end.
    what : str
        What is locked, as an error says it.
    patience : float
        Seconds to wait for a process that holds it.

    Yields
    ------
    int or None
        Its descriptor: a process that inherits it holds the lock too. None where there are no locks, which is said in a
        line of warning.

    Raises
    ------
    UserError
        If another process holds it.
    OSError
        If the file cannot be made.
    """
    held = _patiently_locked(path, what, patience)
    try:
        if held is not None:
            with contextlib.suppress(OSError):  # it only tells others whom they wait for
                os.ftruncate(held, 0)
                os.pwrite(held, str(os.getpid()).encode(), 0)
        yield held
    finally:
        if held is not None:
            with contextlib.suppress(OSError):
                if _same(path, held):
                    path.unlink()
            os.close(held)


def _patiently_locked(path: Path, what: str, patience: float) -> int | None:
    until, said = time.monotonic() + patience, False
    while True:
        try:
            return _locked(path)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise UserError(
                    f"{what} is in use{_holder(path)}: another process is at work there; wait for it or stop it."
                ) from None
            if not said:
                log.info("%s is in use%s: waiting.", what, _holder(path))
            said = True
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("%s cannot be locked (%s): let no other process write to it.", what, error.strerror)
            return None


def _locked(path: Path) -> int:
    """Descriptor of a lock file that nobody else holds now.

    Raises
    ------
    BlockingIOError
        If another process holds it.
    OSError
        If it cannot be made, or there are no locks.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(path, descriptor):  # else it was removed by the one who held it
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return f" by process {int(path.read_text())}"
    return ""


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
        raise UserError(f"{file} cannot be read: expected a JSON object.")
    return body
