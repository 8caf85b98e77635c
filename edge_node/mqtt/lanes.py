"""Order for models with hidden state: the requests of one sequence run one after the other, in order of arrival."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Lane:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Lanes:
    """A first-come-first-served lock per key, which exists only while somebody uses it."""

    def __init__(self) -> None:
        self._lanes: dict[Hashable, _Lane] = {}
        self.users = 0
        """All who hold a lane or wait for one."""

    def __len__(self) -> int:
        return len(self._lanes)

    @asynccontextmanager
    async def enter(self, key: Hashable) -> AsyncIterator[None]:
        """Hold the lane of `key`."""
        lane = self._lanes.setdefault(key, _Lane())
        lane.users += 1
        self.users += 1
        try:
            async with lane.lock:
                yield
        finally:
            lane.users -= 1
            self.users -= 1
            if not lane.users:
                del self._lanes[key]


class Recent:
    """A set that remembers the `size_max` most recently used keys."""

    def __init__(self, size_max: int) -> None:
        self._size_max = size_max
        self._keys: OrderedDict[Hashable, None] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._keys

    def add(self, key: Hashable) -> None:
        """Remember `key` as the most recent one."""
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > self._size_max:
            self._keys.popitem(last=False)

    def discard(self, key: Hashable) -> None:
        """Forget `key`."""
        self._keys.pop(key, None)
