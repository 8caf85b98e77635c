"""What one agent may download, counted over all its workers: bytes per second, and bytes per day across restarts."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from model_sync.agent.install.fetch import AllowanceError
from model_sync.replica.allowance import Spent, TokenBucket, until_tomorrow_s
from nearcast.clock import Clock
from nearcast.durable import write_file

BURST_S = 0.25
"""A pause of the download may be made up for by this much of a second at full speed."""
SAVED_BYTES = 4 * 1024 * 1024
"""The count of the day reaches the disk after this many bytes at the latest: what a crash makes it forget."""


class Meter:
    """The `Pace` of one agent; safe from any thread.

    Args:
        path: where the count of the day is kept.
        clock: wall clock; a day is one of UTC.
        bytes_per_s_max, bytes_per_day_max: 0 = unlimited.
    """

    def __init__(self, path: Path, clock: Clock, *, bytes_per_s_max: float, bytes_per_day_max: int) -> None:
        self._path = path
        self._clock = clock
        self._bytes_per_day_max = bytes_per_day_max
        self._bucket = TokenBucket(bytes_per_s_max, bytes_per_s_max * BURST_S)
        self._lock = threading.Lock()
        self._unsaved = 0
        self._spent = Spent()
        with suppress(OSError, msgspec.DecodeError):  # a lost count only starts the day anew
            self._spent = msgspec.json.decode(path.read_bytes(), type=Spent)

    def require(self, size_bytes: int, what: str) -> None:
        """Check that `size_bytes` more may be downloaded today, before any of it is.

        Raises:
            AllowanceError: if not, with the time until tomorrow.
        """
        if not self._bytes_per_day_max:
            return
        now = self._clock.wall()
        left = self._spent.left_bytes(now, self._bytes_per_day_max)
        if size_bytes > left:
            raise AllowanceError(
                f"{what} needs {size_bytes} bytes, and {left} of `limits.download_bytes_per_day_max` are left today; "
                "it goes on tomorrow, or raise the limit. The node serves on.",
                retry_s=until_tomorrow_s(now),
            )

    def take(self, size_bytes: int, stop: threading.Event) -> float:
        """As `Pace.take`."""
        with self._lock:
            wait_s = self._bucket.take(time.monotonic(), size_bytes)
            if self._bytes_per_day_max:
                self._count(size_bytes)
        if wait_s > 0.0:
            stop.wait(wait_s)
        return wait_s

    def save(self) -> None:
        """Write the count of the day if it has changed."""
        with self._lock:
            if self._unsaved:
                self._unsaved = 0
                write_file(self._path, msgspec.json.encode(self._spent))

    def _count(self, size_bytes: int) -> None:
        now = self._clock.wall()
        self._spent = self._spent.add(now, size_bytes)
        self._unsaved += size_bytes
        if self._unsaved >= SAVED_BYTES:
            self._unsaved = 0
            write_file(self._path, msgspec.json.encode(self._spent))
        if self._spent.size_bytes > self._bytes_per_day_max:
            raise AllowanceError(
                f"The {self._bytes_per_day_max} bytes of `limits.download_bytes_per_day_max` are used up; the download "
                "goes on tomorrow. The node serves on.",
                retry_s=until_tomorrow_s(now),
            )
