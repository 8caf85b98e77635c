"""What only our own HTTP/2 server has to prove: its bounds, call by call. Attacks are in `test_abuse_http2`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import ngh2
import pytest
import uvloop

from nearcast.transport.ngh2_channel import Ngh2Channel
from nearcast.transport.ngh2_connection import split_address
from nearcast.transport.ngh2_server import Ngh2Server
from nearcast.transport.seam import DEFAULT_LIMITS, Call, Limits, Methods, Reply, Responder, Taken
from tests.patience import until

MEBIBYTE = 1 << 20
# The replacement is a hook that would change the loop of everybody else's tests too.
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy:pytest.PytestDeprecationWarning")


@pytest.fixture(scope="module")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy()


async def echo(message: bytes, call: Call) -> Reply:
    return Reply((message,))


async def hang(message: bytes, call: Call) -> Reply:
    await asyncio.sleep(30)
    return Reply((b"",))


async def pour(messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
    for index in range(400):
        poured.append(index)
        yield Reply((bytes(256 * 1024),))


poured: list[int] = []
METHODS = Methods(unary={"/t.T/echo": echo, "/t.T/hang": hang}, stream={"/t.T/pour": pour})


@asynccontextmanager
async def serving(limits: Limits = DEFAULT_LIMITS, methods: Methods = METHODS) -> AsyncIterator[Ngh2Server]:
    server = Ngh2Server(methods, address="127.0.0.1:0", limits=limits)
    await server.start()
    try:
        yield server
    finally:
        await server.drain(0.2)


@asynccontextmanager
async def calling(address: str, limits: Limits = DEFAULT_LIMITS) -> AsyncIterator[Ngh2Channel]:
    channel = Ngh2Channel(address, limits=limits)
    try:
        yield channel
    finally:
        await channel.close()


async def works(channel: Ngh2Channel) -> bool:
    return b"".join((await channel.unary("/t.T/echo", (b"on",))).body) == b"on"


class RawClient:
    """A client that sends exactly what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, window: int) -> None:
        self.reader, self.writer = reader, writer
        self.h2 = ngh2.Connection(ngh2.Role.CLIENT, ngh2.Configuration(auto_window_update=window > 70_000))
        self.h2.initiate_connection({4: window})
        self.events: list[ngh2.Event] = []

    @classmethod
    async def connect(cls, address: str, window: int = 1 << 20) -> RawClient:
        return cls(*await asyncio.open_connection(*split_address(address)), window)

    def open(self, path: str, *more: tuple[bytes, bytes]) -> int:
        head = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()), (b":authority", b"x")]
        return self.h2.send_request([*head, (b"te", b"trailers"), (b"content-type", b"application/grpc"), *more])

    async def pump(self, until: Callable[[], bool] = lambda: False, timeout_s: float = 2.0) -> bool:
        """Exchange bytes until something is seen; False if the server closed or time is up first."""
        ends_at = time.monotonic() + timeout_s
        while not until():
            self.writer.write(self.h2.data_to_send())
            await self.writer.drain()
            try:
                data = await asyncio.wait_for(self.reader.read(1 << 16), ends_at - time.monotonic())
            except (TimeoutError, ConnectionError):
                return until()
            if not data:
                return until()
            self.h2.receive_data(data)
            self.events += self.h2.events()
        return True

    def header(self, name: bytes) -> bytes | None:
        for event in self.events:
            if isinstance(event, ngh2.ResponseReceived | ngh2.TrailersReceived) and name in dict(event.headers):
                return dict(event.headers)[name]
        return None

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


async def is_closed(reader: asyncio.StreamReader, timeout_s: float) -> bool:
    try:
        while await asyncio.wait_for(reader.read(1 << 16), timeout_s):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


async def test_a_hundred_megabytes_are_refused_early() -> None:
    async with serving(Limits(message_size_bytes_max=MEBIBYTE)) as server, calling(server.address) as channel:
        client = await RawClient.connect(server.address)
        stream_id = client.open("/t.T/echo")
        client.h2.send_data(stream_id, b"\0" + (100 * MEBIBYTE).to_bytes(4, "big"))
        piece = bytes(MEBIBYTE)
        for _ in range(100):
            client.h2.send_data(stream_id, piece)
        assert await client.pump(lambda: any(isinstance(e, ngh2.StreamReset) for e in client.events))
        assert client.header(b"grpc-status") == b"3"
        assert client.header(b"nc-code") == b"TOO_LARGE"
        # The same connection goes on.
        client.events.clear()
        client.h2.send_data(client.open("/t.T/echo"), b"\0\0\0\0\1x", end_stream=True)
        assert await client.pump(lambda: client.header(b"grpc-status") == b"0")
        await client.close()
        assert await works(channel)


