"""Messages of one streaming call on their way to whoever reads them. Pure: says how much window to give back."""

from __future__ import annotations

from collections import deque

from nearcast.errors import Code, MeshError
from nearcast.transport.ngh2_framing import MessageReader
from nearcast.transport.seam import Limits

WAITING_SIZE_BYTES_MAX = 256 * 1024
"""Whole messages that may wait before the peer's window stays shut."""


class Inbox:
    """Bounded by flow control: what waits unread keeps the peer from sending more.

    At most `WAITING_SIZE_BYTES_MAX` or `stream_messages_max` messages are let in, then one window more, and of the
    message that is still incomplete as much as `message_size_bytes_max`.

    Args:
        limits: bounds.
        encoding: the call's `grpc-encoding`.
    """

    __slots__ = ("_held_bytes", "_messages", "_messages_max", "_reader", "_waiting_bytes")

    def __init__(self, limits: Limits, encoding: str = "identity") -> None:
        self._messages: deque[bytes] = deque()
        self._messages_max = limits.stream_messages_max
        self._reader = MessageReader(limits.message_size_bytes_max, encoding)
        self._waiting_bytes = 0
        self._held_bytes = 0

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def size_bytes(self) -> int:
        """Bytes in memory: messages that wait, and the one that is incomplete."""
        return self._waiting_bytes + self._reader.buffered_bytes

    def put(self, data: bytes, *, is_end: bool = False) -> None:
        """Take received DATA.

        Raises:
            MeshError: for a bad or too large message, or if the call ends in the middle of one.
        """
        self._held_bytes += len(data)
        for message in self._reader.feed(data):
            self._messages.append(message)
            self._waiting_bytes += len(message)
        if is_end and self._reader.is_partial:
            raise MeshError(Code.INVALID_REQUEST, "The call ended in the middle of a message.")

    def take(self) -> bytes:
        """The oldest message. There must be one."""
        message = self._messages.popleft()
        self._waiting_bytes -= len(message)
        return message

    def credit(self) -> int:
        """Bytes whose window the peer may have back now; 0 while enough is waiting. The caller gives them back."""
        if self._waiting_bytes >= WAITING_SIZE_BYTES_MAX or len(self._messages) >= self._messages_max:
            return 0
        return self.discard()

    def discard(self) -> int:
        """Bytes whose window is due at the end of the call, whether or not anybody reads what waits."""
        held_bytes, self._held_bytes = self._held_bytes, 0
        return held_bytes
