"""What only our own HTTP/2 channel has to prove: servers that vanish, refuse or answer nonsense."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import ngh2
import pytest
import uvloop

from nearcast.errors import Code
from nearcast.transport.ngh2_channel import Ngh2Channel
from nearcast.transport.seam import DEFAULT_LIMITS, CallError, Limits
from tests.patience import own_time

# The replacement is a hook that would change the loop of everybody else's tests too.
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy:pytest.PytestDeprecationWarning")


@pytest.fixture(scope="module")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy()


@asynccontextmanager
async def calling(address: str, limits: Limits = DEFAULT_LIMITS) -> AsyncIterator[Ngh2Channel]:
    channel = Ngh2Channel(address, limits=limits)
    try:
        yield channel
    finally:
        await channel.close()


class RawServer:
    """Accepts one connection after another and does to each what `act` says."""

    def __init__(self, act: Callable[[ngh2.Connection, list[ngh2.Event]], str | None], greet: bool = True) -> None:
        self.act, self.greet = act, greet
        self.accepted = 0
        self.writers: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self.writers.add(writer)
        h2 = ngh2.Connection(ngh2.Role.SERVER)
        h2.initiate_connection({3: 100})
        try:
            while data := await reader.read(1 << 16):
                h2.receive_data(data)
                word = self.act(h2, h2.events())
                if word == "abort":
                    writer.transport.abort()
                    return
                if self.greet:
                    writer.write(h2.data_to_send())
        except ConnectionError:
            pass
        finally:
            writer.close()
            self.writers.discard(writer)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        server.close()
        for writer in list(self.writers):
            writer.transport.abort()
        await asyncio.sleep(0)


def requests(events: list[ngh2.Event]) -> list[int]:
    return [event.stream_id for event in events if isinstance(event, ngh2.RequestReceived)]


async def failure(channel: Ngh2Channel, timeout_s: float = 10.0) -> CallError:
    with pytest.raises(CallError) as caught:
        await channel.unary("/t.T/echo", (b"x",), deadline=time.monotonic() + timeout_s)
    return caught.value


async def test_a_lost_connection_fails_all_calls_at_once_as_sent() -> None:
    def act(h2: ngh2.Connection, events: list[ngh2.Event]) -> str | None:
        seen.extend(requests(events))
        return "abort" if len(seen) == 20 else None

    seen: list[int] = []
    async with RawServer(act).listening() as address, calling(address) as channel:
        began = own_time()
        errors = await asyncio.gather(*(failure(channel, 10) for _ in range(20)))
        assert own_time() - began < 1
        assert {(error.code, error.sent) for error in errors} == {(Code.UNAVAILABLE, True)}


async def test_calls_above_goaway_are_not_sent() -> None:
    def act(h2: ngh2.Connection, events: list[ngh2.Event]) -> str | None:
        if requests(events):
            h2.send_goaway(0, last_stream_id=0)
        return None

    server = RawServer(act)
    async with server.listening() as address, calling(address) as channel:
        error = await failure(channel)
        assert (error.code, error.sent) == (Code.UNAVAILABLE, False)
        assert server.accepted <= 3


@pytest.mark.parametrize(
    ("reset_code", "code", "sent"),
    [(2, Code.INTERNAL, True), (7, Code.UNAVAILABLE, False), (8, Code.CANCELLED, True), (11, Code.OVERLOADED, True)],
)
async def test_what_a_reset_means(reset_code: int, code: Code, sent: bool) -> None:
    def act(h2: ngh2.Connection, events: list[ngh2.Event]) -> str | None:
        for stream_id in requests(events):
            h2.reset_stream(stream_id, reset_code)
        return None

    async with RawServer(act).listening() as address, calling(address) as channel:
        error = await failure(channel)
        assert (error.code, error.sent) == (code, sent)


@pytest.mark.parametrize("answer", ["503", "html", "no status", "no message", "garbage"])
async def test_answers_that_are_no_grpc(answer: str) -> None:
    def act(h2: ngh2.Connection, events: list[ngh2.Event]) -> str | None:
        for stream_id in requests(events):
            if answer == "503":
                h2.send_response(stream_id, [(b":status", b"503")], end_stream=True)
            elif answer == "html":
                h2.send_response(stream_id, [(b":status", b"200"), (b"content-type", b"text/html")], end_stream=True)
            elif answer == "no status":
                h2.send_response(stream_id, [(b":status", b"200")])
                h2.send_data(stream_id, b"\0\0\0\0\0", end_stream=True)
            elif answer == "no message":
                h2.send_response(stream_id, [(b":status", b"200"), (b"grpc-status", b"0")], end_stream=True)
            else:
                h2.send_response(stream_id, [(b":status", b"200")])
                h2.send_data(stream_id, b"\x09" * 100)
        return None

    async with RawServer(act).listening() as address, calling(address) as channel:
        began = own_time()
        error = await failure(channel)
        assert error.code is not Code.DEADLINE
        assert own_time() - began < 1


async def test_a_server_that_never_greets_is_unavailable() -> None:
    limits = Limits(connect_timeout_s=0.3)
    server = RawServer(lambda h2, events: None, greet=False)
    async with server.listening() as address, calling(address, limits) as channel:
        began = own_time()
        error = await failure(channel)
        assert (error.code, error.sent) == (Code.UNAVAILABLE, False)
        assert own_time() - began < 1


class Silence:
    """Greets, and says nothing more once a call has come: like a machine that lost power, it sends no FIN."""

    def __init__(self) -> None:
        self.server = RawServer(self.act)

    def act(self, h2: ngh2.Connection, events: list[ngh2.Event]) -> str | None:
        self.server.greet = self.server.greet and not requests(events)
        return None


async def test_a_silent_peer_is_dropped_after_a_missed_deadline() -> None:
    """Later calls must not wait on the same dead connection for ever."""
    silence = Silence()
    limits = Limits(keepalive_timeout_s=0.2)
    async with silence.server.listening() as address, calling(address, limits) as channel:
        assert (await failure(channel, 0.1)).code is Code.DEADLINE
        async with asyncio.timeout(5):
            while silence.server.accepted < 2:
                await asyncio.sleep(0.05)
                await failure(channel, 0.05)


async def test_a_silent_peer_is_noticed_by_calls_without_a_deadline() -> None:
    async def nothing() -> AsyncIterator[Sequence[bytes]]:
        await asyncio.Event().wait()
        yield (b"",)

    async def listen(channel: Ngh2Channel) -> None:
        async for _ in channel.stream("/t.T/talk", nothing()):
            pass

    silence = Silence()
    limits = Limits(keepalive_s=0.1, keepalive_timeout_s=0.1)
    async with silence.server.listening() as address, calling(address, limits) as channel:
        began, own_began = time.monotonic(), own_time()
        lost = await asyncio.gather(listen(channel), channel.unary("/t.T/echo", (b"x",)), return_exceptions=True)
        assert time.monotonic() - began > 0.15
        assert own_time() - own_began < 1
        assert [(error.code, error.sent) for error in lost if isinstance(error, CallError)] == [
            (Code.UNAVAILABLE, True)
        ] * 2


async def test_streams_leave_slots_to_unary_calls() -> None:
    async def nothing() -> AsyncIterator[Sequence[bytes]]:
        await asyncio.Event().wait()
        yield (b"",)

    server = RawServer(lambda h2, events: None)
    async with server.listening() as address, calling(address) as channel:
        streams = [asyncio.ensure_future(anext(aiter(channel.stream("/t.T/talk", nothing())))) for _ in range(75)]
        await asyncio.sleep(0.1)
        with pytest.raises(CallError, match="Too many streams") as caught:
            await anext(aiter(channel.stream("/t.T/talk", nothing())))
        assert (caught.value.code, caught.value.sent) == (Code.OVERLOADED, False)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        stream = asyncio.ensure_future(anext(aiter(channel.stream("/t.T/talk", nothing()))))
        await asyncio.sleep(0.05)
        assert not stream.done()
        stream.cancel()
