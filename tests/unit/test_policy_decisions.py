"""What the policy decides in situations that people can picture."""

from __future__ import annotations

from nearcast.errors import Code
from nearcast.handler import Served
from nearcast.load import NodeReport, Tier, VersionReport
from router.policy import Outcome, Policy, PolicyConfig, Reject, RequestFacts, Send

ANSWER = Outcome(served=Served(compute_us=1000, queue_us=1))


def report(*versions: str, p50_us: float = 1000.0, p95_us: float = 2000.0, **changes: object) -> NodeReport:
    listed = tuple(
        VersionReport(model="digits", version=version, service_p50_us=p50_us, service_p95_us=p95_us)
        for version in versions
    )
    return NodeReport(**({"node": "n", "role": "edge", "slots": 2, "versions": listed} | changes))  # type: ignore[arg-type]


def make_policy(**tiers: Tier) -> Policy:
    policy = Policy(PolicyConfig(), seed=1)
    for name, tier in tiers.items():
        policy.add_target(0.0, name, tier)
        policy.on_report(0.0, name, report("1"))
        if tier != "local":
            policy.on_probe(0.0, name, 0.003 if tier == "peer" else 0.03)
    return policy


def facts(**changes: object) -> RequestFacts:
    return RequestFacts(**({"model": "digits", "version": "1", "remaining_s": 0.2} | changes))  # type: ignore[arg-type]


def sent(decision: object) -> Send:
    assert isinstance(decision, Send), decision
    return decision


def refused(decision: object) -> Reject:
    assert isinstance(decision, Reject), decision
    return decision


def test_near_first_and_the_cloud_when_the_edge_is_full() -> None:
    policy = make_policy(here="local", far="cloud")
    targets = []
    for _ in range(80):
        send = sent(policy.decide(0.01, facts()))
        policy.on_sent(0.01, facts(), send)
        targets.append(send.target)
    assert targets[0] == "here"
    assert "far" in targets
    assert targets.index("far") > 20


def test_unknown_model_names_the_known_ones() -> None:
    reject = refused(make_policy(here="local").decide(0.0, facts(model="cats")))
    assert reject.code is Code.MODEL_NOT_FOUND
    assert "digits" in reject.message


def test_unknown_version_names_the_versions() -> None:
    reject = refused(make_policy(here="local").decide(0.0, facts(version="9")))
    assert reject.code is Code.VERSION_MISMATCH
    assert "versions held: 1" in reject.message


def test_no_version_means_the_newest_hot_one() -> None:
    policy = make_policy(here="local")
    policy.on_report(0.0, "here", report("2", "10"))
    assert sent(policy.decide(0.0, facts(version=""))).version == "10"


def test_a_deadline_that_nobody_can_meet_is_refused_at_once() -> None:
    reject = refused(make_policy(far="cloud").decide(0.0, facts(remaining_s=0.012)))
    assert reject.code is Code.DEADLINE
    assert "within 12.0 ms" in reject.message


def test_saturation_is_refused_with_the_length_of_the_queue() -> None:
    policy = make_policy(here="local")
    for _ in range(1000):
        decision = policy.decide(0.0, facts())
        if isinstance(decision, Reject):
            break
        policy.on_sent(0.0, facts(), decision)
    reject = refused(decision)
    assert reject.code is Code.OVERLOADED
    assert reject.retry_after_ms is not None
    assert reject.retry_after_ms >= 50


def test_without_deadline_the_queue_is_still_bounded() -> None:
    policy = make_policy(here="local")
    open_facts = facts(remaining_s=None)
    for count in range(10_000):  # noqa: B007
        decision = policy.decide(0.0, open_facts)
        if isinstance(decision, Reject):
            break
        policy.on_sent(0.0, open_facts, decision)
    assert refused(decision).code is Code.OVERLOADED
    assert 3000 < count < 5000  # 2 s of queue, 1 ms each on two slots


