"""Messages on their way to one broker. An outbox row goes only when the broker has said that it has the message.

What is owed is on disk; memory holds a window of it. Which row is next `backlog` decides.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from edge_node.mqtt.backlog import UNSTORED, Backlog, Row
from edge_node.mqtt.group_commit import ignore_failure
from edge_node.mqtt.ledger.ledger import Ledger
from edge_node.mqtt.ledger.outbox import repeated
from edge_node.mqtt.ledger.records import LINK_BITS, Committed, Link, Outgoing
from edge_node.mqtt.limits import PublishLimits
from nearcast.backoff import full_jitter_s
from nearcast.clock import Clock
from nearcast.errors import Code, MeshError
from nearcast.telemetry import get_logger
from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.connection import Connection
from nearcast.transport.mqtt.message import Message

PACE_S = 0.01
"""A backlog is looked after this often, while it is ahead of its pace."""
_log = get_logger("nearcast.mqtt")


@dataclass(frozen=True, slots=True)
class _Parcel:
    """A message to send. `handed`: told when it has left, or is given up."""

    outgoing: Outgoing
    handed: Callable[[], None] | None = None


class Publisher:
    """The window between the outbox and one broker. Survives connections; what one lost goes over the next.

    Args:
        ledger: tells of owed rows, has those that are not in memory, and forgets delivered ones.
        limits: the window's size.
        clock: for expiry.
        on_drop: told "expired", "refused", "denied" or "crowded" for each message that is given up.
        link: whose rows these are.
    """

    def __init__(
        self,
        ledger: Ledger,
        limits: PublishLimits,
        clock: Clock,
        *,
        on_drop: Callable[[str], None],
        link: Link = "device",
    ) -> None:
        self._ledger = ledger
        self._link = link
        self._bit = LINK_BITS[link]
        self._limits = limits
        self._clock = clock
        self._on_drop = on_drop
        self._lanes: Backlog[_Parcel] = Backlog(limits.lanes)
        self._in_flight: dict[int, Row[_Parcel]] = {}
        self._in_flight_bytes = 0
        self._delivered: list[int] = []
        self._refusals: dict[int, int] = {}
        self._parked: dict[str, list[Row[_Parcel]]] = {}
        self._refused_until: dict[str, float] = {}
        self._backlog_due = 0.0
        self._pacing: asyncio.TimerHandle | None = None
        self._forgetting: asyncio.TimerHandle | None = None
        self._reading: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._progress = asyncio.Event()
        self._generator = random.Random()
        self._denied: frozenset[str] = frozenset()
        ledger.on_commit(self._committed)

    @property
    def topics_behind(self) -> int:
        """Topics with messages that are only on disk."""
        return self._lanes.streams

    async def settled(self) -> None:
        """Return once everything has been taken by the broker and forgotten."""
        while self._lanes or self._in_flight or self._parked or self._forgetting is not None:
            self._progress.clear()
            await self._progress.wait()

    def recover(self, owed: Mapping[str, int]) -> None:
        """Begin with what a former life left: `owed` names the last row of each topic."""
        self._lanes = Backlog(self._limits.lanes, owed)

    def _committed(self, committed: Committed) -> None:
        """The ledger owes new messages, and has given up others."""
        if committed.dropped:
            self._lanes.drop(committed.dropped)
            for rows in self._parked.values():
                rows[:] = [row for row in rows if row.id not in committed.dropped]
        for outgoing in committed.added:
            if outgoing.links & self._bit:
                self._lanes.add(Row(outgoing.id, outgoing.message.topic, outgoing.size_bytes, _Parcel(outgoing)))
        self._pump()

    def send(self, outgoing: Outgoing, handed: Callable[[], None] | None = None) -> None:
        """Send a message that has no row, now or when there is a connection, as long as the process lives.

        `handed` is told when the connection has it. Of a row the ledger has told already.
        """
        if outgoing.id != UNSTORED:
            if handed is not None:
                handed()
            return
        row = Row(UNSTORED, outgoing.message.topic, outgoing.size_bytes, _Parcel(outgoing, handed))
        limits, lanes = self._limits, self._lanes
        if len(lanes) < limits.unstored_max and lanes.live_bytes + row.size_bytes <= limits.unstored_bytes_max:
            lanes.add_unstored(row)
            self._pump()
        else:
            self._give_up(row, "crowded")

    def notify(self, message: Message, expires: float, handed: Callable[[], None] | None = None) -> None:
        """Send a refusal. It is not stored: the request was never accepted, and its device asks again.

        The broker may send before we have subscribed: then it waits for `attach`, and its request for `handed`.
        """
        self.send(Outgoing(UNSTORED, message, expires, size_bytes=len(message.payload)), handed)

    def deny(self, devices: frozenset[str]) -> None:
        """Give up what waits for these devices: who is called so next must not get it."""
        self._denied = devices
        self._pump()

    def attach(self, connection: Connection) -> None:
        """Use a connection from now on."""
        self._connection = connection
        self._pump()

    def detach(self) -> None:
        """The connection is gone: what it did not confirm is sent again over the next one."""
        self._connection = None
        self._lanes.put_back([_sent_before(row) for row in self._in_flight.values()])
        self._lanes.drop({UNSTORED})
        self._in_flight.clear()
        self._in_flight_bytes = 0

    def confirmed(self, mid: int, *, taken: bool) -> None:
        """The broker's PUBACK for a packet identifier of this connection."""
        row = self._in_flight.pop(mid, None)
        if row is None:
            return
        self._in_flight_bytes -= row.size_bytes
        if taken:
            self._refusals.pop(row.id, None)
            self._refused_until.pop(row.stream, None)
            self._forget(row)
        else:
            self._refused(row)
        self._progress.set()
        self._pump()

    # -- sending ------------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        while self._connection is not None and self._has_window():
            row = self._lanes.next(live_only=not self._may_send_backlog())
            if row is None:
                break
            self._backlog_due += self._lanes.was_behind / self._limits.backlog_per_s
            remaining_s = row.item.outgoing.expires - self._clock.monotonic()
            if row.stream in self._parked:
                self._parked[row.stream].append(row)
            elif self._denied and self._is_denied(row.stream):
                self._give_up(row, "denied")
            elif remaining_s <= 0:
                self._give_up(row, "expired")
            else:
                self._send_row(self._connection, row, remaining_s)
        if self._connection is not None and (after := self._lanes.start_reading()) is not None:
            self._reading = asyncio.get_running_loop().create_task(self._read_page(after))

    def _is_denied(self, topic: str) -> bool:
        device = topics.device_level(topic)
        return device in self._denied and f"/{device}/down/" in topic

    def _may_send_backlog(self) -> bool:
        """The backlog leaves at a pace: who drains it as fast as he can is late for everybody else meanwhile."""
        now = self._clock.monotonic()
        self._backlog_due = max(self._backlog_due, now - PACE_S)
        if self._backlog_due <= now:
            return len(self._in_flight) < self._limits.backlog_window
        if self._pacing is None and self._lanes.has_page:
            self._pacing = asyncio.get_running_loop().call_later(PACE_S, self._keep_pace)
        return False

    def _keep_pace(self) -> None:
        self._pacing = None
        self._pump()

    def _has_window(self) -> bool:
        granted = 0 if self._connection is None else self._connection.publish_window
        has_rows = len(self._in_flight) < min(self._limits.window, granted)
        if self._parked and sum(map(len, self._parked.values())) >= self._limits.backlog_window:
            return False  # nothing more may wait beside the lanes
        return has_rows and self._in_flight_bytes < self._limits.bytes_max

    def _send_row(self, connection: Connection, row: Row[_Parcel], remaining_s: float) -> None:
        message = row.item.outgoing.message
        try:
            mid = connection.publish(message.expiring(max(1, math.ceil(remaining_s))))
        except MeshError as error:
            if error.code is Code.INVALID_REQUEST:
                _log.warning("a message cannot be sent", link=self._link, topic=message.topic, error=error.message)
                self._bury(row, error.message)
            else:
                self._lanes.put_back([row])
                self._connection = None  # its owner will notice the loss and attach the next
            return
        self._in_flight[mid] = row
        self._in_flight_bytes += row.size_bytes
        if row.item.handed is not None:
            row.item.handed()

    async def _read_page(self, after: int) -> None:
        lanes, limits = self._lanes, self._limits
        try:
            page = await self._ledger.owed(self._link, after, limits.lanes.page_rows_max, limits.lanes.page_bytes_max)
        except MeshError as error:
            _log.warning("owed messages could not be read", link=self._link, error=error.message)
            await asyncio.sleep(limits.read_retry_s)
            lanes.failed()
        else:
            lanes.read(
                [Row(each.id, each.message.topic, each.size_bytes, _Parcel(each)) for each in page.rows], page.through
            )
        self._progress.set()
        self._pump()

    # -- what the broker does not take --------------------------------------------------------------------------------

    def _refused(self, row: Row[_Parcel]) -> None:
        """A broker may be full, or its access list may lag: an event is tried again. Who asks, asks again.

        Its topic waits with it, the others do not. Behind an event that was refused to the end the next ones of its
        topic are offered only once for a while.
        """
        limits, topic, now = self._limits, row.stream, self._clock.monotonic()
        refusals = self._refusals[row.id] = self._refusals.get(row.id, 0) + 1
        _log.warning("the broker refused a message", link=self._link, topic=topic, refusals=refusals)
        is_hopeless = refusals >= limits.refusals_max or now < self._refused_until.get(topic, now)
        if is_hopeless and row.item.outgoing.is_event:
            self._refused_until[topic] = now + limits.refusal_retry_max_s
            if len(self._refused_until) > limits.refused_topics_max:
                del self._refused_until[next(iter(self._refused_until))]
        if is_hopeless or not row.item.outgoing.is_event:
            self._bury(row, f"The broker of the link {self._link} refused it {refusals} times.")
            return
        if topic not in self._parked:
            self._parked[topic] = []
            delay_s = full_jitter_s(
                refusals, self._generator, base_s=limits.refusal_retry_base_s, max_s=limits.refusal_retry_max_s
            )
            asyncio.get_running_loop().call_later(delay_s, self._offer_again, topic)
        self._parked[topic].append(row)
        self._parked[topic].sort(key=lambda parked: parked.id)  # what was under way is older than what came to wait

    def _offer_again(self, topic: str) -> None:
        self._lanes.put_back(self._parked.pop(topic))
        self._progress.set()
        self._pump()

    def _bury(self, row: Row[_Parcel], reason: str) -> None:
        self._refusals.pop(row.id, None)
        if not row.item.outgoing.is_event:
            self._give_up(row, "refused")
            return
        self._on_drop("refused")
        letter = self._ledger.refuse(row.id, self._link, reason, self._clock.monotonic())
        letter.add_done_callback(ignore_failure)  # the row stays, and is offered again after a restart

    def _give_up(self, row: Row[_Parcel], reason: str) -> None:
        self._on_drop(reason)
        if row.item.handed is not None:
            row.item.handed()
        self._forget(row)

    # -- forgetting ---------------------------------------------------------------------------------------------------

    def _forget(self, row: Row[_Parcel]) -> None:
        """Rows are forgotten some at a time: a commit for each would cost as much as the one that brought it."""
        if row.id != UNSTORED:
            self._delivered.append(row.id)
            if self._forgetting is None:
                loop = asyncio.get_running_loop()
                self._forgetting = loop.call_later(self._limits.forget_delay_s, self._forget_rows)

    def close(self) -> None:
        """Forget now what was delivered: the ledger closes next."""
        if self._forgetting is not None:
            self._forgetting.cancel()
        if self._delivered:
            self._forget_rows()

    def _forget_rows(self) -> None:
        rows, self._delivered = self._delivered, []
        self._ledger.delivered(rows, self._link).add_done_callback(partial(self._forgotten, rows))

    def _forgotten(self, rows: Sequence[int], done: asyncio.Future[None]) -> None:
        self._forgetting = None
        delay_s = self._limits.forget_delay_s
        if not done.cancelled() and (error := done.exception()) is not None:
            # Until it is done they would be sent once more after a restart, and keep their answers from being pruned.
            _log.warning("delivered messages could not be forgotten", error=str(error))
            self._delivered += rows
            delay_s = self._limits.read_retry_s
        if self._delivered:
            self._forgetting = asyncio.get_running_loop().call_later(delay_s, self._forget_rows)
        self._progress.set()


def _sent_before(row: Row[_Parcel]) -> Row[_Parcel]:
    """An answer that is sent again says so; an event has its id."""
    outgoing = row.item.outgoing
    if outgoing.is_event:
        return row
    again = replace(outgoing, message=repeated(outgoing.message))
    return replace(row, item=replace(row.item, outgoing=again))
