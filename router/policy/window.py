"""Exact quantiles of the last few samples: cheap, and new again when the present contradicts the past."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from itertools import islice

_RUN = 4
_JUDGED_MIN = 8


class Window:
    """A sliding window with quantiles by rank. Adding costs about a microsecond at 64 samples.

    Four samples in a row above the 95th percentile, or below the 5th, are no chance (one in 160 000): what was
    measured before does not speak for the present and is forgotten. After a pause one such sample is enough.
    `ordered` holds the samples by size; for reading only.
    """

    __slots__ = ("_above", "_age_max_s", "_below", "_pause_s", "_samples", "_size", "last_at", "ordered")

    def __init__(self, *, size: int, age_max_s: float, pause_s: float = float("inf")) -> None:
        self._size = size
        self._age_max_s = age_max_s
        self._pause_s = pause_s
        self._samples: deque[tuple[float, float]] = deque()
        self.ordered: list[float] = []
        self._above = self._below = 0
        self.last_at = float("-inf")

    def __len__(self) -> int:
        return len(self.ordered)

    def add(self, now: float, value: float) -> bool:
        """Take one sample; the oldest falls out of a full window. True if it made the window forget the others."""
        ordered = self.ordered
        count = len(ordered)
        run = 0
        if count >= _JUDGED_MIN:
            if value > ordered[19 * count // 20]:
                self._above += 1
                self._below = 0
                run = self._above
            elif value < ordered[count // 20]:
                self._below += 1
                self._above = 0
                run = self._below
            else:
                self._above = self._below = 0
        samples = self._samples
        if count >= self._size:
            del ordered[bisect_left(ordered, samples.popleft()[1])]
        samples.append((now, value))
        insort(ordered, value)
        changed = run >= _RUN or (run > 0 and now - self.last_at > self._pause_s)
        if changed:
            self._keep(run)
        self.last_at = now
        return changed

    def prune(self, now: float) -> None:
        """Forget samples that are too old."""
        samples = self._samples
        oldest = now - self._age_max_s
        while samples and samples[0][0] < oldest:
            self._drop_oldest()

    def clear(self) -> None:
        """Forget everything."""
        self._keep(0)

    def quantile(self, fraction: float) -> float:
        """The sample at rank `fraction` of the window; 0.0 if it is empty."""
        ordered = self.ordered
        if not ordered:
            return 0.0
        rank = int(fraction * len(ordered))
        return ordered[rank if rank < len(ordered) else -1]

    def _keep(self, count: int) -> None:
        samples = self._samples
        self._samples = deque(islice(samples, max(0, len(samples) - count), None))
        self.ordered[:] = sorted(value for _, value in self._samples)
        self._above = self._below = 0

    def _drop_oldest(self) -> None:
        value = self._samples.popleft()[1]
        del self.ordered[bisect_left(self.ordered, value)]
