"""What aiohttp leaves unbounded: connections, those that dawdle or do not read, the bodies of all requests together."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import msgspec
from aiohttp import web

from nearcast.errors import Code, MeshError
from nearcast.transport.seam import Limits
from nearcast.transport.watch import Seen, Verdict, Watch

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
Begin: TypeAlias = Callable[[web.RequestHandler, asyncio.Transport, "Watched"], None]

_SWEEP_INTERVAL_S_MAX = 1.0
_CROWDED_SHARE = 0.9
_INFLATED_AT_ONCE = 2
# After an early refusal: the rest of a body is read and dropped, or the client would not see the answer.
LINGER_S = 2.0
_ZLIB_OR_GZIP, _RAW_DEFLATE = 47, -15


class Watched(msgspec.Struct, kw_only=True):
    """What the guard knows of one connection."""

    watch: Watch
    requests: int = 0
    open_requests: int = 0
    body_bytes: int = 0
    room_bytes: int = 0
    unsent_bytes: int = 0


class RestGuard:
    """Looks after the connections of one listener.

    Args:
        limits: the same bounds as of a gRPC listener.
        body_timeout_s: from a request's headers to the end of its body.
    """

    def __init__(self, limits: Limits, *, body_timeout_s: float) -> None:
        self._limits = limits
        self._body_timeout_s = body_timeout_s
        self._connections: dict[web.RequestHandler, Watched] = {}
        self._body_bytes = 0
        self._room_bytes = 0
        self._inflating = asyncio.Semaphore(_INFLATED_AT_ONCE)
        self._sweeper: asyncio.TimerHandle | None = None
        shortest_s = min(limits.handshake_timeout_s, limits.stall_timeout_s, limits.idle_timeout_s)
        self._interval_s = min(_SWEEP_INTERVAL_S_MAX, shortest_s / 4)

    @property
    def options(self) -> dict[str, Any]:
        """What aiohttp itself can be told."""
        # A traceback for each malformed request would fill the disk; handlers' own failures are logged elsewhere.
        logger = logging.getLogger(f"{__name__}.http")
        logger.setLevel(logging.CRITICAL)
        return {"auto_decompress": False, "lingering_time": LINGER_S, "logger": logger}

    def watch(self, server: web.Server, begin: Begin) -> None:
        """Begin: hear of each connection that comes and goes, and tell `begin` of those that come."""
        made, lost = server.connection_made, server.connection_lost

        def connection_made(handler: web.RequestHandler, transport: asyncio.Transport) -> None:
            made(handler, transport)
            if len(self._connections) >= self._limits.connections_max:
                transport.abort()
                return
            now = asyncio.get_running_loop().time()
            watched = self._connections[handler] = Watched(watch=Watch(self._limits, opened_at=now))
            begin(handler, transport, watched)

        def connection_lost(handler: web.RequestHandler, error: BaseException | None = None) -> None:
            self._connections.pop(handler, None)
            lost(handler, error)

        # The library has hooks for requests, none for connections.
        server.connection_made = connection_made  # type: ignore[method-assign]
        server.connection_lost = connection_lost  # type: ignore[method-assign,assignment]
        self._sweep()

    def close(self) -> None:
        """End."""
        if self._sweeper is not None:
            self._sweeper.cancel()

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note which connections have a request open."""
        connection = self._connections.get(request.protocol)
        if connection is None:
            return await handler(request)
        self.enter(connection)
        try:
            return await handler(request)
        finally:
            self.leave(connection)

    def enter(self, connection: Watched) -> None:
        """A request begins."""
        connection.requests += 1
        connection.open_requests += 1

    def leave(self, connection: Watched) -> None:
        """It has ended."""
        connection.open_requests -= 1
        self.release(connection)

    def release(self, connection: Watched) -> None:
        """The body that the connection held is gone."""
        self._body_bytes -= connection.body_bytes
        self._room_bytes -= connection.room_bytes
        connection.body_bytes = connection.room_bytes = 0

    def reserve(self, connection: Watched, size_bytes: int) -> bool:
        """Whether there is room for a body that was announced. Its pages are untouched, but addresses are finite."""
        if self._room_bytes + size_bytes > self._limits.receive_buffer_bytes_max:
            return False
        self._room_bytes += size_bytes
        connection.room_bytes = size_bytes
        return True

    async def read_body(self, request: web.Request, size_bytes_max: int) -> bytes:
        """The whole body, decompressed. It counts until the request ends.

        Raises:
            MeshError: TOO_LARGE, INVALID_REQUEST if it is malformed or late, OVERLOADED if bodies fill the memory.
        """
        text = f"The body is larger than {size_bytes_max} bytes; send fewer or smaller tensors."
        too_large = MeshError(Code.TOO_LARGE, text)
        if (request.content_length or 0) > size_bytes_max:
            raise too_large
        chunks: list[bytes] = []
        size_bytes = 0
        try:
            async with asyncio.timeout(self._body_timeout_s):
                async for chunk in request.content.iter_any():
                    chunks.append(chunk)
                    size_bytes += len(chunk)
                    if size_bytes > size_bytes_max:
                        raise too_large
                    self._hold(request, len(chunk))
        except TimeoutError as error:
            raise late_body(self._body_timeout_s) from error
        except web.RequestPayloadError as error:
            raise _malformed() from error
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        encoding = request.headers.get("Content-Encoding", "identity").lower()
        if encoding == "identity":
            return body
        if encoding not in ("gzip", "deflate"):
            text = f"Content-Encoding {encoding[:32]!r} is not understood; send gzip, deflate or the plain body."
            raise MeshError(Code.UNSUPPORTED, text)
        # In a thread, few at a time: some kilobytes may become as many mebibytes.
        async with self._inflating:
            body = await asyncio.get_running_loop().run_in_executor(None, _inflate, body, size_bytes_max + 1)
        if len(body) > size_bytes_max:
            raise too_large
        self._hold(request, len(body))
        return body

    def _hold(self, request: web.Request, size_bytes: int) -> None:
        connection = self._connections.get(request.protocol)
        if connection is None:
            raise MeshError(Code.CANCELLED, "The client has gone.")
        self.hold(connection, size_bytes)

    def hold(self, connection: Watched, size_bytes: int) -> None:
        """So much more of a body has come. As on a gRPC connection it may be as large as what is still free.

        Raises:
            MeshError: OVERLOADED if it is larger.
        """
        connection.body_bytes += size_bytes
        self._body_bytes += size_bytes
        if connection.body_bytes > self._limits.receive_buffer_bytes_max - self._body_bytes:
            raise MeshError(
                Code.OVERLOADED, "The server is receiving too much at once; retry in a moment.", retry_after_ms=100
            )

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        is_crowded = len(self._connections) > _CROWDED_SHARE * self._limits.connections_max
        for handler, connection in list(self._connections.items()):
            transport = handler.transport
            if transport is None:
                continue
            connection.unsent_bytes = transport.get_write_buffer_size()
            seen = Seen(
                is_greeted=connection.requests > 0,
                calls=connection.open_requests,
                last_stream_id=connection.requests,
                owed_bytes=connection.unsent_bytes,
                left_bytes=-connection.unsent_bytes,
                read_at=now,
            )
            match connection.watch.look(now, seen, is_crowded=is_crowded):
                case Verdict.ABORT:
                    transport.abort()
                case Verdict.GOODBYE:
                    transport.close()
        self._make_room()
        self._sweeper = loop.call_later(self._interval_s, self._sweep)

    def _make_room(self) -> None:
        unsent_bytes = sum(connection.unsent_bytes for connection in self._connections.values())
        while unsent_bytes > self._limits.unsent_bytes_max:
            worst = max(self._connections, key=self._rank)
            unsent_bytes -= self._connections[worst].unsent_bytes
            self._connections[worst].unsent_bytes = 0
            if worst.transport is not None:
                worst.transport.abort()

    def _rank(self, handler: web.RequestHandler) -> tuple[bool, int]:
        connection = self._connections[handler]
        return connection.watch.is_stalled, connection.unsent_bytes


def late_body(timeout_s: float) -> MeshError:
    """The error for a body that did not come in time."""
    return MeshError(Code.INVALID_REQUEST, f"The body did not arrive within {timeout_s} s.")


def _malformed() -> MeshError:
    return MeshError(Code.INVALID_REQUEST, "The body does not fit its Content-Encoding or length.")


def _inflate(data: bytes, size_bytes_max: int) -> bytes:
    # What HTTP calls deflate has a header by the standard and none by custom.
    has_header = data[:1] == b"\x1f" or (bool(data) and data[0] & 0x0F == 8)
    inflater = zlib.decompressobj(_ZLIB_OR_GZIP if has_header else _RAW_DEFLATE)
    try:
        body = inflater.decompress(data, size_bytes_max)
    except zlib.error as error:
        raise _malformed() from error
    if not inflater.eof and len(body) < size_bytes_max:
        raise _malformed()
    return body
