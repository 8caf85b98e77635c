"""gRPC's message framing: one flag byte, four bytes of length, the message. Pure; limits come before memory."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence

from nearcast.errors import Code, MeshError

PREFIX_SIZE_BYTES = 5
_JOIN_SIZE_BYTES_MAX = 32 * 1024
_GZIP_WINDOW_BITS = 31
# Deflate makes at most 1032 bytes of one: this is a millisecond's work.
_INLINE_SIZE_BYTES_MAX = 512


def frame(body: Sequence[bytes]) -> Sequence[bytes]:
    """The pieces of one framed message. Small ones are joined; large ones are passed on uncopied, as `bytes`."""
    if len(body) == 1:
        piece = body[0]
        size_bytes = len(piece)
        if size_bytes <= _JOIN_SIZE_BYTES_MAX:
            return (size_bytes.to_bytes(PREFIX_SIZE_BYTES, "big") + piece,)
    else:
        size_bytes = sum(map(len, body))
        if size_bytes <= _JOIN_SIZE_BYTES_MAX:
            return (b"".join((b"\0", size_bytes.to_bytes(4, "big"), *body)),)
    if size_bytes >= 1 << 32:
        raise MeshError(Code.TOO_LARGE, f"A gRPC message holds less than 4 GiB; this one has {size_bytes} bytes.")
    return (b"\0" + size_bytes.to_bytes(4, "big"), *body)


def whole_message(data: bytes) -> bytes | None:
    """The message if `data` is exactly one uncompressed framed message: the usual case, without any buffering."""
    # The flag 0 and four bytes of length are the length in five bytes.
    size_bytes = len(data) - PREFIX_SIZE_BYTES
    if size_bytes >= 0 and data.startswith(size_bytes.to_bytes(PREFIX_SIZE_BYTES, "big")):
        return data[PREFIX_SIZE_BYTES:]
    return None


def announced_size_bytes(data: bytes) -> int | None:
    """The size of the message that begins here; None if it is compressed. At least its prefix must be there."""
    return int.from_bytes(data[1:PREFIX_SIZE_BYTES], "big") if data[0] == 0 else None


def is_one_message(pieces: Sequence[bytes], size_bytes: int) -> bool:
    """Whether pieces of `size_bytes` in all are exactly one uncompressed framed message."""
    if size_bytes < PREFIX_SIZE_BYTES:
        return False
    first = pieces[0]
    if len(first) < PREFIX_SIZE_BYTES:
        first = b"".join(pieces)
    return first[:PREFIX_SIZE_BYTES] == (size_bytes - PREFIX_SIZE_BYTES).to_bytes(PREFIX_SIZE_BYTES, "big")


class Deflated(bytes):
    """A message that is still compressed, because inflating it may take long."""

    size_bytes_max: int

    def inflate(self) -> bytes:
        """The message itself.

        Raises:
            MeshError: TOO_LARGE or INVALID_REQUEST.
        """
        return _inflate(self, self.size_bytes_max)


class MessageReader:
    """Turns the DATA of one call into messages.

    Args:
        size_bytes_max: largest message accepted, compressed or not.
        encoding: the call's `grpc-encoding`.
        defers: compressed messages that do not become small are returned as `Deflated`.
    """

    __slots__ = (
        "_chunks",
        "_compressed",
        "_defers",
        "_encoding",
        "_length",
        "_offset",
        "_size_bytes_max",
        "buffered_bytes",
    )

    def __init__(self, size_bytes_max: int, encoding: str = "identity", *, defers: bool = False) -> None:
        self._size_bytes_max = size_bytes_max
        self._encoding = encoding
        self._defers = defers
        self._chunks: deque[bytes] = deque()
        self._offset = 0
        self._length: int | None = None
        self._compressed = False
        self.buffered_bytes = 0

    @property
    def is_partial(self) -> bool:
        """Whether a message has begun and not ended."""
        return self.buffered_bytes > 0 or self._length is not None

    def feed(self, data: bytes) -> list[bytes]:
        """Take received bytes and return the messages that are now complete.

        Raises:
            MeshError: TOO_LARGE as soon as a prefix announces too much; INVALID_REQUEST or UNSUPPORTED for a bad frame.
        """
        if data:
            self._chunks.append(data)
            self.buffered_bytes += len(data)
        messages: list[bytes] = []
        while True:
            if self._length is None:
                if self.buffered_bytes < PREFIX_SIZE_BYTES:
                    return messages
                self._read_prefix(self._take(PREFIX_SIZE_BYTES))
            length = self._length or 0
            if self.buffered_bytes < length:
                return messages
            message = self._take(length)
            self._length = None
            messages.append(self._inflate(message) if self._compressed else message)

    def _read_prefix(self, prefix: bytes) -> None:
        flag = prefix[0]
        length = int.from_bytes(prefix[1:], "big")
        if flag > 1:
            raise MeshError(Code.INVALID_REQUEST, f"The gRPC message flag is 0 or 1, not {flag}.")
        if length > self._size_bytes_max:
            raise _too_large(length, self._size_bytes_max)
        if flag and self._encoding != "gzip":
            raise MeshError(
                Code.UNSUPPORTED,
                f"Messages compressed with {self._encoding!r} are not understood; send them as they are or with gzip.",
            )
        self._compressed = flag == 1
        self._length = length

    def _take(self, size_bytes: int) -> bytes:
        if not size_bytes:
            return b""
        chunks = self._chunks
        self.buffered_bytes -= size_bytes
        first, start = chunks[0], self._offset
        end = start + size_bytes
        if end < len(first):
            self._offset = end
            return first[start:end]
        chunks.popleft()
        self._offset = 0
        if end == len(first):
            return first[start:] if start else first
        parts = [first[start:] if start else first]
        missing = end - len(first)
        while missing:
            chunk = chunks[0]
            if len(chunk) <= missing:
                chunks.popleft()
                parts.append(chunk)
                missing -= len(chunk)
            else:
                parts.append(chunk[:missing])
                self._offset = missing
                missing = 0
        return b"".join(parts)

    def _inflate(self, message: bytes) -> bytes:
        if self._defers and len(message) > _INLINE_SIZE_BYTES_MAX:
            deferred = Deflated(message)
            deferred.size_bytes_max = self._size_bytes_max
            return deferred
        return _inflate(message, self._size_bytes_max)


def _inflate(message: bytes, size_bytes_max: int) -> bytes:
    inflater = zlib.decompressobj(_GZIP_WINDOW_BITS)
    try:
        data = inflater.decompress(message, size_bytes_max + 1)
    except zlib.error as error:
        raise MeshError(Code.INVALID_REQUEST, "The message is flagged as gzip but holds none.") from error
    if len(data) > size_bytes_max:
        raise _too_large(None, size_bytes_max)
    if not inflater.eof or inflater.unused_data:
        raise MeshError(Code.INVALID_REQUEST, "The gzip data of the message is cut short or has a tail.")
    return data


def _too_large(size_bytes: int | None, limit_bytes: int) -> MeshError:
    what = "The decompressed message" if size_bytes is None else f"The message of {size_bytes} bytes"
    return MeshError(Code.TOO_LARGE, f"{what} is over the limit of {limit_bytes} bytes; send smaller batches.")
