"""Streams in memory only: nothing on disk, the state of a stream ends with the node.

The broker keeps a message until its event is on its way: only then it is acknowledged.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from edge_node.mqtt.backlog import UNSTORED
from edge_node.mqtt.idempotency import Position, follow
from edge_node.mqtt.ledger.records import Advance, Event, Input, Intake, Outgoing, Page, StoredInput
from edge_node.mqtt.limits import StreamLimits
from nearcast.telemetry import get_logger
from nearcast.transport.mqtt.message import Message

T = TypeVar("T")
ROW_BYTES = 1024
"""What a message costs besides its payload."""
NUMBERED_MAX = 8192
"""Messages that are recognised, if they come again, by what became of them."""
_log = get_logger("nearcast.mqtt")


@dataclass(slots=True)
class _Stream:
    positions: tuple[Position, ...] = ()
    state: bytes | None = None


class VolatileInputs:
    """An `InputStore` that answers at once, and sends the events itself.

    Args:
        send: takes an event, and is told whom to call when the connection has it; a lost connection forgets both.
        limits: bounds of messages and streams.
    """

    def __init__(self, send: Callable[[Outgoing, Callable[[], None]], None], limits: StreamLimits) -> None:
        self._send = send
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._last = 0
        self._rows: dict[int, StoredInput] = {}
        self._size_bytes = 0
        self._acknowledge: dict[int, list[Callable[[], None]]] = {}
        self._unsent: dict[int, Outgoing] = {}
        self._numbered: OrderedDict[tuple[str, str, int], int] = OrderedDict()
        self._streams: OrderedDict[str, _Stream] = OrderedDict()

    def hold(self, row: int, acknowledge: Callable[[], None]) -> None:
        """Call `acknowledge` once the effect of a message is on its way; it may have come again meanwhile."""
        if row in self._rows:
            self._acknowledge.setdefault(row, []).append(acknowledge)
        elif row in self._unsent:
            self._send(self._unsent[row], partial(self._handed, row, [acknowledge]))
        else:
            acknowledge()

    def take(self, item: Input, payload: bytes, *, again: bool = False) -> asyncio.Future[Intake]:
        """Keep a message, unless it came before or there is no room. A duplicate names the row that it repeats."""
        stream = self._stream(item.key)
        step = follow(stream.positions, item.boot, item.seq)
        if step is None:
            assert item.seq is not None
            return self._resolved(Intake("duplicate", self._numbered.get((item.key, item.boot, item.seq), 0)))
        size_bytes = len(payload) + ROW_BYTES
        if self._size_bytes + size_bytes > self._limits.memory_bytes_max:
            return self._resolved(Intake("full"))
        stream.positions = step.positions
        row = self._last = next(self._ids)
        self._rows[row] = StoredInput(row, item, payload)
        self._size_bytes += size_bytes
        if item.seq is not None:
            self._numbered[item.key, item.boot, item.seq] = row
            if len(self._numbered) > NUMBERED_MAX:
                self._unsent.pop(self._numbered.popitem(last=False)[1], None)
        return self._resolved(Intake("accept", row, step.lost))

    def inputs(self, after: int, limit: int, *, key: str = "") -> asyncio.Future[Page[StoredInput]]:
        """Messages behind the row `after`, in order: of all streams, or of the one with the `Input.key`."""
        wanted = (row for id_, row in self._rows.items() if id_ > after and key in ("", row.input.key))
        rows = list(itertools.islice(wanted, limit))
        return self._resolved(Page(rows, rows[-1].id if len(rows) == limit else self._last))

    def begin_input(self, row: int) -> asyncio.Future[None]:
        """Nothing: a crash takes all of this with it."""
        return self._resolved(None)

    def advance_all(
        self, steps: Sequence[Advance], now: float, *, state: bytes | None = None
    ) -> asyncio.Future[Sequence[Outgoing]]:
        """Forget messages, keep the state and send the events; there is nothing left to send for the caller."""
        for step in steps:
            stored = self._rows.pop(step.row)
            self._size_bytes -= len(stored.payload) + ROW_BYTES
            if state is not None:
                self._stream(stored.input.key).state = state
            if step.buried:
                _log.warning("a message of a stream was given up", stream=stored.input.key, reason=step.buried)
            copies = self._acknowledge.pop(step.row, [])
            for event in step.events:
                outgoing = _outgoing(event, now)
                if stored.input.seq is not None:
                    self._unsent[step.row] = outgoing
                self._send(outgoing, partial(self._handed, step.row, copies))
            if not step.events:
                self._handed(step.row, copies)
        return self._resolved(())

    def _handed(self, row: int, copies: Sequence[Callable[[], None]]) -> None:
        self._unsent.pop(row, None)
        for acknowledge in copies:
            acknowledge()

    def stream_state(self, tenant: str, device: str, stream: str) -> asyncio.Future[bytes | None]:
        """The state behind the last message of a stream."""
        known = self._streams.get(f"{tenant}/{device}/{stream}")
        return self._resolved(None if known is None else known.state)

    def _stream(self, key: str) -> _Stream:
        stream = self._streams.setdefault(key, _Stream())
        self._streams.move_to_end(key)
        if len(self._streams) > self._limits.streams_max:
            self._streams.popitem(last=False)
        return stream

    def _resolved(self, value: T) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self._loop.create_future()
        future.set_result(value)
        return future


def _outgoing(event: Event, now: float) -> Outgoing:
    message = Message(topic=event.topic, payload=event.payload, content_type=event.content_type, user=event.user)
    return Outgoing(UNSTORED, message, now + event.ttl_s, size_bytes=len(event.payload))
