"""One call on a server connection: its state, and the two ways of running its method."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from types import CoroutineType
from typing import TYPE_CHECKING, Any, cast

from ngh2 import NGH2Error

from nearcast.errors import Code, MeshError
from nearcast.transport import eager
from nearcast.transport.ngh2_connection import STREAM_WINDOW_BYTES, UNREAD_SIZE_BYTES_MAX
from nearcast.transport.ngh2_framing import PREFIX_SIZE_BYTES, Deflated, MessageReader, announced_size_bytes, frame
from nearcast.transport.ngh2_headers import RESPONSE, write_trailers
from nearcast.transport.seam import Call, Fields, PassMethod, Reply, StreamMethod, Taken, UnaryMethod

if TYPE_CHECKING:
    from nearcast.transport.ngh2_server_connection import ServerConnection

_log = logging.getLogger(__name__)
_TURN_MESSAGES = 32
# A message in smaller pieces than these, on the average, is joined.
_PIECE_SIZE_BYTES = 4096
_NO_INBOX: deque[bytes] = deque(maxlen=0)
_NOTHING = Reply(())


class ServerStream:
    """A call from its headers to its trailers.

    `is_done` is set once nothing more may be sent on it: answered, refused, reset or lost.
    """

    # One is made for each call, and most of this stays as it is: on the class it costs nothing.
    unary_method: UnaryMethod | None = None
    stream_method: StreamMethod | None = None
    pass_method: PassMethod | None = None
    task: asyncio.Task[None] | None = None
    passage: Taken | None = None
    deadline_timer: asyncio.TimerHandle | None = None
    is_done = False
    has_ended = False
    has_started_reply = False
    whole: bytes | None = None
    # As long as nobody had to look into it: the message in the pieces in which it comes, with its prefix.
    pieces: list[bytes] | None = None
    pieces_size_bytes_max = 0
    reader: MessageReader | None = None
    received_bytes = 0
    # Streaming calls only; those have an inbox of their own.
    inbox = _NO_INBOX
    inbox_bytes = 0
    # Received, and its window not given back yet.
    unread_bytes = 0
    wake_reader: asyncio.Future[None] | None = None
    wake_writer: asyncio.Future[None] | None = None

    def __init__(self, connection: ServerConnection, stream_id: int, call: Call, encoding: str) -> None:
        self.connection = connection
        self.id = stream_id
        self.call = call
        self.encoding = encoding
        self.opened_at = connection.last_read_at

    # Unary.

    def take(self) -> bytes | list[bytes]:
        """The request, which must be complete, in pieces only for who takes those; it is kept no longer here."""
        pieces, self.pieces = self.pieces, None
        if pieces is not None:
            return pieces if self.call.method in self.connection.server.methods.pieced else b"".join(pieces)
        message: bytes = self.whole  # type: ignore[assignment]
        self.whole = None
        return message

    async def answer(self, message: bytes | list[bytes], begun: Awaitable[Reply] | None = None) -> None:
        """Run the unary method, unless it has begun, and send what it returns or raises."""
        connection = self.connection
        try:
            if isinstance(message, Deflated):
                message = await self._inflate(message)
            method: Any = self.unary_method
            reply = await (begun or method(message, self.call))
        except MeshError as error:
            connection.fail(self, error)
        except asyncio.CancelledError:
            connection.fail(self, MeshError(Code.CANCELLED, "The server cancelled the call."))
            raise
        except Exception:  # noqa: BLE001 - a failing method must not end the connection
            _log.exception("the method %s raised", self.call.method)
            connection.fail(self, _internal())
        else:
            self.reply(reply)

    def reply(self, reply: Reply) -> None:
        """Send an answer, unless the call has ended."""
        if self.is_done:
            return
        connection = self.connection
        connection.finish(self)
        try:
            pieces = frame(reply.body)
            size_bytes_max = connection.limits.metadata_size_bytes_max
            trailers = write_trailers(reply.trailers, size_bytes_max=size_bytes_max, ready=reply.fields)
        except Exception:  # noqa: BLE001 - a method may return anything
            _log.exception("the reply of %s cannot be sent", self.call.method)
            connection.reset(self.id, 2)
            connection.flush_last()
        else:
            self._send(pieces, trailers)

    def assemble(self, run: list[bytes]) -> None:
        """Take DATA of a unary call; a message in many frames stays in its pieces.

        Raises:
            MeshError: for a bad or too large message, or more than one.
        """
        if self.reader is None:
            if self.encoding == "identity" and self._gather(run):
                return
            if self.pieces is not None:
                run, self.pieces = self.pieces, None
            self.reader = MessageReader(self.connection.limits.message_size_bytes_max, self.encoding, defers=True)
        for message in self.reader.feed(b"".join(run)):
            if self.whole is not None:
                raise MeshError(Code.INVALID_REQUEST, "A unary call holds exactly one message; this one holds more.")
            self.whole = message
        if self.has_ended and (self.whole is None or self.reader.is_partial):
            raise MeshError(Code.INVALID_REQUEST, "The call ended before its message was complete.")

    @property
    def needs_window(self) -> bool:
        """Whether the peer should have the window back before the call ends; to tell it so wakes it."""
        if self.pieces is None:
            return True
        return self.pieces_size_bytes_max > STREAM_WINDOW_BYTES and self.unread_bytes >= UNREAD_SIZE_BYTES_MAX

    def _gather(self, run: Sequence[bytes]) -> bool:
        """Keep the message in its pieces; False = it must be looked at after all."""
        pieces = self.pieces = self.pieces or []
        pieces.extend(filter(None, run))
        if not pieces or len(pieces[0]) < PREFIX_SIZE_BYTES:
            return False
        size_bytes = announced_size_bytes(pieces[0])
        if size_bytes is None or size_bytes > self.connection.limits.message_size_bytes_max:
            return False
        self.pieces_size_bytes_max = size_bytes + PREFIX_SIZE_BYTES
        if not self.has_ended:
            return self.received_bytes <= self.pieces_size_bytes_max
        # Many small pieces would cost more to pass on than to join.
        if self.received_bytes != self.pieces_size_bytes_max or len(pieces) * _PIECE_SIZE_BYTES > size_bytes:
            return False
        pieces[0] = pieces[0][PREFIX_SIZE_BYTES:]
        return True

    # Taken over: whoever did so answers by one of `pass_back`, `reply` and `refuse`.

    def hand_over(self) -> bool:
        """Let the method take the call over; False = there is none. What is still compressed is not for it."""
        pieces = [self.whole] if type(self.whole) is bytes else self.pieces
        if self.pass_method is None or pieces is None:
            return False
        try:
            passage = self.pass_method(pieces, self.call, self)
        except MeshError as error:
            self.refuse(error)
            return True
        except Exception:  # noqa: BLE001 - a failing method must not end the connection
            _log.exception("the method %s raised", self.call.method)
            self.refuse(_internal())
            return True
        self.whole = self.pieces = None
        if isinstance(passage, CoroutineType):
            self.task = eager.start(self.answer(b"", passage), self.connection.loop)
        elif not self.is_done:
            self.passage = cast("Taken", passage)
        return True

    def pass_back(self, pieces: Sequence[bytes], trailers: Fields) -> None:
        """Send an answer as it came: a framed message and its trailers."""
        if not self.is_done:
            self.connection.finish(self)
            self._send(pieces, trailers)

    def refuse(self, error: MeshError) -> None:
        """Send an error, unless the call has ended."""
        self.connection.fail(self, error)

    def _send(self, pieces: Sequence[bytes], trailers: Fields) -> None:
        connection = self.connection
        h2, stream_id = connection.h2, self.id
        try:
            h2.send_response(stream_id, RESPONSE)
            for piece in pieces:
                h2.send_data(stream_id, piece)
            h2.send_trailers(stream_id, trailers)
            if len(pieces) > 1:
                # A large answer counts at once: many may be made before the next flush.
                connection.owe()
        except NGH2Error:
            _log.debug("the call %d ended before its answer", stream_id)
        except Exception:  # noqa: BLE001 - a method may return anything
            _log.exception("the reply of %s cannot be sent", self.call.method)
            connection.reset(stream_id, 2)
        connection.flush_last()

    # Streaming.

    async def converse(self) -> None:
        """Run the streaming method: messages in through `messages`, replies out as the peer reads them."""
        connection = self.connection
        last: Reply = _NOTHING
        try:
            replies = cast("StreamMethod", self.stream_method)(self.messages(), self.call)
            async with aclosing(cast("AsyncIterator[object]", replies)):  # type: ignore[type-var]
                async for reply in replies:
                    if self.is_done:
                        return
                    self._start_reply()
                    for piece in frame(reply.body):
                        connection.h2.send_data(self.id, piece)
                    last = reply if reply.trailers or reply.fields else last
                    connection.flush_soon()
                    await self._writable()
        except MeshError as error:
            connection.fail(self, error)
        except asyncio.CancelledError:
            connection.fail(self, MeshError(Code.CANCELLED, "The server cancelled the call."))
            raise
        except NGH2Error:
            connection.finish(self)
        except Exception:  # noqa: BLE001 - a failing method must not end the connection
            _log.exception("the method %s raised", self.call.method)
            connection.fail(self, _internal())
        else:
            self._end(last)

    async def messages(self) -> AsyncIterator[bytes]:
        """The peer's messages in order. Taking one opens the peer's window again."""
        taken = 0
        while True:
            while self.inbox:
                taken += 1
                if not taken % _TURN_MESSAGES:
                    # Nothing else makes a method wait that is given many small messages at once.
                    await asyncio.sleep(0)
                    if not self.inbox:
                        break
                message = self.inbox.popleft()
                self.inbox_bytes -= len(message)
                self._hold()
                self.acknowledge()
                if isinstance(message, Deflated):
                    message = await self._inflate(message)
                yield message
            if self.has_ended:
                return
            self.wake_reader = self.connection.loop.create_future()
            try:
                await self.wake_reader
            finally:
                self.wake_reader = None

    def receive(self, data: bytes) -> None:
        """Take DATA of a streaming call.

        Raises:
            MeshError: for a bad or too large message.
        """
        if self.reader is None:
            self.reader = MessageReader(self.connection.limits.message_size_bytes_max, self.encoding, defers=True)
        if not self.reader.is_partial:
            self.opened_at = self.connection.last_read_at
        self.unread_bytes += len(data)
        for message in self.reader.feed(data):
            self.inbox.append(message)
            self.inbox_bytes += len(message)
        self._hold()
        if self.has_ended and self.reader.is_partial:
            raise MeshError(Code.INVALID_REQUEST, "The call ended in the middle of a message.")
        self.acknowledge()
        if self.wake_reader is not None and not self.wake_reader.done() and (self.inbox or self.has_ended):
            self.wake_reader.set_result(None)

    def acknowledge(self) -> None:
        """Give back the window of what was received unless enough messages are waiting already."""
        if self.unread_bytes and len(self.inbox) < self.connection.limits.stream_messages_max:
            self.connection.acknowledge(self.unread_bytes, self.id)
            self.unread_bytes = 0
            self.connection.flush_soon()

    @property
    def is_uploading(self) -> bool:
        """Whether the rest of a message is still to come; `opened_at` says since when."""
        if self.unary_method is not None:
            return not self.has_ended
        return self.reader is not None and self.reader.is_partial

    def _hold(self) -> None:
        if self.reader is not None and not self.is_done:
            self.connection.hold(self, self.inbox_bytes + self.reader.buffered_bytes)

    async def _inflate(self, message: Deflated) -> bytes:
        """Inflate in a thread, few at a time: a bomb of a few kilobytes would hold up the loop for long."""
        connection = self.connection
        async with connection.server.inflating:
            data = await connection.loop.run_in_executor(None, message.inflate)
        if not self.is_done:
            connection.hold(self, self.received_bytes + len(data))
        return data

    async def _writable(self) -> None:
        while not self.is_done and self.connection.is_congested(self):
            self.wake_writer = self.connection.loop.create_future()
            self.connection.writers.add(self)
            try:
                await self.wake_writer
            finally:
                self.connection.writers.discard(self)
                self.wake_writer = None

    def _start_reply(self) -> None:
        if not self.has_started_reply:
            self.has_started_reply = True
            self.connection.h2.send_response(self.id, RESPONSE)

    def _end(self, last: Reply) -> None:
        if self.is_done:
            return
        connection = self.connection
        connection.finish(self)
        try:
            self._start_reply()
            size_bytes_max = connection.limits.metadata_size_bytes_max
            trailers = write_trailers(last.trailers, size_bytes_max=size_bytes_max, ready=last.fields)
            connection.h2.send_trailers(self.id, trailers)
        except NGH2Error:
            _log.debug("the call %d ended before its trailers", self.id)
        connection.flush_soon()


def _internal() -> MeshError:
    return MeshError(Code.INTERNAL, "The server failed on this request; its log says why.")
