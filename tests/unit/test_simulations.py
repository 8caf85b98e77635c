from __future__ import annotations

import math
import os
import subprocess
import sys

import msgspec
import pytest

from nearcast.errors import Code, MeshError
from simulations.experiment import policy_names, run
from simulations.fleet import Job, Node
from simulations.report import estimate, hedge_shares, quantile
from simulations.scenario import (
    JUDGED_SEEDS,
    TUNING_SEEDS,
    Fault,
    NodeSpec,
    Phase,
    Scenario,
    load_scenario,
    parse_scenario,
    scenario_names,
)
from simulations.workload import draw_workload
from simulations.world import World

EDGE = NodeSpec(name="edge", tier="local", rtt_ms=0.2, service_ms=20.0)
POP = NodeSpec(name="pop", tier="peer", rtt_ms=8.0, service_ms=20.0, foreign_rps=20.0)
CLOUD = NodeSpec(name="cloud", tier="cloud", rtt_ms=60.0, service_ms=12.0)


def small(**changes: object) -> Scenario:
    scenario = Scenario(
        name="small", title="t", why="w", duration_s=10.0, warmup_s=0.0, nodes=(EDGE, POP, CLOUD),
        load=(Phase(rate_rps=150.0),),
    )  # fmt: skip
    return msgspec.structs.replace(scenario, **changes)


def test_equal_instants_run_in_order_and_time_never_goes_back():
    world, seen = World(1), []
    world.at(2.0, seen.append, "b")
    world.at(1.0, seen.append, "a")
    world.at(2.0, seen.append, "c")
    world.run(until_s=1.5)
    assert (seen, world.now) == (["a"], 1.5)
    with pytest.raises(ValueError, match="cannot schedule"):
        world.at(1.0, lambda: None)
    world.run(until_s=3.0)
    assert seen == ["a", "b", "c"]


@pytest.mark.parametrize(("servers", "rate_rps"), [(1, 50.0), (4, 260.0)])
def test_a_queue_matches_theory(servers: int, rate_rps: float):
    # M/M/1 and M/M/c: the mean wait is the probability to wait (Erlang C) over c * mu - lambda.
    node = NodeSpec(name="n", tier="local", slots=servers, rtt_ms=0, service_ms=10, memoryless=True, queue_max=100_000)
    scenario = small(nodes=(node,), load=(Phase(rate_rps=rate_rps),), duration_s=20_000.0 / rate_rps, deadline_ms=1e3)
    found = run(scenario, "round-robin", 3)
    offered = rate_rps * 0.01
    erlang_b = (
        offered**servers / math.factorial(servers) / sum(offered**k / math.factorial(k) for k in range(servers + 1))
    )
    waits = erlang_b / (1 - offered / servers * (1 - erlang_b))
    expected_s = waits / (servers / 0.01 - rate_rps) + 0.01
    assert found.latency_s.mean() == pytest.approx(expected_s, rel=0.05)


def test_cancelled_work_never_runs_and_a_broken_account_is_seen():
    world = World(1)
    node = Node(world, NodeSpec(name="n", tier="local", slots=1, rtt_ms=0.0, service_ms=10.0))
    heard: list[str] = []
    jobs = [Job(0.01, 0.0, lambda *_, each=each: heard.append(each)) for each in ("first", "second")]
    for job in jobs:
        node.submit(job)
    assert node.in_flight == 2
    node.cancel(jobs[1])
    node.cancel(jobs[1])
    assert node.in_flight == 1
    world.run(until_s=1.0)
    assert (heard, node.in_flight) == (["first"], 0)
    overtaken = Job(0.01, 0.0, lambda *_: heard.append("overtaken"))
    node.cancel(overtaken)
    node.submit(overtaken)
    assert node.in_flight == 0
    node.check()
    node.arrived += 1
    with pytest.raises(RuntimeError, match="3 came, 2 left"):
        node.check()


