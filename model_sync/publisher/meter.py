"""How a push shows what it is at."""

from __future__ import annotations

from typing import Protocol


class Meter(Protocol):
    """Shows how far a push is: one bar after the other."""

    def begin(self, size_bytes: int, what: str = "uploading") -> None:
        """Something starts; so many bytes are to be worked on."""
        ...

    def advance(self, size_bytes: int) -> None:
        """So many more bytes are done."""
        ...


class SilentMeter:
    """Shows nothing."""

    def begin(self, size_bytes: int, what: str = "uploading") -> None:
        """Do nothing."""

    def advance(self, size_bytes: int) -> None:
        """Do nothing."""
