"""The Open Inference Protocol over HTTP/1.1 and JSON, with the binary tensor data extension, on aiohttp."""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from nearcast.errors import CATALOGUE, Code, MeshError
from nearcast.identity import peer_uri
from nearcast.runtime.http_listener import HttpListener
from nearcast.telemetry import get_logger
from nearcast.transport.context import read_context
from nearcast.transport.json_tensors import decode_raw_request, decode_request, encode_response
from nearcast.transport.listener import require_free, within_descriptors
from nearcast.transport.outputs import form_outputs
from nearcast.transport.peer import peer_name
from nearcast.transport.rest_guard import RestGuard
from nearcast.transport.rest_models import ROUTES, Route, answer
from nearcast.transport.seam import DEFAULT_LIMITS, Call, Limits
from nearcast.transport.service import InferenceService
from nearcast.wire import status

if TYPE_CHECKING:
    from aiohttp import web

    _Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

T = TypeVar("T")
JSON_SIZE = "Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestLimits:
    """Bounds that HTTP needs beside `Limits`; `Limits.concurrent_streams_max` bounds the requests in flight."""

    body_timeout_s: float = 30.0
    retry_after_ms: int = 100
    deadline_ms_max: float = 24 * 3600 * 1000.0


REST_LIMITS = RestLimits()
BODY_SIZE_BYTES_MAX = 64 * 1024
"""Of a question; only inference takes more."""
_INLINE_SIZE_BYTES_MAX = 128 * 1024
_COMPRESSIONS = frozenset({"gzip", "deflate"})
"""Answers are compressed for a client that names one of these alone. Libraries name several without being asked."""


class RestServer:
    """A listener for clients. Nothing that they say about the mesh (`nc-hop`, `nc-version`, `nc-tenant`) counts."""

    def __init__(
        self,
        service: InferenceService,
        *,
        address: str,
        limits: Limits = DEFAULT_LIMITS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._service = service
        self._clock = service.clock
        self._limits = limits
        self._in_flight = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._guard = RestGuard(within_descriptors(limits), body_timeout_s=REST_LIMITS.body_timeout_s)
        self._listener = HttpListener(address, self._make_runner, tls=tls)

    @property
    def address(self) -> str:
        """Where it listens; the real port after `start`."""
        return self._listener.address

    async def start(self) -> None:
        """Bind and listen.

        Raises:
            MeshError: UNAVAILABLE if the address is in use; INVALID_REQUEST if it is reachable without TLS.
        """
        require_free(self.address)
        await self._listener.start()

    async def _make_runner(self) -> web.AppRunner:
        from aiohttp import web

        middlewares = [_answer_errors, self._guard.middleware]
        app = web.Application(client_max_size=self._limits.message_size_bytes_max, middlewares=middlewares)
        self._add_routes(app)
        # A client that hangs up cancels its request: nobody waits for the answer any more.
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0, **self._guard.options
        )
        await runner.setup()
        assert runner.server is not None
        self._guard.watch(runner.server)
        return runner

    async def drain(self, timeout_s: float) -> None:
        """Refuse new connections, finish requests in flight for up to `timeout_s`, close."""
        self._draining = True
        self._guard.close()
        await self._listener.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        await self._listener.close()

    def _add_routes(self, app: web.Application) -> None:
        app.router.add_get("/v2/health/ready", self._ready)
        # In this order, or a model named "stats" would hide the statistics of all.
        for route in ROUTES:
            add = app.router.add_get if route.method == "GET" else app.router.add_post
            add(route.path, self._answering(route))
        for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            app.router.add_get(model + "/ready", self._model_ready)
            app.router.add_post(model + "/infer", self._infer)

    def _answering(self, route: Route) -> _Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            body = await self._guard.read_body(request, min(BODY_SIZE_BYTES_MAX, self._limits.message_size_bytes_max))
            return _json(await answer(self._service, route, request.match_info, body, _call(request)))

        return handle

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        if self._draining:
            text = "This node is shutting down; ask another."
            raise MeshError(Code.UNAVAILABLE, text, retry_after_ms=REST_LIMITS.retry_after_ms)
        deadline = self._deadline(request.headers.get(status.DEADLINE_MS, ""))
        # Before it takes one of the places: those who send slowly could hold them all.
        body = await self._guard.read_body(request, self._limits.message_size_bytes_max)
        if self._in_flight >= self._limits.concurrent_streams_max:
            raise MeshError(
                Code.OVERLOADED,
                "Too many requests are in flight on this listener; try again later.",
                retry_after_ms=REST_LIMITS.retry_after_ms,
            )
        self._in_flight += 1
        self._idle.clear()
        try:
            return await self._run(request, body, deadline)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _run(self, request: web.Request, body: bytes, deadline: float | None) -> web.StreamResponse:
        from aiohttp import web

        call = _call(request)
        model, version = _names(request)
        json_size = _json_size(request, len(body))
        if json_size == 0:
            infer, wanted = decode_raw_request(await self._service.metadata(model, version), version, body)
        else:
            read = partial(self._service.regions.read, call)
            infer, wanted = await _apart(json_size, partial(decode_request, model, version, body, json_size, read))
        context = read_context(
            request.headers,
            infer.parameters,
            deadline=deadline,
            identity=call.identity,
            trusted=False,
            clock=self._clock,
        )
        response = await self._service.infer(infer, context)
        outputs = await form_outputs(self._service, response, wanted.forms, call)
        json_bytes = sum(array.nbytes for name, array in response.decode().items() if not wanted.is_binary(name))
        head, pieces = await _apart(json_bytes, partial(encode_response, response, outputs, wanted))
        headers = dict(status.served_to_trailers(response.served))
        if pieces:
            headers[JSON_SIZE] = str(len(head))
        kind = "application/octet-stream" if pieces else "application/json"
        reply = web.Response(body=b"".join((head, *pieces)), headers=headers, content_type=kind)
        coding = request.headers.get("Accept-Encoding", "")
        if coding in _COMPRESSIONS:
            reply.enable_compression(web.ContentCoding(coding))
        return reply

    def _deadline(self, text: str) -> float | None:
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= REST_LIMITS.deadline_ms_max:
            raise MeshError(
                Code.INVALID_REQUEST, f"The header {status.DEADLINE_MS} must be a number of milliseconds above 0."
            )
        return self._clock.monotonic() + value / 1e3

    async def _ready(self, _: web.Request) -> web.StreamResponse:
        ready = await self._service.directory.is_ready()
        # The protocol's text calls this field `live` too.
        return _json({"live": ready}, status_code=200 if ready else 503)

    async def _model_ready(self, request: web.Request) -> web.StreamResponse:
        model, version = _names(request)
        ready = await self._service.directory.is_ready(model, version)
        return _json({"name": model, "ready": ready}, status_code=200 if ready else 503)


