"""How requests are divided: P6 who gets slower gets no more of them; P7 no herd follows one report."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nearcast.load import NodeReport, VersionReport
from router.policy import Policy, PolicyConfig, RequestFacts, Send

FACTS = RequestFacts(model="m", version="1", remaining_s=5.0)
SLOTS = 2
DRAWS = 400


def describe(name: str, in_flight: int, p50_ms: float = 2.0) -> NodeReport:
    version = VersionReport(model="m", version="1", service_p50_us=p50_ms * 1e3, service_p95_us=p50_ms * 2e3)
    return NodeReport(node=name, role="edge", slots=SLOTS, in_flight=in_flight, versions=(version,))


def build(rtts_ms: list[float], loads: list[int], seed: int, services_ms: list[float] | None = None) -> Policy:
    policy = Policy(PolicyConfig(), seed)
    for i, (rtt_ms, load) in enumerate(zip(rtts_ms, loads, strict=True)):
        policy.add_target(0.0, f"t{i}", "peer")
        policy.on_report(0.0, f"t{i}", describe(f"t{i}", load, services_ms[i] if services_ms else 2.0))
        policy.on_probe(0.0, f"t{i}", rtt_ms / 1e3)
    return policy


def share(policy: Policy, which: int) -> float:
    """Of `DRAWS` decisions about the same state, how many choose a target."""
    hits = 0
    for _ in range(DRAWS):
        decision = policy.decide(0.0, FACTS)
        assert isinstance(decision, Send)
        hits += decision.target == f"t{which}"
    return hits / DRAWS


@settings(max_examples=12, deadline=None)
@given(
    fleet=st.lists(st.tuples(st.floats(0.2, 20), st.integers(0, 5), st.floats(0.5, 10)), min_size=2, max_size=6),
    seed=st.integers(0, 1000),
    which=st.integers(0, 5),
    worse=st.sampled_from(["rtt", "queue", "service"]),
    extra=st.floats(0, 50),
)
def test_who_gets_slower_gets_no_more(
    fleet: list[tuple[float, int, float]], seed: int, which: int, worse: str, extra: float
) -> None:
    which %= len(fleet)
    rtts, loads, services = ([row[i] for row in fleet] for i in range(3))
    before = share(build(rtts, loads, seed, services), which)  # type: ignore[arg-type]
    if worse == "rtt":
        rtts[which] += extra
    elif worse == "queue":
        loads[which] += int(extra)
    else:
        services[which] += extra
    after = share(build(rtts, loads, seed, services), which)  # type: ignore[arg-type]
    assert after <= before + 0.12  # five standard deviations of 400 draws


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(2, 10),
    load=st.integers(2, 12),
    freed=st.integers(1, 12),
    burst=st.integers(1, 80),
    seed=st.integers(0, 1000),
)
def test_a_report_of_free_slots_draws_no_more_than_it_frees(
    count: int, load: int, freed: int, burst: int, seed: int
) -> None:
    """Own sends are credited at once: a burst fills the gap that a report tells of, and is then divided as before."""
    policy = build([2.0] * count, [load] * count, seed)
    policy.on_report(0.01, "t0", describe("t0", max(0, load - freed)))
    sent = 0
    for _ in range(burst):
        decision = policy.decide(0.02, FACTS)
        assert isinstance(decision, Send)
        policy.on_sent(0.02, FACTS, decision)
        sent += decision.target == "t0"
    gap = min(freed, load)
    assert sent <= gap + 2 * max(0, burst - gap) / count + 3
