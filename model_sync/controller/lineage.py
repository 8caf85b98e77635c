"""Who changed what, when, from which data, and what it replaced: one row for each change, never altered.

Beside the signed documents, which name the last change of each model alone. The table is in the controller's database;
each call opens it for itself, because changes are made in worker threads.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

ROWS_MAX = 100_000
"""Rows kept; the oldest go."""
READ_MAX = 1_000
BUSY_S = 10.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS lineage (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, by TEXT NOT NULL, channel TEXT NOT NULL,
    model TEXT NOT NULL, action TEXT NOT NULL, release INTEGER, replaced INTEGER,
    manifest_sha256 TEXT, data_sha256 TEXT, reason TEXT NOT NULL, intent INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS lineage_model ON lineage (model, id);
"""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One change.

    Attributes:
        at: seconds since 1970, by the controller's clock.
        by: name in the operator's certificate, or the controller itself.
        channel: "" for a release that was published and is in no channel by that.
        action: as in a rollout request, or `publish`.
        release: what the change is about; `replaced`: what it takes the place of.
        data_sha256: digest of the data that the release was trained on, as its manifest states it.
        intent: of the document that made it so; 0 for `publish`.
    """

    at: float
    by: str
    channel: str
    model: str
    action: str
    release: int | None = None
    replaced: int | None = None
    manifest_sha256: str | None = None
    data_sha256: str | None = None
    reason: str = ""
    intent: int = 0


_COLUMNS = Change.__struct_fields__


class Lineage:
    """The table of changes in the SQLite file at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch(mode=0o600)
        with self._open() as database:
            database.executescript(_SCHEMA)

    def append(self, *changes: Change) -> None:
        """Add rows durably, all or none."""
        places = ", ".join("?" * len(_COLUMNS))
        rows = [msgspec.structs.astuple(change) for change in changes]
        with self._open() as database, database:
            database.executemany(f"INSERT INTO lineage ({', '.join(_COLUMNS)}) VALUES ({places})", rows)  # noqa: S608
            database.execute("DELETE FROM lineage WHERE id <= (SELECT MAX(id) FROM lineage) - ?", (ROWS_MAX,))

    def read(self, model: str = "") -> list[Change]:
        """The newest changes of a model, or of all; the newest first, at most `READ_MAX`."""
        query = f"SELECT {', '.join(_COLUMNS)} FROM lineage"  # noqa: S608 (our own column names)
        with self._open() as database:
            rows = database.execute(
                f"{query} WHERE ? IN ('', model) ORDER BY id DESC LIMIT ?", (model, READ_MAX)
            ).fetchall()
        return [Change(**dict(zip(_COLUMNS, row, strict=True))) for row in rows]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=BUSY_S)) as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            yield database
