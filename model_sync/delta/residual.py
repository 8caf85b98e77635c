"""Residuals of bytes: `residual-bz2` and `residual-gaps`; for tensors of 8-bit numbers that stayed where they were.

Both tell new minus old, byte by byte, and differ in how they spell it: zig-zag through bz2, or signs beside magnitudes
through `symbols`.
"""

from __future__ import annotations

import bz2

import numpy as np

from model_sync.delta import symbols
from model_sync.delta.alignment import Bytes, add_base, find_split, lay_under, pieces
from model_sync.delta.limits import blank, inflate, refused
from model_sync.delta.symbols import Reader

_SPLIT_SIZE_BYTES = 8


def encode_bz2(old: bytes, new: bytes) -> bytes:
    """Zig-zag differences through bz2."""
    split, residual = _subtract(old, new)
    return split.to_bytes(_SPLIT_SIZE_BYTES, "little") + bz2.compress(zigzag(residual).tobytes())


def decode_bz2(payload: bytes, old: bytes, size_bytes: int) -> bytes:
    """The new file, of at most `size_bytes`."""
    stream = inflate(bz2.BZ2Decompressor(), payload[_SPLIT_SIZE_BYTES:], size_bytes)
    _restore(np.frombuffer(stream.getbuffer(), np.uint8), old, _split(payload, size_bytes))
    return stream.getvalue()


def _restore(residual: Bytes, old: bytes, split: int) -> None:
    for piece in pieces(len(residual)):
        residual[piece] = unzigzag(residual[piece])
    add_base(residual, np.frombuffer(old, np.uint8), min(split, len(residual)))


def encode_gaps(old: bytes, new: bytes) -> bytes:
    """Signs and magnitudes of the differences, piece by piece."""
    split, residual = _subtract(old, new)
    found = [split.to_bytes(_SPLIT_SIZE_BYTES, "little")]
    for piece in pieces(len(residual)):
        part = residual[piece]
        magnitudes = np.minimum(part, -part)
        signs = np.packbits(part[magnitudes != 0] > 127)
        found += [symbols.encode(magnitudes), symbols.pack(signs)]
    return b"".join(found)


def decode_gaps(payload: bytes, old: bytes, size_bytes: int) -> bytes:
    """The new file of exactly `size_bytes`."""
    reader = Reader(payload)
    split = _split(reader.take(_SPLIT_SIZE_BYTES), size_bytes)
    result = blank(size_bytes)
    _fill(np.frombuffer(result.getbuffer(), np.uint8), reader)
    add_base(np.frombuffer(result.getbuffer(), np.uint8), np.frombuffer(old, np.uint8), split)
    return result.getvalue()


def _fill(residual: Bytes, reader: Reader) -> None:
    for piece in pieces(len(residual)):
        magnitudes = symbols.decode(reader, piece.stop - piece.start)
        filled = np.flatnonzero(magnitudes)
        packed = symbols.unpack(reader, -(-len(filled) // 8))
        signs = np.unpackbits(packed, count=len(filled)).astype(bool)
        magnitudes[filled[signs]] *= np.uint8(255)
        residual[piece] = magnitudes
    reader.finish()


def zigzag(difference: Bytes) -> Bytes:
    """Small differences of either sign become small numbers: 0, -1, 1, -2 become 0, 1, 2, 3."""
    return (difference << np.uint8(1)) ^ (np.uint8(0) - (difference >> np.uint8(7)))


def unzigzag(symbols_: Bytes) -> Bytes:
    """The inverse of `zigzag`."""
    return (symbols_ >> np.uint8(1)) ^ (np.uint8(0) - (symbols_ & np.uint8(1)))


def _subtract(old: bytes, new: bytes) -> tuple[int, Bytes]:
    before, after = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
    split = find_split(before, after)
    return split, after - lay_under(before, len(after), split)


def _split(payload: bytes, size_bytes: int) -> int:
    split = int.from_bytes(payload[:_SPLIT_SIZE_BYTES], "little")
    if split > size_bytes:
        raise refused("its split lies behind the end")
    return split
