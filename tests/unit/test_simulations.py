from __future__ import annotations

import pytest

from simulations.fleet import Node, NodeSpec
from simulations.report import quantile
from simulations.scenarios import cloud_brownout
from simulations.workload import arrive_poisson
from simulations.world import World


def test_equal_instants_run_in_order_and_time_never_goes_back():
    world, seen = World(1), []
    world.at(2.0, lambda: seen.append("b"))
    world.at(1.0, lambda: seen.append("a"))
    world.at(2.0, lambda: seen.append("c"))
    world.run(until_s=1.5)
    assert (seen, world.now) == (["a"], 1.5)
    with pytest.raises(ValueError, match="cannot schedule"):
        world.at(1.0, lambda: None)
    world.run(until_s=3.0)
    assert seen == ["a", "b", "c"]


def test_a_single_server_queue_matches_theory():
    # M/G/1 with lognormal service (sigma 0.15): Pollaczek-Khinchine says W = rho * s * (1 + c2) / (2 (1 - rho)) + s.
    world = World(3)
    node = Node(world, NodeSpec(name="n", tier="local", slots=1, rtt_s=0.0, service_s=0.01))
    waits: list[float] = []
    arrive_poisson(
        world, rate_per_s=70.0, until_s=2_000.0, request=lambda: node.submit(lambda s: waits.append(s.queue_us / 1e6))
    )
    world.run(until_s=2_100.0)
    import math

    mean_s, scv = 0.01 * math.exp(0.15**2 / 2), math.exp(0.15**2) - 1
    rho = 70.0 * mean_s
    expected = rho * mean_s * (1 + scv) / (2 * (1 - rho))
    assert sum(waits) / len(waits) == pytest.approx(expected, rel=0.05)


def test_cancelled_work_never_runs():
    world = World(1)
    node = Node(world, NodeSpec(name="n", tier="local", slots=1, rtt_s=0.0, service_s=0.01))
    done: list[str] = []
    node.submit(lambda _: done.append("first"))
    cancel = node.submit(lambda _: done.append("second"))
    assert node.in_flight == 2
    cancel()
    cancel()
    assert node.in_flight == 1
    world.run(until_s=1.0)
    assert done == ["first"]
    assert node.in_flight == 0


def test_same_seed_same_trace_and_the_policy_beats_round_robin():
    first = cloud_brownout.run(5, duration_s=80.0)
    again = cloud_brownout.run(5, duration_s=80.0)
    other = cloud_brownout.run(6, duration_s=80.0)
    assert first == again
    assert first.policies[0].trace_hash != other.policies[0].trace_hash
    mesh, baseline = first.policies
    assert mesh.requests == baseline.requests
    assert mesh.slo_share > 0.99 > baseline.slo_share
    assert mesh.p99_ms < baseline.p99_ms / 2
    assert mesh.hedge_share <= 0.055


def test_quantile_is_nearest_rank():
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 3.0
    assert quantile([1.0], 0.99) == 1.0
