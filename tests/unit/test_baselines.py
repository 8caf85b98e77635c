"""Each rule of the baselines against values worked out by hand."""

from __future__ import annotations

from math import exp, inf
from random import Random

import pytest

from nearcast.errors import Code
from nearcast.handler import Served
from nearcast.load import NodeReport, VersionReport
from router.policy.facts import RequestFacts
from simulations.baselines import BASELINES, C3, LeastRequest, PeakEwma, Prequal, PriorityFailover, RoundRobin
from simulations.baselines.c3 import Feedback
from simulations.baselines.cubic_rate import CubicRate, ReceiveRate
from simulations.baselines.outliers import Outliers
from simulations.baselines.peak_ewma import Estimate
from simulations.baselines.prequal import hot_bound, reuse
from simulations.baselines.priority import priority_shares
from simulations.baselines.probe_pool import Probe, ProbePool, best, worst
from simulations.baselines.rif_latency import RifLatency
from simulations.contract import Baseline
from simulations.experiment import run
from simulations.scenario import NodeSpec, Phase, Scenario, scenario_names

FACTS = RequestFacts(model="detector")
SERVED = Served(compute_us=20_000, in_flight=0)


def report(node: str, role: str = "peer", *, slots: int = 4, in_flight: int = 0, p50_us: float = 20_000.0):
    version = VersionReport(model="detector", version="1", service_p50_us=p50_us)
    return NodeReport(node=node, role=role, slots=slots, in_flight=in_flight, versions=(version,))


def choices(baseline: Baseline, nodes: list[str], *, now: float = 0.0, count: int = 200) -> dict[str, int]:
    """How often each node is chosen while nothing is sent."""
    chosen = [baseline.choose(now, FACTS, nodes) for _ in range(count)]
    return {node: chosen.count(node) for node in nodes}


@pytest.mark.parametrize("kind", BASELINES.values(), ids=BASELINES)
def test_the_same_seed_makes_the_same_choices(kind: type[Baseline]):
    def run(seed: int) -> list[str]:
        baseline, nodes, chosen = kind(Random(seed)), ["a", "b", "c", "d"], []
        for node in nodes:
            baseline.on_report(0.0, node, report(node), 0.008)
        for step in range(60):
            now = step * 0.003
            node = baseline.choose(now, FACTS, nodes)
            for probed in baseline.probe(now, nodes):
                baseline.on_report(now, probed, report(probed, in_flight=step % 5), 0.008)
            baseline.on_sent(now, node)
            chosen.append(node)
            if step % 3:
                baseline.on_reply(now, node, 0.03, SERVED, None)
        return chosen

    assert run(7) == run(7)
    assert set(run(7)) <= {"a", "b", "c", "d"}


@pytest.mark.parametrize("kind", BASELINES.values(), ids=BASELINES)
def test_one_node_is_enough_and_needs_no_report(kind: type[Baseline]):
    assert kind(Random(1)).choose(0.0, FACTS, ["a"]) == "a"


def test_round_robin_takes_turns():
    assert choices(RoundRobin(Random(1)), ["a", "b", "c"], count=9) == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize("kind", BASELINES.values(), ids=BASELINES)
def test_nobody_waits_for_a_load_while_somebody_is_ready(kind: type[Baseline]):
    baseline, cold = kind(Random(1)), VersionReport(model="detector", version="1", residency="cold", eta_ms=3000.0)
    baseline.on_report(0.0, "cold", NodeReport(node="cold", role="local", slots=4, versions=(cold,)), 0.001)
    baseline.on_report(0.0, "warm", report("warm", "cloud"), 0.060)
    assert choices(baseline, ["cold", "warm"], count=20) == {"cold": 0, "warm": 20}
    assert baseline.choose(0.0, FACTS, ["cold"]) == "cold"


# Least request.


def test_two_choices_take_the_lesser_and_never_the_greatest():
    baseline = LeastRequest(Random(3))
    for node, sent in (("a", 0), ("b", 1), ("c", 2)):
        for _ in range(sent):
            baseline.on_sent(0.0, node)
    seen = choices(baseline, ["a", "b", "c"], count=3000)
    assert seen["c"] == 0
    assert seen["a"] / 3000 == pytest.approx(2 / 3, abs=0.03), "a wins both of its three pairs"
    baseline.on_reply(0.0, "c", 0.01, SERVED, None)
    baseline.on_reply(0.0, "c", 0.01, SERVED, None)
    assert choices(baseline, ["a", "b", "c"])["c"] > 0


