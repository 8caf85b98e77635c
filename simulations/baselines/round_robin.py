"""Each node in turn, whatever it says: the floor under every other baseline."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from router.policy.facts import RequestFacts
from simulations.baselines.balancer import Balancer


class RoundRobin(Balancer):
    """Plain round robin, as every load balancer has it. It starts at a random node, as Envoy does."""

    name = "round-robin"
    home = "stalls"

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self._turn = random.randrange(1 << 16)

    def choose(self, now: float, facts: RequestFacts, nodes: Sequence[str]) -> str:
        nodes = self.ready(facts, nodes)
        self._turn += 1
        return nodes[self._turn % len(nodes)]
