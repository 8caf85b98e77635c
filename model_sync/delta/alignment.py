"""Which byte of the old file stands under which byte of the new one, for residuals.

Files of one exporter differ in length by a name or a date that grew, if at all. So the new file has one split: what is
before it lies under the old file's beginning, what is behind it under the old file's end.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from model_sync.delta.limits import PIECE_SIZE_BYTES

Bytes = NDArray[np.uint8]


def find_split(old: Bytes, new: Bytes) -> int:
    """Where to split the new file, so that the two are most alike."""
    if len(old) == len(new) or not len(old):
        return len(new)
    before = np.concatenate([[0], np.cumsum(_distance(new, lay_under(old, len(new), len(new))), dtype=np.int64)])
    behind = np.concatenate([[0], np.cumsum(_distance(new, lay_under(old, len(new), 0)), dtype=np.int64)])
    return int(np.argmin(before - behind))


def lay_under(old: Bytes, size_bytes: int, split: int) -> Bytes:
    """The old bytes under a new file of `size_bytes`; zero where there are none."""
    under = np.zeros(size_bytes, np.uint8)
    add_base(under, old, split)
    return under


def add_base(residual: Bytes, old: Bytes, split: int) -> None:
    """Turn byte differences into the new file, in place."""
    for start, old_start, length in _common(len(old), len(residual), split):
        residual[start : start + length] += old[old_start : old_start + length]


def pieces(size_bytes: int) -> Iterator[slice]:
    """A file in pieces that are worked on at once."""
    for start in range(0, size_bytes, PIECE_SIZE_BYTES):
        yield slice(start, min(size_bytes, start + PIECE_SIZE_BYTES))


def _common(old_size: int, new_size: int, split: int) -> Iterator[tuple[int, int, int]]:
    """Start in the new file, start in the old file and length, before and behind the split."""
    yield 0, 0, min(split, old_size)
    length = min(new_size - split, old_size)
    yield new_size - length, old_size - length, length


def _distance(new: Bytes, under: Bytes) -> Bytes:
    difference: Bytes = new - under
    smaller: Bytes = np.minimum(difference, -difference)
    return smaller
