"""Latency by requests in flight: what a request may expect that arrives at a server with so many before it."""

from __future__ import annotations

from collections import deque
from statistics import median_low

SAMPLES_MAX = 8
AGE_S_MAX = 5.0


class RifLatency:
    """The last samples for each number of requests in flight at arrival; older ones than 5 s do not count.

    Source: Prequal, section 4.1: the median of recent latencies at, or near, the present number in flight.
    """

    def __init__(self) -> None:
        self._rings: dict[int, deque[tuple[float, float]]] = {}

    def observe(self, now: float, in_flight: int, latency_s: float) -> None:
        """Take the latency of a finished request that found `in_flight` others at its arrival."""
        ring = self._rings.get(in_flight)
        if ring is None:
            for old in [key for key, ring in self._rings.items() if now - ring[-1][0] > AGE_S_MAX]:
                del self._rings[old]
            ring = self._rings[in_flight] = deque(maxlen=SAMPLES_MAX)
        ring.append((now, latency_s))

    def at(self, now: float, in_flight: int) -> float | None:
        """The median at the nearest load with a recent sample; None without any."""
        recent = [key for key, ring in self._rings.items() if now - ring[-1][0] <= AGE_S_MAX]
        if not recent:
            return None
        nearest = min(recent, key=lambda key: (abs(key - in_flight), key))
        return median_low([latency for at, latency in self._rings[nearest] if now - at <= AGE_S_MAX])
