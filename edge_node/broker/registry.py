"""Claims, certificates and revocations of one tenant, in one SQLite file that the node and its operator share."""

from __future__ import annotations

import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cryptography import x509

from edge_node.broker.access import Kind, claim_names, is_device
from edge_node.broker.provisioning import Claim, Holder, ProvisioningLimits, require_grant, wanted_name
from nearcast.errors import Code, MeshError

BUSY_TIMEOUT_S = 5.0
CERTIFICATES_KEPT_MAX = 100_000
"""Expired certificates are forgotten beyond this number, and never by the clock alone: it may be wrong for a while."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS claims (
    name TEXT PRIMARY KEY, kind TEXT NOT NULL, holder TEXT NOT NULL, uses_left INTEGER NOT NULL,
    expires_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS certificates (
    serial TEXT PRIMARY KEY, name TEXT NOT NULL, key TEXT NOT NULL, issued_at REAL NOT NULL, expires_at REAL NOT NULL,
    revoked_at REAL, purged INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS certificates_name ON certificates (name);
CREATE INDEX IF NOT EXISTS certificates_validity ON certificates (revoked_at, expires_at);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value REAL NOT NULL);
"""
_GONE = (
    "SELECT name, MIN(purged) FROM certificates GROUP BY name HAVING SUM(revoked_at IS NULL AND expires_at > :now) = 0"
)
Sign: TypeAlias = Callable[[str], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the listing. Times are wall-clock seconds."""

    name: str
    state: str
    issued_at: float
    expires_at: float
    uses_left: int | None = None
    holder: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rights:
    """What the broker has to know.

    Attributes:
        readers: Common Names of readers.
        denied: devices of whom no certificate holds any more, revoked or expired.
        revoked: serial number -> when, of certificates that have not expired.
        unpurged: holders without rights of whom the broker may still know a session.
    """

    readers: tuple[str, ...]
    denied: tuple[str, ...]
    revoked: dict[int, float]
    unpurged: tuple[str, ...]


class Registry:
    """The file. Blocks; any thread may call. Times are wall-clock seconds."""

    def __init__(self, path: Path, limits: ProvisioningLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        path.touch(mode=0o600)
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_TIMEOUT_S)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def invite(self, kind: Kind, holder: str, *, uses: int, life_s: float, key: str, sign: Sign) -> tuple[Claim, bytes]:
        """Make a claim and its certificate (PEM), for the key with the fingerprint `key`.

        Raises:
            MeshError: INVALID_REQUEST for a bad number, OVERLOADED if too many are open.
        """
        limits, now = self._limits, self._clock()
        if not 1 <= uses <= (1 if holder else limits.claim_uses_max):
            raise MeshError(Code.INVALID_REQUEST, "A claim for a name makes one device, another one at least one.")
        if not 0 < life_s <= limits.claim_life_s_max:
            raise MeshError(Code.INVALID_REQUEST, f"A claim holds at most {limits.claim_life_s_max:.0f} seconds.")
        with self._transaction() as database:
            database.execute("DELETE FROM claims WHERE expires_at <= ?", (now,))
            name = self._free_claim(database, now)
            certificate = sign(name)
            database.execute("INSERT INTO claims VALUES (?, ?, ?, ?, ?)", (name, kind, holder, uses, now + life_s))
            self._record(database, name, key, certificate, now)
        claim = Claim(name=name, kind=kind, holder=holder, uses_left=uses, expires_at=now + life_s)
        return claim, certificate

    def issue(self, asker: str, wanted: str, key: str, sign: Sign) -> tuple[str, bytes]:
        """Grant a question; returns the Common Name and the certificate (PEM).

        The use of a claim is spent in the transaction that records the certificate.

        Raises:
            MeshError: as `require_grant` and `wanted_name` do; OVERLOADED if the tenant has too many holders.
        """
        now = self._clock()
        with self._transaction() as database:
            claim = self._claim(database, asker)
            holder = self._holder(database, wanted_name(asker, wanted, claim), now)
            spends = require_grant(key, claim, holder, now, self._limits)
            if spends:
                self._require_room(database, now)
            certificate = sign(holder.name)
            self._record(database, holder.name, key, certificate, now)
            if spends:
                database.execute("UPDATE claims SET uses_left = uses_left - 1 WHERE name = ?", (asker,))
                if not is_device(holder.name):  # a reader is named in the access file
                    _advance(database)
        return holder.name, certificate

    def revoke(self, name: str) -> int:
        """Revoke every certificate of a Common Name, and forget its claim; returns how many there were."""
        now = self._clock()
        with self._transaction() as database:
            database.execute("DELETE FROM claims WHERE name = ? OR (holder = ? AND holder != '')", (name, name))
            changed = "UPDATE certificates SET revoked_at = ?, purged = 0 WHERE name = ? AND revoked_at IS NULL"
            count = database.execute(changed, (now, name)).rowcount
            _advance(database)
        return count

    def purged(self, name: str) -> None:
        """Note that the broker knows nothing of the holder any more."""
        with self._transaction() as database:
            held = (
                "UPDATE certificates SET purged = 1 WHERE name = :name AND (revoked_at NOT NULL OR expires_at <= :now)"
            )
            database.execute(held, {"name": name, "now": self._clock()})

    def version(self) -> tuple[int, int]:
        """What the broker has to know changes the first number, and time, by which certificates expire, the second."""
        query = "SELECT COUNT(*) FROM certificates WHERE revoked_at IS NULL AND expires_at > :now"
        with self._transaction() as database:
            return _fact(database, "revision"), database.execute(query, {"now": self._clock()}).fetchone()[0]

    def revision(self) -> int:
        """Grows with each command that the broker has to know of."""
        with self._transaction() as database:
            return _fact(database, "revision")

    def applied(self) -> int:
        """The last revision that the broker was told of."""
        with self._transaction() as database:
            return _fact(database, "applied")

    def apply(self, revision: int) -> None:
        """Note that the broker knows everything up to `revision`."""
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO facts VALUES ('applied', ?)", (revision,))

    def rights(self) -> Rights:
        """What holds now."""
        now = self._clock()
        with self._transaction() as database:
            listed = "SELECT serial, revoked_at FROM certificates WHERE revoked_at IS NOT NULL AND expires_at > ?"
            held = (
                "SELECT DISTINCT name FROM certificates"
                " WHERE name LIKE 'reader+%' AND revoked_at IS NULL AND expires_at > :now"
            )
            gone = database.execute(_GONE, {"now": now}).fetchall()
            return Rights(
                readers=_names(database.execute(held, {"now": now})),
                denied=tuple(name for name, _ in gone if is_device(name)),
                revoked={int(serial, 16): at for serial, at in database.execute(listed, (now,))},
                unpurged=tuple(name for name, purged in gone if not purged),
            )

    def listing(self) -> list[Row]:
        """Open claims, then devices and readers, each with its newest certificate."""
        now = self._clock()
        claims = (
            "SELECT claims.name, issued_at, claims.expires_at, uses_left, holder FROM claims"
            " JOIN certificates USING (name) WHERE claims.expires_at > ? ORDER BY issued_at"
        )
        holders = (
            "SELECT name, MAX(issued_at), MAX(expires_at), SUM(revoked_at IS NULL AND expires_at > :now),"
            " COUNT(revoked_at) FROM certificates"
            " WHERE name NOT LIKE 'claim+%' GROUP BY name ORDER BY name"
        )
        with self._transaction() as database:
            open_claims = database.execute(claims, (now,)).fetchall()
            known = database.execute(holders, {"now": now}).fetchall()
        rows = [
            Row(name=name, state="open" if left else "used", issued_at=at, expires_at=end, uses_left=left, holder=to)
            for name, at, end, left, to in open_claims
        ]
        for name, at, end, held, revoked in known:
            state = "valid" if held else "revoked" if revoked else "expired"
            rows.append(Row(name=name, state=state, issued_at=at, expires_at=end))
        return rows

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        database = self._database
        with self._lock:
            try:
                database.execute("BEGIN IMMEDIATE")
                try:
                    yield database
                except BaseException:
                    database.execute("ROLLBACK")
                    raise
                database.execute("COMMIT")
            except sqlite3.Error as error:
                raise MeshError(Code.UNAVAILABLE, f"The register of devices cannot be used: {error}.") from error

    def _claim(self, database: sqlite3.Connection, name: str) -> Claim | None:
        row = database.execute("SELECT name, kind, holder, uses_left, expires_at FROM claims WHERE name = ?", (name,))
        found = row.fetchone()
        if found is None:
            return None
        return Claim(name=found[0], kind=found[1], holder=found[2], uses_left=found[3], expires_at=found[4])

    def _holder(self, database: sqlite3.Connection, name: str, now: float) -> Holder:
        query = "SELECT key, revoked_at, expires_at, purged FROM certificates WHERE name = ?"
        rows = database.execute(query, (name,)).fetchall()
        held = [key for key, revoked_at, expires_at, _ in rows if revoked_at is None and expires_at > now]
        free = [end + self._limits.reuse_after_s if at is None else at for _, at, end, _ in rows]
        return Holder(
            name=name,
            keys=frozenset(held),
            certificates=len(held),
            free_at=max(free) if rows and not held else None,
            purged=all(purged for *_, purged in rows),
        )

    def _free_claim(self, database: sqlite3.Connection, now: float) -> str:
        """A name for a claim of which the broker knows nothing and no certificate holds."""
        used = "SELECT name FROM certificates WHERE name LIKE 'claim+%' AND (purged = 0 OR expires_at > ?)"
        taken = {name for (name,) in database.execute(used, (now,))}
        free = [name for name in claim_names(self._limits.claims_max) if name not in taken]
        if not free:
            raise MeshError(Code.OVERLOADED, f"{self._limits.claims_max} claims are open; let some expire.")
        return secrets.choice(free)

    def _require_room(self, database: sqlite3.Connection, now: float) -> None:
        query = (
            "SELECT COUNT(DISTINCT name) FROM certificates"
            " WHERE name NOT LIKE 'claim+%' AND revoked_at IS NULL AND expires_at > ?"
        )
        if database.execute(query, (now,)).fetchone()[0] >= self._limits.holders_max:
            raise MeshError(Code.OVERLOADED, f"The tenant has {self._limits.holders_max} devices; revoke some first.")

    def _record(self, database: sqlite3.Connection, name: str, key: str, certificate: bytes, now: float) -> None:
        parsed = x509.load_pem_x509_certificate(certificate)
        row = (f"{parsed.serial_number:x}", name, key, now, parsed.not_valid_after_utc.timestamp())
        database.execute("INSERT INTO certificates VALUES (?, ?, ?, ?, ?, NULL, 0)", row)
        forget = (
            "DELETE FROM certificates WHERE expires_at <= ?"
            " AND serial IN (SELECT serial FROM certificates ORDER BY expires_at DESC LIMIT -1 OFFSET ?)"
        )
        database.execute(forget, (now, CERTIFICATES_KEPT_MAX))


def _advance(database: sqlite3.Connection) -> None:
    database.execute("INSERT OR IGNORE INTO facts VALUES ('revision', 0)")
    database.execute("UPDATE facts SET value = value + 1 WHERE name = 'revision'")


def _fact(database: sqlite3.Connection, name: str) -> int:
    row = database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return 0 if row is None else int(row[0])


def _names(rows: sqlite3.Cursor) -> tuple[str, ...]:
    return tuple(name for (name,) in rows)
