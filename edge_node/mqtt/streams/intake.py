"""The way into the store. Behind a message that could not be stored all others wait: no stream loses its order."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from edge_node.mqtt.ledger.records import Input, Intake
from edge_node.mqtt.streams.batches import InputStore
from nearcast.errors import Code, MeshError
from nearcast.telemetry import get_logger

STORE_RETRY_S = 0.2
_log = get_logger("nearcast.mqtt")


@dataclass(frozen=True, slots=True, order=True)
class Arrival:
    """A message that is not stored yet. `number` grows in the order of arrival."""

    number: int
    item: Input
    payload: bytes
    acknowledge: Callable[[], None]


class IntakeQueue:
    """Stores messages in the order in which they arrived, however often the store fails.

    What waits here is not acknowledged: the broker's window, which soon stands still, bounds it.

    Args:
        store: refuses, once it has failed, all messages that do not come `again`.
        taken: told of each message that the store has judged; None = it can never be stored.
    """

    def __init__(self, store: InputStore, taken: Callable[[Arrival, Intake | None], None]) -> None:
        self._store = store
        self._taken = taken
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._waiting: list[Arrival] = []
        self._is_closed = False

    def put(self, item: Input, payload: bytes, acknowledge: Callable[[], None]) -> None:
        """Store a message, now or when those before it are stored."""
        arrival = Arrival(next(self._numbers), item, payload, acknowledge)
        if self._waiting:
            heapq.heappush(self._waiting, arrival)
        else:
            self._store_next(arrival, again=False)

    def close(self) -> None:
        """What is not stored yet stays with the broker."""
        self._is_closed = True

    def _store_next(self, arrival: Arrival, *, again: bool) -> None:
        stored = self._store.take(arrival.item, arrival.payload, again=again)
        stored.add_done_callback(partial(self._judged, arrival, again=again))

    def _judged(self, arrival: Arrival, done: asyncio.Future[Intake], *, again: bool) -> None:
        if done.cancelled() or (self._is_closed and done.exception() is not None):
            return
        error = done.exception()
        if isinstance(error, MeshError) and error.code is Code.UNAVAILABLE:
            is_due = bool(self._waiting) and not again
            if not again:
                heapq.heappush(self._waiting, arrival)
            if not is_due:
                self._loop.call_later(STORE_RETRY_S, self._retry)
            return
        if error is not None:
            _log.error("a message of a stream cannot be stored", stream=arrival.item.key, error=str(error))
        if again:
            heapq.heappop(self._waiting)  # it was the oldest
        self._taken(arrival, None if error is not None else done.result())
        if again:
            self._retry()

    def _retry(self) -> None:
        if self._waiting and not self._is_closed:
            self._store_next(self._waiting[0], again=True)
