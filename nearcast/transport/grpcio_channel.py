"""gRPC channel on grpcio: the second implementation of the seam."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from nearcast.errors import Code, MeshError
from nearcast.identity import Identity
from nearcast.transport.call_status import call_error
from nearcast.transport.grpcio_metadata import read_metadata, write_metadata
from nearcast.transport.seam import DEFAULT_LIMITS, CallError, Limits, Metadata, Reply, ReplyStream
from nearcast.wire import status

TLS_SERVER_NAME = "localhost"
"""grpcio insists on checking a name. Every certificate of the mesh carries this one beside its identity URI."""
_METHODS_MAX = 256
# A call that met the server's limit of streams before the client knew the limit.
_REFUSED = "RST_STREAM with error code 7"
_ATTEMPTS_MAX = 8
_REFUSED_PAUSE_S = 0.01
# What grpcio says when a call never reached a method.
_NOT_SENT = (
    _REFUSED.lower(),
    "failed to connect",
    "connection refused",
    "handshake",
    "no such file",
    "dns resolution failed",
)


class GrpcioChannel:
    """A `Channel` on grpc.aio.

    Args:
        address: `host:port` or `unix:/path`.
        limits: bounds.
        credentials: TLS material; None connects without TLS. The server's identity URI cannot be checked here: any
            certificate of the same authority is believed.
        by_host: the server is none of the mesh; its certificate must name the host of `address`.
        name: of the node that the server must be; "" = any.
    """

    def __init__(
        self,
        address: str,
        *,
        limits: Limits = DEFAULT_LIMITS,
        credentials: grpc.ChannelCredentials | None = None,
        by_host: bool = False,
        name: str = "",
    ) -> None:
        self._address = address
        self._limits = limits
        self._by_host = by_host
        # A node's certificate carries its name as a DNS name, too.
        self._server_name = name or TLS_SERVER_NAME
        self._channel = self._make_channel(credentials)
        self._methods: dict[str, Any] = {}
        self._retired: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def unary(
        self, method: str, body: Sequence[bytes], *, metadata: Metadata = (), deadline: float | None = None
    ) -> Reply:
        now = time.monotonic()
        deadline = now + self._limits.call_timeout_s_max if deadline is None else deadline
        self._require_sendable(metadata, deadline)
        message = b"".join(body)
        for attempt in range(_ATTEMPTS_MAX):
            call = self._callable(method)(
                message, timeout=deadline - time.monotonic(), metadata=write_metadata(metadata)
            )
            try:
                return Reply((await call,), read_metadata(await call.trailing_metadata()))
            except grpc.aio.AioRpcError as error:
                if _REFUSED not in (error.details() or "") or attempt + 1 == _ATTEMPTS_MAX:
                    raise _error(error) from error
                # Refused before it ran: more streams were opened than the server's settings, not yet here, allow.
                pause_s = random.uniform(0, _REFUSED_PAUSE_S * 2**attempt)
                await asyncio.sleep(min(pause_s, max(0.0, deadline - time.monotonic())))
            except grpc.aio.UsageError as error:
                raise self._closed() from error
            except asyncio.CancelledError:
                if self._was_closed():
                    raise self._closed(sent=True) from None
                raise
        raise AssertionError

    def stream(
        self,
        method: str,
        bodies: AsyncIterator[Sequence[bytes]],
        *,
        metadata: Metadata = (),
        deadline: float | None = None,
    ) -> ReplyStream:
        problems: list[Exception] = []

        async def messages() -> AsyncIterator[bytes]:
            try:
                async for body in bodies:
                    yield b"".join(body)
            except Exception as error:
                problems.append(error)
                raise

        async def converse(replies: ReplyStream) -> AsyncGenerator[bytes, None]:
            self._require_sendable(metadata, deadline)
            timeout_s = None if deadline is None else deadline - time.monotonic()
            begin: Any = self._channel.stream_stream(method)
            call = begin(messages(), timeout=timeout_s, metadata=write_metadata(metadata))
            try:
                async for message in call:
                    yield message
                replies.trailers = read_metadata(await call.trailing_metadata())
            except grpc.aio.AioRpcError as error:
                raise _error(error) from error
            except asyncio.CancelledError:
                # grpcio's word also for a call that ends because its messages failed or its channel was closed.
                if problems:
                    raise problems[0] from None
                if self._was_closed():
                    raise self._closed(sent=True) from None
                raise
            finally:
                call.cancel()

        return ReplyStream(converse)

    def reconnect(self, credentials: grpc.ChannelCredentials) -> None:
        """Connect anew, with other credentials, at the next call; calls in flight end on the former connection."""
        if self._is_closed:
            return
        former, self._channel = self._channel, self._make_channel(credentials)
        self._methods.clear()
        task = asyncio.get_running_loop().create_task(_retire(former, self._limits.call_timeout_s_max))
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)

    async def close(self) -> None:
        self._is_closed = True
        await self._channel.close()
        for task in self._retired:
            task.cancel()
        await asyncio.gather(*self._retired, return_exceptions=True)

    def _require_sendable(self, metadata: Metadata, deadline: float | None) -> None:
        if self._is_closed:
            raise self._closed()
        if deadline is not None and deadline <= time.monotonic():
            raise CallError(Code.DEADLINE, "The deadline passed before the call could be sent.")
        for name, value in metadata:
            status.require_metadata_value(name, value)

    def _was_closed(self) -> bool:
        """Whether what looks like a cancelled task is a call that the end of the channel has cut off."""
        task = asyncio.current_task()
        return self._is_closed and task is not None and not task.cancelling()

    def _closed(self, *, sent: bool = False) -> CallError:
        return CallError(Code.UNAVAILABLE, f"The channel to {self._address} is closed.", sent=sent)

    def _make_channel(self, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
        limits = self._limits
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", limits.message_size_bytes_max),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", limits.metadata_size_bytes_max),
            ("grpc.min_reconnect_backoff_ms", int(limits.connect_timeout_s * 1000)),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.keepalive_time_ms", int(limits.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(limits.keepalive_timeout_s * 1000)),
            ("grpc.http2.max_pings_without_data", 0),
            # Channels of one process that dial the same address would otherwise share a connection.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ]
        if credentials is None:
            return grpc.aio.insecure_channel(self._address, options=options)
        if not self._by_host:
            options.append(("grpc.ssl_target_name_override", self._server_name))
        return grpc.aio.secure_channel(self._address, credentials, options=options)

    def _callable(self, method: str) -> Any:
        found = self._methods.get(method)
        if found is None:
            if len(self._methods) >= _METHODS_MAX:
                self._methods.clear()
            found = self._methods[method] = self._channel.unary_unary(method)
        return found


async def _retire(channel: grpc.aio.Channel, grace_s: float) -> None:
    try:
        await channel.close(grace_s)
    finally:
        await channel.close()


def _error(error: grpc.aio.AioRpcError) -> CallError:
    details = error.details() or ""
    trailers = read_metadata(error.trailing_metadata())
    made = call_error(int(error.code().value[0]), status.encode_message(details), trailers)
    lower = details.lower()
    if made.code is Code.UNAVAILABLE and any(text in lower for text in _NOT_SENT):
        made.sent = False
    return made


def channel_credentials(identity: Identity | None, ca: Path) -> grpc.ChannelCredentials:
    """A node's identity, and the authority it trusts, in grpcio's form.

    Raises:
        MeshError: UNAUTHENTICATED if the files cannot be read.
    """
    try:
        return grpc.ssl_channel_credentials(
            root_certificates=ca.read_bytes(),
            private_key=None if identity is None else identity.key.read_bytes(),
            certificate_chain=None if identity is None else identity.certificate.read_bytes(),
        )
    except OSError as error:
        raise MeshError(Code.UNAUTHENTICATED, f"The identity's files cannot be read: {error}.") from error
