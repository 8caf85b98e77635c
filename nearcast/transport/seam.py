"""The seam between bytes on a connection and methods. Two implementations: `ngh2` (default) and `grpcio`.

A gRPC server maps method paths to `UnaryMethod` or `StreamMethod`; a channel calls them. Nothing here knows tensors.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import msgspec

from nearcast.errors import MeshError

Fields: TypeAlias = Sequence[tuple[bytes, bytes]]
"""Header fields as they travel."""
Metadata: TypeAlias = Sequence[tuple[str, str]]
"""Names to values. A value whose name ends in `-bin` is base64, padded or not, as on the wire."""
UNIX_PREFIX = "unix:"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one server or channel.

    Attributes:
        message_size_bytes_max: one message, also after decompression.
        metadata_size_bytes_max: all headers of one call, names and values and 32 bytes each as RFC 9113 counts.
        receive_buffer_bytes_max: requests of all connections of a server together that are on their way or not answered
            yet, without those that came in one frame; one connection may hold as much as is still free.
        unsent_bytes_max: replies of all connections of a server together that their peers have not read; beyond it the
            connection that holds the most is dropped, a stalled one first.
        reply_queue_bytes_max: replies of one connection that its peer has not read; beyond it calls wait to be started.
        send_buffer_bytes_max: bytes handed to the socket's buffer.
        stream_messages_max: messages of one streaming call that wait for the method, and for the wire 256 KiB.
        connections_max: open connections, at most a quarter of the process's file descriptors; when nine tenths are
            open, those without calls are let go after `handshake_timeout_s`.
        handshakes_max: TLS handshakes that have begun and not ended; beyond it the oldest is dropped.
        upload_timeout_s: from a unary call's headers to the end of its message.
        stall_timeout_s: a peer that reads nothing of what waits for it is dropped after this.
        idle_timeout_s: a connection without calls is closed after this.
        call_timeout_s_max: a channel's cap for unary calls without a deadline.
        keepalive_s: a peer that is expected to say something and says nothing for this long is sent a PING.
        keepalive_timeout_s: a peer that does not answer that PING within this is given up.
        connection_age_s: a server sends GOAWAY on a connection of about this age (10 % more or less, by chance, so that
            clients do not come back all at once); calls in flight are finished first. 0 = never.
        connection_age_grace_s: an old connection is closed after this even if calls are still in flight.
    """

    message_size_bytes_max: int = 64 * 1024 * 1024
    metadata_size_bytes_max: int = 16 * 1024
    metadata_count_max: int = 128
    concurrent_streams_max: int = 256
    connections_max: int = 10_000
    receive_buffer_bytes_max: int = 1024 * 1024 * 1024
    unsent_bytes_max: int = 1024 * 1024 * 1024
    reply_queue_bytes_max: int = 16 * 1024 * 1024
    send_buffer_bytes_max: int = 1024 * 1024
    stream_messages_max: int = 16
    handshakes_max: int = 1024
    handshake_timeout_s: float = 10.0
    connect_timeout_s: float = 2.0
    drain_timeout_s: float = 5.0
    upload_timeout_s: float = 60.0
    stall_timeout_s: float = 60.0
    idle_timeout_s: float = 900.0
    call_timeout_s_max: float = 300.0
    keepalive_s: float = 20.0
    keepalive_timeout_s: float = 5.0
    connection_age_s: float = 0.0
    connection_age_grace_s: float = 300.0


DEFAULT_LIMITS = Limits()


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One incoming call. `identity` is the peer's mesh identity URI ("" without mTLS); `peer` its address."""

    method: str
    metadata: Mapping[str, str] = msgspec.field(default_factory=dict)
    deadline: float | None = None
    identity: str = ""
    peer: str = ""


class Reply(msgspec.Struct, frozen=True):
    """One message and the trailers after it. `body` is in pieces: a large tensor is never copied to be framed.

    `fields` are trailers behind the others that a server sends unseen: whoever makes them knows that they may travel.
    """

    body: Sequence[bytes]
    trailers: Metadata = ()
    fields: Fields = ()


class CallError(MeshError):
    """A call that ended with a status; keeps the trailers that came with it."""

    trailers: Metadata = ()


UnaryMethod: TypeAlias = Callable[[bytes, Call], Awaitable[Reply]]
"""Takes the message (without gRPC's 5-byte prefix); raises `MeshError` for every other status than OK."""
StreamMethod: TypeAlias = Callable[[AsyncIterator[bytes], Call], AsyncIterator[Reply]]


