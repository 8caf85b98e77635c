"""`bsdiff`: regions that match roughly wherever they moved to, added bytewise; for shifted files with small changes.

Format and method: Colin Percival, "Naive differences of executable code" (2003), BSDIFF40. The publisher needs the
package bsdiff4, the node only what is here: every length is checked before memory is taken.
"""

from __future__ import annotations

import bz2
import io
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from model_sync.delta.limits import Inflater, inflate, refused

SIZE_BYTES_MAX = 64 * 1024 * 1024
"""The suffix sort takes some 17 times the old file: larger ones are not tried."""
STEPS_MAX = 500_000
"""Each costs the node about two microseconds."""
_MAGIC = b"BSDIFF40"
_HEADER_SIZE_BYTES = 32
_STEP_SIZE_BYTES = 24
_STEPS_AT_ONCE = 4096


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
    if payload[:8] != _MAGIC or len(payload) < _HEADER_SIZE_BYTES or size_bytes > SIZE_BYTES_MAX:
        raise refused("it is no BSDIFF40 of a size that is allowed")
    steps_size, diff_size, new_size = _integers(payload[8:_HEADER_SIZE_BYTES]).tolist()
    diff_at = _HEADER_SIZE_BYTES + steps_size
    extra_at = diff_at + diff_size
    if new_size != size_bytes or not _HEADER_SIZE_BYTES <= diff_at <= extra_at <= len(payload):
        raise refused("its header contradicts the signed size or its own")
    packed = inflate(bz2.BZ2Decompressor(), payload[_HEADER_SIZE_BYTES:diff_at], STEPS_MAX * _STEP_SIZE_BYTES)
    steps = _integers(packed.getvalue()).reshape(-1, 3)
    lengths = steps[:, :2]
    if (lengths.size and (lengths.min() < 0 or lengths.max() > size_bytes)) or int(lengths.sum()) != size_bytes:
        raise refused("its steps do not make the signed size")
    diff = Inflater(bz2.BZ2Decompressor(), payload[diff_at:extra_at])
    extra = Inflater(bz2.BZ2Decompressor(), payload[extra_at:])
    new = _replay(steps, old, diff, extra)
    diff.finish()
    extra.finish()
    return new


def _replay(steps: NDArray[np.int64], old: bytes, diff: Inflater, extra: Inflater) -> bytes:
    base = np.frombuffer(old, np.uint8)
    result = io.BytesIO()
    base_at = 0
    for first in range(0, len(steps), _STEPS_AT_ONCE):
        for added, copied, seek in steps[first : first + _STEPS_AT_ONCE].tolist():
            if not 0 <= base_at <= len(old) - added:
                raise refused("a step leaves the base")
            for piece in _pieces(diff, added):
                result.write((base[base_at : base_at + len(piece)] + np.frombuffer(piece, np.uint8)).data)
                base_at += len(piece)
            for piece in _pieces(extra, copied):
                result.write(piece)
            base_at += seek
    return result.getvalue()


def _pieces(stream: Inflater, size_bytes: int) -> Iterator[bytes]:
    """The next `size_bytes` of a stream."""
    while size_bytes:
        piece = stream.read(size_bytes)
        if not piece:
            raise refused("its pieces are cut")
        yield piece
        size_bytes -= len(piece)


def _integers(data: bytes) -> NDArray[np.int64]:
    """Little-endian sign and magnitude, 64 bits each."""
    raw = np.frombuffer(data, "<u8")
    magnitude = (raw & np.uint64(2**63 - 1)).astype(np.int64)
    return np.where(raw >> np.uint64(63), -magnitude, magnitude)
