"""Token budgets: they deny only the new attempt, never one in flight."""

from __future__ import annotations


class TokenBudget:
    """Earns `share` of a token per request and `per_s` per second, keeps at most `burst`, spends one per extra send.

    Over any window: spent <= burst + share * requests + per_s * seconds.
    """

    __slots__ = ("_at", "_per_s", "_share", "burst", "tokens")

    def __init__(self, *, share: float, burst: float, per_s: float = 0.0) -> None:
        self._at: float | None = None
        self.tokens = burst
        self.configure(share=share, burst=burst, per_s=per_s)

    def configure(self, *, share: float, burst: float, per_s: float = 0.0) -> None:
        """Go on with other parameters; tokens beyond the burst are lost."""
        self._share = share
        self.burst = burst
        self._per_s = per_s
        self.tokens = min(self.tokens, burst)

    @property
    def missing(self) -> float:
        """The part of the burst that has been spent and not earned again, in [0, 1]."""
        return 1.0 - self.tokens / self.burst if self.burst > 0.0 else 1.0

    def earn(self) -> None:
        """A request was sent."""
        tokens = self.tokens + self._share
        self.tokens = tokens if tokens < self.burst else self.burst  # noqa: FURB136 - asked for each request, and twice as fast

    def spend(self, now: float) -> bool:
        """Take one token; False if there is none."""
        if self._per_s > 0.0:
            if self._at is not None and now > self._at:
                self.tokens = min(self.burst, self.tokens + (now - self._at) * self._per_s)
            self._at = now
        if self.tokens < 1.0:
            return False
        self.tokens -= 1.0
        return True