# Outlier detection.


def test_five_failures_in_a_row_eject_for_thirty_seconds():
    outliers, nodes = Outliers(), ["a", "b", "c"]
    outliers.admit(0.0, nodes)
    for code in [Code.INTERNAL] * 4 + [None] + [Code.INTERNAL] * 4 + [Code.OVERLOADED] + [Code.DEADLINE] * 4:
        outliers.observe(0.0, "a", code)
    assert outliers.admit(0.0, nodes) == nodes, "never five in a row; a refusal is no failure"
    outliers.observe(0.0, "a", Code.UNAVAILABLE)
    assert outliers.admit(29.9, nodes) == ["b", "c"]
    assert outliers.admit(30.0, nodes) == nodes


def test_ejections_grow_are_forgotten_and_leave_nine_tenths():
    outliers, nodes = Outliers(), ["a", "b", "c"]
    outliers.admit(0.0, nodes)

    def fail(now: float, node: str) -> None:
        for _ in range(5):
            outliers.observe(now, node, Code.INTERNAL)

    fail(0.0, "a")
    fail(1.0, "b")
    assert outliers.admit(1.0, nodes) == ["b", "c"], "one of three is more than a tenth"
    fail(30.0, "a")
    assert outliers.is_ejected(89.9, "a")
    assert not outliers.is_ejected(90.0, "a")
    fail(111.0, "a")
    assert outliers.is_ejected(140.9, "a"), "two healthy intervals took both ejections off"
    assert not outliers.is_ejected(141.0, "a")


def test_panic_when_less_than_half_is_healthy():
    outliers = Outliers()
    outliers.admit(0.0, ["a", "b", "c"])
    for _ in range(5):
        outliers.observe(0.0, "a", Code.INTERNAL)
    assert outliers.admit(1.0, ["a", "b"]) == ["b"]
    assert outliers.admit(1.0, ["a"]) == ["a"]


# Priority failover.


@pytest.mark.parametrize(
    ("healthy", "sizes", "shares"),
    [
        ([4, 4], [4, 4], [1.0, 0.0]),
        ([3, 4], [4, 4], [1.0, 0.0]),
        ([5, 10], [10, 10], [0.7, 0.3]),
        ([0, 2, 2], [1, 3, 2], [0.0, 0.9333, 0.0667]),
        ([2, 2], [10, 10], [0.5, 0.5]),
        ([0, 0], [1, 1], [1.0, 0.0]),
    ],
)
def test_priority_shares_follow_health(healthy: list[int], sizes: list[int], shares: list[float]):
    # 1.4 · 5/10 = 0.7; 1.4 · 2/3 = 0.9333; twice 1.4 · 2/10 = 0.28 sum to 0.56 and are scaled to one.
    assert priority_shares(healthy, sizes) == pytest.approx(shares, abs=1e-4)


def make_tiers() -> tuple[PriorityFailover, list[str]]:
    baseline = PriorityFailover(Random(5))
    for node, role in (("cloud", "cloud"), ("pop-1", "peer"), ("pop-2", "peer"), ("edge", "local")):
        baseline.on_report(0.0, node, report(node, role, slots=2), 0.0)
    return baseline, ["cloud", "pop-1", "pop-2", "edge"]


def test_priority_fills_the_edge_then_the_peers_then_the_cloud_then_the_least_full():
    baseline, nodes = make_tiers()
    order = []
    for _ in range(9):
        node = baseline.choose(0.0, FACTS, nodes)
        baseline.on_sent(0.0, node)
        order.append(node)
    assert order[:2] == ["edge"] * 2
    assert sorted(order[2:6]) == ["pop-1", "pop-1", "pop-2", "pop-2"]
    assert order[6:8] == ["cloud"] * 2
    baseline.on_reply(0.0, "edge", 0.02, SERVED, None)
    assert baseline.choose(0.0, FACTS, nodes) in ("edge", order[8])


