"""C3's send rate to one server: grown along a cubic, cut when the server answers more slowly than it is asked."""

from __future__ import annotations

INTERVAL_S = 0.020
BETA = 0.2
CUBIC = 4e-6
STEP_MAX = 10.0
HYSTERESIS_S = 2 * INTERVAL_S
RATE_START = 10.0
RATE_MIN = 1e-4


class ReceiveRate:
    """Answers per interval: the past weighs in only as far as the present interval is not over."""

    __slots__ = ("_began", "_count", "_rate")

    def __init__(self, now: float) -> None:
        self._began = now
        self._count = 0
        self._rate = RATE_START

    def add(self, now: float, answers: int) -> float:
        """Count `answers` and return the rate."""
        intervals = (now - self._began) / INTERVAL_S
        if intervals < 1.0:
            self._count += answers
            self._rate = max(self._rate, float(self._count))
        else:
            self._rate = self._count / intervals + (1.0 - 1.0 / intervals) * self._rate
            self._began, self._count = now, answers
        return self._rate


class CubicRate:
    """A token bucket whose rate follows the server's. Rates are requests per 20 ms, cubic times are milliseconds.

    Source: C3 (Suresh et al., NSDI 2015), section 3.2, with the constants of the authors' simulator: beta 0.2,
    C 4e-6, at most 10 more per step, hysteresis of two intervals.
    """

    __slots__ = ("_decreased_at", "_filled_at", "_increased_at", "_rate_at_decrease", "_received", "_tokens", "rate")

    def __init__(self, now: float) -> None:
        self.rate = RATE_START
        self._tokens = RATE_START
        self._filled_at = now
        self._received = ReceiveRate(now)
        self._increased_at = self._decreased_at = now
        self._rate_at_decrease = RATE_START

    def admits(self, now: float) -> bool:
        """Whether one more request is within the rate."""
        gained = (now - self._filled_at) / INTERVAL_S * self.rate
        self._tokens = min(self._tokens + gained, max(1.0, self.rate))
        self._filled_at = now
        return self._tokens >= 1.0

    def on_sent(self) -> None:
        """A request goes out; one beyond the rate is not owed later."""
        self._tokens = max(0.0, self._tokens - 1.0)

    def on_answer(self, now: float) -> None:
        """An answer came in: adapt the rate."""
        received = self._received.add(now, 1)
        if self.rate < received:
            saddle_ms = (self._rate_at_decrease * BETA / CUBIC) ** (1.0 / 3.0)
            since_ms = (now - self._decreased_at) * 1e3
            grown = CUBIC * (since_ms - saddle_ms) ** 3 + self._rate_at_decrease
            self.rate = max(RATE_MIN, min(self.rate + STEP_MAX, grown))
            self._increased_at = now
        elif self.rate > received and now - self._increased_at > HYSTERESIS_S:
            self._rate_at_decrease = self.rate
            self.rate = max(RATE_MIN, self.rate * BETA)
            self._decreased_at = now
