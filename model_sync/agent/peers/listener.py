"""Giving chunks to the other nodes of the mesh: a small HTTPS listener that knows nothing but holdings.

`GET /v1/payloads/<sha256>` says which chunks are here, `GET /v1/payloads/<sha256>/<chunk>` gives one, followed by the
same bits, so that who fetches stays up to date for nothing. Whoever asks must show a node's certificate of this mesh.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

from model_sync.agent.peers.holdings import Holdings
from model_sync.replica.allowance import TokenBucket
from nearcast.errors import Code, MeshError
from nearcast.identity import Identity, require_role, server_tls
from nearcast.runtime.address import format_address, parse_address
from nearcast.telemetry import get_logger

if TYPE_CHECKING:
    from aiohttp import web

NODE_ROLES = ("edge", "cloud", "router")
UPLOADS_MAX = 8
"""Chunks given at a time; further requests hear that we are busy. At 20 Mbit/s and 50 ms, eight fill the link."""
CONNECTIONS_MAX = 128
UPLOAD_TIMEOUT_S = 30.0
IDLE_S = 30.0
PIECE_BYTES = 64 * 1024
_SHA256 = re.compile(r"[0-9a-f]{64}")
_log = get_logger("model_sync.peers")


def bitmap(held: int, chunks: int) -> bytes:
    """Chunk numbers as bits, little-endian: one byte for each eight chunks, begun ones included."""
    return held.to_bytes(-(-chunks // 8), "little")


class PeerServer:
    """The listener of one agent; `sent_bytes` counts the chunks that it gave.

    Args:
        address: `host:port`; port 0 lets the system choose.
        upload_bytes_per_s_max: over all connections; 0 = unlimited.
    """

    def __init__(self, holdings: Holdings, identity: Identity, *, address: str, upload_bytes_per_s_max: float) -> None:
        self.address = ""
        self.sent_bytes = 0
        self._holdings = holdings
        self._identity = identity
        self._wanted = address
        self._bucket = TokenBucket(upload_bytes_per_s_max, max(PIECE_BYTES, upload_bytes_per_s_max / 4))
        self._uploads = 0
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            MeshError: INVALID_REQUEST if the address cannot be used.
        """
        from aiohttp import web

        app = web.Application()
        app.router.add_get("/v1/payloads/{sha256}", self._say)
        app.router.add_get("/v1/payloads/{sha256}/{chunk}", self._give)
        self._runner = web.AppRunner(app, access_log=None, keepalive_timeout=IDLE_S, handle_signals=False)
        await self._runner.setup()
        inner = self._runner.server
        assert inner is not None

        def accept() -> asyncio.Protocol:
            return inner() if len(inner.connections) < CONNECTIONS_MAX else _Refusal()

        host, port = parse_address(self._wanted)
        tls = server_tls(self._identity, require_client=True, alpn=("http/1.1",))
        try:
            self._server = await asyncio.get_running_loop().create_server(
                accept, host, port, ssl=tls, ssl_handshake_timeout=10.0
            )
        except OSError as error:
            raise MeshError(
                Code.INVALID_REQUEST, f"Peers cannot be served on {self._wanted}: {error.strerror or error}."
            ) from error
        self.address = format_address(*self._server.sockets[0].getsockname()[:2])

    async def close(self) -> None:
        """Stop at once."""
        if self._server is not None:
            self._server.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _say(self, request: web.Request) -> web.Response:
        from aiohttp import web

        held = self._holdings.held(self._asked(request))
        if held is None:
            raise web.HTTPNotFound
        return web.json_response({"held": f"{held:x}"})

    async def _give(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        sha256, text = self._asked(request), request.match_info["chunk"]
        chunk = int(text) if text.isascii() and text.isdecimal() and len(text) < 8 else -1
        if self._uploads >= UPLOADS_MAX:
            return web.Response(status=503, headers={"Retry-After": "1"})
        data = self._holdings.read(sha256, chunk) if chunk >= 0 else None
        held = self._holdings.held(sha256)
        if data is None or held is None:
            raise web.HTTPNotFound
        body = data + bitmap(held, max(chunk + 1, held.bit_length()))
        self._uploads += 1
        try:
            async with asyncio.timeout(UPLOAD_TIMEOUT_S):
                return await self._send(request, body)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            raise
        finally:
            self._uploads -= 1

    async def _send(self, request: web.Request, body: bytes) -> web.StreamResponse:
        from aiohttp import web

        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        for start in range(0, len(body), PIECE_BYTES):
            piece = body[start : start + PIECE_BYTES]
            wait_s = self._bucket.take(asyncio.get_running_loop().time(), len(piece))
            if wait_s > 0.0:
                await asyncio.sleep(wait_s)
            await response.write(piece)
            self.sent_bytes += len(piece)
        await response.write_eof()
        return response

    def _asked(self, request: web.Request) -> str:
        """The digest asked for, by a node of this mesh."""
        from aiohttp import web

        transport: Any = request.transport
        tls = None if transport is None else transport.get_extra_info("ssl_object")
        try:
            require_role(None if tls is None else tls.getpeercert(), NODE_ROLES)
        except MeshError as error:
            raise web.HTTPForbidden(text=error.message) from error
        sha256 = request.match_info["sha256"]
        if not _SHA256.fullmatch(sha256):
            raise web.HTTPNotFound
        return sha256


class _Refusal(asyncio.Protocol):
    """One connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
