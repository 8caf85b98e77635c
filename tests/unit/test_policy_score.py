"""The scoring of candidates: what it leaves out, that a compiler takes it as it is, and that explanations agree."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import numba
import numpy as np
import pytest

from nearcast.handler import Served
from nearcast.load import NodeReport, VersionReport
from router.policy import Outcome, Policy, PolicyConfig, RequestFacts, Send
from router.policy.candidates import size_class
from router.policy.score import INFINITY, draw, score
from router.policy.window import Window

COLUMNS = ("base95", "cost", "drain", "crowding", "crowding95", "s_per_byte", "hot_above")


def table(random: Random, count: int) -> dict[str, list[float]]:
    columns = {name: [random.random() for _ in range(count)] for name in COLUMNS}
    columns["s_per_byte"] = [value * 1e-6 for value in columns["s_per_byte"]]
    columns["base95"] = [INFINITY if random.random() < 0.2 else value for value in columns["base95"]]
    # Equal costs must be told apart in the same way, too.
    columns["cost"] = [round(value, 1) for value in columns["cost"]]
    return columns


def test_a_compiler_takes_it_unchanged_and_finds_the_same() -> None:
    fast_score: Any = numba.njit(score)
    fast_draw: Any = numba.njit(draw)
    random = Random(7)
    for _ in range(300):
        count = random.randrange(1, 33)
        columns = table(random, count)
        places = random.sample(range(40), count)
        queues = [random.uniform(-3, 3) for _ in range(40)]
        slots = [float(random.randrange(1, 9)) for _ in range(count)]
        size, limit, toll = float(random.randrange(1_000_000)), random.uniform(0.2, 4.0), random.random()
        costs = [0.0] * count
        found = score(size, limit, toll, queues, places, *columns.values(), costs)  # type: ignore[call-arg]
        arrays = [np.array(column) for column in columns.values()]
        fast_costs = np.zeros(count)
        assert fast_score(size, limit, toll, np.array(queues), np.array(places), *arrays, fast_costs) == found
        assert fast_costs.tolist() == costs
        bound, first, second = random.uniform(0, 3), random.random(), random.random()
        ties = [i for i, cost in enumerate(costs) if cost <= bound]
        drawn = draw(costs, bound, queues, places, slots, first, second)
        assert drawn in ties if ties else drawn == -1
        args = (fast_costs, bound, np.array(queues), np.array(places), np.array(slots), first, second)
        assert fast_draw(*args) == drawn


def test_constraints_come_before_costs() -> None:
    costs = [0.0] * 3
    queues, places = [0.0, 0.0, 5.0], [0, 1, 2]
    base95, cost, rest = [9.0, 1.0, 1.0], [0.1, 0.9, 0.2], [0.0] * 3
    found = score(0.0, 2.0, 0.0, queues, places, base95, cost, rest, rest, rest, rest, [3.0] * 3, costs)
    assert found == (1, -1, True)  # the first would be late, the third is hot
    assert costs == [INFINITY, 0.9, INFINITY]


def test_the_shorter_queue_of_two_wins_by_share_of_slots() -> None:
    queues, places, slots = [1.0, -2.0, -6.0], [0, 1, 2], [4.0, 4.0, 8.0]
    drawn = [draw([1.0, 1.0, 1.0], 1.0, queues, places, slots, a / 8, b / 8) for a in range(8) for b in range(8)]
    assert {drawn.count(i) for i in range(3)} == {4, 12, 48}
    assert drawn.count(0) == 4, "only where both draws fall on the busiest"


def test_explanations_are_what_decided() -> None:
    policy = Policy(PolicyConfig(tie_fraction=0.0, tie_ms=0.0), seed=1)
    random = Random(3)
    for i in range(6):
        policy.add_target(0.0, f"t{i}", "peer")
        version = VersionReport(
            model="m",
            version="1",
            service_p50_us=random.uniform(500, 5000),
            service_p95_us=6000.0,
            price=random.random(),
        )
        report = NodeReport(node="", role="edge", slots=2, in_flight=random.randrange(5), versions=(version,))
        policy.on_report(0.0, f"t{i}", report)
        policy.on_probe(0.0, f"t{i}", random.uniform(0.001, 0.01))
    for size in (600, 40_000, 600_000):
        facts = RequestFacts(model="m", size_bytes=size, remaining_s=0.2)
        decision = policy.decide(0.01, facts, explain=True)
        assert isinstance(decision, Send)
        able = [terms for terms in decision.terms if terms.verdict in ("feasible", "chosen")]
        assert min(able, key=lambda terms: terms.cost_ms).target == decision.target
        chosen = next(terms for terms in decision.terms if terms.verdict == "chosen")
        assert chosen.t50_ms == pytest.approx(chosen.rtt_ms + chosen.transfer_ms + chosen.wait_ms + chosen.service_ms)


def test_price_and_quality_are_limits_and_then_costs() -> None:
    policy = Policy(PolicyConfig(), seed=1)
    for name, price, quality in (("dear", 30.0, 1.0), ("poor", 1.0, 0.5), ("fair", 10.0, 0.9)):
        policy.add_target(0.0, name, "peer")
        version = VersionReport(model="m", version="1", service_p50_us=1000.0, price=price, quality=quality)
        policy.on_report(0.0, name, NodeReport(node=name, role="edge", slots=2, versions=(version,)))

    def target(**limits: float) -> str:
        decision = policy.decide(0.0, RequestFacts(model="m", **limits))  # type: ignore[arg-type]
        return decision.target if isinstance(decision, Send) else decision.reason

    assert target() == "fair"
    assert target(quality_min=0.95) == "dear"
    assert target(price_max=5.0) == "poor"


class TestWindow:
    def make(self) -> Window:
        window = Window(size=64, age_max_s=60.0, pause_s=1.0)
        for i in range(64):
            window.add(i * 0.01, 1.0 + (i % 8) * 0.1)
        return window

    def test_one_stall_changes_little_and_four_slow_answers_everything(self) -> None:
        window = self.make()
        assert not window.add(1.0, 9.0)
        assert window.quantile(0.5) < 1.6
        assert [window.add(1.0 + i * 0.01, 5.0) for i in range(3)][-1]
        assert len(window) == 4
        assert window.quantile(0.5) == 5.0

    def test_after_a_pause_one_answer_tells(self) -> None:
        window = self.make()
        assert window.add(5.0, 0.2)
        assert window.quantile(0.95) == 0.2
        assert not self.make().add(5.0, 1.3), "as ever is no news"


def answered(policy: Policy, now: float, target: str, latency_s: float) -> None:
    facts = RequestFacts(model="m", version="1")
    attempt = policy.on_sent(now, facts, Send(target, "1"))
    served = Served(compute_us=int(latency_s * 1e6), queue_us=1)
    policy.on_reply(now + latency_s, attempt, Outcome(served=served))


def two_targets() -> Policy:
    policy = Policy(PolicyConfig(tie_fraction=0.0, tie_ms=0.0), seed=1)
    for name in ("a", "b"):
        policy.add_target(0.0, name, "peer")
        policy.on_report(
            0.0, name, NodeReport(node=name, role="edge", slots=2, versions=(VersionReport(model="m", version="1"),))
        )
        policy.on_probe(0.0, name, 0.0)
    return policy


def test_who_was_slow_once_is_tried_again_by_one_request_at_a_time() -> None:
    policy = two_targets()
    facts = RequestFacts(model="m", version="1")
    for i in range(20):
        answered(policy, i * 0.01, "a", 0.001)
        answered(policy, i * 0.01, "b", 0.002)
    for i in range(10):
        answered(policy, 0.3 + i * 0.1, "a", 0.03)
    asked = []
    for i in range(100):
        now = 1.5 + i * 0.05
        answered(policy, now, "b", 0.002)
        decision = policy.decide(now + 0.01, facts)
        assert isinstance(decision, Send)
        if decision.target == "a":
            asked.append(now)
            policy.on_sent(now + 0.01, facts, decision)
    assert len(asked) == 1, "while it is out, the next go elsewhere"
    assert asked[0] < 6.0, "and it comes, long before anything else would tell"


def test_a_target_without_news_is_not_guessed_anew() -> None:
    policy = two_targets()
    for i in range(20):
        answered(policy, i * 0.01, "a", 0.0005)
    decision = policy.decide(60.0, RequestFacts(model="m", version="1"))
    assert isinstance(decision, Send)
    assert decision.target == "a", "what was measured long ago is better than a guess"


def test_size_classes_are_few() -> None:
    sizes = [0, 600, 4095, 4096, 40_000, 600_000, 6_000_000, 2**40]
    assert [size_class(size) for size in sizes] == [0, 0, 0, 1, 2, 3, 4, 4]


def test_service_times_are_told_apart_by_size() -> None:
    policy = two_targets()
    small, large = RequestFacts(model="m", version="1", size_bytes=600), RequestFacts(model="m", size_bytes=600_000)
    for i in range(40):
        for facts, times in ((small, {"a": 0.001, "b": 0.004}), (large, {"a": 0.3, "b": 0.1})):
            for target, latency_s in times.items():
                now = i * 0.5
                attempt = policy.on_sent(now, facts, Send(target, "1"))
                served = Served(compute_us=int(latency_s * 1e6), queue_us=1)
                policy.on_reply(now + latency_s, attempt, Outcome(served=served))
    found = [policy.decide(20.0, facts) for facts in (small, large)]
    assert [decision.target for decision in found if isinstance(decision, Send)] == ["a", "b"]


def test_requests_on_their_way_are_in_nobodys_queue() -> None:
    policy = Policy(PolicyConfig(), seed=1)
    policy.add_target(0.0, "far", "cloud")
    version = VersionReport(model="m", version="1", service_p50_us=10_000.0)
    policy.on_report(0.0, "far", NodeReport(node="far", role="cloud", slots=2, versions=(version,)))
    policy.on_probe(0.0, "far", 0.1)
    facts = RequestFacts(model="m", version="1")
    open_: list[tuple[float, object]] = []
    for i in range(400):
        now = i * 0.01
        while open_ and open_[0][0] <= now:
            at, attempt = open_.pop(0)
            policy.on_reply(at, attempt, Outcome(served=Served(compute_us=10_000, queue_us=1)))  # type: ignore[arg-type]
        policy.decide(now, facts)
        open_.append((now + 0.11, policy.on_sent(now, facts, Send("far", "1"))))
    target = policy.targets[0]
    assert target.own >= 10
    assert target.present < 4.0
    assert target.queue <= 2.0
    assert math.isfinite(target.travelling)
