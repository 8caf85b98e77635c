"""Requests that pass a stand-alone router as bytes: what happens to them on the way, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ngh2 import Configuration, Connection, DataReceived, Role, TrailersReceived

from nearcast.errors import Code, MeshError
from nearcast.handler import InferResponse, RequestContext
from nearcast.transport.grpc import make_channel, make_server
from nearcast.transport.oip import MODEL_INFER, oip_methods
from nearcast.transport.remote import RemoteNode
from nearcast.transport.seam import Server
from nearcast.transport.service import InferenceService
from nearcast.wire.request import TensorRequest
from router.policy import Policy, PolicyConfig
from router.router import Router
from tests.patience import until

_spec = importlib.util.spec_from_file_location("router_node", Path(__file__).with_name("router_node.py"))
assert _spec is not None
assert _spec.loader is not None
router_node = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(router_node)
TinyHost = router_node.TinyHost
SMALL, LARGE = 4, 75_000
"""Numbers in a request: the message fits one frame, or takes about twenty."""


class Hop:
    """A router, its client, and nodes behind it."""

    def __init__(self, router: Router, server: Server, client: RemoteNode) -> None:
        self.router = router
        self.server = server
        self.client = client
        self.nodes: dict[str, RemoteNode] = {}
        self.servers: dict[str, Server] = {}
        self.closers: list[Callable[[], Any]] = []

    async def node(self, name: str, *, kind: Any = "ngh2", **options: Any) -> Any:
        host = TinyHost(name, **options)
        server = router_node.make_node_server(host, None)
        await server.start()
        node = RemoteNode(make_channel(kind, server.address), name)
        # So that the first request finds a connection.
        await node.is_ready()
        self.router.attach(name, node, "peer")
        self.report(host)
        self.nodes[name], self.servers[name] = node, server
        self.closers += [lambda: server.drain(0.2), node.close]
        return host

    def report(self, host: Any) -> None:
        self.router.policy.on_report(self.router.now(), host.name, host.report())
        self.router.policy.on_probe(self.router.now(), host.name, 0.0005)

    async def ask(self, count: int = SMALL, *, timeout_s: float | None = None, **options: Any) -> InferResponse:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        response = await self.client.infer(request(count, **options), RequestContext(deadline=deadline))
        np.testing.assert_array_equal(response.decode()["y"], np.arange(count, dtype=np.float32) * 2)
        return response

    def is_even(self) -> bool:
        policy = self.router.policy
        return policy.outstanding == 0 and all(target.own == 0 for target in policy.targets)


def request(count: int = SMALL, **options: Any) -> TensorRequest:
    return TensorRequest(model="digits", inputs={"x": np.arange(count, dtype=np.float32)}, **options)


@pytest.fixture
async def hop() -> AsyncIterator[Hop]:
    router = Router(Policy(PolicyConfig(), seed=1), node="r")
    await router.start()
    methods = oip_methods(InferenceService(router, router, server_name="r"), trusted=False)
    server = make_server("ngh2", methods, address="127.0.0.1:0")
    await server.start()
    client = RemoteNode(make_channel("ngh2", server.address))
    made = Hop(router, server, client)
    yield made
    await client.close()
    await server.drain(0.2)
    for close in reversed(made.closers):
        await close()
    await router.close()
    assert made.is_even()


async def test_bytes_pass_without_a_task_and_untouched(hop: Hop, monkeypatch: pytest.MonkeyPatch) -> None:
    host = await hop.node("a")
    monkeypatch.setattr(hop.router, "spawn", lambda work: pytest.fail(f"a task was made for {work}"))
    for count in (SMALL, LARGE, LARGE):
        answers = await asyncio.gather(*(hop.ask(count, id=f"q{i:02}") for i in range(6)))
        assert [a.id for a in answers] == [f"q{i:02}" for i in range(6)]
        assert {(a.served.node, a.served.version, a.served.queue_us) for a in answers} == {("a", "1", 1)}
    assert host.answered == 18
    assert hop.router.statistics.sends == {("a", None): 18}


async def test_what_is_refused_is_not_sent(hop: Hop) -> None:
    await hop.node("a")
    with pytest.raises(MeshError) as unknown:
        await hop.client.infer(TensorRequest(model="letters", inputs={}), RequestContext())
    assert unknown.value.code is Code.MODEL_NOT_FOUND
    with pytest.raises(MeshError) as late:
        await hop.ask(timeout_s=1e-4)
    assert late.value.code is Code.DEADLINE
    assert hop.router.statistics.sends == {}


async def test_an_error_of_the_node_keeps_its_code_and_hint(hop: Hop) -> None:
    host = await hop.node("a")
    host.fail = MeshError(Code.INVALID_REQUEST, "Seven is no number.", sent=True)
    with pytest.raises(MeshError) as caught:
        await hop.ask()
    assert (caught.value.code, caught.value.message) == (Code.INVALID_REQUEST, "Seven is no number.")
    host.fail = MeshError(Code.OVERLOADED, "Busy.", retry_after_ms=40)
    with pytest.raises(MeshError) as busy:
        await hop.ask()
    assert (busy.value.code, busy.value.retry_after_ms) == (Code.OVERLOADED, 40)
    assert hop.router.statistics.sends == {("a", Code.INVALID_REQUEST): 1, ("a", Code.OVERLOADED): 1}


@pytest.mark.parametrize("count", [SMALL, LARGE])
async def test_another_node_answers_what_one_does_not_hold(hop: Hop, count: int) -> None:
    lost, held = await hop.node("a"), await hop.node("b", delay_s=0.03)
    lost.fail = MeshError(Code.VERSION_MISMATCH, "Not here.")
    assert (await hop.ask(count)).served.node == "b"
    statistics = hop.router.statistics
    assert statistics.retries + statistics.hedges == 1  # on a slow machine the hedge is on its way already
    assert held.answered == 1


async def test_a_connection_that_breaks_in_flight_costs_nobody_an_answer(hop: Hop) -> None:
    dying = await hop.node("a", delay_s=0.02)
    dying.delay_s = 5.0
    asked = [asyncio.ensure_future(hop.ask(count)) for count in (SMALL, LARGE) * 3]
    await until(lambda: dying.in_flight == 6)
    await hop.node("b", delay_s=0.001)
    asked += [asyncio.ensure_future(hop.ask()) for _ in range(2)]
    hop.nodes["a"]._channel._connection.transport.abort()  # type: ignore[attr-defined]
    answers = await asyncio.gather(*asked)
    assert {a.served.node for a in answers[:6]} == {"b"}
    assert hop.router.statistics.retries >= 6


@pytest.mark.parametrize("count", [SMALL, LARGE])
async def test_who_gives_up_cancels_it_at_the_node(hop: Hop, count: int) -> None:
    host = await hop.node("a", delay_s=5.0)
    asked = asyncio.ensure_future(hop.ask(count))
    await until(lambda: host.in_flight == 1)
    asked.cancel()
    await until(lambda: host.cancelled == 1 and hop.is_even())
    assert hop.router.statistics.sends == {("a", Code.CANCELLED): 1}


async def test_a_deadline_ends_it_everywhere(hop: Hop) -> None:
    host = await hop.node("a", delay_s=0.001)
    host.delay_s = 5.0
    with pytest.raises(MeshError) as caught:
        await hop.ask(timeout_s=0.1)
    assert caught.value.code is Code.DEADLINE
    await until(lambda: host.cancelled == 1 and hop.is_even())
    # The deadline shrinks on its way.
    assert host.seen[0][1].deadline is not None


async def test_a_node_that_falls_silent_is_asked_for_a_sign_of_life(hop: Hop) -> None:
    host = await hop.node("a", delay_s=0.001)
    host.delay_s = 5.0
    connection = hop.nodes["a"]._channel._connection  # type: ignore[attr-defined]
    connection.transport.pause_reading()
    with pytest.raises(MeshError):
        await hop.ask(timeout_s=0.05)
    assert connection._is_probing
    connection.transport.resume_reading()


async def test_a_hedge_wins_and_its_loser_is_cancelled(hop: Hop) -> None:
    stalled, quick = await hop.node("a", delay_s=0.001), await hop.node("b", delay_s=0.02)
    for _ in range(12):
        await hop.ask()
    assert stalled.answered
    await until(lambda: stalled.in_flight == quick.in_flight == 0 and hop.is_even())
    statistics, hedges, cancelled = hop.router.statistics, hop.router.statistics.hedges, stalled.cancelled
    stalled.delay_s, statistics.hedges_won = 20.0, 0
    async with asyncio.timeout(20):
        while not statistics.hedges_won:
            answers = await asyncio.gather(*(hop.ask(count, timeout_s=10.0) for count in (SMALL, LARGE)))
            assert {a.served.node for a in answers} == {"b"}
    await until(lambda: stalled.in_flight == 0 and hop.is_even())
    # Who stalls never wins, whether it was asked first or as the hedge; a hedge may be called off before it arrives.
    assert 1 <= stalled.cancelled - cancelled <= statistics.hedges - hedges
    assert quick.in_flight == 0


async def test_a_first_send_that_fails_waits_for_its_hedge(hop: Hop) -> None:
    failing, other = await hop.node("a", delay_s=0.001), await hop.node("b", delay_s=0.05)
    for _ in range(12):
        await hop.ask()
    failing.delay_s = 20.0
    asked = asyncio.ensure_future(hop.ask(timeout_s=10.0))

    async def are_both_asked() -> bool:
        nonlocal asked
        if asked.done():  # on a slow machine the other may have been the better choice
            await asked
            asked = asyncio.ensure_future(hop.ask(timeout_s=10.0))
        return bool(failing.in_flight and other.in_flight)

    await until(are_both_asked)
    hop.nodes["a"]._channel._connection.transport.abort()  # type: ignore[attr-defined]
    assert (await asked).served.node == "b"
    assert hop.router.statistics.retries == 0


async def test_a_node_that_leaves_finishes_what_it_has(hop: Hop) -> None:
    leaving = await hop.node("a", delay_s=0.05)
    asked = asyncio.ensure_future(hop.ask())
    await until(lambda: leaving.in_flight == 1)
    await hop.node("b", delay_s=0.001)
    draining = asyncio.ensure_future(hop.servers["a"].drain(2.0))
    await asyncio.sleep(0.01)
    assert (await hop.ask()).served.node == "b"
    assert (await asked).served.node == "a"
    await draining


async def test_a_router_that_drains_finishes_what_passes(hop: Hop) -> None:
    host = await hop.node("a", delay_s=0.05)
    asked = asyncio.ensure_future(hop.ask(LARGE))
    await until(lambda: host.in_flight == 1)
    await hop.server.drain(2.0)
    assert (await asked).served.node == "a"


@pytest.mark.parametrize("count", [SMALL, LARGE])
async def test_a_node_without_a_direct_way_is_asked_by_a_coroutine(hop: Hop, count: int) -> None:
    host = await hop.node("a", kind="grpcio")
    assert (await hop.ask(count)).served.node == "a"
    host.fail = MeshError(Code.OVERLOADED, "Busy.", retry_after_ms=1)
    with pytest.raises(MeshError, match="Busy"):
        await hop.ask(count)


async def test_a_crowd_above_the_nodes_streams_waits_and_passes(hop: Hop) -> None:
    host = await hop.node("a", delay_s=0.02)
    hop.nodes["a"]._channel._connection.slots.total = 4  # type: ignore[attr-defined]
    await asyncio.gather(*(hop.ask() for _ in range(20)))
    assert (host.answered, host.most_in_flight) == (20, 4)


async def test_accounts_are_even_after_all_kinds_of_ends(hop: Hop) -> None:
    hosts = [await hop.node(name, delay_s=0.002) for name in "abc"]
    draw = random.Random(7)
    ends: list[str] = []

    async def ask() -> None:
        try:
            timeout_s = draw.choice([None, 0.01, 1.0])
            await hop.ask(draw.choice([SMALL, LARGE // 4]), timeout_s=timeout_s)
            ends.append("OK")
        except MeshError as error:
            ends.append(error.code)

    asked = []
    for i in range(150):
        host = draw.choice(hosts)
        host.delay_s = draw.choice([0.0, 0.002, 0.03])
        host.fail = draw.choice([None, None, None, MeshError(Code.INTERNAL, "Broken."), MeshError(Code.OVERLOADED, "")])
        asked.append(asyncio.ensure_future(ask()))
        if i % 10 == 3:
            draw.choice(asked).cancel()
        if i % 40 == 17:
            connection = hop.nodes[host.name]._channel._connection  # type: ignore[attr-defined]
            if connection is not None:
                connection.transport.abort()
        await asyncio.sleep(0.001)
    await asyncio.gather(*asked, return_exceptions=True)
    await until(hop.is_even)
    assert len(ends) + sum(task.cancelled() for task in asked) == 150
    assert ends.count("OK") > 75, ends


class Bare:
    """A client of libnghttp2 alone: frames of any size, and windows that open when the test wants it."""

    def __init__(self, window_bytes: int) -> None:
        self.h2 = Connection(Role.CLIENT, Configuration(auto_window_update=False))
        self.h2.initiate_connection({2: 0, 4: window_bytes})
        self.unread: list[tuple[int, int]] = []
        self.body = bytearray()
        self.trailers: dict[bytes, bytes] = {}

    async def connect(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.reader, self.writer = await asyncio.open_connection(host, int(port))

    def post(self, message: bytes, frame_size_bytes: int) -> None:
        head = {":method": "POST", ":scheme": "http", ":path": MODEL_INFER, ":authority": "r", "te": "trailers"}
        head["content-type"] = "application/grpc"
        stream_id = self.h2.send_request([(k.encode(), v.encode()) for k, v in head.items()])
        framed = b"\0" + len(message).to_bytes(4, "big") + message
        for start in range(0, len(framed), frame_size_bytes):
            self.h2.send_data(stream_id, framed[start : start + frame_size_bytes])
            self.flush()
        self.h2.end_stream(stream_id)

    def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())

    async def read(self, timeout_s: float = 5.0) -> bool:
        """Take what comes; False if nothing does."""
        self.flush()
        try:
            data = await asyncio.wait_for(self.reader.read(65536), timeout_s)
        except TimeoutError:
            return False
        self.h2.receive_data(data)
        for event in self.h2.events():
            if isinstance(event, DataReceived):
                self.body += event.data
                self.unread.append((len(event.data), event.stream_id))
            elif isinstance(event, TrailersReceived):
                self.trailers = dict(event.headers)
        self.flush()
        return bool(data)

    def open_window(self) -> None:
        for size_bytes, stream_id in self.unread:
            self.h2.acknowledge_received_data(size_bytes, stream_id)
        self.unread.clear()


@pytest.mark.parametrize("frame_size_bytes", [1000, 16384])
async def test_a_client_that_does_not_read_stalls_itself_alone(hop: Hop, frame_size_bytes: int) -> None:
    await hop.node("a")
    slow = Bare(window_bytes=40_000)
    await slow.connect(hop.server.address)
    slow.post(request(LARGE // 4, id="slow").encode(), frame_size_bytes)
    with contextlib.suppress(TimeoutError):
        while await slow.read(0.1):
            pass
    assert 0 < len(slow.body) <= 40_000
    assert not slow.trailers
    await asyncio.gather(*(hop.ask(count) for count in (SMALL, LARGE)))
    while not slow.trailers:
        slow.open_window()
        assert await slow.read()
    assert slow.trailers[b"grpc-status"] == b"0"
    assert slow.trailers[b"nc-served-by"] == b"a"
    assert bytes(slow.body).endswith((np.arange(LARGE // 4, dtype=np.float32) * 2).tobytes())
    slow.writer.close()