def test_the_candidate_falls_back_to_stable_and_says_so() -> None:
    policy = make_policy(here="local")
    send = sent(policy.decide(0.0, facts(version="2", fallbacks=("1",))))
    assert (send.version, send.missed) == ("1", True)


def test_low_priority_must_fit_with_its_tail() -> None:
    policy = make_policy(here="local")
    policy.on_report(0.0, "here", report("1", p50_us=5000, p95_us=50_000))
    assert sent(policy.decide(1.0, facts(remaining_s=0.02))).reason == "late"
    assert refused(policy.decide(1.0, facts(remaining_s=0.02, priority=3)))


def test_fast_failures_attract_no_traffic() -> None:
    policy = make_policy(good="peer", bad="peer")
    policy.on_report(0.0, "bad", report("1", p50_us=10, p95_us=20))
    bad = 0
    for i in range(1000):
        now = 0.01 * i
        send = sent(policy.decide(now, facts()))
        attempt = policy.on_sent(now, facts(), send)
        if send.target == "bad":
            bad += 1
            policy.on_reply(now + 0.0001, attempt, Outcome(code=Code.INTERNAL))
        else:
            policy.on_reply(now + 0.004, attempt, ANSWER)
    assert 1 <= bad < 30


def test_a_lost_connection_closes_a_target_and_an_answered_probe_opens_it() -> None:
    policy = make_policy(near="peer", far="cloud")
    policy.on_connection_lost(1.0, "near")
    assert sent(policy.decide(1.0, facts())).target == "far"
    policy.on_probe(1.1, "near", 0.003)
    first = sent(policy.decide(1.1, facts()))
    assert first.target == "near"
    policy.on_sent(1.1, facts(), first)
    assert sent(policy.decide(1.1, facts())).target == "far"  # one trial at a time
    policy.on_probe(1.35, "near", 0.003)
    assert [sent(policy.decide(1.35, facts())).target for _ in range(3)] == ["near"] * 3  # back without more trials


def test_pushback_is_obeyed_but_not_for_ever() -> None:
    policy = make_policy(near="peer")
    attempt = policy.on_sent(0.0, facts(), sent(policy.decide(0.0, facts())))
    policy.on_reply(0.001, attempt, Outcome(code=Code.OVERLOADED, retry_after_ms=3_600_000))
    reject = refused(policy.decide(0.1, facts()))
    assert reject.code is Code.OVERLOADED
    assert sent(policy.decide(1.1, facts())).target == "near"


def test_who_was_refused_for_being_in_a_hurry_does_not_hold_up_those_who_have_time() -> None:
    policy = make_policy(near="peer")
    hurried = facts(remaining_s=0.015)
    attempt = policy.on_sent(0.0, hurried, sent(policy.decide(0.0, hurried)))
    policy.on_reply(0.001, attempt, Outcome(code=Code.OVERLOADED, retry_after_ms=200))
    assert refused(policy.decide(0.01, facts())).code is Code.OVERLOADED
    assert sent(policy.decide(0.017, facts())).target == "near"


def test_a_model_that_is_overloaded_or_away_does_not_hold_up_another_one_there() -> None:
    for answer in (
        Outcome(code=Code.OVERLOADED, retry_after_ms=500, told=True),
        Outcome(code=Code.UNAVAILABLE, retry_after_ms=500, sent=False, told=True),
    ):
        policy = make_policy(near="peer", far="cloud")
        held = (VersionReport(model="digits", version="1"), VersionReport(model="other", version="1"))
        for name in ("near", "far"):
            policy.on_report(0.0, name, report(versions=held))
        policy.on_reply(0.001, policy.on_sent(0.0, facts(), Send("near", "1")), answer)
        assert sent(policy.decide(0.1, facts())).target == "far"
        assert sent(policy.decide(0.1, facts(model="other"))).target == "near"
        assert sent(policy.decide(0.6, facts())).target == "near"


