"""The server's end of an ngh2 connection: which calls are open, what is refused, when answers leave."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeAlias, cast

from ngh2 import (
    DataReceived,
    Event,
    NGH2Error,
    PingAcknowledged,
    RequestReceived,
    Role,
    SettingsReceived,
    StreamClosed,
    StreamReset,
    TrailersReceived,
)

from nearcast.errors import Code, MeshError
from nearcast.transport import eager
from nearcast.transport.ngh2_connection import (
    FRAME_SIZE_BYTES_MAX,
    PULL_SIZE_BYTES,
    STREAM_WINDOW_BYTES,
    Ngh2Connection,
)
from nearcast.transport.ngh2_framing import whole_message
from nearcast.transport.ngh2_headers import RequestHead, read_request, write_error, write_http_error
from nearcast.transport.ngh2_server_state import ServerState
from nearcast.transport.ngh2_stream import ServerStream
from nearcast.transport.seam import Call, Fields, PassMethod, UnaryMethod
from nearcast.transport.watch import Seen, Verdict, Watch

_log = logging.getLogger(__name__)
_DRAIN_PING = b"nc-drain"
_NO_ERROR = 0
_REMEMBERED_SIZE_BYTES_MAX = 1024
_AGE_JITTER = 0.1
_KEEPALIVE_PING = b"nc-alive"
_Known: TypeAlias = tuple[Fields, RequestHead, Call, UnaryMethod | None, PassMethod | None]


class ServerConnection(Ngh2Connection):
    """One client's connection."""

    __slots__ = (
        "_growing",
        "_half_closed",
        "_is_greeted",
        "_known",
        "_last_stream_id",
        "_notice_heard",
        "_ready",
        "_swept_stream_id",
        "_timed",
        "_waiting",
        "is_evicted",
        "receiving_bytes",
        "server",
        "streams",
        "unsent_bytes",
        "watch",
        "writers",
    )

    def __init__(self, server: ServerState, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(Role.SERVER, server.limits, loop)
        self.server = server
        self.streams: dict[int, ServerStream] = {}
        self.writers: set[ServerStream] = set()
        # Calls whose start waits until the peer has read earlier replies.
        self._waiting: dict[int, ServerStream] = {}
        # Of the bytes that are being read: complete calls, calls with a deadline, and frames of messages that go on.
        self._ready: list[ServerStream] = []
        self._timed: list[ServerStream] = []
        self._growing: defaultdict[ServerStream, list[bytes]] = defaultdict(list)
        # Answered calls whose request still comes in: reset once the answer is out, or it would be swallowed.
        self._half_closed: set[int] = set()
        self._is_greeted = False
        self._last_stream_id = 0
        self._swept_stream_id = 0
        self.receiving_bytes = 0
        self.unsent_bytes = 0
        self.is_evicted = False
        age_s = self.limits.connection_age_s * random.uniform(1 - _AGE_JITTER, 1 + _AGE_JITTER)
        self.watch = Watch(self.limits, opened_at=self.last_read_at, age_s=age_s)
        self._notice_heard: asyncio.Future[None] | None = None
        # Clients repeat themselves: the fields of a unary call, what they said, and what answers it.
        self._known: _Known = ((), RequestHead(), Call(method=""), None, None)

    def settings(self) -> Mapping[int, int]:
        limits = self.limits
        return {
            3: limits.concurrent_streams_max,
            4: STREAM_WINDOW_BYTES,
            5: FRAME_SIZE_BYTES_MAX,
            6: limits.metadata_size_bytes_max,
        }

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if len(self.server.connections) >= self.limits.connections_max:
            self.transport = cast("asyncio.Transport", transport)
            self.abort()
            return
        self.server.connections.add(self)
        super().connection_made(transport)

    def lost(self, error: BaseException | None) -> None:
        self.server.connections.discard(self)
        self._waiting.clear()
        self.server.unsent_bytes -= self.unsent_bytes
        self.unsent_bytes = 0
        for stream in list(self.streams.values()):
            self.drop(stream)
        if self._notice_heard is not None and not self._notice_heard.done():
            self._notice_heard.set_result(None)
        self.server.idle.set()

    # Receiving.

    def handle_events(self, events: list[Any]) -> None:
        streams = self.streams
        for event in events:
            # The classes are final; asking for them by name is several times as quick as isinstance.
            kind = type(event)
            if kind is DataReceived:
                stream = streams.get(event.stream_id)
                if stream is None:
                    # Of a call that is over.
                    self.acknowledge(len(event.data), event.stream_id)
                elif event.end_stream or stream.pieces is None:
                    self._receive(stream, event.data, is_end=event.end_stream)
                else:
                    # A large message comes in many frames.
                    self._growing[stream].append(event.data)
            elif kind is RequestReceived:
                self._open(event)
            elif kind is StreamClosed or kind is StreamReset:
                self._half_closed.discard(event.stream_id)
                stream = streams.get(event.stream_id)
                if stream is not None:
                    self.drop(stream)
            else:
                self._handle_rare(event)
        if self._growing:
            self._receive_growing()
        # Only now, so that nothing runs for a call that was reset in the same breath.
        ready, self._ready = self._ready, []
        for stream in ready:
            self._start(stream)
        # Only now, because most calls are over by now.
        if self._timed:
            self._set_timers()
        if self._waiting:
            # A reply that was reset unread has left room.
            self.flush_soon()

    def _set_timers(self) -> None:
        now = time.monotonic()
        for stream in self._timed:
            if not stream.is_done:
                deadline: Any = stream.call.deadline
                stream.deadline_timer = self.loop.call_later(max(0.0, deadline - now), self._expire, stream)
        self._timed.clear()

    def _handle_rare(self, event: Event) -> None:
        if isinstance(event, SettingsReceived):
            self._is_greeted = True
        elif isinstance(event, TrailersReceived):
            stream = self.streams.get(event.stream_id)
            if stream is not None:
                self._receive(stream, b"", is_end=True)
        elif isinstance(event, PingAcknowledged) and event.opaque_data == _DRAIN_PING:
            heard = self._notice_heard
            if heard is not None and not heard.done():
                heard.set_result(None)

    def _open(self, event: RequestReceived) -> None:
        self._last_stream_id = stream_id = event.stream_id
        fields, head, call, unary_method, pass_method = self._known
        if event.headers != fields:
            head, call, unary_method, pass_method = self._read_head(event.headers)
        if head.timeout_s is not None:
            call = Call(
                method=head.path,
                metadata=head.metadata,
                deadline=time.monotonic() + head.timeout_s,
                identity=self.identity,
                peer=self.peer,
            )
        stream = ServerStream(self, stream_id, call, head.encoding)
        stream.unary_method, stream.pass_method = unary_method, pass_method
        if event.end_stream or unary_method is None or head.problem is not None or not head.is_grpc:
            self._open_rare(stream, head, has_ended=event.end_stream)
            return
        self.streams[stream_id] = stream
        if head.timeout_s is not None:
            self._timed.append(stream)

    def _read_head(self, fields: Fields) -> tuple[RequestHead, Call, UnaryMethod | None, PassMethod | None]:
        limits, methods = self.limits, self.server.methods
        head = read_request(fields, size_bytes_max=limits.metadata_size_bytes_max, count_max=limits.metadata_count_max)
        call = Call(method=head.path, metadata=head.metadata, identity=self.identity, peer=self.peer)
        unary_method = methods.unary.get(head.path)
        pass_method = methods.passing.get(head.path) if head.encoding == "identity" else None
        if unary_method is not None and head.problem is None and head.size_bytes <= _REMEMBERED_SIZE_BYTES_MAX:
            self._known = fields, head, call, unary_method, pass_method
        return head, call, unary_method, pass_method

    def _open_rare(self, stream: ServerStream, head: RequestHead, *, has_ended: bool) -> None:
        """A streaming call, and what ends at once."""
        stream.has_ended = has_ended
        if stream.unary_method is None:
            stream.stream_method = self.server.methods.stream.get(head.path)
            stream.inbox = deque()
        if head.problem is not None or not head.is_grpc or (stream.unary_method or stream.stream_method) is None:
            self._refuse(stream, head)
            return
        self.streams[stream.id] = stream
        if head.timeout_s is not None:
            self._timed.append(stream)
        if stream.stream_method is not None:
            stream.task = self.loop.create_task(stream.converse())
        else:
            self.fail(stream, MeshError(Code.INVALID_REQUEST, "The call holds no message."))

    def _refuse(self, stream: ServerStream, head: RequestHead) -> None:
        if not head.is_grpc:
            text = "This port answers gRPC: POST with content-type application/grpc."
            try:
                self.h2.send_response(stream.id, write_http_error(415, text), end_stream=True)
            except NGH2Error:
                _log.debug("the call %d ended before its refusal", stream.id)
            self._end_early(stream)
            return
        self.fail(stream, head.problem or MeshError(Code.UNSUPPORTED, f"This server has no method {head.path[:256]}."))

    def _receive(self, stream: ServerStream, data: bytes, *, is_end: bool) -> None:
        stream.has_ended = is_end
        if is_end and stream.reader is None and stream.pieces is None and stream.stream_method is None:
            whole = whole_message(data)
            if whole is not None:
                # The usual case: the whole request in one frame.
                stream.whole = whole
                self.acknowledge(len(data), stream.id)
                self._ready.append(stream)
                return
        if stream.stream_method is None:
            self._receive_run(stream, [*self._growing.pop(stream, ()), data])
            return
        try:
            stream.receive(data)
        except MeshError as error:
            self._give_up(stream, error)

    def _receive_growing(self) -> None:
        growing, self._growing = self._growing, defaultdict(list)
        for stream, run in growing.items():
            self._receive_run(stream, run)

    def _receive_run(self, stream: ServerStream, run: list[bytes]) -> None:
        """Take the frames of a unary call that came together."""
        size_bytes = sum(map(len, run))
        if stream.is_done:
            self.acknowledge(size_bytes, stream.id)
            return
        stream.unread_bytes += size_bytes
        try:
            self.hold(stream, stream.received_bytes + size_bytes)
            stream.assemble(run)
        except MeshError as error:
            self._give_up(stream, error)
            return
        if stream.has_ended:
            self._ready.append(stream)
        elif stream.needs_window:
            self._give_back(stream)

    def _give_up(self, stream: ServerStream, error: MeshError) -> None:
        self.fail(stream, error)
        self.server.cancel(stream)

    def _give_back(self, stream: ServerStream) -> None:
        self.acknowledge(stream.unread_bytes, stream.id)
        stream.unread_bytes = 0

    def hold(self, stream: ServerStream, size_bytes: int) -> None:
        """Note how much of a call's requests waits in memory.

        A connection may hold as much as is still free (the dynamic threshold of Choudhury and Hahne, 1998): one that
        takes all it can get takes half, and leaves room for the others.

        Raises:
            MeshError: OVERLOADED if that is more than its share.
        """
        more_bytes = size_bytes - stream.received_bytes
        stream.received_bytes = size_bytes
        self.receiving_bytes += more_bytes
        self.server.receiving_bytes += more_bytes
        free_bytes = self.limits.receive_buffer_bytes_max - self.server.receiving_bytes
        if more_bytes > 0 and self.receiving_bytes > free_bytes:
            raise MeshError(
                Code.OVERLOADED, "The server is receiving too much at once; retry in a moment.", retry_after_ms=100
            )

    def _start(self, stream: ServerStream) -> None:
        if stream.is_done:
            return
        if self._waiting or self.h2.queued_body_size() > self.limits.reply_queue_bytes_max:
            self._waiting[stream.id] = stream
            return
        if stream.pass_method is None or not stream.hand_over():
            stream.task = eager.start(stream.answer(stream.take()), self.loop)

    # Answering.

    def fail(self, stream: ServerStream, error: MeshError) -> None:
        """End a call with an error's status, early if its request is still coming in."""
        if stream.is_done:
            return
        fields = write_error(
            error, is_first=not stream.has_started_reply, size_bytes_max=self.limits.metadata_size_bytes_max
        )
        try:
            if stream.has_started_reply:
                self.h2.send_trailers(stream.id, fields)
            else:
                self.h2.send_response(stream.id, fields, end_stream=True)
        except NGH2Error:
            _log.debug("the call %d ended before its status", stream.id)
        self._end_early(stream)

    def _end_early(self, stream: ServerStream) -> None:
        if not stream.has_ended:
            self._half_closed.add(stream.id)
        self.finish(stream)
        self.flush_soon()

    def finish(self, stream: ServerStream) -> None:
        """Forget a call; nothing may be sent on it after this but what its caller sends now."""
        stream.is_done = True
        if stream.deadline_timer is not None:
            stream.deadline_timer.cancel()
            stream.deadline_timer = None
        if stream.received_bytes:
            self.hold(stream, 0)
        if self._waiting:
            self._waiting.pop(stream.id, None)
        # A call and its method refer to each other: what they hold would wait for the garbage collector.
        if stream.whole is not None or stream.reader is not None or stream.pieces is not None:
            stream.whole = stream.reader = stream.pieces = None
        if stream.inbox:
            stream.inbox.clear()
        if stream.unread_bytes:
            self._give_back(stream)
        if not stream.has_ended and stream.stream_method is not None:
            self._half_closed.add(stream.id)
        if self.streams.pop(stream.id, None) is not None and not self.streams:
            self.server.idle.set()

    def drop(self, stream: ServerStream) -> None:
        """The peer no longer wants the answer: cancel the method."""
        self.finish(stream)
        self._half_closed.discard(stream.id)
        self.server.cancel(stream)

    def _expire(self, stream: ServerStream) -> None:
        stream.deadline_timer = None
        self.fail(stream, MeshError(Code.DEADLINE, "The deadline passed before the answer was ready."))
        self.server.cancel(stream)

    def flush_last(self) -> None:
        """Flush now if no other call is open, else together with those of this turn: saves a lone call a turn."""
        if self.streams:
            self.flush_soon()
        else:
            self.flush()

    def is_congested(self, stream: ServerStream) -> bool:
        """Whether a streaming call has queued enough for now."""
        return self.h2.queued_body_size(stream.id) >= PULL_SIZE_BYTES

    def flushed(self) -> None:
        if self.writers:
            for stream in list(self.writers):
                if stream.wake_writer is not None and not stream.wake_writer.done() and not self.is_congested(stream):
                    stream.wake_writer.set_result(None)
        queued_bytes = self.h2.queued_body_size()
        if queued_bytes or self.unsent_bytes or self._paused:
            self.owe(queued_bytes)
        # One that is taken over may be answered before the next is looked at.
        while self._waiting and self.h2.queued_body_size() <= self.limits.reply_queue_bytes_max:
            stream = self._waiting.pop(next(iter(self._waiting)))
            if not stream.hand_over():
                stream.task = self.loop.create_task(stream.answer(stream.take()))
        if self._half_closed and not self._paused:
            answered = [stream_id for stream_id in self._half_closed if not self.h2.queued_body_size(stream_id)]
            for stream_id in answered:
                self._half_closed.discard(stream_id)
                self.reset(stream_id, _NO_ERROR)
            if answered:
                self.flush_soon()

    # Looking after.

    @property
    def is_quiet(self) -> bool:
        """Whether no call is open and every answer has left this process."""
        return not self.streams and not self.h2.queued_body_size() and not self.transport.get_write_buffer_size()

    @property
    def is_lively(self) -> bool:
        """Whether it has not greeted yet, has calls or unread answers, or had calls since the last look."""
        return bool(
            self.streams
            or self.unsent_bytes
            or not self._is_greeted
            or self._last_stream_id != self._swept_stream_id
            or self.transport.is_closing()
        )

    def sweep(self, now: float) -> None:
        """Close what never greeted, stalls, falls silent, idles or is old; refuse uploads that crawl."""
        if not self.transport.is_closing():
            for stream in list(self.streams.values()):
                if stream.is_uploading and now - stream.opened_at > self.limits.upload_timeout_s:
                    self.fail(stream, MeshError(Code.DEADLINE, "The request took too long to arrive."))
                    self.server.cancel(stream)
        self._swept_stream_id = self._last_stream_id
        buffered_bytes = self.transport.get_write_buffer_size()
        self.owe()
        seen = Seen(
            is_greeted=self._is_greeted,
            calls=len(self.streams),
            last_stream_id=self._last_stream_id,
            owed_bytes=self.unsent_bytes,
            left_bytes=self.sent_bytes - buffered_bytes,
            read_at=self.last_read_at,
        )
        match self.watch.look(now, seen, is_crowded=self.server.is_crowded):
            case Verdict.ABORT:
                self.abort()
            case Verdict.PING:
                self._tell(lambda: self.h2.ping(_KEEPALIVE_PING))
            case Verdict.NOTICE:
                self._tell(self.h2.send_shutdown_notice)
            case Verdict.GOODBYE:
                self.say_goodbye()

    def owe(self, queued_bytes: int | None = None) -> None:
        """Note how much the peer has not read, and make room where all connections together hold too much."""
        if self.is_evicted:
            return
        server = self.server
        unsent_bytes = self.h2.queued_body_size() if queued_bytes is None else queued_bytes
        unsent_bytes += self.transport.get_write_buffer_size()
        server.unsent_bytes += unsent_bytes - self.unsent_bytes
        self.unsent_bytes = unsent_bytes
        if server.unsent_bytes > self.limits.unsent_bytes_max:
            server.evict()

    def _tell(self, say: Callable[[], None]) -> None:
        if self.is_open:
            with suppress(NGH2Error):
                say()
            self.flush()

    async def notify(self, timeout_s: float) -> None:
        """Tell the peer to open no more calls, and wait until it has heard so."""
        if not self.is_open:
            return
        self._notice_heard = self.loop.create_future()
        try:
            self.h2.send_shutdown_notice()
            self.h2.ping(_DRAIN_PING)
        except NGH2Error:
            return
        self.flush()
        await asyncio.wait([self._notice_heard], timeout=timeout_s)

    def say_goodbye(self) -> None:
        """Send GOAWAY: calls in flight are finished, later ones are not accepted; then the connection closes."""
        if self.is_open:
            try:
                self.h2.send_goaway(_NO_ERROR)
            except NGH2Error:
                self.abort()
            else:
                self.flush()
