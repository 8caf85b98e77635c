"""One call of an ngh2 channel: what came of it so far. A unary call ends in a future or tells its receiver, a stream
ends in an inbox.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, cast

from ngh2 import NGH2Error

from nearcast.errors import Code, MeshError
from nearcast.transport.call_status import call_error
from nearcast.transport.ngh2_connection import UNREAD_SIZE_BYTES_MAX
from nearcast.transport.ngh2_framing import PREFIX_SIZE_BYTES, MessageReader, frame, is_one_message, whole_message
from nearcast.transport.ngh2_headers import OK, read_trailers
from nearcast.transport.ngh2_inbox import Inbox
from nearcast.transport.seam import CallError, Fields, Metadata, Receiver, Reply

if TYPE_CHECKING:
    from nearcast.transport.ngh2_client import ClientConnection


# Small messages in memory never make a task wait: after so many it lets others run.
_MESSAGES_AT_ONCE = 128


class ClientCall:
    """A call from its headers to its trailers.

    `ends_at` is the monotonic instant of its deadline, or of the channel's cap; `is_refused`: the server did not look
    at it, so that it may be sent again; `has_sent_all`: our side of the stream is closed.
    """

    __slots__ = ("connection", "ends_at", "has_sent_all", "id", "is_refused", "started_at", "timer")

    def __init__(self, connection: ClientConnection, stream_id: int, ends_at: float) -> None:
        self.connection = connection
        self.id = stream_id
        self.started_at = connection.last_read_at
        self.ends_at = ends_at
        self.timer: asyncio.TimerHandle | None = None
        self.is_refused = False
        self.has_sent_all = True

    def receive(self, data: bytes) -> None:
        """Take DATA.

        Raises:
            MeshError: for what is no message, too large or too much.
        """
        raise NotImplementedError

    def conclude(self, fields: Fields) -> None:
        """The peer's last header fields are here."""
        number, message, trailers = read_trailers(fields)
        if number == 0:
            self.succeed(trailers)
        elif number is None:
            self.fail(CallError(Code.INTERNAL, "The peer's answer has no gRPC status.", sent=True))
        else:
            self.fail(call_error(number, message, trailers))

    def succeed(self, trailers: Metadata) -> None:
        """The peer's status is OK."""
        raise NotImplementedError

    def fail(self, error: BaseException) -> None:
        """End the call with an error, unless it has ended."""
        raise NotImplementedError


class UnaryCall(ClientCall):
    """A call with one message each way; await `future`."""

    __slots__ = ("future", "message", "reader")

    def __init__(self, connection: ClientConnection, stream_id: int, ends_at: float) -> None:
        super().__init__(connection, stream_id, ends_at)
        self.future: asyncio.Future[Reply] = connection.loop.create_future()
        self.message: bytes | None = None
        self.reader: MessageReader | None = None

    def receive(self, data: bytes) -> None:
        connection = self.connection
        if data:
            connection.acknowledge(len(data), self.id)
        size_bytes_max = connection.limits.message_size_bytes_max
        if self.reader is None:
            message = whole_message(data) if self.message is None else None
            if message is not None and len(message) <= size_bytes_max:
                self.message = message
                return
            self.reader = MessageReader(size_bytes_max)
        for message in self.reader.feed(data):
            if self.message is not None:
                raise MeshError(Code.INTERNAL, "The peer sent more than one message for a unary call.")
            self.message = message

    def succeed(self, trailers: Metadata) -> None:
        if self.message is None:
            self.fail(CallError(Code.INTERNAL, "The peer answered OK without a message.", sent=True))
        elif not self.future.done():
            self.future.set_result(Reply((self.message,), tuple(trailers)))

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class PassedCall(ClientCall):
    """A unary call whose answer goes on as it came. It keeps no time of its own, beyond the channel's cap."""

    __slots__ = ("_pieces", "_receiver", "_size_bytes", "_unread_bytes")

    def __init__(self, connection: ClientConnection, stream_id: int, ends_at: float, receiver: Receiver) -> None:
        self.connection = connection
        self.id = stream_id
        self.started_at = connection.last_read_at
        self.ends_at = ends_at
        self.timer = None
        self.is_refused = False
        self.has_sent_all = True
        self._receiver: Receiver | None = receiver
        self._pieces: list[bytes] = []
        self._unread_bytes = 0
        self._size_bytes = 0

    def abandon(self, *, is_late: bool = False) -> None:
        """Reset the call; its receiver hears no more of it. `is_late`: because its deadline has passed."""
        self._receiver = None
        self._give_back()
        self.connection.abandon(self)
        if is_late:
            self.connection.suspect(self)

    def receive(self, data: bytes) -> None:
        connection = self.connection
        if data:
            self._pieces.append(data)
            self._size_bytes += len(data)
            self._unread_bytes += len(data)
            if self._unread_bytes >= UNREAD_SIZE_BYTES_MAX:
                self._give_back()
            if self._size_bytes > connection.limits.message_size_bytes_max + PREFIX_SIZE_BYTES:
                raise MeshError(Code.TOO_LARGE, "it is larger than this side takes.")

    def conclude(self, fields: Fields) -> None:
        self._give_back()
        if OK not in fields:
            super().conclude(fields)
        elif not is_one_message(self._pieces, self._size_bytes):
            self.fail(CallError(Code.INTERNAL, "The peer's answer is not one message as it should be.", sent=True))
        elif self._receiver is not None:
            receiver, self._receiver = self._receiver, None
            receiver.on_answer(self._pieces, fields)

    def fail(self, error: BaseException) -> None:
        self._give_back()
        if self._receiver is not None:
            receiver, self._receiver = self._receiver, None
            receiver.on_error(cast("CallError", error), is_refused=self.is_refused)

    def _give_back(self) -> None:
        if self._unread_bytes:
            self.connection.acknowledge(self._unread_bytes, self.id)
            self._unread_bytes = 0


