"""The C library's heap in a process that handles large messages. Elsewhere than on glibc this is nothing."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

BLOCK_SIZE_BYTES = 32 * 1024 * 1024
"""Smallest block with pages of its own: the most that glibc takes, and where its own adaptation would end."""
TRIM_SIZE_BYTES = 2 * BLOCK_SIZE_BYTES
"""Free memory at the heap's end that is kept."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_pages() -> None:
    """Keep the pages of freed messages for the next ones: fresh pages cost more than the copies into them."""
    mallopt = getattr(c_library(), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, TRIM_SIZE_BYTES)
        mallopt(_M_MMAP_THRESHOLD, BLOCK_SIZE_BYTES)


@cache
def c_library() -> Any:
    """The C library of this process: to open it takes 0.1 ms, with the interpreter's lock held."""
    return ctypes.CDLL(None)
