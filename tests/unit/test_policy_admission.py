"""Who is let in while a queue stands, who stands in, and what a refusal says: through the policy itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from nearcast.errors import Code
from nearcast.handler import Served
from nearcast.load import NodeReport, Tier, VersionReport
from router.policy import Attempt, Outcome, Policy, PolicyConfig, Reject, RequestFacts, Send
from router.policy.reasons import REASONS, REFUSALS, SENDS, VERDICTS

STALE_S = 1.0
"""After this long without a free slot the queue of a request with 200 ms stands."""


def report(*versions: VersionReport, slots: int = 4) -> NodeReport:
    return NodeReport(node="n", role="edge", slots=slots, versions=versions)


def version(model: str = "big", release: str = "1", **changes: object) -> VersionReport:
    described = {"service_p50_us": 10_000.0, "service_p95_us": 12_000.0} | changes
    return VersionReport(model=model, version=release, **described)  # type: ignore[arg-type]


def make(*versions: VersionReport, tier: Tier = "local", names: tuple[str, ...] = ("a",), slots: int = 4) -> Policy:
    policy = Policy(PolicyConfig(), seed=1)
    for name in names:
        policy.add_target(0.0, name, tier)
        policy.on_report(0.0, name, report(*versions, slots=slots))
    return policy


def facts(**changes: object) -> RequestFacts:
    return RequestFacts(**({"model": "big", "version": "1", "remaining_s": 0.2} | changes))  # type: ignore[arg-type]


def fill(policy: Policy, now: float, request: RequestFacts) -> list[Attempt]:
    """Send until one is refused."""
    decisions: Iterator[object] = iter(lambda: policy.decide(now, request), None)
    sends = itertools.takewhile(lambda decision: isinstance(decision, Send), decisions)
    return [policy.on_sent(now, request, send) for send in sends if isinstance(send, Send)]


def stand(policy: Policy, request: RequestFacts) -> list[Attempt]:
    """A queue that is as long as a burst may be and has stood for an interval."""
    return fill(policy, 0.0, request)


class TestClasses:
    def test_while_a_queue_stands_the_lowest_class_is_refused_first(self) -> None:
        policy = make(version())
        opened = stand(policy, facts())
        verdicts: list[list[bool]] = []
        while opened:
            policy.on_reply(STALE_S, opened.pop(), Outcome(Code.CANCELLED))
            verdicts.append([isinstance(policy.decide(STALE_S, facts(priority=p)), Send) for p in (1, 0, 2, 3)])
        # As the queue gets shorter more classes are let in, never a lower one before a higher one.
        assert verdicts[0] == [True, False, False, False]
        assert verdicts[-1] == [True, True, True, True]
        assert all(row == sorted(row, reverse=True) for row in verdicts)
        assert len({tuple(row) for row in verdicts}) == 4

    def test_a_burst_may_wait(self) -> None:
        burst = len(stand(make(version()), facts(priority=3)))
        policy = make(version())
        first = stand(policy, facts(priority=3))
        for attempt in first:
            policy.on_reply(STALE_S, attempt, Outcome(Code.CANCELLED))
        policy.on_report(STALE_S, "a", report(version()))
        again = fill(policy, STALE_S, facts(priority=3))
        assert burst == len(first) == len(again)  # the queue was empty in between, so it is a new burst

    def test_nobody_is_shed_while_a_slot_is_free(self) -> None:
        policy = make(version(), names=("a", "b"), tier="peer", slots=1)
        policy.on_sent(0.0, facts(), Send("a", "1"))
        policy.decide(0.0, facts(priority=3))
        decision = policy.decide(STALE_S, facts(priority=3))
        assert isinstance(decision, Send)
        assert decision.target == "b"

    def test_who_has_time_does_not_fill_the_queue_of_the_urgent(self) -> None:
        policy = make(version())
        urgent, patient = facts(priority=1, remaining_s=0.05), facts(priority=2, remaining_s=None)
        stand(policy, urgent)
        assert isinstance(policy.decide(STALE_S, patient), Reject)
        alone = make(version())
        assert len(stand(alone, patient)) > 100


class TestHints:
    def test_a_refusal_says_when_to_come_back_and_not_all_at_once(self) -> None:
        policy = make(version())
        stand(policy, facts())
        refusals = [policy.decide(STALE_S, facts(priority=3)) for _ in range(40)]
        assert {(r.code, r.reason) for r in refusals if isinstance(r, Reject)} == {(Code.OVERLOADED, "shed")}
        hints = [r.retry_after_ms or 0 for r in refusals if isinstance(r, Reject)]
        assert 60 <= min(hints) < max(hints) <= 400
        assert len(set(hints)) > 10

    def test_the_pause_grows_with_the_excess(self) -> None:
        policy = make(version())
        stand(policy, facts())
        hints = [getattr(policy.decide(STALE_S, facts(priority=3)), "retry_after_ms", 0) for _ in range(300)]
        assert min(hints[-20:]) > 5 * max(hints[:5])
        assert max(hints) <= 30_000


class TestTenants:
    def test_the_class_comes_first_and_then_who_is_beyond_its_share(self) -> None:
        policy = make(version(), names=("a", "b"), tier="peer", slots=8)
        for priority in (0, 2):
            quiet = facts(tenant="quiet", priority=priority)
            policy.on_sent(0.0, quiet, Send("a", "1"))
        half = [stand(policy, facts(tenant="flood", priority=priority)) for priority in (2, 0)]
        opened = half[0] + [policy.on_sent(0.0, facts(tenant="flood"), Send("b", "1")) for _ in half[0]] + half[1]
        asked = [facts(tenant=tenant, priority=p) for p in (0, 2) for tenant in ("quiet", "flood")]
        verdicts: list[tuple[bool, ...]] = []
        while opened:
            policy.on_reply(STALE_S, opened.pop(0), Outcome(Code.CANCELLED))
            verdicts.append(tuple(isinstance(policy.decide(STALE_S, each), Send) for each in asked))
        # As the queue gets shorter: the quiet tenant's ordinary requests, the flood's, then batch in the same order.
        assert list(dict.fromkeys(verdicts))[:5] == [tuple(i < n for i in range(4)) for n in range(5)]

    def test_to_call_everything_urgent_is_worth_no_more_than_the_share(self) -> None:
        policy = make(version())
        urgent, ordinary = facts(tenant="flood", priority=1), facts(tenant="other")
        opened = stand(policy, urgent)
        policy.on_reply(STALE_S, opened.pop(), Outcome(Code.CANCELLED))
        assert isinstance(policy.decide(STALE_S, urgent), Send)  # nobody else wants anything
        while isinstance(policy.decide(STALE_S, ordinary), Reject):
            policy.on_reply(STALE_S, opened.pop(), Outcome(Code.CANCELLED))
        refused = policy.decide(STALE_S, urgent)
        assert isinstance(refused, Reject)
        assert refused.reason == "tenant_share"


def test_to_explain_leaves_no_trace() -> None:
    def decisions(*, explain: bool) -> list[object]:
        policy = make(version(), names=("a", "b", "c"), tier="peer")
        opened = stand(policy, facts())
        found: list[object] = []
        for step in range(60):
            now = STALE_S + step * 0.01
            policy.on_reply(now, opened.pop(0), Outcome(Code.CANCELLED))
            found.append(policy.decide(now, facts(priority=step % 4)))
            for p in range(4 if explain else 0):
                policy.decide(now, facts(priority=p, tenant=f"t{p}"), explain=True)
        return found

    assert decisions(explain=False) == decisions(explain=True)


def test_one_poisonous_request_counts_against_one_target() -> None:
    policy = make(version(), names=("a", "b", "c"), tier="peer")
    for step in range(12):
        now, tried = step * 0.01, []
        decision: object = policy.decide(now, facts())
        kind = "first"
        while isinstance(decision, Send):
            tried.append(decision.target)
            attempt = policy.on_sent(now, facts(), decision, kind)
            failed = Outcome(Code.INTERNAL, told=True)
            policy.on_reply(now, attempt, failed)
            decision, kind = policy.retry(now, facts(), attempt, failed, tried), "retry"
            assert decision is None or decision.reason == "second_opinion"
        assert len(tried) == len(set(tried)) == 3
    failures = [version.breaker for target in policy.targets for version in target.versions.values()]
    assert sum(breaker.state != "closed" for breaker in failures) <= 2


class TestQualityAndPrice:
    def test_they_are_constraints(self) -> None:
        policy = Policy(PolicyConfig(), seed=1)
        policy.add_target(0.0, "cheap", "local")
        policy.add_target(0.0, "dear", "cloud")
        policy.on_report(0.0, "cheap", report(version(quality=0.6, price=0.0)))
        policy.on_report(0.0, "dear", report(version(quality=0.9, price=5.0)))
        good = policy.decide(0.0, facts(quality_min=0.8), explain=True)
        assert isinstance(good, Send)
        assert good.target == "dear"
        assert {t.target: t.verdict for t in good.terms} == {"cheap": "low_quality", "dear": "chosen"}
        both = policy.decide(0.0, facts(quality_min=0.8, price_max=1.0))
        assert isinstance(both, Reject)
        assert (both.code, both.reason) == (Code.UNSUPPORTED, "not_offered")
        assert "best quality is 0.9" in both.message

    def test_a_better_answer_is_worth_some_time(self) -> None:
        policy = Policy(PolicyConfig(quality_weight_ms=1000.0), seed=1)
        policy.add_target(0.0, "near", "local")
        policy.add_target(0.0, "far", "peer")
        policy.on_report(0.0, "near", report(version(quality=0.9)))
        policy.on_report(0.0, "far", report(version(quality=1.0)))
        decision = policy.decide(0.0, facts())
        assert isinstance(decision, Send)
        assert decision.target == "far"


class TestStandIn:
    big = version(service_p50_us=400_000.0, service_p95_us=500_000.0, smaller="small")
    small = version("small", "7", quality=0.8)

    def test_a_smaller_model_answers_where_the_one_asked_for_cannot(self) -> None:
        policy = make(self.big, self.small)
        decision = policy.decide(0.0, facts(), explain=True)
        assert isinstance(decision, Send)
        assert (decision.model, decision.version, decision.reason) == ("small", "7", "smaller")
        assert {(t.model, t.verdict) for t in decision.terms} == {("", "infeasible"), ("small", "chosen")}
        attempt = policy.on_sent(0.0, facts(), decision)
        assert attempt.version.model == "small"
        policy.on_reply(0.01, attempt, Outcome(served=Served(compute_us=9000)))
        assert policy.outstanding == 0

    def test_copies_and_retries_are_of_the_model_that_answers(self) -> None:
        policy = make(self.big, self.small, names=("a", "b"), tier="peer")
        decision = policy.decide(0.0, facts())
        assert isinstance(decision, Send)
        attempt = policy.on_sent(0.0, facts(), decision)
        copy = policy.hedge(0.05, facts(remaining_s=0.15), attempt, (decision.target,))
        assert copy is not None
        assert (copy.model, copy.version) == ("small", "7")
        lost = Outcome(Code.UNAVAILABLE, sent=False)
        policy.on_reply(0.05, attempt, lost)
        again = policy.retry(0.05, facts(remaining_s=0.15), attempt, lost, (decision.target,))
        assert again is not None
        assert (again.model, again.version) == ("small", "7")

    @pytest.mark.parametrize(
        "changes",
        [{"sequence": "s"}, {"stateful": True}, {"pinned": True}, {"quality_min": 0.9}],
        ids=["sequence", "stateful", "pinned", "quality"],
    )
    def test_never_where_state_a_release_or_more_quality_is_asked_for(self, changes: dict[str, object]) -> None:
        assert isinstance(make(self.big, self.small).decide(0.0, facts(**changes)), Reject)

    def test_before_anybody_is_shed(self) -> None:
        policy = make(version(smaller="small"), names=("a",))
        policy.add_target(0.0, "b", "peer")
        policy.on_report(0.0, "b", report(self.small))
        stand(policy, facts(pinned=True))
        decision = policy.decide(STALE_S, facts(priority=3))
        assert isinstance(decision, Send)
        assert (decision.target, decision.model) == ("b", "small")


def test_a_sequence_never_moves_without_a_word() -> None:
    hidden = version(stateful="hidden")
    policy = make(hidden, names=("a", "b"), tier="peer")
    kept = facts(sequence="s")
    first = policy.decide(0.0, kept)
    assert isinstance(first, Send)
    policy.on_sent(0.0, kept, first)
    policy.on_connection_lost(0.0, first.target)
    moved = policy.decide(0.0, kept)
    assert isinstance(moved, Send)
    assert (moved.target != first.target, moved.reason) == (True, "moved")


def slow_down(policy: Policy, name: str, *others: str) -> dict[str, str]:
    """One target takes 15 times as long as it did, the others do not; the verdicts after 7.9 s of it."""
    for step in range(40):
        for each in (name, *others):
            took_s = 0.15 if each == name and step >= 10 else 0.01
            attempt = policy.on_sent(step * 0.2 - took_s, facts(), Send(each, "1"))
            policy.on_reply(step * 0.2, attempt, Outcome(served=Served(compute_us=int(took_s * 1e6))))
        policy.decide(step * 0.2, facts())
    return verdicts_at(policy, 7.9)


def verdicts_at(policy: Policy, now: float) -> dict[str, str]:
    return {term.target: term.verdict for term in policy.decide(now, facts(), explain=True).terms}


def test_a_slow_target_is_set_aside_and_comes_back() -> None:
    policy = make(version(), names=("a", "b", "c"), tier="peer")
    assert slow_down(policy, "a", "b", "c")["a"] == "slow"
    assert verdicts_at(policy, 30.0)["a"] != "slow"


def test_a_slow_target_saves_what_was_tried_on_a_dead_one() -> None:
    policy = make(version(), names=("slow", "dead"), tier="peer")
    assert slow_down(policy, "slow", "dead")["slow"] == "slow"
    attempt = policy.on_sent(7.9, facts(), Send("dead", "1"))
    lost = Outcome(Code.UNAVAILABLE, sent=False)
    policy.on_reply(7.9, attempt, lost)
    again = policy.retry(7.9, facts(), attempt, lost, ("dead",))
    assert again is not None
    assert again.target == "slow"


def test_who_was_set_aside_is_a_candidate_again_once_the_other_is_lost() -> None:
    policy = make(version(), names=("slow", "dead"), tier="peer")
    assert slow_down(policy, "slow", "dead")["slow"] == "slow"
    policy.on_connection_lost(7.9, "dead")
    policy.decide(8.0, facts())
    # The dead one may be tried again by now: that is no reason to try it.
    assert verdicts_at(policy, 8.16)["slow"] in ("chosen", "feasible")


def test_every_reason_has_a_meaning_and_one_only() -> None:
    assert len(REASONS) >= 30
    assert set(SENDS) & set(REFUSALS) == set()
    assert all(text and text[0].islower() for text in (SENDS | REFUSALS | VERDICTS).values())


def test_memory_stays_bounded_whatever_the_keys() -> None:
    config = PolicyConfig(tenant_shares_max=500, sequences_max=500, versions_max=64)
    policy = Policy(config, seed=1)
    policy.add_target(0.0, "a", "local")
    policy.on_report(0.0, "a", report(*(version(f"m{i}") for i in range(1000)), version(), slots=4))
    for i in range(100_000):
        request = RequestFacts(
            model=f"x{i}", version=str(i), tenant=f"t{i}", sequence=f"s{i}", stateful=True, priority=i % 5
        )
        attempt = policy.on_sent(i * 1e-5, request, Send("a", str(i)), "forwarded")
        policy.on_reply(i * 1e-5, attempt, Outcome(Code.INTERNAL))
    target = policy.targets[0]
    assert policy.outstanding == target.own == 0
    assert len(target.versions) <= 64
    assert len(target.breakers) <= 65
    assert len(policy._sequences) <= 500
    assert len(policy._admission.tenants) <= 1000
    policy.decide(10.0, facts())
    policy.decide(20.0, facts())
    assert len(policy._admission.tenants) <= 2
    assert len(policy._admission.queues) == 0


def test_a_cloud_that_is_late_for_a_second_is_set_aside_and_tried_with_few() -> None:
    policy = make(version(), tier="cloud", names=("c1", "c2"))
    policy.add_target(0.0, "here", "local")
    policy.on_report(0.0, "here", report(version()))
    for step in range(120):
        attempt = policy.on_sent(step * 0.02, facts(), Send(f"c{step % 2 + 1}", "1"))
        late = Served(compute_us=10_000, queue_us=900_000)
        policy.on_reply(step * 0.02 + 0.019, attempt, Outcome(served=late))
    verdicts = {t.target: t.verdict for t in policy.decide(2.4, facts(), explain=True).terms}
    assert verdicts == {"here": "chosen", "c1": "tier_open", "c2": "tier_open"}
    policy.remove_target(2.4, "here")
    alone = policy.decide(2.4, facts())
    assert isinstance(alone, Send)  # there is nothing else to choose
    assert alone.reason == "panic"


def test_where_most_of_a_tier_is_set_aside_it_is_used_all_the_same() -> None:
    policy = make(version(), names=("a", "b", "c"), tier="peer")
    policy.decide(0.0, facts())
    for name in ("a", "b"):
        opened = [policy.on_sent(0.0, facts(), Send(name, "1")) for _ in range(5)]
        for attempt in opened:
            policy.on_reply(0.01, attempt, Outcome(Code.INTERNAL, told=True))
    before = {t.target: t.verdict for t in policy.decide(0.01, facts(), explain=True).terms}
    assert before == {"a": "breaker_open", "b": "breaker_open", "c": "chosen"}
    after = {t.target: t.verdict for t in policy.decide(0.1, facts(), explain=True).terms}
    assert set(after.values()) == {"chosen", "feasible"}  # still behind the healthy one, by what their errors cost
