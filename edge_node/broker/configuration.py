"""The configuration that we give Mosquitto. Pure but for the question of who we are."""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerLimits:
    """Bounds of the generated broker configuration and of its start.

    `packet_bytes_max` leaves room around the largest payload that the worker takes, so that a request that is a little
    too large gets the answer 413 and not a cut connection. `connections_max` is for brokers that others can reach.
    `save_timeout_s`: how long a restart waits for what is queued to be written.
    """

    packet_bytes_max: int = 9 * 1024 * 1024
    inflight_messages_max: int = 100
    queued_messages_max: int = 100_000
    queued_bytes_max: int = 256 * 1024 * 1024
    autosave_interval_s: int = 5
    client_expiration: str = "7d"
    connections_max: int = 10_000
    keepalive_max_s: int = 3600
    start_timeout_s: float = 5.0
    start_attempts_max: int = 5
    stop_timeout_s: float = 3.0
    save_timeout_s: float = 30.0
    log_bytes_max: int = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsListener:
    """Files of a listener that takes nobody without a certificate of `ca`. A restart reads them anew.

    Mosquitto 2.0.11 reads all but `ca` on SIGHUP too, but then it uses memory that it has freed: for each session of a
    device that is away, where the user is who the certificate says.
    """

    ca: Path
    certificate: Path
    key: Path
    revoked: Path
    access: Path


def mosquitto_config(host: str, port: int, store: Path, limits: BrokerLimits, tls: TlsListener | None = None) -> str:
    """Configuration of a broker for anonymous devices on this machine, or with `tls` for those of one tenant."""
    lines = [
        "per_listener_settings false",
        f"allow_anonymous {'true' if tls is None else 'false'}",
        "set_tcp_nodelay true",  # without it every QoS 1 answer waits 40 ms for a delayed ACK
        f"max_packet_size {limits.packet_bytes_max}",
        f"max_inflight_messages {limits.inflight_messages_max}",
        f"max_queued_messages {limits.queued_messages_max}",
        f"max_queued_bytes {limits.queued_bytes_max}",
        f"max_keepalive {limits.keepalive_max_s}",
        "persistence true",
        f"persistence_location {store}/",
        f"autosave_interval {limits.autosave_interval_s}",
        f"persistent_client_expiration {limits.client_expiration}",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
    ]
    if os.geteuid() == 0:
        # As root it would drop to a user of its own, who cannot write our folder.
        lines.append(f"user {getpass.getuser()}")
    if tls is not None:
        lines.append(f"acl_file {tls.access}")
    lines.append(f"listener {port} {host}")
    if tls is not None:
        lines += _tls_lines(tls, limits)
    return "\n".join(lines) + "\n"


def _tls_lines(tls: TlsListener, limits: BrokerLimits) -> list[str]:
    return [
        f"max_connections {limits.connections_max}",
        f"cafile {tls.ca}",
        f"certfile {tls.certificate}",
        f"keyfile {tls.key}",
        f"crlfile {tls.revoked}",
        "tls_version tlsv1.2",
        "require_certificate true",
        "use_identity_as_username true",
        # Who could choose its client identifier could take over another's session, and with it what waits there.
        "use_username_as_clientid true",
    ]
