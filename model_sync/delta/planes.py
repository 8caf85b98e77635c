"""`residual-planes`: for tensors of 32- or 16-bit numbers. Whole words are subtracted as integers, the zig-zag of the
differences is told plane by plane, all highest bytes first: those are nearly all zero.

Tensors lie at any byte of a file, so each block has its own phase: where its words begin.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model_sync.delta import symbols
from model_sync.delta.alignment import Bytes, add_base, find_split, lay_under
from model_sync.delta.limits import PIECE_SIZE_BYTES, blank, refused
from model_sync.delta.symbols import Reader

BLOCK_SIZE_BYTES = 64 * 1024
"""Every block chooses its phase; neighbours of one phase are told together, up to `PIECE_SIZE_BYTES`."""
Words = NDArray[np.uint32] | NDArray[np.uint16]
_HEADER_SIZE_BYTES = 9
_WIDTHS = (4, 2)


def encode(old: bytes, new: bytes) -> bytes:
    """The smaller of the two widths."""
    after = np.frombuffer(new, np.uint8)
    before = np.frombuffer(old, np.uint8)
    split = find_split(before, after)
    under = lay_under(before, len(after), split)
    return min((_encode(under, after, split, width) for width in _WIDTHS), key=len)


def decode(payload: bytes, old: bytes, size_bytes: int) -> bytes:
    """The new file of exactly `size_bytes`."""
    reader = Reader(payload)
    width = reader.take(1)[0]
    split = int.from_bytes(reader.take(_HEADER_SIZE_BYTES - 1), "little")
    if width not in _WIDTHS or split > size_bytes:
        raise refused("its header is in no known form")
    result = blank(size_bytes)
    add_base(np.frombuffer(result.getbuffer(), np.uint8), np.frombuffer(old, np.uint8), split)
    _fill(np.frombuffer(result.getbuffer(), np.uint8), reader, width)
    return result.getvalue()


def _fill(new: Bytes, reader: Reader, width: int) -> None:
    at, left = 0, 1 + -(-len(new) // BLOCK_SIZE_BYTES)
    while at < len(new):
        length, left = reader.number(), left - 1
        if left < 0 or not 0 < length <= min(len(new) - at, PIECE_SIZE_BYTES):
            raise refused("its segments are too many or of an impossible length")
        segment = new[at : at + length]
        whole = length - length % width
        planes = [symbols.decode(reader, whole // width) for _ in range(width)]
        words = _words(segment[:whole], width)
        segment[:whole] = (words + _unzigzag(np.stack(planes, axis=1).reshape(-1).view(words.dtype))).view(np.uint8)
        segment[whole:] += np.frombuffer(reader.take(length - whole), np.uint8)
        at += length
    reader.finish()


def _encode(under: Bytes, new: Bytes, split: int, width: int) -> bytes:
    found = [bytes([width]), split.to_bytes(_HEADER_SIZE_BYTES - 1, "little")]
    for start, end in _segments(under, new, width):
        whole = end - (end - start) % width
        difference = _words(new[start:whole], width) - _words(under[start:whole], width)
        planes = _zigzag(difference).view(np.uint8).reshape(-1, width)
        found.append(symbols.number(end - start))
        found += [symbols.encode(np.ascontiguousarray(planes[:, plane])) for plane in range(width)]
        found.append((new[whole:end] - under[whole:end]).tobytes())
    return b"".join(found)


def _segments(under: Bytes, new: Bytes, width: int) -> list[tuple[int, int]]:
    """Start and end of runs of blocks whose words begin at the same phase."""
    segments: list[tuple[int, int]] = []
    first, last_phase = 0, -1
    for start in range(0, len(new), BLOCK_SIZE_BYTES):
        end = min(start + BLOCK_SIZE_BYTES, len(new))
        phase = min(range(width), key=lambda phase: _cost(under[start + phase : end], new[start + phase : end], width))
        cut = min(start + phase, len(new))
        is_full = start + BLOCK_SIZE_BYTES - first > PIECE_SIZE_BYTES - width
        if cut > first and (phase != last_phase or is_full):
            segments.append((first, cut))
            first = cut
        last_phase = phase
    return [*segments, (first, len(new))] if first < len(new) else segments


def _cost(under: Bytes, new: Bytes, width: int) -> float:
    """Bits that the differences take, roughly."""
    whole = len(new) - len(new) % width
    difference = _zigzag(_words(new[:whole], width) - _words(under[:whole], width))
    return float(np.log2(1.0 + difference).sum())


def _words(data: Bytes, width: int) -> Words:
    words: Words = np.frombuffer(data.tobytes(), f"<u{width}")
    return words


def _zigzag(difference: Words) -> Words:
    top = difference.dtype.type(difference.dtype.itemsize * 8 - 1)
    spread: Words = (difference << difference.dtype.type(1)) ^ np.negative(difference >> top)
    return spread


def _unzigzag(numbers: Words) -> Words:
    one = numbers.dtype.type(1)
    difference: Words = (numbers >> one) ^ np.negative(numbers & one)
    return difference
