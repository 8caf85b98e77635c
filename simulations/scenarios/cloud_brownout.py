"""What do users see while the cloud answers six times slower for thirty seconds?

One edge node (4 slots, 20 ms), three neighbouring PoPs (8 ms away), one of them three times slower, a cloud core with
four GPU slots (60 ms away, 12 ms): 330 requests/s, one run in a hundred stalls for 150 ms, the objective is 100 ms.
"""

from __future__ import annotations

from simulations.drivers import Driver, PolicyDriver, RoundRobin
from simulations.faults import slow_down
from simulations.fleet import Node, NodeSpec
from simulations.report import PolicyResult, Result, quantile
from simulations.workload import arrive_poisson
from simulations.world import World

NAME = "cloud-brownout"
RATE_PER_S = 330.0
DURATION_S = 120.0
FAULT_FROM_S, FAULT_TO_S, FAULT_FACTOR = 45.0, 75.0, 6.0
SLO_S = 0.100
STALL = {"stall_share": 0.01, "stall_s": 0.150}
FLEET = (
    NodeSpec(name="edge", tier="local", slots=4, rtt_s=0.0002, service_s=0.020, **STALL),
    NodeSpec(name="pop-1", tier="peer", slots=4, rtt_s=0.008, service_s=0.020, **STALL),
    NodeSpec(name="pop-2", tier="peer", slots=4, rtt_s=0.008, service_s=0.020, **STALL),
    NodeSpec(name="pop-3", tier="peer", slots=4, rtt_s=0.008, service_s=0.060, **STALL),
    NodeSpec(name="cloud", tier="cloud", slots=4, rtt_s=0.060, service_s=0.012, **STALL),
)
POLICIES = ("nearcast", "round robin")


def run(seed: int, *, duration_s: float = DURATION_S) -> Result:
    """The scenario under both policies, with the same seed."""
    return Result(
        scenario=NAME,
        seed=seed,
        slo_ms=SLO_S * 1e3,
        policies=tuple(_run_policy(policy, seed, duration_s) for policy in POLICIES),
    )


def _run_policy(policy: str, seed: int, duration_s: float) -> PolicyResult:
    world = World(seed)
    nodes = {spec.name: Node(world, spec) for spec in FLEET}
    slow_down(world, [nodes["cloud"]], factor=FAULT_FACTOR, from_s=FAULT_FROM_S, to_s=FAULT_TO_S)
    driver: Driver
    if policy == "nearcast":
        driver = PolicyDriver(world, nodes, deadline_s=None, until_s=duration_s)
    else:
        driver = RoundRobin(world, nodes)
    answers: list[tuple[float, float | None]] = []

    def request() -> None:
        began = world.now

        def done(latency_s: float | None) -> None:
            world.record("answer", began, latency_s)
            answers.append((began, latency_s))

        driver.request(done)

    arrive_poisson(world, rate_per_s=RATE_PER_S, until_s=duration_s, request=request)
    world.run(until_s=duration_s + 60.0)
    latencies = sorted(latency for _, latency in answers if latency is not None)
    in_fault = [latency for began, latency in answers if FAULT_FROM_S <= began < FAULT_TO_S]
    return PolicyResult(
        policy=policy,
        requests=len(answers),
        refused=len(answers) - len(latencies),
        p50_ms=quantile(latencies, 0.50) * 1e3,
        p99_ms=quantile(latencies, 0.99) * 1e3,
        slo_share=_share([latency for _, latency in answers]),
        slo_share_in_fault=_share(in_fault),
        hedge_share=driver.hedges / max(1, len(answers)),
        trace_hash=world.trace_hash,
    )


def _share(latencies: list[float | None]) -> float:
    return sum(latency is not None and latency <= SLO_S for latency in latencies) / max(1, len(latencies))
