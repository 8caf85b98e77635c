"""What an apply may cost, and how it refuses: a payload is a stranger's word until the result's digest is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from nearcast.errors import Code, MeshError

ReadRange: TypeAlias = Callable[[int, int], bytes]
"""`read_range(start, size_bytes)` answers that part of the full blob, fetched from any source."""


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


def inflate(decompressor: Decompressor, data: bytes, size_bytes_max: int) -> bytes:
    """All of one stream, which must be all of `data`; never more memory than the bound, whatever the stream claims.

    Raises:
        MeshError: UNTRUSTED if the stream holds more, is cut, or is followed by something.
        OSError, EOFError, ZstdError: as the decompressor.
    """
    pieces, left = [], size_bytes_max + 1
    while left and not decompressor.eof:
        piece = decompressor.decompress(data, left)
        if not piece and decompressor.needs_input:
            break
        data = b""
        pieces.append(piece)
        left -= len(piece)
    if not left or not decompressor.eof or decompressor.unused_data:
        raise refused("its stream holds more or less than it must")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
