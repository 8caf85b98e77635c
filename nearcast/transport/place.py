"""Where a tensor lies that is not in the message."""

from __future__ import annotations

import msgspec


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """So many bytes from `offset` within a region of shared memory."""

    region: str
    size_bytes: int
    offset: int = 0
