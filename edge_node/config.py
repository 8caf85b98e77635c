"""What an edge node is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edge_node.mqtt.streams.definition import StreamDefinition, by_name
from nearcast.transport.mqtt.topics import is_id, require_id
from router.serving_config import ServingConfig

LOCAL = "local"
"""The tenant of the node's own machine."""
SPAWN = "spawn"
"""As `mqtt.broker`: one of the node's own, for this machine."""


class TenantBrokerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A Mosquitto of the node's own for one tenant, whose devices have certificates: `[[mqtt.tenant_brokers]]`.

    Attributes:
        tenant: whose devices.
        host: where it listens; any address.
        port: 0 = a free one.
        names: what devices call this machine, names or addresses; the first stands in invitations.
        certificate_days: life of a device's certificate, which it renews at two thirds. A device that is away for
            longer needs a new invitation.
    """

    tenant: str
    host: str = "127.0.0.1"
    port: int = 8883
    names: tuple[str, ...] = ()
    certificate_days: Annotated[int, msgspec.Meta(ge=1, le=365)] = 30

    def __post_init__(self) -> None:
        if not is_id(self.tenant) or self.tenant == LOCAL:
            raise ValueError(
                f"{self.tenant!r} can be no tenant with certificates; use [a-z0-9_-]{{1,64}}, not {LOCAL!r}"
            )


class UpstreamConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A second broker, to which the node forwards what streams bring about, and its dead letters: `[mqtt.upstream]`.

    What cannot be forwarded waits on disk, within `outbox_bytes_max` and each event's own time to live.

    Attributes:
        url: `mqtt://host:port` or `mqtts://…`; "" = none.
        ca: PEM file of whom its certificate must come from; "" = the machine's authorities. For `mqtts` only.
        certificate, key: PEM files of who we are there.
        tenants: whose messages it gets.
    """

    url: str = ""
    ca: str = ""
    certificate: str = ""
    key: str = ""
    tenants: tuple[str, ...] = (LOCAL,)

    def __post_init__(self) -> None:
        if not self.url:
            return
        if not self.url.startswith(("mqtt://", "mqtts://")) or self.url.rstrip("/").count("/") > 2:
            raise ValueError(f"{self.url!r} is no broker; write it as mqtt://host:port or mqtts://host:port")
        if bool(self.certificate) != bool(self.key):
            raise ValueError("certificate and key go together")
        if (self.ca or self.key) and not self.url.startswith("mqtts://"):
            raise ValueError("ca, certificate and key need an upstream with mqtts://")


class MqttConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The node's side of MQTT.

    Attributes:
        broker: `mqtt://host:port` of a running broker, `spawn` for one of the node's own on loopback, "" = no MQTT.
        port: of the node's own broker; 0 = a free one.
        tenants: whose requests are read. Without authentication only `local`.
        discovery_prefix: tell Home Assistant of the streams under this topic, usually `homeassistant`; "" = do not. Not
            on the brokers of tenants.
        pending_max: requests accepted and not yet answered; beyond it devices are told to wait.
        in_flight_max: of these, how many are given to the models at the same time.
        tenant_brokers: brokers of tenants whose devices have certificates, beside `broker`.
        durability: `full` = what is accepted is on disk first, and answered after a crash; `none` = only the broker
            keeps a request until its answer is on its way.
        metrics_interval_s: how often the node's metrics are published on its topic `metrics`; 0 = never.
        upstream: a second broker for events and dead letters.
        outbox_bytes_max: events that wait for a broker, on disk. inputs_bytes_max: streams' messages that wait for
            their model, on disk.
        when_full: `drop-oldest`, or `reject` = the new one goes. Either is counted and told of in a dead letter.
    """

    broker: str = ""
    port: int = 0
    tenants: tuple[str, ...] = ("local",)
    discovery_prefix: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{0,64}\Z")] = ""
    pending_max: int = 1024
    in_flight_max: int = 64
    tenant_brokers: tuple[TenantBrokerConfig, ...] = ()
    durability: Literal["full", "none"] = "full"
    metrics_interval_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    upstream: UpstreamConfig = UpstreamConfig()
    outbox_bytes_max: Annotated[int, msgspec.Meta(ge=65_536)] = 256 * 1024 * 1024
    inputs_bytes_max: Annotated[int, msgspec.Meta(ge=65_536)] = 256 * 1024 * 1024
    when_full: Literal["drop-oldest", "reject"] = "drop-oldest"

    def __post_init__(self) -> None:
        if self.broker not in ("", SPAWN) and not self.broker.startswith("mqtt://"):
            raise ValueError(
                f"{self.broker!r} is no broker; write it as mqtt://host:port, or `spawn` for one of its own (with "
                "certificates: tenant_brokers)"
            )
        names = [each.tenant for each in self.tenant_brokers]
        if len(set(names)) < len(names) or set(names) & set(self.tenants):
            raise ValueError("each tenant has one broker; name none of them twice")


class EdgeConfig(ServingConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One edge node: what every serving node has, and MQTT.

    `streams` says what messages on `…/up/data/{name}` mean: `[[streams]]` in the file.
    """

    name: str = "edge-1"
    data_dir: str = ".nearcast/edge-1"
    mqtt: MqttConfig = MqttConfig()
    streams: tuple[StreamDefinition, ...] = ()

    def __post_init__(self) -> None:
        by_name(self.streams)

    def ledger_path(self, tenant: str) -> Path:
        """What a tenant's devices sent and are owed: one file for each broker, and a tenant has a broker of its own."""
        folder = Path(self.data_dir)
        return (folder if tenant == LOCAL else folder / "tenants" / require_id(tenant, "tenant")) / "inbox.sqlite"
