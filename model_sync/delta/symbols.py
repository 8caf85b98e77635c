"""Streams of small numbers, most of them zero, near their order-0 entropy with nothing but zstd.

Huffman codes spend a whole bit on each zero. So a sparse stream is told by its gaps (how many zeros before each
non-zero, which Huffman codes do well) and by the non-zero numbers less one, which are a sparse stream again.
"""

from __future__ import annotations

import struct

import numpy as np

from model_sync.delta import full
from model_sync.delta.alignment import Bytes
from model_sync.delta.limits import refused
from model_sync.delta.zstd import CompressionParameter as Parameter
from model_sync.delta.zstd import Strategy, ZstdCompressor

DEPTH_MAX = 6
GAP_MAX = 255
"""This many zeros and no number after them."""
DENSITY_MAX = 0.75
"""Above it, gaps never pay."""
_ENTROPY_ONLY: dict[int, int] = {
    Parameter.compression_level: 13,
    Parameter.strategy: Strategy.btopt,
    Parameter.min_match: 6,
    Parameter.search_log: 2,
    Parameter.hash_log: 10,
    Parameter.chain_log: 10,
}
"""Weighs every match and seeks few: noise has none, and a false one costs more than plain Huffman codes."""
_LENGTH = struct.Struct("<I")
_DENSE, _SPARSE = 0, 1


class Reader:
    """Takes a payload apart; beyond its end there is nothing."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size_bytes: int) -> bytes:
        """The next bytes.

        Raises:
            MeshError: UNTRUSTED if there are fewer.
        """
        if self._at + size_bytes > len(self._data):
            raise refused("its payload is cut")
        piece = self._data[self._at : self._at + size_bytes]
        self._at += size_bytes
        return piece

    def number(self) -> int:
        """The next 32-bit number."""
        (number,) = _LENGTH.unpack(self.take(_LENGTH.size))
        return int(number)

    def finish(self) -> None:
        """Raises:
        MeshError: UNTRUSTED if anything is left.
        """
        if self._at != len(self._data):
            raise refused("something follows its payload")


def number(value: int) -> bytes:
    """A 32-bit number as `Reader.number` reads it."""
    return _LENGTH.pack(value)


def pack(data: Bytes) -> bytes:
    """A compressed stream and its length."""
    stream = ZstdCompressor(options=_ENTROPY_ONLY).compress(data.tobytes(), ZstdCompressor.FLUSH_FRAME)
    return number(len(stream)) + stream


def unpack(reader: Reader, size_bytes_max: int) -> Bytes:
    """One compressed stream of at most that many bytes; the result may be written to."""
    stream = full.inflate_frame(reader.take(reader.number()), size_bytes_max)
    return np.frombuffer(stream.getbuffer(), np.uint8)


def encode(symbols: Bytes, depth: int = 0) -> bytes:
    """The smaller of the dense and the sparse form."""
    dense = bytes([_DENSE]) + pack(symbols)
    places = np.flatnonzero(symbols)
    if depth == DEPTH_MAX or not 0 < len(places) <= DENSITY_MAX * len(symbols):
        return dense
    whole, rest = np.divmod(np.diff(places, prepend=-1) - 1, GAP_MAX)
    gaps = np.full(len(places) + int(whole.sum()), GAP_MAX, np.uint8)
    gaps[np.arange(len(places)) + np.cumsum(whole)] = rest
    sparse = bytes([_SPARSE]) + number(len(places)) + pack(gaps) + encode(symbols[places] - np.uint8(1), depth + 1)
    return min(dense, sparse, key=len)


def decode(reader: Reader, count: int, depth: int = 0) -> Bytes:
    """Exactly `count` symbols; they may be written to.

    Raises:
        MeshError: UNTRUSTED if the streams do not make them.
    """
    kind = reader.take(1)[0]
    if kind == _DENSE:
        symbols = unpack(reader, count)
        if len(symbols) != count:
            raise refused("its symbols are too few")
        return symbols
    filled = reader.number()
    if kind != _SPARSE or depth == DEPTH_MAX or filled > count:
        raise refused("its symbols are in no known form")
    gaps = unpack(reader, filled + count // GAP_MAX)
    ends = np.cumsum(gaps + (gaps != GAP_MAX).astype(np.int64))[gaps != GAP_MAX]
    if len(ends) != filled or (filled and ends[-1] > count):
        raise refused("its gaps do not fit")
    symbols = np.zeros(count, np.uint8)
    symbols[ends - 1] = decode(reader, filled, depth + 1) + np.uint8(1)
    return symbols
