"""Traces by OpenTelemetry: a span of each node for the requests that are traced, sent to a collector by OTLP over HTTP.

Without a collector in the configuration nothing of this is on a request's way; a `traceparent` travels on all the same.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import msgspec

from nearcast.config import ConfigError
from nearcast.errors import MeshError
from nearcast.handler import InferenceHandler, InferRequest, InferResponse, RequestContext, Served
from nearcast.runtime import run_in_daemon
from nearcast.transport.seam import Responder, Taken
from nearcast.transport.service import PassingHandler
from nearcast.transport.statistics import Statistics

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

SPANS_WAITING_MAX = 2048
"""Spans that wait to be sent, each small by `TEXT_CHARS_MAX`; further ones are lost, and a request never waits."""
SPANS_SENT_MAX = 512
"""Spans of one message to the collector."""
SEND_INTERVAL_MS = 1000.0
SEND_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0
"""For the last spans: the end of a process has little more for everything after its requests."""
TEXT_CHARS_MAX = 128
"""Of a span's name, of each of its attributes, and of why it failed: clients and other nodes choose them."""
DRAWN_MAX = 1024
"""Draws kept for requests that have yet to come to `infer`; beyond them it is drawn anew."""


class TracesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which requests are traced, and where that is told.

    Attributes:
        otlp: URL of a collector that takes OTLP over HTTP, such as `http://127.0.0.1:4318`; "" = nobody is told. What
            it wants to hear beside, such as a key, stands in the environment as `OTEL_EXPORTER_OTLP_HEADERS`.
        share: of the requests that come without a `traceparent`, how many begin a trace here. Those that come with one
            are traced if it says so.
    """

    otlp: str = ""
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0


def make_traces(config: TracesConfig, *, node: str, role: str) -> Traces | None:
    """What traces the requests of a process; None if nobody is to be told.

    Raises:
        ConfigError: if OpenTelemetry is not installed.
    """
    if not config.otlp:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError("`traces.otlp` needs OpenTelemetry; install nearcast[otel] or leave it empty.") from error
    processor = BatchSpanProcessor(
        OTLPSpanExporter(f"{config.otlp.rstrip('/')}/v1/traces", timeout=SEND_TIMEOUT_S),
        max_queue_size=SPANS_WAITING_MAX,
        schedule_delay_millis=SEND_INTERVAL_MS,
        max_export_batch_size=SPANS_SENT_MAX,
    )
    return Traces(processor, node=node, role=role, share=config.share)


class Traces:
    """Makes the spans of one process.

    Args:
        processor: of the SDK; hears of every span that has ended.
        node: this node's name.
        role: what it is.
        share: of the requests without a `traceparent`, how many begin a trace.
        draw: a number in [0, 1) for each of those.
    """

    def __init__(
        self, processor: SpanProcessor, *, node: str, role: str, share: float, draw: Callable[[], float] = random.random
    ) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        # Who is traced is decided here, before anything is made for the request.
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource.create({"service.name": f"nearcast-{role}", "service.instance.id": node}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("nearcast")
        self._node = node
        self._share = share
        self._draw = draw

    def wants(self, context: RequestContext) -> bool:
        """Whether the request is traced; drawn anew at each call where its client does not say."""
        if context.trace:
            # W3C: the last two digits are flags, the lowest of which says `sampled`.
            return context.trace[-1] in "13579bdf"
        return self._share > 0.0 and self._draw() < self._share

    def begin(self, request: InferRequest, context: RequestContext) -> tuple[Span, RequestContext]:
        """The span of a request here, and the context that makes the spans of other nodes its children."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        model = _cut(request.model)
        parent = TraceContextTextMapPropagator().extract({"traceparent": context.trace})
        span = self._tracer.start_span(
            _cut(f"infer {model}"),
            context=parent,
            kind=SpanKind.SERVER,
            attributes={"nearcast.model": model, "nearcast.forwarded": context.forwarded},
        )
        made = span.get_span_context()
        trace = f"00-{made.trace_id:032x}-{made.span_id:016x}-01"
        return span, msgspec.structs.replace(context, trace=trace)

    def answered(self, span: Span, served: Served) -> None:
        """Write down who answered; where that was this node, also when it waited and when it computed."""
        span.set_attribute("nearcast.served_by", _cut(served.node))
        span.set_attribute("nearcast.version", _cut(served.version))
        if served.node != self._node:
            return
        from opentelemetry.trace import set_span_in_context

        parent = set_span_in_context(span)
        end_ns = time.time_ns()
        compute_ns, queue_ns = served.compute_us * 1000, served.queue_us * 1000
        for name, start_ns, took_ns in (
            ("queue", end_ns - compute_ns - queue_ns, queue_ns),
            ("compute", end_ns - compute_ns, compute_ns),
        ):
            self._tracer.start_span(name, context=parent, start_time=start_ns).end(start_ns + took_ns)

    def failed(self, span: Span, code: str, message: str) -> None:
        """Write down why there was no answer."""
        from opentelemetry.trace import Status, StatusCode

        span.set_attribute("error.type", _cut(code))
        span.set_status(Status(StatusCode.ERROR, _cut(message)))

    async def close(self) -> None:
        """Send what waits, within `CLOSE_TIMEOUT_S`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await run_in_daemon(self._provider.shutdown, name="traces")


def _cut(text: str) -> str:
    # Not by the SDK's limits: it logs each text that it cuts, and knows none for names and for why something failed.
    return text[:TEXT_CHARS_MAX]


class TracedHandler:
    """A handler whose traced requests leave spans. The others pass as if it were not there.

    Args:
        handler: answers.
        traces: makes the spans.
    """

    def __init__(self, handler: InferenceHandler, traces: Traces) -> None:
        self._handler = handler
        self._passing = handler if isinstance(handler, PassingHandler) and handler.passes else None
        self._traces = traces
        # Of requests that were not passed on and have yet to come to `infer`: whether a trace begins with them.
        self._drawn: deque[bool] = deque(maxlen=DRAWN_MAX)

    @property
    def passes(self) -> bool:
        """Whether it ever takes a call over."""
        return self._passing is not None

    def pass_on(
        self, request: InferRequest, context: RequestContext, responder: Responder, counts: Statistics | None
    ) -> Taken | None:
        """As the handler's own, of calls that are not traced.

        Raises:
            MeshError: as `infer`.
        """
        if self._passing is None:
            return None
        wanted = self._traces.wants(context)
        taken = None if wanted else self._passing.pass_on(request, context, responder, counts)
        if taken is None and not context.trace:
            self._drawn.append(wanted)
        return taken

    async def infer(self, request: InferRequest, context: RequestContext) -> InferResponse:
        """Answer one request.

        Raises:
            MeshError: what the handler raises.
        """
        if not (self._drawn.popleft() if self._drawn and not context.trace else self._traces.wants(context)):
            return await self._handler.infer(request, context)
        span, context = self._traces.begin(request, context)
        try:
            response = await self._handler.infer(request, context)
        except MeshError as error:
            self._traces.failed(span, error.code.value, error.message)
            raise
        except asyncio.CancelledError:
            self._traces.failed(span, "CANCELLED", "Nobody waited for the answer any more.")
            raise
        else:
            self._traces.answered(span, response.served)
            return response
        finally:
            span.end()

    async def stream(
        self, requests: AsyncIterator[InferRequest], context: RequestContext
    ) -> AsyncIterator[InferResponse]:
        """Answer a stream of requests, in order; each leaves spans of its own."""
        async for request in requests:
            yield await self.infer(request, context)
