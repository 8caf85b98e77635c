"""What a node says about itself on its broker: presence, inventory, metrics; and what it lets itself be told."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry

from edge_node.mqtt.shadow import NodeSettings, Shadow
from nearcast.clock_store import ClockFloor
from nearcast.durable import write_file
from nearcast.errors import MeshError
from nearcast.load import VersionReport
from nearcast.telemetry import get_logger
from nearcast.transport.mqtt import topics
from nearcast.transport.mqtt.connection import Connection
from nearcast.transport.mqtt.message import Message

WATCH_INTERVAL_S = 1.0
PRESENCE_INTERVAL_S = 60.0
PRESENCE_EXPIRY_S = 180
"""A node says at least so often that it is there, and is not believed for longer: a will is lost with its broker."""
INVENTORY_MAX = 256
METRICS_MAX = 512
"""Versions and metrics named in one message."""
_METRIC_PREFIX = "nc_"
_METRICS_LEFT_OUT = ("_bucket", "_created")
_log = get_logger("nearcast.mqtt")


class Management:
    """A node's own topics on one broker. Everything here can wait: it is said again over the next connection.

    Args:
        node: the node's name.
        tenant: under which its topics lie.
        boot: identity of the machine's boot.
        clock: the floor under the machine's clock.
        inventory: the versions that this node holds.
        registry: the metrics that may be published.
        metrics_interval_s: seconds between two messages on `metrics`; 0 = none, which is the default: a bus belongs to
            its devices.
        shadow: file of the last wish; None = it is forgotten at the end.
        watch_interval_s: how often it looks whether something about it has changed.
    """

    def __init__(
        self,
        node: str,
        tenant: str,
        *,
        boot: str,
        clock: ClockFloor | None = None,
        inventory: Callable[[], Sequence[VersionReport]] | None = None,
        registry: CollectorRegistry | None = None,
        metrics_interval_s: float = 0.0,
        shadow: Path | None = None,
        watch_interval_s: float = WATCH_INTERVAL_S,
    ) -> None:
        self._node = node
        self._tenant = tenant
        self._boot = boot
        self._clock = clock
        self._inventory = inventory
        self._registry = registry
        self._metrics_interval_s = metrics_interval_s
        self._path = shadow
        self._watch_interval_s = watch_interval_s
        self._shadow = _load(shadow)
        self._connection: Connection | None = None
        self._said_clock = True
        self._said_models = b""
        self._presence_at = self._metrics_at = -math.inf
        self.wishes = topics.node_topic(tenant, node, "desired")
        """Where wishes come in: to be subscribed to, with what is retained."""
        self.on_wish: Callable[[NodeSettings], None] = lambda _settings: None
        """Makes the node what a new wish says. The last one of a former life is in `settings`."""

    @property
    def settings(self) -> NodeSettings:
        """What was wished for and holds."""
        return self._shadow.settings

    @property
    def metrics_interval_s(self) -> float:
        """What holds now: the wish, or else the configuration."""
        wished = self._shadow.settings.metrics_interval_s
        return self._metrics_interval_s if wished is None else wished

    def presence(self, state: str) -> Message:
        """The retained word that the node is there (for a while), or is not; the latter is also its will."""
        said = {"state": state, "node": self._node, "boot_id": self._boot, "pid": os.getpid()}
        message = self._retained("state", said | {"clock_ok": self._clock_ok(), "shadow": self._shadow.version})
        return message.expiring(PRESENCE_EXPIRY_S) if state == "online" else message

    def attach(self, connection: Connection) -> None:
        """Say everything on a new connection: its broker may have been born empty."""
        self._connection = connection
        self._presence_at, self._said_models = -math.inf, b""
        self._say_what_changed(asyncio.get_running_loop().time())
        if self._shadow.version:
            self._publish(self._reported())

    def detach(self) -> None:
        """The connection is gone."""
        self._connection = None

    def receive(self, message: Message) -> None:
        """Take in a wish."""
        try:
            is_new = self._shadow.read(message.payload)
        except MeshError as error:
            _log.warning("wish_unreadable", reason=error.message)
            return
        if not is_new:
            return
        if not self._shadow.problem:
            self.on_wish(self._shadow.settings)
        _log.info("wish_read", version=self._shadow.version, problem=self._shadow.problem)
        if self._path is not None:
            write_file(self._path, msgspec.json.encode(self._shadow))
        self._publish(self._reported())

    async def watch(self) -> None:
        """Say what changes, for ever."""
        while True:
            await asyncio.sleep(self._watch_interval_s)
            if self._clock is not None:
                self._clock.verified(self._clock.read())
            now = asyncio.get_running_loop().time()
            self._say_what_changed(now)
            self._say_metrics(now)

    def _clock_ok(self) -> bool:
        return self._clock is None or not self._clock.read().reason

    def _say_what_changed(self, now: float) -> None:
        clock_ok = self._clock_ok()
        is_due = clock_ok is not self._said_clock or now - self._presence_at >= PRESENCE_INTERVAL_S
        if is_due and self._publish(self.presence("online")):
            self._said_clock, self._presence_at = clock_ok, now
        if self._inventory is None:
            return
        models = self._retained("models", {"models": list_models(self._inventory())})
        if models.payload != self._said_models and self._publish(models):
            self._said_models = models.payload

    def _say_metrics(self, now: float) -> None:
        interval_s = self.metrics_interval_s
        if not interval_s or self._registry is None or now - self._metrics_at < interval_s:
            return
        self._metrics_at = now
        said = {"node": self._node, "boot_id": self._boot, "metrics": collect(self._registry)}
        topic = topics.node_topic(self._tenant, self._node, "metrics")
        expiry_s = max(1, math.ceil(interval_s))
        self._publish(Message(topic=topic, payload=msgspec.json.encode(said), qos=0, expiry_s=expiry_s))

    def _reported(self) -> Message:
        return Message(
            topic=topics.node_topic(self._tenant, self._node, "reported"),
            payload=self._shadow.report(),
            retain=True,
            content_type="application/json",
        )

    def _retained(self, leaf: topics.NodeLeaf, said: object) -> Message:
        topic = topics.node_topic(self._tenant, self._node, leaf)
        return Message(topic=topic, payload=msgspec.json.encode(said), retain=True, content_type="application/json")

    def _publish(self, message: Message) -> bool:
        if self._connection is None:
            return False
        try:
            self._connection.publish(message)
        except MeshError as error:
            _log.debug("not_said", topic=message.topic, reason=error.message)
            return False
        return True


def list_models(versions: Sequence[VersionReport]) -> list[dict[str, object]]:
    """The inventory: what a node can be asked, and whether it would have to load it first."""
    return [
        {
            "model": version.model,
            "version": version.version,
            "residency": version.residency,
            "stateful": version.stateful,
            "quality": version.quality,
        }
        for version in sorted(versions, key=lambda held: (held.model, held.version))[:INVENTORY_MAX]
    ]


def collect(registry: CollectorRegistry) -> dict[str, float]:
    """The node's own counters and gauges by name and labels, without the buckets of histograms."""
    found: dict[str, float] = {}
    for family in registry.collect():
        for sample in family.samples:
            if len(found) >= METRICS_MAX:
                return found
            if sample.name.startswith(_METRIC_PREFIX) and not sample.name.endswith(_METRICS_LEFT_OUT):
                labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def _load(path: Path | None) -> Shadow:
    try:
        return Shadow() if path is None else msgspec.json.decode(path.read_bytes(), type=Shadow)
    except FileNotFoundError:
        return Shadow()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        _log.warning("shadow_unreadable", path=str(path), error=str(error))
        return Shadow()
