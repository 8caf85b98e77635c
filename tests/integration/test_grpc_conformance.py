"""Both servers against both channels and a plain grpc.aio client: the same calls, the same answers."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import uvloop

from nearcast.errors import Code, MeshError
from nearcast.transport.grpc import KINDS, Kind, make_channel, make_server
from nearcast.transport.health import CHECK_METHOD, health_methods
from nearcast.transport.seam import Call, CallError, Channel, Limits, Methods, Reply, Server
from tests.patience import own_time

LIMITS = Limits(message_size_bytes_max=8 << 20, connect_timeout_s=3.0)
MEBIBYTE = 1 << 20
BLOB = base64.b64encode(bytes(range(256))).decode().rstrip("=")
# The replacement is a hook that would change the loop of everybody else's tests too.
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy:pytest.PytestDeprecationWarning")


@pytest.fixture(scope="module")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy()


class Service:
    """Methods that show what reached them."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.release = asyncio.Event()
        self.calls: list[Call] = []
        self.peers: set[str] = set()
        self.waiting = 0

    async def echo(self, message: bytes, call: Call) -> Reply:
        self.calls.append(call)
        self.peers.add(call.peer)
        binary = [(name, value) for name, value in call.metadata.items() if name.endswith("-bin")]
        # One of them ready to travel.
        return Reply((message[:3], message[3:]), (("nc-served-by", "here"), *binary), ((b"nc-queue-us", b"12"),))

    async def fail(self, message: bytes, call: Call) -> Reply:
        name, _, text = message.decode().partition(" ")
        if name == "crash":
            raise ValueError("a secret of the server")
        raise MeshError(Code[name], text, retry_after_ms=250)

    async def hang(self, message: bytes, call: Call) -> Reply:
        self.calls.append(call)
        self.peers.add(call.peer)
        self.started.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return Reply((b"",))

    async def wait(self, message: bytes, call: Call) -> Reply:
        self.waiting += 1
        self.started.set()
        await self.release.wait()
        return Reply((message,))

    async def big(self, message: bytes, call: Call) -> Reply:
        return Reply((b"head", bytes(int(message))))

    async def talk(self, messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
        async for message in messages:
            if message == b"bad":
                raise MeshError(Code.INVALID_REQUEST, "bad word")
            yield Reply((b"re:", message), (("nc-served-by", "talker"),))

    async def collect(self, messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
        yield Reply((b",".join([message async for message in messages]),))

    async def count(self, messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
        async for message in messages:
            for index in range(int(message)):
                yield Reply((str(index).encode(),))

    def methods(self) -> Methods:
        async def is_ready(service: str) -> bool:
            if service == "nobody":
                raise MeshError(Code.MODEL_NOT_FOUND, "There is no service nobody.")
            return service != "cold"

        unary = {f"/t.T/{name}": getattr(self, name) for name in ("echo", "fail", "hang", "wait", "big")}
        stream = {f"/t.T/{name}": getattr(self, name) for name in ("talk", "collect", "count")}
        return Methods(unary=unary | dict(health_methods(is_ready).unary), stream=stream)


@asynccontextmanager
async def serving(kind: Kind, service: Service, address: str = "127.0.0.1:0") -> AsyncIterator[Server]:
    server = make_server(kind, service.methods(), address=address, limits=LIMITS)
    await server.start()
    try:
        yield server
    finally:
        await server.drain(0.2)


@pytest.fixture(params=KINDS)
def server_kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(params=KINDS)
def channel_kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
async def service() -> Service:
    return Service()


@pytest.fixture
async def server(server_kind: Kind, service: Service) -> AsyncIterator[Server]:
    async with serving(server_kind, service) as server:
        yield server


@pytest.fixture
async def channel(server: Server, channel_kind: Kind) -> AsyncIterator[Channel]:
    channel = make_channel(channel_kind, server.address, limits=LIMITS)
    yield channel
    await channel.close()


@pytest.fixture
async def plain(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(
        server.address, options=[("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        yield channel


def unpadded(value: str) -> str:
    return value.rstrip("=")


async def failure(call: Awaitable[Reply]) -> CallError:
    with pytest.raises(CallError) as caught:
        await call
    return caught.value


async def test_unary_answers_with_trailers_and_sees_metadata(channel: Channel, service: Service) -> None:
    before = time.monotonic()
    reply = await channel.unary(
        "/t.T/echo",
        (b"ab", b"cdef"),
        metadata=[("nc-tenant", "a"), ("x-y", "1"), ("blob-bin", BLOB)],
        deadline=before + 5,
    )
    assert b"".join(reply.body) == b"abcdef"
    assert set(reply.trailers) >= {("nc-served-by", "here"), ("nc-queue-us", "12")}
    assert unpadded(dict(reply.trailers)["blob-bin"]) == BLOB
    (call,) = service.calls
    assert call.method == "/t.T/echo"
    assert call.metadata["nc-tenant"] == "a"
    assert not [name for name in call.metadata if name.startswith((":", "grpc-", "content-type", "te"))]
    assert call.identity == ""
    assert call.peer.startswith("127.0.0.1:")
    assert call.deadline is not None
    assert before + 4 < call.deadline <= before + 5.1


@pytest.mark.parametrize("size", [0, 1, 5, 16384, 70_000, 6 * MEBIBYTE])
async def test_messages_of_many_sizes_come_back_unchanged(channel: Channel, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    reply = await channel.unary("/t.T/echo", (data[:size],))
    assert b"".join(reply.body) == data[:size]


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.CANCELLED])
async def test_every_code_travels_with_its_text(channel: Channel, code: Code) -> None:
    text = "größer als 100 % — zu viel\nzweite Zeile"
    error = await failure(channel.unary("/t.T/fail", (f"{code} {text}".encode(),)))
    assert (error.code, error.message, error.retry_after_ms) == (code, text, 250)


async def test_a_crash_tells_nothing_about_the_server(channel: Channel, caplog: pytest.LogCaptureFixture) -> None:
    error = await failure(channel.unary("/t.T/fail", (b"crash",)))
    assert error.code is Code.INTERNAL
    assert "secret" not in error.message
    assert "secret" in caplog.text


async def test_unknown_method_is_unsupported(channel: Channel) -> None:
    assert (await failure(channel.unary("/t.T/nothing", (b"",)))).code is Code.UNSUPPORTED


async def test_deadline_ends_the_call_on_both_sides(channel: Channel, service: Service) -> None:
    await channel.unary("/t.T/echo", (b"warm",))
    began, own_began = time.monotonic(), own_time()
    error = await failure(channel.unary("/t.T/hang", (b"",), deadline=began + 0.15))
    assert error.code is Code.DEADLINE
    assert time.monotonic() - began > 0.1
    assert own_time() - own_began < 0.6
    await asyncio.wait_for(service.cancelled.wait(), 5)


async def test_a_deadline_in_the_past_is_refused_before_sending(channel: Channel, service: Service) -> None:
    error = await failure(channel.unary("/t.T/echo", (b"",), deadline=time.monotonic() - 1))
    assert (error.code, error.sent, service.calls) == (Code.DEADLINE, False, [])


async def test_cancelling_the_caller_cancels_the_method_within_10_ms(channel: Channel, service: Service) -> None:
    times = [1.0]
    while len(times) < 20 and times[-1] >= 0.01:
        service.started.clear()
        service.cancelled.clear()
        task = asyncio.ensure_future(channel.unary("/t.T/hang", (b"",)))
        await asyncio.wait_for(service.started.wait(), 20)
        began = own_time()
        task.cancel()
        await asyncio.wait_for(service.cancelled.wait(), 5)
        times.append(own_time() - began)
        with pytest.raises(asyncio.CancelledError):
            await task
    # Once is enough: the collector of garbage and the runtime's own threads come in between now and then.
    assert times[-1] < 0.01
    assert b"".join((await channel.unary("/t.T/echo", (b"on",))).body) == b"on"


async def test_too_large_request_is_refused_and_the_server_goes_on(channel: Channel) -> None:
    error = await failure(channel.unary("/t.T/echo", (bytes(20 * MEBIBYTE),)))
    assert error.code is Code.TOO_LARGE
    assert str(LIMITS.message_size_bytes_max) in error.message
    assert b"".join((await channel.unary("/t.T/echo", (b"on",))).body) == b"on"


async def test_too_large_answer_is_refused_by_the_channel(channel: Channel) -> None:
    assert (await failure(channel.unary("/t.T/big", (str(9 * MEBIBYTE).encode(),)))).code is Code.TOO_LARGE
    assert sum(map(len, (await channel.unary("/t.T/big", (b"100",))).body)) == 104


async def test_two_hundred_calls_at_once(channel: Channel, service: Service) -> None:
    tasks = [asyncio.ensure_future(channel.unary("/t.T/wait", (str(i).encode(),))) for i in range(200)]
    await asyncio.wait_for(service.started.wait(), 20)
    service.release.set()
    replies = await asyncio.gather(*tasks)
    assert [b"".join(reply.body) for reply in replies] == [str(i).encode() for i in range(200)]


async def test_calls_beyond_the_servers_streams_wait_their_turn(server_kind: Kind, channel_kind: Kind) -> None:
    service = Service()
    server = make_server(
        server_kind, service.methods(), address="127.0.0.1:0", limits=Limits(concurrent_streams_max=10)
    )
    await server.start()
    channel = make_channel(channel_kind, server.address)
    service.release.set()
    replies = await asyncio.gather(*(channel.unary("/t.T/wait", (b"x",)) for _ in range(100)))
    assert len(replies) == 100
    await channel.close()
    await server.drain(1)


async def test_a_closed_channel_says_so(channel: Channel, service: Service) -> None:
    task = asyncio.ensure_future(channel.unary("/t.T/hang", (b"x",)))
    await asyncio.wait_for(service.started.wait(), 20)
    await channel.close()
    error = await failure(task)
    assert (error.code, error.sent) == (Code.UNAVAILABLE, True)
    error = await failure(channel.unary("/t.T/echo", (b"x",)))
    assert (error.code, error.sent) == (Code.UNAVAILABLE, False)


async def test_nobody_listening_is_unavailable_and_not_sent(channel_kind: Kind) -> None:
    channel = make_channel(channel_kind, "127.0.0.1:1", limits=LIMITS)
    error = await failure(channel.unary("/t.T/echo", (b"x",), deadline=time.monotonic() + 5))
    assert (error.code, error.sent) == (Code.UNAVAILABLE, False)
    await channel.close()


async def test_drain_finishes_what_is_in_flight(
    server: Server, channel: Channel, channel_kind: Kind, service: Service
) -> None:
    tasks = [asyncio.ensure_future(channel.unary("/t.T/wait", (str(i).encode(),))) for i in range(200)]
    async with asyncio.timeout(20):
        while service.waiting < 200:
            await asyncio.sleep(0.01)
    drain = asyncio.ensure_future(server.drain(30))
    await asyncio.sleep(0.1)
    assert not drain.done()
    late = make_channel(channel_kind, server.address, limits=LIMITS)
    error = await failure(late.unary("/t.T/echo", (b"late",), deadline=time.monotonic() + 20))
    assert (error.code, error.sent) == (Code.UNAVAILABLE, False)
    service.release.set()
    replies = await asyncio.gather(*tasks)
    assert len(replies) == 200
    await asyncio.wait_for(drain, 20)
    await late.close()


async def test_old_connections_are_replaced_without_a_failure(server_kind: Kind, channel_kind: Kind) -> None:
    """200 callers and a stream, until the server has said goodbye to at least two connections."""
    service = Service()
    limits = Limits(connection_age_s=0.15)
    server = make_server(server_kind, service.methods(), address="127.0.0.1:0", limits=limits)
    await server.start()
    channel = make_channel(channel_kind, server.address, limits=LIMITS)

    def replaced() -> bool:
        return len(service.peers) >= 3

    async def call() -> None:
        while not replaced():
            await channel.unary("/t.T/echo", (b"x",))

    async def words() -> AsyncIterator[Sequence[bytes]]:
        while not replaced():
            yield (b"word",)
            await asyncio.sleep(0.02)

    async def talk() -> None:
        assert {word async for word in channel.stream("/t.T/talk", words())} == {b"re:word"}

    async with asyncio.timeout(20):
        await asyncio.gather(talk(), *(call() for _ in range(200)))
    await channel.close()
    await server.drain(1)


async def test_a_peer_that_is_only_slow_is_kept(server_kind: Kind, channel_kind: Kind, service: Service) -> None:
    limits = Limits(keepalive_s=0.05, keepalive_timeout_s=0.2)
    server = make_server(server_kind, service.methods(), address="127.0.0.1:0", limits=limits)
    await server.start()
    channel = make_channel(channel_kind, server.address, limits=limits)
    task = asyncio.ensure_future(channel.unary("/t.T/wait", (b"x",)))
    await asyncio.sleep(0.4)
    service.release.set()
    assert (await task).body[0] == b"x"
    await channel.close()
    await server.drain(1)


async def test_drain_without_calls_is_quick(server: Server, channel: Channel) -> None:
    await channel.unary("/t.T/echo", (b"x",))
    began = own_time()
    await server.drain(5)
    assert own_time() - began < 0.5


async def test_drain_gives_up_on_a_method_that_hangs(server: Server, channel: Channel, service: Service) -> None:
    task = asyncio.ensure_future(channel.unary("/t.T/hang", (b"",)))
    await asyncio.wait_for(service.started.wait(), 20)
    began = own_time()
    await server.drain(0.3)
    assert own_time() - began < 1.5
    assert (await failure(task)).code in {Code.UNAVAILABLE, Code.CANCELLED}
    await asyncio.wait_for(service.cancelled.wait(), 5)


async def test_a_channel_reconnects_after_a_restart(server_kind: Kind, channel_kind: Kind) -> None:
    service = Service()
    async with serving(server_kind, service) as server:
        address = server.address
        channel = make_channel(channel_kind, address, limits=LIMITS)
        await channel.unary("/t.T/echo", (b"1",))
    async with serving(server_kind, service, address):
        for _ in range(50):
            try:
                reply = await channel.unary("/t.T/echo", (b"2",), deadline=time.monotonic() + 3)
                break
            except CallError:
                await asyncio.sleep(0.1)
        assert b"".join(reply.body) == b"2"
    await channel.close()


async def test_unix_socket(server_kind: Kind, channel_kind: Kind, tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 's.sock'}"
    async with serving(server_kind, Service(), address) as server:
        assert server.address == address
        channel = make_channel(channel_kind, address, limits=LIMITS)
        assert b"".join((await channel.unary("/t.T/echo", (b"over a file",))).body) == b"over a file"
        with pytest.raises(MeshError, match=r"s\.sock.*another process"):
            await make_server(server_kind, Methods(), address=address).start()
        await channel.close()


async def test_a_port_in_use_is_named(server_kind: Kind, server: Server) -> None:
    with pytest.raises(MeshError, match=server.address) as caught:
        await make_server(server_kind, Methods(), address=server.address).start()
    assert caught.value.code is Code.UNAVAILABLE


@pytest.mark.parametrize(
    ("request_", "answer"), [(b"", b"\x08\x01"), (b"\x0a\x04warm", b"\x08\x01"), (b"\x0a\x04cold", b"\x08\x02")]
)
async def test_health(channel: Channel, request_: bytes, answer: bytes) -> None:
    assert b"".join((await channel.unary(CHECK_METHOD, (request_,))).body) == answer


async def test_health_of_an_unknown_service(channel: Channel) -> None:
    assert (await failure(channel.unary(CHECK_METHOD, (b"\x0a\x06nobody",)))).code is Code.MODEL_NOT_FOUND
    assert (await failure(channel.unary(CHECK_METHOD, (b"\xff\xff",)))).code is Code.INVALID_REQUEST


# Against a client that nearcast has no part in.


async def test_plain_client_unary_binary_metadata_and_gzip(plain: grpc.aio.Channel, service: Service) -> None:
    call = plain.unary_unary("/t.T/echo")(
        b"z" * 5000, metadata=(("blob-bin", bytes(range(256))), ("nc-tenant", "a")), compression=grpc.Compression.Gzip
    )
    assert await call == b"z" * 5000
    assert dict(await call.trailing_metadata())["nc-served-by"] == "here"
    assert service.calls[0].metadata["nc-tenant"] == "a"
    assert unpadded(service.calls[0].metadata["blob-bin"]) == BLOB
    assert dict(await call.trailing_metadata())["blob-bin"] == bytes(range(256))


async def test_plain_client_sees_status_text_and_trailers(plain: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await plain.unary_unary("/t.T/fail")("OVERLOADED zu voll: 100 % ü".encode())
    error = caught.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == "zu voll: 100 % ü"
    assert dict(error.trailing_metadata() or ())["nc-code"] == "OVERLOADED"
    assert dict(error.trailing_metadata() or ())["nc-retry-after-ms"] == "250"


async def test_client_streaming_and_server_streaming(plain: grpc.aio.Channel) -> None:
    assert await plain.stream_unary("/t.T/collect")(iter([b"a", b"", b"c"])) == b"a,,c"
    assert [int(m) async for m in plain.unary_stream("/t.T/count")(b"500")] == list(range(500))
    assert [m async for m in plain.unary_stream("/t.T/count")(b"0")] == []
