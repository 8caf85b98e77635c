"""One run: a scenario, a policy, a seed. What happened to every request."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nearcast.errors import Code, MeshError
from simulations.contract import Baseline
from simulations.drivers import BaselineDriver, Driver, PolicyDriver
from simulations.faults import schedule_faults
from simulations.mesh import Mesh
from simulations.oracles import FullOracle, QueueOracle
from simulations.scenario import Scenario
from simulations.workload import draw_workload
from simulations.world import World

LIVE = "nearcast"
ORACLES: Mapping[str, Callable[[Mesh], Driver]] = {"queue-oracle": QueueOracle, "full-oracle": FullOracle}
_DRAIN_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Requests that count, in order of arrival: `at_s` and `latency_s` (infinite without an answer).

    `sends` are all that left the router: when, to which node, and whether first, hedge or retry.
    """

    scenario: str
    policy: str
    seed: int
    at_s: NDArray[np.float64]
    latency_s: NDArray[np.float64]
    codes: dict[str, int]
    sends: tuple[tuple[float, str, str], ...]
    trace_hash: str


def baselines() -> dict[str, type[Baseline]]:
    """The published balancers by name."""
    found: dict[str, type[Baseline]] = importlib.import_module("simulations.baselines").BASELINES
    return found


def policy_names() -> tuple[str, ...]:
    """Everything that can route: the live policy, the baselines, the oracles."""
    return (LIVE, *baselines(), *ORACLES)


def make_driver(mesh: Mesh, policy: str) -> Driver:
    """The driver of a policy.

    Raises:
        MeshError: INVALID_REQUEST for a name that nobody has.
    """
    if policy == LIVE:
        return PolicyDriver(mesh)
    if policy in ORACLES:
        return ORACLES[policy](mesh)
    known = baselines()
    if policy not in known:
        raise MeshError(
            Code.INVALID_REQUEST, f"There is no policy {policy!r}; choose from {', '.join(policy_names())}."
        )
    return BaselineDriver(mesh, known[policy])


def run(scenario: Scenario, policy: str, seed: int) -> Run:
    """Run a scenario. The same arguments give the same run.

    Raises:
        MeshError: INVALID_REQUEST for an unknown policy.
        RuntimeError: if an invariant of the simulator broke.
    """
    world, workload = World(seed), draw_workload(scenario, seed)
    mesh = Mesh(world, scenario, workload)
    schedule_faults(mesh)
    world.run(0.0)
    driver = make_driver(mesh, policy)
    mesh.watch(driver, scenario.duration_s)
    requests = workload.requests
    latency_s = np.full(len(requests), np.inf)
    codes: dict[str, int] = {}

    def come(index: int) -> None:
        if index + 1 < len(requests):
            world.at(requests[index + 1].at, come, index + 1)
        request = requests[index]

        def done(code: Code | None, _retry_ms: int | None) -> None:
            if code is None:
                latency_s[index] = world.now - request.at
            else:
                codes[code] = codes.get(code, 0) + 1
            world.record("done", index, code)

        driver.request(request, done)

    if requests:
        world.at(requests[0].at, come, 0)
    world.run(scenario.duration_s + _DRAIN_S)
    for node in mesh.nodes.values():
        node.check()
    ended = sum(codes.values()) + int(np.isfinite(latency_s).sum())
    if ended != len(requests):
        raise RuntimeError(f"{len(requests)} requests came and {ended} ended")
    at_s = np.array([request.at for request in requests])
    counted = at_s >= scenario.warmup_s
    return Run(
        scenario=scenario.name,
        policy=policy,
        seed=seed,
        at_s=at_s[counted],
        latency_s=latency_s[counted],
        codes=codes,
        sends=tuple(mesh.sends),
        trace_hash=world.trace_hash,
    )
