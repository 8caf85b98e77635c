"""Who is served, when, and who is told no: a real host behind real listeners, its engine held up by hand."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from nearcast.errors import Code, MeshError
from nearcast.handler import RequestContext, Served
from nearcast.serving import HostLimits, ModelHost
from nearcast.serving.version import HotVersion
from nearcast.store import Store
from nearcast.transport.grpc import make_channel, make_server
from nearcast.transport.oip import MODEL_INFER, MODEL_STREAM_INFER, oip_methods
from nearcast.transport.rest import RestServer
from nearcast.transport.service import InferenceService
from nearcast.transport.statistics import FramesLetGo
from nearcast.transport.stream_answers import decode_answer
from nearcast.wire.request import TensorRequest
from tests.patience import own_time, until
from tests.tiny_models import activate, affine_model, install

CONTEXT = RequestContext()
THREADED: dict[str, Any] = {"inline_us_max": 0.0, "slots": 1, "batch_rows_max": 1}


class Node:
    """A host with one model. While `gate` is clear its engine is stuck; `ran` holds the first value of each run."""

    def __init__(self, host: ModelHost) -> None:
        self.host = host
        self.gate = threading.Event()
        self.ran: list[float] = []
        engine, run = self.version.engine, self.version.engine.run

        def run_when_open(inputs: Any) -> Any:
            self.ran.append(float(inputs["x"].reshape(-1)[0]))
            assert self.gate.wait(20)
            return run(inputs)

        engine.run = run_when_open  # type: ignore[method-assign]

    @property
    def version(self) -> HotVersion:
        return next(iter(self.host._residency.slots["affine"].hot.values()))

    @property
    def waiting(self) -> int:
        return self.version._dispatch.batcher.waiting

    @property
    def codes(self) -> dict[str, int]:
        return self.host.status("affine")[0].codes

    async def hold_up(self) -> asyncio.Task[Any]:
        """Let the first request get stuck in the engine."""
        task = asyncio.create_task(self.host.infer(request(-1.0), CONTEXT))
        await until(lambda: self.ran == [-1.0])
        return task


@contextlib.asynccontextmanager
async def node(folder: Path, *, fields: dict[str, Any] | None = None, **limits: Any) -> AsyncIterator[Node]:
    store = Store(folder / "store")
    install(store, affine_model(), **(fields or {}))
    activate(store, stable=1)
    host = ModelHost(store, node="edge-1", limits=HostLimits(**(THREADED | limits)))
    await host.start()
    made = Node(host)
    try:
        yield made
    finally:
        made.gate.set()
        await host.close()


@contextlib.asynccontextmanager
async def listening(host: ModelHost, frames: FramesLetGo | None = None) -> AsyncIterator[tuple[str, str]]:
    """Addresses of a gRPC and a REST listener."""
    service = InferenceService(host, host, server_name="t", frames=frames)
    grpc_server = make_server("ngh2", oip_methods(service, trusted=False), address="127.0.0.1:0")
    rest_server = RestServer(service, address="127.0.0.1:0")
    await grpc_server.start()
    await rest_server.start()
    try:
        yield grpc_server.address, rest_server.address
    finally:
        await grpc_server.drain(1.0)
        await rest_server.drain(1.0)


def request(value: float, rows: int = 1, **fields: Any) -> TensorRequest:
    return TensorRequest(model="affine", inputs={"x": np.full((rows, 4), value, np.float32)}, **fields)


def refused(code: Code, match: str | None = None) -> Any:
    return pytest.RaisesExc(MeshError, match=match, check=lambda error: error.code is code)


async def test_the_deadline_answers_though_the_engine_is_stuck(tmp_path: Path) -> None:
    async with node(tmp_path) as one, listening(one.host) as (address, _):
        channel = make_channel("ngh2", address)
        late = []
        for _ in range(5):  # the first one runs, the others wait for it
            began = own_time()
            with refused(Code.DEADLINE):
                await channel.unary(MODEL_INFER, (request(1.0, parameters={"timeout": 60_000}).encode(),))
            late.append(own_time() - began - 0.06)
        assert min(late) < 0.005
        assert one.ran == [1.0]
        assert one.waiting == 0
        assert one.codes == {"DEADLINE": 5}
        await channel.close()


async def leave_grpc(address: str) -> Callable[[], Any]:
    channel = make_channel("ngh2", address)
    task = asyncio.create_task(channel.unary(MODEL_INFER, (request(2.0).encode(),)))

    async def leave() -> None:
        task.cancel()
        await asyncio.wait([task])
        await channel.close()

    return leave


async def leave_rest(address: str) -> Callable[[], Any]:
    session = aiohttp.ClientSession(f"http://{address}")
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [2, 2, 2, 2]}]}
    task = asyncio.create_task(session.post("/v2/models/affine/infer", json=body))

    async def leave() -> None:
        task.cancel()
        await asyncio.wait([task])
        await session.close()

    return leave


@pytest.mark.parametrize("kind", ["grpc", "rest"])
async def test_a_client_that_hangs_up_frees_its_place_within_10_ms_and_never_runs(tmp_path: Path, kind: str) -> None:
    async with node(tmp_path, queue_rows_max=1) as one, listening(one.host) as addresses:
        stuck = await one.hold_up()
        took = []
        for count in range(1, 6):
            leave = await (leave_grpc(addresses[0]) if kind == "grpc" else leave_rest(addresses[1]))
            await until(lambda: one.waiting == 1)
            leaving = asyncio.create_task(leave())
            took.append(await until(lambda: one.waiting == 0))
            await leaving
            assert one.codes == {"CANCELLED": count}
        assert min(took) < 0.010, took
        one.gate.set()
        await stuck
        assert one.ran == [-1.0]
        assert one.host.report().in_flight == 0


async def test_priorities_of_the_wire_order_the_queue_and_take_the_places_of_lesser_ones(tmp_path: Path) -> None:
    async with node(tmp_path, queue_rows_max=4) as one, listening(one.host) as (address, _):
        channel = make_channel("ngh2", address)
        stuck = await one.hold_up()

        def ask(value: float, priority: int) -> asyncio.Task[Any]:
            body = request(value, parameters={"priority": priority}).encode()
            return asyncio.create_task(channel.unary(MODEL_INFER, (body,)))

        low, normal, first, unnamed = tasks = [ask(3.0, 3), ask(2.0, 2), ask(1.0, 1), ask(2.5, 0)]
        await until(lambda: one.waiting == 4)
        another = ask(1.5, 1)
        with refused(Code.OVERLOADED, "more important") as caught:
            await low
        assert (caught.value.retry_after_ms or 0) >= 1
        with refused(Code.OVERLOADED, "is full"):
            await ask(3.5, 3)
        one.gate.set()
        await asyncio.gather(stuck, normal, first, unnamed, another)
        assert one.ran == [-1.0, 1.0, 1.5, 2.0, 2.5]
        assert len(tasks) == 4
        assert one.version.statistics.refusals == {"displaced": 1, "full": 1}
        await channel.close()


async def test_an_hour_of_timeouts_leaves_nothing_behind(tmp_path: Path) -> None:
    """A queue timeout must not make throughput decay, nor a counter drift (what happened to others)."""
    async with node(tmp_path, queue_rows_max=64, late_quantile=0.0) as one:
        stuck = await one.hold_up()
        for _ in range(20):
            deadlines = [time.monotonic() + each for each in np.linspace(0.001, 0.01, 50)]
            calls = [one.host.infer(request(9.0), RequestContext(deadline=deadline)) for deadline in deadlines]
            calls += [one.host.infer(request(9.0), RequestContext(deadline=time.monotonic() + 3600)) for _ in range(5)]
            tasks = [asyncio.create_task(call) for call in calls]
            await asyncio.sleep(0)
            for task in tasks[-5:]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(result) for result in results} == {MeshError, asyncio.CancelledError}
        one.gate.set()
        await stuck
        batcher = one.version._dispatch.batcher
        assert (batcher.waiting, batcher.rows_waiting, batcher.bytes_waiting, batcher.running) == (0, 0, 0, 0)
        assert len(batcher._deadlines) < 200
        assert one.host.report().in_flight == 0
        assert one.ran == [-1.0]
        answers = await asyncio.gather(*(one.host.infer(request(float(i)), CONTEXT) for i in range(60)))
        assert [answer.decode()["y"][0, 0] for answer in answers] == [2.0 * i for i in range(60)]


async def test_what_cannot_be_handed_to_a_thread_is_answered_and_holds_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise MemoryError

    async with node(tmp_path) as one:
        one.gate.set()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            calls = [one.host.infer(request(float(value)), CONTEXT) for value in range(3)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [getattr(each, "code", each) for each in outcomes] == [Code.INTERNAL] * 3
        await one.host.infer(request(7.0), CONTEXT)
        assert one.ran == [7.0]


async def test_what_cannot_be_in_time_is_refused_before_it_waits(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        engine, run = one.version.engine, one.version.engine.run
        engine.run = lambda inputs: (time.sleep(0.04), run(inputs))[1]  # type: ignore[method-assign]
        one.gate.set()
        for value in range(8):
            await one.host.infer(request(float(value)), CONTEXT)
        began = time.monotonic()
        with refused(Code.DEADLINE, "lately needs about"):
            await one.host.infer(request(9.0), RequestContext(deadline=began + 0.02))
        ahead = [asyncio.create_task(one.host.infer(request(9.0), CONTEXT)) for _ in range(10)]
        await asyncio.sleep(0)
        with refused(Code.OVERLOADED, "too long to answer before the deadline") as caught:
            await one.host.infer(request(9.0), RequestContext(deadline=time.monotonic() + 0.2))
        assert 200 <= (caught.value.retry_after_ms or 0) <= 2000
        await asyncio.gather(*ahead)
        assert one.version.statistics.refusals == {"hopeless": 1, "late": 1}


async def test_a_stream_that_asks_for_the_latest_frame_gets_each_frame_answered_once(tmp_path: Path) -> None:
    frames = FramesLetGo()
    async with (
        node(tmp_path) as one,
        listening(one.host, frames) as (address, _),
        grpc.aio.insecure_channel(address) as channel,
    ):
        stream = channel.stream_stream(MODEL_STREAM_INFER)(metadata=(("nc-latest", "1"),))
        for value in range(4):
            await stream.write(request(float(value), id=f"frame-{value}").encode())
        for _ in range(2):
            with refused(Code.SUPERSEDED, "newer frame"):
                decode_answer(await stream.read(), Served())
        await until(lambda: one.ran == [0.0])
        await stream.write(request(5.0, id="late", parameters={"timeout": 20_000}).encode())
        with refused(Code.SUPERSEDED):
            decode_answer(await stream.read(), Served())
        with refused(Code.DEADLINE):
            decode_answer(await stream.read(), Served())
        await stream.write(request(6.0, id="frame-6").encode())
        await stream.done_writing()
        one.gate.set()
        answers = [decode_answer(await stream.read(), Served()) for _ in range(2)]
        assert [(answer.id, answer.decode()["y"][0, 0]) for answer in answers] == [("frame-0", 0.0), ("frame-6", 12.0)]
        assert await stream.read() is grpc.aio.EOF
        assert one.ran == [0.0, 6.0]
    registry = CollectorRegistry(auto_describe=True)
    registry.register(frames)
    counted = {code: registry.get_sample_value("nearcast_frames_let_go_total", {"code": code}) for code in frames.codes}
    assert counted == {Code.SUPERSEDED: 3, Code.DEADLINE: 1}


# The response cache.

CACHED = {"response_cache": True}


async def test_equal_requests_are_answered_from_memory_and_counted(tmp_path: Path) -> None:
    async with node(tmp_path, fields=CACHED) as one:
        one.gate.set()
        first = (await one.host.infer(request(1.0), CONTEXT)).decode()["y"]
        again = await one.host.infer(request(1.0, outputs=["y"], id="b"), RequestContext(priority=1))
        np.testing.assert_array_equal(again.decode()["y"], first)
        assert (again.id, again.served.compute_us) == ("b", 0)
        assert one.ran == [1.0]
        await one.host.infer(request(1.0, rows=2), CONTEXT)
        await one.host.infer(request(1.5), CONTEXT)
        await one.host.infer(request(1.0), RequestContext(tenant="other"))
        assert one.ran == [1.0, 1.0, 1.5, 1.0], "other rows, values and tenants are other requests"
        statistics = one.version.statistics
        assert (statistics.cache_hits, statistics.cache_misses) == (1, 4)
        with pytest.raises(ValueError, match="read-only"):
            first[0, 0] = 7.0


async def test_equal_requests_at_the_same_time_run_once_unless_that_fails(tmp_path: Path) -> None:
    async with node(tmp_path, fields=CACHED) as one:
        leader, *rest = [asyncio.create_task(one.host.infer(request(1.0), CONTEXT)) for _ in range(4)]
        await until(lambda: one.ran == [1.0])
        with refused(Code.DEADLINE):
            await one.host.infer(request(1.0), RequestContext(deadline=time.monotonic() + 0.01))
        leader.cancel()
        await until(lambda: one.waiting == 1)
        assert one.ran == [1.0]
        one.gate.set()
        await asyncio.gather(*rest)
        assert one.ran == [1.0, 1.0], "one follower took the place of the leader that went away"
        assert one.version.statistics.cache_hits == 2


async def test_the_cache_forgets_the_least_recent_and_knows_versions_apart(tmp_path: Path) -> None:
    async with node(tmp_path, fields=CACHED, cache_bytes_max=5000) as one:
        one.gate.set()
        for value in (1.0, 2.0, 3.0, 1.0, 4.0, 5.0):
            await one.host.infer(request(value), CONTEXT)
        assert one.ran == [1.0, 2.0, 3.0, 4.0, 5.0]
        assert one.host._cache.size_bytes <= 5000
        await one.host.infer(request(1.0), CONTEXT)
        await one.host.infer(request(2.0), CONTEXT)
        assert one.ran[5:] == [2.0], "2 was the least recent"
        store = Store(tmp_path / "store")
        install(store, affine_model(3.0), release=2, **CACHED)
        activate(store, stable=2, last_good=1)
        await one.host.refresh("affine")
        assert (await one.host.infer(request(1.0), CONTEXT)).decode()["y"][0, 0] == 3.0
        assert (await one.host.infer(request(1.0, version="1"), CONTEXT)).decode()["y"][0, 0] == 2.0


async def test_only_who_asks_is_cached(tmp_path: Path) -> None:
    async with node(tmp_path, fields=CACHED | {"stateful": "explicit"}) as one:
        one.gate.set()
        for _ in range(2):
            await one.host.infer(request(1.0), CONTEXT)
        assert len(one.ran) == 2
        assert len(one.host._cache) == 0
