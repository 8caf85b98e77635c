"""P1 never to a target that cannot be in time while an idle one can; P4 no refusal while an idle slot is in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from nearcast.errors import Code
from nearcast.load import NodeReport, Tier, VersionReport
from router.policy import Outcome, Policy, PolicyConfig, RequestFacts, Send, Terms

CONFIG = PolicyConfig(breaker_failures=2)
NEARLY_MS = 1e-6


class Target(NamedTuple):
    """A target, how it is, and what has happened to it."""

    tier: Tier
    rtt_ms: float
    service_ms: float
    slots: int
    in_flight: int
    own: int
    failures: int
    lost: bool
    draining: bool
    quality: float
    price: float


targets = st.builds(
    Target,
    tier=st.sampled_from(["peer", "peer", "cloud"]),
    rtt_ms=st.floats(0.2, 60),
    service_ms=st.floats(1, 60),
    slots=st.integers(1, 4),
    in_flight=st.integers(0, 6),
    own=st.integers(0, 4),
    failures=st.sampled_from([0, 0, 0, 1, 2]),
    lost=st.sampled_from([False, False, False, True]),
    draining=st.sampled_from([False, False, False, True]),
    quality=st.sampled_from([1.0, 0.5]),
    price=st.sampled_from([0.0, 3.0]),
)
requests = st.builds(
    RequestFacts,
    model=st.just("m"),
    version=st.sampled_from(["", "1"]),
    size_bytes=st.sampled_from([600, 200_000]),
    remaining_s=st.one_of(st.none(), st.floats(0.002, 0.2)),
    priority=st.integers(0, 3),
    tenant=st.sampled_from(["local", "other"]),
    quality_min=st.sampled_from([0.0, 0.0, 0.7]),
    price_max=st.sampled_from([None, None, 1.0]),
)


def build(fleet: Sequence[Target], seed: int) -> Policy:
    policy = Policy(CONFIG, seed)
    for i, target in enumerate(fleet):
        name = f"t{i}"
        policy.add_target(0.0, name, target.tier)
        version = VersionReport(
            model="m",
            version="1",
            service_p50_us=target.service_ms * 1e3,
            service_p95_us=target.service_ms * 1.5e3,
            quality=target.quality,
            price=target.price,
        )
        report = NodeReport(
            node=name,
            role="edge",
            slots=target.slots,
            in_flight=target.in_flight,
            draining=target.draining,
            versions=(version,),
        )
        policy.on_report(0.0, name, report)
        policy.on_probe(0.0, name, target.rtt_ms / 1e3)
        facts, send = RequestFacts(model="m", version="1"), Send(name, "1")
        for _ in range(target.failures):
            policy.on_reply(0.02, policy.on_sent(0.01, facts, send), Outcome(Code.INTERNAL))
        for _ in range(target.own):
            policy.on_sent(0.02, facts, send)
        if target.lost:
            policy.on_connection_lost(0.03, name)
    return policy


def is_idle_and_in_time(terms: Terms, limit_ms: float) -> bool:
    return terms.verdict in ("feasible", "hot", "chosen") and terms.wait_ms == 0.0 and terms.t95_ms <= limit_ms


@settings(max_examples=60, deadline=None)
@given(
    fleet=st.lists(targets, min_size=1, max_size=6),
    asked=st.lists(st.tuples(st.floats(0, 0.3), requests), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
)
def test_what_an_idle_target_can_do_in_time_is_done_in_time(
    fleet: list[Target], asked: list[tuple[float, RequestFacts]], seed: int
) -> None:
    policy, now = build(fleet, seed), 0.05
    for pause_s, facts in asked:
        now += pause_s
        limit_ms = math.inf if facts.remaining_s is None else facts.remaining_s * 1e3 - CONFIG.reserve_ms
        decision = policy.decide(now, facts, explain=True)
        idle = [terms for terms in decision.terms if is_idle_and_in_time(terms, limit_ms - NEARLY_MS)]
        if isinstance(decision, Send):
            (chosen,) = (terms for terms in decision.terms if terms.verdict == "chosen")
            assert chosen.t50_ms <= limit_ms + NEARLY_MS or decision.reason == "panic"
            assert chosen.t95_ms <= limit_ms + NEARLY_MS or not idle, "P1"
            policy.on_sent(now, facts, decision)
        else:
            assert not idle, "P4"
