"""Answers on their way to the broker. An outbox row goes only when the broker has said that it has the message."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edge_node.mqtt.ledger.ledger import Ledger
from edge_node.mqtt.ledger.records import Link, Outgoing
from edge_node.mqtt.limits import MqttLimits
from nearcast.clock import Clock
from nearcast.errors import Code, MeshError
from nearcast.telemetry import get_logger
from nearcast.transport.mqtt.connection import Connection
from nearcast.transport.mqtt.message import Message

PAGE_ROWS = 128
_log = get_logger("nearcast.mqtt")


@dataclass(frozen=True, slots=True)
class _Parcel:
    """A message to send: `row` is its outbox row, None for one that is not on disk. `handed`: told when it has left."""

    message: Message
    row: int | None
    expires: float
    handed: Callable[[], None] | None = None


class Publisher:
    """The window between outbox and broker. Survives connections; what one of them lost goes over the next.

    Args:
        ledger: where delivered rows are forgotten.
        limits: the window's size.
        clock: for expiry.
        on_drop: told "expired" or "refused" for each answer that is given up.
    """

    def __init__(
        self,
        ledger: Ledger,
        limits: MqttLimits,
        clock: Clock,
        *,
        on_drop: Callable[[str], None],
        link: Link = "device",
    ) -> None:
        self._ledger = ledger
        self._link = link
        self._limits = limits
        self._clock = clock
        self._on_drop = on_drop
        self._waiting: deque[_Parcel] = deque()
        self._in_flight: dict[int, _Parcel] = {}
        self._delivered: list[int] = []
        self._forgetting: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._progress = asyncio.Event()

    async def settled(self) -> None:
        """Return once every answer has been taken by the broker and forgotten."""
        while self._waiting or self._in_flight or self._forgetting is not None:
            self._progress.clear()
            await self._progress.wait()

    def send(self, outgoing: Outgoing, handed: Callable[[], None] | None = None) -> None:
        """Send an answer, now or when there is a connection. `handed` is told when the connection has it."""
        self._waiting.append(_Parcel(outgoing.message, outgoing.id or None, outgoing.expires, handed))
        self._pump()

    async def recover(self, owed: Mapping[str, int]) -> None:
        """Send what a former life left: `owed` names the last row of each topic."""
        after = 0
        while after < max(owed.values(), default=0):
            page = await self._ledger.owed(self._link, after, PAGE_ROWS)
            after = page.through
            for outgoing in page.rows:
                self.send(outgoing)

    def notify(self, message: Message, expires: float, handed: Callable[[], None] | None = None) -> None:
        """Send a refusal. It is not stored: the request was never accepted, and its device asks again."""
        if self._connection is not None:
            self._waiting.append(_Parcel(message, None, expires, handed))
            self._pump()

    def attach(self, connection: Connection) -> None:
        """Use a connection from now on."""
        self._connection = connection
        self._pump()

    def detach(self) -> None:
        """The connection is gone: what it did not confirm is sent again over the next one."""
        self._connection = None
        unconfirmed = [parcel for parcel in self._in_flight.values() if parcel.row is not None]
        self._in_flight.clear()
        self._waiting = deque([*unconfirmed, *(parcel for parcel in self._waiting if parcel.row is not None)])

    def confirmed(self, mid: int, *, taken: bool) -> None:
        """The broker's PUBACK for a packet identifier of this connection."""
        parcel = self._in_flight.pop(mid, None)
        if parcel is None:
            return
        if not taken:
            _log.warning("the broker refused an answer", topic=parcel.message.topic)
            self._on_drop("refused")
        self._forget(parcel)
        self._progress.set()
        self._pump()

    def _pump(self) -> None:
        while self._connection is not None and self._waiting and len(self._in_flight) < self._window():
            parcel = self._waiting.popleft()
            remaining_s = parcel.expires - self._clock.monotonic()
            if remaining_s <= 0:
                self._drop(parcel, "expired")
                continue
            self._send_parcel(self._connection, parcel, remaining_s)

    def _window(self) -> int:
        granted = 0 if self._connection is None else self._connection.publish_window
        return min(self._limits.publish_window, granted)

    def _send_parcel(self, connection: Connection, parcel: _Parcel, remaining_s: float) -> None:
        try:
            mid = connection.publish(parcel.message.expiring(max(1, math.ceil(remaining_s))))
        except MeshError as error:
            if error.code is Code.INVALID_REQUEST:
                _log.warning("an answer cannot be sent", topic=parcel.message.topic, error=error.message)
                self._drop(parcel, "refused")
            else:
                self._waiting.appendleft(parcel)
                self._connection = None  # its owner will notice the loss and attach the next
            return
        self._in_flight[mid] = parcel
        if parcel.handed is not None:
            parcel.handed()

    def _drop(self, parcel: _Parcel, reason: str) -> None:
        self._on_drop(reason)
        if parcel.handed is not None:
            parcel.handed()
        self._forget(parcel)

    def _forget(self, parcel: _Parcel) -> None:
        if parcel.row is not None:
            self._delivered.append(parcel.row)
            if self._forgetting is None:
                self._forgetting = asyncio.get_running_loop().create_task(self._forget_rows())

    async def _forget_rows(self) -> None:
        try:
            while self._delivered:
                rows, self._delivered = self._delivered, []
                await self._ledger.delivered(rows, self._link)
        except MeshError as error:
            # The rows stay and are sent once more after a restart: the devices see the same answer twice.
            _log.warning("delivered answers could not be forgotten", error=error.message)
        finally:
            self._forgetting = None
            self._progress.set()
