"""A stream of which only the newest frame counts (`nc-latest`): one in work, at most one waiting, older ones let go.

For cameras: what was seen before the latest frame is of no use any more. A frame that waits is replaced by the next one
of its stream and answered at once as superseded, so that each frame has exactly one answer and nothing queues up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.transport.seam import Reply

REPLIES_MAX = 16
"""Answers of one stream that its client has not read, beyond which no more frames are read."""

F = TypeVar("F")


class Mailbox(Generic[F]):
    """Which frame is in work and which one waits. Pure."""

    __slots__ = ("_is_busy", "waiting")

    def __init__(self) -> None:
        self._is_busy = False
        self.waiting: F | None = None

    @property
    def is_idle(self) -> bool:
        """Nothing is in work, so nothing waits."""
        return not self._is_busy

    def put(self, frame: F) -> tuple[F | None, F | None]:
        """A frame arrived: the one to start now, if any, and the one that was superseded, if any."""
        if not self._is_busy:
            self._is_busy = True
            return frame, None
        superseded, self.waiting = self.waiting, frame
        return None, superseded

    def drop(self, frame: F) -> bool:
        """Forget a frame that waits; False if it waits no longer."""
        if self.waiting is not frame:
            return False
        self.waiting = None
        return True

    def finish(self) -> F | None:
        """The frame in work is answered: the one to start now, if any."""
        frame, self.waiting = self.waiting, None
        self._is_busy = frame is not None
        return frame


class Frame(msgspec.Struct, frozen=True, eq=False):
    """One message of a stream: its deadline in the loop's monotonic seconds, what runs it, what says why it was not.

    `answer` raises MeshError.
    """

    deadline: float | None
    answer: Callable[[], Awaitable[Reply]]
    fail: Callable[[MeshError], Reply]


class LatestStream:
    """The shell of one stream's mailbox. `read` makes a frame of a message, or its answer if it is none."""

    def __init__(self, read: Callable[[bytes], Frame | Reply]) -> None:
        self._read = read
        self._mailbox: Mailbox[Frame] = Mailbox()
        self._replies: deque[Reply] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, bodies: AsyncIterator[bytes]) -> AsyncIterator[Reply]:
        """Answers as they come: a frame that is superseded is answered before the one in work."""
        reader = asyncio.get_running_loop().create_task(self._listen(bodies))
        try:
            while True:
                while self._replies:
                    yield self._replies.popleft()
                    self._room.set()
                if self._worker is not None and self._worker.done():
                    self._worker.result()
                if reader.done() and self._mailbox.is_idle:
                    reader.result()
                    return
                self._changed.clear()
                await self._changed.wait()
        finally:
            self._stop_timer()
            tasks = [task for task in (reader, self._worker) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self, bodies: AsyncIterator[bytes]) -> None:
        try:
            async for body in bodies:
                frame = self._read(body)
                if isinstance(frame, Reply):
                    self._reply(frame)
                else:
                    self._put(frame)
                while len(self._replies) >= REPLIES_MAX:
                    self._room.clear()
                    await self._room.wait()
        finally:
            self._changed.set()

    def _put(self, frame: Frame) -> None:
        start, superseded = self._mailbox.put(frame)
        if start is not None:
            self._worker = asyncio.get_running_loop().create_task(self._work(start))
            return
        self._stop_timer()
        if frame.deadline is not None:
            self._timer = asyncio.get_running_loop().call_at(frame.deadline, self._expire, frame)
        if superseded is not None:
            self._reply(superseded.fail(MeshError(Code.SUPERSEDED, "A newer frame of this stream took its place.")))

    async def _work(self, frame: Frame | None) -> None:
        try:
            while frame is not None:
                try:
                    reply = await frame.answer()
                except MeshError as error:
                    reply = frame.fail(error)
                self._stop_timer()
                frame = self._mailbox.finish()
                self._reply(reply)
        finally:
            self._changed.set()

    def _expire(self, frame: Frame) -> None:
        if self._mailbox.drop(frame):
            self._reply(frame.fail(MeshError(Code.DEADLINE, "The deadline passed while an earlier frame was in work.")))

    def _reply(self, reply: Reply) -> None:
        self._replies.append(reply)
        self._changed.set()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
