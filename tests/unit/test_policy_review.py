"""Faults of the policy that a reader found who had not written it, each by an example."""

from __future__ import annotations

from nearcast.errors import Code
from nearcast.handler import Served
from nearcast.load import NodeReport, VersionReport
from router.policy.breaker import Breaker
from router.policy.config import PolicyConfig
from router.policy.events import Outcome
from router.policy.facts import RequestFacts, Send
from router.policy.policy import Policy
from router.policy.tiers import TierGate


def make_policy() -> Policy:
    policy = Policy(PolicyConfig(versions_max=16), 1)
    policy.add_target(0.0, "n", "local")
    return policy


def test_models_that_come_and_go_leave_no_breakers_behind():
    policy = make_policy()
    for number in range(200):
        version = VersionReport(model=f"m{number}", version="1")
        policy.on_report(0.25 * number, "n", NodeReport(node="n", role="edge", versions=(version,)))
    assert len(policy.targets[0].breakers) <= 17


def test_forwarded_requests_for_unknown_models_leave_no_breakers_behind():
    policy = make_policy()
    for number in range(200):
        attempt = policy.on_sent(number / 1e3, RequestFacts(model=f"x{number}"), Send("n", "1"), "forwarded")
        policy.on_reply(number / 1e3, attempt, Outcome(code=Code.MODEL_NOT_FOUND))
    assert len(policy.targets[0].breakers) <= 17


def test_models_that_come_and_go_leave_no_queues_behind():
    policy = make_policy()
    for number in range(200):
        version = VersionReport(model=f"m{number}", version="1", service_p50_us=20_000.0)
        policy.on_report(0.25 * number, "n", NodeReport(node="n", role="edge", in_flight=3, versions=(version,)))
        policy.decide(0.25 * number, RequestFacts(model=f"m{number}"))
    assert len(policy._admission.queues) < 10


def test_only_trials_decide_whether_a_tier_is_back():
    gate = TierGate(PolicyConfig())
    for number in range(400):
        gate.note(number / 100, useless=True, trial=False)
    assert gate.obstacle(gate.until - 0.001) == "tier_open"
    now = gate.until + 0.001
    assert gate.obstacle(now) == "", "a trial may pass, and none has"
    for useless in (True, False):
        assert not gate.note(now, useless=useless, trial=False), "it was sent before the gate opened"
    assert gate.obstacle(now) == ""
    assert not gate.quiet


def test_only_a_trial_opens_a_half_open_breaker_again():
    breaker = Breaker(failures_max=1, open_s=1.0, open_max_s=8.0, trials_max=1)
    breaker.fail(0.0, trial=False)
    assert breaker.admits(1.0)
    breaker.fail(1.0, trial=False)
    assert breaker.admits(1.0)
    breaker.fail(1.0, trial=True)
    assert not breaker.admits(1.5)


FACTS = RequestFacts(model="m", remaining_s=0.5)


def report(name: str) -> NodeReport:
    version = VersionReport(model="m", version="1", service_p50_us=20_000.0, service_p95_us=30_000.0)
    return NodeReport(node=name, role="peer", slots=4, versions=(version,))


def make_fleet(*names: str) -> Policy:
    """Targets of four slots and 20 ms: "edge" is local, "cloud" 60 ms away, all others 8 ms."""
    policy = Policy(PolicyConfig(), 1)
    for name in names:
        policy.add_target(0.0, name, {"edge": "local", "cloud": "cloud"}.get(name, "peer"))  # type: ignore[arg-type]
        policy.on_probe(0.0, name, 0.060 if name == "cloud" else 0.008)
        policy.on_report(0.0, name, report(name))
    return policy


def answer(policy: Policy, now: float, node: str, ms: float, served: Served) -> None:
    attempt = policy.on_sent(now, FACTS, Send(node, "1"))
    policy.on_reply(now + ms / 1e3, attempt, Outcome(served=served))