def test_a_target_that_did_not_serve_a_model_lately_is_asked_again_where_there_is_no_other() -> None:
    for answer in (Outcome(code=Code.UNAVAILABLE, sent=False, told=True), Outcome(code=Code.MODEL_NOT_FOUND)):
        policy = make_policy(near="peer", far="peer")
        policy.on_reply(0.001, policy.on_sent(0.0, facts(), Send("near", "1")), answer)
        attempt = policy.on_sent(0.1, facts(), sent(policy.decide(0.1, facts())))
        lost = Outcome(code=Code.UNAVAILABLE, sent=False)
        policy.on_reply(0.1, attempt, lost)
        assert sent(policy.retry(0.1, facts(), attempt, lost, ["far"])).target == "near"
        assert sent(policy.decide(0.1, facts())).reason == "panic"


def test_overload_is_said_where_the_other_targets_are_lost() -> None:
    policy = make_policy(near="peer", far="peer")
    attempt = policy.on_sent(0.0, facts(), Send("near", "1"))
    policy.on_connection_lost(0.0, "far")
    policy.on_reply(0.001, attempt, Outcome(code=Code.OVERLOADED, retry_after_ms=200))
    reject = refused(policy.decide(0.01, facts()))
    assert (reject.code, reject.reason) == (Code.OVERLOADED, "pushed_back")


def test_a_broken_model_with_no_other_target_still_gets_its_requests() -> None:
    policy = make_policy(here="local")
    for _ in range(8):
        attempt = policy.on_sent(0.0, facts(), sent(policy.decide(0.0, facts())))
        policy.on_reply(0.0, attempt, Outcome(code=Code.INTERNAL))
    assert sent(policy.decide(0.001, facts(remaining_s=10.0))).reason == "panic"


def test_a_cold_version_is_no_candidate_and_a_loading_one_costs_its_eta() -> None:
    policy = make_policy(near="peer")
    loading = VersionReport(model="digits", version="1", residency="loading", eta_ms=100.0, service_p50_us=1000.0)
    policy.on_report(0.0, "near", NodeReport(node="near", role="edge", versions=(loading,)))
    send = policy.decide(0.0, facts(remaining_s=1.0), explain=True)
    assert sent(send).terms[0].t50_ms > 100.0
    assert refused(policy.decide(0.0, facts(remaining_s=0.05)))
    asleep = VersionReport(model="digits", version="1", residency="cold", eta_ms=50.0, service_p50_us=1000.0)
    policy.on_report(1.0, "near", NodeReport(node="near", role="edge", versions=(asleep,)))
    for now in (1.0, 60.0):
        assert sent(policy.decide(now, facts(remaining_s=0.2))), "what loads on demand does so whenever a request comes"
        assert refused(policy.decide(now, facts(remaining_s=0.03))), "and not faster than it says"
    cold = VersionReport(model="digits", version="1", residency="cold")
    policy.on_report(60.0, "near", NodeReport(node="near", role="edge", versions=(cold,)))
    assert refused(policy.decide(60.0, facts())).code is Code.UNAVAILABLE


class TestHedge:
    def test_goes_to_the_other_target_once_and_within_its_deadline(self) -> None:
        policy = make_policy(a="peer", b="peer")
        send = sent(policy.decide(0.0, facts()))
        assert send.hedge_after_s is not None
        attempt = policy.on_sent(0.0, facts(), send)
        copy = policy.hedge(send.hedge_after_s, facts(remaining_s=0.2 - send.hedge_after_s), attempt)
        assert copy is not None
        assert copy.target != send.target
        assert policy.hedge(0.19, facts(remaining_s=0.001), attempt) is None

    def test_never_for_state_or_when_the_client_forbids(self) -> None:
        policy = make_policy(a="peer", b="peer")
        for changes in ({"stateful": True}, {"idempotent": False}):
            send = sent(policy.decide(0.0, facts(**changes)))
            assert send.hedge_after_s is None
            attempt = policy.on_sent(0.0, facts(**changes), send)
            assert policy.hedge(0.1, facts(**changes), attempt) is None

    def test_prefers_another_failure_domain(self) -> None:
        policy = Policy(PolicyConfig(), seed=1)
        for name, domain in (("a", "rack-1"), ("b", "rack-1"), ("c", "rack-2")):
            policy.add_target(0.0, name, "peer", domain)
            policy.on_report(0.0, name, report("1"))
            policy.on_probe(0.0, name, 0.02 if name == "c" else 0.001)
        send = sent(policy.decide(0.0, facts()))
        assert send.target in ("a", "b")
        copy = policy.hedge(0.01, facts(remaining_s=0.19), policy.on_sent(0.0, facts(), send))
        assert copy is not None
        assert copy.target == "c"


