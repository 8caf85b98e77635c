"""The short way of an inference over REST: it must answer as aiohttp does, to the byte and in the same order."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nearcast.handler import InferRequest, RequestContext
from nearcast.serving import HostLimits, ModelHost
from nearcast.store import Store
from nearcast.transport import rest_connection
from nearcast.transport.rest import RestServer
from nearcast.transport.rest_app import RestApp
from nearcast.transport.rest_connection import KEPT_SIZE_BYTES_MAX, RestConnection
from nearcast.transport.seam import DEFAULT_LIMITS, Limits
from nearcast.transport.service import InferenceService
from nearcast.wire.response import TensorResponse
from tests.integration.add_model import AddModel
from tests.integration.host_parts import running
from tests.tiny_models import activate, affine_model, install


def infer(
    *, model: str = "add", head_end: bytes = b"\r\n", extra: Sequence[bytes] = (), rows: int = 2, outputs: bool = True
) -> bytes:
    """An inference with binary data."""
    tensors = [
        {"name": name, "datatype": "FP32", "shape": [rows, 2], "parameters": {"binary_data_size": 8 * rows}}
        for name in "ab"
    ]
    text = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": outputs}}).encode()
    body = text + np.arange(4 * rows, dtype=np.float32).tobytes()
    lines = [b"POST /v2/models/%b/infer HTTP/1.1" % model.encode(), b"Host: x", b"Content-Length: %d" % len(body)]
    lines += [b"Inference-Header-Content-Length: %d" % len(text), *extra, b"", b""]
    return head_end.join(lines) + body


def affine(x: np.ndarray) -> bytes:
    """An inference of the model with one input."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    head = b"POST /v2/models/affine/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % (len(text) + 16)
    head += b"Inference-Header-Content-Length: %d\r\n\r\n" % len(text)
    return head + text + x.astype(np.float32).tobytes()


PLAIN = infer()
GET = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
JSON = (
    b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 67\r\n\r\n"
    b'{"inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":[1,2]}]}'[:67]
)
BEFORE = b"POST /v2/models/add/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(PLAIN)
"""Makes the body of one request of another."""
LONE_LF = b"POST /v2/models/add/infer HTTP/1.1\nHost: x\nContent-Length: 4\n\n\r\n\r\n"
PARTS = (
    PLAIN,
    PLAIN,
    infer(rows=3),
    infer(outputs=False),
    infer(model="none"),
    infer(model="busy"),
    infer(extra=[b"nc-deadline-ms: x"]),
    infer(extra=[b"Connection: close"]),
    infer(extra=[b"Connection: keep-alive"]),
    infer(extra=[b"Accept-Encoding: gzip, deflate"]),
    infer(extra=[b"Content-Length: 3"]),
    infer(head_end=b"\n"),
    infer(extra=[b"X: y\n"]),
    infer().replace(b"HTTP/1.1", b"HTTP/1.0"),
    PLAIN[: PLAIN.index(b"\r\n\r\n") - 7],
    b"X: ",
    b"\r\n",
    b"\r\n\r\n",
    GET,
    CHUNKED,
    JSON,
    BEFORE,
    BEFORE,
    LONE_LF,
)


class PausingModel(AddModel):
    """Answers some turns later, so that more may come meanwhile."""

    def __init__(self, turns: int) -> None:
        super().__init__()
        self.turns = turns

    async def infer(self, request: InferRequest, context: RequestContext) -> TensorResponse:
        for _ in range(self.turns):
            await asyncio.sleep(0)
        return await super().infer(request, context)


