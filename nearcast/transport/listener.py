"""A listening socket, TCP or Unix, for servers made of asyncio protocols."""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import cast

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.transport.ngh2_connection import join_address, split_address
from nearcast.transport.seam import UNIX_PREFIX, Limits
from nearcast.transport.tls_stream import TlsStream, Upper

_BACKLOG = 1024
_PROBE_TIMEOUT_S = 0.5


class Listener:
    """Binds, listens and says where. `address` holds the real port after `start`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._server: asyncio.Server | None = None
        self._path: Path | None = None
        # In the order in which they came; each holds memory, and nothing is known of the peer yet.
        self._shaking_hands: dict[TlsStream, None] = {}

    async def start(
        self,
        factory: Callable[[], asyncio.BaseProtocol],
        *,
        tls: ssl.SSLContext | None,
        handshake_timeout_s: float,
        handshakes_max: int,
    ) -> None:
        """Bind and listen.

        Raises:
            MeshError: UNAVAILABLE naming the address if it is taken; INVALID_REQUEST if it is no address.
        """
        loop = asyncio.get_running_loop()

        def secure() -> asyncio.BaseProtocol:
            if tls is None:
                return factory()
            shaking = self._shaking_hands
            if len(shaking) >= handshakes_max:
                # The oldest is the least likely to be honest: that takes milliseconds.
                oldest = next(iter(shaking))
                del shaking[oldest]
                oldest.abort()
            stream = TlsStream(
                tls, cast("Upper", factory()), loop, server_side=True, handshake_timeout_s=handshake_timeout_s
            )
            shaking[stream] = None
            stream.ready.add_done_callback(lambda _: shaking.pop(stream, None))
            return stream

        try:
            if self.address.startswith(UNIX_PREFIX):
                require_free(self.address)
                path = Path(self.address.removeprefix(UNIX_PREFIX))
                self._server = await loop.create_unix_server(secure, str(path), backlog=_BACKLOG)
                self._path = path
                path.chmod(0o600)
            else:
                host, port = split_address(self.address)
                self._server = await loop.create_server(secure, host, port, backlog=_BACKLOG)
                bound = self._server.sockets[0].getsockname()
                self.address = join_address(host, int(bound[1]))
        except OSError as error:
            raise cannot_listen(self.address, error) from error

    def close(self) -> None:
        """Stop accepting. Connections live on."""
        if self._server is not None:
            self._server.close()

    async def wait_closed(self) -> None:
        """Let the loop finish closing, and remove a Unix socket's file."""
        await asyncio.sleep(0)
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def within_descriptors(limits: Limits) -> Limits:
    """The limits with no more connections than a quarter of this process's file descriptors: models need some too."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or limits.connections_max <= soft // 4:
        return limits
    return msgspec.structs.replace(limits, connections_max=soft // 4)


def require_free(address: str) -> None:
    """Remove the socket file of a process that is gone; the loop would remove a living one's as well.

    Raises:
        MeshError: UNAVAILABLE if something listens on the Unix socket `address`. Of TCP the system itself says so.
    """
    path = Path(address.removeprefix(UNIX_PREFIX))
    if not address.startswith(UNIX_PREFIX) or not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_listen(address, error) from error
        else:
            raise cannot_listen(address, OSError(errno.EADDRINUSE, ""))


def cannot_listen(address: str, error: OSError) -> MeshError:
    """The error for a failed bind."""
    reason = error.strerror or str(error)
    if error.errno == errno.EADDRINUSE:
        reason = "another process uses this address; choose another port, or 0 for a free one"
    return MeshError(Code.UNAVAILABLE, f"Cannot listen on {address}: {reason}.")