def test_priority_leaves_an_ill_tier():
    baseline, nodes = make_tiers()
    for _ in range(5):
        baseline.on_sent(0.0, "edge")
        baseline.on_reply(0.0, "edge", 0.001, None, Code.INTERNAL)
    assert choices(baseline, nodes, now=1.0, count=40)["edge"] == 0
    assert choices(baseline, nodes, now=31.0, count=40)["edge"] == 40


# Peak-EWMA.


def test_an_estimate_jumps_to_a_peak_and_decays():
    estimate = Estimate(0.0)
    estimate.observe(0.0, 0.100)
    assert estimate.read(0.0) == 0.100
    estimate.observe(5.0, 0.020)
    expected = 0.100 * exp(-0.5) + 0.020 * (1 - exp(-0.5))
    assert estimate.read(5.0) == pytest.approx(expected)
    assert estimate.read(15.0) == pytest.approx(expected * exp(-1.0))
    assert estimate.read(1000.0) == 0.001, "never free"
    estimate.observe(1000.0, 0.5)
    assert estimate.read(1000.0) == 0.5


def test_peak_ewma_prefers_the_lesser_product():
    baseline = PeakEwma(Random(1))
    assert baseline.cost_s(0.0, "a") == 0.030
    for node, latency_s in (("a", 0.040), ("b", 0.090)):
        baseline.on_sent(0.0, node)
        baseline.on_reply(0.0, node, latency_s, SERVED, None)
    assert choices(baseline, ["a", "b"], count=20) == {"a": 20, "b": 0}
    for _ in range(2):
        baseline.on_sent(0.0, "a")
    assert baseline.cost_s(0.0, "a") == pytest.approx(0.120)
    assert choices(baseline, ["a", "b"], count=20) == {"a": 0, "b": 20}


def test_peak_ewma_takes_a_failure_for_five_seconds_but_not_a_giving_up():
    baseline = PeakEwma(Random(1))
    for node, code, latency_s in (("a", Code.INTERNAL, 0.001), ("b", Code.DEADLINE, 0.5)):
        baseline.on_sent(0.0, node)
        baseline.on_reply(0.0, node, latency_s, None, code)
    assert baseline.cost_s(0.0, "a") == 5.0
    assert baseline.cost_s(0.0, "b") == 0.5


# C3.


def test_the_score_is_the_papers():
    feedback = Feedback(0.0, response_s=0.050, service_s=0.010, queue=2.0)
    assert feedback.score_s(outstanding=1) == pytest.approx(0.050 - 0.010 + 4**3 * 0.010)
    feedback.observe(1.0, response_s=0.100, service_s=0.020, queue=0.0)
    assert feedback.response_s == pytest.approx(0.095)
    assert feedback.queue == pytest.approx(0.2)
    assert feedback.score_s(outstanding=0) == pytest.approx(0.095 - 0.019 + 1.2**3 * 0.019)


def test_c3_ranks_by_score_and_asks_the_unknown_first():
    baseline = C3(Random(1))
    for node, compute_us in (("slow", 40_000), ("fast", 10_000)):
        baseline.on_sent(0.0, node)
        baseline.on_reply(0.0, node, 0.010 + compute_us / 1e6, Served(compute_us=compute_us), None)
    assert choices(baseline, ["slow", "fast"], count=20)["fast"] == 20
    assert choices(baseline, ["slow", "fast", "new"], count=20)["new"] == 20
    baseline.on_sent(0.0, "fast")
    assert baseline.score_s("fast") == pytest.approx(0.010 + 8 * 0.010)
    assert baseline.score_s("slow") == pytest.approx(0.010 + 0.040)
    assert choices(baseline, ["slow", "fast"], count=20)["slow"] == 20


def test_c3_counts_only_who_waits_and_takes_a_report_of_a_silent_server():
    baseline = C3(Random(1))
    baseline.on_report(0.0, "a", report("a", slots=4), 0.008)
    baseline.on_sent(0.0, "a")
    baseline.on_reply(0.0, "a", 0.05, Served(compute_us=10_000, in_flight=5), None)
    assert baseline.score_s("a") == pytest.approx(0.040 + 3**3 * 0.010), "six in flight, four run, two wait"
    baseline.on_report(0.5, "a", report("a", in_flight=12), 0.008)
    assert baseline.score_s("a") == pytest.approx(0.040 + 3**3 * 0.010), "it has just answered"
    baseline.on_report(1.5, "a", report("a", p50_us=10_000.0), 0.010)
    assert baseline.score_s("a") == pytest.approx(0.023 - 0.010 + 1.2**3 * 0.010)


