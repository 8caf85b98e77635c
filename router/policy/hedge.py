"""When a second copy of a slow request is worth sending ("The Tail at Scale", Dean and Barroso, CACM 2013)."""

from __future__ import annotations

from router.policy.budget import TokenBudget

_PATIENCE = 0.5


class BrownOut:
    """Share of requests that outlast their hedge delay, smoothed.

    A delay at the 95th percentile is passed by 5 %. If far more pass it, the whole tier has become slow: more copies
    would only make it slower.
    """

    __slots__ = ("_share_max", "_smoothing", "share")

    def __init__(self, *, share_max: float, smoothing: float) -> None:
        self.configure(share_max=share_max, smoothing=smoothing)
        self.share = 0.0

    def configure(self, *, share_max: float, smoothing: float) -> None:
        """Go on with other parameters."""
        self._share_max = share_max
        self._smoothing = smoothing

    def note(self, passed: float) -> None:
        """A request with a hedge delay outlasted it (1), or did not (0)."""
        self.share += self._smoothing * (passed - self.share)

    @property
    def frozen(self) -> bool:
        """Whether hedging stops."""
        return self.share > self._share_max


class Hedger:
    """The budget and the brown-out gates of one router."""

    __slots__ = ("_share_max", "_smoothing", "budget", "denied", "fired", "gates")

    def __init__(self, *, share: float, burst: float, brownout_share: float, brownout_smoothing: float) -> None:
        self.budget = TokenBudget(share=share, burst=burst)
        self.gates: dict[str, BrownOut] = {}
        self._share_max = brownout_share
        self._smoothing = brownout_smoothing
        self.fired = 0
        self.denied = {"frozen": 0, "budget": 0, "nowhere": 0}

    def configure(self, *, share: float, burst: float, brownout_share: float, brownout_smoothing: float) -> None:
        """Go on with other parameters; tokens and the shares of the gates stay."""
        self.budget.configure(share=share, burst=burst)
        self._share_max = brownout_share
        self._smoothing = brownout_smoothing
        for gate in self.gates.values():
            gate.configure(share_max=brownout_share, smoothing=brownout_smoothing)

    @property
    def patience(self) -> float:
        """By how much a hedge waits longer while tokens are few, so that what is left goes to the latest."""
        if self.budget.tokens >= self.budget.burst > 0.0:
            return 1.0
        missing = self.budget.missing
        return 1.0 + _PATIENCE * missing * missing

    def gate(self, tier: str) -> BrownOut:
        """The gate of one tier."""
        gate = self.gates.get(tier)
        if gate is None:
            gate = self.gates[tier] = BrownOut(share_max=self._share_max, smoothing=self._smoothing)
        return gate

    def take(self, now: float, tier: str) -> bool:
        """Whether a request that waits on `tier` may be copied now; spends a token if so."""
        if self.gate(tier).frozen:
            self.denied["frozen"] += 1
        elif self.budget.spend(now):
            self.fired += 1
            return True
        else:
            self.denied["budget"] += 1
        return False


def hedge_delay_s(
    t95_s: float, second_t95_s: float, limit_s: float, minimum_s: float, patience: float = 1.0
) -> float | None:
    """Delay after which a copy to the second target starts; None if it could not be in time.

    The 95th percentile of the chosen target, `patience` times that while the budget is low, or earlier where the
    deadline would leave the second too little.
    """
    latest = limit_s - second_t95_s
    if latest < minimum_s:
        return None
    delay_s = t95_s * patience
    if delay_s > latest:
        delay_s = latest
    if delay_s < minimum_s:
        delay_s = minimum_s
    return delay_s
