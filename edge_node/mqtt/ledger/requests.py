"""The inbox: what was asked, and what was answered. Runs on the ledger's thread, inside a transaction."""

from __future__ import annotations

import sqlite3
from typing import TypeAlias

import msgspec

from edge_node.mqtt.admission import Request
from edge_node.mqtt.idempotency import Known, decide
from edge_node.mqtt.ledger.letters import Letters
from edge_node.mqtt.ledger.outbox import Outbox
from edge_node.mqtt.ledger.records import Admission, Outgoing, Reply, Unanswered
from edge_node.mqtt.limits import LedgerLimits

PRUNE_BATCH = 1024
Key: TypeAlias = tuple[str, str, bytes]
"""Tenant, device and correlation: what makes two requests the same."""
ROW_BYTES = 512
"""What a row costs besides its reply: the request's fields, keys and indexes."""


class Requests:
    """Rows of requests, from their acceptance until their answer is too old to be repeated."""

    def __init__(self, boot: int, limits: LedgerLimits, outbox: Outbox, letters: Letters) -> None:
        self._boot = boot
        self._limits = limits
        self._outbox = outbox
        self._letters = letters
        # Of every key that has a row, so that most requests need not wait to hear that they are new. A number in common
        # with another key costs a look into the table, never an answer.
        self._known: set[int] = set()

    def knows(self, key: Key) -> bool:
        """Whether there may be a row. Called from the loop's thread, as `expect`: the set's steps are indivisible."""
        return hash(key) in self._known

    def expect(self, key: Key) -> None:
        """There will be a row."""
        self._known.add(hash(key))

    def forget(self, key: Key) -> None:
        """There will be none after all."""
        self._known.discard(hash(key))

    def doubt(self, connection: sqlite3.Connection, key: Key) -> None:
        """There may be none."""
        row = "SELECT 1 FROM inbox WHERE tenant = ? AND device = ? AND correlation = ?"
        if not connection.execute(row, key).fetchone():
            self.forget(key)

    def recover(self, connection: sqlite3.Connection, now: float, *, crashed: bool) -> list[Unanswered]:
        """What is unanswered. After a crash a row counts it if it was never under suspicion, or was being tried."""
        if crashed:
            connection.execute(
                "UPDATE inbox SET attempts = attempts + 1 WHERE state = 'pending' AND (attempts = 0 OR begun)"
            )
        connection.execute("UPDATE inbox SET begun = 0 WHERE state = 'pending' AND begun")
        connection.execute(
            "UPDATE inbox SET finished = ?, boot = ? WHERE state = 'done' AND boot != ?", (now, self._boot, self._boot)
        )
        self._known.update(map(hash, connection.execute("SELECT tenant, device, correlation FROM inbox")))
        pending = connection.execute(
            "SELECT id, request, payload, attempts, boot FROM inbox WHERE state = 'pending' ORDER BY id"
        )
        return [
            Unanswered(row, msgspec.msgpack.decode(request, type=Request), payload, attempts, boot == self._boot)
            for row, request, payload, attempts, boot in pending
        ]

    def accept(
        self, connection: sqlite3.Connection, request: Request, payload: bytes, *, has_room: bool, attempts: int = 0
    ) -> Admission:
        """Store a request, or say why not."""
        row = self.insert(connection, request, payload, request.correlation, attempts) if has_room else None
        return self._judge(connection, request) if row is None else Admission("accept", row)

    def answer(
        self, connection: sqlite3.Connection, request: Request, reply: Reply, now: float
    ) -> tuple[Admission, tuple[Outgoing, ...]]:
        """Store a request that is answered already, with the order to send the answer; or say why not."""
        encoded = msgspec.msgpack.encode(reply)
        inserted = connection.execute(
            "INSERT INTO inbox (tenant, device, correlation, digest, state, boot, finished, request, reply, size)"
            " VALUES (?, ?, ?, ?, 'done', ?, ?, x'', ?, ?) ON CONFLICT DO NOTHING",
            (request.tenant, request.device, request.correlation, request.digest, self._boot, now, encoded,
             len(encoded) + ROW_BYTES),
        )  # fmt: skip
        if not inserted.rowcount:
            return self._judge(connection, request), ()
        self.expect((request.tenant, request.device, request.correlation))
        row = inserted.lastrowid or 0
        return Admission("accept", row), (self._outbox.add_reply(connection, row, reply),)

    def _judge(self, connection: sqlite3.Connection, request: Request) -> Admission:
        """What is to be done about a request that came before, or has no room."""
        key = (request.tenant, request.device, request.correlation)
        found = connection.execute(
            "SELECT id, digest, state, reply FROM inbox WHERE tenant = ? AND device = ? AND correlation = ?", key
        ).fetchone()
        known = None if found is None else Known(found[1], found[2])
        verdict = decide(known, request.digest, has_room=False)
        if verdict == "replay":
            reply = msgspec.msgpack.decode(found[3], type=Reply)
            # The repeated request has a deadline and a reply topic of its own; the content stays what it was.
            reply = msgspec.structs.replace(reply, topic=request.reply_topic, expires=request.deadline)
            return Admission("replay", found[0], self._outbox.add_reply(connection, found[0], reply, dedup=True))
        return Admission(verdict, 0 if found is None else found[0])

    def insert(
        self,
        connection: sqlite3.Connection,
        request: Request,
        payload: bytes,
        correlation: bytes,
        attempts: int = 0,
    ) -> int | None:
        """A new pending row under `correlation`; None if there is one."""
        key = (request.tenant, request.device, correlation)
        inserted = connection.execute(
            "INSERT INTO inbox (tenant, device, correlation, digest, state, boot, attempts, request, payload)"
            " VALUES (?, ?, ?, ?, 'pending', ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (*key, request.digest, self._boot, attempts, msgspec.msgpack.encode(request), payload),
        )
        if not inserted.rowcount:
            return None
        self.expect(key)
        return inserted.lastrowid

    def begin(self, connection: sqlite3.Connection, row: int) -> None:
        """A suspect is about to be tried: a crash from now on is its doing."""
        connection.execute("UPDATE inbox SET begun = 1 WHERE id = ?", (row,))

    def finish(
        self, connection: sqlite3.Connection, row: int, reply: Reply, now: float, *, buried: str = ""
    ) -> tuple[Outgoing, ...]:
        """The answer and the orders to send it; with `buried`, the reason, the request becomes a dead letter too."""
        letters = self._bury(connection, row, buried, now) if buried else ()
        encoded = msgspec.msgpack.encode(reply)
        connection.execute(
            "UPDATE inbox SET state = 'done', boot = ?, finished = ?, payload = NULL, reply = ?, size = ? WHERE id = ?",
            (self._boot, now, encoded, len(encoded) + ROW_BYTES, row),
        )
        return (self._outbox.add_reply(connection, row, reply), *letters)

    def _bury(self, connection: sqlite3.Connection, row: int, reason: str, now: float) -> tuple[Outgoing, ...]:
        head, payload, attempts = connection.execute(
            "SELECT request, payload, attempts FROM inbox WHERE id = ?", (row,)
        ).fetchone()
        request = msgspec.msgpack.decode(head, type=Request)
        letter = self._letters.letter("request", request.tenant, request.device, request.model, reason, attempts)
        return self._letters.bury(connection, letter, now, head=head, payload=payload or b"")

    def prune(self, connection: sqlite3.Connection, now: float) -> int:
        """Forget answers that are too old or too many, never unsent ones; returns how many went."""
        limits = self._limits
        rows, size_bytes = connection.execute(
            "SELECT count(*), coalesce(sum(size), 0) FROM inbox WHERE state = 'done'"
        ).fetchone()
        gone: list[tuple[int]] = []
        oldest = connection.execute(
            "SELECT id, finished, size, tenant, device, correlation FROM inbox WHERE state = 'done'"
            " AND NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.inbox = inbox.id) ORDER BY finished, id LIMIT ?",
            (PRUNE_BATCH,),
        )
        for row, finished, size, *key in oldest:
            too_old = now - finished > limits.replies_age_max_s
            too_many = rows > limits.replies_max or size_bytes > limits.replies_bytes_max
            if not too_old and not too_many:
                break
            gone.append((row,))
            self._known.discard(hash(tuple(key)))
            rows -= 1
            size_bytes -= size
        connection.executemany("DELETE FROM inbox WHERE id = ?", gone)
        return len(gone)
