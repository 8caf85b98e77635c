"""The tables of the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

VERSION = 2
"""`PRAGMA user_version` of a file with these tables."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS boots (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS running (one INTEGER PRIMARY KEY CHECK (one = 1));
CREATE TABLE IF NOT EXISTS inbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL, device TEXT NOT NULL, correlation BLOB NOT NULL,
    digest BLOB NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'done')),
    boot INTEGER NOT NULL,
    finished REAL NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0, begun INTEGER NOT NULL DEFAULT 0,
    size INTEGER NOT NULL DEFAULT 0,
    request BLOB NOT NULL, payload BLOB, reply BLOB,
    UNIQUE (tenant, device, correlation)
);
CREATE INDEX IF NOT EXISTS inbox_by_age ON inbox (finished, id, size) WHERE state = 'done';
CREATE TABLE IF NOT EXISTS streams (
    id INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL, device TEXT NOT NULL, name TEXT NOT NULL,
    touched INTEGER NOT NULL DEFAULT 0,
    state BLOB, boots TEXT NOT NULL DEFAULT '[]',
    UNIQUE (tenant, device, name)
);
CREATE TABLE IF NOT EXISTS inputs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    stream INTEGER NOT NULL, boot INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, begun INTEGER NOT NULL DEFAULT 0,
    size INTEGER NOT NULL,
    head BLOB NOT NULL, payload BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS inputs_by_stream ON inputs (stream);
CREATE TABLE IF NOT EXISTS outbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    links INTEGER NOT NULL, boot INTEGER NOT NULL,
    topic TEXT NOT NULL, expires REAL NOT NULL, ttl REAL,
    inbox INTEGER, dedup INTEGER NOT NULL DEFAULT 0,
    size INTEGER NOT NULL, head BLOB, payload BLOB
);
CREATE INDEX IF NOT EXISTS outbox_by_inbox ON outbox (inbox) WHERE inbox IS NOT NULL;
CREATE TABLE IF NOT EXISTS letters (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL, kind TEXT NOT NULL,
    tenant TEXT NOT NULL, device TEXT NOT NULL, name TEXT NOT NULL,
    reason TEXT NOT NULL, attempts INTEGER NOT NULL, replay INTEGER NOT NULL DEFAULT 0,
    size INTEGER NOT NULL, head BLOB NOT NULL, payload BLOB NOT NULL
);
CREATE VIEW IF NOT EXISTS letter_heads AS
    SELECT id, at, kind, tenant, device, name, reason, attempts, size, replay FROM letters;
"""

UPGRADES: Mapping[int, Sequence[str]] = {
    1: (
        "ALTER TABLE streams ADD COLUMN boots TEXT NOT NULL DEFAULT '[]'",
        "UPDATE streams SET boots = json_array(json_array(boot, seq)) WHERE seq IS NOT NULL",
    )
}
"""What makes a file of an earlier version one of the next."""
