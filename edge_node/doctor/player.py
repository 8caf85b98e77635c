"""One side of a conversation over the broker: the device's or the node's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from edge_node.doctor.findings import DoctorLimits, Subject
from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt.connection import Connection, ConnectionSettings
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.tls import TlsFiles

HEARD_MAX = 1024
"""Messages remembered; an examination causes a dozen."""


class Player:
    """A connection and what it has heard. Made by `playing`."""

    connection: Connection

    def __init__(self, limits: DoctorLimits) -> None:
        self._limits = limits
        self._heard: list[Message] = []
        self._news = asyncio.Event()
        self._waiting: dict[int, asyncio.Future[bool]] = {}

    async def confirmed(self, message: Message) -> bool:
        """Publish and wait for the PUBACK; returns whether the broker took it.

        Raises:
            MeshError: UNAVAILABLE if the connection ends or nothing comes.
        """
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[self.connection.publish(message)] = answer
        try:
            async with asyncio.timeout(self._limits.answer_timeout_s):
                return await answer
        except TimeoutError as error:
            raise MeshError(Code.UNAVAILABLE, "The broker does not confirm a message.") from error

    async def hears(self, wanted: Callable[[Message], bool], timeout_s: float) -> Message | None:
        """The first message for which `wanted` holds, of those that came or come; None if there is none in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    self._news.clear()
                    found = next((message for message in self._heard if wanted(message)), None)
                    if found is not None:
                        return found
                    await self._news.wait()
        except TimeoutError:
            return None

    def receive(self, message: Message) -> None:
        """A message came."""
        self.connection.acknowledge(message)
        if len(self._heard) < HEARD_MAX:
            self._heard.append(message)
        self._news.set()

    def confirm(self, mid: int, taken: bool) -> None:  # noqa: FBT001  # the connection's callback
        """A PUBACK came."""
        answer = self._waiting.pop(mid, None)
        if answer is not None and not answer.done():
            answer.set_result(taken)

    def lose(self, reason: str) -> None:
        """The connection ended."""
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(MeshError(Code.UNAVAILABLE, reason))
        self._waiting.clear()


@asynccontextmanager
async def playing(
    subject: Subject, side: str, tls: TlsFiles | None, limits: DoctorLimits, *, session_expiry_s: int = 0
) -> AsyncIterator[Player]:
    """A connection of its own for one side, as long as the context lasts.

    Raises:
        MeshError: UNAVAILABLE if the broker does not let us in.
    """
    player = Player(limits)
    settings = ConnectionSettings(
        host=subject.host,
        port=subject.port,
        client_id=f"nearcast-doctor-{subject.device}-{side}",
        session_expiry_s=session_expiry_s,
        connect_timeout_s=limits.answer_timeout_s,
        tls=tls,
    )
    player.connection = Connection(
        settings, on_message=player.receive, on_published=player.confirm, on_lost=player.lose
    )
    await player.connection.open()
    try:
        yield player
    finally:
        await player.connection.close()