class TestRetry:
    def test_a_burst_of_lost_calls_moves_and_the_next_does_not(self) -> None:
        policy = make_policy(a="peer", b="peer")
        send = Send("a", "1")
        lost = Outcome(code=Code.UNAVAILABLE, sent=True)
        attempts = [policy.on_sent(0.0, facts(), send) for _ in range(65)]
        moved = []
        for attempt in attempts:
            policy.on_reply(0.01, attempt, lost)
            moved.append(policy.retry(0.01, facts(), attempt, lost, ("a",)))
        assert [m.target for m in moved[:64] if m] == ["b"] * 64
        assert moved[64] is None

    def test_a_target_that_tells_of_a_loss_behind_it_is_not_lost(self) -> None:
        policy = make_policy(a="peer")
        behind = Outcome(code=Code.UNAVAILABLE, sent=True, told=True)
        for _ in range(4):
            policy.on_reply(0.0, policy.on_sent(0.0, facts(), Send("a", "1")), behind)
            assert sent(policy.decide(0.0, facts())).target == "a"
        for lost in (Outcome(code=Code.UNAVAILABLE, sent=True), Outcome(code=Code.UNAVAILABLE, sent=False)):
            policy = make_policy(a="peer")
            policy.on_reply(0.0, policy.on_sent(0.0, facts(), Send("a", "1")), lost)
            assert refused(policy.decide(0.0, facts())).code is Code.UNAVAILABLE

    def test_what_never_left_is_free_but_bounded(self) -> None:
        policy = make_policy(a="peer", b="peer", c="peer", d="peer")
        refused_call = Outcome(code=Code.UNAVAILABLE, sent=False)
        for _ in range(100):
            attempt = policy.on_sent(0.0, facts(), Send("a", "1"))
            policy.on_reply(0.0, attempt, refused_call)
            assert policy.retry(0.0, facts(), attempt, refused_call, ("a",)) is not None
        assert policy.retry(0.0, facts(), attempt, refused_call, ("a", "b", "c")) is None

    def test_state_is_never_sent_twice(self) -> None:
        policy = make_policy(a="peer", b="peer")
        kept = facts(stateful=True, sequence="s")
        attempt = policy.on_sent(0.0, kept, Send("a", "1"))
        for code in (Code.UNAVAILABLE, Code.INTERNAL, Code.OVERLOADED):
            assert policy.retry(0.0, kept, attempt, Outcome(code=code, sent=True), ("a",)) is None
        assert policy.retry(0.0, kept, attempt, Outcome(code=Code.UNAVAILABLE, sent=False), ("a",)) is not None

    def test_errors_of_the_request_are_final(self) -> None:
        policy = make_policy(a="peer", b="peer")
        attempt = policy.on_sent(0.0, facts(), Send("a", "1"))
        for code in (Code.INVALID_REQUEST, Code.DEADLINE, Code.FORBIDDEN, Code.TOO_LARGE):
            assert policy.retry(0.0, facts(), attempt, Outcome(code=code), ("a",)) is None

    def test_a_wrong_report_is_corrected_by_the_answer(self) -> None:
        policy = make_policy(a="peer", b="cloud")
        wrong = Outcome(code=Code.VERSION_MISMATCH)
        attempt = policy.on_sent(0.0, facts(), Send("a", "1"))
        policy.on_reply(0.0, attempt, wrong)
        copy = policy.retry(0.0, facts(), attempt, wrong, ("a",))
        assert copy is not None
        assert copy.target == "b"
        assert sent(policy.decide(0.0, facts())).target == "b"


