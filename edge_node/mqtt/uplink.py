"""The link to a second broker: what devices are told there too. It only publishes, and only what is on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from edge_node.mqtt.metrics import MqttMetrics
from edge_node.mqtt.publisher import Publisher
from nearcast.backoff import ReconnectLimits
from nearcast.telemetry import get_logger
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.reconnect import stay_connected

_log = get_logger("nearcast.mqtt")


class Uplink:
    """Keeps a connection to the upstream broker, which may be absent for days.

    Args:
        settings: where it is, and who we are there.
        publisher: of the link `upstream`.
        limits: how often to try.
        metrics: told when the broker comes and goes.
    """

    def __init__(
        self,
        settings: ConnectionSettings,
        publisher: Publisher,
        *,
        limits: ReconnectLimits,
        metrics: MqttMetrics,
    ) -> None:
        self._settings = settings
        self._limits = limits
        self._metrics = metrics
        self.publisher = publisher

    async def run(self) -> None:
        """Connect again and again, until cancelled."""
        settings = self._settings
        try:
            await stay_connected(self._live, name=f"{settings.host}:{settings.port}", limits=self._limits)
        finally:
            self.publisher.close()

    async def _live(self, up: Callable[[], None]) -> None:
        """One connection, from the CONNECT to the loss."""
        lost = asyncio.Event()

        def on_lost(reason: str) -> None:
            _log.warning("upstream broker lost", reason=reason)
            lost.set()

        connection = Connection(
            self._settings,
            on_message=_ignore,
            on_published=lambda mid, taken: self.publisher.confirmed(mid, taken=taken),
            on_lost=on_lost,
        )
        try:
            await connection.open()
            self.publisher.attach(connection)
            up()
            self._metrics.upstream(up=True)
            await lost.wait()
        finally:
            self._metrics.upstream(up=False)
            self.publisher.detach()
            await connection.close()


def _ignore(_message: object) -> None:
    """We subscribe to nothing there."""
