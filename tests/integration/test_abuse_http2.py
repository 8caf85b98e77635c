"""Clients that misbehave in HTTP/2 and gRPC: bounded time and memory, and others are served as before.

Each attack runs over real sockets against a server process, whose memory is watched, while an honest client of a third
process calls on.
"""

from __future__ import annotations

import asyncio
import gzip
import re
from collections.abc import Awaitable, Callable

import pytest

from tests.integration.abuse_parts import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    MEBIBYTE,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Bench,
    Raw,
    call,
    data_frames,
    frame,
    literal,
    message,
    raw,
    request,
)
from tests.patience import until

ZERO_WINDOW = b"\0\4\0\0\0\0"
HOARD = message(bytes(7 * MEBIBYTE))[:-1]
HUGE_WINDOW = b"\0\4\x7f\xff\xff\xff"


async def flood(one: Raw, piece: bytes, times: int) -> bool:
    """Send the same bytes again and again; whether the server put up with all of it."""
    for _ in range(times):
        if not await one.send(piece):
            return False
    return not await one.is_closed(0.05)


# Attacks that must cost the attacker his connection. Each gets a greeted socket and returns when it has done its worst.


async def rapid_reset(one: Raw) -> None:
    for first in range(1, 40_000, 200):
        piece = b"".join(
            call(i, b"/t.T/hang") + frame(RST_STREAM, 0, i, b"\0\0\0\x08") for i in range(first, first + 200, 2)
        )
        if not await one.send(piece):
            return


async def made_you_reset(one: Raw) -> None:
    """The server is made to reset calls that it has begun: the limit for the client's own resets counts none."""
    for first in range(1, 100_000, 200):
        piece = b"".join(
            call(i, b"/t.T/hang") + frame(WINDOW_UPDATE, 0, i, b"\0\0\0\0") for i in range(first, first + 200, 2)
        )
        if not await one.send(piece):
            return


async def continuations(one: Raw) -> None:
    await one.send(frame(HEADERS, 0, 1, request()))
    await flood(one, frame(CONTINUATION, 0, 1, literal(b"x", b"y")) * 1000, 100)


async def empty_continuations(one: Raw) -> None:
    await one.send(frame(HEADERS, 0, 1, request()))
    await flood(one, frame(CONTINUATION, 0, 1) * 1000, 100)


async def header_bomb(one: Raw) -> None:
    block = request() + literal(b"x", b"y" * MEBIBYTE)
    await one.send(frame(HEADERS, 0, 1, block[:16384]))
    for start in range(16384, len(block), 16384):
        await one.send(frame(CONTINUATION, 0, 1, block[start : start + 16384]))


async def hpack_bomb(one: Raw) -> None:
    """One field of 4 000 bytes in the dynamic table, then one byte for each repetition."""
    for i in range(1, 200, 2):
        table = literal(b"bomb", b"y" * 4000, first=0x40) if i == 1 else b""
        if not await one.send(frame(HEADERS, END_HEADERS, i, request(b"/t.T/echo", table, b"\xbe" * 8000))):
            return


async def settings_flood(one: Raw) -> None:
    await flood(one, frame(SETTINGS, 0, 0, b"\0\3\0\0\0\x01") * 1000, 200)


async def window_overflow(one: Raw) -> None:
    await flood(one, frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), 3)


async def empty_data(one: Raw) -> None:
    await one.send(frame(HEADERS, END_HEADERS, 1, request(b"/t.T/chat")))
    await flood(one, frame(DATA, 0, 1) * 1000, 200)


async def too_many_streams(one: Raw) -> None:
    await flood(one, b"".join(frame(HEADERS, END_HEADERS, i, request(b"/t.T/hang")) for i in range(1, 2001, 2)), 1)


async def data_before_headers(one: Raw) -> None:
    await flood(one, frame(DATA, 0, 7, b"x" * 100), 2)


async def frame_of_16_mebibytes(one: Raw) -> None:
    await one.send(frame(DATA, 0, 1, length=(1 << 24) - 1))
    await flood(one, bytes(1 << 16), 64)


async def push_promise(one: Raw) -> None:
    await flood(one, frame(5, END_HEADERS, 1, b"\0\0\0\2" + request()), 2)


