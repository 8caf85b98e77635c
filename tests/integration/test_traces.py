"""Traces: one request from a client through a router to a model is one tree at the collector; others leave nothing."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

import router.traces
from nearcast.client import AsyncClient
from nearcast.client.trace import current_trace
from nearcast.config import ConfigError
from nearcast.errors import Code, MeshError
from nearcast.handler import InferenceHandler, ModelDirectory, RequestContext, Served
from nearcast.serving import ModelHost
from nearcast.store import Store
from nearcast.transport.grpc import make_channel, make_server
from nearcast.transport.oip import oip_methods
from nearcast.transport.remote import RemoteNode
from nearcast.transport.service import InferenceService
from nearcast.wire.request import TensorRequest
from router.policy import Policy, PolicyConfig
from router.router import Router
from router.shadow import ShadowConfig
from router.traces import TEXT_CHARS_MAX, TracedHandler, Traces, TracesConfig, make_traces
from tests.tiny_models import activate, affine_model, install

needs_otel = pytest.mark.skipif(
    importlib.util.find_spec("opentelemetry") is None, reason="OpenTelemetry is not installed: nearcast[otel]"
)
SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """What an OTLP collector is told."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()

    async def take(self, request: web.Request) -> web.Response:
        import gzip

        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for told in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {each.key: each.value.string_value for each in told.resource.attributes}
            self.services.add(f"{names['service.name']} {names['service.instance.id']}")
            self.spans += [span for scope in told.scope_spans for span in scope.spans]
        return web.Response(content_type="application/x-protobuf")


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def collect(stack: AsyncExitStack) -> tuple[Collector, str]:
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(app)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return collector, f"http://127.0.0.1:{runner.addresses[0][1]}"


async def listen(stack: AsyncExitStack, handler: InferenceHandler, directory: ModelDirectory) -> str:
    methods = oip_methods(InferenceService(handler, directory, server_name="t"), trusted=False)
    server = make_server("ngh2", methods, address="127.0.0.1:0")
    await server.start()
    stack.push_async_callback(server.drain, 0.2)
    return server.address


async def start_host(stack: AsyncExitStack, folder: Path) -> ModelHost:
    store = Store(folder)
    install(store, affine_model())
    activate(store, stable=1)
    host = ModelHost(store, node="near")
    await host.start()
    stack.push_async_callback(host.close)
    return host


async def start_router(stack: AsyncExitStack, host: ModelHost, address: str) -> Router:
    """A stand-alone one, which passes requests as bytes."""
    router = Router(Policy(PolicyConfig(), seed=1), node="front")
    stack.push_async_callback(router.close)
    node = RemoteNode(make_channel("ngh2", address), "near")
    stack.push_async_callback(node.close)
    router.attach("near", node, "peer")
    router.policy.on_report(router.now(), "near", host.report())
    router.policy.on_probe(router.now(), "near", 0.0005)
    return router


def ask(model: str = "affine") -> TensorRequest:
    return TensorRequest(model=model, inputs={"x": np.ones((1, 4), np.float32)})


@needs_otel
async def test_a_request_is_one_tree_from_the_client_to_the_model(tmp_path: Path, stack: AsyncExitStack) -> None:
    from opentelemetry.sdk.trace import TracerProvider

    collector, url = await collect(stack)
    near = make_traces(TracesConfig(otlp=url), node="near", role="edge")
    front = make_traces(TracesConfig(otlp=url), node="front", role="router")
    assert near is not None
    assert front is not None
    host = await start_host(stack, tmp_path)
    router = await start_router(stack, host, await listen(stack, TracedHandler(host, near), host))
    client = AsyncClient([await listen(stack, TracedHandler(router, front), router)])
    stack.push_async_callback(client.close)
    await client.infer("affine", {"x": np.ones((1, 4), np.float32)})
    assert current_trace() == ""
    with TracerProvider(shutdown_on_exit=False).get_tracer("device").start_as_current_span("look") as own:
        await client.infer("affine", {"x": np.ones((1, 4), np.float32)})
        with pytest.raises(MeshError):
            await client.infer("affine", {"nothing": np.ones(3, np.float32)})
    await near.close()
    await front.close()

    assert collector.services == {"nearcast-edge near", "nearcast-router front"}
    trace_id, client_id = own.get_span_context().trace_id, own.get_span_context().span_id.to_bytes(8, "big")
    assert {int.from_bytes(span.trace_id, "big") for span in collector.spans} == {trace_id}
    below: dict[bytes, list[Any]] = {}
    for span in collector.spans:
        below.setdefault(span.parent_span_id, []).append(span)
    answered, failed = sorted(below[client_id], key=lambda span: span.start_time_unix_nano)
    (on_node,) = below[answered.span_id]
    stages = below[on_node.span_id]
    assert (answered.name, on_node.name) == ("infer affine", "infer affine")
    assert {span.name for span in stages} == {"queue", "compute"}
    assert all(on_node.start_time_unix_nano <= span.end_time_unix_nano for span in stages)
    assert failed.status.code == 2
    assert below[failed.span_id][0].status.code == 2