def test_the_cubic_rate_is_cut_to_a_fifth_and_grows_back_to_where_it_was():
    rate = CubicRate(0.0)
    for step in range(1, 4):
        rate.on_answer(step * 0.020)  # one answer in 20 ms, ten are allowed
    assert rate.rate == pytest.approx(2.0)
    burst = CubicRate(0.0)
    for _ in range(11):
        burst.on_answer(0.001)
    # Eleven answers within one interval: saddle (10 · 0.2 / 4e-6)^(1/3) = 79.37 ms, one ms after the start.
    assert burst.rate == pytest.approx(10.0 + 4e-6 * (1 - 79.37) ** 3, abs=1e-3)


def test_the_bucket_holds_one_interval_and_owes_nothing():
    rate = CubicRate(0.0)
    for _ in range(10):
        assert rate.admits(0.0)
        rate.on_sent()
    assert not rate.admits(0.0)
    rate.on_sent()
    assert not rate.admits(0.0019)
    assert rate.admits(0.0021), "ten per 20 ms are one each 2 ms"


def test_the_receive_rate_weighs_the_past_by_what_is_left_of_the_interval():
    rate = ReceiveRate(0.0)
    assert rate.add(0.010, 4) == 10.0
    assert rate.add(0.040, 1) == pytest.approx(4 / 2 + 0.5 * 10.0)
    assert rate.add(0.041, 9) == 10.0


# Prequal.


def make_probes(*triples: tuple[str, int, float]) -> list[Probe]:
    return [Probe(node, 0.0, in_flight, latency_s) for node, in_flight, latency_s in triples]


def test_cold_by_latency_before_hot_by_load():
    probes = make_probes(("busy", 9, 0.001), ("quick", 3, 0.010), ("slow", 1, 0.050))
    assert best(probes, bound=5).node == "quick"
    assert worst(probes, bound=5).node == "busy"
    assert best(probes, bound=0).node == "slow", "all are hot"
    assert worst(probes, bound=100).node == "slow"


def test_the_pool_keeps_sixteen_one_each_and_none_older_than_a_second():
    pool = ProbePool()
    for number in range(18):
        pool.add(Probe(f"n{number}", number / 100, 0, 0.01))
    assert len(pool) == 16
    names = [f"n{number}" for number in range(18)]
    assert [probe.node for probe in pool.fresh(0.5, names)] == names[2:]
    pool.add(Probe("n5", 0.9, 7, 0.01))
    pool.add(Probe("n5", 0.8, 1, 0.01))
    assert len(pool) == 16
    assert [probe.in_flight for probe in pool.fresh(1.5, names)] == [7], "an answer that was overtaken changes nothing"
    assert len(pool) == 1


def test_removal_takes_the_oldest_and_the_worst_by_turns():
    pool = ProbePool()
    for node, at, latency_s in (("old", 0.1, 0.001), ("bad", 0.4, 0.900), ("good", 0.3, 0.010), ("fair", 0.2, 0.020)):
        pool.add(Probe(node, at, 1, latency_s))
    left = []
    for _ in range(3):
        pool.remove(bound=5)
        left.append({probe.node for probe in pool.fresh(0.5, ["old", "bad", "good", "fair"])})
    assert left == [{"bad", "good", "fair"}, {"good", "fair"}, {"good"}]


def test_use_raises_the_load_and_ends_with_the_budget():
    pool = ProbePool()
    probe = Probe("a", 0.0, 3, 0.01, uses=2)
    pool.add(probe)
    pool.use(probe)
    assert (probe.in_flight, len(pool)) == (4, 1)
    pool.use(probe)
    assert len(pool) == 0


def test_reuse_is_the_papers_formula():
    assert reuse(100) == pytest.approx(2.0 / (0.84 * 3 - 1))
    assert reuse(1000) == pytest.approx(2.0 / 1.952)
    assert reuse(5) == inf


