"""Whom to examine: out of the settings of a node, and what it has on its disk."""

from __future__ import annotations

import secrets
from pathlib import Path

from edge_node.config import EdgeConfig
from edge_node.doctor.findings import Subject
from nearcast.errors import Code, MeshError
from nearcast.identity.device import DeviceIdentity
from nearcast.transport.mqtt.connection import parse_url
from nearcast.transport.mqtt.tls import TlsFiles

SPAWN = "spawn"


def find_subject(
    config: EdgeConfig, *, url: str = "", identity: Path | None = None, broker_config: Path | None = None
) -> Subject:
    """What a node's settings mean for an examination.

    Args:
        config: the node's.
        url: `mqtt://host:port/tenant`; "" = the broker of the identity, or else of the settings.
        identity: folder of a device's identity, to be that device; None = anonymous.
        broker_config: the broker's configuration; None = that of the node's own broker, if it is this one.

    Raises:
        MeshError: INVALID_REQUEST if no broker is named anywhere, UNAUTHENTICATED if the identity cannot be read.
    """
    data_dir = Path(config.data_dir)
    own = data_dir / "broker" / "mosquitto.conf"
    held = None if identity is None else DeviceIdentity.load(identity)
    url = url or ("" if held is None else held.place.url)
    if not url:
        url = _spawned(own) if config.mqtt.broker == SPAWN else config.mqtt.broker
    if not url:
        text = "No broker is named: use --url mqtt://host:port, or --set mqtt.broker=… as the node does."
        raise MeshError(Code.INVALID_REQUEST, text)
    host, port, path = parse_url(url)
    if broker_config is None and own.exists() and listener_port(own.read_text()) == port:
        broker_config = own
    return Subject(
        host=host,
        port=port,
        tenant=held.place.tenant if held is not None else path.partition("/")[0] or config.mqtt.tenants[0],
        device=held.place.name if held is not None else f"doctor-{secrets.token_hex(4)}",
        node=config.name,
        device_tls=None if held is None else TlsFiles(held.ca, held.certificate, held.key),
        broker_config=broker_config,
        data_dir=data_dir if data_dir.is_dir() else None,
    )


def listener_port(text: str) -> int:
    """The port of the first listener in a `mosquitto.conf`; 0 if it names none."""
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == "listener" and words[1].isdecimal():
            return int(words[1])
    return 0


def _spawned(own: Path) -> str:
    """Where the node's own broker listens; it writes so into its configuration each time that it starts."""
    try:
        port = listener_port(own.read_text())
    except OSError as error:
        text = f"{own} cannot be read: has the node ever run with mqtt.broker=spawn? {error.strerror}."
        raise MeshError(Code.INVALID_REQUEST, text) from error
    return f"mqtt://127.0.0.1:{port}"
