"""The durable inbox and outbox: what was accepted, what was answered, what the broker has not yet taken.

*Accepted* means that the row is committed. The result, the row's change to `done` and the outbox row are one
transaction; the outbox row goes only after the broker's PUBACK. So a crash at any point leaves either an unanswered
request, which runs after the restart, or an answer that is sent again: never nothing, and never two different answers.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_node.mqtt.admission import Request
from edge_node.mqtt.group_commit import GroupCommit
from edge_node.mqtt.idempotency import Known, Verdict, decide
from edge_node.mqtt.limits import MqttLimits

SCHEMA = """
CREATE TABLE IF NOT EXISTS inbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL, device TEXT NOT NULL, correlation BLOB NOT NULL,
    digest BLOB NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'done')),
    boot TEXT NOT NULL,
    finished REAL NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    size INTEGER NOT NULL DEFAULT 0,
    request BLOB NOT NULL, payload BLOB, reply BLOB,
    UNIQUE (tenant, device, correlation)
);
CREATE INDEX IF NOT EXISTS inbox_by_age ON inbox (finished, id, size) WHERE state = 'done';
CREATE TABLE IF NOT EXISTS outbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    inbox INTEGER NOT NULL REFERENCES inbox (id),
    dedup INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS outbox_by_inbox ON outbox (inbox);
"""
PRUNE_BATCH = 1024
ROW_BYTES = 512
"""What a row costs besides its reply: the request's fields, keys and indexes."""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """An answer as it was decided once and for all. `expires` is a monotonic instant of the boot that wrote it."""

    topic: str
    payload: bytes = b""
    content_type: str = ""
    correlation: bytes = b""
    user: dict[str, str] = {}
    expires: float


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One outbox row. `dedup` marks the answer to a repeated request."""

    id: int
    reply: Reply
    dedup: bool = False
    same_boot: bool = True


@dataclass(frozen=True, slots=True)
class Admission:
    """What the inbox did with a request: `id` of its row, and the answer to send again if it is a replay."""

    verdict: Verdict
    id: int
    replay: Outgoing | None = None


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A request that was accepted before a restart. `attempts` counts the restarts it has seen."""

    id: int
    request: Request
    payload: bytes
    attempts: int
    same_boot: bool


@dataclass(frozen=True, slots=True)
class Backlog:
    """What a restarted worker has to finish."""

    requests: Sequence[Unanswered]
    replies: Sequence[Outgoing]


