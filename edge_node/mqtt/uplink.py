"""The link to a second broker: what devices are told there too. It only publishes, and only what is on disk."""

from __future__ import annotations

import asyncio
import math
import random

from edge_node.mqtt.limits import MqttLimits
from edge_node.mqtt.metrics import MqttMetrics
from edge_node.mqtt.publisher import Publisher
from nearcast.backoff import full_jitter_s
from nearcast.clock import Clock
from nearcast.errors import MeshError
from nearcast.telemetry import get_logger
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings

STABLE_AFTER_S = 5.0
_log = get_logger("nearcast.mqtt")


class Uplink:
    """Keeps a connection to the upstream broker, which may be absent for days.

    Args:
        settings: where it is, and who we are there.
        publisher: of the link `upstream`.
        limits: how often to try.
        clock: monotonic time.
        metrics: told when the broker comes and goes.
    """

    def __init__(
        self,
        settings: ConnectionSettings,
        publisher: Publisher,
        *,
        limits: MqttLimits,
        clock: Clock,
        metrics: MqttMetrics,
    ) -> None:
        self._settings = settings
        self._limits = limits
        self._clock = clock
        self._metrics = metrics
        self.publisher = publisher
        self._up_at = math.inf

    async def run(self) -> None:
        """Connect again and again, until cancelled."""
        try:
            await self._stay_connected()
        finally:
            self.publisher.close()

    async def _stay_connected(self) -> None:
        attempt = 0
        generator = random.Random()
        limits = self._limits
        while True:
            self._up_at = math.inf
            try:
                await self._live()
            except MeshError as error:
                level = _log.warning if attempt == 0 else _log.debug
                level("no upstream broker", host=self._settings.host, port=self._settings.port, error=error.message)
            attempt = 0 if self._clock.monotonic() - self._up_at > STABLE_AFTER_S else attempt + 1
            await asyncio.sleep(
                full_jitter_s(attempt, generator, base_s=limits.reconnect_base_s, max_s=limits.reconnect_max_s)
            )

    async def _live(self) -> None:
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
            self._up_at = self._clock.monotonic()
            self._metrics.upstream(up=True)
            await lost.wait()
        finally:
            self._metrics.upstream(up=False)
            self.publisher.detach()
            await connection.close()


def _ignore(_message: object) -> None:
    """We subscribe to nothing there."""
