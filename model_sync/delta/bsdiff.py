"""`bsdiff`: regions that match roughly wherever they moved to, added bytewise; for shifted files with small changes.

Format and method: Colin Percival, "Naive differences of executable code" (2003), BSDIFF40. The publisher needs the
package bsdiff4, the node only what is here: every length is checked before memory is taken.
"""

from __future__ import annotations

import bz2

import numpy as np

from model_sync.delta.limits import inflate, refused

SIZE_BYTES_MAX = 64 * 1024 * 1024
"""The suffix sort takes some 17 times the old file: larger ones are not tried."""
BYTES_PER_STEP_MIN = 8
"""A payload may copy pieces that are this short on average; each costs the node about two microseconds."""
_MAGIC = b"BSDIFF40"
_HEADER_SIZE_BYTES = 32
_STEP_SIZE_BYTES = 24


def encode(old: bytes, new: bytes) -> bytes:
    """Difference in the format BSDIFF40.

    Raises:
        ImportError: without the package bsdiff4.
    """
    import bsdiff4

    payload: bytes = bsdiff4.diff(old, new)
    return payload


def decode(payload: bytes, old: bytes, size_bytes: int) -> bytes:
    """The new file of exactly `size_bytes`."""
    if payload[:8] != _MAGIC or len(payload) < _HEADER_SIZE_BYTES:
        raise refused("it is no BSDIFF40")
    steps_size, diff_size, new_size = _integers(payload[8:_HEADER_SIZE_BYTES]).tolist()
    diff_at = _HEADER_SIZE_BYTES + steps_size
    extra_at = diff_at + diff_size
    if new_size != size_bytes or not _HEADER_SIZE_BYTES <= diff_at <= extra_at <= len(payload):
        raise refused("its header contradicts the signed size or its own")
    steps_max = 1 + size_bytes // BYTES_PER_STEP_MIN
    packed = inflate(bz2.BZ2Decompressor(), payload[_HEADER_SIZE_BYTES:diff_at], steps_max * _STEP_SIZE_BYTES)
    steps = _integers(packed).reshape(-1, 3)
    added, copied = steps[:, 0], steps[:, 1]
    if len(steps) and (min(added.min(), copied.min()) < 0 or max(added.max(), copied.max()) > size_bytes):
        raise refused("a step has an impossible length")
    if int(added.sum() + copied.sum()) != size_bytes:
        raise refused("its steps do not make the signed size")
    diff = inflate(bz2.BZ2Decompressor(), payload[diff_at:extra_at], int(added.sum()))
    extra = inflate(bz2.BZ2Decompressor(), payload[extra_at:], int(copied.sum()))
    if len(diff) + len(extra) != size_bytes:
        raise refused("its pieces are cut")
    return _replay(steps.tolist(), old, diff, extra)


def _replay(steps: list[list[int]], old: bytes, diff: bytes, extra: bytes) -> bytes:
    base, change = np.frombuffer(old, np.uint8), np.frombuffer(diff, np.uint8)
    new = np.empty(len(diff) + len(extra), np.uint8)
    fresh = memoryview(extra)
    view = new.data
    at = base_at = diff_at = extra_at = 0
    for added, copied, seek in steps:
        if not 0 <= base_at <= len(old) - added:
            raise refused("a step leaves the base")
        np.add(base[base_at : base_at + added], change[diff_at : diff_at + added], out=new[at : at + added])
        at, diff_at = at + added, diff_at + added
        view[at : at + copied] = fresh[extra_at : extra_at + copied]
        at, extra_at = at + copied, extra_at + copied
        base_at += added + seek
    return new.tobytes()


def _integers(data: bytes) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Little-endian sign and magnitude, 64 bits each."""
    raw = np.frombuffer(data, "<u8")
    magnitude = (raw & np.uint64(2**63 - 1)).astype(np.int64)
    return np.where(raw >> np.uint64(63), -magnitude, magnitude)
