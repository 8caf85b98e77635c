"""Looking after a server's connection: pure decisions on what never greets, stalls, falls silent, idles or is old."""

from __future__ import annotations

from enum import Enum, auto

import msgspec

from nearcast.transport.seam import Limits

NOTICE_S = 1.0
"""Between "open no more calls" and the GOAWAY that refuses them: one round trip, so that none is lost in between."""


class Verdict(Enum):
    """What to do with a connection now."""

    KEEP = auto()
    PING = auto()
    NOTICE = auto()
    GOODBYE = auto()
    ABORT = auto()


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a connection shows at one look.

    Attributes:
        is_greeted: the peer's SETTINGS have come.
        calls: open calls.
        last_stream_id: of the latest call; a change says that there were calls since the last look.
        owed_bytes: what waits for the peer here, in the library and in the socket's buffer.
        left_bytes: what has left this process in all.
        read_at: when the peer's last bytes came.
    """

    is_greeted: bool
    calls: int
    last_stream_id: int
    owed_bytes: int
    left_bytes: int
    read_at: float


class Watch:
    """Looks at one connection again and again.

    Args:
        limits: the bounds.
        opened_at: when the connection came.
        age_s: this connection's own share of `connection_age_s`; 0 = any age.
    """

    __slots__ = (
        "_age_s",
        "_idle_since",
        "_last_stream_id",
        "_left_bytes",
        "_limits",
        "_noticed_at",
        "_opened_at",
        "_parted_at",
        "_pinged_at",
        "_stalled_since",
    )

    def __init__(self, limits: Limits, *, opened_at: float, age_s: float = 0.0) -> None:
        self._limits = limits
        self._opened_at = opened_at
        self._age_s = age_s
        self._idle_since = opened_at
        self._last_stream_id = 0
        self._left_bytes = 0
        self._stalled_since: float | None = None
        self._pinged_at: float | None = None
        self._noticed_at: float | None = None
        self._parted_at: float | None = None

    @property
    def is_stalled(self) -> bool:
        """Whether the peer read nothing of what waits for it between the last two looks."""
        return self._stalled_since is not None

    def look(self, now: float, seen: Seen, *, is_crowded: bool = False) -> Verdict:
        """Judge a connection.

        Args:
            now: monotonic seconds.
            seen: what it shows.
            is_crowded: the server is nearly full; who does nothing must go sooner.
        """
        limits = self._limits
        if not seen.is_greeted and now - self._opened_at > limits.handshake_timeout_s:
            return Verdict.ABORT
        if self._has_stalled(now, seen) or self._is_silent(now, seen):
            return Verdict.ABORT
        if seen.calls or seen.last_stream_id != self._last_stream_id:
            self._idle_since = now
            self._last_stream_id = seen.last_stream_id
        if self._parted_at is not None:
            is_late = now - self._parted_at > limits.connection_age_grace_s
            return Verdict.ABORT if is_late else self._ping(now, seen)
        if self._noticed_at is not None:
            if now - self._noticed_at < NOTICE_S:
                return Verdict.KEEP
            self._parted_at = now
            return Verdict.GOODBYE
        idle_s = min(limits.idle_timeout_s, limits.handshake_timeout_s) if is_crowded else limits.idle_timeout_s
        is_old = self._age_s and now - self._opened_at > self._age_s
        if is_old or now - self._idle_since > idle_s:
            self._noticed_at = now
            return Verdict.NOTICE
        return self._ping(now, seen)

    def _has_stalled(self, now: float, seen: Seen) -> bool:
        moved = seen.left_bytes != self._left_bytes
        self._left_bytes = seen.left_bytes
        if moved or not seen.owed_bytes:
            self._stalled_since = None
        elif self._stalled_since is None:
            self._stalled_since = now
        return self._stalled_since is not None and now - self._stalled_since > self._limits.stall_timeout_s

    def _is_silent(self, now: float, seen: Seen) -> bool:
        if self._pinged_at is not None and seen.read_at >= self._pinged_at:
            self._pinged_at = None
        return self._pinged_at is not None and now - self._pinged_at > self._limits.keepalive_timeout_s

    def _ping(self, now: float, seen: Seen) -> Verdict:
        # Behind unread answers a PING would wait; the stall's bound holds then.
        is_due = seen.calls and not seen.owed_bytes and now - seen.read_at > self._limits.keepalive_s
        if not is_due or self._pinged_at is not None:
            return Verdict.KEEP
        self._pinged_at = now
        return Verdict.PING