async def settings_nonsense(one: Raw) -> None:
    await flood(one, frame(SETTINGS, 0, 0, b"\0\4\xff\xff\xff\xff"), 2)


async def garbage(one: Raw) -> None:
    await flood(one, bytes(range(256)) * 64, 2)


@pytest.mark.parametrize(
    "attack",
    [
        rapid_reset,
        made_you_reset,
        continuations,
        empty_continuations,
        header_bomb,
        hpack_bomb,
        settings_flood,
        window_overflow,
        empty_data,
        too_many_streams,
        data_before_headers,
        frame_of_16_mebibytes,
        push_promise,
        settings_nonsense,
        garbage,
    ],
    ids=lambda attack: attack.__name__,
)
async def test_an_attack_costs_its_own_connection_only(abused: Bench, attack: Callable[[Raw], Awaitable[None]]) -> None:
    async with abused.attack("h2"), raw(abused.address()) as (one,):
        await attack(one)
        assert await one.is_closed(), "the server put up with it"


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\0" * 5000,
        bytes(range(256)) * 64,
        b"\x16\x03\1\2\0" + bytes(512),
        PREFACE + b"\xff" * 5000,
        PREFACE + frame(HEADERS, END_HEADERS, 1, request()),
    ],
    ids=["http1", "zeros", "bytes", "tls", "frames", "no-settings"],
)
async def test_what_is_no_http2_is_closed(abused: Bench, data: bytes) -> None:
    async with abused.attack("h2"), raw(abused.address(), greets=False) as (one,):
        await one.send(data)
        assert await one.is_closed()


# Attacks that may be endured, as long as they cost no more than what is sent.


async def table_churn(one: Raw) -> None:
    """The header table's size is changed again and again."""
    for i in range(1, 400, 2):
        await one.send(frame(HEADERS, END_HEADERS | END_STREAM, i, (b"\x20\x3f\xe1\x1f") * 2000 + request()))


async def ping_flood(one: Raw) -> None:
    await flood(one, frame(PING, 0, 0, b"12345678") * 500, 200)


async def priority_flood(one: Raw) -> None:
    for first in range(1, 200_000, 2000):
        await one.send(b"".join(frame(PRIORITY, 0, i, b"\0\0\0\0\x10") for i in range(first, first + 2000, 2)))


async def unknown_frames(one: Raw) -> None:
    await flood(one, (frame(0x42, 255, 0, b"?" * 100) + frame(0x99, 0, 5)) * 500, 100)


async def padded_nothing(one: Raw) -> None:
    await one.send(frame(HEADERS, END_HEADERS, 1, request(b"/t.T/chat")))
    await flood(one, frame(DATA, PADDED, 1, b"\xff" + bytes(255)) * 100, 200)


async def empty_messages(one: Raw) -> None:
    """200 000 messages of no bytes on one streaming call."""
    await one.send(frame(HEADERS, END_HEADERS, 1, request(b"/t.T/chat")))
    await flood(one, frame(DATA, 0, 1, message(b"") * 2000), 100)


async def bad_messages(one: Raw) -> None:
    """Streaming calls that break in their first message: the method must not wait for a second for ever."""
    for first in range(1, 20_000, 200):
        piece = b"".join(
            frame(HEADERS, END_HEADERS, i, request(b"/t.T/chat")) + frame(DATA, 0, i, b"\7\0\0\0\0")
            for i in range(first, first + 200, 2)
        )
        if not await one.send(piece):
            return
        await asyncio.sleep(0)


async def no_such_method(one: Raw) -> None:
    for first in range(1, 20_000, 200):
        if not await one.send(b"".join(call(i, b"/no/such") for i in range(first, first + 200, 2))):
            return
        await asyncio.sleep(0)


