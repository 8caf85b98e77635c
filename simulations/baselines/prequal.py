"""Prequal: probe a few servers ahead of need, avoid the loaded ones, prefer the quickest of the rest."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import ceil, floor, inf
from random import Random

from nearcast.errors import Code
from nearcast.handler import Served
from nearcast.load import NodeReport
from router.policy.facts import RequestFacts
from simulations.baselines.balancer import Balancer
from simulations.baselines.outliers import Outliers
from simulations.baselines.probe_pool import POOL_MAX, Probe, ProbePool, best
from simulations.baselines.rif_latency import RifLatency

PROBES_PER_REQUEST = 3
REMOVALS_PER_REQUEST = 1
HOT_QUANTILE = 2**-0.25
DELTA = 1.0
OCCUPANCY_MIN = 2
SPREAD_SAMPLES = 128
"""Probe answers from which the spread of requests in flight over the fleet is estimated."""


class Prequal(Balancer):
    """Three probes per request keep a pool of answers; the hot-cold lexicographic rule picks from it.

    Source: Prequal (Wydrowski, Kleinberg, Rumble, Archer; NSDI 2024) with its parameters: pool of 16, answers at most
    a second old, 3 probes and 1 removal per request, hot above the 2^-0.25 quantile of requests in flight, delta 1
    in the bound on reuse, a random server while the pool holds fewer than two.

    What the paper's local network did not need: it compares latencies at the server, and here the round trip of the
    probe is added, since 60 ms of way are part of what a request waits for. Its probe timeout of 1 to 3 ms would lose
    every answer from afar: an answer is dated half a round trip back, so the age limit of 1 s (16 round trips of
    60 ms) is the timeout. The latency at a load is kept here instead of at the server, from the pair of both that
    every answer carries; so it follows when a request of ours raises the load of a probe that is used again. Servers'
    usual reports count as answers to probes. The paper's treatment of failing servers is not published; outlier
    detection stands in.
    """

    name = "prequal"
    home = "reconnect-storm"

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self._pool = ProbePool()
        self._latencies: dict[str, RifLatency] = {}
        self._rtt_s: dict[str, float] = {}
        self._spread: deque[int] = deque(maxlen=SPREAD_SAMPLES)
        self._outliers = Outliers()

    def choose(self, now: float, facts: RequestFacts, nodes: Sequence[str]) -> str:
        nodes = self._outliers.admit(now, self.ready(facts, nodes))
        probes = self._pool.fresh(now, nodes)
        bound = hot_bound(self._spread)
        if len(probes) < min(OCCUPANCY_MIN, len(nodes)):
            chosen = self.random.choice(nodes)
        else:
            probe = best(probes, bound)
            chosen = probe.node
            self._pool.use(probe)
            probe.latency_s = self._latency_s(now, probe.node, probe.in_flight) or probe.latency_s
        for _ in range(REMOVALS_PER_REQUEST):
            self._pool.remove(bound)
        return chosen

    def probe(self, now: float, nodes: Sequence[str]) -> Sequence[str]:
        return self.random.sample(nodes, min(PROBES_PER_REQUEST, len(nodes)))

    def on_report(self, now: float, node: str, report: NodeReport, rtt_s: float) -> None:
        super().on_report(now, node, report, rtt_s)
        self._rtt_s[node] = rtt_s
        latency_s = self._latency_s(now, node, report.in_flight)
        if latency_s is None:
            if not report.versions:
                return
            latency_s = (report.versions[0].queue_us + report.versions[0].service_p50_us) / 1e6 + rtt_s
        uses = self._round(reuse(len(self._rtt_s)))
        self._spread.append(report.in_flight)
        self._pool.add(Probe(node, now - rtt_s / 2, report.in_flight, latency_s, uses))

    def on_reply(self, now: float, node: str, latency_s: float, served: Served | None, code: Code | None) -> None:
        super().on_reply(now, node, latency_s, served, code)
        self._outliers.observe(now, node, code)
        if served is not None and code is None:
            at_server_s = (served.queue_us + served.compute_us) / 1e6
            self._latencies.setdefault(node, RifLatency()).observe(now, served.in_flight, at_server_s)

    def _latency_s(self, now: float, node: str, in_flight: int) -> float | None:
        latencies = self._latencies.get(node)
        at_server_s = latencies.at(now, in_flight) if latencies is not None else None
        return None if at_server_s is None else at_server_s + self._rtt_s.get(node, 0.0)

    def _round(self, uses: float) -> float:
        if uses == inf:
            return inf
        return floor(uses) + (self.random.random() < uses % 1.0)


def hot_bound(spread: Sequence[int]) -> float:
    """Requests in flight above which a server is hot: the exact rank at the quantile; nobody is while none is known."""
    if not spread:
        return inf
    return sorted(spread)[ceil(HOT_QUANTILE * len(spread)) - 1]


def reuse(servers: int) -> float:
    """How often an answer may be used, before randomised rounding.

    In a fleet not much larger than the pool the paper's formula has no positive value: probes come in faster than
    requests could use them up, and an answer serves until it is replaced, removed or too old.
    """
    gained = (1.0 - POOL_MAX / servers) * PROBES_PER_REQUEST - REMOVALS_PER_REQUEST
    return max(1.0, (1.0 + DELTA) / gained) if gained > 0.0 else inf
