"""Where the bytes of a repository come from: a web server, a folder, an object store, a neighbour.

Used in worker threads, one request at a time each. Nothing a source gives is trusted: who asks checks every byte
against signed digests, so that whoever controls a source can delay, and no more.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator

from nearcast.errors import Code, MeshError

RETRY_AFTER_S_MAX = 600.0
"""The longest wait that a source may ask for; more would let it hold a node back for as long as it likes."""


class RetryLaterError(MeshError):
    """It is of no use to try again within `retry_s`."""

    def __init__(self, message: str, *, retry_s: float) -> None:
        super().__init__(Code.UNAVAILABLE, message)
        self.retry_s = min(max(0.0, retry_s), RETRY_AFTER_S_MAX)


class StatusError(RetryLaterError):
    """An answer other than success; `status` is the HTTP status, or the one that says the same."""

    def __init__(self, url: str, status: int, *, retry_s: float = 0.0) -> None:
        super().__init__(f"{url} answered with HTTP status {status}.", retry_s=retry_s)
        self.status = status


def asked_pause_s(error: BaseException | None) -> float:
    """The pause that a source asked for, of an error or of what caused it; 0 = none."""
    while error is not None:
        if isinstance(error, RetryLaterError) and error.retry_s > 0.0:
            return error.retry_s
        error = error.__cause__
    return 0.0


class Source(ABC):
    """One place that holds the repository, or a part of it. `abort` may come from any thread."""

    url: str
    """What messages call it; paths are below it."""

    @abstractmethod
    def get(
        self, path: str, *, start: int = 0, end: int | None = None, timeout_s: float
    ) -> tuple[int, Iterator[bytes]]:
        """Ask for `path` from byte `start` on, up to `end` (not included; None = all).

        Returns the offset of the first byte that comes (0 if the source ignores ranges) and the pieces; more than asked
        for may come. The timeout holds for the beginning of the answer and then anew for every piece; who needs a bound
        on the whole counts pieces and time.

        Raises:
            MeshError: UNAVAILABLE if the source cannot be reached or is too slow, UNAUTHENTICATED if it is not of this
                mesh, `StatusError` for any answer but success, CANCELLED after `abort`. The pieces raise the same.
        """

    @abstractmethod
    def abort(self) -> None:
        """Break the request that runs, from another thread. The next one begins anew."""

    @abstractmethod
    def close(self) -> None:
        """Drop the connection, if there is one. Needed after pieces that were not read to their end."""

    def read(self, path: str, *, size_bytes_max: int, timeout_s: float) -> bytes:
        """The whole of `path`, at most `size_bytes_max` bytes, within `timeout_s` for all of it.

        Raises:
            MeshError: as `get`; UNAVAILABLE too if the answer is longer or takes longer.
        """
        deadline = time.monotonic() + timeout_s
        _, pieces = self.get(path, timeout_s=timeout_s)
        data = bytearray()
        for piece in pieces:
            data += piece
            if len(data) > size_bytes_max:
                self.close()
                raise MeshError(Code.UNAVAILABLE, f"{self.url}/{path} is longer than {size_bytes_max} bytes.")
            if time.monotonic() > deadline:
                self.close()
                raise MeshError(Code.UNAVAILABLE, f"{self.url}/{path} took longer than {timeout_s:g} s.")
        return bytes(data)
