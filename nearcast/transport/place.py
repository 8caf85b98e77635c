"""Where a tensor lies that is not in the message."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """So many bytes from `offset` within a region of shared memory."""

    region: str
    size_bytes: int
    offset: int = 0
