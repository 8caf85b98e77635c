"""C3: rank all servers by what they say about their queue, cubed, and keep to a rate that each can take."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from nearcast.errors import Code
from nearcast.handler import Served
from nearcast.load import NodeReport
from router.policy.facts import RequestFacts
from simulations.baselines.balancer import Balancer
from simulations.baselines.cubic_rate import CubicRate
from simulations.baselines.outliers import Outliers

ALPHA = 0.9
"""Weight of the new sample in every moving average."""
EXPONENT = 3
CLIENTS = 1
"""The concurrency weight: how many routers put as much on a server as this one does."""
SILENCE_S = 1.0
"""A report stands in for an answer of a server that has given none for so long."""


class Feedback:
    """Moving averages of one server: response time, service time (both seconds) and waiting requests."""

    __slots__ = ("at", "queue", "response_s", "service_s")

    def __init__(self, now: float, response_s: float, service_s: float, queue: float) -> None:
        self.at = now
        self.response_s = response_s
        self.service_s = service_s
        self.queue = queue

    def observe(self, now: float, response_s: float, service_s: float, queue: float) -> None:
        """Take one answer."""
        self.at = now
        self.response_s += ALPHA * (response_s - self.response_s)
        self.service_s += ALPHA * (service_s - self.service_s)
        self.queue += ALPHA * (queue - self.queue)

    def score_s(self, outstanding: int) -> float:
        """The cubic score; less is better."""
        queue = 1.0 + outstanding * CLIENTS + self.queue
        return self.response_s - self.service_s + queue**EXPONENT * self.service_s


class C3(Balancer):
    """The least R - 1/mu + q³/mu with q = 1 + outstanding · clients + queue, among the servers within their rate.

    Source: C3 (Suresh, Canini, Schmid, Feldmann; NSDI 2015) with the authors' constants: averages with weight 0.9 for
    the new sample, exponent 3, cubic rate control. A server that has said nothing yet is asked first.

    Where it had to be completed, it is in its favour: if no server is within its rate, the paper keeps the request back
    until one is, here it goes to the best score at once. The paper's clients hear of servers they avoid through
    speculative reads; here a report takes that place once a server has been silent for a second. A request that the
    client gave up counts with the time it took; other failures are left to outlier detection.
    """

    name = "c3"
    home = "cloud-brownout"

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self._feedback: dict[str, Feedback] = {}
        self._rates: dict[str, CubicRate] = {}
        self._outliers = Outliers()

    def choose(self, now: float, facts: RequestFacts, nodes: Sequence[str]) -> str:
        nodes = list(self._outliers.admit(now, self.ready(facts, nodes)))
        self.random.shuffle(nodes)
        nodes.sort(key=self.score_s)
        return next((node for node in nodes if self._rate(now, node).admits(now)), nodes[0])

    def score_s(self, node: str) -> float:
        """The score of `node` in seconds; 0 where it has never answered."""
        feedback = self._feedback.get(node)
        return 0.0 if feedback is None else feedback.score_s(self.open[node])

    def _rate(self, now: float, node: str) -> CubicRate:
        rate = self._rates.get(node)
        if rate is None:
            rate = self._rates[node] = CubicRate(now)
        return rate

    def on_report(self, now: float, node: str, report: NodeReport, rtt_s: float) -> None:
        super().on_report(now, node, report, rtt_s)
        feedback = self._feedback.get(node)
        if feedback is None or now - feedback.at <= SILENCE_S or not report.versions:
            return
        version = report.versions[0]
        service_s = version.service_p50_us / 1e6
        waiting = max(0, report.in_flight - report.slots)
        at = feedback.at
        feedback.observe(now, rtt_s + version.queue_us / 1e6 + service_s, service_s, waiting)
        feedback.at = at

    def on_sent(self, now: float, node: str) -> None:
        super().on_sent(now, node)
        self._rate(now, node).on_sent()

    def on_reply(self, now: float, node: str, latency_s: float, served: Served | None, code: Code | None) -> None:
        super().on_reply(now, node, latency_s, served, code)
        self._outliers.observe(now, node, code)
        feedback = self._feedback.get(node)
        if code is Code.DEADLINE and feedback is not None:
            feedback.observe(now, latency_s, feedback.service_s, feedback.queue)
        if code is not None or served is None:
            return
        self._rate(now, node).on_answer(now)
        service_s, queue = served.compute_us / 1e6, max(0, served.in_flight + 1 - self.slots.get(node, 1))
        if feedback is None:
            self._feedback[node] = Feedback(now, latency_s, service_s, queue)
        else:
            feedback.observe(now, latency_s, service_s, queue)
