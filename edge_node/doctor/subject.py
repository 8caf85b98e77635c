"""Whom to examine: out of the settings of a node, and what it has on its disk."""

from __future__ import annotations

import secrets
from pathlib import Path

from edge_node.broker.tenant import TenantAuthority, tenant_folder
from edge_node.config import LOCAL, SPAWN, EdgeConfig
from edge_node.doctor.findings import Subject
from nearcast.errors import Code, MeshError
from nearcast.identity import load_identity
from nearcast.identity.device import DeviceIdentity
from nearcast.transport.mqtt.connection import parse_url
from nearcast.transport.mqtt.tls import TlsFiles

CONFIGURATION = "mosquitto.conf"
DEVICE = "nearcast-doctor"
DEVICE_LIFE_S = 600.0
"""The device that we pretend to be, and how long its certificate holds."""


def find_subject(
    config: EdgeConfig,
    *,
    url: str = "",
    tenant: str = LOCAL,
    identity: Path | None = None,
    broker_config: Path | None = None,
) -> Subject:
    """What a node's settings mean for an examination.

    Args:
        config: the node's.
        url: `mqtt://host:port/tenant`; "" = the broker of the tenant or of the identity, or else of the settings.
        tenant: one with a broker of its own on this node, or `local`.
        identity: folder of a device's identity, to be that device; None = somebody new.
        broker_config: the broker's configuration; None = that of the node's own broker, if it is this one.

    Raises:
        MeshError: INVALID_REQUEST if no broker is named anywhere, UNAUTHENTICATED if the identity cannot be read.
    """
    data_dir = Path(config.data_dir)
    if tenant != LOCAL and not url:
        return _of_tenant(config, tenant, identity)
    held = None if identity is None else DeviceIdentity.load(identity)
    own = data_dir / "broker" / CONFIGURATION
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
        tenant=held.place.tenant if held is not None else path.partition("/")[0] or tenant,
        device=held.place.name if held is not None else f"doctor-{secrets.token_hex(4)}",
        node=_node_name(config),
        device_tls=_files(held) if held is not None else TlsFiles() if url.startswith("mqtts://") else None,
        broker_config=broker_config,
        data_dir=data_dir,
    )


def _of_tenant(config: EdgeConfig, tenant: str, identity: Path | None) -> Subject:
    """A tenant with certificates: this node can make one for a device that does not exist."""
    data_dir = Path(config.data_dir)
    folder = tenant_folder(data_dir, tenant)
    authority = TenantAuthority.open(folder)
    try:
        held = None if identity is None else DeviceIdentity.load(identity)
        device_tls = authority.own_files(DEVICE, DEVICE, life_s=DEVICE_LIFE_S) if held is None else _files(held)
        host, port, _ = parse_url(authority.place.url)
        return Subject(
            host=host,
            port=port,
            tenant=tenant,
            device=DEVICE if held is None else held.place.name,
            node=_node_name(config),
            device_tls=device_tls,
            node_tls=TlsFiles(ca=authority.ca, certificate=folder / "doctor.pem", key=folder / "doctor.key"),
            broker_config=folder / "broker" / CONFIGURATION,
            data_dir=data_dir,
        )
    finally:
        authority.close()


def _node_name(config: EdgeConfig) -> str:
    """Where the node has joined a mesh, its certificate says what it is called."""
    try:
        return load_identity(Path(config.data_dir) / "identity").name
    except MeshError:
        return config.name  # it stands alone, or its certificates fail a line of their own


def _files(held: DeviceIdentity) -> TlsFiles:
    return TlsFiles(ca=held.ca, certificate=held.certificate, key=held.key)


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
