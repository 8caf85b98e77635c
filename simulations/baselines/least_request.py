"""Power of two choices over active requests."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from nearcast.errors import Code
from nearcast.handler import Served
from router.policy.facts import RequestFacts
from simulations.baselines.balancer import Balancer
from simulations.baselines.outliers import Outliers


class LeastRequest(Balancer):
    """Of two random nodes the one with fewer of our requests open.

    Source: Envoy's LEAST_REQUEST with its defaults: two choices, equal weights (Mitzenmacher, "The power of two
    choices", 2001). The two are different nodes, as in nginx and HAProxy; Envoy may draw one twice. Failures: outlier
    detection. Requests are counted as Envoy counts them, not divided by slots: that sent more to far nodes.
    """

    name = "p2c-least-request"
    home = "edge-throttled"

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self._outliers = Outliers()

    def choose(self, now: float, facts: RequestFacts, nodes: Sequence[str]) -> str:
        nodes = self._outliers.admit(now, self.ready(facts, nodes))
        if len(nodes) == 1:
            return nodes[0]
        first, second = self.random.sample(nodes, 2)
        return first if self.open[first] <= self.open[second] else second

    def on_reply(self, now: float, node: str, latency_s: float, served: Served | None, code: Code | None) -> None:
        super().on_reply(now, node, latency_s, served, code)
        self._outliers.observe(now, node, code)
