"""One setting of the process's allocator, for programs that allocate the same large tensors at every step."""

from __future__ import annotations

import contextlib
import ctypes

# glibc, <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed instead of giving it back to the kernel.

    Activations are allocated anew at every step; faulting their pages in again costs about 5 % of a dense step and
    twice that of a sparse one. Does nothing where the C library is another.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
