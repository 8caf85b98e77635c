"""A circuit breaker: closed, open for a growing while, half open for a few trials."""

from __future__ import annotations

from typing import Literal, TypeAlias

State: TypeAlias = Literal["closed", "open", "half_open"]


class Breaker:
    """Opens after `failures_max` consecutive failures, or at once when told. Times are seconds.

    While half open it admits at most `trials_max` requests at the same time; the first success closes it, a failure
    opens it for twice as long (at most `open_max_s`).
    """

    __slots__ = (
        "_backoff_s",
        "_failures",
        "_failures_max",
        "_open_max_s",
        "_open_s",
        "_trials_max",
        "state",
        "trials",
        "until",
    )

    def __init__(self, *, failures_max: int, open_s: float, open_max_s: float, trials_max: int) -> None:
        self._failures_max = failures_max
        self._open_s = open_s
        self._open_max_s = open_max_s
        self._trials_max = trials_max
        self._failures = 0
        self._backoff_s = open_s
        self.state: State = "closed"
        self.trials = 0
        self.until = 0.0

    def admits(self, now: float) -> bool:
        """Whether a request may pass. Turns an open breaker whose time is up into a half-open one."""
        if self.state == "closed":
            return True
        if self.state == "open":
            if now < self.until:
                return False
            self.state = "half_open"
        return self.trials < self._trials_max

    def start_trial(self) -> bool:
        """Count a request that passes now; True if it is a trial, to be ended with `end_trial`."""
        if self.state == "closed":
            return False
        self.trials += 1
        return True

    def end_trial(self) -> None:
        """A trial has ended, whatever came of it."""
        self.trials -= 1

    def succeed(self) -> None:
        """A request was answered."""
        self._failures = 0
        if self.state == "half_open":
            self.state = "closed"
            self._backoff_s = self._open_s

    def fail(self, now: float, *, trial: bool) -> None:
        """A request failed. Half open only a `trial` counts: what was sent before it opened says nothing new."""
        if self.state == "half_open" and not trial:
            return
        self._failures += 1
        if self.state == "half_open" or (self.state == "closed" and self._failures >= self._failures_max):
            self.open(now)

    def open(self, now: float) -> None:
        """Open at once: the connection is lost. An open breaker keeps its time."""
        if self.state == "open" and now < self.until:
            return
        self.state = "open"
        self._failures = 0
        self.until = now + self._backoff_s
        self._backoff_s = min(self._backoff_s * 2.0, self._open_max_s)

    def probe_succeeded(self) -> None:
        """The target answered a probe: let requests try, no matter how much time is left; after a second one, all."""
        if self.state == "open":
            self.state = "half_open"
        elif self.state == "half_open":
            self.state = "closed"
