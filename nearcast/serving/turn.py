"""Small requests that arrive in one turn of the loop run as one batch, on the loop: no window, no thread, no wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

W = TypeVar("W")


class Turn(Generic[W]):
    """Collects one version's requests until the tasks that are ready now have had their say.

    A lone request should not pay for company that never comes: requests are collected only while turns are crowded,
    that is when the turn before had at least two. Lives on one loop.

    Args:
        run: runs a batch, in the order given, and settles its answers. Blocks the loop, so `rows_max` bounds it.
        rows_of: rows of a waiting request.
        rows_max: rows of one run, which may change; what is over runs in the next turn: the loop breathes in between.
    """

    def __init__(self, run: Callable[[list[W]], None], rows_of: Callable[[W], int], *, rows_max: int) -> None:
        # Asking for it costs a system call each time.
        self._loop = asyncio.get_running_loop()
        self._run = run
        self._rows_of = rows_of
        self.rows_max = rows_max
        self._arrived = 0
        self._crowded = False
        self._armed = False
        self._waiting: dict[Hashable, list[W]] = {}

    def arrive(self) -> bool:
        """Count a request of this turn. True = wait for the others with `join`, False = run it at once."""
        self._arrived += 1
        self._arm()
        return self._crowded

    def join(self, key: Hashable, waiting: W) -> None:
        """Run together with the requests of the same `key` (equal shapes but for the batch axis) at the turn's end."""
        self._waiting.setdefault(key, []).append(waiting)
        self._arm()

    def take_all(self) -> list[W]:
        """Empty the turn: the version is being unloaded."""
        every = [waiting for group in self._waiting.values() for waiting in group]
        self._waiting.clear()
        return every

    def _arm(self) -> None:
        if not self._armed:
            self._armed = True
            self._loop.call_soon(self._end)

    def _end(self) -> None:
        self._armed = False
        # A turn in which nobody arrives, because it works off what came before, says nothing.
        if self._arrived:
            self._crowded, self._arrived = self._arrived > 1, 0
        if not self._waiting:
            return
        key = next(iter(self._waiting))
        group = self._waiting.pop(key)
        batch, rest = self._cut(group)
        if rest:
            self._waiting[key] = rest
        if self._waiting:
            # Others wait: the next turn is crowded whoever arrives.
            self._crowded = True
            self._arm()
        self._run(batch)

    def _cut(self, group: list[W]) -> tuple[list[W], list[W]]:
        """As many requests as fit, at least one."""
        rows = 0
        for index, waiting in enumerate(group):
            rows += self._rows_of(waiting)
            if rows > self.rows_max and index:
                return group[:index], group[index:]
        return group, []
