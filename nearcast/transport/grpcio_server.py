"""gRPC server on grpcio: the second implementation of the seam, and the reference that the first is tested against."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from nearcast.errors import Code, MeshError
from nearcast.identity import Identity
from nearcast.identity.name import URI_PREFIX
from nearcast.transport.grpcio_metadata import read_metadata, write_metadata
from nearcast.transport.listener import cannot_listen, require_free
from nearcast.transport.ngh2_connection import join_address, split_address
from nearcast.transport.seam import (
    DEFAULT_LIMITS,
    UNIX_PREFIX,
    Call,
    CallError,
    Limits,
    Metadata,
    Methods,
    Reply,
    StreamMethod,
    UnaryMethod,
)
from nearcast.wire import status

_Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"

_log = logging.getLogger(__name__)
_STATUS = {code.value[0]: code for code in grpc.StatusCode}


class GrpcioServer:
    """A `Server` on grpc.aio.

    Args:
        methods: what it answers.
        address: `host:port` (port 0: the system chooses) or `unix:/path`.
        limits: bounds; grpcio has no counterpart of those for buffers, uploads and stalls.
        credentials: TLS material; None serves without TLS.
    """

    def __init__(
        self,
        methods: Methods,
        *,
        address: str,
        limits: Limits = DEFAULT_LIMITS,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self._methods = methods
        self._address = address
        self._limits = limits
        self._credentials = credentials
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return self._address

    async def start(self) -> None:
        limits = self._limits
        require_free(self._address)
        server = grpc.aio.server(
            handlers=[_Handlers(self._methods)],
            options=[
                ("grpc.max_receive_message_length", limits.message_size_bytes_max),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", limits.metadata_size_bytes_max),
                ("grpc.absolute_max_metadata_size", limits.metadata_size_bytes_max * 4),
                ("grpc.max_concurrent_streams", limits.concurrent_streams_max),
                ("grpc.server_handshake_timeout_ms", int(limits.handshake_timeout_s * 1000)),
                ("grpc.max_connection_idle_ms", int(limits.idle_timeout_s * 1000)),
                *_keepalive(limits),
                ("grpc.so_reuseport", 0),
            ],
        )
        try:
            if self._credentials is None:
                port = server.add_insecure_port(self._address)
            else:
                port = server.add_secure_port(self._address, self._credentials)
        except RuntimeError as error:
            # A grpcio server cleans up on the loop when it is collected: nothing may keep it beyond the loop's life.
            del server
            error.with_traceback(None)
            raise cannot_listen(self._address, OSError(errno.EADDRINUSE, str(error))) from error
        if not self._address.startswith(UNIX_PREFIX):
            self._address = join_address(split_address(self._address)[0], port)
        else:
            Path(self._address.removeprefix(UNIX_PREFIX)).chmod(0o600)
        self._server = server
        await server.start()

    async def drain(self, timeout_s: float) -> None:
        if self._server is not None:
            await self._server.stop(timeout_s)


def _keepalive(limits: Limits) -> list[tuple[str, int]]:
    """Options for keepalive and age. By itself grpcio makes an age up to 10 % shorter or longer by chance."""
    options = [
        ("grpc.keepalive_time_ms", int(limits.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(limits.keepalive_timeout_s * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        # Channels of the mesh ask as often as this server does; its default takes that for abuse.
        ("grpc.http2.min_ping_interval_without_data_ms", int(limits.keepalive_s * 500)),
    ]
    if limits.connection_age_s:
        options += [
            ("grpc.max_connection_age_ms", int(limits.connection_age_s * 1000)),
            ("grpc.max_connection_age_grace_ms", int(limits.connection_age_grace_s * 1000)),
        ]
    return options


def server_credentials(identity: Identity, *, require_client: bool) -> grpc.ServerCredentials:
    """A node's identity in grpcio's form. It follows `identity.reload()`.

    Raises:
        MeshError: UNAUTHENTICATED if its files cannot be read.
    """
    shown = _Shown(_configuration(identity))
    identity.on_reload(shown, lambda used: used.show(_configuration(identity)))
    return grpc.dynamic_ssl_server_credentials(shown.current, shown.fetch, require_client_authentication=require_client)


class _Shown:
    """The certificate that grpcio shows; it asks before every handshake, from a thread of its own."""

    def __init__(self, configuration: grpc.ServerCertificateConfiguration) -> None:
        self.current = configuration

    def show(self, configuration: grpc.ServerCertificateConfiguration) -> None:
        self.current = configuration

    def fetch(self) -> grpc.ServerCertificateConfiguration:
        return self.current


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    try:
        pair = (identity.key.read_bytes(), identity.certificate.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=identity.ca.read_bytes())
    except OSError as error:
        raise MeshError(Code.UNAUTHENTICATED, f"The identity's files cannot be read: {error}.") from error


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, methods: Methods) -> None:
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            path: grpc.unary_unary_rpc_method_handler(_unary(method, path)) for path, method in methods.unary.items()
        }
        for path, method in methods.stream.items():
            self._handlers[path] = grpc.stream_stream_rpc_method_handler(_stream(method, path))

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        return self._handlers.get(str(handler_call_details.method))


def _unary(method: UnaryMethod, path: str) -> Callable[[bytes, _Context], Awaitable[bytes]]:
    async def behavior(message: bytes, context: _Context) -> bytes:
        try:
            reply = await method(message, _call(path, context))
        except MeshError as error:
            await _abort(context, error)
        except Exception:  # noqa: BLE001 - a failing method must not end the server
            _log.exception("the method %s raised", path)
            await _abort(context, MeshError(Code.INTERNAL, "The server failed on this request; its log says why."))
        else:
            context.set_trailing_metadata(_closing(reply))
            return reply.body[0] if len(reply.body) == 1 else b"".join(reply.body)
        raise AssertionError

    return behavior


def _stream(method: StreamMethod, path: str) -> Callable[[AsyncIterator[bytes], _Context], AsyncIterator[bytes]]:
    async def behavior(messages: AsyncIterator[bytes], context: _Context) -> AsyncIterator[bytes]:
        last = Reply(())
        try:
            replies: Any = method(messages, _call(path, context))
            async with aclosing(replies):
                async for reply in replies:
                    last = reply if reply.trailers or reply.fields else last
                    yield b"".join(reply.body)
        except MeshError as error:
            await _abort(context, error)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception:  # noqa: BLE001 - a failing method must not end the server
            _log.exception("the method %s raised", path)
            await _abort(context, MeshError(Code.INTERNAL, "The server failed on this request; its log says why."))
        context.set_trailing_metadata(_closing(last))

    return behavior


def _closing(reply: Reply) -> tuple[tuple[str, str | bytes], ...]:
    return _trailers((*reply.trailers, *((name.decode(), value.decode()) for name, value in reply.fields)))


async def _abort(context: _Context, error: MeshError) -> None:
    said = status.error_to_status(error)
    trailers = list(said.trailers)
    if isinstance(error, CallError):
        names = {name for name, _ in trailers}
        trailers += [pair for pair in error.trailers if pair[0] not in names]
    # grpcio percent-encodes the details itself.
    await context.abort(_STATUS[said.code], status.decode_message(said.message), _trailers(trailers))


def _trailers(trailers: Metadata) -> tuple[tuple[str, str | bytes], ...]:
    try:
        return write_metadata(trailers)
    except MeshError as error:
        _log.warning("left out the binary trailers: %s", error.message)
        return write_metadata([pair for pair in trailers if not pair[0].endswith("-bin")])


def _call(path: str, context: _Context) -> Call:
    metadata: dict[str, str] = {}
    for name, value in read_metadata(context.invocation_metadata()):
        if name != "user-agent":
            metadata[name] = f"{metadata[name]},{value}" if name in metadata else value
    left_s = context.time_remaining()
    return Call(
        method=path,
        metadata=metadata,
        deadline=None if left_s is None else time.monotonic() + left_s,
        identity=_identity(context),
        peer=_peer(context.peer()),
    )


def _peer(name: str) -> str:
    """Whoever is at a Unix socket is this user: grpcio does not say who, but its file lets nobody else in."""
    kind, _, address = name.partition(":")
    return f"{UNIX_PREFIX}{os.geteuid()}" if kind == "unix" else address


def _identity(context: _Context) -> str:
    names = [
        name.decode("utf-8", "replace") for name in context.auth_context().get("x509_subject_alternative_name", ())
    ]
    uris = [name for name in names if name.startswith(URI_PREFIX)]
    return uris[0] if len(uris) == 1 else ""