class StreamCall(ClientCall):
    """A call with any number of messages each way: iterate over `messages`, then `close`."""

    __slots__ = ("_error", "_has_ended", "_inbox", "_sender", "_wake_reader", "trailers")

    def __init__(self, connection: ClientConnection, stream_id: int, deadline: float | None) -> None:
        # Without a deadline it may last for hours; keepalive sees to it that it does not outlive its peer.
        super().__init__(connection, stream_id, math.inf if deadline is None else deadline)
        self.trailers: Metadata = ()
        self._inbox = Inbox(connection.limits)
        self._sender: asyncio.Task[None] | None = None
        self._wake_reader: asyncio.Future[None] | None = None
        self._error: BaseException | None = None
        self._has_ended = False
        self.has_sent_all = False

    def send(self, bodies: AsyncIterator[Sequence[bytes]]) -> None:
        """Send the messages of `bodies` as fast as the peer reads them, in a task of the call's own."""
        self._sender = self.connection.loop.create_task(self._send_all(bodies))

    async def messages(self) -> AsyncIterator[bytes]:
        """The peer's messages in order. Taking one opens the peer's window again.

        Raises:
            CallError: the peer's status, after the messages that came before it, or why the call was lost.
            Exception: whatever `bodies` raised.
        """
        while True:
            taken = 0
            while self._inbox:
                message = self._inbox.take()
                self._give_back(self._inbox.credit())
                yield message
                taken += 1
                if not taken % _MESSAGES_AT_ONCE:
                    await asyncio.sleep(0)
            if self._error is not None:
                raise self._error
            if self._has_ended:
                return
            self._wake_reader = self.connection.loop.create_future()
            await self._wake_reader

    async def close(self) -> None:
        """Reset the call if it still goes on, and wait for the end of its task."""
        self.connection.abandon(self)
        self._end()
        if self._sender is not None:
            await asyncio.wait([self._sender])

    def receive(self, data: bytes) -> None:
        self._inbox.put(data)
        self._give_back(self._inbox.credit())
        if self._inbox:
            self._wake()

    def succeed(self, trailers: Metadata) -> None:
        self.trailers = tuple(trailers)
        self._end()

    def fail(self, error: BaseException) -> None:
        if not self._has_ended:
            self._error = error
            self._end()

    def _end(self) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        self._give_back(self._inbox.discard())
        if self._sender is not None and not self._sender.done():
            self._sender.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._wake_reader is not None and not self._wake_reader.done():
            self._wake_reader.set_result(None)

    def _give_back(self, size_bytes: int) -> None:
        if size_bytes:
            self.connection.acknowledge(size_bytes, self.id)
            self.connection.flush_soon()

    async def _send_all(self, bodies: AsyncIterator[Sequence[bytes]]) -> None:
        connection, h2 = self.connection, self.connection.h2
        sent = 0
        try:
            async for body in bodies:
                for piece in frame(body):
                    h2.send_data(self.id, piece)
                connection.flush_soon()
                await connection.wait_writable(self.id)
                sent += 1
                if not sent % _MESSAGES_AT_ONCE:
                    await asyncio.sleep(0)
            h2.end_stream(self.id)
            self.has_sent_all = True
            connection.flush_soon()
        except NGH2Error:
            # The call has ended meanwhile; its reader knows why.
            return
        except Exception as error:  # noqa: BLE001 - it is the caller's own, and goes back to it
            self.fail(error)
            connection.abandon(self)
