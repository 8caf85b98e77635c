"""Which of several sources to ask first: the configured order, but one that failed lately stands behind the others."""

from __future__ import annotations

from dataclasses import dataclass

PENALTY_BASE_S = 5.0
PENALTY_CAP_S = 300.0
"""A source that failed n times running stands back for min(cap, base * 2**(n - 1)) seconds: it can only delay, and one
that has recovered is first again within minutes."""


@dataclass(slots=True)
class _Mark:
    failures: int = 0
    behind_until: float = 0.0
    closed_until: float = 0.0


class MirrorHealth:
    """What is remembered of `count` sources, by their place in the configuration. Times are monotonic seconds."""

    def __init__(self, count: int) -> None:
        self._marks = [_Mark() for _ in range(count)]

    def order(self, now: float) -> tuple[int, ...]:
        """Places to ask, best first; those that asked for a pause (`Retry-After`) are left out until it ends."""
        marks = self._marks
        opened = [place for place, mark in enumerate(marks) if mark.closed_until <= now]
        return tuple(sorted(opened, key=lambda place: (max(0.0, marks[place].behind_until - now), place)))

    def pause_s(self, now: float) -> float:
        """Seconds until a source may be asked; 0 if one may be asked now."""
        return max(0.0, min(mark.closed_until for mark in self._marks) - now)

    def failed(self, now: float, place: int, *, retry_s: float = 0.0) -> None:
        """It broke off, was slow, sent bytes that are not the signed ones, or asked to come back in `retry_s`."""
        mark = self._marks[place]
        mark.failures += 1
        penalty_s = min(PENALTY_CAP_S, PENALTY_BASE_S * 2.0 ** min(mark.failures - 1, 16))
        mark.behind_until = now + penalty_s
        mark.closed_until = max(mark.closed_until, now + retry_s)

    def served(self, place: int) -> None:
        """It gave what was asked for; a penalty that runs still runs to its end."""
        self._marks[place].failures = 0
