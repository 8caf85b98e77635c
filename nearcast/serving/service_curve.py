"""How long a run takes, learnt from the runs themselves: a straight line over the rows, and how far runs stray from it.

Pure. The line is fitted by least squares with exponential forgetting (recursive least squares, Haykin, Adaptive Filter
Theory); a few sums and no matrix, since there are two unknowns.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

FORGET = 0.98
"""Weight of a run relative to the next one: the line remembers about 50."""
SAMPLES_MIN = 5
"""Runs before anything is claimed for the first time."""
SAMPLES_MAX = 64
FRESH_S_MIN = 0.25
FRESH_RUNS = 10
"""What was learnt is fresh for a quarter of a second or the time of this many runs. Then the next run replaces all of
it: the machine may have changed, and a belief that keeps work away would never meet the run that corrects it."""
SPREAD_MIN = 0.05
"""Variance of the rows over their squared mean, below which the cost of one more row is unknown."""


class ServiceCurve:
    """Seconds of a run of n rows: `fixed_s` + n x `row_s`, times a quantile of actual over predicted.

    Attributes:
        fixed_s: cost of a run whatever its rows.
        row_s: cost of one more row; 0 while unknown.
        knows_rows: runs of different sizes were seen, so that the two can be told apart.
    """

    __slots__ = ("_is_learnt", "_ratios", "_sorted", "_sums", "_updated", "fixed_s", "knows_rows", "row_s")

    def __init__(self) -> None:
        self.fixed_s = 0.0
        self.row_s = 0.0
        self.knows_rows = False
        self._is_learnt = False
        self._updated = float("-inf")
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        # The same twice: in the order of the runs and by size.
        self._ratios: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, now: float, rows: int, seconds: float) -> None:
        """A run of `rows` rows ended at `now` after `seconds`."""
        if not self.is_fresh(now):
            self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
            self._ratios.clear()
            self._sorted.clear()
        self._updated = now
        weight, n, t, nn, nt = self._sums
        weight, n, t = FORGET * weight + 1.0, FORGET * n + rows, FORGET * t + seconds
        nn, nt = FORGET * nn + rows * rows, FORGET * nt + rows * seconds
        self._sums = (weight, n, t, nn, nt)
        mean_rows, mean_s = n / weight, t / weight
        variance = nn / weight - mean_rows * mean_rows
        self.knows_rows = variance > SPREAD_MIN * mean_rows * mean_rows
        slope = (nt / weight - mean_rows * mean_s) / variance if self.knows_rows else 0.0
        self.row_s = min(max(0.0, slope), mean_s / mean_rows)
        self.fixed_s = mean_s - self.row_s * mean_rows
        if len(self._ratios) == SAMPLES_MAX:
            del self._sorted[bisect_left(self._sorted, self._ratios.popleft())]
        ratio = seconds / max(1e-9, self.fixed_s + rows * self.row_s)
        self._ratios.append(ratio)
        insort(self._sorted, ratio)
        self._is_learnt = self._is_learnt or len(self._ratios) >= SAMPLES_MIN

    def is_fresh(self, now: float) -> bool:
        """Whether the last run is recent enough to say something about the next."""
        return now - self._updated <= max(FRESH_S_MIN, FRESH_RUNS * (self.fixed_s + self.row_s))

    @property
    def is_known(self) -> bool:
        """Whether there is something to rely on, fresh or not."""
        return self._is_learnt

    def quantile_s(self, rows: int, q: float) -> float:
        """Seconds within which a share `q` of the runs of `rows` rows would end. 0 before the first run."""
        return (self.fixed_s + rows * self.row_s) * self.spread(q)

    def spread(self, q: float) -> float:
        """The `q` quantile of actual over predicted time."""
        count = len(self._sorted)
        return self._sorted[min(count - 1, int(q * count))] if count else 1.0


def best_window_s(fixed_s: float, row_s: float, gap_s: float) -> float:
    """How long a lone row should wait for company, given the mean gap between arrivals; 0 = not at all.

    Waiting w lets w/g rows join. Each of them saves its own run's `fixed_s` and adds `row_s` to the others; each waits,
    as does the first. The sum of all times changes by (w/g)(fixed - row) - w(1 + w/g), which is greatest at half of
    what the saving exceeds the gap by, and negative for every w where it does not.
    """
    return max(0.0, (fixed_s - row_s - gap_s) / 2)