def test_hot_is_above_the_exact_rank():
    assert hot_bound([]) == inf
    assert hot_bound([5, 1, 2, 3, 4]) == 5  # ceil(0.841 · 5) = rank 5
    assert hot_bound(list(range(1, 11))) == 9


def test_latency_is_the_median_at_the_nearest_load():
    latencies = RifLatency()
    assert latencies.at(0.0, 3) is None
    for latency_s in (0.010, 0.030, 0.020):
        latencies.observe(0.0, 2, latency_s)
    latencies.observe(0.0, 9, 0.200)
    assert latencies.at(0.0, 2) == 0.020
    assert latencies.at(0.0, 4) == 0.020
    assert latencies.at(0.0, 30) == 0.200
    latencies.observe(4.0, 9, 0.100)
    assert latencies.at(5.5, 2) == 0.100, "samples of five seconds ago do not count"
    assert latencies.at(10.0, 2) is None


def test_prequal_probes_three_adds_the_way_and_is_random_without_answers():
    baseline, nodes = Prequal(Random(2)), ["near", "far", "mid", "low"]
    assert all(len(set(baseline.probe(0.0, nodes))) == 3 for _ in range(5))
    assert min(choices(baseline, nodes).values()) > 20
    for _ in range(50):
        for node, rtt_s in (("near", 0.001), ("far", 0.060), ("mid", 0.020)):
            baseline.on_report(1.0, node, report(node, in_flight=2, p50_us=10_000.0), rtt_s)
        assert baseline.choose(1.0, FACTS, nodes) == "near"


def test_a_request_of_ours_raises_load_and_latency_of_the_answer_it_used():
    baseline, nodes = Prequal(Random(2)), ["old", "a", "b"]
    for node, in_flight, compute_us in (("a", 0, 10_000), ("a", 1, 40_000), ("b", 0, 20_000)):
        baseline.on_reply(0.9, node, 0.05, Served(compute_us=compute_us, in_flight=in_flight), None)
    baseline.on_report(0.9, "old", report("old", in_flight=9, p50_us=90_000.0), 0.005)  # and so one more is not hot
    baseline.on_report(1.0, "a", report("a"), 0.005)
    baseline.on_report(1.0, "b", report("b"), 0.005)
    assert [baseline.choose(1.0, FACTS, nodes) for _ in range(2)] == ["a", "b"]


def test_prequal_leaves_a_server_that_fails():
    baseline, nodes = Prequal(Random(2)), ["a", "b", "c"]
    for _ in range(5):
        baseline.on_sent(0.0, "a")
        baseline.on_reply(0.0, "a", 0.001, None, Code.INTERNAL)
    for _ in range(30):
        for node in nodes:
            baseline.on_report(1.0, node, report(node), 0.001 if node == "a" else 0.05)
        assert baseline.choose(1.0, FACTS, nodes) != "a"


# Against theory.


@pytest.mark.parametrize(("name", "sojourn"), [("p2c-least-request", 1.614), ("round-robin", 1.90)])
def test_equal_servers_wait_as_theory_says(name: str, sojourn: float):
    # Exponential service, load 0.7, many servers. Two choices (Mitzenmacher): the sum over i >= 1 of 0.7^(2^i - 2)
    # = 1 + 0.49 + 0.1176 + 0.0068 services. In turn, each server sees nearly regular arrivals (D/M/1): 1 / (1 - s)
    # = 1.876 with s = exp(-(1 - s) / 0.7) = 0.467, and a fortieth more wait. By chance it would be 3.33.
    nodes = tuple(
        NodeSpec(name=f"n{i}", tier="peer", slots=1, rtt_ms=0.0, service_ms=20.0, memoryless=True) for i in range(40)
    )
    scenario = Scenario(
        name="equal",
        title="",
        why="",
        duration_s=20.0,
        warmup_s=2.0,
        deadline_ms=5000.0,
        nodes=nodes,
        load=(Phase(rate_rps=1400.0),),
    )
    latency_s = run(scenario, name, 2).latency_s
    assert latency_s.mean() / 0.020 == pytest.approx(sojourn, rel=0.04)


def test_every_home_is_a_scenario():
    assert {baseline.home for baseline in BASELINES.values()} <= set(scenario_names())