def test_one_failure_in_a_hundred_does_not_send_everybody_to_the_cloud():
    policy = make_fleet("edge", "cloud")
    at_edge = 0
    for number in range(500):
        now = 0.05 * number
        send = policy.decide(now, FACTS)
        assert isinstance(send, Send)
        attempt = policy.on_sent(now, FACTS, send)
        at_edge += send.target == "edge"
        if send.target == "edge" and at_edge % 100 == 50:
            policy.on_reply(now + 0.001, attempt, Outcome(code=Code.INTERNAL, told=True))
        else:
            way_s = 0.0 if send.target == "edge" else 0.060
            policy.on_reply(now + 0.02 + way_s, attempt, Outcome(served=Served(compute_us=20_000)))
    assert at_edge > 450


def test_who_blames_its_queue_for_everything_does_not_look_fast():
    policy = make_fleet("a", "b", "c", "liar")
    for number in range(60):
        now = 0.1 * number
        for node in ("a", "b", "c"):
            answer(policy, now, node, 28.0, Served(compute_us=20_000))
        answer(policy, now, "liar", 68.0, Served(queue_us=59_900, compute_us=100, in_flight=4))
    targets = []
    for number in range(100):
        send = policy.decide(6.1 + number / 1e3, FACTS)
        assert isinstance(send, Send)
        targets.append(send.target)
    assert targets.count("liar") <= 50


def test_a_wide_first_guess_does_not_keep_an_idle_target_idle():
    policy = make_fleet("a", "b")
    answer(policy, 0.0, "b", 38.0, Served(compute_us=30_000))
    answer(policy, 0.1, "b", 28.0, Served(compute_us=20_000))
    for number in range(20):
        answer(policy, 0.2 + number / 20, "a", 28.0, Served(compute_us=20_000))
    at_b = 0
    for number in range(100):
        now = 1.5 + 0.15 * number
        for name in ("a", "b"):
            policy.on_report(now, name, report(name))
        send = policy.decide(now, FACTS)
        assert isinstance(send, Send)
        at_b += send.target == "b"
        answer(policy, now, send.target, 28.0, Served(compute_us=20_000))
    assert at_b >= 8, "about one probe a second and a half"


def test_a_target_of_another_tier_has_another_way():
    policy = make_fleet("cloud")
    answer(policy, 0.0, "cloud", 80.0, Served(compute_us=20_000))
    policy.add_target(1.0, "cloud", "local")
    target = policy.targets[0]
    assert (target.penalty_s, target.rtt_s, target.s_per_byte, target.rtt_measured) == (0.0, 0.0, 0.0, False)
    policy.add_target(2.0, "cloud", "peer")
    config = policy.config
    assert target.penalty_s == config.peer_penalty_ms / 1e3
    assert target.rtt_s == config.rtt_seed_ms / 1e3
    assert target.s_per_byte == 1.0 / config.bytes_per_s_seed


def test_a_request_that_was_lost_is_sent_again_even_where_it_may_be_late():
    policy = Policy(PolicyConfig(), 1)
    for name, p50_us in (("fast", 10_000.0), ("busy", 300_000.0)):
        policy.add_target(0.0, name, "peer")
        policy.on_probe(0.0, name, 0.001)
        version = VersionReport(model="m", version="1", service_p50_us=p50_us, service_p95_us=p50_us)
        policy.on_report(0.0, name, NodeReport(node=name, role="edge", in_flight=0, versions=(version,)))
    facts = RequestFacts(model="m", version="1", remaining_s=0.2)
    send = policy.decide(0.0, facts)
    assert isinstance(send, Send)
    attempt = policy.on_sent(0.0, facts, send)
    outcome = Outcome(code=Code.UNAVAILABLE)
    policy.on_reply(0.01, attempt, outcome)
    again = policy.retry(0.01, facts, attempt, outcome, ("fast",))
    assert (send.target, again and again.target) == ("fast", "busy")
    refused = Outcome(code=Code.OVERLOADED)
    assert policy.retry(0.01, facts, attempt, refused, ("fast",)) is None
