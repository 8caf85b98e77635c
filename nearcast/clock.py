"""Time as a parameter. Everything below a shell receives `now` or a `Clock`; only `SystemClock` looks at a real one."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two times that must not be mixed: deadlines use `monotonic`, certificates and signatures use `wall`."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...

    def wall(self) -> float:
        """Seconds since 1970 in UTC; may be wrong (a gateway boots in 1970) and may jump."""
        ...


class SystemClock:
    """The machine's clocks. `time.monotonic` is also what the event loop uses."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)


class ManualClock:
    """A clock that moves only when told to, for tests and simulations."""

    def __init__(self, *, monotonic: float = 0.0, wall: float = 1_800_000_000.0) -> None:
        self._monotonic = monotonic
        self._wall = wall

    def monotonic(self) -> float:
        return self._monotonic

    def wall(self) -> float:
        return self._wall

    def advance(self, seconds: float) -> None:
        """Move both times forward.

        Raises:
            ValueError: if `seconds` is negative.
        """
        if seconds < 0:
            raise ValueError("a monotonic clock cannot go back")
        self._monotonic += seconds
        self._wall += seconds


SYSTEM_CLOCK = SystemClock()
