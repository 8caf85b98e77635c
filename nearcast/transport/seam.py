"""The seam between bytes on a connection and methods. Two implementations: `ngh2` (default) and `grpcio`.

A gRPC server maps method paths to `UnaryMethod` or `StreamMethod`; a channel calls them. Nothing here knows tensors.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from nearcast.errors import MeshError

Metadata: TypeAlias = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one server or channel."""

    message_size_bytes_max: int = 64 * 1024 * 1024
    metadata_size_bytes_max: int = 16 * 1024
    metadata_count_max: int = 128
    concurrent_streams_max: int = 256
    connections_max: int = 10_000
    send_buffer_bytes_max: int = 1024 * 1024
    handshake_timeout_s: float = 10.0
    connect_timeout_s: float = 2.0
    drain_timeout_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One incoming call. `identity` is the peer's mesh identity URI ("" without mTLS); `peer` its address."""

    method: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    deadline: float | None = None
    identity: str = ""
    peer: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """One message and the trailers after it. `body` is in pieces so that a large tensor is never copied to be framed."""

    body: Sequence[bytes]
    trailers: Metadata = ()


class CallError(MeshError):
    """A call that ended with a status; keeps the trailers that came with it."""

    trailers: Metadata = ()


UnaryMethod: TypeAlias = Callable[[bytes, Call], Awaitable[Reply]]
"""Takes the message (without gRPC's 5-byte prefix); raises `MeshError` for every other status than OK."""
StreamMethod: TypeAlias = Callable[[AsyncIterator[bytes], Call], AsyncIterator[Reply]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Methods:
    """What a server answers, by full path such as `/inference.GRPCInferenceService/ModelInfer`."""

    unary: Mapping[str, UnaryMethod] = field(default_factory=dict)
    stream: Mapping[str, StreamMethod] = field(default_factory=dict)


class Server(Protocol):
    """A listening gRPC server."""

    @property
    def address(self) -> str:
        """`host:port` (the port the system chose) or `unix:/path`."""
        ...

    async def start(self) -> None:
        """Bind and listen.

        Raises:
            MeshError: UNAVAILABLE naming the address if it is in use.
        """
        ...

    async def drain(self, timeout_s: float) -> None:
        """Refuse new calls, finish those in flight, close."""
        ...


class Channel(Protocol):
    """A connection to one gRPC server, made on demand and remade after a loss."""

    async def unary(
        self, method: str, body: Sequence[bytes], *, metadata: Metadata = (), deadline: float | None = None
    ) -> Reply:
        """Call a unary method. Cancelling the task resets the call.

        Raises:
            CallError: the peer's status, or UNAVAILABLE (`sent` says whether the request may have run) or DEADLINE.
        """
        ...

    async def close(self) -> None:
        """Close the connection; calls in flight fail with UNAVAILABLE."""
        ...
