"""What an apply may cost, and how it refuses: a payload is a stranger's word until the result's digest is right."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Protocol, TypeAlias

from nearcast.errors import Code, MeshError

ReadRange: TypeAlias = Callable[[int, int], bytes]
"""`read_range(start, size_bytes)` answers that part of the full blob, fetched from any source."""
PIECE_SIZE_BYTES = 1024 * 1024
"""What is worked on at once, so that nothing beside the old and the new file takes much memory."""


class Decompressor(Protocol):
    """What `bz2` and zstd have in common."""

    @property
    def eof(self) -> bool:
        """Whether the end of the stream was reached."""
        ...

    @property
    def needs_input(self) -> bool:
        """Whether everything that was fed so far is used up."""
        ...

    @property
    def unused_data(self) -> bytes:
        """What came after the end of the stream."""
        ...

    def decompress(self, data: memoryview, max_length: int) -> bytes:
        """At most `max_length` further bytes."""
        ...


def refused(reason: str) -> MeshError:
    """The error for a payload that does not lead to the signed file."""
    return MeshError(Code.UNTRUSTED, f"Refused a delta: {reason}; the full file is fetched instead.")


class Inflater:
    """Reads one compressed stream in pieces, so that neither all of it nor all that it holds lies here twice."""

    def __init__(self, decompressor: Decompressor, data: bytes) -> None:
        self._decompressor = decompressor
        self._data = memoryview(data)
        self._at = 0

    def read(self, size_bytes_max: int) -> bytes:
        """Some of the next bytes; empty at the end, wherever that is.

        Raises:
            OSError, EOFError, ZstdError: as the decompressor.
        """
        while not self._decompressor.eof:
            fed = self._data[:0]
            if self._decompressor.needs_input:
                fed = self._data[self._at : self._at + PIECE_SIZE_BYTES]
                self._at += len(fed)
            piece = self._decompressor.decompress(fed, min(size_bytes_max, PIECE_SIZE_BYTES))
            # A decoder that held all input back may have nothing more to say, and ask for the end of the stream now.
            is_stuck = not len(fed) and (not self._decompressor.needs_input or self._at >= len(self._data))
            if piece or is_stuck:
                return piece
        return b""

    def finish(self) -> None:
        """Make sure that the stream and the data ended together, and that all of it was read.

        Raises:
            MeshError: UNTRUSTED if the stream holds more, is cut, or is followed by something.
        """
        more = self.read(1)
        ended = self._decompressor.eof and not self._decompressor.unused_data and self._at == len(self._data)
        if more or not ended:
            raise refused("its stream holds more or less than it must")


def inflate(decompressor: Decompressor, data: bytes, size_bytes_max: int) -> io.BytesIO:
    """All of one stream, which must be all of `data`; never more memory than the bound, whatever the stream claims.

    The result can be changed in place through `getbuffer()` and leaves by `getvalue()`, which copies it only if a
    buffer of it is still held.

    Raises:
        MeshError: UNTRUSTED if the stream holds more, is cut, or is followed by something.
        OSError, EOFError, ZstdError: as the decompressor.
    """
    stream, result = Inflater(decompressor, data), io.BytesIO()
    while result.tell() < size_bytes_max and (piece := stream.read(size_bytes_max - result.tell())):
        result.write(piece)
    stream.finish()
    return result


def blank(size_bytes: int) -> io.BytesIO:
    """Zeros to be filled in place through `getbuffer()`."""
    return io.BytesIO(bytes(size_bytes))
