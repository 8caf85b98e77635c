"""What every balancer in production has around its rule: which servers are ready, and how much it has open at each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

from nearcast.errors import Code
from nearcast.handler import Served
from nearcast.load import NodeReport
from router.policy.facts import RequestFacts
from simulations.contract import Baseline


class Balancer(Baseline):
    """Readiness and counts. A server is ready for a model that its last report calls hot, as a health check says it.

    Attributes:
        open: requests of ours that are not over, by node.
        slots: runs that go on at the same time, by node.
    """

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self.open: Counter[str] = Counter()
        self.slots: dict[str, int] = {}
        self._hot: dict[str, set[str]] = {}

    def ready(self, facts: RequestFacts, nodes: Sequence[str]) -> Sequence[str]:
        """Those of `nodes` that need not load the model first; all of them if none is ready."""
        hot = self._hot.get(facts.model, ())
        return [node for node in nodes if node in hot] or nodes

    def load(self, node: str) -> float:
        """Open requests of ours per slot."""
        return self.open[node] / self.slots.get(node, 1)

    def on_report(self, now: float, node: str, report: NodeReport, rtt_s: float) -> None:
        self.slots[node] = max(1, report.slots)
        for version in report.versions:
            holders = self._hot.setdefault(version.model, set())
            (holders.add if version.residency == "hot" else holders.discard)(node)

    def on_sent(self, now: float, node: str) -> None:
        self.open[node] += 1

    def on_reply(self, now: float, node: str, latency_s: float, served: Served | None, code: Code | None) -> None:
        self.open[node] -= 1
