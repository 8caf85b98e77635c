"""The event heap. Same seed, same events, same trace hash."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
from random import Random
from typing import Any, TypeAlias

Action: TypeAlias = Callable[..., None]

EVENTS_MAX = 50_000_000
"""A run that needs more events has a loop in it."""


class World:
    """Virtual time in seconds, seeded generators, and a running hash of everything that was recorded."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self._seed = seed
        self._heap: list[tuple[float, int, Action, tuple[Any, ...]]] = []
        self._count = 0
        self._trace = hashlib.sha256()

    def stream(self, name: str) -> Random:
        """A generator of its own for one purpose: runs of two policies see the same arrivals and faults."""
        return Random(f"{self._seed}/{name}")

    def at(self, time_s: float, action: Action, *arguments: Any) -> None:
        """Run `action(*arguments)` at the virtual instant `time_s`; equal instants run in the order of scheduling.

        Raises:
            ValueError: if the instant has passed.
        """
        if time_s < self.now:
            raise ValueError(f"cannot schedule at {time_s} when it is {self.now}")
        self._count += 1
        heapq.heappush(self._heap, (time_s, self._count, action, arguments))

    def after(self, delay_s: float, action: Action, *arguments: Any) -> None:
        """Run `action(*arguments)` `delay_s` seconds from now."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._count, action, arguments))

    def record(self, *facts: object) -> None:
        """Add to the trace; two runs are the same if and only if their hashes are."""
        self._trace.update(repr((self.now, *facts)).encode())

    def run(self, until_s: float) -> None:
        """Work through the heap until it is empty or the next event lies after `until_s`.

        Raises:
            RuntimeError: after `EVENTS_MAX` events.
        """
        events = 0
        while self._heap and self._heap[0][0] <= until_s:
            self.now, _, action, arguments = heapq.heappop(self._heap)
            action(*arguments)
            events += 1
            if events > EVENTS_MAX:
                raise RuntimeError(f"more than {EVENTS_MAX} events before {until_s} s")
        self.now = max(self.now, until_s)

    @property
    def trace_hash(self) -> str:
        """sha256 over everything recorded so far, hex."""
        return self._trace.hexdigest()
