"""Streams: what waits for its execution, and how far each stream is. Runs on the ledger's thread, in a transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence

import msgspec

from edge_node.mqtt.idempotency import Position, follow
from edge_node.mqtt.ledger.changes import Changes
from edge_node.mqtt.ledger.letters import Letters
from edge_node.mqtt.ledger.outbox import Outbox, last_id
from edge_node.mqtt.ledger.records import Advance, Event, Input, Intake, Outgoing, Page, StoredInput
from edge_node.mqtt.limits import LedgerLimits
from nearcast.errors import Code, MeshError

ROW_BYTES = 64
"""What a row costs besides its message."""
DROP_ROWS = 256
DROP_SHARE = 64
"""The oldest messages go until one part in so many is free."""

_positions = msgspec.json.Decoder(tuple[Position, ...])


class Streams:
    """Rows of inputs, each until its events are committed; one row per stream with its position and state."""

    def __init__(
        self, boot: int, limits: LedgerLimits, outbox: Outbox, letters: Letters, opened: float, changes: Changes
    ) -> None:
        self._boot = boot
        self._opened = opened
        self._changes = changes
        self._limits = limits
        self._outbox = outbox
        self._letters = letters
        self._waiting_bytes: int | None = None
        self._is_broken = False

    def rolled_back(self) -> None:
        """A transaction was undone: the size has to be counted again, and a message may be missing."""
        self._waiting_bytes = None
        self._is_broken = True

    def _size(self, connection: sqlite3.Connection) -> int:
        if self._waiting_bytes is None:
            self._waiting_bytes = int(connection.execute("SELECT coalesce(sum(size), 0) FROM inputs").fetchone()[0])
        return self._waiting_bytes

    def _resize(self, change_bytes: int) -> None:
        if self._waiting_bytes is not None:
            self._waiting_bytes += change_bytes

    def recover(self, connection: sqlite3.Connection, *, crashed: bool) -> Mapping[str, int]:
        """The last waiting row of each stream. A crash counts as it does for requests."""
        if crashed:
            connection.execute("UPDATE inputs SET attempts = attempts + 1 WHERE begun")
        connection.execute("UPDATE inputs SET begun = 0 WHERE begun")
        return dict(
            connection.execute(
                "SELECT s.tenant || '/' || s.device || '/' || s.name, max(i.id)"
                " FROM inputs i JOIN streams s ON s.id = i.stream GROUP BY i.stream"
            )
        )

    def take(self, connection: sqlite3.Connection, item: Input, payload: bytes, *, again: bool = False) -> Intake:
        """Store a stream's message, unless it came before or there is no room."""
        self._is_broken = self._is_broken and not again
        if self._is_broken:
            raise MeshError(Code.UNAVAILABLE, "A message before this one could not be stored.")
        stream, positions = self._stream(connection, item)
        step = follow(positions, item.boot, item.seq)
        if step is None:
            return Intake("duplicate")
        head = msgspec.msgpack.encode(item)
        size_bytes = len(head) + len(payload) + ROW_BYTES
        if not self._make_room(connection, size_bytes):
            self._changes.drop("inputs_full", 1)
            return Intake("full")
        row = self._insert(connection, stream, head, payload, size_bytes)
        connection.execute(
            "UPDATE streams SET boots = ?, touched = ? WHERE id = ?",
            (msgspec.json.encode(step.positions).decode(), row, stream),
        )
        return Intake("accept", row, step.lost)

    def put_back(self, connection: sqlite3.Connection, item: Input, payload: bytes) -> int:
        """Store a message that was a dead letter, behind what its stream has; it counts in no sequence."""
        stream, _positions = self._stream(connection, item)
        head = msgspec.msgpack.encode(item)
        return self._insert(connection, stream, head, payload, len(head) + len(payload) + ROW_BYTES)

    def _insert(self, connection: sqlite3.Connection, stream: int, head: bytes, payload: bytes, size: int) -> int:
        row = connection.execute(
            "INSERT INTO inputs (stream, boot, size, head, payload) VALUES (?, ?, ?, ?, ?)",
            (stream, self._boot, size, head, payload),
        ).lastrowid
        assert row is not None
        self._resize(size)
        return row

    def _make_room(self, connection: sqlite3.Connection, size_bytes: int) -> bool:
        """Whether there is room; the oldest messages go for it in steps if that is the policy."""
        bound = self._limits.inputs_bytes_max
        if self._size(connection) + size_bytes <= bound:
            return True
        if self._limits.when_full == "reject":
            return False
        while self._size(connection) + size_bytes > bound - bound // DROP_SHARE:
            oldest = connection.execute("SELECT id, size FROM inputs ORDER BY id LIMIT ?", (DROP_ROWS,)).fetchall()
            if not oldest:
                break
            self._drop(connection, oldest, "inputs_full")
        return self._size(connection) + size_bytes <= bound

    def _drop(self, connection: sqlite3.Connection, rows: list[tuple[int, int]], reason: str) -> None:
        connection.executemany("DELETE FROM inputs WHERE id = ?", [(row,) for row, _ in rows])
        self._resize(-sum(size for _, size in rows))
        self._changes.drop(reason, len(rows))

    def prune(self, connection: sqlite3.Connection, now: float) -> int:
        """Forget the oldest messages if they waited too long; returns how many went, at most `DROP_ROWS`."""
        oldest = connection.execute("SELECT id, size, boot, head FROM inputs ORDER BY id LIMIT ?", (DROP_ROWS,))
        gone = []
        for row, size, boot, head in oldest:
            since = msgspec.msgpack.decode(head, type=Input).arrived if boot == self._boot else self._opened
            if now - since > self._limits.inputs_age_max_s:
                gone.append((row, size))
        self._drop(connection, gone, "inputs_old")
        return len(gone)

    def _stream(self, connection: sqlite3.Connection, item: Input) -> tuple[int, tuple[Position, ...]]:
        key = (item.tenant, item.device, item.stream)
        found = connection.execute(
            "SELECT id, boots FROM streams WHERE tenant = ? AND device = ? AND name = ?", key
        ).fetchone()
        if found is not None:
            return found[0], _positions.decode(found[1])
        (count,) = connection.execute("SELECT count(*) FROM streams").fetchone()
        if count >= self._limits.streams_max:
            connection.execute(
                "DELETE FROM streams WHERE id = (SELECT id FROM streams WHERE NOT EXISTS"
                " (SELECT 1 FROM inputs WHERE inputs.stream = streams.id) ORDER BY touched LIMIT 1)"
            )
        row = connection.execute("INSERT INTO streams (tenant, device, name) VALUES (?, ?, ?)", key).lastrowid
        assert row is not None
        return row, ()

    def page(self, connection: sqlite3.Connection, after: int, limit: int, key: str = "") -> Page[StoredInput]:
        """At most `limit` waiting rows behind the row `after`, within `page_bytes_max`; one at least.

        With `key` those of one stream: it must not have to look through the backlogs of all the others.
        """
        of_stream = "stream = (SELECT id FROM streams WHERE tenant = ? AND device = ? AND name = ?) AND " if key else ""
        waiting = connection.execute(
            f"SELECT id, head, payload, attempts, boot FROM inputs WHERE {of_stream}id > ? ORDER BY id LIMIT ?",  # noqa: S608
            (*(key.split("/") if key else ()), after, limit),
        )
        rows: list[StoredInput] = []
        size_bytes = 0
        for row, head, payload, attempts, boot in waiting:
            item = msgspec.msgpack.decode(head, type=Input)
            rows.append(StoredInput(row, item, payload, attempts, boot == self._boot))
            size_bytes += len(payload)
            if size_bytes >= self._limits.page_bytes_max or len(rows) == limit:
                return Page(rows, row)
        return Page(rows, last_id(connection, "inputs"))

    def begin(self, connection: sqlite3.Connection, row: int) -> None:
        """An input is about to be tried: a crash from now on is its doing."""
        connection.execute("UPDATE inputs SET begun = 1 WHERE id = ?", (row,))

    def advance(
        self,
        connection: sqlite3.Connection,
        row: int,
        now: float,
        *,
        state: bytes | None,
        events: Sequence[Event],
        buried: str,
    ) -> tuple[Outgoing, ...]:
        """The input is done: it goes, its stream's state and its events come; or it becomes a dead letter."""
        found = connection.execute(
            "DELETE FROM inputs WHERE id = ? RETURNING stream, size, head, payload, attempts", (row,)
        ).fetchone()
        if found is None:  # dropped meanwhile: its effect is not wanted any more
            return ()
        stream, size, head, payload, attempts = found
        self._resize(-size)
        if state is not None:
            connection.execute("UPDATE streams SET state = ? WHERE id = ?", (state, stream))
        added = [self._outbox.add(connection, event, now) for event in events]
        out = [event for event in added if event is not None]
        if buried:
            item = msgspec.msgpack.decode(head, type=Input)
            letter = self._letters.letter("input", item.tenant, item.device, item.stream, buried, attempts)
            out += self._letters.bury(connection, letter, now, head=head, payload=payload)
        return tuple(out)

    def advance_all(
        self, connection: sqlite3.Connection, steps: Sequence[Advance], now: float, *, state: bytes | None
    ) -> tuple[Outgoing, ...]:
        """Several inputs of one stream are done."""
        out: list[Outgoing] = []
        for step in steps:
            new = state if step is steps[-1] else None
            out += self.advance(connection, step.row, now, state=new, events=step.events, buried=step.buried)
        return tuple(out)

    def state(self, connection: sqlite3.Connection, tenant: str, device: str, stream: str) -> bytes | None:
        """A stream's explicit state, as the last `advance` wrote it."""
        found = connection.execute(
            "SELECT state FROM streams WHERE tenant = ? AND device = ? AND name = ?", (tenant, device, stream)
        ).fetchone()
        return None if found is None else found[0]
