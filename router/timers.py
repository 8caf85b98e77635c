"""Many short timers that almost never fire, on one timer of the loop.

A hedge delay is set for nearly every request and cancelled for nearly every one; a timer of the loop for each would
cost more than the routing decision.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable

TICK_S = 0.001


class Timers:
    """Calls back at or up to a millisecond after an instant of the loop's clock.

    Cancelling means that the callback finds nothing to do: entries stay until their instant, so their number is bounded
    by the rate of requests times the longest delay.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._armed: asyncio.TimerHandle | None = None
        self._armed_at = float("inf")

    def __len__(self) -> int:
        return len(self._entries)

    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        """Call back once at the instant `when`."""
        heapq.heappush(self._entries, (when, next(self._order), callback))
        if when < self._armed_at - TICK_S:
            self._arm(asyncio.get_running_loop(), when)

    def close(self) -> None:
        """Forget everything."""
        self._entries.clear()
        if self._armed is not None:
            self._armed.cancel()
            self._armed = None
        self._armed_at = float("inf")

    def _arm(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        if self._armed is not None:
            self._armed.cancel()
        self._armed_at = when
        self._armed = loop.call_at(when, self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._armed = None
        self._armed_at = float("inf")
        now = loop.time()
        entries = self._entries
        while entries and entries[0][0] <= now:
            heapq.heappop(entries)[2]()
        if entries:
            self._arm(loop, max(entries[0][0], now + TICK_S))