async def ended_before_it_is_refused(one: Raw) -> None:
    """What is refused has been reset in the same packet."""
    for path in (b"/no/such", b"/t.T/echo", b"/t.T/chat"):
        plain = b"".join(
            literal(b":" + name, value)
            for name, value in ((b"method", b"GET"), (b"scheme", b"http"), (b"path", path), (b"authority", b"x"))
        )
        for i in (1, 3, 5):
            block = (request(path), plain, request(path, literal(b"grpc-timeout", b"never")))[i // 2]
            stream_id = i + 6 * (b"/no/such", b"/t.T/echo", b"/t.T/chat").index(path)
            await one.send(
                frame(HEADERS, END_HEADERS, stream_id, block) + frame(RST_STREAM, 0, stream_id, b"\0\0\0\x08")
            )


async def big_metadata(one: Raw) -> None:
    """Fifteen kilobytes of metadata in each of many calls: below the limit."""
    more = b"".join(literal(b"n%d" % i, b"v" * 100) for i in range(100))
    for i in range(1, 1000, 2):
        if not await one.send(call(i, b"/t.T/echo", b"x", more)):
            return


async def bombs(one: Raw) -> None:
    """Eight kilobytes that become eight mebibytes."""
    bomb = message(gzip.compress(bytes(8 * MEBIBYTE - 1), 9), flag=1)
    encoding = literal(b"grpc-encoding", b"gzip")
    for i in range(1, 80, 2):
        await one.send(
            frame(HEADERS, END_HEADERS, i, request(b"/t.T/tasks", encoding)) + data_frames(i, bomb, end=True)
        )
    await asyncio.sleep(0.3)


async def bombs_too_large(one: Raw) -> None:
    bomb = message(gzip.compress(bytes(64 * MEBIBYTE), 1), flag=1)
    encoding = literal(b"grpc-encoding", b"gzip")
    for i in range(1, 20, 2):
        await one.send(
            frame(HEADERS, END_HEADERS, i, request(b"/t.T/tasks", encoding)) + data_frames(i, bomb, end=True)
        )
    await asyncio.sleep(0.3)


async def bombs_on_a_stream(one: Raw) -> None:
    """A hundred bombs in one call's window, before the method takes the first."""
    bomb = message(gzip.compress(bytes(8 * MEBIBYTE - 1), 9), flag=1)
    await one.send(
        frame(HEADERS, END_HEADERS, 1, request(b"/t.T/chat", literal(b"grpc-encoding", b"gzip")))
        + data_frames(1, bomb * 100, end=False)
    )
    await asyncio.sleep(0.3)


async def huge_length(one: Raw) -> None:
    for i in range(1, 200, 2):
        path = b"/t.T/echo" if i % 4 == 1 else b"/t.T/chat"
        await one.send(
            frame(HEADERS, END_HEADERS, i, request(path)) + frame(DATA, 0, i, b"\0\xff\xff\xff\xff" + bytes(99))
        )


async def half_closed(one: Raw) -> None:
    """Calls that never end, unary and streaming, up to the server's limit of them."""
    for i in range(1, 510, 2):
        path = b"/t.T/echo" if i % 4 == 1 else b"/t.T/chat"
        await one.send(frame(HEADERS, END_HEADERS, i, request(path)) + frame(DATA, 0, i, b"\0\0\0\0\x63" + bytes(9)))
    await asyncio.sleep(0.1)


ENDURED: dict[Callable[[Raw], Awaitable[None]], float] = {
    table_churn: 16,
    ping_flood: 16,
    priority_flood: 16,
    unknown_frames: 16,
    padded_nothing: 16,
    empty_messages: 16,
    bad_messages: 16,
    no_such_method: 16,
    ended_before_it_is_refused: 16,
    big_metadata: 16,
    bombs: 64,
    bombs_too_large: 64,
    bombs_on_a_stream: 64,
    huge_length: 16,
    half_closed: 16,
}
"""Each attack and what it may cost in mebibytes."""


@pytest.mark.parametrize("attack", ENDURED, ids=lambda attack: attack.__name__)
async def test_an_attack_is_endured(abused: Bench, attack: Callable[[Raw], Awaitable[None]]) -> None:
    before = await abused.tasks_in_server()
    async with abused.attack("h2", grown_mib=ENDURED[attack]), raw(abused.address()) as (one,):
        await attack(one)

    async def are_gone() -> bool:
        return await abused.tasks_in_server() <= before + 3

    assert await until(are_gone, "no method waits for a call that is gone") < 1.0


# Attacks by many connections at once.


async def test_zero_windows(abused: Bench) -> None:
    """Forty connections ask for four mebibytes thirty times and read nothing: what waits for all of them is bounded."""
    async with abused.attack("h2", grown_mib=110), raw(abused.address(), 40, settings=ZERO_WINDOW) as many:
        for i in range(1, 61, 2):
            for one in many:
                await one.send(call(i, b"/t.T/big", b"4"))
            await asyncio.sleep(0.005)
        gone = await asyncio.gather(*(one.is_closed() for one in many))
        assert all(gone), "who reads nothing is dropped in time"


async def test_sockets_that_are_not_read(abused: Bench) -> None:
    """The windows are open, but nobody reads the socket: the same bound."""
    async with (
        abused.attack("h2", grown_mib=200),
        raw(abused.address(), 30, settings=HUGE_WINDOW, reads=False) as many,
    ):
        for one in many:
            await one.send(frame(WINDOW_UPDATE, 0, 0, b"\x7f\0\0\0"))
        for i in range(1, 41, 2):
            for one in many:
                await one.send(call(i, b"/t.T/big", b"1"))
            await asyncio.sleep(0.01)
        assert await until(lambda: abused.server.descriptors < 30, "who reads nothing is dropped") < 3.0


async def test_calls_that_wait_and_are_reset(abused: Bench) -> None:
    """Requests that wait for room for their answers are forgotten when their calls end."""
    async with abused.attack("h2", grown_mib=64), raw(abused.address(), settings=ZERO_WINDOW) as (one,):
        await one.send(b"".join(call(i, b"/t.T/big", b"4") for i in (1, 3, 5)))
        await asyncio.sleep(0.05)
        for i in range(7, 67, 2):
            await one.send(call(i, b"/t.T/echo", bytes(7 * MEBIBYTE)))
            await one.send(frame(RST_STREAM, 0, i, b"\0\0\0\x08"))


async def test_hoarded_uploads_leave_room_for_others(patient: Bench) -> None:
    """Many connections send all of their messages but the last byte; another's upload passes all the same."""
    async with patient.attack("h2", grown_mib=80), raw(patient.address(), 6) as many:
        for one in many:
            for i in range(1, 13, 2):
                await one.send(
                    frame(HEADERS, END_HEADERS, i, request(b"/t.T/echo" if i % 4 == 1 else b"/t.T/chat"))
                    + data_frames(i, HOARD, end=False)
                )
        async with raw(patient.address(), settings=HUGE_WINDOW) as (late,):
            await late.send(call(1, b"/t.T/tasks", bytes(5 * MEBIBYTE)))
            answer = re.compile(rb"\0\0\0\0[\1\2]\d+")
            assert await until(lambda: answer.search(late.received), "the late upload is answered") < 2.0


async def test_slow_loris(abused: Bench) -> None:
    """Byte by byte: a preface, nothing at all, an upload. Each is given up in time."""
    async with abused.attack("h2"), raw(abused.address(), 60, greets=False) as many:
        for one in many[40:]:
            await one.send(
                PREFACE
                + frame(SETTINGS)
                + frame(HEADERS, END_HEADERS, 1, request())
                + frame(DATA, 0, 1, b"\0\0\0\x40\0")
            )
        for i in range(10):
            for one in many[:20]:
                await one.send(PREFACE[i : i + 1])
            for one in many[40:]:
                await one.send(frame(DATA, 0, 1, b"x"))
            await asyncio.sleep(0.05)
        assert all(await asyncio.gather(*(one.is_closed() for one in many[:40])))
        reset = frame(RST_STREAM, 0, 1, bytes(4))
        await until(lambda: all(reset in one.received for one in many[40:]), "each upload is refused")


async def test_connections_beyond_the_bound(abused: Bench) -> None:
    """Connections that do nothing go sooner when there is little room; a new client finds its place then."""
    async with abused.attack("h2"), raw(abused.address(), 320) as many:
        await until(lambda: sum(one._reading is None or one._reading.done() for one in many) > 30, "30 are closed")
        assert await abused.tasks_in_server() >= 0
