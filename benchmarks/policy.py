"""What a routing decision costs: `decide` alone, and with the accounting around it."""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks.rows import Row
from nearcast.errors import Code
from nearcast.handler import Served
from nearcast.load import NodeReport, Tier, VersionReport
from router.policy import Outcome, Policy, PolicyConfig, RequestFacts, Send


def make_policy(targets: int, *, seed: int = 1) -> Policy:
    """One local target, a quarter peers, the rest cloud; all hold the model, and every term of the rule is in use.

    All have been measured, three in eight have a queue, one in eight has failed of late, and each has a price.
    """
    policy = Policy(PolicyConfig(targets_max=max(256, targets)), seed)
    facts = RequestFacts(model="digits", version="1", size_bytes=600)
    for i in range(targets):
        name = f"node-{i}"
        tier: Tier = "local" if i == 0 else "peer" if i % 4 == 0 else "cloud"
        policy.add_target(0.0, name, tier)
        version = VersionReport(
            model="digits",
            version="1",
            service_p50_us=800.0 + 40 * i,
            service_p95_us=1500.0 + 90 * i,
            price=0.1 * i,
            quality=1.0 - 0.001 * i,
        )
        busy = 6 if i % 8 in (1, 4, 6) else 1
        report = NodeReport(node=name, role="edge", slots=4, in_flight=busy, versions=(version,))
        policy.on_report(0.0, name, report)
        if tier != "local":
            policy.on_probe(0.0, name, 0.002 + 0.0004 * i)
        for k in range(64):
            sent_at = k * 1e-3
            attempt = policy.on_sent(sent_at, facts, Send(name, "1"))
            latency_s = (0.002 + 0.0004 * i if i else 0.0) + (800 + 40 * i + 10 * (k % 16)) / 1e6
            code = Code.INTERNAL if i % 8 == 5 and k == 63 else None
            served = Served(node=name, compute_us=800 + 40 * i, queue_us=10, in_flight=busy)
            policy.on_reply(sent_at + latency_s, attempt, Outcome(code=code, served=None if code else served))
    return policy


def sample_us(step: Callable[[int], None], rounds: int) -> list[float]:
    """Microseconds of each of `rounds` calls, sorted."""
    clock = time.perf_counter_ns
    samples: list[float] = []
    for i in range(rounds):
        start = clock()
        step(i)
        samples.append((clock() - start) / 1e3)
    samples.sort()
    return samples


def run(quick: bool) -> list[Row]:
    """Measure decisions among 8, 32 and 128 candidates; virtual time moves 100 µs a request."""
    rounds = 3_000 if quick else 30_000
    rows: list[Row] = []
    for targets in (8, 32, 128):
        policy = make_policy(targets)
        facts = RequestFacts(model="digits", version="1", size_bytes=600, remaining_s=0.25)

        def decide(i: int, policy: Policy = policy, facts: RequestFacts = facts) -> None:
            policy.decide(1.0 + i * 1e-4, facts)

        sample_us(decide, 500)
        samples = sample_us(decide, rounds)
        rows += [
            Row(f"policy.decide_{targets}_p50_us", samples[rounds // 2], "us"),
            Row(f"policy.decide_{targets}_p99_us", samples[rounds * 99 // 100], "us"),
        ]
    policy = make_policy(8)
    facts = RequestFacts(model="digits", version="1", size_bytes=600, remaining_s=0.25)
    outcome = Outcome(served=Served(node="node-0", compute_us=900, queue_us=10))

    def whole(i: int) -> None:
        now = 1.0 + i * 1e-3
        send = policy.decide(now, facts)
        if isinstance(send, Send):
            policy.on_reply(now + 9e-4, policy.on_sent(now, facts, send), outcome)

    sample_us(whole, 500)
    samples = sample_us(whole, rounds)
    rows.append(Row("policy.decide_sent_reply_8_p50_us", samples[rounds // 2], "us"))
    return rows


if __name__ == "__main__":
    for row in run(quick=False):
        print(f"{row.name:<50} {row.value:8.2f} {row.unit}")
