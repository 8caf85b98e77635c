"""Two real hops: P8 the loser of a hedge is cancelled within a round trip of the win; P9 deadlines only shrink."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import numpy as np
import pytest

from benchmarks.live_node import DelayProxy
from nearcast.handler import InferRequest, InferResponse, ModelMetadata, RequestContext, Served, TensorSpec
from nearcast.load import NodeReport, VersionReport
from nearcast.transport.grpc import make_channel, make_server
from nearcast.transport.oip import MODEL_INFER, oip_methods
from nearcast.transport.remote import RemoteNode
from nearcast.transport.seam import Channel
from nearcast.transport.service import InferenceService
from nearcast.wire.request import TensorRequest
from nearcast.wire.response import TensorResponse
from router.policy import Policy, PolicyConfig
from router.router import Router
from tests.patience import own_time, until

ONE_WAY_S = 0.08
TIMEOUTS_S = (0.3, 1.0, 30.0, 4000.0)


class Model:
    """Takes its time; remembers how long each request still had, and when it was given up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.delay_s = 0.0
        self.remaining_s: list[float | None] = []
        self.cancelled_at: float | None = None

    async def infer(self, request: InferRequest, context: RequestContext) -> InferResponse:
        self.remaining_s.append(context.remaining_s(time.monotonic()))
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled_at = own_time()
            raise
        served = Served(node=self.name, version="1", compute_us=100)
        return TensorResponse(model="m", version="1", outputs={"y": request.decode()["x"]}, served=served)

    def stream(self, requests: object, context: RequestContext) -> AsyncIterator[InferResponse]:
        raise NotImplementedError

    async def metadata(self, model: str, version: str) -> ModelMetadata:
        spec = TensorSpec("x", "FP32", (-1,))
        return ModelMetadata(name="m", versions=("1",), platform="test", inputs=(spec,), outputs=(spec,))

    async def is_ready(self, model: str = "", version: str = "") -> bool:
        return True


class Bench:
    """A router with a listener in front, and nodes behind."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.router = Router(Policy(PolicyConfig(), seed=1))
        self._stack = stack

    async def add(self, model: Model, *, one_way_s: float = 0.0, service_ms: float = 1.0) -> None:
        """A node at some distance, which says how long it takes."""
        server = make_server(
            "ngh2",
            oip_methods(InferenceService(model, model, server_name=model.name), trusted=False),
            address="127.0.0.1:0",
        )
        await server.start()
        self._stack.push_async_callback(server.drain, 0.1)
        address = server.address
        if one_way_s:
            proxy = DelayProxy(address, one_way_s)
            self._stack.push_async_callback(proxy.close)
            address = await proxy.listen(0)
        node = RemoteNode(make_channel("ngh2", address), model.name)
        self._stack.push_async_callback(node.close)
        self.router.attach(model.name, node, "peer")
        version = VersionReport(
            model="m", version="1", service_p50_us=service_ms * 1e3, service_p95_us=service_ms * 1.1e3
        )
        now = self.router.now()
        self.router.policy.on_probe(now, model.name, 2 * one_way_s + 2e-4)
        self.router.policy.on_report(now, model.name, NodeReport(node=model.name, role="edge", versions=(version,)))

    async def listen(self) -> Channel:
        """Open the front; a client's channel to it."""
        methods = oip_methods(InferenceService(self.router, self.router, server_name="r"), trusted=False)
        server = make_server("ngh2", methods, address="127.0.0.1:0")
        await server.start()
        self._stack.push_async_callback(server.drain, 0.1)
        channel = make_channel("ngh2", server.address)
        self._stack.push_async_callback(channel.close)
        return channel


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        made = Bench(stack)
        yield made
        await made.router.close()


def make_request() -> TensorRequest:
    return TensorRequest(model="m", inputs={"x": np.ones(3, np.float32)})


async def test_a_deadline_only_shrinks_from_hop_to_hop(bench: Bench) -> None:
    model = Model("a")
    await bench.add(model)
    channel = await bench.listen()
    for timeout_s in TIMEOUTS_S:
        began = time.monotonic()
        await channel.unary(MODEL_INFER, (make_request().encode(),), deadline=began + timeout_s)
        left_s, took_s = model.remaining_s.pop(), time.monotonic() - began
        assert left_s is not None
        assert timeout_s - took_s - 5e-3 <= left_s <= timeout_s
    await channel.unary(MODEL_INFER, (make_request().encode(),))
    assert model.remaining_s == [None]


@pytest.mark.parametrize("passed", [True, False], ids=["passed as bytes", "decoded"])
async def test_the_loser_is_cancelled_within_a_round_trip_of_the_win(bench: Bench, *, passed: bool) -> None:
    slow, fast = Model("slow"), Model("fast")
    slow.delay_s = 20.0
    await bench.add(slow, one_way_s=ONE_WAY_S)
    await bench.add(fast, one_way_s=ONE_WAY_S, service_ms=60.0)
    channel = await bench.listen()
    if passed:
        await channel.unary(MODEL_INFER, (make_request().encode(),), deadline=time.monotonic() + 10.0)
    else:
        await bench.router.infer(make_request(), RequestContext(deadline=time.monotonic() + 10.0))
    won_at = own_time()
    assert (len(slow.remaining_s), len(fast.remaining_s)) == (1, 1)
    assert bench.router.policy.outstanding == 0
    await until(lambda: slow.cancelled_at is not None, "the loser is cancelled")
    assert slow.cancelled_at is not None
    assert slow.cancelled_at - won_at <= 2 * ONE_WAY_S
