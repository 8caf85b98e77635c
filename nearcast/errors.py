"""One catalogue of what can go wrong, and how each edge of the mesh says it.

Nothing here imports a transport: the statuses are plain numbers that `nearcast.wire.status` and the REST and MQTT
converters read. The router policy reads `retry`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Retry(StrEnum):
    """Whether the same request may succeed if it is sent once more, and where."""

    NEVER = "never"
    HERE_LATER = "here_later"
    ELSEWHERE = "elsewhere"


class Code(StrEnum):
    """The codes that cross the wire (trailer `nc-code`, MQTT user property `code`)."""

    INVALID_REQUEST = "INVALID_REQUEST"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    FORBIDDEN = "FORBIDDEN"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    CONFLICT = "CONFLICT"
    VERSION_MISMATCH = "VERSION_MISMATCH"
    TOO_LARGE = "TOO_LARGE"
    UNSUPPORTED = "UNSUPPORTED"
    UNTRUSTED = "UNTRUSTED"
    OVERLOADED = "OVERLOADED"
    UNAVAILABLE = "UNAVAILABLE"
    CANCELLED = "CANCELLED"
    SUPERSEDED = "SUPERSEDED"
    DEADLINE = "DEADLINE"
    INTERNAL = "INTERNAL"


class Entry(NamedTuple):
    """How one code looks at each edge. `http` is the MQTT `status` too, or near it."""

    retry: Retry
    grpc: int
    http: int


CATALOGUE: dict[Code, Entry] = {
    Code.INVALID_REQUEST: Entry(Retry.NEVER, 3, 400),
    Code.UNAUTHENTICATED: Entry(Retry.NEVER, 16, 401),
    Code.FORBIDDEN: Entry(Retry.NEVER, 7, 403),
    Code.MODEL_NOT_FOUND: Entry(Retry.ELSEWHERE, 5, 404),
    Code.CONFLICT: Entry(Retry.HERE_LATER, 10, 409),
    Code.VERSION_MISMATCH: Entry(Retry.ELSEWHERE, 9, 412),
    Code.TOO_LARGE: Entry(Retry.NEVER, 3, 413),
    Code.UNSUPPORTED: Entry(Retry.NEVER, 12, 501),
    Code.UNTRUSTED: Entry(Retry.NEVER, 9, 422),
    Code.OVERLOADED: Entry(Retry.ELSEWHERE, 8, 429),
    Code.UNAVAILABLE: Entry(Retry.ELSEWHERE, 14, 503),
    Code.CANCELLED: Entry(Retry.NEVER, 1, 499),
    Code.SUPERSEDED: Entry(Retry.NEVER, 10, 409),
    Code.DEADLINE: Entry(Retry.NEVER, 4, 504),
    Code.INTERNAL: Entry(Retry.ELSEWHERE, 13, 500),
}


class MeshError(Exception):
    """The one error that crosses an edge.

    `message` is public: it says what was wrong and what to do, and never holds a stack or another tenant's data.
    `sent` tells whether the request may have been executed: a lost connection after sending is not safe to retry for a
    stateful model, a refused one is.
    """

    def __init__(self, code: Code, message: str, *, retry_after_ms: int | None = None, sent: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_ms = retry_after_ms
        self.sent = sent

    @property
    def retry(self) -> Retry:
        """The retry class of this error's code."""
        return CATALOGUE[self.code].retry

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"
