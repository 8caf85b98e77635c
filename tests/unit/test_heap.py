"""Much freed memory goes back to the system; a little is kept for the next model."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from nearcast.serving import heap

BLOCK_SIZE_BYTES = 16 * 1024
BLOCKS = 2048


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is looked after")
def test_only_much_free_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [b"x" * (BLOCK_SIZE_BYTES + index) for index in range(BLOCKS)]
    # Without a block at the heap's end glibc gives back on its own what lies before it.
    blocks, last = blocks[:-1], blocks[-1]
    freed = BLOCK_SIZE_BYTES * len(blocks)
    blocks.clear()
    before = resident_bytes()
    monkeypatch.setattr(heap, "FREE_SIZE_BYTES_MAX", 1 << 40)
    heap.trim_heap_if_large()
    assert before - resident_bytes() < 0.1 * freed
    monkeypatch.setattr(heap, "FREE_SIZE_BYTES_MAX", freed // 2)
    heap.trim_heap_if_large()
    assert before - resident_bytes() > 0.8 * freed
    assert last
