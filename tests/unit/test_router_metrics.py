"""What a router tells Prometheus: why it decided as it did, and how old what it knows is."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from prometheus_client import CollectorRegistry

from nearcast.errors import Code, MeshError
from nearcast.handler import RequestContext
from nearcast.load import NodeReport, VersionReport
from nearcast.wire.request import TensorRequest
from router.policy import Outcome, Policy, PolicyConfig, RequestFacts, Send
from router.policy.reasons import REASONS
from router.router import Router


@dataclass
class Hand:
    """A clock that is moved by hand."""

    at: float = 100.0

    def monotonic(self) -> float:
        return self.at

    def wall(self) -> float:
        return self.at


class Echo:
    """Answers everything at once."""

    async def infer(self, request, context):  # type: ignore[no-untyped-def]
        from nearcast.wire.response import TensorResponse

        return TensorResponse(model=request.model, version="1", outputs={})


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def router(hand: Hand, registry: CollectorRegistry) -> Router:
    made = Router(Policy(PolicyConfig(), seed=1), clock=hand, registry=registry)
    for name in ("a", "b"):
        made.attach(name, Echo(), "peer")  # type: ignore[arg-type]
        report = NodeReport(node=name, role="edge", slots=1, versions=(VersionReport(model="m", version="1"),))
        made.policy.on_report(hand.at, name, report)
    return made


async def test_decisions_and_refusals_by_reason(router: Router, hand: Hand, registry: CollectorRegistry) -> None:
    request = TensorRequest(model="m", inputs={})
    for _ in range(3):
        await router.infer(request, RequestContext())
    with pytest.raises(MeshError) as caught:
        await router.infer(request, RequestContext(deadline=hand.at + 0.0001, priority=1))
    assert caught.value.code is Code.DEADLINE
    with pytest.raises(MeshError):
        await router.infer(TensorRequest(model="x", inputs={}), RequestContext(priority=977))
    sample = registry.get_sample_value
    assert sample("nearcast_router_decisions_total", {"reason": "best"}) == 3
    assert sample("nearcast_router_refusals_total", {"reason": "deadline_too_short", "class": "0"}) == 1
    assert sample("nearcast_router_refusals_total", {"reason": "unknown_model", "class": "3"}) == 1
    reasons = {s.labels["reason"] for f in registry.collect() for s in f.samples if "reason" in s.labels}
    assert reasons - {"frozen", "budget", "nowhere"} <= set(REASONS)


def test_the_age_of_reports_and_who_is_stale(router: Router, hand: Hand, registry: CollectorRegistry) -> None:
    hand.at += 5.0
    router.policy.on_report(hand.at, "b", NodeReport(node="b", role="edge"))
    hand.at += 1.0
    sample = registry.get_sample_value
    age = "nearcast_router_target_report_age_seconds"
    assert sample(age, {"target": "a", "tier": "peer"}) == pytest.approx(6.0)
    assert sample(age, {"target": "b", "tier": "peer"}) == pytest.approx(1.0)
    assert sample("nearcast_router_stale_targets", {}) == 1


def test_breakers_budgets_and_denied_hedges(router: Router, hand: Hand, registry: CollectorRegistry) -> None:
    policy, facts = router.policy, RequestFacts(model="m")
    for _ in range(policy.config.breaker_failures):
        attempt = policy.on_sent(hand.at, facts, Send("a", "1"))
        policy.on_reply(hand.at, attempt, Outcome(Code.INTERNAL))
    sample = registry.get_sample_value
    breakers = "nearcast_router_target_breakers"
    assert sample(breakers, {"target": "a", "tier": "peer", "state": "open"}) == 1
    assert sample(breakers, {"target": "b", "tier": "peer", "state": "closed"}) == 1
    before = sample("nearcast_router_budget_tokens", {"budget": "hedge"})
    attempt = policy.on_sent(hand.at, facts, Send("a", "1"))
    assert policy.hedge(hand.at, facts, attempt, ["a"]) is not None
    assert sample("nearcast_router_budget_tokens", {"budget": "hedge"}) == before - 1
    assert policy.hedge(hand.at, facts, attempt, ["a", "b"]) is None
    assert sample("nearcast_router_hedges_denied_total", {"reason": "nowhere"}) == 1
    while policy.hedge(hand.at, facts, attempt, ["a"]) is not None:
        pass
    assert sample("nearcast_router_hedges_denied_total", {"reason": "budget"}) == 1
    assert sample("nearcast_router_budget_tokens", {"budget": "retry"}) == policy.config.retry_burst
