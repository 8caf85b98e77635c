"""Faults of the policy that a reader found who had not written it, each by an example."""

from __future__ import annotations

from nearcast.errors import Code
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
