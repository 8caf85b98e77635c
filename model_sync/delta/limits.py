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

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """At most `max_length` further bytes."""
        ...


def refused(reason: str) -> MeshError:
    """The error for a payload that does not lead to the signed file."""
    return MeshError(Code.UNTRUSTED, f"Refused a delta: {reason}; the full file is fetched instead.")


def inflate(decompressor: Decompressor, data: bytes, size_bytes_max: int) -> io.BytesIO:
    """All of one stream, which must be all of `data`; never more memory than the bound, whatever the stream claims.

    The result can be changed in place through `getbuffer()` and leaves by `getvalue()`, neither of which copies it.

    Raises:
        MeshError: UNTRUSTED if the stream holds more, is cut, or is followed by something.
        OSError, EOFError, ZstdError: as the decompressor.
    """
    result = io.BytesIO()
    while not decompressor.eof and result.tell() <= size_bytes_max:
        piece = decompressor.decompress(data, PIECE_SIZE_BYTES)
        if not piece and decompressor.needs_input:
            break
        data = b""
        result.write(piece)
    if result.tell() > size_bytes_max or not decompressor.eof or decompressor.unused_data:
        raise refused("its stream holds more or less than it must")
    return result
