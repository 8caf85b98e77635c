"""How fast and how much one agent may download."""

from __future__ import annotations

import msgspec

DAY_S = 86_400.0


class TokenBucket:
    """A token bucket that may be overdrawn by one piece: what is taken at once is paid for by waiting afterwards.

    Args:
        rate_bytes_per_s: 0 = unlimited.
        burst_bytes: what may be taken at once after a pause.
    """

    def __init__(self, rate_bytes_per_s: float, burst_bytes: float) -> None:
        self._rate = rate_bytes_per_s
        self._burst = burst_bytes
        self._tokens = burst_bytes
        self._at: float | None = None

    def take(self, now: float, size_bytes: int) -> float:
        """Account for `size_bytes` at the monotonic instant `now`; returns the seconds to wait before the next."""
        if self._rate <= 0.0:
            return 0.0
        elapsed = 0.0 if self._at is None else max(0.0, now - self._at)
        self._at = now
        self._tokens = min(self._burst, self._tokens + elapsed * self._rate) - size_bytes
        return max(0.0, -self._tokens / self._rate)


class Spent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bytes downloaded on one day, as stored; `day` counts days since 1970."""

    day: int = 0
    size_bytes: int = 0

    def add(self, now: float, size_bytes: int) -> Spent:
        """With `size_bytes` more at `now`, seconds since 1970. A clock that goes back opens no new day."""
        day = int(now // DAY_S)
        if day > self.day:
            return Spent(day=day, size_bytes=size_bytes)
        return Spent(day=self.day, size_bytes=self.size_bytes + size_bytes)

    def left_bytes(self, now: float, bytes_per_day_max: int) -> int:
        """What may still be downloaded on this day."""
        return max(0, bytes_per_day_max - self.add(now, 0).size_bytes)


def until_tomorrow_s(now: float) -> float:
    """Seconds until the next day begins, for `now` in seconds since 1970."""
    return DAY_S - now % DAY_S
