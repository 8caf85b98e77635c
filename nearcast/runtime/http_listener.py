"""A listener for HTTP whose server is made when its first client comes.

aiohttp is a tenth of a second of imports and 16 MB, most of it what it prepares for clients. A node that is asked over
gRPC and MQTT alone takes neither.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from nearcast.runtime.address import UNIX_PREFIX, format_address, listen_error, parse_address, require_tls

if TYPE_CHECKING:
    from aiohttp import web

BACKLOG = 128
"""Connections that may wait to be accepted: until the server is made, too."""
RETRY_S = 1.0
"""After a server could not be made."""
_SERVER = "aiohttp"
_log = logging.getLogger(__name__)


class HttpListener:
    """Binds and listens at once; connections wait in the backlog until the server is there.

    Args:
        address: `host:port`, or `unix:/path`, for this user alone. It holds the real port after `start`.
        make: sets up a runner; aiohttp is imported by then.
        tls: of the server.
    """

    def __init__(
        self, address: str, make: Callable[[], Awaitable[web.AppRunner]], *, tls: ssl.SSLContext | None = None
    ) -> None:
        self.address = address
        self._make = make
        self._tls = tls
        self._sockets: list[socket.socket] = []
        self._making: asyncio.Task[None] | None = None
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Bind and listen.

        Raises:
            MeshError: if the address is taken, no address of this machine, or reachable by others without certificates.
            ModuleNotFoundError: if the server is not installed.
        """
        require_tls(self.address, self._tls is not None)
        if importlib.util.find_spec(_SERVER) is None:
            raise ModuleNotFoundError(f"No module named {_SERVER!r}", name=_SERVER)
        host, port = parse_address(self.address)
        try:
            await self._bind(host, port)
        except OSError as error:
            self._close_sockets()
            raise listen_error(error, self.address) from error
        if not host.startswith(UNIX_PREFIX):
            self.address = format_address(*self._sockets[0].getsockname()[:2])
        for each in self._sockets:
            each.settimeout(0)
            asyncio.get_running_loop().add_reader(each, self._greet_first)

    async def stop(self) -> None:
        """Take no more connections; those that the server has live on until `close`."""
        if self._making is not None:
            self._making.cancel()
            await asyncio.gather(self._making, return_exceptions=True)
        for site in [] if self._runner is None else list(self._runner.sites):
            await site.stop()
        self._close_sockets()

    async def close(self) -> None:
        """Stop, and end all connections."""
        await self.stop()
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _bind(self, host: str, port: int) -> None:
        if host.startswith(UNIX_PREFIX):
            path = Path(host.removeprefix(UNIX_PREFIX))
            unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._sockets.append(unix)
            unix.bind(str(path))
            path.chmod(0o600)
            unix.listen(BACKLOG)
            return
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, _, _, _, place in dict.fromkeys(found):
            self._sockets.append(socket.create_server(place, family=family, backlog=BACKLOG))

    def _greet_first(self) -> None:
        self._stop_watching()
        self._making = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        waiting = deque(self._sockets)
        while waiting:
            try:
                if self._runner is None:
                    # In a thread: other requests are answered meanwhile.
                    await asyncio.get_running_loop().run_in_executor(None, import_module, f"{_SERVER}.web")
                    self._runner = await self._make()
                await self._accept(self._runner, waiting[0])
                waiting.popleft()
            except Exception:  # noqa: BLE001 (descriptors or memory may be short just now; the other listeners serve on)
                _log.exception("no HTTP server for %s yet", self.address)
                waiting.rotate()  # one that fails for ever keeps no other from its turn
                await asyncio.sleep(RETRY_S)

    async def _accept(self, runner: web.AppRunner, listening: socket.socket) -> None:
        from aiohttp import web

        site = web.SockSite(runner, listening, ssl_context=self._tls, backlog=BACKLOG)
        try:
            await site.start()
        except Exception:
            await site.stop()  # or the runner would keep each that failed
            raise

    def _stop_watching(self) -> None:
        loop = asyncio.get_running_loop()
        for each in self._sockets:
            loop.remove_reader(each)

    def _close_sockets(self) -> None:
        if self._runner is None:
            self._stop_watching()
        for each in self._sockets:
            each.close()
        self._sockets.clear()
