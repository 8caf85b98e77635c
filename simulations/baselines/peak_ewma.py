"""Peak-EWMA: two random choices by the round trip that a request should expect, quick to believe bad news."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from random import Random

from nearcast.errors import Code
from nearcast.handler import Served
from router.policy.facts import RequestFacts
from simulations.baselines.balancer import Balancer

DECAY_S = 10.0
DEFAULT_RTT_S = 0.030
FLOOR_S = 0.001
PENALTY_S = 5.0
PENALISED = frozenset({Code.OVERLOADED, Code.UNAVAILABLE, Code.INTERNAL})


class Estimate:
    """A moving average of round trips, in seconds: it jumps to a peak at once and forgets it within tens of seconds."""

    __slots__ = ("_rtt_s", "_updated_at")

    def __init__(self, now: float) -> None:
        self._rtt_s = DEFAULT_RTT_S
        self._updated_at = now

    def observe(self, now: float, rtt_s: float) -> None:
        """Take one round trip."""
        if rtt_s < self._rtt_s:
            kept = exp(-(now - self._updated_at) / DECAY_S)
            rtt_s = self._rtt_s * kept + rtt_s * (1.0 - kept)
        self._rtt_s, self._updated_at = rtt_s, now

    def read(self, now: float) -> float:
        """The estimate. It decays towards zero while nothing is heard, so that a node left alone is tried again."""
        self.observe(now, 0.0)
        return max(self._rtt_s, FLOOR_S)


class PeakEwma(Balancer):
    """Of two random nodes the one with the lesser (round trip) · (open requests + 1).

    Source: Finagle's `PeakEwma` and tower's `load::PeakEwma` as linkerd2-proxy sets it: decay 10 s, first guess 30 ms,
    floor 1 ms. Failures: linkerd's load biaser, which takes a failed or refused request for a round trip of 5 s where
    the server names no other time, so that a node that fails fast does not look fast. A request that the client gave
    up counts with the time it took, as in tower.
    """

    name = "p2c-peak-ewma"
    home = "edge-throttled"

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self._estimates: dict[str, Estimate] = {}

    def choose(self, now: float, facts: RequestFacts, nodes: Sequence[str]) -> str:
        nodes = self.ready(facts, nodes)
        if len(nodes) == 1:
            return nodes[0]
        first, second = self.random.sample(nodes, 2)
        return first if self.cost_s(now, first) <= self.cost_s(now, second) else second

    def cost_s(self, now: float, node: str) -> float:
        """What a request to `node` is expected to cost."""
        return self._estimate(now, node).read(now) * (self.open[node] + 1)

    def _estimate(self, now: float, node: str) -> Estimate:
        estimate = self._estimates.get(node)
        if estimate is None:
            estimate = self._estimates[node] = Estimate(now)
        return estimate

    def on_reply(self, now: float, node: str, latency_s: float, served: Served | None, code: Code | None) -> None:
        super().on_reply(now, node, latency_s, served, code)
        rtt_s = max(latency_s, PENALTY_S) if code in PENALISED else latency_s
        self._estimate(now, node).observe(now, rtt_s)
