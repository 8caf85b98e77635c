"""How many rows may run together on the loop, learnt from the runs: their p99 stays within what the loop may lag.

Pure. Grows by a quarter and at least a row, or by one row where a quarter would be too much, and shrinks by a quarter,
once per hundred runs.
"""

from __future__ import annotations

SAMPLES = 100


class TurnRows:
    """Args: `rows` that are safe by what is known before, the `limit_us` of a run, and `rows_max` whatever is learnt.

    Attributes:
        rows: rows of one run now.
    """

    __slots__ = ("_count", "_limit_us", "_max", "_min", "_worst_us", "rows")

    def __init__(self, rows: int, limit_us: float, *, rows_max: int) -> None:
        self.rows = self._min = max(1, min(rows, rows_max))
        self._max = rows_max
        self._limit_us = limit_us
        self._count = 0
        self._worst_us = 0.0

    def observe(self, rows: int, busy_us: float) -> None:
        """A run of `rows` rows kept the loop busy for so long. Small runs say nothing about full ones."""
        if not self.rows <= 2 * rows <= 2 * self.rows:
            return
        self._worst_us = max(self._worst_us, busy_us * self.rows / rows)
        self._count += 1
        if self._count < SAMPLES:
            return
        if self._worst_us > self._limit_us:
            self.rows = max(self._min, self.rows * 3 // 4)
        else:
            for grown in (self.rows + max(1, self.rows // 4), self.rows + 1):
                if self._worst_us * grown <= self._limit_us * self.rows:
                    self.rows = min(self._max, grown)
                    break
        self._count, self._worst_us = 0, 0.0
