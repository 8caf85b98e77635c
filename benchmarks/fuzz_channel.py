"""Whatever a server sends, a channel's calls end, each once: mutated conversations, without sockets."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence

import ngh2

from benchmarks.fuzz_decoders import Tally
from nearcast.transport.ngh2_client import ClientConnection
from nearcast.transport.ngh2_framing import frame
from nearcast.transport.ngh2_headers import RESPONSE, request_prefix
from nearcast.transport.seam import CallError, Fields, Limits

CALLS = UNARY, STREAM, PASSED = 1, 3, 5
SENT_SIZE_BYTES = 400
"""About what a server sends here, for those who choose where to change it."""
_HEAD = request_prefix("/t.T/x", authority="a", is_tls=False)
_LIMITS = Limits(message_size_bytes_max=1000)
_END_TIMEOUT_S = 10.0
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


class Told:
    """Who waits for a passed call, and how often it was told of an end."""

    def __init__(self) -> None:
        self.times = 0

    def on_answer(self, pieces: Sequence[bytes], trailers: Fields) -> None:
        self.times += 1

    def on_error(self, error: CallError, *, is_refused: bool) -> None:
        self.times += 1


async def converse(acts: Sequence[tuple[str, int]], changes: Sequence[tuple[int, int]], cuts: Sequence[int]) -> None:
    """Three calls and what a server makes of them.

    Args:
        acts: what it does, to which call.
        changes: of the bytes that it sends: where, and to what.
        cuts: sizes of the reads in which these come.

    Raises:
        AssertionError: if a call does not end as it should.
    """
    connection = ClientConnection(
        _LIMITS, asyncio.get_running_loop(), "a", on_retire=lambda _: None, on_lost=lambda _: None
    )
    wire, told = Wire(), Told()
    connection.connection_made(wire)
    server = ngh2.Connection(ngh2.Role.SERVER)
    server.initiate_connection({3: 100})
    connection.data_received(server.data_to_send())
    unary = connection.send(_HEAD, frame((b"abc",)), None)
    stream = connection.open(_HEAD, None)
    stream.send(_words())
    heard = asyncio.ensure_future(_collect(stream.messages()))
    connection.pass_on(_HEAD, frame((b"abc",)), asyncio.get_running_loop().time(), told)
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
    async with asyncio.timeout(_END_TIMEOUT_S):
        ended = await asyncio.gather(unary.future, heard, return_exceptions=True)
        await stream.close()
    assert not [error for error in ended if isinstance(error, BaseException) and not isinstance(error, CallError)]
    assert told.times == 1
    assert not connection.calls


def attack_channel(rng: random.Random, count: int) -> Tally:
    """Random conversations; `crashes` counts those after which a call had not ended as it should."""
    tally = Tally()

    async def converse_often() -> None:
        for _ in range(count):
            tally.messages += 1
            acts = [(rng.choice(sorted(ACTS)), rng.choice(CALLS)) for _ in range(rng.randrange(9))]
            changes = [(rng.randrange(SENT_SIZE_BYTES), rng.randrange(256)) for _ in range(rng.randrange(5))]
            cuts = [rng.randint(1, 60) for _ in range(rng.randint(1, 4))]
            try:
                await converse(acts, changes, cuts)
            except Exception as error:  # noqa: BLE001 - that is what is looked for
                tally.crashes += 1
                tally.note(f"channel: {error!r} after {acts} {changes} {cuts}", b"")

    asyncio.run(converse_often())
    return tally


async def _words() -> AsyncIterator[Sequence[bytes]]:
    yield (b"word",)
    await asyncio.Event().wait()


async def _collect(messages: AsyncIterator[bytes]) -> list[bytes]:
    return [message async for message in messages]
