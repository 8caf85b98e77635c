"""The C library's heap in a process that loads and unloads models for months; a library without such knobs stays."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import Any

_LOG = logging.getLogger(__name__)
ARENAS_MAX = 2
"""glibc makes up to eight arenas per core, and each keeps what it was given; the loop and the threads share two."""
_M_ARENA_MAX = -8


def limit_arenas() -> None:
    """Bound how many heaps the process fragments; it counts for arenas that are made from now on."""
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None and not mallopt(_M_ARENA_MAX, ARENAS_MAX):
        _LOG.info("the C library takes no bound on its arenas")


def trim_heap() -> None:
    """Give freed memory back to the system. Walks the whole heap: not on the loop."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)
