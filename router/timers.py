"""Many short timers that almost never fire, on one timer of the loop.

A hedge delay is set for nearly every request and cancelled for nearly every one; a timer of the loop for each would
cost more than the routing decision, and so would a place in order: those of one millisecond share a list.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable

TICKS_PER_S = 1000


class Timers:
    """Calls back at or up to a millisecond after an instant of the loop's clock.

    Cancelling means that the callback finds nothing to do: entries stay until their instant, so their number is bounded
    by the rate of requests times the longest delay.
    """

    def __init__(self) -> None:
        self._entries: dict[int, list[Callable[[], None]]] = {}
        # The ticks that have entries, the earliest first.
        self._ticks: list[int] = []
        self._armed: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        """Call back once at the instant `when`."""
        tick = int(when * TICKS_PER_S) + 1
        entries = self._entries.get(tick)
        if entries is not None:
            entries.append(callback)
            return
        self._entries[tick] = [callback]
        heapq.heappush(self._ticks, tick)
        if self._ticks[0] == tick:
            self._arm(asyncio.get_running_loop())

    def close(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._ticks.clear()
        if self._armed is not None:
            self._armed.cancel()
            self._armed = None

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._armed is not None:
            self._armed.cancel()
        self._armed = loop.call_at(self._ticks[0] / TICKS_PER_S, self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._armed = None
        # What rounding may take from a whole tick is no reason to ring again.
        now = loop.time() * TICKS_PER_S + 0.01
        try:
            while self._ticks and self._ticks[0] <= now:
                for callback in self._entries.pop(heapq.heappop(self._ticks)):
                    callback()
        finally:
            # One that raises must not keep the others from ringing later.
            if self._ticks:
                self._arm(loop)