class Responder(Protocol):
    """A unary call whose answer is given later, by whoever took it over. The first word counts, later ones are lost."""

    def pass_back(self, pieces: Sequence[bytes], trailers: Fields) -> None:
        """The peer's answer as it came: one framed message in any number of pieces, and trailers that may travel."""
        ...

    def reply(self, reply: Reply) -> None:
        """An answer that was made or decoded here."""
        ...

    def refuse(self, error: MeshError) -> None:
        """A status other than OK."""
        ...


class Taken(Protocol):
    """A call that was taken over."""

    def cancel(self) -> None:
        """Nobody waits for the answer any more, or its deadline has passed."""
        ...


PassMethod: TypeAlias = Callable[[Sequence[bytes], Call, Responder], Taken | Coroutine[Any, Any, Reply]]
"""Takes a call over, or answers it by a coroutine as a unary method does; the message is in the pieces in which it
came. Raises `MeshError` as that would. The responder may be told at once."""


class Methods(msgspec.Struct, frozen=True, kw_only=True):
    """What a server answers, by full path such as `/inference.GRPCInferenceService/ModelInfer`.

    A path of `passing` is also one of `unary`; servers that cannot be answered later leave `passing` aside.
    The unary methods of `pieced` may be given a large message as the list of its pieces, unjoined.
    """

    unary: Mapping[str, UnaryMethod] = msgspec.field(default_factory=dict)
    stream: Mapping[str, StreamMethod] = msgspec.field(default_factory=dict)
    passing: Mapping[str, PassMethod] = msgspec.field(default_factory=dict)
    pieced: frozenset[str] = frozenset()


class ReplyStream:
    """A streaming call as its caller sees it: iterate over it once for the messages; then `trailers` are there.

    Close it (`contextlib.aclosing`) to cancel what still goes on; so does cancelling the task that iterates.
    """

    __slots__ = ("_messages", "trailers")

    def __init__(self, converse: Callable[[ReplyStream], AsyncGenerator[bytes, None]]) -> None:
        self.trailers: Metadata = ()
        self._messages = converse(self)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._messages

    async def aclose(self) -> None:
        """End the call; nothing to do if it has ended."""
        await self._messages.aclose()


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


class Receiver(Protocol):
    """Who waits for a passed call; told once, from the turn of the loop in which its last bytes came."""

    def on_answer(self, pieces: Sequence[bytes], trailers: Fields) -> None:
        """One framed message as it came, and the peer's trailers, with a status of OK."""
        ...

    def on_error(self, error: CallError, *, is_refused: bool) -> None:
        """The peer's status, or why the call was lost. `is_refused`: the peer did not look at it."""
        ...


class PassedCall(Protocol):
    """A call whose answer goes on as it comes."""

    def abandon(self, *, is_late: bool = False) -> None:
        """Reset the call; its receiver hears no more of it. `is_late`: because its deadline has passed."""
        ...


@runtime_checkable
class DirectChannel(Protocol):
    """A channel that can send without a coroutine."""

    def write_head(self, method: str, metadata: Metadata) -> Fields:
        """The header fields of calls without a deadline, for `pass_on`.

        Raises:
            MeshError: INVALID_REQUEST for a name or value that may not travel.
        """
        ...

    def pass_on(self, head: Fields, body: Sequence[bytes], now: float, receiver: Receiver) -> PassedCall | None:
        """Send a unary call at once; its receiver is told what came of it. None = it would have to wait.

        Args:
            head: from `write_head`, and the deadline if there is one. The receiver keeps that.
            body: the message in pieces.
            now: monotonic instant.
            receiver: told once, unless it abandons the call.

        Raises:
            MeshError: TOO_LARGE for a message that gRPC cannot frame.
        """
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

    def stream(
        self,
        method: str,
        bodies: AsyncIterator[Sequence[bytes]],
        *,
        metadata: Metadata = (),
        deadline: float | None = None,
    ) -> ReplyStream:
        """Call a streaming method of any kind; it starts when the first message is asked for.

        Messages of `bodies` are taken as fast as the peer reads them, those of the peer let in as fast as they are
        taken here. A call is never repeated: what it held would be lost.

        Args:
            method: full path.
            bodies: what to send; its end closes our side. What it raises cancels the call and comes out of the stream.
            metadata: sent once, at the start.
            deadline: monotonic instant of the whole call; None = it may last as long as both sides live.

        Raises:
            CallError: out of the stream, as in `unary`; OVERLOADED if this channel has too many streams open.
        """
        ...

    async def close(self) -> None:
        """Close the connection; calls in flight fail with UNAVAILABLE."""
        ...