class TestSequences:
    def test_state_stays_where_it_is(self) -> None:
        policy = make_policy(a="peer", b="peer")
        hidden = VersionReport(model="digits", version="1", stateful="hidden", service_p50_us=1000.0)
        for name in ("a", "b"):
            policy.on_report(0.0, name, NodeReport(node=name, role="edge", slots=2, versions=(hidden,)))
        kept = facts(sequence="7")
        first = sent(policy.decide(0.0, kept))
        policy.on_sent(0.0, kept, first)
        policy.on_probe(0.0, first.target, 0.05)  # now clearly the slower one
        again = sent(policy.decide(0.0, kept))
        assert (again.target, again.reason) == (first.target, "sequence")
        assert again.hedge_after_s is None

    def test_a_dead_target_lets_its_sequences_go(self) -> None:
        policy = make_policy(a="peer", b="peer")
        kept = facts(sequence="7", stateful=True)
        first = sent(policy.decide(0.0, kept))
        policy.on_sent(0.0, kept, first)
        policy.on_connection_lost(0.0, first.target)
        assert sent(policy.decide(0.0, kept)).target != first.target

    def test_stateless_sequences_are_free_to_move(self) -> None:
        policy = make_policy(a="peer", b="cloud")
        free = facts(sequence="7")
        policy.on_sent(0.0, free, sent(policy.decide(0.0, free)))
        policy.on_connection_lost(0.0, "a")
        assert sent(policy.decide(0.0, free)).target == "b"


def test_a_stale_report_widens_and_never_stops() -> None:
    policy = make_policy(a="peer")
    fresh = sent(policy.decide(0.0, facts(), explain=True)).terms[0]
    stale = sent(policy.decide(3600.0, facts(), explain=True)).terms[0]
    assert stale.t50_ms == fresh.t50_ms
    assert fresh.t95_ms < stale.t95_ms < 6 * fresh.t95_ms


def test_own_measurements_outrank_claims() -> None:
    policy = make_policy(a="peer", liar="peer")
    policy.on_report(0.0, "liar", report("1", p50_us=1, p95_us=2))
    for _ in range(20):
        attempt = policy.on_sent(0.0, facts(), Send("liar", "1"))
        policy.on_reply(0.05, attempt, Outcome(served=Served(compute_us=45_000, queue_us=1)))
    policy.on_report(0.1, "liar", report("1", p50_us=1, p95_us=2))
    assert sent(policy.decide(0.1, facts())).target == "a"


def test_a_target_that_left_with_open_attempts_comes_back_with_them() -> None:
    policy = make_policy(a="peer")
    attempt = policy.on_sent(0.0, facts(), Send("a", "1"))
    policy.remove_target(0.0, "a")
    assert refused(policy.decide(0.0, facts())).code is Code.MODEL_NOT_FOUND
    policy.add_target(0.0, "a", "peer")
    assert policy.targets[0].own == 1
    assert sent(policy.decide(0.0, facts())).target == "a"
    policy.on_reply(0.1, attempt, ANSWER)
    policy.on_reply(0.1, attempt, ANSWER)
    assert policy.targets[0].own == policy.outstanding == 0


def test_making_the_connection_is_no_round_trip() -> None:
    policy = Policy(PolicyConfig(), seed=1)
    policy.add_target(0.0, "a", "peer")
    policy.on_report(0.0, "a", report("1"))
    policy.on_probe(0.0, "a", 0.3, connecting=True)
    attempt = policy.on_sent(0.0, facts(), Send("a", "1"))
    policy.on_reply(0.3, attempt, ANSWER)
    assert sent(policy.decide(0.3, facts(remaining_s=0.012)))
    policy.on_probe(0.4, "a", 0.002)
    assert policy.targets[0].rtt_s == 0.002
    policy.on_probe(0.4, "a", 0.302)
    for _ in range(10):
        policy.on_probe(0.4, "a", 0.002)
    assert policy.targets[0].rtt_s < 0.004
