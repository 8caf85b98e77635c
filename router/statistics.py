"""What a router counts, as plain numbers; Prometheus reads them when it scrapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from nearcast.errors import Code
from nearcast.metrics import Collector
from router.policy.admission import rank_of
from router.policy.breaker import State

if TYPE_CHECKING:
    from prometheus_client import Metric

    from router.policy import Policy, Reject

_KEYS_MAX = 4096
_STATES: tuple[State, ...] = ("closed", "open", "half_open")


class RouterStatistics:
    """Counters of one router."""

    def __init__(self) -> None:
        self.sends: dict[tuple[str, Code | None], int] = {}
        self.refused: dict[Code, int] = {}
        self.decisions: defaultdict[str, int] = defaultdict(int)
        """Sends by the reason of the decision; counted where it is made, on the way of every request."""
        self.refusals: defaultdict[tuple[str, int], int] = defaultdict(int)
        self.hedges = 0
        self.hedges_won = 0
        self.retries = 0
        self.missed = 0
        self.forwarded = 0
        self.escalations: dict[str, int] = {"escalated": 0, "kept_late": 0, "kept_failed": 0}
        self.shadows: dict[tuple[str, str], int] = {}

    def count(self, target: str, code: Code | None) -> None:
        """One attempt ended; `code` None = answered."""
        key = (target, code)
        count = self.sends.get(key)
        if count is None:
            if len(self.sends) >= _KEYS_MAX:
                return
            count = 0
        self.sends[key] = count + 1

    def answered(self, target: str) -> int:
        """Attempts that a target has answered."""
        return self.sends.get((target, None), 0)

    def refuse(self, reject: Reject, priority: int) -> None:
        """One request was refused without being sent."""
        self.refused[reject.code] = self.refused.get(reject.code, 0) + 1
        self.refusals[reject.reason, rank_of(priority)] += 1


class RouterCollector(Collector):
    """Turns the counters and the policy's view into metrics."""

    def __init__(self, statistics: RouterStatistics, policy: Policy, now: Callable[[], float]) -> None:
        self._statistics = statistics
        self._policy = policy
        self._now = now

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import CounterMetricFamily

        counts = self._statistics
        sends = CounterMetricFamily(
            "nearcast_router_sends", "Attempts by target and outcome", labels=["target", "code"]
        )
        for (target, code), count in list(counts.sends.items()):
            sends.add_metric([target, "OK" if code is None else code.value], count)
        refused = CounterMetricFamily("nearcast_router_refused", "Requests refused at once", labels=["code"])
        for code, count in list(counts.refused.items()):
            refused.add_metric([code.value], count)
        yield sends
        yield refused
        for name, help_text, value in (
            ("nearcast_router_hedges", "Second copies sent", counts.hedges),
            ("nearcast_router_hedges_won", "Second copies that answered first", counts.hedges_won),
            ("nearcast_router_retries", "Requests sent once more after a failure", counts.retries),
            ("nearcast_router_missed_assignments", "Requests of the candidate that stable answered", counts.missed),
            ("nearcast_router_forwarded", "Requests of other routers, served locally", counts.forwarded),
        ):
            yield CounterMetricFamily(name, help_text, value=value)
        escalations = CounterMetricFamily(
            "nearcast_router_escalations", "Uncertain answers, by what became of them", labels=["outcome"]
        )
        for outcome, count in counts.escalations.items():
            escalations.add_metric([outcome], count)
        shadows = CounterMetricFamily(
            "nearcast_router_shadows", "Requests assigned to a shadow, by outcome", labels=["model", "outcome"]
        )
        for (model, outcome), count in list(counts.shadows.items()):
            shadows.add_metric([model, outcome], count)
        yield from (escalations, shadows)
        yield from self._collect_reasons()
        yield from self._collect_targets()

    def _collect_reasons(self) -> Iterable[Metric]:
        """Why: labels are the reason codes of `router.policy.reasons`, tiers and the four classes, never a client's."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        counts, hedger = self._statistics, self._policy.hedger
        decisions = CounterMetricFamily("nearcast_router_decisions", "Requests sent, by reason", labels=["reason"])
        for reason, count in list(counts.decisions.items()):
            decisions.add_metric([reason], count)
        refusals = CounterMetricFamily(
            "nearcast_router_refusals",
            "Requests refused, by reason and class (0 = highest)",
            labels=["reason", "class"],
        )
        for (reason, rank), count in list(counts.refusals.items()):
            refusals.add_metric([reason, str(rank)], count)
        denied = CounterMetricFamily("nearcast_router_hedges_denied", "Second copies not sent", labels=["reason"])
        for reason, count in hedger.denied.items():
            denied.add_metric([reason], count)
        frozen = GaugeMetricFamily("nearcast_router_hedges_frozen", "1 = a tier is in a brown-out", labels=["tier"])
        for tier, gate in list(hedger.gates.items()):
            frozen.add_metric([tier], float(gate.frozen))
        tokens = GaugeMetricFamily("nearcast_router_budget_tokens", "Extra sends saved up", labels=["budget"])
        tokens.add_metric(["hedge"], hedger.budget.tokens)
        tokens.add_metric(["retry"], self._policy.retries.tokens)
        yield from (decisions, refusals, denied, frozen, tokens)

    def _collect_targets(self) -> Iterable[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        labels = ["target", "tier"]
        load = GaugeMetricFamily("nearcast_router_target_load", "Requests believed to be on a target", labels=labels)
        own = GaugeMetricFamily("nearcast_router_target_in_flight", "Open attempts on a target", labels=labels)
        rtt = GaugeMetricFamily("nearcast_router_target_rtt_seconds", "Smoothed round trip", labels=labels)
        closed = GaugeMetricFamily("nearcast_router_target_usable", "1 = its connection is believed in", labels=labels)
        age = GaugeMetricFamily("nearcast_router_target_report_age_seconds", "Since its last report", labels=labels)
        breakers = GaugeMetricFamily(
            "nearcast_router_target_breakers", "Breakers of its models by state", labels=[*labels, "state"]
        )
        now, stale = self._now(), 0
        for target in self._policy.targets:
            names = [target.name, target.tier]
            age_s = float("inf") if target.reported_at is None else max(0.0, now - target.reported_at)
            if target.reported_at is not None:
                age.add_metric(names, age_s)
            stale += age_s * 1e3 > self._policy.config.stale_ms
            states = [breaker.state for breaker in list(target.breakers.values())]
            for state in _STATES:
                breakers.add_metric([*names, state], states.count(state))
            load.add_metric(names, target.load)
            own.add_metric(names, target.own)
            rtt.add_metric(names, target.rtt_s)
            closed.add_metric(names, float(target.breaker.state == "closed" and not target.gone))
        yield from (load, own, rtt, closed, age, breakers)
        yield GaugeMetricFamily("nearcast_router_stale_targets", "Targets without a fresh report", value=stale)
