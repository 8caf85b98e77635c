"""A client's connection: inferences whose head is known are answered here, everything else by aiohttp behind it.

aiohttp makes a task, a stream, a request and a response of each. Here it is bytes in and bytes out. Whatever is not
quite ordinary is handed on as it came, so what HTTP means is said in one place only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from types import CoroutineType
from typing import Any, cast

import msgspec
import numpy as np
from aiohttp import web

from nearcast.errors import Code, MeshError
from nearcast.identity import peer_uri
from nearcast.telemetry import get_logger
from nearcast.transport import eager
from nearcast.transport.json_tensors import Body
from nearcast.transport.peer import peer_name
from nearcast.transport.rest_guard import LINGER_S, RestGuard, Watched, late_body
from nearcast.transport.rest_heads import Head, Heads, body_size, end_of_head
from nearcast.transport.rest_inference import REST_LIMITS, Answer, RestInference, answer_error
from nearcast.transport.seam import Call, Taken
from nearcast.transport.tls_stream import BUFFERS

_ALIGNMENT_BYTES = 64
_SMALL_SIZE_BYTES_MAX = 64 * 1024
KEPT_SIZE_BYTES_MAX = 64 * 1024
"""Of what comes while a request is answered: beyond it nothing is read, and a client that hangs up is not noticed."""
_PHRASES = {each.value: each.phrase.encode() for each in HTTPStatus}
"""Without 499, which no standard names."""


class RestConnection(asyncio.BufferedProtocol):
    """Between a transport and the protocol of aiohttp that it was made with.

    Args:
        beyond: that protocol.
        transport: the connection.
        watched: its entry at the guard.
        guard: bounds what bodies take.
        heads: what is known.
        inference: answers.
    """

    __slots__ = (
        "_beyond", "_deadline", "_filled", "_guard", "_head", "_head_bytes", "_heads", "_identity", "_inference",
        "_is_busy", "_kept", "_left", "_loop", "_peer", "_received", "_room", "_taken", "_timer", "_transport",
        "_unread", "_watched",
    )  # fmt: skip

    def __init__(
        self,
        beyond: web.RequestHandler,
        transport: asyncio.Transport,
        watched: Watched,
        *,
        guard: RestGuard,
        heads: Heads,
        inference: RestInference,
    ) -> None:
        self._beyond = beyond
        self._transport = transport
        self._watched = watched
        self._guard = guard
        self._heads = heads
        self._inference = inference
        self._loop = asyncio.get_running_loop()
        self._received = BUFFERS.received
        self._identity: str | None = None
        self._peer = ""
        # Bytes of a body that aiohttp has yet to get; None = who knows where its next head begins.
        self._left: int | None = 0
        # A body that is on its way to us.
        self._head: Head | None = None
        self._head_bytes = b""
        self._deadline: float | None = None
        self._room: memoryview | None = None
        self._filled = 0
        self._timer: asyncio.TimerHandle | None = None
        # A request that is being answered here, and what came meanwhile.
        self._is_busy = False
        self._taken: Taken | None = None
        self._kept = b""
        # Bytes of a body that was refused: they are dropped, then the connection closes.
        self._unread: int | None = None

    # asyncio.BufferedProtocol.

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._received if self._room is None else self._room[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._room is None:
            self._receive(bytes(self._received[:nbytes]))
        else:
            self._fill(self._room, nbytes)

    def eof_received(self) -> bool | None:
        self._beyond.eof_received()
        return None

    def pause_writing(self) -> None:
        self._beyond.pause_writing()

    def resume_writing(self) -> None:
        self._beyond.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._room = None
        self._kept = b""
        if self._taken is not None:
            # Nobody waits for the answer any more.
            self._taken.cancel()
        self._guard.release(self._watched)
        self._beyond.connection_lost(exc)

    # Receiving.

    def _receive(self, data: bytes) -> None:
        if self._is_busy:
            self._keep(data)
        elif self._unread is not None:
            self._drop(self._unread - len(data))
        elif self._left == 0:
            end = data.find(b"\r\n\r\n") + 4
            head_bytes = data[:end]
            head = self._heads.find(head_bytes)
            if head is None or not self._take(head, head_bytes, data[end:]):
                self._pass_on(data)
        else:
            if self._left is not None:
                self._left = self._left - len(data) if len(data) <= self._left else None
            self._beyond.data_received(data)

    def _keep(self, data: bytes) -> None:
        """For after the answer. Reading goes on, or a client that hangs up would not be noticed."""
        self._kept += data
        try:
            self._guard.hold(self._watched, len(data))
        except MeshError:
            self._transport.abort()
            return
        if len(self._kept) > KEPT_SIZE_BYTES_MAX:
            self._transport.pause_reading()

    def _drop(self, unread: int) -> None:
        self._unread = unread
        if unread <= 0:
            self._transport.close()

    def _take(self, head: Head, head_bytes: bytes, body: bytes) -> bool:
        """Answer a request here, if nothing speaks against it."""
        missing = head.body_size_bytes - len(body)
        if missing < 0 or not _is_idle(self._beyond):
            return False
        if missing and not self._guard.reserve(self._watched, head.body_size_bytes):
            return False
        try:
            deadline = self._inference.open(head.ask)
            self._guard.hold(self._watched, len(body))
        except MeshError:
            self._guard.release(self._watched)
            return False
        self._guard.enter(self._watched)
        # It would ring for a connection that looks idle to aiohttp; the guard looks after that.
        self._beyond.keep_alive(val=True)
        if not missing:
            self._start(head, body, deadline)
            return True
        self._head, self._head_bytes, self._deadline = head, head_bytes, deadline
        self._room = _make_room(head)
        self._filled = len(body)
        self._room[: self._filled] = body
        self._timer = self._loop.call_later(REST_LIMITS.body_timeout_s, self._expire)
        return True

    def _fill(self, room: memoryview, nbytes: int) -> None:
        self._filled += nbytes
        try:
            self._guard.hold(self._watched, nbytes)
        except MeshError:
            data = self._head_bytes + bytes(room[: self._filled])
            self._end_filling()
            self._guard.leave(self._watched)
            self._pass_on(data)
            return
        head = self._head
        if self._filled == len(room) and head is not None:
            self._end_filling()
            self._start(head, room.toreadonly() if len(room) > _SMALL_SIZE_BYTES_MAX else bytes(room), self._deadline)

    def _end_filling(self) -> None:
        self._room = self._head = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._unread = 0 if self._room is None else len(self._room) - self._filled
        self._end_filling()
        self._guard.leave(self._watched)
        answer = answer_error(late_body(REST_LIMITS.body_timeout_s))
        self._send(msgspec.structs.replace(answer, fields=(*answer.fields, (b"Connection", b"close"))))
        # A client that still sends into a closed connection would lose the answer.
        self._timer = self._loop.call_later(LINGER_S, self._transport.close)

    def _pass_on(self, data: bytes) -> None:
        """Give aiohttp what begins with a head, and learn what it makes of it."""
        beyond = self._beyond
        messages = beyond._messages  # noqa: SLF001 (it tells nobody else what it parsed)
        count = len(messages)
        end = end_of_head(data)
        self._left = None
        beyond.data_received(data)
        if not end or len(messages) != count + 1:
            return
        message: Any = messages[-1][0]
        size_bytes = body_size(message)
        if size_bytes is None or end + size_bytes < len(data):
            return
        self._left = end + size_bytes - len(data)
        self._heads.learn(data[:end], message, size_bytes)

    # Answering.

    def _start(self, head: Head, body: Body, deadline: float | None) -> None:
        if self._identity is None:
            self._identity = peer_uri(self._transport.get_extra_info("ssl_object"))
            self._peer = peer_name(self._transport)
        self._is_busy = True
        call = Call(method=head.path, identity=self._identity, peer=self._peer)
        try:
            begun = self._inference.begin(head.ask, body, deadline, call, self._tell)
        except MeshError as error:
            self._tell(answer_error(error))
        except Exception:  # noqa: BLE001 - one request may fail, never the process
            self._tell(answer_failure(head.path))
        else:
            if isinstance(begun, CoroutineType):
                task = eager.start(self._answer(begun, head.path), self._loop)
                self._taken = cast("Taken | None", task)
            elif self._is_busy:
                self._taken = cast("Taken", begun)

    async def _answer(self, begun: Coroutine[Any, Any, Answer], path: str) -> None:
        try:
            answer = await begun
        except asyncio.CancelledError:
            # The client has gone, or will wait in vain.
            self._guard.leave(self._watched)
            self._transport.abort()
            raise
        except MeshError as error:
            answer = answer_error(error)
        except Exception:  # noqa: BLE001 - one request may fail, never the process
            answer = answer_failure(path)
        self._tell(answer)

    def _tell(self, answer: Answer) -> None:
        self._guard.leave(self._watched)
        self._taken = None
        try:
            self._send(answer)
        except Exception:  # noqa: BLE001 - it could not be written, and no other may take its place
            get_logger(__name__).exception("rest_answer_failed")
            self._transport.abort()
            return
        if self._kept:
            self._loop.call_soon(self._go_on)
        else:
            self._is_busy = False

    def _go_on(self) -> None:
        kept, self._kept = self._kept, b""
        self._is_busy = False
        self._guard.release(self._watched)
        if not self._transport.is_closing():
            self._transport.resume_reading()
            self._receive(kept)

    def _send(self, answer: Answer) -> None:
        if not self._transport.is_closing():
            self._transport.write(write_answer(answer, int(self._inference.wall())))


def answer_failure(path: str) -> Answer:
    """What a client is told of the exception that is being handled; the log says what it was."""
    get_logger(__name__).exception("rest_request_failed", path=path[:200])
    return answer_error(MeshError(Code.INTERNAL, "The server failed to answer this request; its log says why."))


def write_answer(answer: Answer, wall_s: int) -> bytes:
    """An answer as it travels."""
    pieces = answer.pieces
    head = _write_head(answer.code, answer.kind, wall_s)
    lines = b"".join([b"%b: %b\r\n" % field for field in answer.fields])
    return b"".join((head, lines, b"Content-Length: %d\r\n\r\n" % sum(map(len, pieces)), *pieces))


@lru_cache(maxsize=16)
def _write_head(code: int, kind: bytes, wall_s: int) -> bytes:
    date = formatdate(wall_s, usegmt=True).encode()
    return b"HTTP/1.1 %d %b\r\nContent-Type: %b\r\nDate: %b\r\n" % (code, _PHRASES.get(code, b""), kind, date)


def _make_room(head: Head) -> memoryview:
    """Where a body goes as it comes. Its pages are not touched before, and the first tensor in it is aligned."""
    size_bytes = head.body_size_bytes
    found = np.empty(size_bytes + _ALIGNMENT_BYTES, np.uint8)
    start = -(found.ctypes.data + (head.ask.json_size_bytes or 0)) % _ALIGNMENT_BYTES
    return found.data[start : start + size_bytes]


def _is_idle(beyond: web.RequestHandler) -> bool:
    """Whether it has answered everything and waits for the next request."""
    waiter = beyond._waiter  # noqa: SLF001 (it tells nobody else)
    return waiter is not None and not waiter.done() and not beyond._messages and not beyond.writing_paused  # noqa: SLF001
