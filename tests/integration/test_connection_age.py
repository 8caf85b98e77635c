"""Connections that are too quiet or too old: PINGs, graceful GOAWAY, and no failed call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from nearcast.transport.grpc import KINDS, Kind, make_channel
from nearcast.transport.ngh2_connection import split_address
from nearcast.transport.ngh2_server import Ngh2Server
from nearcast.transport.seam import Call, Limits, Methods, Reply
from tests.integration.abuse_parts import ACK, PING, Raw, call, frame


async def echo(message: bytes, call: Call) -> Reply:
    return Reply((message,))


async def peer(message: bytes, call: Call) -> Reply:
    """Takes a while, and says from which port it was called."""
    await asyncio.sleep(float(message))
    return Reply((call.peer.encode(),))


@asynccontextmanager
async def serving(**limits: float) -> AsyncIterator[Ngh2Server]:
    methods = Methods(unary={"/t.T/echo": echo, "/t.T/peer": peer})
    server = Ngh2Server(methods, address="127.0.0.1:0", limits=Limits(**limits))  # type: ignore[arg-type]
    await server.start()
    try:
        yield server
    finally:
        await server.drain(0.1)


@pytest.mark.parametrize("answers", [True, False])
async def test_a_peer_that_does_not_answer_pings_is_dropped(answers: bool) -> None:
    async with serving(keepalive_s=0.1, keepalive_timeout_s=0.5) as server:
        one = await Raw.open(split_address(server.address))
        await one.send(call(1, b"/t.T/peer", b"30"))
        ends_at = time.monotonic() + (0.9 if answers else 20)
        while time.monotonic() < ends_at and not await one.is_closed(0.02):
            if answers and (at := one.received.find(b"\0\0\x08\6\0\0\0\0\0")) >= 0:
                await one.send(frame(PING, ACK, 0, one.received[at + 9 : at + 17]))
                one.received = b""
        assert await one.is_closed(0.0) is not answers
        await one.close()


async def test_no_call_fails_when_connections_grow_old() -> None:
    async with serving(connection_age_s=0.2) as server:

        async def go_on(kind: Kind) -> None:
            channel = make_channel(kind, server.address)

            async def ask(seconds: bytes) -> bytes:
                return b"".join((await channel.unary("/t.T/peer", (seconds,), deadline=time.monotonic() + 10)).body)

            long = asyncio.create_task(ask(b"0.6"))
            seen: list[bytes] = []
            while not long.done() or len(set(seen)) < 2:
                seen += await asyncio.gather(*(ask(b"0.01") for _ in range(4)))
            assert await long == seen[0], "what was in flight was finished where it began"
            await channel.close()

        async with asyncio.timeout(20):  # until each client has come back on another connection
            await asyncio.gather(*(go_on(kind) for kind in KINDS))
