"""A whole tier that answers too late: set aside slowly, tried with few requests, and filled again step by step.

Single targets have breakers of their own, which trip fast. A tier trips only when for some time most of what it got
came to nothing: an error, or a queue that alone took longer than the request could wait. Busy is not broken, and as
long as the answers are in time nothing trips, however long the queue.
"""

from __future__ import annotations

from router.policy.breaker import Breaker
from router.policy.config import PolicyConfig

_GAIN = 0.02
_TRIP_SHARE = 0.5


class TierGate:
    """The breaker of one tier. It counts like a breaker (`start_trial`, `end_trial`), but over all targets of the tier.

    Closed, open for a growing while, half open for `tier_trials` requests at a time; after it closes, the requests in
    flight may double in each eighth of `tier_start_ms`, from the trials on.
    """

    __slots__ = ("_bad_since", "_breaker", "_in_flight", "_start_s", "_started_at", "_trials", "_trip_s", "useless")

    def __init__(self, config: PolicyConfig) -> None:
        self._breaker = Breaker(
            failures_max=2**31,
            open_s=config.tier_open_ms / 1e3,
            open_max_s=config.tier_open_ms_max / 1e3,
            trials_max=config.tier_trials,
        )
        self._trials = config.tier_trials
        self._trip_s = config.tier_trip_ms / 1e3
        self._start_s = config.tier_start_ms / 1e3
        self._bad_since: float | None = None
        self._started_at: float | None = None
        self._in_flight = 0
        self.useless = 0.0

    @property
    def quiet(self) -> bool:
        """Whether nothing has to be asked: the tier is open to everybody."""
        return self._started_at is None and self._breaker.state == "closed"

    @property
    def until(self) -> float:
        """When an open gate lets a trial through."""
        return self._breaker.until

    def obstacle(self, now: float) -> str:
        """Why a request may not go to this tier now: a reason code; "" = it may."""
        if self.quiet:
            return ""
        if not self._breaker.admits(now):
            return "tier_open"
        if self._started_at is None:
            return "" if self._in_flight < self._trials else "tier_open"
        progress = (now - self._started_at) / self._start_s
        if progress >= 1.0:
            self._started_at = None
            return ""
        return "" if self._in_flight < self._trials * 2.0 ** (progress * 8.0) else "tier_starting"

    def start_trial(self) -> bool:
        """Count a request that passes now; True if it is to be ended with `end_trial`."""
        if self.quiet:
            return False
        self._in_flight += 1
        return True

    def end_trial(self) -> None:
        """A counted request has ended, whatever came of it."""
        self._in_flight -= 1

    def note(self, now: float, *, useless: bool, trial: bool) -> bool:
        """What became of a request: `useless` if it failed, or its queue alone took longer than it could wait.

        While the gate is not closed only a `trial` counts: what was sent before it opened says nothing new.

        Returns:
            Whether the gate has just opened or closed.
        """
        breaker = self._breaker
        if breaker.state != "closed" and not trial:
            return False
        if breaker.state == "half_open":
            if useless:
                breaker.fail(now, trial=True)
                return True
            breaker.succeed()
            self.useless, self._bad_since, self._started_at = 0.0, None, now
            return True
        self.useless += _GAIN * (float(useless) - self.useless)
        if self.useless <= _TRIP_SHARE:
            self._bad_since = None
        elif self._bad_since is None:
            self._bad_since = now
        elif breaker.state == "closed" and now - self._bad_since >= self._trip_s:
            breaker.open(now)
            self._bad_since = self._started_at = None
            return True
        return False