class Inbox:
    """The worker's memory on disk.

    Args:
        path: the SQLite file.
        boot: identity of this boot of the machine; monotonic instants of another boot mean nothing here.
        limits: bounds of age, rows and bytes, and of a transaction.
    """

    def __init__(self, path: Path, *, boot: str, limits: MqttLimits) -> None:
        self._boot = boot
        self._limits = limits
        self._commits = GroupCommit(path, SCHEMA, batch_max=limits.commit_batch_max)

    async def open(self, now: float) -> Backlog:
        """Open the file and read what is unfinished.

        Raises:
            MeshError: UNAVAILABLE if the file cannot be used.
        """
        await self._commits.open()
        return await self._commits.submit(lambda connection: self._recover(connection, now))

    async def accept(self, request: Request, payload: bytes, *, has_room: bool = True) -> Admission:
        """Commit a request, unless it is known already or there is no room for a new one.

        Raises:
            MeshError: UNAVAILABLE if it could not be stored.
        """
        return await self._commits.submit(
            lambda connection: self._accept(connection, request, payload, has_room=has_room)
        )

    async def finish(self, row: int, reply: Reply, now: float) -> Outgoing:
        """Commit the answer of a request together with the order to send it.

        Raises:
            MeshError: UNAVAILABLE if it could not be stored; the request is then still unanswered.
        """
        return await self._commits.submit(lambda connection: self._finish(connection, row, reply, now))

    async def delivered(self, rows: Iterable[int]) -> None:
        """Forget outbox rows that the broker has taken, or that have expired."""
        ids = [(row,) for row in rows]
        await self._commits.submit(lambda connection: connection.executemany("DELETE FROM outbox WHERE id = ?", ids))

    async def prune(self, now: float) -> int:
        """Forget answers that are too old or too many; returns how many went. At most `PRUNE_BATCH` at a time."""
        return await self._commits.submit(lambda connection: self._prune(connection, now))

    async def close(self) -> None:
        """Commit what waits and close the file."""
        await self._commits.close()

    def _recover(self, connection: sqlite3.Connection, now: float) -> Backlog:
        connection.execute("UPDATE inbox SET attempts = attempts + 1 WHERE state = 'pending'")
        connection.execute("UPDATE inbox SET finished = ? WHERE state = 'done' AND boot != ?", (now, self._boot))
        pending = connection.execute(
            "SELECT id, request, payload, attempts, boot FROM inbox WHERE state = 'pending' ORDER BY id"
        )
        requests = [
            Unanswered(row, msgspec.msgpack.decode(request, type=Request), payload or b"", attempts, boot == self._boot)
            for row, request, payload, attempts, boot in pending
        ]
        unsent = connection.execute(
            "SELECT o.id, i.reply, o.dedup, i.boot FROM outbox o JOIN inbox i ON i.id = o.inbox ORDER BY o.id"
        )
        replies = [
            Outgoing(row, msgspec.msgpack.decode(reply, type=Reply), bool(dedup), boot == self._boot)
            for row, reply, dedup, boot in unsent
        ]
        return Backlog(requests, replies)

    def _accept(self, connection: sqlite3.Connection, request: Request, payload: bytes, *, has_room: bool) -> Admission:
        key = (request.tenant, request.device, request.correlation)
        found = connection.execute(
            "SELECT id, digest, state, reply, boot FROM inbox WHERE tenant = ? AND device = ? AND correlation = ?", key
        ).fetchone()
        known = None if found is None else Known(found[1], found[2])
        verdict = decide(known, request.digest, has_room=has_room)
        if verdict == "accept":
            row = connection.execute(
                "INSERT INTO inbox (tenant, device, correlation, digest, state, boot, request, payload)"
                " VALUES (?, ?, ?, ?, 'pending', ?, ?, ?)",
                (*key, request.digest, self._boot, msgspec.msgpack.encode(request), payload),
            ).lastrowid
            assert row is not None
            return Admission("accept", row)
        if verdict == "replay":
            order = connection.execute("INSERT INTO outbox (inbox, dedup) VALUES (?, 1)", (found[0],)).lastrowid
            assert order is not None
            reply = msgspec.msgpack.decode(found[3], type=Reply)
            # The repeated request has a deadline and a reply topic of its own; the content stays what it was.
            reply = msgspec.structs.replace(reply, topic=request.reply_topic, expires=request.deadline)
            return Admission("replay", found[0], Outgoing(order, reply, dedup=True))
        return Admission(verdict, 0 if found is None else found[0])

    def _finish(self, connection: sqlite3.Connection, row: int, reply: Reply, now: float) -> Outgoing:
        encoded = msgspec.msgpack.encode(reply)
        connection.execute(
            "UPDATE inbox SET state = 'done', boot = ?, finished = ?, payload = NULL, reply = ?, size = ? WHERE id = ?",
            (self._boot, now, encoded, len(encoded) + ROW_BYTES, row),
        )
        order = connection.execute("INSERT INTO outbox (inbox) VALUES (?)", (row,)).lastrowid
        assert order is not None
        return Outgoing(order, reply)

    def _prune(self, connection: sqlite3.Connection, now: float) -> int:
        limits = self._limits
        rows, size_bytes = connection.execute(
            "SELECT count(*), coalesce(sum(size), 0) FROM inbox WHERE state = 'done'"
        ).fetchone()
        gone: list[tuple[int]] = []
        oldest = connection.execute(
            "SELECT id, finished, size FROM inbox WHERE state = 'done'"
            " AND NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.inbox = inbox.id) ORDER BY finished, id LIMIT ?",
            (PRUNE_BATCH,),
        )
        for row, finished, size in oldest:
            too_old = now - finished > limits.replies_age_max_s
            too_many = rows > limits.replies_max or size_bytes > limits.replies_bytes_max
            if not too_old and not too_many:
                break
            gone.append((row,))
            rows -= 1
            size_bytes -= size
        connection.executemany("DELETE FROM inbox WHERE id = ?", gone)
        return len(gone)


def boot_identity() -> str:
    """The kernel's name for this boot; monotonic time is one clock for all processes of a boot, and for no other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"process-{uuid.uuid4()}"
