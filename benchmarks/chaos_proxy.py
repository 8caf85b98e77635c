"""A TCP link that can be cut: between devices and broker, and between node and broker.

It passes MQTT frames on whole, so that it can cut between two of them, or inside one.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Literal, Self, TypeAlias, cast, get_args

Cut: TypeAlias = Literal["reset", "torn", "deaf", "mute", "silent"]
"""`reset`: at once. `torn`: inside the next frame. `deaf`: what the broker says is lost for a while, then the link too;
`mute`: what the client says; `silent`: both."""
CUTS: tuple[Cut, ...] = get_args(Cut)
HOLD_S = (0.02, 0.3)
LENGTH_BYTES_MAX = 4
Watch: TypeAlias = Callable[["Session", bool, bytes], bytes]
"""(session, whether the client sent it, one frame) → what to pass on."""


def take_frames(buffer: bytearray) -> Iterator[bytes]:
    """Remove and yield the whole frames at the front of `buffer`: a type, a length in base 128, that many bytes."""
    while len(buffer) >= 2:
        length = shift = 0
        for at in range(1, 1 + LENGTH_BYTES_MAX):
            if at >= len(buffer):
                return
            length |= (buffer[at] & 0x7F) << shift
            shift += 7
            if buffer[at] < 0x80:
                break
        else:
            raise ValueError("this is no MQTT frame")
        end = at + 1 + length
        if len(buffer) < end:
            return
        yield bytes(buffer[:end])
        del buffer[:end]


class _End(asyncio.Protocol):
    """The client's or the broker's end of a session."""

    def __init__(self, session: Session, *, is_client: bool) -> None:
        self.session = session
        self.is_client = is_client
        self.transport: asyncio.Transport | None = None
        self.buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.session.made(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self.session.forward(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.session.end()

    def pause_writing(self) -> None:
        self.session.pause(self, paused=True)

    def resume_writing(self) -> None:
        self.session.pause(self, paused=False)


class Session:
    """One connection through the link. `mids` is the watcher's memory of it."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.client = _End(self, is_client=True)
        self.broker = _End(self, is_client=False)
        self.mids: dict[tuple[bool, int], object] = {}
        self._lost_from: set[bool] = set()
        self._is_torn = False

    def made(self, end: _End) -> None:
        if end.is_client:
            self.proxy.sessions.add(self)
            assert end.transport is not None
            end.transport.pause_reading()
            self.proxy.connect(self)

    def forward(self, end: _End) -> None:
        """Pass on what came from one end."""
        other = self.broker if end.is_client else self.client
        try:
            for frame in take_frames(end.buffer):
                if end.is_client in self._lost_from or other.transport is None or other.transport.is_closing():
                    continue
                data = self.proxy.watch(self, end.is_client, frame)
                if self._is_torn:
                    other.transport.write(data[: len(data) // 2])
                    asyncio.get_running_loop().call_soon(self.end)
                    self._lost_from = {True, False}
                    return
                other.transport.write(data)
        except ValueError:
            self.end()

    def pause(self, end: _End, *, paused: bool) -> None:
        """What one end cannot take is not read from the other."""
        source = (self.broker if end.is_client else self.client).transport
        if source is not None and not source.is_closing():
            source.pause_reading() if paused else source.resume_reading()

    def cut(self, how: Cut, hold_s: float) -> None:
        """Cut this session, now or after `hold_s`."""
        if how == "reset":
            self.end()
        elif how == "torn":
            self._is_torn = True
        else:
            # A link that lost something never carries anything again: TCP leaves no gap.
            self._lost_from |= {"deaf": {False}, "mute": {True}, "silent": {True, False}}[how]
        if how != "reset":
            asyncio.get_running_loop().call_later(hold_s, self.end)

    def end(self) -> None:
        """Both ends are gone, and what they did not send yet."""
        self.proxy.sessions.discard(self)
        for end in (self.client, self.broker):
            if end.transport is not None:
                end.transport.abort()


class Proxy:
    """Listens on a port of its own and connects each client to the broker.

    Args:
        port: the broker's, on loopback.
        watch: sees every frame before it is passed on, and may change it.
    """

    def __init__(self, port: int, watch: Watch) -> None:
        self.watch = watch
        self.sessions: set[Session] = set()
        self._target = port
        self._server: asyncio.Server | None = None
        self._connecting: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Session(self).client, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for session in list(self.sessions):
            session.end()
        for task in list(self._connecting):
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def port(self) -> int:
        """Where clients connect."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def cut(self, how: Cut, draw: random.Random, *, share: float = 1.0) -> int:
        """Cut the sessions, each with a chance of `share`; returns how many."""
        chosen = [session for session in self.sessions if draw.random() < share]
        for session in chosen:
            session.cut(how, draw.uniform(*HOLD_S))
        return len(chosen)

    def connect(self, session: Session) -> None:
        """Begin to connect a session to the broker."""
        task = asyncio.get_running_loop().create_task(self._connect(session))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, session: Session) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: session.broker, "127.0.0.1", self._target)
        except OSError:
            session.end()
            return
        client = session.client.transport
        assert client is not None
        if client.is_closing():
            session.end()
        else:
            with contextlib.suppress(RuntimeError):
                client.resume_reading()
