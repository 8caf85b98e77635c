"""The outbox: what is owed to each link. Runs on the ledger's thread, inside a transaction."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Mapping

import msgspec

from edge_node.mqtt.ledger.records import LINK_BITS, Event, Link, Outgoing, Page, Reply
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.payload_envelope import mark_repeated

ROW_BYTES = 64
"""What a row costs besides its message."""


class _Head(msgspec.Struct, frozen=True, array_like=True):
    content_type: str
    user: dict[str, str]


class Outbox:
    """Rows of messages, each until every link that it is for has taken it.

    Args:
        boot: number of this boot; instants of another one mean nothing.
        links: those that this node has.
        opened: monotonic instant of the opening; messages of an earlier boot live their whole time again from here.
    """

    def __init__(self, boot: int, links: Iterable[Link], opened: float) -> None:
        self._boot = boot
        self._links: dict[Link, int] = {link: LINK_BITS[link] for link in links}
        self._all = sum(self._links.values())
        self._opened = opened

    def recover(self, connection: sqlite3.Connection) -> Mapping[Link, Mapping[str, int]]:
        """For each link the last row of each topic. What is owed to no link of this node any more goes."""
        connection.execute("UPDATE outbox SET links = links & ? WHERE links & ~?", (self._all, self._all))
        connection.execute("DELETE FROM outbox WHERE links = 0")
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
        return Outgoing(added, reply_message(reply, dedup=dedup), reply.expires, links, len(reply.payload) + ROW_BYTES)

    def add(self, connection: sqlite3.Connection, event: Event, now: float) -> Outgoing:
        """Order that an event be sent on every link."""
        head = msgspec.msgpack.encode(_Head(event.content_type, event.user))
        size_bytes = len(head) + len(event.payload) + len(event.topic) + ROW_BYTES
        expires = now + event.ttl_s
        added = connection.execute(
            "INSERT INTO outbox (links, boot, topic, expires, ttl, size, head, payload)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (self._all, self._boot, event.topic, expires, event.ttl_s, size_bytes, head, event.payload),
        ).lastrowid
        assert added is not None
        message = Message(topic=event.topic, payload=event.payload, content_type=event.content_type, user=event.user)
        return Outgoing(added, message, expires, self._all, size_bytes)

    def page(self, connection: sqlite3.Connection, link: Link, after: int, limit: int) -> Page[Outgoing]:
        """At most `limit` rows behind the row `after` that are owed to `link`."""
        found = connection.execute(
            "SELECT o.id, o.links, o.boot, o.topic, o.expires, o.ttl, o.dedup, o.size, o.head, o.payload, i.reply"
            " FROM outbox o LEFT JOIN inbox i ON i.id = o.inbox WHERE o.id > ? AND o.links & ? ORDER BY o.id LIMIT ?",
            (after, LINK_BITS[link], limit),
        ).fetchall()
        rows = [self._outgoing(*row) for row in found]
        return Page(rows, rows[-1].id if len(rows) == limit else last_id(connection, "outbox"))

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
            # An answer's deadline is an instant of its boot: after another one it has passed.
            expires = expires if boot == self._boot else -math.inf
            return Outgoing(row, reply_message(answer, dedup=bool(dedup)), expires, links, size_bytes + len(reply))
        decoded = msgspec.msgpack.decode(head or b"", type=_Head)
        message = Message(topic=topic, payload=payload or b"", content_type=decoded.content_type, user=decoded.user)
        return Outgoing(row, message, expires if boot == self._boot else self._opened + ttl, links, size_bytes)

    def delivered(self, connection: sqlite3.Connection, link: Link, rows: Iterable[int]) -> None:
        """Forget rows that `link` has taken, or that have expired."""
        bit = LINK_BITS[link]
        for row in rows:
            if not connection.execute("DELETE FROM outbox WHERE id = ? AND links = ?", (row, bit)).rowcount:
                connection.execute("UPDATE outbox SET links = links & ~? WHERE id = ?", (bit, row))


def last_id(connection: sqlite3.Connection, table: str) -> int:
    """The highest id that was ever given in an AUTOINCREMENT table."""
    found = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchone()
    return 0 if found is None else int(found[0])


def reply_message(reply: Reply, *, dedup: bool) -> Message:
    """The answer as it is sent; `dedup` marks it as one to a repeated request."""
    return Message(
        topic=reply.topic,
        payload=mark_repeated(reply.content_type, reply.payload) if dedup else reply.payload,
        content_type=reply.content_type,
        correlation=reply.correlation,
        user={**reply.user, "dedup": "1"} if dedup else reply.user,
    )
