"""How many requests a target is good for at the same time, learnt from the queues that they really met.

The expected wait rests on what targets report of their slots and load. Where that is wrong, the queue that answers
report is longer than what the requests could wait, and the limit falls until it is not. The base is taken from requests
that found a free slot: it is never forced by draining a target (Envoy did, and shed healthy traffic: its issue 18152).
The step is that of Envoy's and Netflix's gradient limiters: limit * gradient + sqrt(limit), on queue wait alone.
"""

from __future__ import annotations

import math

_SAMPLES_MIN = 10
_GRADIENT_MIN = 0.5
_SMOOTHING = 0.2
_BASE_GAIN = 0.1
_FLOOR_S = 1e-6
LIMIT_MAX = 100_000.0


class Limiter:
    """The limit of one target. Times are seconds; `base_s` is the first guess of a run that finds a free slot."""

    __slots__ = ("_base_s", "_count", "_slack_s", "_used", "_wait_s", "limit")

    def __init__(self, base_s: float) -> None:
        self.limit = LIMIT_MAX
        self._base_s = max(_FLOOR_S, base_s)
        self._wait_s = self._slack_s = 0.0
        self._count = self._used = 0

    def observe(self, *, queued_s: float, ran_s: float, slack_s: float, in_flight: int, slots: int) -> None:
        """Take an answer: it queued so long, ran so long, could have waited `slack_s` and found `in_flight` before it.

        `in_flight` holds the requests of everybody.
        """
        if in_flight < slots:
            self._base_s = max(_FLOOR_S, self._base_s + _BASE_GAIN * (ran_s - self._base_s))
        self._count += 1
        self._wait_s += queued_s
        self._slack_s += slack_s
        self._used = max(self._used, in_flight + 1)

    def adapt(self, slots: int) -> None:
        """Take one step if enough was seen since the last. The limit is never below `slots`."""
        if self._count < _SAMPLES_MIN:
            return
        wait_s, slack_s = self._wait_s / self._count, self._slack_s / self._count
        gradient = min(1.0, (self._base_s + slack_s) / (self._base_s + wait_s))
        if gradient < 1.0:
            # From what there really was: a limit that nobody reached says nothing.
            limit = max(min(self.limit, float(self._used)), float(slots))
            self.limit = limit + _SMOOTHING * (limit * max(_GRADIENT_MIN, gradient) - limit)
        elif self._used * 2 >= self.limit:
            self.limit += _SMOOTHING * math.sqrt(self.limit)
        self.limit = min(LIMIT_MAX, max(float(slots), self.limit))
        self._wait_s = self._slack_s = 0.0
        self._count = self._used = 0
