"""Dead letters: what the node gave up, with the reason, until somebody looks. `list_letters` and `mark_for_replay`
work on the file beside a running node, and without one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from edge_node.mqtt.ledger.outbox import Outbox
from edge_node.mqtt.ledger.records import LINK_BITS, Event, Kind, Letter, Link, Outgoing
from edge_node.mqtt.limits import LedgerLimits
from nearcast.clock import Clock
from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt import topics

BUSY_TIMEOUT_S = 5.0


class Letters:
    """The table of dead letters, and the message about each.

    Args:
        node: the last level of the topic that announces them.
        outbox: takes the announcements.
        clock: its wall time dates them.
    """

    def __init__(self, node: str, limits: LedgerLimits, outbox: Outbox, clock: Clock) -> None:
        self._node = node
        self._limits = limits
        self._outbox = outbox
        self._clock = clock

    def letter(self, kind: Kind, tenant: str, device: str, name: str, reason: str, attempts: int) -> Letter:
        """A letter that is not stored yet."""
        at = self._clock.wall()
        return Letter(
            id=0, at=at, kind=kind, tenant=tenant, device=device, name=name, reason=reason, attempts=attempts,
            size_bytes=0,
        )  # fmt: skip

    def bury(
        self, connection: sqlite3.Connection, letter: Letter, now: float, *, head: bytes, payload: bytes
    ) -> tuple[Outgoing, ...]:
        """Store a letter and order that it be announced. The oldest letters go when there are too many."""
        size_bytes = len(head) + len(payload)
        row = connection.execute(
            "INSERT INTO letters (at, kind, tenant, device, name, reason, attempts, size, head, payload)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (letter.at, letter.kind, letter.tenant, letter.device, letter.name, letter.reason, letter.attempts,
             size_bytes, head, payload),
        ).lastrowid  # fmt: skip
        assert row is not None
        self._bound(connection)
        stored = msgspec.structs.replace(letter, id=row, size_bytes=size_bytes)
        event = Event(
            topic=topics.dead_letter_topic(letter.tenant, self._node),
            payload=msgspec.json.encode(stored),
            ttl_s=self._limits.letter_ttl_s,
        )
        announced = self._outbox.add(connection, event, now)
        return () if announced is None else (announced,)

    def marked(self, connection: sqlite3.Connection, links: Sequence[Link]) -> list[tuple[Letter, bytes]]:
        """The letters that are to be tried again and can be on a node with these links: letter and head."""
        absent = msgspec.json.encode([link for link in LINK_BITS if link not in links]).decode()
        found = connection.execute(
            "SELECT h.*, l.head FROM letters l JOIN letter_heads h USING (id) WHERE l.replay"
            " AND NOT (l.kind = 'outgoing' AND l.name IN (SELECT value FROM json_each(?))) ORDER BY id",
            (absent,),
        )
        return [(_letter(row), row[-1]) for row in found.fetchall()]

    def payload(self, connection: sqlite3.Connection, row: int) -> bytes:
        """What a letter carries."""
        (payload,) = connection.execute("SELECT payload FROM letters WHERE id = ?", (row,)).fetchone()
        return bytes(payload)

    def remove(self, connection: sqlite3.Connection, rows: Iterable[int]) -> None:
        """Letters are something else again."""
        connection.executemany("DELETE FROM letters WHERE id = ?", [(row,) for row in rows])

    def _bound(self, connection: sqlite3.Connection) -> None:
        limits = self._limits
        rows, size_bytes = connection.execute("SELECT count(*), coalesce(sum(size), 0) FROM letters").fetchone()
        while rows > limits.letters_max or size_bytes > limits.letters_bytes_max:
            row, size = connection.execute("SELECT id, size FROM letters ORDER BY id LIMIT 1").fetchone()
            connection.execute("DELETE FROM letters WHERE id = ?", (row,))
            rows, size_bytes = rows - 1, size_bytes - size


def list_letters(path: Path) -> Sequence[Letter]:
    """All dead letters of a ledger file, oldest first.

    Raises:
        MeshError: INVALID_REQUEST if there is no ledger, UNAVAILABLE if it cannot be read.
    """
    return [_letter(row) for row in _run(path, "SELECT * FROM letter_heads ORDER BY id", [()])]


def read_letter(path: Path, row: int) -> tuple[Letter, bytes] | None:
    """One dead letter and its payload as the device sent it; None if there is none with this id.

    Raises:
        MeshError: INVALID_REQUEST if there is no ledger, UNAVAILABLE if it cannot be read.
    """
    found = _run(path, "SELECT h.*, l.payload FROM letters l JOIN letter_heads h USING (id) WHERE id = ?", [(row,)])
    return (_letter(found[0]), found[0][-1]) if found else None


def mark_for_replay(path: Path, rows: Iterable[int]) -> list[int]:
    """Ask that letters be tried again: a running node looks for the mark, another finds it when it starts.

    Returns:
        The ids that exist.

    Raises:
        MeshError: INVALID_REQUEST if there is no ledger, UNAVAILABLE if it cannot be written.
    """
    ids = [(row,) for row in rows]
    return [row for (row,) in _run(path, "UPDATE letters SET replay = 1 WHERE id = ? RETURNING id", ids)]


def _run(path: Path, statement: str, arguments: Sequence[tuple[int, ...]]) -> list[tuple[Any, ...]]:
    if not path.is_file():
        where = "name the node with --config FILE or --set data_dir=FOLDER"
        raise MeshError(Code.INVALID_REQUEST, f"There is no ledger at {path}; {where}.")
    try:
        with closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as connection, connection:
            return [row for each in arguments for row in connection.execute(statement, each).fetchall()]
    except sqlite3.Error as error:
        raise MeshError(Code.UNAVAILABLE, f"The ledger {path} cannot be used: {error}.") from error


def _letter(row: Sequence[Any]) -> Letter:
    names = ("id", "at", "kind", "tenant", "device", "name", "reason", "attempts", "size_bytes", "replay")
    return msgspec.convert(dict(zip(names, row, strict=False)), Letter, strict=False)