async def test_refusals_do_not_use_up_the_connections_window() -> None:
    async with serving(Limits(message_size_bytes_max=1000)) as server:
        client = await RawClient.connect(server.address)
        for _ in range(60):
            client.events.clear()
            stream_id = client.open("/t.T/echo")
            client.h2.send_data(stream_id, b"\0" + MEBIBYTE.to_bytes(4, "big") + bytes(600_000))
            assert await client.pump(lambda: any(isinstance(e, ngh2.StreamReset) for e in client.events))
        await client.close()


@pytest.mark.parametrize("limit", ["size", "count"])
async def test_too_much_metadata_is_refused_alone(limit: str) -> None:
    async with serving() as server:
        client = await RawClient.connect(server.address)
        waiting = client.open("/t.T/echo")
        more = [(b"x", b"y" * 20_000)] if limit == "size" else [(b"x%d" % i, b"") for i in range(130)]
        client.h2.send_data(client.open("/t.T/echo", *more), b"\0\0\0\0\0", end_stream=True)
        assert await client.pump(lambda: client.header(b"grpc-status") == b"3")
        client.h2.send_data(waiting, b"\0\0\0\0\1x", end_stream=True)
        assert await client.pump(lambda: client.header(b"grpc-status") is not None and len(client.events) > 4)
        await client.close()


async def test_a_slow_reader_keeps_the_server_bounded() -> None:
    poured.clear()
    async with serving() as server, calling(server.address) as channel:
        client = await RawClient.connect(server.address, window=65_535)
        client.h2.send_data(client.open("/t.T/pour"), b"\0\0\0\0\0", end_stream=True)
        await client.pump(timeout_s=0.5)
        # The stream's window is 64 KiB: the method may be one queue (256 KiB) and one message ahead.
        assert 1 <= len(poured) <= 3
        assert await works(channel)
        await client.close()


async def test_unread_replies_hold_back_further_calls() -> None:
    started: list[int] = []

    async def big(message: bytes, call: Call) -> Reply:
        started.append(1)
        await asyncio.sleep(0)
        return Reply((bytes(MEBIBYTE),))

    limits = Limits(reply_queue_bytes_max=2 * MEBIBYTE)
    async with serving(limits, Methods(unary={"/t.T/big": big})) as server:
        client = await RawClient.connect(server.address, window=1000)
        for _ in range(40):
            client.h2.send_data(client.open("/t.T/big"), b"\0\0\0\0\0", end_stream=True)
            await client.pump(timeout_s=0.02)
        assert 2 <= len(started) <= 5
        await client.close()


async def test_room_for_one_reply_lets_in_one_call_that_is_answered_at_once() -> None:
    answered: list[int] = []

    def big(pieces: Sequence[bytes], call: Call, responder: Responder) -> Taken:
        answered.append(1)
        responder.reply(Reply((bytes(MEBIBYTE),)))
        return asyncio.get_running_loop().create_future()

    limits = Limits(reply_queue_bytes_max=2 * MEBIBYTE)
    async with serving(limits, Methods(unary={"/t.T/big": echo}, passing={"/t.T/big": big})) as server:
        client = await RawClient.connect(server.address, window=1000)
        calls = [client.open("/t.T/big") for _ in range(20)]
        for call in calls:
            client.h2.send_data(call, b"\0\0\0\0\0", end_stream=True)
        assert await client.pump(lambda: len(answered) >= 3)
        assert len(answered) == 3
        client.h2.reset_stream(calls[0])
        assert await client.pump(lambda: len(answered) > 3), "a reset makes room"
        assert len(answered) == 4
        await client.close()


async def test_an_idle_connection_is_closed_and_remade() -> None:
    async with serving(Limits(idle_timeout_s=0.2)) as server, calling(server.address) as channel:
        assert await works(channel)
        await until(lambda: not server._state.connections, "the idle connection is closed")
        assert await works(channel)


async def test_connections_are_counted() -> None:
    async with serving(Limits(connections_max=1)) as server, calling(server.address) as channel:
        assert await works(channel)
        reader, writer = await asyncio.open_connection(*split_address(server.address))
        assert await is_closed(reader, 2)
        writer.close()
        assert await works(channel)


@pytest.mark.parametrize("timeout", [b"99999999H", b"1n"])
async def test_extreme_timeouts(timeout: bytes) -> None:
    async with serving() as server:
        client = await RawClient.connect(server.address)
        client.h2.send_data(client.open("/t.T/hang", (b"grpc-timeout", timeout)), b"\0\0\0\0\0", end_stream=True)
        ended = await client.pump(lambda: client.header(b"grpc-status") == b"4", 0.5)
        assert ended is (timeout == b"1n")
        await client.close()


@pytest.mark.parametrize("data", [b"", b"\0\0", b"\0\0\0\0\5ab", b"\0\0\0\0\0\0\0\0\0\0"])
async def test_a_call_without_exactly_one_message_is_refused(data: bytes) -> None:
    async with serving() as server:
        client = await RawClient.connect(server.address)
        client.h2.send_data(client.open("/t.T/echo"), data, end_stream=True)
        assert await client.pump(lambda: client.header(b"grpc-status") == b"3")
        await client.close()
