"""The outbox: what is owed to each link. Runs on the ledger's thread, inside a transaction.

Events are bounded by their size on disk and by their time to live. Answers are bounded by the requests that they belong
to, and are never dropped here.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping

import msgspec

from edge_node.mqtt.ledger.changes import Changes
from edge_node.mqtt.ledger.records import LINK_BITS, NOTICE_EXPIRY_S, Event, Link, Outgoing, Page, Reply
from edge_node.mqtt.limits import LedgerLimits
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.payload_envelope import mark_repeated

ROW_BYTES = 64
"""What a row costs besides its message."""
DROP_ROWS = 256
DROP_SHARE = 64
"""The oldest events go until one part in so many is free."""


class _Head(msgspec.Struct, frozen=True, array_like=True):
    content_type: str
    user: dict[str, str]


class Outbox:
    """Rows of messages, each until every link that it is for has taken it.

    Args:
        boot: number of this boot; instants of another one mean nothing.
        links: those that this node has.
        opened: monotonic instant of the opening; messages of an earlier boot live their whole time again from here.
        limits: how much may wait, and what goes when it is full.
        changes: told what comes and goes.
    """

    def __init__(self, boot: int, links: Iterable[Link], opened: float, limits: LedgerLimits, changes: Changes) -> None:
        self._boot = boot
        self._limits = limits
        self._changes = changes
        self._event_bytes: int | None = None
        self._links: dict[Link, int] = {link: LINK_BITS[link] for link in links}
        self._all = sum(self._links.values())
        self._opened = opened
        self._left = 0

    @property
    def event_bytes(self) -> int:
        """What the waiting events take on disk, as far as it is known."""
        return self._event_bytes or 0

    def forget_size(self) -> None:
        """A transaction was undone: the size has to be counted again."""
        self._event_bytes = None

    def recover(self, connection: sqlite3.Connection) -> Mapping[Link, Mapping[str, int]]:
        """For each link the last row of each topic. What is owed to no link of this node any more goes."""
        connection.execute("UPDATE outbox SET links = links & ? WHERE links & ~?", (self._all, self._all))
        connection.execute("DELETE FROM outbox WHERE links = 0")
        self._left = last_id(connection, "outbox")
        return {
            link: dict(connection.execute("SELECT topic, max(id) FROM outbox WHERE links & ? GROUP BY topic", (bit,)))
            for link, bit in self._links.items()
        }

    def add_reply(self, connection: sqlite3.Connection, row: int, reply: Reply, *, dedup: bool = False) -> Outgoing:
        """Order that the answer of the request `row` be sent."""
        links = LINK_BITS["device"]
        added = connection.execute(
            "INSERT INTO outbox (links, boot, topic, expires, inbox, dedup, size) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (links, self._boot, reply.topic, reply.expires, row, dedup, ROW_BYTES),
        ).lastrowid
        assert added is not None
        message = reply_message(reply, dedup=dedup)
        return self._changes.add(Outgoing(added, message, reply.expires, links, len(reply.payload) + ROW_BYTES))

    def add(self, connection: sqlite3.Connection, event: Event, now: float) -> Outgoing | None:
        """Order that an event be sent on every link; None if there is no room for it, which is counted as its loss."""
        added = self.offer(connection, event, now, links=self._all)
        if added is None:
            self._changes.drop("outbox_full", 1)
        return added

    def offer(self, connection: sqlite3.Connection, event: Event, now: float, *, links: int) -> Outgoing | None:
        """Order that an event be sent on `links`; None if there is no room for it."""
        head = _encode_head(event)
        size_bytes = _size_bytes(event, head, len(event.payload))
        if not self._make_room(connection, size_bytes):
            return None
        expires = now + event.ttl_s
        added = connection.execute(
            "INSERT INTO outbox (links, boot, topic, expires, ttl, size, head, payload)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (links, self._boot, event.topic, expires, event.ttl_s, size_bytes, head, event.payload),
        ).lastrowid
        assert added is not None
        self._resize(size_bytes)
        message = Message(topic=event.topic, payload=event.payload, content_type=event.content_type, user=event.user)
        return self._changes.add(Outgoing(added, message, expires, links, size_bytes, is_event=True))

    def has_room(self, connection: sqlite3.Connection, event: Event, payload_bytes: int) -> bool:
        """Whether `offer` would take the event with a payload of that size; nothing goes for it yet."""
        waiting_bytes = self._size(connection) if self._limits.when_full == "reject" else 0
        return waiting_bytes + _size_bytes(event, _encode_head(event), payload_bytes) <= self._limits.outbox_bytes_max

    def _size(self, connection: sqlite3.Connection) -> int:
        if self._event_bytes is None:
            counted = connection.execute("SELECT coalesce(sum(size), 0) FROM outbox WHERE ttl IS NOT NULL").fetchone()
            self._event_bytes = int(counted[0])
        return self._event_bytes

    def _resize(self, change_bytes: int) -> None:
        if self._event_bytes is not None:
            self._event_bytes += change_bytes

    def _make_room(self, connection: sqlite3.Connection, size_bytes: int) -> bool:
        """Whether there is room. The oldest events go in steps, so that this is seldom: not one for each new one."""
        bound = self._limits.outbox_bytes_max
        if self._size(connection) + size_bytes <= bound:
            return True
        if self._limits.when_full == "reject":
            return False
        while self._size(connection) + size_bytes > bound - bound // DROP_SHARE and self._drop_oldest(connection):
            pass
        return self._size(connection) + size_bytes <= bound

    def _drop_oldest(self, connection: sqlite3.Connection) -> bool:
        oldest = connection.execute(
            "SELECT id, size FROM outbox WHERE ttl IS NOT NULL ORDER BY id LIMIT ?", (DROP_ROWS,)
        ).fetchall()
        self._drop(connection, oldest, "outbox_full")
        return bool(oldest)

    def _drop(self, connection: sqlite3.Connection, rows: list[tuple[int, int]], reason: str) -> None:
        connection.executemany("DELETE FROM outbox WHERE id = ?", [(row,) for row, _ in rows])
        self._resize(-sum(size for _, size in rows))
        self._changes.drop(reason, len(rows), [row for row, _ in rows])

    def prune(self, connection: sqlite3.Connection, now: float) -> int:
        """Forget the oldest events if their time is over; returns how many went, at most `DROP_ROWS`."""
        oldest = connection.execute(
            "SELECT id, size, boot, expires, ttl FROM outbox WHERE ttl IS NOT NULL ORDER BY id LIMIT ?", (DROP_ROWS,)
        )
        gone = [
            (row, size)
            for row, size, boot, expires, ttl in oldest
            if (expires if boot == self._boot else self._opened + ttl) <= now
        ]
        self._drop(connection, gone, "expired")
        return len(gone)

    def take_out(self, connection: sqlite3.Connection, link: Link, row: int) -> tuple[Event, bytes] | None:
        """Forget an event that `link` does not take; returns it without its payload, and the payload."""
        found = connection.execute(
            "SELECT topic, ttl, head, payload FROM outbox WHERE id = ? AND ttl IS NOT NULL", (row,)
        ).fetchone()
        self.delivered(connection, link, [row])
        if found is None:
            return None
        topic, ttl, head, payload = found
        decoded = msgspec.msgpack.decode(head, type=_Head)
        return Event(topic=topic, content_type=decoded.content_type, user=decoded.user, ttl_s=ttl), payload

    def page(
        self, connection: sqlite3.Connection, link: Link, after: int, rows_max: int, bytes_max: int
    ) -> Page[Outgoing]:
        """Rows behind the row `after` that are owed to `link`, within the bounds, at least one if there is one."""
        waiting = connection.execute(
            "SELECT o.id, o.links, o.boot, o.topic, o.expires, o.ttl, o.dedup, o.size, o.head, o.payload, i.reply"
            " FROM outbox o LEFT JOIN inbox i ON i.id = o.inbox WHERE o.id > ? AND o.links & ? ORDER BY o.id LIMIT ?",
            (after, LINK_BITS[link], rows_max),
        )
        rows: list[Outgoing] = []
        size_bytes = 0
        for row in waiting:
            rows.append(self._outgoing(*row))
            size_bytes += rows[-1].size_bytes
            if size_bytes >= bytes_max or len(rows) == rows_max:
                return Page(rows, rows[-1].id)
        return Page(rows, last_id(connection, "outbox"))

    def _outgoing(
        self,
        row: int,
        links: int,
        boot: int,
        topic: str,
        expires: float,
        ttl: float | None,
        dedup: int,
        size_bytes: int,
        head: bytes | None,
        payload: bytes | None,
        reply: bytes | None,
    ) -> Outgoing:
        if ttl is None:
            assert reply is not None
            answer = msgspec.structs.replace(msgspec.msgpack.decode(reply, type=Reply), topic=topic)
            # An answer's deadline is an instant of its boot. After another one nobody knows what is left of it: whoever
            # still waits is told, for as long as he would be told that it has passed.
            expires = expires if boot == self._boot else self._opened + NOTICE_EXPIRY_S
            may_be_sent = bool(dedup) or row <= self._left  # a former life may have sent it
            return Outgoing(row, reply_message(answer, dedup=may_be_sent), expires, links, size_bytes + len(reply))
        decoded = msgspec.msgpack.decode(head or b"", type=_Head)
        message = Message(topic=topic, payload=payload or b"", content_type=decoded.content_type, user=decoded.user)
        expires = expires if boot == self._boot else self._opened + ttl
        return Outgoing(row, message, expires, links, size_bytes, is_event=True)

    def delivered(self, connection: sqlite3.Connection, link: Link, rows: Iterable[int]) -> None:
        """Forget rows that `link` has taken, or that have expired."""
        bit = LINK_BITS[link]
        ids = msgspec.json.encode(list(rows)).decode()
        gone = connection.execute(
            "DELETE FROM outbox WHERE id IN (SELECT value FROM json_each(?)) AND links = ? RETURNING size, ttl",
            (ids, bit),
        ).fetchall()
        self._resize(-sum(size for size, ttl in gone if ttl is not None))
        connection.execute(
            "UPDATE outbox SET links = links & ~? WHERE id IN (SELECT value FROM json_each(?))", (bit, ids)
        )


def _encode_head(event: Event) -> bytes:
    return msgspec.msgpack.encode(_Head(event.content_type, event.user))


def _size_bytes(event: Event, head: bytes, payload_bytes: int) -> int:
    return len(head) + payload_bytes + len(event.topic) + ROW_BYTES


def last_id(connection: sqlite3.Connection, table: str) -> int:
    """The highest id that was ever given in an AUTOINCREMENT table."""
    found = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchone()
    return 0 if found is None else int(found[0])


def reply_message(reply: Reply, *, dedup: bool) -> Message:
    """The answer as it is sent; `dedup` marks it as one to a repeated request."""
    message = Message(
        topic=reply.topic,
        payload=reply.payload,
        content_type=reply.content_type,
        correlation=reply.correlation,
        user=reply.user,
    )
    return repeated(message) if dedup else message


def repeated(message: Message) -> Message:
    """The same answer, saying that it may have come before."""
    if "dedup" in message.user:
        return message
    payload = mark_repeated(message.content_type, message.payload)
    return msgspec.structs.replace(message, payload=payload, user={**message.user, "dedup": "1"})
