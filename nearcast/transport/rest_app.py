"""What a REST listener serves: paths, the inferences of the long way, errors. Imported when its first client comes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import msgspec
from aiohttp import web

from nearcast.errors import MeshError
from nearcast.identity import peer_uri
from nearcast.transport.listener import within_descriptors
from nearcast.transport.peer import peer_name
from nearcast.transport.rest_connection import RestConnection, answer_failure
from nearcast.transport.rest_guard import RestGuard, Watched
from nearcast.transport.rest_heads import COMPRESSIONS, Heads
from nearcast.transport.rest_inference import REST_LIMITS, Answer, RestInference, answer_error, read_ask
from nearcast.transport.rest_models import ROUTES, Route, answer
from nearcast.transport.seam import Call, Limits
from nearcast.transport.service import InferenceService

_Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
BODY_SIZE_BYTES_MAX = 64 * 1024
"""Of a question; only inference takes more."""


class RestApp:
    """Answers clients. Nothing that they say about the mesh (`nc-hop`, `nc-version`, `nc-tenant`) counts.

    Args:
        service: what is asked.
        limits: bounds of the listener.
    """

    def __init__(self, service: InferenceService, limits: Limits) -> None:
        self._service = service
        self._limits = limits
        self._inference = RestInference(service, limits)
        self._heads = Heads(limits.message_size_bytes_max)
        self._guard = RestGuard(within_descriptors(limits), body_timeout_s=REST_LIMITS.body_timeout_s)

    async def make_runner(self) -> web.AppRunner:
        """What serves connections."""
        middlewares = [_answer_errors, self._guard.middleware]
        app = web.Application(client_max_size=self._limits.message_size_bytes_max, middlewares=middlewares)
        self._add_routes(app)
        # A client that hangs up cancels its request: nobody waits for the answer any more.
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0, **self._guard.options
        )
        await runner.setup()
        assert runner.server is not None
        self._guard.watch(runner.server, self._begin)
        return runner

    def _begin(self, beyond: web.RequestHandler, transport: asyncio.Transport, watched: Watched) -> None:
        transport.set_protocol(
            RestConnection(beyond, transport, watched, guard=self._guard, heads=self._heads, inference=self._inference)
        )

    def drain(self) -> None:
        """Refuse new inferences."""
        self._inference.is_draining = True
        self._guard.close()

    async def finish(self, timeout_s: float) -> None:
        """Wait for those in flight."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._inference.idle.wait()

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
        ask = read_ask(*_names(request), request.headers)
        deadline = self._inference.open(ask)
        body = await self._guard.read_body(request, self._limits.message_size_bytes_max)
        reply = _reply(await self._inference.answer(ask, body, deadline, _call(request)))
        coding = request.headers.get("Accept-Encoding", "")
        if coding in COMPRESSIONS:
            reply.enable_compression(web.ContentCoding(coding))
        return reply

    async def _ready(self, _: web.Request) -> web.StreamResponse:
        ready = await self._service.directory.is_ready()
        # The protocol's text calls this field `live` too.
        return _json({"live": ready}, status_code=200 if ready else 503)

    async def _model_ready(self, request: web.Request) -> web.StreamResponse:
        model, version = _names(request)
        ready = await self._service.directory.is_ready(model, version)
        return _json({"name": model, "ready": ready}, status_code=200 if ready else 503)


@web.middleware
async def _answer_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except MeshError as error:
        return _reply(answer_error(error))
    except web.HTTPException as error:
        if error.status < 400:
            raise
        text = f"{request.method} {request.path[:200]}: {error.reason}."
        response = _json({"error": text}, status_code=error.status)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except Exception:  # noqa: BLE001 - one request may fail, never the process
        return _reply(answer_failure(request.path))


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
    return web.Response(body=msgspec.json.encode(value), status=status_code, content_type="application/json")


def _reply(answer: Answer) -> web.Response:
    headers = {name.decode(): value.decode() for name, value in answer.fields}
    body = b"".join(answer.pieces)
    return web.Response(body=body, status=answer.code, headers=headers, content_type=answer.kind.decode())