async def _apart(size_bytes: int, work: Callable[[], T]) -> T:
    """Run what deals with much JSON in a thread: a second of it on the loop would be a second for everybody."""
    if size_bytes <= _INLINE_SIZE_BYTES_MAX:
        return work()
    return await asyncio.get_running_loop().run_in_executor(None, work)


async def _answer_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    from aiohttp import web

    try:
        return await handler(request)
    except MeshError as error:
        return _error(error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        text = f"{request.method} {request.path[:200]}: {error.reason}."
        response = _json({"error": text}, status_code=error.status)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except Exception:  # noqa: BLE001 - one request may fail, never the process
        get_logger(__name__).exception("rest_request_failed", path=request.path[:200])
        return _error(MeshError(Code.INTERNAL, "The server failed to answer this request; its log says why."))


_answer_errors.__middleware_version__ = 1  # type: ignore[attr-defined]  # what @web.middleware sets, without importing aiohttp here


def _json_size(request: web.Request, size_bytes: int) -> int:
    text = request.headers.get(JSON_SIZE)
    if text is None:
        return size_bytes
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise MeshError(Code.INVALID_REQUEST, f"The header {JSON_SIZE} must be a number of bytes.")
    return int(text)


def _names(request: web.Request) -> tuple[str, str]:
    return request.match_info.get("model", ""), request.match_info.get("version", "")


def _call(request: web.Request) -> Call:
    transport = request.transport
    if transport is None:
        return Call(method=request.path)
    return Call(
        method=request.path, identity=peer_uri(transport.get_extra_info("ssl_object")), peer=peer_name(transport)
    )


def _json(value: Any, *, status_code: int = 200) -> web.Response:
    from aiohttp import web

    return web.Response(body=msgspec.json.encode(value), status=status_code, content_type="application/json")


def _error(error: MeshError) -> web.Response:
    response = _json({"error": error.message}, status_code=CATALOGUE[error.code].http)
    response.headers[status.CODE] = str(error.code)
    if error.retry_after_ms is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_ms / 1000)))
        response.headers[status.RETRY_AFTER_MS] = str(max(0, error.retry_after_ms))
    return response
