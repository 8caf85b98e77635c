"""The client's end of an ngh2 connection: calls in flight and what becomes of them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

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
from nearcast.transport.call_status import call_error
from nearcast.transport.ngh2_connection import FRAME_SIZE_BYTES_MAX, STREAM_WINDOW_BYTES, Ngh2Connection
from nearcast.transport.ngh2_framing import MessageReader, whole_message
from nearcast.transport.ngh2_headers import Fields, read_trailers, response_problem
from nearcast.transport.seam import CallError, Limits, Reply

_STREAMS_BEFORE_SETTINGS = 100
_PROBE_TIMEOUT_S = 2.0
_CANCEL = 8
# A union would be built anew for each event.
_ENDED = (StreamReset, StreamClosed)
_REFUSED_STREAM = 7
_ENHANCE_YOUR_CALM = 11
# RST_STREAM codes, by gRPC over HTTP/2; those not listed are INTERNAL.
_FROM_RESET = {
    _CANCEL: Code.CANCELLED,
    _REFUSED_STREAM: Code.UNAVAILABLE,
    _ENHANCE_YOUR_CALM: Code.OVERLOADED,
    12: Code.FORBIDDEN,
}


class ClientCall:
    """One call in flight."""

    __slots__ = ("ends_at", "future", "id", "is_refused", "message", "reader", "started_at", "timer")

    def __init__(self, stream_id: int, future: asyncio.Future[Reply], started_at: float, ends_at: float) -> None:
        self.id = stream_id
        self.future = future
        self.started_at = started_at
        self.ends_at = ends_at
        self.timer: asyncio.TimerHandle | None = None
        self.is_refused = False
        self.message: bytes | None = None
        self.reader: MessageReader | None = None

    def fail(self, error: CallError) -> None:
        """End the call with an error, unless it has ended."""
        if not self.future.done():
            self.future.set_exception(error)


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
        "_is_retired",
        "_on_lost",
        "_on_retire",
        "_probe",
        "_slots",
        "_waiters",
        "calls",
        "greeted",
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
        self._slots = _STREAMS_BEFORE_SETTINGS
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._probe: asyncio.TimerHandle | None = None
        # Wakes for the oldest call without a deadline of its own; those share a cap, so one timer serves all.
        self._cap: asyncio.TimerHandle | None = None

    def settings(self) -> Mapping[int, int]:
        return {2: 0, 4: STREAM_WINDOW_BYTES, 5: FRAME_SIZE_BYTES_MAX, 6: self.limits.metadata_size_bytes_max}

    @property
    def is_usable(self) -> bool:
        """Whether a new call may be sent."""
        return not self._closing and not self._is_retired

    @property
    def has_slot(self) -> bool:
        """Whether the server's limit of concurrent streams allows one more; the library would queue it silently."""
        return len(self.calls) < self._slots

    async def wait_for_slot(self, ends_at: float) -> None:
        """Wait, in order, until a call may be sent or the connection cannot be used any more.

        Raises:
            CallError: DEADLINE; the call was not sent.
        """
        while self.is_usable and not self.has_slot:
            waiter = self.loop.create_future()
            self._waiters.append(waiter)
            try:
                async with asyncio.timeout(max(0.0, ends_at - time.monotonic())):
                    await waiter
            except TimeoutError as error:
                raise CallError(
                    Code.DEADLINE, f"The deadline passed before {self._address} had a free stream."
                ) from error
            finally:
                if not waiter.done() or waiter.cancelled():
                    if waiter in self._waiters:
                        self._waiters.remove(waiter)
                elif not self.is_usable or self.has_slot:
                    self._wake_waiter()

    def send(self, fields: Fields, pieces: Sequence[bytes], deadline: float | None) -> ClientCall:
        """Queue a call. Await its `future`, and `abandon` it if nobody waits any more.

        Args:
            fields: the call's header fields.
            pieces: the framed message.
            deadline: when the call is reset; None = after `call_timeout_s_max`.

        Raises:
            NGH2Error: if the connection takes no more calls.
        """
        h2 = self.h2
        stream_id = h2.send_request(fields)
        last = len(pieces) - 1
        for index, piece in enumerate(pieces):
            h2.send_data(stream_id, piece, end_stream=index == last)
        now = time.monotonic()
        ends_at = now + self.limits.call_timeout_s_max if deadline is None else deadline
        call = ClientCall(stream_id, self.loop.create_future(), self.last_read_at, ends_at)
        self.calls[stream_id] = call
        if deadline is not None:
            call.timer = self.loop.call_later(max(0.0, ends_at - now), self._expire, call)
        elif self._cap is None:
            self._cap = self.loop.call_later(ends_at - now, self._expire_oldest)
        if len(self.calls) == 1:
            # A lone call need not wait for others of this turn.
            self.flush()
        else:
            self.flush_soon()
        return call

    def _expire_oldest(self) -> None:
        self._cap = None
        now = time.monotonic()
        for call in [call for call in self.calls.values() if call.timer is None]:
            if call.ends_at > now:
                self._cap = self.loop.call_later(call.ends_at - now, self._expire_oldest)
                return
            self._expire(call)

    def _expire(self, call: ClientCall) -> None:
        call.fail(CallError(Code.DEADLINE, f"{self._address} did not answer before the deadline.", sent=True))
        self.abandon(call)
        if self.last_read_at <= call.started_at and self._probe is None and self.is_open:
            # Nothing was heard since the call began: the peer may be gone without a word.
            read_at = self.last_read_at
            with suppress(NGH2Error):
                self.h2.ping(b"nc-alive")
                self.flush_soon()
            self._probe = self.loop.call_later(_PROBE_TIMEOUT_S, self._give_up, read_at)

    def _give_up(self, read_at: float) -> None:
        self._probe = None
        if self.last_read_at <= read_at:
            self.abort()

    def abandon(self, call: ClientCall) -> None:
        """Reset a call whose answer nobody waits for; harmless if it has ended."""
        if self._forget(call.id) is not None and self.is_open:
            self.reset(call.id, _CANCEL)
            self.flush_soon()

    def _forget(self, stream_id: int) -> ClientCall | None:
        call = self.calls.pop(stream_id, None)
        if call is not None:
            if call.timer is not None:
                call.timer.cancel()
            if self._waiters:
                self._wake_waiter()
            if self._is_retired and not self.calls:
                self.loop.call_soon(self.shut)
        return call

    def _wake_waiter(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    # Receiving.

    def handle_events(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, DataReceived):
                self._receive(event)
            elif isinstance(event, ResponseReceived):
                self._begin(event)
            elif isinstance(event, TrailersReceived):
                self._conclude(event.stream_id, event.headers)
            elif isinstance(event, _ENDED):
                self._closed(event.stream_id, event.error_code)
            elif isinstance(event, SettingsReceived):
                self._greet(event.settings)
            elif isinstance(event, GoAwayReceived):
                self._go_away(event.last_stream_id)

    def _greet(self, settings: Mapping[int, int]) -> None:
        if 3 in settings or not self.greeted.done():
            # The server's number, but never more than we would serve ourselves.
            self._slots = min(settings.get(3, self.limits.concurrent_streams_max), self.limits.concurrent_streams_max)
            for _ in range(min(self._slots, len(self._waiters))):
                self._wake_waiter()
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
        data, stream_id = event.data, event.stream_id
        if data:
            self.acknowledge(len(data), stream_id)
        call = self.calls.get(stream_id)
        if call is None:
            return
        try:
            if call.reader is None:
                message = whole_message(data) if call.message is None else None
                if message is not None and len(message) <= self.limits.message_size_bytes_max:
                    call.message = message
                    return
                call.reader = MessageReader(self.limits.message_size_bytes_max)
            for message in call.reader.feed(data):
                if call.message is not None:
                    raise MeshError(Code.INTERNAL, "The peer sent more than one message for a unary call.")
                call.message = message
        except MeshError as error:
            call.fail(CallError(error.code, f"The answer cannot be read: {error.message}", sent=True))
            self.abandon(call)

    def _conclude(self, stream_id: int, fields: Fields) -> None:
        call = self._forget(stream_id)
        if call is None or call.future.done():
            return
        number, message, trailers = read_trailers(fields)
        if number == 0:
            if call.message is None:
                error = CallError(Code.INTERNAL, "The peer answered OK without a message.", sent=True)
                call.fail(error)
            else:
                call.future.set_result(Reply((call.message,), tuple(trailers)))
            return
        if number is None:
            call.fail(CallError(Code.INTERNAL, "The peer's answer has no gRPC status.", sent=True))
            return
        call.fail(call_error(number, message, trailers))

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
            while self._waiters:
                self._wake_waiter()
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
        for timer in (self._probe, self._cap, *(call.timer for call in self.calls.values())):
            if timer is not None:
                timer.cancel()
        self._probe = self._cap = None
        if not self.greeted.done():
            self.greeted.set_exception(error or ConnectionResetError("the server closed the connection"))
            self.greeted.exception()
        for call in list(self.calls.values()):
            call.fail(CallError(Code.UNAVAILABLE, f"The connection to {self._address} was lost.", sent=True))
        self.calls.clear()
        while self._waiters:
            self._wake_waiter()
        self._on_lost(self)
