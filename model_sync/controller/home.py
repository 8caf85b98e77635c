"""The folder of the sync process: its lock, its own identity, and the address that others look for."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from model_sync.repository.signing_key import KEY_MODE
from nearcast.durable import write_file
from nearcast.errors import Code, MeshError
from nearcast.identity import CERTIFICATE_LIFETIME_S, CertificateAuthority, Identity, load_identity, make_csr
from nearcast.runtime import is_loopback, parse_address
from nearcast.telemetry import get_logger

SYNC_NAME = "sync"
ENROLMENT_FILE = "control.db"
_log = get_logger("model_sync.controller")


@contextlib.contextmanager
def lock_home(home: Path) -> Iterator[None]:
    """Hold the folder for this process alone; the lock ends with the process, however it ends.

    Raises:
        MeshError: UNAVAILABLE if there are no keys, CONFLICT if another process serves this home.
    """
    if not (home / "repository").is_dir():
        raise MeshError(Code.UNAVAILABLE, f"{home} holds no keys of a sync process; make them: nearcast keys init.")
    descriptor = os.open(home / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise MeshError(Code.CONFLICT, f"Another sync process already serves {home}.") from error
        yield
    finally:
        os.close(descriptor)


def fresh_identity(home: Path, authority: CertificateAuthority) -> Identity:
    """The process's own identity, made anew once two thirds of its life are over: the authority is at hand."""
    folder = home / "identity"
    try:
        identity = load_identity(folder)
        if identity.validity().starts_at <= time.time() < identity.validity().renew_at:
            return identity
    except MeshError:
        _log.warning("identity_unreadable")
    write_identity(folder, authority, SYNC_NAME, "sync")
    return load_identity(folder)


def write_identity(folder: Path, authority: CertificateAuthority, name: str, role: str) -> bytes:
    """Make a key and a certificate for a process on this machine; answers the certificate (PEM)."""
    key, csr = make_csr(name, role)
    certificate = authority.issue(csr, name=name, role=role, lifetime_s=CERTIFICATE_LIFETIME_S)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_file(folder / "node.key", key, mode=KEY_MODE)
    write_file(folder / "ca.pem", authority.certificate_pem)
    write_file(folder / "node.pem", certificate)
    return certificate


def last_port(home: Path, host: str) -> list[int]:
    """The port of the last run. Nodes remember it, so a restarted process should come back to it."""
    try:
        address = parse_address((home / "control").read_text().strip().removeprefix("https://"))
    except (OSError, MeshError):
        return []
    return [address.port] if address.host == host and is_loopback(host) else []


def write_control(home: Path, url: str) -> None:
    """Leave the address where operators on this machine look for it."""
    write_file(home / "control", url.encode() + b"\n")
    operator = home.parent / "operator"
    if operator.is_dir() and os.access(operator, os.W_OK):
        write_file(operator / "control", url.encode() + b"\n")