def trace_half(stack: AsyncExitStack, draws: Iterator[float]) -> tuple[Traces, Any]:
    """Traces of half of the requests, each by the next of `draws`, and the exporter that keeps their spans."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    seen = InMemorySpanExporter()
    traces = Traces(SimpleSpanProcessor(seen), node="front", role="router", share=0.5, draw=lambda: next(draws))
    stack.push_async_callback(traces.close)
    return traces, seen


@needs_otel
@pytest.mark.parametrize("draws", [[0.2, 0.6, 0.1, 0.7], [0.9, 0.9, 0.9, 0.9], [0.0, 0.0, 0.0, 0.0]])
async def test_a_share_of_the_requests_begins_a_trace(
    tmp_path: Path, stack: AsyncExitStack, draws: list[float]
) -> None:
    traces, seen = trace_half(stack, iter(draws))
    host = await start_host(stack, tmp_path)
    router = await start_router(stack, host, await listen(stack, host, host))
    node = RemoteNode(make_channel("ngh2", await listen(stack, TracedHandler(router, traces), router)))
    stack.push_async_callback(node.close)
    for _ in draws:
        await node.infer(ask(), RequestContext())
    assert len(seen.get_finished_spans()) == sum(draw < 0.5 for draw in draws)
    # Who says whether it is traced is not drawn for.
    await node.infer(ask(), RequestContext(trace=SAMPLED[:-1] + "0"))
    await node.infer(ask(), RequestContext(trace=SAMPLED))
    last = seen.get_finished_spans()[-1]
    assert f"{last.context.trace_id:032x}" in SAMPLED
    assert last.attributes is not None
    assert last.attributes["nearcast.served_by"] == "near"


@needs_otel
async def test_a_request_that_the_router_does_not_pass_on_is_drawn_for_once(
    tmp_path: Path, stack: AsyncExitStack
) -> None:
    draws = [0.6, 0.1, 0.7, 0.8]
    left = iter(draws)
    traces, seen = trace_half(stack, left)
    host = await start_host(stack, tmp_path)
    router = await start_router(stack, host, await listen(stack, host, host))
    router.shadow([ShadowConfig(model="affine", to_version="2", share=0.0)])
    node = RemoteNode(make_channel("ngh2", await listen(stack, TracedHandler(router, traces), router)))
    stack.push_async_callback(node.close)
    traced = []
    for _ in draws:
        await node.infer(ask(), RequestContext())
        traced.append(len(seen.get_finished_spans()))
    assert traced == [0, 1, 1, 1]
    assert next(left, None) is None


@needs_otel
async def test_what_others_choose_is_cut_in_a_span(tmp_path: Path, stack: AsyncExitStack) -> None:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    seen = InMemorySpanExporter()
    traces = Traces(SimpleSpanProcessor(seen), node="near", role="edge", share=0.0)
    stack.push_async_callback(traces.close)
    host = await start_host(stack, tmp_path)
    with pytest.raises(MeshError):
        await TracedHandler(host, traces).infer(ask("m" * 4096), RequestContext(trace=SAMPLED))
    span, _ = traces.begin(ask(), RequestContext(trace=SAMPLED))
    traces.answered(span, Served(node="n" * 4096, version="v" * 4096))
    traces.failed(span, "c" * 4096, "why" * 4096)
    span.end()
    for each in seen.get_finished_spans():
        assert each.attributes is not None
        texts = [each.name, each.status.description, *each.attributes.values()]
        assert max(len(text) for text in texts if isinstance(text, str)) == TEXT_CHARS_MAX


@needs_otel
async def test_a_collector_that_never_answers_holds_up_no_end(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, ends = asyncio.Event(), asyncio.Event()

    async def hold(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await ends.wait()
        writer.close()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    stack.push_async_callback(server.wait_closed)
    stack.callback(server.close)
    stack.callback(ends.set)
    host, port = server.sockets[0].getsockname()
    made = make_traces(TracesConfig(otlp=f"http://{host}:{port}"), node="near", role="edge")
    assert made is not None
    span, _ = made.begin(ask(), RequestContext(trace=SAMPLED))
    span.end()
    # The margin of a cloud core after its requests is 2 s, for everything.
    assert router.traces.CLOSE_TIMEOUT_S <= 1.0
    monkeypatch.setattr(router.traces, "CLOSE_TIMEOUT_S", 0.01)
    async with asyncio.timeout(router.traces.SEND_TIMEOUT_S / 2):
        await made.close()
    assert not ends.is_set()
    await asked.wait()


def test_nobody_is_told_without_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_traces(TracesConfig(share=1.0), node="n", role="edge") is None
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError) as caught:
        make_traces(TracesConfig(otlp="http://127.0.0.1:4318"), node="n", role="edge")
    assert caught.value.code is Code.INVALID_REQUEST
    assert "nearcast[otel]" in caught.value.message
