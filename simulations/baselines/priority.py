"""Priority failover: the nearest tier until it is full or ill, then the next."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from nearcast.errors import Code
from nearcast.handler import Served
from nearcast.load import NodeReport
from router.policy.facts import RequestFacts
from simulations.baselines.balancer import Balancer
from simulations.baselines.outliers import Outliers

OVERPROVISIONING = 1.4
FILL = 1.0
"""Open requests of ours per slot up to which a node takes more."""
_RANKS = {"local": 0, "peer": 1, "cloud": 2}


class PriorityFailover(Balancer):
    """The edge first, then its neighbours, then the cloud; within a tier the lesser of two random nodes.

    Source: Envoy's priority levels. Tier P gets health(P) = min(1, 1.4 · healthy / all) of what the tiers before it
    left over, and if that is less than everything, in proportion. Envoy spills by health only; the bound on open
    requests per node (its `max_requests` circuit breaker) is what makes a tier full here: one per slot, so that
    nobody queues while a tier behind has a free slot. If all tiers are full, the node with the fewest requests per
    slot. Failures: outlier detection.
    """

    name = "priority-failover"
    home = "reconnect-storm"

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self._ranks: dict[str, int] = {}
        self._outliers = Outliers()

    def choose(self, now: float, facts: RequestFacts, nodes: Sequence[str]) -> str:
        nodes = self.ready(facts, nodes)
        admitted = set(self._outliers.admit(now, nodes))
        tiers: dict[int, list[str]] = {}
        for node in nodes:
            tiers.setdefault(self._ranks.get(node, len(_RANKS)), []).append(node)
        healthy = [[node for node in tiers[rank] if node in admitted] for rank in sorted(tiers)]
        sizes = [len(tiers[rank]) for rank in sorted(tiers)]
        first = self._draw(priority_shares([len(tier) for tier in healthy], sizes))
        for tier in healthy[first:] + healthy[:first]:
            free = [node for node in tier if self.load(node) < FILL]
            if free:
                return min(self.random.sample(free, min(2, len(free))), key=self.load)
        return min(admitted, key=lambda node: (self.load(node), node))

    def _draw(self, shares: Sequence[float]) -> int:
        if shares[0] >= 1.0:
            return 0
        return self.random.choices(range(len(shares)), shares)[0]

    def on_report(self, now: float, node: str, report: NodeReport, rtt_s: float) -> None:
        super().on_report(now, node, report, rtt_s)
        self._ranks[node] = _RANKS.get(report.role, len(_RANKS))

    def on_reply(self, now: float, node: str, latency_s: float, served: Served | None, code: Code | None) -> None:
        super().on_reply(now, node, latency_s, served, code)
        self._outliers.observe(now, node, code)


def priority_shares(healthy: Sequence[int], sizes: Sequence[int]) -> list[float]:
    """Share of the requests that begins at each tier, the first tier first; the shares sum to one."""
    health = [min(1.0, OVERPROVISIONING * well / size) for well, size in zip(healthy, sizes, strict=True)]
    total, left, shares = min(1.0, sum(health)), 1.0, []
    for tier in health:
        share = min(left, tier / total) if total else left
        shares.append(share)
        left -= share
    return shares
