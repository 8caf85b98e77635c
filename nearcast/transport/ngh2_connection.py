"""What both ends of an ngh2 connection share: feeding bytes, bounded sending, closing."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import cast

from ngh2 import Configuration, Connection, Event, NGH2Error, Role

from nearcast.errors import Code, MeshError
from nearcast.identity import peer_uri
from nearcast.transport.peer import peer_name
from nearcast.transport.seam import Limits
from nearcast.transport.tls_stream import BUFFERS

PULL_SIZE_BYTES = 256 * 1024
"""Bytes taken from the library at once; also what one streaming call may queue before its method waits."""
STREAM_WINDOW_BYTES = 1 << 20
UNREAD_SIZE_BYTES_MAX = STREAM_WINDOW_BYTES // 8
"""Of a large message that is on its way, received before its window is given back: once for many frames."""
FRAME_SIZE_BYTES_MAX = 1 << 20
_WINDOW_BYTES_MAX = 2**31 - 1
# The library kills the whole connection at its limit, so its limit lies above the one that refuses a single call.
_HEADER_LIMIT_FACTOR = 4


class Ngh2Connection(asyncio.BufferedProtocol):
    """One HTTP/2 connection on an asyncio transport. Subclasses handle the events."""

    __slots__ = (
        "_closing",
        "_flush_pending",
        "_is_reading",
        "_paused",
        "_received",
        "gone",
        "h2",
        "identity",
        "last_read_at",
        "limits",
        "loop",
        "peer",
        "sent_bytes",
        "transport",
    )

    def __init__(self, role: Role, limits: Limits, loop: asyncio.AbstractEventLoop) -> None:
        self.limits = limits
        self.loop = loop
        self.h2 = Connection(
            role,
            Configuration(
                auto_window_update=False,
                max_inbound_header_list_size=limits.metadata_size_bytes_max * _HEADER_LIMIT_FACTOR,
                max_inbound_header_count=limits.metadata_count_max * _HEADER_LIMIT_FACTOR,
            ),
        )
        self.transport: asyncio.Transport = cast("asyncio.Transport", None)
        self.identity = ""
        self.peer = ""
        self.sent_bytes = 0
        self.last_read_at = loop.time()
        self.gone: asyncio.Future[None] = loop.create_future()
        self._received = BUFFERS.received
        self._paused = False
        self._flush_pending = False
        self._is_reading = False
        self._closing = False

    # What subclasses do.

    def settings(self) -> Mapping[int, int]:
        """The SETTINGS to send at the start."""
        raise NotImplementedError

    def handle_events(self, events: list[Event]) -> None:
        """Act on what came in; everything sent from here goes out in one flush afterwards."""
        raise NotImplementedError

    def flushed(self) -> None:
        """Called when everything that the peer's windows allow was handed to the socket."""

    def lost(self, error: BaseException | None) -> None:
        """Called once when the connection is gone."""
        raise NotImplementedError

    # asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        tls = transport.get_extra_info("ssl_object")
        if tls is not None:
            if tls.selected_alpn_protocol() != "h2":
                self.abort()
                return
            self.identity = peer_uri(tls)
        self.peer = peer_name(transport)
        self.transport.set_write_buffer_limits(high=self.limits.send_buffer_bytes_max)
        self.h2.initiate_connection(self.settings())
        # Room for all streams: those that nobody reads must not keep the others waiting.
        self.h2.set_local_window_size(min(_WINDOW_BYTES_MAX, STREAM_WINDOW_BYTES * self.limits.concurrent_streams_max))
        self.flush()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._received

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(self._received[:nbytes])

    def data_received(self, data: bytes | memoryview) -> None:
        """Take bytes of the peer; they are used before this returns."""
        if self._closing:
            return
        self.last_read_at = self.loop.time()
        h2 = self.h2
        try:
            h2.receive_data(data)
        except NGH2Error:
            # The peer broke the protocol. What is queued cannot be fetched any more.
            self.abort()
            return
        self._is_reading = True
        try:
            self.handle_events(h2.events())
        finally:
            self._is_reading = False
        # Much of what arrives is answered later, by whoever it woke.
        if self._flush_pending or h2.want_write or not h2.want_read:
            self.flush()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self.flush()

    def eof_received(self) -> bool | None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        if not self.gone.done():
            self.gone.set_result(None)
        self.lost(exc)

    # Sending.

    def flush_soon(self) -> None:
        """Flush after everything that is ready to run in this turn of the loop: one write for many answers."""
        if not self._flush_pending:
            self._flush_pending = True
            # Whoever reads flushes at the end.
            if not self._is_reading:
                self.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Hand over what the library wants to send, as long as the socket takes it."""
        self._flush_pending = False
        if self._closing:
            return
        h2 = self.h2
        try:
            while not self._paused:
                data = h2.data_to_send(PULL_SIZE_BYTES)
                size_bytes = len(data)
                if size_bytes:
                    self.sent_bytes += size_bytes
                    self.transport.write(data)
                if size_bytes < PULL_SIZE_BYTES:
                    break
            self.flushed()
        except NGH2Error:
            self.abort()
            return
        if not h2.want_read and not h2.want_write:
            self.close()

    def acknowledge(self, size_bytes: int, stream_id: int) -> None:
        """Give back the peer's window for received bytes."""
        # At the end of a connection the library takes nothing back, and nothing depends on it any more.
        try:  # noqa: SIM105 - suppress() costs more than the call
            self.h2.acknowledge_received_data(size_bytes, stream_id)
        except NGH2Error:
            pass

    def reset(self, stream_id: int, error_code: int) -> None:
        """Reset a call if it still exists."""
        with suppress(NGH2Error):
            self.h2.reset_stream(stream_id, error_code)

    def close(self) -> None:
        """Close after what was written has gone out."""
        if not self._closing:
            self._closing = True
            self.transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._closing = True
        self.transport.abort()

    @property
    def is_open(self) -> bool:
        """Whether anything can still be sent."""
        return not self._closing


async def wait_gone(connections: Collection[Ngh2Connection], timeout_s: float) -> None:
    """Wait until closing connections have sent their last bytes; drop those that take too long."""
    waiters = [connection.gone for connection in connections if connection.transport is not None]
    if waiters:
        await asyncio.wait(waiters, timeout=timeout_s)
    for connection in connections:
        if connection.transport is not None and not connection.gone.done():
            connection.abort()


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` (`[::1]:8001` for IPv6).

    Raises:
        MeshError: INVALID_REQUEST if it is not of that form.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535 or not host:
        raise MeshError(Code.INVALID_REQUEST, f"{address!r} is no address; write host:port or unix:/path.")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """The opposite of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def require_alpn(tls: ssl.SSLContext) -> ssl.SSLContext:
    """Offer HTTP/2 only, whatever the maker of the context forgot."""
    tls.set_alpn_protocols(["h2"])
    return tls
