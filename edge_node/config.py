"""What an edge node is told."""

from __future__ import annotations

from pathlib import Path

import msgspec

from nearcast.transport.mqtt.topics import require_id
from router.serving_config import ServingConfig

LOCAL = "local"
"""The tenant of the node's own machine."""


class MqttConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The node's side of MQTT.

    Attributes:
        broker: `mqtt://host:port` of a running broker, `spawn` for one of the node's own on loopback, "" = no MQTT.
        port: of the node's own broker; 0 = a free one.
        tenants: whose requests are read. Without authentication only `local`.
        pending_max: requests accepted and not yet answered; beyond it devices are told to wait.
        in_flight_max: of these, how many are given to the models at the same time.
    """

    broker: str = ""
    port: int = 0
    tenants: tuple[str, ...] = ("local",)
    pending_max: int = 1024
    in_flight_max: int = 64


class EdgeConfig(ServingConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One edge node: what every serving node has, and MQTT."""

    name: str = "edge-1"
    data_dir: str = ".nearcast/edge-1"
    mqtt: MqttConfig = MqttConfig()

    def ledger_path(self, tenant: str) -> Path:
        """What a tenant's devices sent and are owed: one file for each broker, and a tenant has a broker of its own."""
        folder = Path(self.data_dir)
        return (folder if tenant == LOCAL else folder / "tenants" / require_id(tenant, "tenant")) / "inbox.sqlite"
