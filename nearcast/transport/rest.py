"""The Open Inference Protocol over HTTP/1.1 and JSON, with the binary tensor data extension, on aiohttp."""

from __future__ import annotations

import asyncio
import ssl
from importlib import import_module
from typing import TYPE_CHECKING

from nearcast.runtime.http_listener import HttpListener
from nearcast.transport.listener import require_free
from nearcast.transport.seam import DEFAULT_LIMITS, Limits
from nearcast.transport.service import InferenceService

if TYPE_CHECKING:
    from aiohttp import web

    from nearcast.transport.rest_app import RestApp

_APP = "nearcast.transport.rest_app"


class RestServer:
    """A listener for clients. What answers them is imported when the first one comes."""

    def __init__(
        self,
        service: InferenceService,
        *,
        address: str,
        limits: Limits = DEFAULT_LIMITS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._service = service
        self._limits = limits
        self._app: RestApp | None = None
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

    async def drain(self, timeout_s: float) -> None:
        """Refuse new connections, finish requests in flight for up to `timeout_s`, close."""
        if self._app is not None:
            self._app.drain()
        await self._listener.stop()
        if self._app is not None:
            await self._app.finish(timeout_s)
        await self._listener.close()

    async def _make_runner(self) -> web.AppRunner:
        # In a thread: other requests are answered meanwhile.
        module = await asyncio.get_running_loop().run_in_executor(None, import_module, _APP)
        app: RestApp = module.RestApp(self._service, self._limits)
        runner = await app.make_runner()
        self._app = app
        return runner
