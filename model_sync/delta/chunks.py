"""`chunks`: for bases that the publisher does not know. The payload says which chunks make the file, in their order.

Cut points depend on content alone (FastCDC: Xia et al., "The Design of Fast Content-Defined Chunking for Data
Deduplication Based Storage Systems", 2020), so a node that cuts any old file finds the same chunks in it; what it lacks
it fetches by range from the full blob. Both sides need the package pyfastcdc.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from model_sync.delta.limits import ReadRange, blank, refused

SIZE_BYTES_MIN, SIZE_BYTES_AVERAGE, SIZE_BYTES_MAX = 2 * 1024, 8 * 1024, 64 * 1024
"""Of one chunk; with the minimum skipped over, chunks come to some 10 KiB."""
RANGE_SIZE_BYTES_MAX = 4 * 1024 * 1024
RANGES_MAX = 1024
"""A file in more pieces than this costs more in round trips than it saves."""
_DIGEST_SIZE_BYTES = 16
_ENTRY = np.dtype([("digest", f"V{_DIGEST_SIZE_BYTES}"), ("size_bytes", "<u4")])


def encode(new: bytes) -> bytes:
    """The list of chunks: 20 bytes each.

    Raises:
        ImportError: without the package pyfastcdc.
    """
    found = [(digest, size_bytes) for digest, _, size_bytes in _cut(new)]
    return np.array(found, _ENTRY).tobytes()


def find_lacking(payload: bytes, old: bytes, size_bytes: int) -> list[tuple[int, int]] | None:
    """Start and size of the parts of the new file that `old` does not hold; None if they are too many.

    Raises:
        MeshError: UNTRUSTED if the payload does not describe a file of `size_bytes`.
    """
    lacking = _lay(payload, old, size_bytes)[1]
    return lacking if len(lacking) <= RANGES_MAX else None


def decode(payload: bytes, old: bytes, size_bytes: int, read_range: ReadRange | None) -> bytes:
    """The new file of exactly `size_bytes`; what `find_lacking` says is read, in that order."""
    found, lacking = _lay(payload, old, size_bytes)
    if lacking and (read_range is None or len(lacking) > RANGES_MAX):
        raise refused(f"the files at hand lack {len(lacking)} of its pieces")
    result = blank(size_bytes)
    with result.getbuffer() as new:
        for at, start, size in found:
            new[at : at + size] = old[start : start + size]
        for at, size in lacking:
            assert read_range is not None
            piece = read_range(at, size)
            if len(piece) != size:
                raise refused("a source answered with another range")
            new[at : at + size] = piece
    return result.getvalue()


def _lay(payload: bytes, old: bytes, size_bytes: int) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
    """Chunks of the new file that `old` holds: start, start in `old`, size. And the rest in ranges: start, size."""
    entries = np.frombuffer(payload, _ENTRY)
    sizes = entries["size_bytes"].astype(np.int64)
    if int(sizes.sum()) != size_bytes or (len(sizes) and not 0 < sizes.min() <= sizes.max() <= SIZE_BYTES_MAX):
        raise refused("its chunks do not make the signed size")
    at_hand = {digest: (start, size) for digest, start, size in _cut(old)}
    found: list[tuple[int, int, int]] = []
    lacking: list[tuple[int, int]] = []
    at = 0
    for digest, size in zip(entries["digest"].tolist(), sizes.tolist(), strict=True):
        start, size_found = at_hand.get(digest, (0, 0))
        if size_found == size:
            found.append((at, start, size))
        elif lacking and sum(lacking[-1]) == at and lacking[-1][1] + size <= RANGE_SIZE_BYTES_MAX:
            lacking[-1] = (lacking[-1][0], lacking[-1][1] + size)
        else:
            lacking.append((at, size))
        at += size
    return found, lacking


def _cut(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Digest, start and size of each chunk."""
    if not data:
        return
    import pyfastcdc

    cutter = pyfastcdc.FastCDC(SIZE_BYTES_AVERAGE, min_size=SIZE_BYTES_MIN, max_size=SIZE_BYTES_MAX)
    for chunk in cutter.cut_buf(data):
        yield hashlib.sha256(chunk.data).digest()[:_DIGEST_SIZE_BYTES], chunk.offset, chunk.length