class Wire(asyncio.Transport):
    """The client's side in memory: what is written, whether it is closed, and who reads."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_closed = False
        self.is_paused = False
        self.protocol: asyncio.BaseProtocol | None = None

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.written += data

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    async def feed(self, data: bytes, *, waits: bool) -> None:
        """As a loop would: no more than the protocol has room for, nothing while it is paused or closed."""
        while data:
            if waits or self.is_paused:
                await self.settle()
            if self.is_closed:
                return
            assert not self.is_paused
            data = data[self.receive(data) :]
        if waits:
            await self.settle()

    def receive(self, data: bytes) -> int:
        """One read; says how much there was room for."""
        if isinstance(self.protocol, asyncio.BufferedProtocol):
            room = self.protocol.get_buffer(-1)
            size = min(len(room), len(data))
            room[:size] = data[:size]
            self.protocol.buffer_updated(size)
            return size
        assert isinstance(self.protocol, asyncio.Protocol)
        self.protocol.data_received(data)
        return len(data)

    async def settle(self) -> None:
        """Until nothing moves: the handlers here wait for nothing but each other."""
        for _ in range(40):
            await asyncio.sleep(0)


def answers(written: bytes) -> Iterator[tuple[bytes, set[bytes], bytes]]:
    """Status lines, headers but for those that say when and by what, and bodies."""
    while written:
        head, _, rest = written.partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        # What the parser says of garbage quotes what came with it.
        is_quote = b"text/plain" in head
        size = int(re.search(rb"\r\nContent-Length: (\d+)", head)[1])
        dropped = (b"Date:", b"Server:", *([b"Content-Length:"] if is_quote else []))
        yield first, {line for line in lines if not line.startswith(dropped)}, b"" if is_quote else rest[:size]
        written = rest[size:]


@asynccontextmanager
async def connected(
    model: AddModel | ModelHost, *, short: bool = True, limits: Limits = DEFAULT_LIMITS, count: int = 1
) -> AsyncIterator[tuple[list[Wire], RestApp]]:
    """Connections, with the short way or without."""
    rest = RestApp(InferenceService(model, model, server_name="x"), limits)
    if not short:
        rest._begin = lambda *_: None
    runner = await rest.make_runner()
    try:
        wires = [Wire() for _ in range(count)]
        for wire in wires:
            wire.protocol = runner.server()
            wire.protocol.connection_made(wire)
            assert isinstance(wire.protocol, RestConnection) == short
        yield wires, rest
        for wire in wires:
            wire.protocol.connection_lost(None)
    finally:
        rest._guard.close()
        await runner.cleanup()


async def talk(segments: Sequence[bytes], *, short: bool, waits: bool, turns: int) -> tuple[list[object], bool]:
    """What a connection answers."""
    async with connected(PausingModel(turns), short=short) as ((wire,), _):
        for segment in segments:
            await wire.feed(segment, waits=waits)
        await wire.settle()
        return list(answers(wire.written)), wire.is_closed


@st.composite
def segments(draw: st.DrawFn) -> list[bytes]:
    """Parts of requests as they may arrive: whole, cut, several at once."""
    found = [b""]
    for part in draw(st.lists(st.sampled_from(PARTS), min_size=1, max_size=6)):
        cut = draw(st.sampled_from([0, 0, 0, 5, part.find(b"\r\n\r\n") + 4, len(part) - 1]))
        for piece in (part[:cut], part[cut:]):
            if draw(st.sampled_from([True, True, False])):
                found.append(piece)
            else:
                found[-1] += piece
    return [PLAIN, PLAIN, *filter(None, found)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(segments=segments(), waits=st.booleans(), turns=st.sampled_from([0, 3]))
def test_answers_are_those_of_the_long_way(segments: list[bytes], waits: bool, turns: int) -> None:
    found = asyncio.run(talk(segments, short=True, waits=waits, turns=turns))
    assert found == asyncio.run(talk(segments, short=False, waits=waits, turns=turns))


async def test_large_body_is_received_where_it_stays() -> None:
    model = AddModel()
    async with connected(model) as ((wire,), _):
        for _ in range(2):
            await wire.feed(infer(rows=40_000), waits=True)
        assert [first for first, *_ in answers(wire.written)] == [b"HTTP/1.1 200 OK"] * 2
    array = model.requests[-1].decode()["a"]
    assert array.flags.aligned
    assert array.ctypes.data % 64 == 0
    assert not array.flags.writeable
    assert array.tobytes() == np.arange(80_000, dtype=np.float32).tobytes()


async def test_inputs_of_one_layout_are_not_mixed_up() -> None:
    model = AddModel()
    async with connected(model) as ((wire,), _):
        for _ in range(2):
            await wire.feed(PLAIN, waits=True)
        await wire.feed(PLAIN[:-32] + bytes(32), waits=True)
    first, second, third = model.requests
    assert first.form is None
    assert second.form is third.form is not None
    assert second.decode()["b"].tolist() == [[4, 5], [6, 7]]
    assert third.decode()["b"].tolist() == [[0, 0], [0, 0]]


async def test_hanging_up_cancels_what_was_begun() -> None:
    model = AddModel()
    async with connected(model) as ((wire,), rest):
        await wire.feed(infer(model="slow"), waits=True)
        model.release.set()
        await wire.settle()
        model.release.clear()
        await wire.feed(infer(model="slow"), waits=True)
        assert not rest._inference.idle.is_set()
    await asyncio.wait_for(model.cancelled.wait(), 5)
    assert rest._inference.idle.is_set()


async def test_bodies_that_are_late_or_too_many() -> None:
    big = infer(rows=40_000)
    limits = msgspec.structs.replace(DEFAULT_LIMITS, receive_buffer_bytes_max=2_000_000)
    async with connected(AddModel(), limits=limits) as ((wire,), rest):
        await wire.feed(big, waits=True)
        rest._guard._body_bytes = 1_000_000  # of others
        await wire.feed(big, waits=True)
        rest._guard._body_bytes = 0
        await wire.feed(big, waits=True)
        rest._guard._room_bytes = limits.receive_buffer_bytes_max  # announced by others
        await wire.feed(big, waits=True)
        rest._guard._room_bytes = 0
        await wire.feed(big[:1000], waits=True)
        assert rest._guard._body_bytes > 0
        wire.protocol._expire()
        assert not wire.is_closed  # it would not read the answer
        await wire.feed(big[1000:], waits=True)
        assert b"\r\nConnection: close\r\n" in wire.written
        status = [first.split()[1] for first, *_ in answers(wire.written)]
        assert status == [b"200", b"429", b"200", b"200", b"400"]
        assert wire.is_closed
        assert rest._guard._body_bytes == rest._guard._room_bytes == 0


async def test_the_rest_of_a_late_body_is_awaited_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_connection, "LINGER_S", 0.0)
    async with connected(AddModel()) as ((wire,), _):
        await wire.feed(PLAIN, waits=True)
        await wire.feed(PLAIN[:-9], waits=True)
        wire.protocol._expire()
        await wire.feed(b"x", waits=True)
        assert wire.is_closed


@asynccontextmanager
async def answering() -> AsyncIterator[tuple[Wire, RestApp, AddModel]]:
    """A connection whose request waits for the model's release."""
    model = AddModel()
    model.release.set()
    async with connected(model) as ((wire,), rest):
        await wire.feed(infer(model="slow"), waits=True)
        model.release.clear()
        await wire.feed(infer(model="slow"), waits=True)
        wire.written = b""
        yield wire, rest, model


