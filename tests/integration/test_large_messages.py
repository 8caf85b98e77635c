"""Large messages on a server's connection, without sockets: windows, counts and pieces, however the bytes are read."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from ngh2 import Configuration, Connection, DataReceived, Event, Role, WindowUpdated

from benchmarks.steps import Memory
from nearcast.transport.ngh2_connection import STREAM_WINDOW_BYTES
from nearcast.transport.ngh2_headers import request_prefix
from nearcast.transport.ngh2_server_connection import ServerConnection
from nearcast.transport.ngh2_server_state import ServerState
from nearcast.transport.seam import Call, Limits, Methods, Reply

PATH = "/t.T/size"


class Pair:
    """A client's and a server's end; `kinds` are the types of the messages that the method was given."""

    def __init__(self) -> None:
        self.kinds: list[type] = []
        methods = Methods(unary={PATH: self.size}, pieced=frozenset((PATH,)))
        self.state = ServerState(methods=methods, limits=Limits())
        self.server = ServerConnection(self.state, asyncio.get_running_loop())
        self.memory = Memory()
        self.server.connection_made(cast("asyncio.Transport", self.memory))
        self.client = Connection(Role.CLIENT, Configuration())
        self.client.initiate_connection({})
        self.client.receive_data(b"".join(self.memory.written))
        self.memory.written.clear()

    async def size(self, message: bytes | list[bytes], call: Call) -> Reply:
        self.kinds.append(type(message))
        pieces = [message] if isinstance(message, bytes) else message
        return Reply((str(len(b"".join(pieces))).encode(),))

    def begin(self, announced_bytes: int, sent_bytes: int | None = None) -> int:
        stream_id = self.client.send_request([*request_prefix(PATH, authority="here", is_tls=False)])
        body = b"\0" + announced_bytes.to_bytes(4, "big") + bytes(announced_bytes if sent_bytes is None else sent_bytes)
        self.client.send_data(stream_id, body, end_stream=sent_bytes is None)
        return stream_id

    async def exchange(self, read_bytes: int = 100_000) -> tuple[int, list[Event]]:
        """Until neither has anything to say: how often the server wrote, and what the client heard."""
        loop = asyncio.get_running_loop()
        writes, found = 0, []
        while (data := self.client.data_to_send()) or self.memory.written:
            for at in range(0, len(data), read_bytes):
                # As the loop calls it: not from a task.
                loop.call_soon(self.server.data_received, data[at : at + read_bytes])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            writes += len(self.memory.written)
            self.client.receive_data(b"".join(self.memory.written))
            self.memory.written.clear()
            found += self.client.events()
        return writes, found


@pytest.mark.parametrize("read_bytes", [7, 20_000, 1 << 20])
async def test_a_message_within_the_first_window_is_answered_before_any_window_is_sent(read_bytes):
    pair = Pair()
    await pair.exchange()
    pair.begin(600_000)
    writes, events = await pair.exchange(read_bytes)
    assert writes == 1  # one in the middle of the message would wake the peer for nothing
    assert [event.data[5:] for event in events if isinstance(event, DataReceived)] == [b"600000"]
    assert not pair.server.streams
    assert pair.state.receiving_bytes == 0


async def test_a_larger_message_gets_windows_on_its_way():
    pair = Pair()
    pair.begin(3 * STREAM_WINDOW_BYTES)
    _, events = await pair.exchange()
    assert any(isinstance(event, WindowUpdated) and event.stream_id for event in events)
    assert [event.data[5:] for event in events if isinstance(event, DataReceived)] == [b"3145728"]
    assert pair.kinds == [list]


async def test_what_came_before_a_reset_in_the_same_read_is_not_held(monkeypatch):
    pair = Pair()
    stream_id = pair.begin(600_000, sent_bytes=100_000)
    await pair.exchange()
    assert pair.state.receiving_bytes == 100_005
    pair.client.send_data(stream_id, bytes(50_000))
    rest = pair.client.data_to_send()
    pair.client.reset_stream(stream_id)
    returned = []
    monkeypatch.setattr(ServerConnection, "acknowledge", lambda _, size, id_: returned.append(size))
    pair.server.data_received(rest + pair.client.data_to_send())
    assert pair.state.receiving_bytes == pair.server.receiving_bytes == 0
    assert sum(returned) == 150_005  # the connection's window is whole again
    assert pair.kinds == []


@pytest.mark.parametrize("sent_bytes", [599_999, 600_001])
async def test_a_message_that_is_not_as_long_as_announced_is_refused(sent_bytes):
    pair = Pair()
    stream_id = pair.begin(600_000, sent_bytes=sent_bytes)
    pair.client.end_stream(stream_id)
    await pair.exchange(1 << 20)
    assert pair.kinds == []
    assert pair.state.receiving_bytes == 0
