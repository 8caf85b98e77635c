"""The client's end of an ngh2 connection: calls in flight and what becomes of them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import cast

from ngh2 import (
    DataReceived,
    Event,
    GoAwayReceived,
    NGH2Error,
    ResponseReceived,
    Role,
    SettingsReceived,
    StreamClosed,
    StreamReset,
    TrailersReceived,
)

from nearcast.errors import Code, MeshError
from nearcast.transport.ngh2_call import ClientCall, PassedCall, StreamCall, UnaryCall
from nearcast.transport.ngh2_connection import (
    FRAME_SIZE_BYTES_MAX,
    PULL_SIZE_BYTES,
    STREAM_WINDOW_BYTES,
    Ngh2Connection,
)
from nearcast.transport.ngh2_headers import response_problem
from nearcast.transport.ngh2_slots import Slots
from nearcast.transport.seam import CallError, Fields, Limits, Receiver

_SECOND_LOOK_S = 0.02
_CANCEL = 8
_REFUSED_STREAM = 7
_ENHANCE_YOUR_CALM = 11
# RST_STREAM codes, by gRPC over HTTP/2; those not listed are INTERNAL.
_FROM_RESET = {
    _CANCEL: Code.CANCELLED,
    _REFUSED_STREAM: Code.UNAVAILABLE,
    _ENHANCE_YOUR_CALM: Code.OVERLOADED,
    12: Code.FORBIDDEN,
}


class ClientConnection(Ngh2Connection):
    """A connection to a server.

    Args:
        limits: bounds.
        loop: the running loop.
        address: for messages.
        on_retire: told when no further calls may be sent (GOAWAY).
        on_lost: told when the connection is gone.
    """

    __slots__ = (
        "_address",
        "_cap",
        "_is_probing",
        "_is_retired",
        "_keepalive",
        "_on_lost",
        "_on_retire",
        "_writers",
        "calls",
        "greeted",
        "slots",
    )

    def __init__(
        self,
        limits: Limits,
        loop: asyncio.AbstractEventLoop,
        address: str,
        *,
        on_retire: Callable[[ClientConnection], None],
        on_lost: Callable[[ClientConnection], None],
    ) -> None:
        super().__init__(Role.CLIENT, limits, loop)
        self.calls: dict[int, ClientCall] = {}
        self.greeted: asyncio.Future[None] = loop.create_future()
        self._address = address
        self._on_retire = on_retire
        self._on_lost = on_lost
        self._is_retired = False
        self.slots = Slots(loop, address)
        self._writers: dict[int, asyncio.Future[None]] = {}
        # One timer at a time: until the peer may be asked for a sign of life, or until it must have given one.
        self._keepalive: asyncio.TimerHandle | None = None
        self._is_probing = False
        # Wakes for the oldest call without a deadline of its own; those share a cap, so one timer serves all.
        self._cap: asyncio.TimerHandle | None = None

    def settings(self) -> Mapping[int, int]:
        return {2: 0, 4: STREAM_WINDOW_BYTES, 5: FRAME_SIZE_BYTES_MAX, 6: self.limits.metadata_size_bytes_max}

    @property
    def is_usable(self) -> bool:
        """Whether a new call may be sent."""
        return not self._closing and not self._is_retired

    def send(self, fields: Fields, pieces: Sequence[bytes], deadline: float | None) -> UnaryCall:
        """Queue a unary call. Await its `future`, and `abandon` it if nobody waits any more.

        Args:
            fields: the call's header fields.
            pieces: the framed message.
            deadline: when the call is reset; None = after `call_timeout_s_max`.

        Raises:
            NGH2Error: if the connection takes no more calls.
        """
        stream_id = self._send(fields, pieces)
        now = time.monotonic()
        ends_at = now + self.limits.call_timeout_s_max if deadline is None else deadline
        call = UnaryCall(self, stream_id, ends_at)
        self._follow(call, now, deadline)
        if deadline is None and self._cap is None:
            self._cap = self.loop.call_later(ends_at - now, self._expire_oldest)
        return call

    def pass_on(self, fields: Fields, pieces: Sequence[bytes], now: float, receiver: Receiver) -> PassedCall | None:
        """Queue a unary call for a receiver, who keeps its deadline and abandons it then. None = not now.

        Raises:
            NGH2Error: if the connection takes no more calls.
        """
        slots = self.slots
        if self._closing or self._is_retired or slots.used >= slots.total:
            return None
        stream_id = self._send(fields, pieces)
        timeout_s = self.limits.call_timeout_s_max
        call = self.calls[stream_id] = PassedCall(self, stream_id, now + timeout_s, receiver)
        slots.used += 1
        if self._cap is None:
            self._cap = self.loop.call_later(timeout_s, self._expire_oldest)
        if self._keepalive is None:
            self._keepalive = self.loop.call_later(self.limits.keepalive_s, self._keep_alive)
        if len(self.calls) == 1:
            self.flush()
        elif not self._flush_pending:
            self.flush_soon()
        return call

    def _send(self, fields: Fields, pieces: Sequence[bytes]) -> int:
        h2 = self.h2
        stream_id = h2.send_request(fields)
        if len(pieces) == 1:
            h2.send_data(stream_id, pieces[0], end_stream=True)
            return stream_id
        last = len(pieces) - 1
        for index, piece in enumerate(pieces):
            h2.send_data(stream_id, piece, end_stream=index == last)
        return stream_id

    def open(self, fields: Fields, deadline: float | None) -> StreamCall:
        """Queue the headers of a streaming call; `send` its messages, and `close` it in the end.

        Raises:
            NGH2Error: if the connection takes no more calls.
        """
        call = StreamCall(self, self.h2.send_request(fields), deadline)
        self._follow(call, time.monotonic(), deadline)
        return call

    def _follow(self, call: ClientCall, now: float, deadline: float | None) -> None:
        self.calls[call.id] = call
        self.slots.take(streaming=isinstance(call, StreamCall))
        if deadline is not None:
            call.timer = self.loop.call_later(max(0.0, deadline - now), self._expire, call)
        if self._keepalive is None:
            self._keepalive = self.loop.call_later(self.limits.keepalive_s, self._keep_alive)
        if len(self.calls) == 1:
            # A lone call need not wait for others of this turn.
            self.flush()
        else:
            self.flush_soon()

    def _expire_oldest(self) -> None:
        self._cap = None
        now = time.monotonic()
        for call in [call for call in self.calls.values() if call.timer is None and call.ends_at < math.inf]:
            if call.ends_at > now:
                self._cap = self.loop.call_later(call.ends_at - now, self._expire_oldest)
                return
            self._expire(call)

    def _expire(self, call: ClientCall) -> None:
        call.fail(CallError(Code.DEADLINE, f"{self._address} did not answer before the deadline.", sent=True))
        self.abandon(call)
        self.suspect(call)

    def suspect(self, call: ClientCall) -> None:
        """Ask for a sign of life if nothing was heard since a late call began: the peer may be gone without a word."""
        if self.last_read_at <= call.started_at and self.is_open:
            self._probe()

    # A peer that lost power sends no FIN. Whether it is there is asked only while calls wait for it.

    def _keep_alive(self) -> None:
        self._keepalive = None
        quiet_s = self.loop.time() - self.last_read_at
        if not self.calls or self._closing:
            return
        if quiet_s >= self.limits.keepalive_s:
            self._probe()
        else:
            self._keepalive = self.loop.call_later(self.limits.keepalive_s - quiet_s, self._keep_alive)

    def _probe(self) -> None:
        """Ask for a sign of life, and give the connection up if there is none in time."""
        if self._is_probing:
            return
        self._is_probing = True
        if self._keepalive is not None:
            self._keepalive.cancel()
        with suppress(NGH2Error):
            self.h2.ping(b"nc-alive")
            self.flush_soon()
        self._keepalive = self.loop.call_later(self.limits.keepalive_timeout_s, self._judge, self.last_read_at)

    def _judge(self, read_at: float, looks: int = 1) -> None:
        if self.last_read_at > read_at:
            self._is_probing = False
            self._keep_alive()
        elif looks > 1:
            self.abort()
        else:
            # If it was this loop that was busy, the answer is waiting to be read.
            self._keepalive = self.loop.call_later(_SECOND_LOOK_S, self._judge, read_at, looks + 1)

    def abandon(self, call: ClientCall) -> None:
        """Reset a call whose answer nobody waits for; harmless if it has ended."""
        if self._forget(call.id) is not None:
            self._cancel(call.id)

    def _cancel(self, stream_id: int) -> None:
        if self.is_open:
            self.reset(stream_id, _CANCEL)
            self.flush_soon()

    def _forget(self, stream_id: int) -> ClientCall | None:
        call = self.calls.pop(stream_id, None)
        if call is not None:
            if call.timer is not None:
                call.timer.cancel()
            self.slots.give_back(streaming=isinstance(call, StreamCall))
            if self._is_retired and not self.calls:
                self.loop.call_soon(self.shut)
        return call

    # Back-pressure of streaming calls: the peer's windows and the socket decide how much is taken from their callers.

    async def wait_writable(self, stream_id: int) -> None:
        """Wait until a streaming call may queue more. Its task is cancelled if the call ends meanwhile."""
        while self.is_open and self.h2.queued_body_size(stream_id) >= PULL_SIZE_BYTES:
            waker = self._writers[stream_id] = self.loop.create_future()
            try:
                await waker
            finally:
                del self._writers[stream_id]

    def flushed(self) -> None:
        if self._is_retired and self.calls:
            # Calls queued in the turn in which the server's GOAWAY came: the library drops them as it is flushed.
            self.handle_events(self.h2.events())
        for stream_id, waker in self._writers.items():
            if not waker.done() and self.h2.queued_body_size(stream_id) < PULL_SIZE_BYTES:
                waker.set_result(None)

    # Receiving.

    def handle_events(self, events: list[Event]) -> None:
        for event in events:
            # The classes are final; asking for them by name is several times as quick as isinstance.
            kind = type(event)
            if kind is DataReceived:
                self._receive(cast("DataReceived", event))
            elif kind is ResponseReceived:
                self._begin(cast("ResponseReceived", event))
            elif kind is TrailersReceived:
                event = cast("TrailersReceived", event)
                self._conclude(event.stream_id, event.headers)
            elif kind is StreamClosed or kind is StreamReset:
                event = cast("StreamClosed", event)
                self._closed(event.stream_id, event.error_code)
            elif isinstance(event, SettingsReceived):
                self._greet(event.settings)
            elif isinstance(event, GoAwayReceived):
                self._go_away(event.last_stream_id)

    def _greet(self, settings: Mapping[int, int]) -> None:
        if 3 in settings or not self.greeted.done():
            # The server's number, but never more than we would serve ourselves.
            total_max = self.limits.concurrent_streams_max
            self.slots.allow(min(settings.get(3, total_max), total_max))
        if not self.greeted.done():
            self.greeted.set_result(None)

    def _begin(self, event: ResponseReceived) -> None:
        call = self.calls.get(event.stream_id)
        if call is None:
            return
        problem = response_problem(event.headers)
        if problem is not None:
            call.fail(problem)
            self.abandon(call)
        elif event.end_stream:
            self._conclude(event.stream_id, event.headers)

    def _receive(self, event: DataReceived) -> None:
        call = self.calls.get(event.stream_id)
        if call is None:
            if event.data:
                self.acknowledge(len(event.data), event.stream_id)
            return
        try:
            call.receive(event.data)
        except MeshError as error:
            call.fail(CallError(error.code, f"The answer cannot be read: {error.message}", sent=True))
            self.abandon(call)

    def _conclude(self, stream_id: int, fields: Fields) -> None:
        call = self._forget(stream_id)
        if call is None:
            return
        if not call.has_sent_all:
            # The peer needs no more of it.
            self._cancel(stream_id)
        call.conclude(fields)

    def _closed(self, stream_id: int, error_code: int) -> None:
        call = self._forget(stream_id)
        if call is None:
            return
        if error_code == _REFUSED_STREAM:
            call.is_refused = True
            call.fail(CallError(Code.UNAVAILABLE, f"{self._address} did not take the call.", sent=False))
            return
        code = _FROM_RESET.get(error_code, Code.INTERNAL)
        call.fail(CallError(code, f"{self._address} reset the call (HTTP/2 code {error_code}).", sent=True))

    def _go_away(self, last_stream_id: int) -> None:
        self.retire()
        for stream_id in [stream_id for stream_id in self.calls if stream_id > last_stream_id]:
            self._closed(stream_id, _REFUSED_STREAM)

    # Closing.

    def retire(self) -> None:
        """Send no more calls; close when those in flight are done."""
        if not self._is_retired:
            self._is_retired = True
            self._on_retire(self)
            self.slots.close()
            if not self.calls:
                self.loop.call_soon(self.shut)

    def shut(self) -> None:
        """Close now: calls in flight fail at once."""
        if self.transport is None:
            return
        if self.is_open:
            try:
                self.h2.send_goaway(0)
            except NGH2Error:
                self.abort()
            else:
                self.flush()
                self.close()
        self.lost(None)

    def lost(self, error: BaseException | None) -> None:
        self._is_retired = True
        for timer in (self._keepalive, self._cap, *(call.timer for call in self.calls.values())):
            if timer is not None:
                timer.cancel()
        self._keepalive = self._cap = None
        if not self.greeted.done():
            self.greeted.set_exception(error or ConnectionResetError("the server closed the connection"))
            self.greeted.exception()
        for call in list(self.calls.values()):
            call.fail(CallError(Code.UNAVAILABLE, f"The connection to {self._address} was lost.", sent=True))
        self.calls.clear()
        self.slots.close()
        self._on_lost(self)
