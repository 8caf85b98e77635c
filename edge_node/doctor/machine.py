"""What can be examined without a broker: the clock, and the certificates on the disk and at the broker's door."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from cryptography import x509

from edge_node.clock import open_clock
from edge_node.doctor.findings import DoctorLimits, Finding, Subject
from nearcast.clock import Clock
from nearcast.errors import MeshError
from nearcast.identity import load_identity
from nearcast.identity.node import CERTIFICATE_FILE

CERTIFICATES_MAX = 1024
"""Files that are looked into."""
DAY_S = 86_400.0
_SUFFIXES = (".pem", ".crt")
_MARK = b"-----BEGIN CERTIFICATE-----"
_RENEW = "Renew it: the node does so by itself while it runs and reaches its authority."


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate that was found, and when it is valid, in seconds since 1970."""

    where: str
    starts_at: float
    ends_at: float


def find_clock(data_dir: Path, clock: Clock) -> Finding:
    """Whether the machine's clock can be right: not before this release, not before what the node has seen."""
    reading = open_clock(data_dir, clock).read()
    if reading.reason:
        advice = "Set the clock, or let NTP do it; delete clock.json in the node's folder if the clock is right."
        return Finding(check="clock", status="fail", detail=reading.reason, advice=advice)
    return Finding(check="clock", status="ok", detail="not before anything that this node has seen")


async def find_certificates(subject: Subject, now: float, limits: DoctorLimits, *, has_broker: bool) -> Finding:
    """Whether everybody's certificates are valid at the wall-clock second `now`, and match.

    Returns:
        `ok` also where there are none: then the broker is for this machine alone.
    """
    held, troubles = await asyncio.to_thread(_on_disk, subject)
    if subject.device_tls is not None and has_broker:
        try:
            held = [*held, await asyncio.to_thread(_presented, subject, limits)]
        except (OSError, ValueError) as error:
            troubles.append(f"the broker shows no certificate: {error}")
        troubles += await _refusals(subject, limits)
    return judge_certificates(held, troubles, now, limits)


def judge_certificates(held: Sequence[Held], troubles: Sequence[str], now: float, limits: DoctorLimits) -> Finding:
    """What the dates mean."""
    dead = [f"{one.where} expired {(now - one.ends_at) / DAY_S:.1f} days ago" for one in held if one.ends_at <= now]
    early = [
        f"{one.where} is valid only in {(one.starts_at - now) / DAY_S:.1f} days" for one in held if one.starts_at > now
    ]
    soon = [
        f"{one.where} has {(one.ends_at - now) / DAY_S:.1f} days left"
        for one in held
        if now < one.ends_at < now + limits.expires_soon * (one.ends_at - one.starts_at)
    ]
    if dead or early or troubles:
        detail = "; ".join([*dead, *early, *troubles])
        return Finding(check="certificates", status="fail", detail=detail, advice=_RENEW if dead else "")
    if soon:
        return Finding(check="certificates", status="warn", detail="; ".join(soon), advice=_RENEW)
    return Finding(check="certificates", status="ok", detail=f"{len(held)} found, all valid")


def _on_disk(subject: Subject) -> tuple[list[Held], list[str]]:
    found: list[Held] = []
    troubles: list[str] = []
    for path in sorted(set(_files(subject)))[:CERTIFICATES_MAX]:
        try:
            data = path.read_bytes()
            certificates = x509.load_pem_x509_certificates(data) if _MARK in data else []
        except (OSError, ValueError) as error:
            troubles.append(f"{path} cannot be read: {error}")
            continue
        found += [_held(str(path), certificate) for certificate in certificates]
    identity = subject.data_dir / "identity"
    if (identity / CERTIFICATE_FILE).exists():
        try:
            load_identity(identity)
        except MeshError as error:
            troubles.append(error.message)
    return found, troubles


def _files(subject: Subject) -> Iterable[Path]:
    for folder in ("identity", "broker", "tenants"):
        yield from (path for path in (subject.data_dir / folder).rglob("*") if path.suffix in _SUFFIXES)
    for tls in (subject.device_tls, subject.node_tls):
        if tls is not None:
            yield from (path for path in (tls.ca, tls.certificate) if path is not None)


def _presented(subject: Subject, limits: DoctorLimits) -> Held:
    """The certificate that the broker shows, whoever signed it: an expired one is to be seen too."""
    pem = ssl.get_server_certificate((subject.host, subject.port), timeout=limits.answer_timeout_s)
    return _held(f"the broker at {subject.host}:{subject.port}", x509.load_pem_x509_certificate(pem.encode()))


async def _refusals(subject: Subject, limits: DoctorLimits) -> list[str]:
    """Why a TLS connection does not come about."""
    assert subject.device_tls is not None
    try:
        async with asyncio.timeout(limits.answer_timeout_s):
            context = subject.device_tls.context()
            _, writer = await asyncio.open_connection(subject.host, subject.port, ssl=context)
            writer.close()
    except MeshError as error:
        return [error.message]
    except ssl.SSLCertVerificationError as error:
        return [f"the broker's certificate is refused: {error.verify_message}"]
    except (OSError, TimeoutError) as error:
        return [f"TLS with the broker fails: {error or 'no answer in time'}"]
    return []


def _held(where: str, certificate: x509.Certificate) -> Held:
    return Held(
        where=where,
        starts_at=certificate.not_valid_before_utc.timestamp(),
        ends_at=certificate.not_valid_after_utc.timestamp(),
    )
