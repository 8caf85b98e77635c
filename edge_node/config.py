"""What an edge node is told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from edge_node.mqtt.streams.definition import StreamDefinition, by_name
from nearcast.transport.mqtt.topics import is_id, require_id
from router.serving_config import ServingConfig

LOCAL = "local"
"""The tenant of the node's own machine."""


class TenantBrokerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A Mosquitto of the node's own for one tenant, whose devices have certificates: `[[mqtt.tenant_brokers]]`.

    Attributes:
        tenant: whose devices.
        host: where it listens; any address.
        port: 0 = a free one.
        names: what devices call this machine, names or addresses; the first stands in invitations.
    """

    tenant: str
    host: str = "127.0.0.1"
    port: int = 8883
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not is_id(self.tenant) or self.tenant == LOCAL:
            raise ValueError(f"{self.tenant!r} can be no tenant with certificates; use letters, digits, `_` and `-`")


class MqttConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The node's side of MQTT.

    Attributes:
        broker: `mqtt://host:port` of a running broker, `spawn` for one of the node's own on loopback, "" = no MQTT.
        port: of the node's own broker; 0 = a free one.
        tenants: whose requests are read. Without authentication only `local`.
        pending_max: requests accepted and not yet answered; beyond it devices are told to wait.
        in_flight_max: of these, how many are given to the models at the same time.
        tenant_brokers: brokers of tenants whose devices have certificates, beside `broker`.
        durability: `full` = what is accepted is on disk first, and answered after a crash; `none` = only the broker
            keeps a request until its answer is on its way.
    """

    broker: str = ""
    port: int = 0
    tenants: tuple[str, ...] = ("local",)
    pending_max: int = 1024
    in_flight_max: int = 64
    tenant_brokers: tuple[TenantBrokerConfig, ...] = ()
    durability: Literal["full", "none"] = "full"

    def __post_init__(self) -> None:
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
