"""Faults of the policy that a reader found who had not written it, each by an example."""

from __future__ import annotations

from nearcast.errors import Code
from nearcast.load import NodeReport, VersionReport
from router.policy.config import PolicyConfig
from router.policy.events import Outcome
from router.policy.facts import RequestFacts, Send
from router.policy.policy import Policy


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
