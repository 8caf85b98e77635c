"""gRPC channel on asyncio and libnghttp2: one connection, made on demand, on which calls run side by side."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ngh2 import NGH2Error

from nearcast.errors import Code, MeshError
from nearcast.identity import tls_error
from nearcast.transport.ngh2_call import PassedCall, StreamCall, UnaryCall
from nearcast.transport.ngh2_client import ClientConnection
from nearcast.transport.ngh2_connection import require_alpn, split_address, wait_gone
from nearcast.transport.ngh2_framing import frame
from nearcast.transport.ngh2_headers import request_prefix, write_request
from nearcast.transport.seam import (
    DEFAULT_LIMITS,
    UNIX_PREFIX,
    CallError,
    Fields,
    Limits,
    Metadata,
    Receiver,
    Reply,
    ReplyStream,
)
from nearcast.transport.tls_stream import TlsStream

VerifyPeer: TypeAlias = Callable[[Mapping[str, Any]], object]
"""Takes the server's certificate as `ssl.SSLSocket.getpeercert()` gives it; raises MeshError to refuse the server."""

_ATTEMPTS_MAX = 8
_CONNECTIONS_MAX = 3
_REFUSED_PAUSE_S = 0.01
_METHODS_MAX = 256
_CLOSE_TIMEOUT_S = 0.5