FAULTS = {
    "slow": Fault(kind="slow", nodes=("cloud",), value=6.0, windows_s=((4.0, 8.0),)),
    "slots": Fault(kind="slots", nodes=("pop",), value=1.0, windows_s=((4.0, 8.0),)),
    "rtt": Fault(kind="rtt", nodes=("pop",), value=300.0, windows_s=((4.0, 8.0),)),
    "fail": Fault(kind="fail", nodes=("pop",), value=1.0, windows_s=((4.0, 8.0),)),
    "cut": Fault(kind="cut", nodes=("pop",), value=500.0, windows_s=((4.0, 8.0),)),
    "handshakes": Fault(kind="handshakes", nodes=("edge",), value=400.0, handshake_ms=10.0, windows_s=((4.0, 5.0),)),
    "cold": Fault(kind="cold", nodes=("pop", "edge"), load_ms=1000.0, windows_s=((0.0, 6.0),)),
    "crowd": Fault(kind="crowd", nodes=("pop", "edge"), value=150.0, windows_s=((4.0, 8.0),)),
    "lie": Fault(kind="lie", nodes=("pop",), value=1.0, windows_s=((0.0, 12.0),)),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_is_felt(kind: str):
    # A lie hurts only those who listen: the live policy does, a little.
    policy = "nearcast" if kind == "lie" else "round-robin"
    well, ill = run(small(), policy, 1), run(small(faults=(FAULTS[kind],)), policy, 1)
    if kind == "lie":
        assert well.trace_hash != ill.trace_hash
    elif kind == "fail":
        assert any(each[2] == "retry" for each in ill.sends)
    else:
        assert ill.latency_s.mean() > well.latency_s.mean()


def test_stale_reports_are_old_and_fresh_ones_are_not():
    stale = Fault(kind="stale", nodes=("edge", "pop", "cloud"), value=10.0, windows_s=((0.0, 12.0),))
    busy = small(load=(Phase(rate_rps=450.0),))
    fresh, old = run(busy, "nearcast", 1), run(msgspec.structs.replace(busy, faults=(stale,)), "nearcast", 1)
    assert fresh.trace_hash != old.trace_hash


@pytest.mark.parametrize("policy", policy_names())
def test_every_policy_meets_the_same_requests_and_the_same_run_twice(policy: str):
    scenario = small(faults=(FAULTS["slow"], FAULTS["cut"]))
    first, again, other = (run(scenario, policy, seed) for seed in (5, 5, 6))
    assert first.trace_hash == again.trace_hash != other.trace_hash
    assert first.at_s.tolist() == [r.at for r in draw_workload(scenario, 5).requests if r.at >= scenario.warmup_s]


def test_one_seed_is_one_trace_in_every_process():
    code = (
        "from simulations.scenario import load_scenario as l; from simulations.experiment import run; import msgspec;"
        "print(run(msgspec.structs.replace(l('cloud-brownout'), duration_s=8.0), 'nearcast', 7).trace_hash)"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(hashes) == 1


def test_the_policy_beats_round_robin_in_a_brown_out_and_the_oracle_foresees():
    slow = Fault(kind="slow", nodes=("cloud",), value=6.0, windows_s=((10.0, 20.0),))
    scenario = msgspec.structs.replace(load_scenario("cloud-brownout"), duration_s=25.0, faults=(slow,))
    mesh, plain, oracle = (run(scenario, policy, 1) for policy in ("nearcast", "round-robin", "full-oracle"))
    in_time = [float((each.latency_s <= 0.1).mean()) for each in (mesh, plain, oracle)]
    assert in_time[0] > 0.98 > in_time[1]
    assert in_time[2] == 1.0
    hedged, share, worst = hedge_shares(mesh, scenario)
    assert hedged > 0
    assert share <= 0.06
    assert worst >= share


def test_scenarios_are_read_and_seeds_do_not_meet():
    assert len(scenario_names()) == 12
    assert all(load_scenario(name).name == name for name in scenario_names())
    assert not set(TUNING_SEEDS) & set(JUDGED_SEEDS)


@pytest.mark.parametrize(
    "text",
    [
        b"name = 1",
        b"\xff",
        b"",
        b'name = "x"\ntitle = ""\nwhy = ""\nduration_s = 1.0\nnodes = []\nload = [{ rate_rps = 1.0 }]',
    ],
)
def test_a_bad_scenario_is_refused(text: bytes):
    with pytest.raises(MeshError) as caught:
        parse_scenario(text)
    assert caught.value.code is Code.INVALID_REQUEST


def test_unknown_names_are_refused():
    for attempt in (lambda: load_scenario("nothing"), lambda: run(small(), "nobody", 1)):
        with pytest.raises(MeshError):
            attempt()


def test_quantile_is_nearest_rank():
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 3.0
    assert quantile([1.0], 0.99) == 1.0


def test_intervals_are_student_s():
    found = estimate([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(estimate([2.0]).half_width)
    assert estimate([2.0, math.inf]).value == math.inf
