"""A device's way to its broker: one connection after another, each subscribed before it counts as up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from math import inf
from random import Random

import msgspec

from nearcast.backoff import full_jitter_s
from nearcast.client.mqtt_limits import DeviceLimits
from nearcast.errors import Code, MeshError
from nearcast.telemetry import get_logger
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message

_log = get_logger("nearcast.device")


class DeviceLink:
    """Stays connected while `run` runs.

    Args:
        settings: where and how. Their will is also what is said at the end of `run`.
        filters: what to subscribe, and whether the messages that the topics hold are wanted.
        limits: bounds.
        generator: for the jitter.
        on_up: called for each connection, once it is subscribed.
        on_down: called with a sentence when there is none.
        on_message, on_published: as of `Connection`; a message is acknowledged when the call returns.
    """

    def __init__(
        self,
        settings: ConnectionSettings,
        filters: Mapping[str, bool],
        *,
        limits: DeviceLimits,
        generator: Random,
        on_up: Callable[[Connection], None],
        on_down: Callable[[str], None],
        on_message: Callable[[Message], None],
        on_published: Callable[[int, bool], None],
    ) -> None:
        self._settings = settings
        self._filters = filters
        self._limits = limits
        self._generator = generator
        self._on_up = on_up
        self._on_down = on_down
        self._on_message = on_message
        self._on_published = on_published
        self.is_up = False
        """Whether messages can arrive now."""
        self._turn = asyncio.Event()
        self._trouble = ""
        self._up_at = inf
        self.failures = 0
        """Connections that were lost or not had, so far."""

    async def wait_up(self, *, attempts_max: int | None = None) -> None:
        """Return once messages can arrive.

        Raises:
            MeshError: UNAVAILABLE if `attempts_max` connections were not had.
        """
        while not self.is_up:
            if attempts_max is not None and self.failures >= attempts_max:
                raise MeshError(Code.UNAVAILABLE, self._trouble)
            await self._turn.wait()

    async def run(self) -> None:
        """Connect, and again after each loss, until cancelled."""
        attempt, limits = 0, self._limits
        now = asyncio.get_running_loop().time
        while True:
            self._up_at = inf
            try:
                await self._live()
            except (MeshError, TimeoutError) as error:
                trouble = error.message if isinstance(error, MeshError) else "The broker did not answer in time."
                level = _log.warning if attempt == 0 else _log.debug  # one line for each outage
                level("broker_lost", host=self._settings.host, port=self._settings.port, error=trouble)
                self.failures += 1
                self._trouble = trouble
                self._tell()
                self._on_down(trouble)
            attempt = 0 if now() - self._up_at > limits.stable_s else attempt + 1
            base_s, max_s = limits.reconnect_base_s, limits.reconnect_s_max
            await asyncio.sleep(full_jitter_s(attempt, self._generator, base_s=base_s, max_s=max_s))

    async def _live(self) -> None:
        """One connection: from the CONNECT to the loss, which it raises."""
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def lose(reason: str) -> None:
            if not lost.done():
                lost.set_result(reason)

        def receive(message: Message) -> None:
            self._on_message(message)
            connection.acknowledge(message)

        connection = Connection(self._settings, on_message=receive, on_published=self._on_published, on_lost=lose)
        try:
            await connection.open()
            # At each connection, also where the broker says that it knows us: it may have forgotten half of it. And
            # before the first request, or the reply has nowhere to go.
            for topic, is_retained_wanted in self._filters.items():
                await connection.subscribe(topic, retained=is_retained_wanted)
            self.is_up, self._up_at = True, asyncio.get_running_loop().time()
            self._tell()
            self._on_up(connection)
            raise MeshError(Code.UNAVAILABLE, await lost)
        except asyncio.CancelledError:
            self._say_goodbye(connection)
            raise
        finally:
            self.is_up = False
            await connection.close()

    def _tell(self) -> None:
        """Wake who waits, to look again."""
        self._turn.set()
        self._turn = asyncio.Event()

    def _say_goodbye(self, connection: Connection) -> None:
        """A broker does not say the will of a device that leaves in peace."""
        if self._settings.will is not None:
            with contextlib.suppress(MeshError):
                connection.publish(msgspec.structs.replace(self._settings.will, qos=0))
