"""What the connections of one ngh2 server share: their methods, their number, and what they hold together."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import msgspec

from nearcast.transport.seam import Limits, Methods

if TYPE_CHECKING:
    from nearcast.transport.ngh2_server_connection import ServerConnection
    from nearcast.transport.ngh2_stream import ServerStream

_log = logging.getLogger(__name__)
# Together they bound what compressed messages cost in memory and time, whoever sends them.
_INFLATED_AT_ONCE = 2
# Above this share of `connections_max` who has no calls must go sooner.
_CROWDED_SHARE = 0.9


class ServerState(msgspec.Struct, kw_only=True):
    """What the connections of one server share."""

    methods: Methods
    limits: Limits
    connections: set[ServerConnection] = msgspec.field(default_factory=set)
    # What all calls hold of requests that have not been answered, and all connections of answers that were not read.
    receiving_bytes: int = 0
    unsent_bytes: int = 0
    inflating: asyncio.Semaphore = msgspec.field(default_factory=lambda: asyncio.Semaphore(_INFLATED_AT_ONCE))
    idle: asyncio.Event = msgspec.field(default_factory=asyncio.Event)
    # Cancelled methods that have not returned yet; the loop itself keeps weak references only.
    cancelled: set[asyncio.Task[None]] = msgspec.field(default_factory=set)

    def cancel(self, stream: ServerStream) -> None:
        """Cancel a call's method and keep it until it has returned."""
        passage = stream.passage
        if passage is not None:
            stream.passage = None
            passage.cancel()
        task = stream.task
        if task is not None and not task.done():
            self.cancelled.add(task)
            task.add_done_callback(self.cancelled.discard)
            task.cancel()

    @property
    def is_crowded(self) -> bool:
        """Whether there is little room for further connections."""
        return len(self.connections) > _CROWDED_SHARE * self.limits.connections_max

    def evict(self) -> None:
        """Drop the connection with the most unread answers, a stalled one first: memory is short."""
        worst = max(
            self.connections, key=lambda c: (not c.is_evicted, c.watch.is_stalled, c.unsent_bytes), default=None
        )
        if worst is not None:
            _log.info("dropped %s, which left %d bytes unread", worst.peer, worst.unsent_bytes)
            self.unsent_bytes -= worst.unsent_bytes
            worst.unsent_bytes = 0
            worst.is_evicted = True
            worst.abort()
