"""Which calls of a client's connection may be open at once: the server's limit, and a queue for those above it."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from nearcast.errors import Code
from nearcast.transport.seam import CallError

_STREAMS_BEFORE_SETTINGS = 100
# Streaming calls may last for hours: some slots stay free of them, or unary calls would wait that long.
_STREAMING_SHARE = 0.75


class Slots:
    """Counts the calls of one connection. The library itself would queue what is too much, and say nothing.

    Args:
        loop: the running loop.
        address: for messages.
    """

    __slots__ = ("_address", "_is_closed", "_loop", "_waiters", "streaming", "total", "used")

    def __init__(self, loop: asyncio.AbstractEventLoop, address: str) -> None:
        self.total = _STREAMS_BEFORE_SETTINGS
        self.used = 0
        self.streaming = 0
        self._loop = loop
        self._address = address
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._is_closed = False

    @property
    def is_free(self) -> bool:
        """Whether one more call may be sent."""
        return self.used < self.total

    @property
    def may_stream(self) -> bool:
        """Whether one more streaming call leaves room for unary calls."""
        return self.streaming < self.total * _STREAMING_SHARE

    def allow(self, total: int) -> None:
        """The server has said how many calls may be open."""
        self.total = total
        for _ in range(min(total, len(self._waiters))):
            self._wake()

    def take(self, *, streaming: bool = False) -> None:
        """A call was sent."""
        self.used += 1
        self.streaming += streaming

    def give_back(self, *, streaming: bool = False) -> None:
        """A call has ended."""
        self.used -= 1
        self.streaming -= streaming
        if self._waiters:
            self._wake()

    def close(self) -> None:
        """No call will be sent any more: those that wait must look elsewhere."""
        self._is_closed = True
        while self._waiters:
            self._wake()

    async def wait(self, ends_at: float) -> None:
        """Wait, in order, until a call may be sent or the connection takes no more.

        Raises:
            CallError: DEADLINE; the call was not sent.
        """
        while not self._is_closed and not self.is_free:
            waiter = self._loop.create_future()
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
                elif self._is_closed or self.is_free:
                    self._wake()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
