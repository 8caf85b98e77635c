"""The long poll that says "something changed". It carries no authority: it only makes an agent look now."""

from __future__ import annotations

import asyncio

from nearcast.errors import Code, MeshError

RETRY_AFTER_MS = 5_000


class Hint:
    """The serial that the repository is at, and who waits for a newer one.

    `waiters_max` bounds the polls of enrolled nodes, `strangers_max` those of anyone else, so that strangers can never
    take a node's place.
    """

    def __init__(self, serial: int, *, waiters_max: int, strangers_max: int, wait_s_max: float) -> None:
        self._serial = serial
        self._changed = asyncio.Event()
        self._closed = False
        self._waiting = {True: 0, False: 0}
        self._bounds = {True: waiters_max, False: strangers_max}
        self._wait_s_max = wait_s_max

    @property
    def waiting(self) -> int:
        """Polls that are open now."""
        return sum(self._waiting.values())

    def announce(self, serial: int) -> None:
        """Wake everyone who waits for a serial that is newer."""
        if serial <= self._serial:
            return
        self._serial = serial
        self._wake()

    def close(self) -> None:
        """Answer everyone at once, from now on."""
        self._closed = True
        self._wake()

    async def wait(self, since: int, wait_s: float, *, is_enrolled: bool) -> int:
        """The serial, as soon as it is newer than `since`, at the latest after `wait_s` seconds.

        Raises:
            MeshError: OVERLOADED if too many wait already; poll the repository instead.
        """
        if self._serial > since or self._closed:
            return self._serial
        if self._waiting[is_enrolled] >= self._bounds[is_enrolled]:
            raise MeshError(
                Code.OVERLOADED, "Too many long polls are open; poll the repository.", retry_after_ms=RETRY_AFTER_MS
            )
        self._waiting[is_enrolled] += 1
        try:
            async with asyncio.timeout(min(wait_s, self._wait_s_max)):
                await self._changed.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting[is_enrolled] -= 1
        return self._serial

    def _wake(self) -> None:
        # A new event for the next change: who waits on the old one is woken exactly once.
        self._changed.set()
        if not self._closed:
            self._changed = asyncio.Event()
