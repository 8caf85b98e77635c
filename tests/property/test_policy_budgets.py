"""P2, P3: what hedges and retries may add, even when everything fails or everything is slow."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nearcast.errors import Code
from nearcast.load import NodeReport, VersionReport
from router.policy import Attempt, Outcome, Policy, PolicyConfig, RequestFacts, Send
from router.policy.budget import TokenBudget

NODES = 5
REQUESTS = 400
VERSION = VersionReport(model="m", version="1", service_p50_us=2000, service_p95_us=4000)


def build(config: PolicyConfig, seed: int) -> Policy:
    policy = Policy(config, seed)
    for i in range(NODES):
        policy.add_target(0.0, f"t{i}", "peer")
        policy.on_report(0.0, f"t{i}", NodeReport(node=f"t{i}", role="edge", slots=8, versions=(VERSION,)))
        policy.on_probe(0.0, f"t{i}", 0.001)
    return policy


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    code=st.sampled_from([Code.INTERNAL, Code.UNAVAILABLE, Code.OVERLOADED, Code.DEADLINE]),
    failing=st.floats(0.2, 1.0),
    rate=st.floats(10.0, 5000.0),
    hedges=st.floats(0.0, 0.2),
    retries=st.floats(0.0, 0.2),
)
def test_failures_add_no_more_than_the_budgets(
    seed: int, code: Code, failing: float, rate: float, hedges: float, retries: float
) -> None:
    """Each request is hedged whenever the policy lets it, and retried as often; what it adds is bounded."""
    config = PolicyConfig(hedge_share=hedges, retry_share=retries, hedge_burst=5, retry_burst=5, retry_per_s=1)
    policy, now, failed = build(config, seed), 0.0, 0.0
    sends = firsts = 0
    for _ in range(REQUESTS):
        now += 1.0 / rate
        facts = RequestFacts(model="m", version="1", remaining_s=1.0)
        decision = policy.decide(now, facts)
        if not isinstance(decision, Send):
            continue
        firsts += 1
        sends += 1
        tried = [decision.target]
        attempts: list[Attempt] = [policy.on_sent(now, facts, decision)]
        copy = policy.hedge(now, facts, attempts[0], tried)
        if copy is not None:
            attempts.append(policy.on_sent(now, facts, copy, "hedge"))
            tried.append(copy.target)
            sends += 1
        while attempts:
            attempt = attempts.pop()
            failed += failing
            outcome = Outcome(code) if failed >= 1.0 else Outcome()
            failed -= failed >= 1.0
            policy.on_reply(now, attempt, outcome)
            again = policy.retry(now, facts, attempt, outcome, tried)
            if again is not None:
                attempts.append(policy.on_sent(now, facts, again, "retry"))
                tried.append(again.target)
                sends += 1
        assert len(tried) <= config.attempts_max + 1
        assert sends - firsts <= 10 + (hedges + retries) * firsts + now * config.retry_per_s + 1e-6


@given(
    share=st.floats(0, 1),
    burst=st.floats(0, 10),
    per_s=st.floats(0, 5),
    steps=st.lists(st.one_of(st.none(), st.floats(0, 2)), max_size=80),
)
def test_a_token_budget_holds_over_any_window(
    share: float, burst: float, per_s: float, steps: list[float | None]
) -> None:
    """None = a request; a number = so many seconds pass, and as much as possible is spent."""
    budget = TokenBudget(share=share, burst=burst, per_s=per_s)
    balance = least = now = 0.0
    for step in steps:
        if step is None:
            budget.earn()
            balance -= share
        else:
            now += step
            balance -= per_s * step
            least = min(least, balance)
            while budget.spend(now):
                balance += 1.0
        least = min(least, balance)
        assert balance - least <= burst + 1e-6
