"""TLS between a TCP transport and a protocol, by hand: the TLS transports of the loops cost about twice as much.

Records are decrypted while bytes are there, so that no message ends in an exception, and each write leaves at once.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from contextlib import suppress
from typing import Any, Protocol, cast

_log = logging.getLogger(__name__)
READ_SIZE_BYTES = 256 * 1024
_RECORD_SIZE_BYTES_MAX = 16 * 1024


class _Buffers(threading.local):
    """One pair for all connections of a loop, which fills it and has it read in one breath; no two loops may share it.

    `received` is for sockets. What was decrypted is shorter than its records, but part of one may have been there
    before.
    """

    def __init__(self) -> None:
        self.received = memoryview(bytearray(READ_SIZE_BYTES))
        self.decrypted = memoryview(bytearray(READ_SIZE_BYTES + 2 * _RECORD_SIZE_BYTES_MAX))


BUFFERS = _Buffers()
"""Of the thread that asks: a loop's."""


class Upper(Protocol):
    """The protocol above. What it is given lies in a buffer that is used again as soon as it returns."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...

    def data_received(self, data: Any) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def connection_lost(self, exc: Exception | None) -> None: ...


class TlsStream(asyncio.Transport, asyncio.BufferedProtocol):
    """To the TCP transport a protocol, to the protocol above a transport; that one only hears of finished handshakes.

    Args:
        context: the TLS context.
        protocol: whose bytes these are.
        loop: the running loop.
        server_side: which end this is.
        server_hostname: whom the client asks for.
        handshake_timeout_s: a peer that takes longer is dropped.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        protocol: Upper,
        loop: asyncio.AbstractEventLoop,
        *,
        server_side: bool,
        handshake_timeout_s: float,
        server_hostname: str | None = None,
    ) -> None:
        super().__init__()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname
        )
        self._received = BUFFERS.received
        self._decrypted = BUFFERS.decrypted
        self._protocol = protocol
        self._loop = loop
        self._timeout_s = handshake_timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._tcp: asyncio.Transport = cast("asyncio.Transport", None)
        self._is_ready = False
        self._is_closing = False
        self._problem: ssl.SSLError | None = None
        self.ready: asyncio.Future[None] = loop.create_future()
        """Done when the protocol has been told of the connection; holds the error of a failed handshake."""

    # To the TCP transport a protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._tcp = cast("asyncio.Transport", transport)
        self._timer = self._loop.call_later(
            self._timeout_s, self._fail, TimeoutError("the TLS handshake took too long")
        )
        self._shake_hands()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._received

    def buffer_updated(self, nbytes: int) -> None:
        self._incoming.write(self._received[:nbytes])
        if not self._is_ready:
            self._shake_hands()
        if self._is_ready and self._incoming.pending and not self._is_closing:
            self._read()

    def pause_writing(self) -> None:
        # A handshake never fills the buffer; a protocol that knows of no connection must not hear of it.
        if self._is_ready:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._is_ready:
            self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_closing = True
        if self._is_ready:
            self._protocol.connection_lost(exc or self._problem)
        else:
            self._fail(exc or ConnectionResetError("the peer closed the connection during the TLS handshake"))

    # To the protocol above a transport.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._is_closing or not data:
            return
        try:
            self._tls.write(data)
        except ssl.SSLError as error:
            self._problem = error
            self._break(error)
            return
        self._tcp.write(self._outgoing.read())

    def close(self) -> None:
        """Say goodbye, and close when what was written has gone out. The peer's own goodbye is not waited for."""
        if self._is_closing:
            return
        self._is_closing = True
        # It always complains that the peer's goodbye is missing; ours is in the outgoing bytes by then.
        with suppress(ssl.SSLError):
            self._tls.unwrap()
        self._send()
        self._tcp.close()

    def abort(self) -> None:
        self._is_closing = True
        self._tcp.abort()

    def pause_reading(self) -> None:
        self._tcp.pause_reading()

    def resume_reading(self) -> None:
        self._tcp.resume_reading()

    def is_closing(self) -> bool:
        return self._is_closing or self._tcp.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "ssl_object":
            return self._tls
        if name == "peercert":
            return self._tls.getpeercert()
        return self._tcp.get_extra_info(name, default)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._tcp.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self._tcp.get_write_buffer_size()

    # Inside.

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._send()
            return
        except ssl.SSLError as error:
            # The alert tells the peer why.
            self._send()
            self._fail(error)
            return
        self._send()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._is_ready = True
        self._protocol.connection_made(self)
        if not self.ready.done():
            self.ready.set_result(None)

    def _read(self) -> None:
        tls, incoming, plain = self._tls, self._incoming, self._decrypted
        filled = 0
        has_ended = False
        try:
            while incoming.pending and not has_ended:
                size_bytes = cast("int", tls.read(_RECORD_SIZE_BYTES_MAX, plain[filled:]))
                filled += size_bytes
                has_ended = not size_bytes
        except ssl.SSLWantReadError:
            # The rest of a record is still on its way, or it was the peer's session ticket.
            pass
        except ssl.SSLError as error:
            self._problem = error
        if filled:
            self._protocol.data_received(plain[:filled])
        if self._problem is not None:
            self._break(self._problem)
        elif has_ended:
            self.close()
        elif self._outgoing.pending:
            self._send()

    def _send(self) -> None:
        if self._outgoing.pending and not self._tcp.is_closing():
            self._tcp.write(self._outgoing.read())

    def _fail(self, error: BaseException) -> None:
        """The handshake has failed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # a server has nobody who would look
            _log.debug("the TLS handshake failed: %s", error)
        if not self._is_closing:
            self._is_closing = True
            self._tcp.close()

    def _break(self, error: ssl.SSLError) -> None:
        """The peer's bytes make no sense, or it refused us after the handshake."""
        _log.debug("the TLS connection broke: %s", error)
        self._send()
        self.abort()
