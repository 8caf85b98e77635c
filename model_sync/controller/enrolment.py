"""Who may join the mesh and who is in it: one-use invitations, issued certificates, removed names.

The state is one SQLite file. A secret is stored as its hash only; an invitation is spent in the same transaction that
records the certificate issued for it, so a crash leaves it either unused or used, never half.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nearcast.errors import Code, MeshError
from nearcast.identity import require_name

CERTIFICATES_PER_NAME_MAX = 8
"""Certificates of one name that are honoured at the same time: the newest ones, through renewals."""
REMOVED_MAX = 10_000
"""Removed names that are told to nodes, those whose certificates last longest first."""
KEEP_SPENT_S = 30 * 86_400.0
"""How long a spent or expired invitation is remembered, only to give a clear answer."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS invites (
    secret_sha256 TEXT PRIMARY KEY, name TEXT NOT NULL, role TEXT NOT NULL, root_version INTEGER NOT NULL,
    expires_at REAL NOT NULL, used_at REAL
);
CREATE TABLE IF NOT EXISTS members (name TEXT PRIMARY KEY, role TEXT NOT NULL, enrolled_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS certificates (
    sha256 TEXT PRIMARY KEY, name TEXT NOT NULL, issued_at REAL NOT NULL, expires_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS removed (name TEXT PRIMARY KEY, until REAL NOT NULL);
"""


class Issuer(Protocol):
    """The part of a certificate authority that enrolment needs."""

    def issue(self, csr_pem: bytes, *, name: str, role: str, lifetime_s: float) -> bytes:
        """The signed certificate as PEM."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One enrolled name. `expires_at` is when its newest certificate ends, in seconds since 1970."""

    name: str
    role: str
    enrolled_at: float
    expires_at: float


class EnrolmentAuthority:
    """Invites, enrols, renews and removes members of the mesh. Times are seconds since 1970."""

    def __init__(
        self,
        path: Path,
        *,
        lifetime_s: float = 7 * 86_400.0,
        invites_max: int = 10_000,
        invite_ttl_s_max: float = 7 * 86_400.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._lifetime_s = lifetime_s
        self._invites_max = invites_max
        self._invite_ttl_s_max = invite_ttl_s_max
        self._clock = clock
        path.touch(mode=0o600)
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def invite(self, name: str, role: str, ttl_s: float, root_version: int) -> tuple[str, float]:
        """Make a one-use invitation; answers its secret and when it expires.

        Raises:
            MeshError: INVALID_REQUEST for a bad name, role or time; CONFLICT if the name is taken.
        """
        require_name(role, name)
        if role == "sync":
            raise MeshError(Code.INVALID_REQUEST, "A sync process is never invited: it makes its own certificate.")
        if not 0 < ttl_s <= self._invite_ttl_s_max:
            raise MeshError(
                Code.INVALID_REQUEST, f"An invitation holds more than 0 and at most {self._invite_ttl_s_max:.0f} s."
            )
        now = self._clock()
        secret = secrets.token_urlsafe(32)
        with self._transaction() as database:
            database.execute("DELETE FROM invites WHERE expires_at < ?", (now - KEEP_SPENT_S,))
            self._require_free(database, name, now)
            open_invites = "SELECT COUNT(*) FROM invites WHERE used_at IS NULL AND expires_at > ?"
            if database.execute(open_invites, (now,)).fetchone()[0] >= self._invites_max:
                raise MeshError(Code.OVERLOADED, f"{self._invites_max} invitations are open; let some expire first.")
            database.execute(
                "INSERT INTO invites VALUES (?, ?, ?, ?, ?, NULL)",
                (_sha256(secret.encode()), name, role, root_version, now + ttl_s),
            )
        return secret, now + ttl_s

    def enrol(self, secret: str, csr: bytes, issuer: Issuer) -> tuple[bytes, int]:
        """Spend an invitation; answers the certificate (PEM) and the root version that the invitation named.

        Raises:
            MeshError: UNAUTHENTICATED for an unknown secret, FORBIDDEN for a spent or expired one.
        """
        now = self._clock()
        with self._transaction() as database:
            row = database.execute(
                "SELECT name, role, root_version, expires_at, used_at FROM invites WHERE secret_sha256 = ?",
                (_sha256(secret.encode()),),
            ).fetchone()
            if row is None:
                raise MeshError(Code.UNAUTHENTICATED, "The invitation is unknown; ask for one: nearcast nodes invite.")
            name, role, root_version, expires_at, used_at = row
            if used_at is not None:
                raise MeshError(Code.FORBIDDEN, "The invitation was used already; each works once. Ask for another.")
            if expires_at <= now:
                raise MeshError(Code.FORBIDDEN, "The invitation has expired; ask for another: nearcast nodes invite.")
            certificate = issuer.issue(csr, name=name, role=role, lifetime_s=self._lifetime_s)
            database.execute("UPDATE invites SET used_at = ? WHERE secret_sha256 = ?", (now, _sha256(secret.encode())))
            database.execute("DELETE FROM removed WHERE name = ?", (name,))
            self._record(database, name, role, certificate, now, self._lifetime_s)
        return certificate, root_version

    def renew(self, name: str, role: str, csr: bytes, issuer: Issuer) -> bytes:
        """Issue the next certificate (PEM) of a member whose present one was checked by `require_member`."""
        now = self._clock()
        certificate = issuer.issue(csr, name=name, role=role, lifetime_s=self._lifetime_s)
        with self._transaction() as database:
            self._record(database, name, role, certificate, now, self._lifetime_s)
        return certificate

    def admit(self, name: str, role: str, certificate: bytes, lifetime_s: float) -> None:
        """Record a member whose certificate was made by other means: the first operator."""
        with self._transaction() as database:
            self._record(database, name, role, certificate, self._clock(), lifetime_s)

    def require_member(self, name: str, role: str, certificate_sha256: str) -> None:
        """Check that a certificate, valid as such, is one that still counts.

        Raises:
            MeshError: FORBIDDEN if the name was removed, or enrolled anew with another certificate.
        """
        row = self._database.execute(
            "SELECT 1 FROM certificates JOIN members USING (name) WHERE sha256 = ? AND name = ? AND role = ?",
            (certificate_sha256, name, role),
        ).fetchone()
        if row is None:
            raise MeshError(Code.FORBIDDEN, f"{name} is not enrolled (any more); ask for an invitation.")

    def remove(self, name: str) -> None:
        """Revoke a member's certificates and open invitations, and free the name.

        Raises:
            MeshError: MODEL_NOT_FOUND if there is neither.
        """
        now = self._clock()
        with self._transaction() as database:
            database.execute("DELETE FROM removed WHERE until <= ?", (now,))
            database.execute(
                "INSERT OR REPLACE INTO removed SELECT name, MAX(expires_at) FROM certificates "
                "WHERE name = ? AND expires_at > ? GROUP BY name",
                (name, now),
            )
            removed = database.execute("DELETE FROM members WHERE name = ?", (name,)).rowcount
            removed += database.execute("DELETE FROM invites WHERE name = ? AND used_at IS NULL", (name,)).rowcount
            database.execute("DELETE FROM certificates WHERE name = ?", (name,))
            if not removed:
                raise MeshError(Code.MODEL_NOT_FOUND, f"No node is named {name}; see: nearcast nodes list.")

    def removed(self) -> list[str]:
        """Names that were removed, and not enrolled again, while a certificate of theirs has not expired yet."""
        rows = self._database.execute(
            "SELECT name FROM removed WHERE until > ? ORDER BY until DESC LIMIT ?", (self._clock(), REMOVED_MAX)
        )
        return sorted(name for (name,) in rows)

    def members(self) -> list[Member]:
        """Everyone who is enrolled, by name."""
        rows = self._database.execute(
            "SELECT name, role, enrolled_at, COALESCE((SELECT MAX(expires_at) FROM certificates AS c "
            "WHERE c.name = m.name), 0) FROM members AS m ORDER BY name"
        )
        return [Member(name=n, role=r, enrolled_at=since, expires_at=until) for n, r, since, until in rows]

    def _require_free(self, database: sqlite3.Connection, name: str, now: float) -> None:
        # A member whose last certificate has run out can only come back by an invitation, so its name counts as free.
        member = database.execute(
            "SELECT 1 FROM certificates JOIN members USING (name) WHERE name = ? AND expires_at > ?", (name, now)
        ).fetchone()
        if member:
            raise MeshError(
                Code.CONFLICT, f"The name {name} is taken; choose another, or: nearcast nodes remove {name}."
            )
        invited = "SELECT 1 FROM invites WHERE name = ? AND used_at IS NULL AND expires_at > ?"
        if database.execute(invited, (name, now)).fetchone():
            raise MeshError(Code.CONFLICT, f"{name} was invited already; to cancel that: nearcast nodes remove {name}.")

    def _record(
        self, database: sqlite3.Connection, name: str, role: str, certificate: bytes, now: float, lifetime_s: float
    ) -> None:
        database.execute(
            "INSERT INTO members VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET role = excluded.role",
            (name, role, now),
        )
        database.execute(
            "INSERT INTO certificates VALUES (?, ?, ?, ?)",
            (certificate_sha256(certificate), name, now, now + lifetime_s),
        )
        database.execute("DELETE FROM certificates WHERE expires_at < ?", (now,))
        database.execute(
            "DELETE FROM certificates WHERE name = ? AND sha256 NOT IN "
            "(SELECT sha256 FROM certificates WHERE name = ? ORDER BY issued_at DESC, rowid DESC LIMIT ?)",
            (name, name, CERTIFICATES_PER_NAME_MAX),
        )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield self._database
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")


def certificate_sha256(certificate_pem: bytes) -> str:
    """Digest of a certificate's DER form, as the TLS layer sees it."""
    import ssl

    return _sha256(ssl.PEM_cert_to_DER_cert(certificate_pem.decode().strip()))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