async def test_hanging_up_behind_a_pipelined_request_cancels() -> None:
    model = AddModel()
    server = RestServer(InferenceService(model, model, server_name="x"), address="127.0.0.1:0")
    await server.start()
    host, port = server.address.rsplit("/", 1)[-1].rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    model.release.set()
    writer.write(infer(model="slow"))
    await reader.readuntil(b'"outputs":[]}')
    model.release.clear()
    model.running.clear()
    writer.write(infer(model="slow"))
    await model.running.wait()
    writer.write(PLAIN)
    writer.close()
    await asyncio.wait_for(model.cancelled.wait(), 5)
    await server.drain(1)


async def test_no_more_than_a_bound_is_kept_for_after_an_answer() -> None:
    async with answering() as (wire, _, _):
        await wire.feed(bytes(KEPT_SIZE_BYTES_MAX), waits=True)
        assert not wire.is_paused
        wire.receive(b"x")
        assert wire.is_paused


async def test_what_is_kept_counts_until_it_goes_on() -> None:
    async with answering() as (wire, rest, model):
        held = rest._guard._body_bytes
        await wire.feed(PLAIN, waits=True)
        assert rest._guard._body_bytes == held + len(PLAIN)
        model.release.set()
        await wire.settle()
        assert len(list(answers(wire.written))) == 2
        assert rest._guard._body_bytes == 0


async def test_what_is_kept_is_refused_where_bodies_fill_the_memory() -> None:
    async with answering() as (wire, rest, _):
        rest._guard._body_bytes += DEFAULT_LIMITS.receive_buffer_bytes_max  # of others
        await wire.feed(PLAIN, waits=True)
        assert wire.is_closed


async def test_an_answer_that_cannot_be_written_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_connection, "_write_head", lambda *_: 1 // 0)
    async with answering() as (wire, rest, model):
        (watched,) = rest._guard._connections.values()
        model.release.set()
        await wire.settle()
        assert wire.is_closed
        assert watched.open_requests == watched.body_bytes == 0


async def test_hanging_up_gives_back_what_a_body_held() -> None:
    big = infer(rows=40_000)
    async with connected(AddModel()) as ((wire,), rest):
        await wire.feed(big, waits=True)
        await wire.feed(big[:300_000], waits=True)
        assert rest._guard._body_bytes > 200_000
    assert rest._guard._body_bytes == 0


async def test_a_host_answers_a_crowd_without_coroutines(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    install(store, affine_model(scale=2.0))
    activate(store, stable=1)
    loop = asyncio.get_running_loop()
    async with running(store, HostLimits(inline_us_max=1e9)) as host, connected(host, count=4) as (wires, rest):
        for wire in wires:
            for _ in range(2):
                await wire.feed(affine(np.zeros(4)), waits=True)
            wire.written = b""
        tasks, made = len(asyncio.all_tasks()), []

        def arrive(*, hangs_up: bool) -> None:
            for number, wire in enumerate(wires):
                wire.receive(affine(np.full(4, number)))
            made.append(len(asyncio.all_tasks()))
            if hangs_up:
                wires[3].close()
                wires[3].protocol.connection_lost(None)

        # As a loop does it: not from a task. Those of a turn after a crowded one run together at its end.
        for hangs_up in (False, True):
            loop.call_soon(partial(arrive, hangs_up=hangs_up))
            await wires[0].settle()
        assert made == [tasks, tasks]
        found = [[body[-16:] for *_, body in answers(wire.written)] for wire in wires]
        doubles = [np.full(4, 2 * number, np.float32).tobytes() for number in range(4)]
        assert found == [[double] * 2 for double in doubles[:3]] + [doubles[3:]]
        assert rest._inference.idle.is_set()
        assert rest._guard._body_bytes == 0
        assert host.report().in_flight == 0
