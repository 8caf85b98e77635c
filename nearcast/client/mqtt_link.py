"""A device's way to its broker: one connection after another, each subscribed before it counts as up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from random import Random

import msgspec

from nearcast.backoff import ReconnectLimits
from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.reconnect import stay_connected


class DeviceLink:
    """Stays connected while `run` runs.

    Args:
        settings: where and how. Their will is also what is said at the end of `run`.
        filters: what to subscribe, and whether the messages that the topics hold are wanted.
        limits: how soon to connect again.
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
        limits: ReconnectLimits,
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
        await stay_connected(
            self._live,
            name=f"{self._settings.host}:{self._settings.port}",
            limits=self._limits,
            generator=self._generator,
            on_trouble=self._fail,
        )

    def _fail(self, trouble: str) -> None:
        self.failures += 1
        self._trouble = trouble
        self._tell()
        self._on_down(trouble)

    async def _live(self, up: Callable[[], None]) -> None:
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
            self.is_up = True
            up()
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