class Ngh2Channel:
    """A `Channel` on libnghttp2.

    Args:
        address: `host:port` or `unix:/path`.
        limits: bounds; `connect_timeout_s` covers TCP, TLS and the server's greeting.
        tls: client context; None connects without TLS.
        verify_peer: looks at the server's certificate before the first call.
    """

    def __init__(
        self,
        address: str,
        *,
        limits: Limits = DEFAULT_LIMITS,
        tls: ssl.SSLContext | None = None,
        verify_peer: VerifyPeer | None = None,
    ) -> None:
        self.address = address
        self.limits = limits
        self._tls = require_alpn(tls) if tls is not None else None
        self._verify_peer = verify_peer
        self._connection: ClientConnection | None = None
        self._connecting: asyncio.Task[ClientConnection] | None = None
        # Connections that finish their last calls after the server's GOAWAY.
        self._retired: set[ClientConnection] = set()
        self._prefixes: dict[str, Fields] = {}
        self._is_closed = False
        self._authority = "localhost" if address.startswith(UNIX_PREFIX) else address

    async def unary(
        self, method: str, body: Sequence[bytes], *, metadata: Metadata = (), deadline: float | None = None
    ) -> Reply:
        now = time.monotonic()
        ends_at = now + self.limits.call_timeout_s_max if deadline is None else deadline
        for attempt in range(_ATTEMPTS_MAX):
            if ends_at <= (time.monotonic() if attempt else now):
                raise CallError(Code.DEADLINE, "The deadline passed before the call could be sent.")
            connection = self._connection
            if connection is None or not connection.is_usable:
                connection = await self._connect(ends_at)
            if not connection.slots.is_free:
                await connection.slots.wait(ends_at)
                if not connection.is_usable:
                    continue
            try:
                call = self._send(connection, method, body, metadata, deadline)
            except NGH2Error:
                connection.retire()
                continue
            try:
                return await call.future
            except asyncio.CancelledError:
                connection.abandon(call)
                raise
            except CallError:
                # The server has not looked at it: its count of streams lags behind, or it is going away.
                attempts_max = _ATTEMPTS_MAX if connection.is_usable else _CONNECTIONS_MAX
                if not call.is_refused or attempt + 1 >= attempts_max:
                    raise
                if connection.is_usable:
                    pause_s = random.uniform(0, _REFUSED_PAUSE_S * 2**attempt)
                    await asyncio.sleep(min(pause_s, max(0.0, ends_at - time.monotonic())))
        raise self._going_away()

    def write_head(self, method: str, metadata: Metadata) -> Fields:
        return self._head(method, metadata, None)

    def pass_on(self, head: Fields, body: Sequence[bytes], now: float, receiver: Receiver) -> PassedCall | None:
        connection = self._connection
        if connection is None:
            return None
        try:
            return connection.pass_on(head, frame(body), now, receiver)
        except NGH2Error:
            connection.retire()
            return None

    def stream(
        self,
        method: str,
        bodies: AsyncIterator[Sequence[bytes]],
        *,
        metadata: Metadata = (),
        deadline: float | None = None,
    ) -> ReplyStream:
        async def converse(replies: ReplyStream) -> AsyncGenerator[bytes, None]:
            call = await self._open_stream(method, metadata, deadline)
            try:
                call.send(bodies)
                async for message in call.messages():
                    yield message
                replies.trailers = call.trailers
            finally:
                await call.close()

        return ReplyStream(converse)

    async def close(self) -> None:
        self._is_closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        connections = list(self._retired)
        if self._connection is not None:
            connections.append(self._connection)
        for connection in connections:
            connection.shut()
        self._connection = None
        self._retired.clear()
        await wait_gone(connections, _CLOSE_TIMEOUT_S)

    def _send(
        self,
        connection: ClientConnection,
        method: str,
        body: Sequence[bytes],
        metadata: Metadata,
        deadline: float | None,
    ) -> UnaryCall:
        try:
            fields = self._head(method, metadata, deadline)
            pieces = frame(body)
        except MeshError as error:
            raise CallError(error.code, error.message) from error
        return connection.send(fields, pieces, deadline)

    async def _open_stream(self, method: str, metadata: Metadata, deadline: float | None) -> StreamCall:
        now = time.monotonic()
        ends_at = now + self.limits.call_timeout_s_max if deadline is None else deadline
        if ends_at <= now:
            raise CallError(Code.DEADLINE, "The deadline passed before the call could be sent.")
        for _ in range(_CONNECTIONS_MAX):
            connection = self._connection
            if connection is None or not connection.is_usable:
                connection = await self._connect(ends_at)
            if not connection.slots.may_stream:
                text = f"Too many streams to {self.address} are open on this channel; end one or ask another node."
                raise CallError(Code.OVERLOADED, text, retry_after_ms=100)
            await connection.slots.wait(ends_at)
            if not connection.is_usable:
                continue
            try:
                return connection.open(self._head(method, metadata, deadline), deadline)
            except NGH2Error:
                connection.retire()
            except MeshError as error:
                raise CallError(error.code, error.message) from error
        raise self._going_away()

    def _head(self, method: str, metadata: Metadata, deadline: float | None) -> Fields:
        prefix = self._prefixes.get(method)
        if prefix is None:
            if len(self._prefixes) >= _METHODS_MAX:
                self._prefixes.clear()
            prefix = request_prefix(method, authority=self._authority, is_tls=self._tls is not None)
            self._prefixes[method] = prefix
        # Our own cap is nobody's deadline: it stays here.
        return write_request(prefix, metadata, None if deadline is None else deadline - time.monotonic())

    def _going_away(self) -> CallError:
        return CallError(Code.UNAVAILABLE, f"{self.address} is going away; ask another node.", retry_after_ms=100)

    async def _connect(self, ends_at: float) -> ClientConnection:
        """The connection being made, or a new one; calls that wait for it share it."""
        if self._is_closed:
            raise CallError(Code.UNAVAILABLE, f"The channel to {self.address} is closed.")
        connecting = self._connecting
        if connecting is None:
            connecting = self._connecting = asyncio.get_running_loop().create_task(self._make_connection())
            connecting.add_done_callback(self._connected)
        done, _ = await asyncio.wait([connecting], timeout=max(0.0, ends_at - time.monotonic()))
        if not done:
            raise CallError(Code.DEADLINE, f"The deadline passed while connecting to {self.address}.")
        if connecting.cancelled():
            raise CallError(Code.UNAVAILABLE, f"The channel to {self.address} was closed.")
        error = connecting.exception()
        if error is not None:
            # One failed connection fails many calls: each gets an exception object of its own.
            if isinstance(error, CallError):
                raise CallError(error.code, error.message, retry_after_ms=error.retry_after_ms) from error
            raise CallError(Code.UNAVAILABLE, f"Cannot connect to {self.address}.") from error
        return connecting.result()

    def _connected(self, task: asyncio.Task[ClientConnection]) -> None:
        self._connecting = None
        if task.cancelled() or task.exception() is not None:
            return
        if self._is_closed:
            task.result().shut()
        else:
            self._connection = task.result()

    async def _make_connection(self) -> ClientConnection:
        loop = asyncio.get_running_loop()
        connection = ClientConnection(self.limits, loop, self.address, on_retire=self._retire, on_lost=self._lost)
        try:
            async with asyncio.timeout(self.limits.connect_timeout_s):
                await self._open(loop, connection)
                await connection.greeted
        except TimeoutError as error:
            connection.shut()
            raise CallError(
                Code.UNAVAILABLE, f"{self.address} did not answer within {self.limits.connect_timeout_s:g} s."
            ) from error
        except (OSError, ssl.SSLError) as error:
            # A wrong certificate is UNAVAILABLE as well: another node may have the right one.
            raise CallError(Code.UNAVAILABLE, tls_error(error, self.address).message) from error
        except asyncio.CancelledError:
            connection.shut()
            raise
        self._check_peer(connection)
        return connection

    def _check_peer(self, connection: ClientConnection) -> None:
        if self._verify_peer is None:
            return
        try:
            self._verify_peer(connection.transport.get_extra_info("peercert") or {})
        except MeshError as error:
            connection.shut()
            raise CallError(Code.UNAVAILABLE, f"{self.address} is not who it should be: {error.message}") from error

    async def _open(self, loop: asyncio.AbstractEventLoop, connection: ClientConnection) -> None:
        if self.address.startswith(UNIX_PREFIX):
            stream = self._secure(loop, connection, "localhost")
            path = self.address.removeprefix(UNIX_PREFIX)
            await loop.create_unix_connection(lambda: stream or connection, path)
        else:
            try:
                host, port = split_address(self.address)
            except MeshError as error:
                raise CallError(error.code, error.message) from error
            stream = self._secure(loop, connection, host)
            await loop.create_connection(lambda: stream or connection, host, port)
        if stream is not None:
            try:
                await stream.ready
            except BaseException:
                stream.abort()
                raise

    def _secure(self, loop: asyncio.AbstractEventLoop, connection: ClientConnection, host: str) -> TlsStream | None:
        if self._tls is None:
            return None
        timeout_s = self.limits.connect_timeout_s
        return TlsStream(
            self._tls, connection, loop, server_side=False, server_hostname=host, handshake_timeout_s=timeout_s
        )

    def _retire(self, connection: ClientConnection) -> None:
        if self._connection is connection:
            self._connection = None
        self._retired.add(connection)

    def _lost(self, connection: ClientConnection) -> None:
        self._retired.discard(connection)
        if self._connection is connection:
            self._connection = None
