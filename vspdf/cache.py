"""Where vspdf keeps what it can make again: token caches and the kernels' tuning table."""

from __future__ import annotations

import logging
import os
import tempfile
from functools import cache
from pathlib import Path

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
