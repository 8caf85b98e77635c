"""Whatever a server sends, a channel's calls end and nothing else happens: mutated conversations, without sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import ngh2
from hypothesis import given, settings
from hypothesis import strategies as st

from nearcast.transport.ngh2_client import ClientConnection
from nearcast.transport.ngh2_framing import frame
from nearcast.transport.ngh2_headers import RESPONSE, request_prefix
from nearcast.transport.seam import CallError, Limits

UNARY, STREAM = 1, 3
HEAD = request_prefix("/t.T/x", authority="a", is_tls=False)
LIMITS = Limits(message_size_bytes_max=1000)
Act = Callable[[ngh2.Connection, int], object]
ACTS: dict[str, Act] = {
    "response": lambda h2, call: h2.send_response(call, RESPONSE),
    "message": lambda h2, call: h2.send_data(call, b"\0\0\0\0\3abc"),
    "half a message": lambda h2, call: h2.send_data(call, b"\0\0\0\0\3a"),
    "too much": lambda h2, call: h2.send_data(call, b"\0\0\1\0\0"),
    "trailers": lambda h2, call: h2.send_trailers(call, [(b"grpc-status", b"0"), (b"x-bin", b"A")]),
    "failure": lambda h2, call: h2.send_trailers(call, [(b"grpc-status", b"8"), (b"grpc-message", b"%zz%")]),
    "trailers only": lambda h2, call: h2.send_response(call, [*RESPONSE, (b"grpc-status", b"5")], end_stream=True),
    "no gRPC": lambda h2, call: h2.send_response(call, [(b":status", b"503")], end_stream=True),
    "refusal": lambda h2, call: h2.reset_stream(call, 7),
    "reset": lambda h2, call: h2.reset_stream(call, 2),
    "notice": lambda h2, _: h2.send_shutdown_notice(),
    "goodbye": lambda h2, _: h2.send_goaway(0),
    "ping": lambda h2, _: h2.ping(b"12345678"),
}


class Wire(asyncio.Transport):
    """Keeps what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


async def words() -> AsyncIterator[Sequence[bytes]]:
    yield (b"word",)
    await asyncio.Event().wait()


async def converse(acts: list[tuple[str, int]], changes: list[tuple[int, int]], cuts: list[int]) -> None:
    connection = ClientConnection(
        LIMITS, asyncio.get_running_loop(), "a", on_retire=lambda _: None, on_lost=lambda _: None
    )
    wire = Wire()
    connection.connection_made(wire)
    server = ngh2.Connection(ngh2.Role.SERVER)
    server.initiate_connection({3: 100})
    connection.data_received(server.data_to_send())
    unary = connection.send(HEAD, frame((b"abc",)), None)
    stream = connection.open(HEAD, None)
    stream.send(words())
    heard = asyncio.ensure_future(collect(stream.messages()))
    await asyncio.sleep(0)
    connection.flush()
    server.receive_data(wire.written)
    for name, call in acts:
        try:
            ACTS[name](server, call)
        except ngh2.NGH2Error:
            continue
    sent = bytearray(server.data_to_send())
    for position, byte in changes:
        if sent:
            sent[position % len(sent)] = byte
    position = 0
    while position < len(sent) and not wire.is_closed:
        size = cuts[position % len(cuts)]
        connection.data_received(bytes(sent[position : position + size]))
        position += size
        await asyncio.sleep(0)
    connection.connection_lost(None)
    async with asyncio.timeout(1):
        ended = await asyncio.gather(unary.future, heard, return_exceptions=True)
        await stream.close()
    assert not [error for error in ended if isinstance(error, BaseException) and not isinstance(error, CallError)]
    assert not connection.calls


async def collect(messages: AsyncIterator[bytes]) -> list[bytes]:
    return [message async for message in messages]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(ACTS)), st.sampled_from([UNARY, STREAM])), max_size=8),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
)
def test_calls_end_whatever_a_server_sends(
    acts: list[tuple[str, int]], changes: list[tuple[int, int]], cuts: list[int]
) -> None:
    asyncio.run(converse(acts, changes, cuts))
