"""The C library's heap in a process that loads and unloads models for months. Elsewhere than on glibc all of this is
nothing.

Weights that lie between short-lived blocks leave holes that nobody fills, and each thread's arena has holes of its own:
a host grew by 4 to 7 kB with each reload. So there is one arena, and while a model loads, larger blocks get pages of
their own, which go back to the system when they are freed. At all other times they come from the heap, because a
request's 600 kB should not cost fresh pages each time.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from nearcast.runtime.heap import c_library, keep_pages

LOADING_BLOCK_SIZE_BYTES = 32 * 1024
"""Smallest block with pages of its own while a model loads."""
FREE_SIZE_BYTES_MAX = 16 * 1024 * 1024
"""Free memory that a host keeps when a model goes: the next one to come needs it, and to fetch its pages again costs
more than to keep them."""
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_turn = threading.Lock()
_loading = 0


@contextmanager
def own_pages() -> Iterator[None]:
    """While a model loads."""
    global _loading
    with _turn:
        _loading += 1
        _set(_M_MMAP_THRESHOLD, LOADING_BLOCK_SIZE_BYTES)
    try:
        yield
    finally:
        with _turn:
            _loading -= 1
            if not _loading:
                keep_pages()


def share_arena() -> None:
    """All threads that begin from now on share the first arena. They wait for each other less than for the GIL."""
    _set(_M_ARENA_MAX, 1)


def trim_heap() -> None:
    """Give freed memory back to the system. Walks the whole heap, which nobody can use meanwhile: not on the loop."""
    trim = getattr(c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def trim_heap_if_large() -> None:
    """The same if more than `FREE_SIZE_BYTES_MAX` is free: after each swap it would hold up those who are served."""
    count = getattr(c_library(), "mallinfo2", None)
    if count is not None:
        count.restype = _Counts
        if count().free <= FREE_SIZE_BYTES_MAX:
            return
    trim_heap()


class _Counts(ctypes.Structure):
    """The `struct mallinfo2` of glibc 2.33 and later."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (*"abcdefgh", "free", "at_end"))


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(c_library(), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
