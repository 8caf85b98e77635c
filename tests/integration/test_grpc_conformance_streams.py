"""Streaming calls of both channels against both servers: order, pressure, ends of every kind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from nearcast.errors import Code, MeshError
from nearcast.transport.grpc import KINDS, Kind, make_channel, make_server
from nearcast.transport.seam import Call, CallError, Channel, Limits, Methods, Reply
from tests.patience import own_time

LIMITS = Limits(message_size_bytes_max=8 << 20, connect_timeout_s=3.0)
MEBIBYTE = 1 << 20
# How often a short time may be missed: the collector of garbage and the runtime's own threads come in between.
TRIES = 20
# The replacement is a hook that would change the loop of everybody else's tests too.
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy:pytest.PytestDeprecationWarning")


@pytest.fixture(scope="module")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy()


class Service:
    """Streaming methods that show how far they came."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.taken = 0
        self.made = 0
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.cancelled_at = 0.0
        self.failed_at = 0.0
        self.release = asyncio.Event()

    async def talk(self, messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
        self.calls.append(call)
        async for message in messages:
            if message == b"bad":
                self.failed_at = own_time()
                raise MeshError(Code.OVERLOADED, "größer als 100 %\nzu viel", retry_after_ms=250)
            yield Reply((b"re:", message), (("nc-served-by", "talker"),))

    async def collect(self, messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
        yield Reply((b",".join([message async for message in messages]),))

    async def count(self, messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
        async for message in messages:
            for index in range(int(message)):
                yield Reply((str(index).encode(),))

    async def flood(self, messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
        async for message in messages:
            for _ in range(1000):
                self.made += 1
                yield Reply((bytes(int(message)),))

    async def crawl(self, messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
        async for _ in messages:
            self.taken += 1
            self.started.set()
            await self.release.wait()
        yield Reply((str(self.taken).encode(),))

    async def hang(self, messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
        self.started.set()
        try:
            yield Reply((b"here",))  # the caller may be gone before this has returned
            await asyncio.sleep(30)
        finally:
            self.cancelled_at = own_time()
            self.cancelled.set()

    async def refuse(self, messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
        raise MeshError(Code.FORBIDDEN, "Not you.")
        yield Reply((b"",))

    async def echo(self, message: bytes, call: Call) -> Reply:
        return Reply((message,))

    def methods(self) -> Methods:
        names = ("talk", "collect", "count", "flood", "crawl", "hang", "refuse")
        return Methods(unary={"/t.T/echo": self.echo}, stream={f"/t.T/{name}": getattr(self, name) for name in names})


@pytest.fixture(params=KINDS)
def server_kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(params=KINDS)
def channel_kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
async def service() -> Service:
    return Service()


@asynccontextmanager
async def calling(
    server_kind: Kind, channel_kind: Kind, service: Service, address: str = "127.0.0.1:0", limits: Limits = LIMITS
) -> AsyncIterator[Channel]:
    server = make_server(server_kind, service.methods(), address=address, limits=limits)
    await server.start()
    channel = make_channel(channel_kind, server.address, limits=limits)
    yield channel
    await channel.close()
    await server.drain(0.2)


@pytest.fixture
async def channel(server_kind: Kind, channel_kind: Kind, service: Service) -> AsyncIterator[Channel]:
    async with calling(server_kind, channel_kind, service) as channel:
        yield channel


async def bodies(*messages: bytes) -> AsyncIterator[Sequence[bytes]]:
    for message in messages:
        yield (message[:2], message[2:])


async def forever(message: bytes = b"x") -> AsyncIterator[Sequence[bytes]]:
    while True:
        yield (message,)


async def open_end(*messages: bytes) -> AsyncIterator[Sequence[bytes]]:
    async for body in bodies(*messages):
        yield body
    await asyncio.Event().wait()


async def at_rest(count: Callable[[], int]) -> int:
    """What is counted, once it stands still."""
    before, now = -1, count()
    while now != before:
        await asyncio.sleep(0.1)
        before, now = now, count()
    return now


async def failure(channel: Channel, method: str, *messages: bytes, deadline: float | None = None) -> CallError:
    with pytest.raises(CallError) as caught:
        async for _ in channel.stream(f"/t.T/{method}", bodies(*messages), deadline=deadline):
            pass
    return caught.value


async def test_every_kind_of_stream(channel: Channel, service: Service) -> None:
    before = time.monotonic()
    stream = channel.stream("/t.T/talk", bodies(b"a", b"", b"ccc"), metadata=[("nc-tenant", "t")], deadline=before + 5)
    assert [message async for message in stream] == [b"re:a", b"re:", b"re:ccc"]
    assert ("nc-served-by", "talker") in stream.trailers
    assert service.calls[0].metadata["nc-tenant"] == "t"
    assert before + 4 < (service.calls[0].deadline or 0) <= before + 5.1
    assert [m async for m in channel.stream("/t.T/collect", bodies(b"a", b"", b"c"))] == [b"a,,c"]
    assert [int(m) async for m in channel.stream("/t.T/count", bodies(b"500", b"2"))] == [*range(500), 0, 1]
    assert [m async for m in channel.stream("/t.T/count", bodies())] == []


async def test_ping_pong(channel: Channel) -> None:
    """Neither side waits for more before it passes on what it has."""
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def say() -> AsyncIterator[Sequence[bytes]]:
        for index in range(100):
            yield (str(index).encode(),)
            assert await heard.get() == f"re:{index}".encode()

    async for message in channel.stream("/t.T/talk", say()):
        heard.put_nowait(message)
    assert heard.empty()


async def test_large_messages_are_complete(channel: Channel) -> None:
    message = bytes(range(256)) * (3 * MEBIBYTE // 256)
    stream = channel.stream("/t.T/talk", bodies(*[message] * 4))
    assert [answer == b"re:" + message async for answer in stream] == [True] * 4


async def test_a_slow_reader_pauses_the_server(channel: Channel, channel_kind: Kind, service: Service) -> None:
    async with aclosing(channel.stream("/t.T/flood", open_end(b"65536"))) as stream:
        async for _ in stream:
            made = await at_rest(lambda: service.made)
            break
    # Of 64 MiB. Ours: a window of 1 MiB, and what both sides queue. A window of grpcio's may grow to 16 MiB.
    assert made <= (80 if channel_kind == "ngh2" else 500)


async def test_a_slow_server_pauses_the_sender(channel: Channel, server_kind: Kind, service: Service) -> None:
    sent, total = 0, 400 if server_kind == "ngh2" else 640

    async def many() -> AsyncIterator[Sequence[bytes]]:
        nonlocal sent
        for _ in range(total):
            sent += 1
            yield (bytes(65536),)

    async def read() -> list[bytes]:
        return [message async for message in channel.stream("/t.T/crawl", many())]

    task = asyncio.ensure_future(read())
    await asyncio.wait_for(service.started.wait(), 20)
    assert await at_rest(lambda: sent) <= (100 if server_kind == "ngh2" else 500)
    assert service.taken == 1
    service.release.set()
    assert await task == [str(total).encode()]
    assert sent == total


async def test_stuck_streams_leave_room_for_others(channel: Channel, service: Service) -> None:
    """Connection-wide flow control must not make one slow reader everybody's problem, in either direction."""
    stuck = [aiter(channel.stream("/t.T/flood", open_end(b"65536"))) for _ in range(20)]
    await asyncio.gather(*(anext(stream) for stream in stuck))
    uploads = [asyncio.ensure_future(anext(aiter(channel.stream("/t.T/crawl", forever(bytes(65536))))))]
    uploads += [
        asyncio.ensure_future(anext(aiter(channel.stream("/t.T/crawl", forever(bytes(65536)))))) for _ in range(19)
    ]
    await asyncio.wait_for(service.started.wait(), 20)
    await asyncio.sleep(0.15)
    reply = await channel.unary("/t.T/echo", (bytes(2 * MEBIBYTE),), deadline=time.monotonic() + 20)
    assert len(reply.body[0]) == 2 * MEBIBYTE
    for task in uploads:
        task.cancel()
    await asyncio.gather(*uploads, return_exceptions=True)
    for stream in stuck:
        await stream.aclose()


async def test_ends_that_are_no_success(channel: Channel, channel_kind: Kind) -> None:
    unheard = [] if channel_kind == "grpcio" else [b"unheard"]
    error = await failure(channel, "talk", b"good", b"bad", *unheard)
    assert (error.code, error.message, error.retry_after_ms) == (Code.OVERLOADED, "größer als 100 %\nzu viel", 250)
    # Without messages: where one is still being written, grpcio forgets the status and says "internal error". So
    # nothing that it might still be writing follows a message that ends the call, above.
    assert (await failure(channel, "refuse")).code is Code.FORBIDDEN
    assert (await failure(channel, "nothing")).code is Code.UNSUPPORTED
    assert (await failure(channel, "talk", bytes(9 * MEBIBYTE))).code is Code.TOO_LARGE
    assert (await failure(channel, "flood", str(9 * MEBIBYTE).encode())).code is Code.TOO_LARGE
    assert (await failure(channel, "talk", b"x", deadline=time.monotonic() - 1)).code is Code.DEADLINE
    assert [m async for m in channel.stream("/t.T/collect", bodies(b"on"))] == [b"on"]


async def test_what_was_answered_before_the_failure_arrives(channel: Channel) -> None:
    heard = []
    with pytest.raises(CallError):
        async for message in channel.stream("/t.T/talk", open_end(b"good", b"bad")):
            heard.append(message)
    assert heard == [b"re:good"]


async def test_the_error_of_the_senders_own_messages_comes_back(channel: Channel, service: Service) -> None:
    async def broken() -> AsyncIterator[Sequence[bytes]]:
        yield (b"x",)
        await service.started.wait()
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        async for _ in channel.stream("/t.T/hang", broken()):
            pass
    await asyncio.wait_for(service.cancelled.wait(), 5)


async def test_deadline_of_a_stream(channel: Channel, service: Service) -> None:
    await channel.unary("/t.T/echo", (b"warm",))
    began, own_began = time.monotonic(), own_time()
    with pytest.raises(CallError) as caught:
        async for message in channel.stream("/t.T/hang", open_end(b"x"), deadline=began + 0.15):
            assert message == b"here"
    assert caught.value.code is Code.DEADLINE
    assert time.monotonic() - began > 0.1
    assert own_time() - own_began < 0.6
    await asyncio.wait_for(service.cancelled.wait(), 5)


@pytest.mark.parametrize("how", ["close", "cancel the task"])
async def test_cancelling_reaches_the_server_within_10_ms(channel: Channel, service: Service, how: str) -> None:
    async def read() -> None:
        async for _ in channel.stream("/t.T/hang", open_end(b"x")):
            heard.set()

    times = [1.0]
    while len(times) < TRIES and times[-1] >= 0.01:
        heard = asyncio.Event()
        service.cancelled.clear()
        if how == "close":
            stream = channel.stream("/t.T/hang", open_end(b"x"))
            assert await anext(aiter(stream)) == b"here"
            began = own_time()
            await stream.aclose()
        else:
            task = asyncio.ensure_future(read())
            await asyncio.wait_for(heard.wait(), 20)
            began = own_time()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await asyncio.wait_for(service.cancelled.wait(), 5)
        times.append(service.cancelled_at - began)
    assert times[-1] < 0.01


async def test_the_servers_end_reaches_the_caller_within_10_ms(channel: Channel, service: Service) -> None:
    times = [1.0]
    while len(times) < TRIES and times[-1] >= 0.01:
        with pytest.raises(CallError):
            async for _ in channel.stream("/t.T/talk", open_end(b"bad")):
                pass
        times.append(own_time() - service.failed_at)
    assert times[-1] < 0.01


async def test_closing_the_channel_ends_its_streams(channel: Channel, service: Service) -> None:
    stream = aiter(channel.stream("/t.T/hang", open_end(b"x")))
    assert await anext(stream) == b"here"
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    await channel.close()
    with pytest.raises(CallError) as caught:
        await waiting
    assert (caught.value.code, caught.value.sent) == (Code.UNAVAILABLE, True)
    assert (await failure(channel, "talk", b"x")).code is Code.UNAVAILABLE


async def test_streams_and_calls_over_a_unix_socket(
    server_kind: Kind, channel_kind: Kind, service: Service, tmp_path: Path
) -> None:
    async with calling(server_kind, channel_kind, service, f"unix:{tmp_path / 's.sock'}") as channel:
        assert [m async for m in channel.stream("/t.T/talk", bodies(b"file"))] == [b"re:file"]
        assert (await channel.unary("/t.T/echo", (b"x",))).body[0] == b"x"


async def test_many_streams_at_once(channel: Channel) -> None:
    async def one(index: int) -> list[bytes]:
        sent = [f"{index}.{step}".encode() for step in range(20)]
        stream = channel.stream("/t.T/talk", bodies(*sent))
        assert [message async for message in stream] == [b"re:" + message for message in sent]

    await asyncio.gather(*(one(index) for index in range(100)))
