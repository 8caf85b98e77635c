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
from simulations.workload import Request, draw_workload
from simulations.world import World

LIVE = "nearcast"
ORACLES: Mapping[str, Callable[[Mesh], Driver]] = {"queue-oracle": QueueOracle, "full-oracle": FullOracle}
_DRAIN_S = 30.0
"""Longer than any deadline, and than any pushback."""


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
    priority: NDArray[np.int64]
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
    ends_s = scenario.duration_s + _DRAIN_S * (1 + 2 * scenario.retries)
    mesh.watch(driver, ends_s if scenario.retries else scenario.duration_s)
    users = _Users(scenario, driver, workload.requests)
    users.come(0)
    world.run(ends_s)
    for node in mesh.nodes.values():
        node.check()
    ended = sum(users.codes.values()) + int(np.isfinite(users.latency_s).sum())
    if ended != len(workload.requests):
        raise RuntimeError(f"{len(workload.requests)} requests came and {ended} ended")
    at_s = np.array([request.at for request in workload.requests])
    counted = at_s >= scenario.warmup_s
    return Run(
        scenario=scenario.name,
        policy=policy,
        seed=seed,
        at_s=at_s[counted],
        latency_s=users.latency_s[counted],
        priority=np.array([request.facts.priority for request in workload.requests])[counted],
        codes=users.codes,
        sends=tuple(mesh.sends),
        trace_hash=world.trace_hash,
    )


class _Users:
    """Send the requests of a workload and remember what came of each."""

    def __init__(self, scenario: Scenario, driver: Driver, requests: list[Request]) -> None:
        self._scenario = scenario
        self._driver = driver
        self._world = driver.world
        self._requests = requests
        self._random = driver.world.stream("users")
        self.latency_s = np.full(len(requests), np.inf)
        self.codes: dict[str, int] = {}

    def come(self, number: int) -> None:
        """Schedule a request; each schedules the next, so that few are ever pending."""
        if number < len(self._requests):
            self._world.at(self._requests[number].at, self._arrive, number)

    def _arrive(self, number: int) -> None:
        self.come(number + 1)
        self._ask(self._requests[number], 0)

    def _ask(self, request: Request, tries: int) -> None:
        def done(code: Code | None, retry_ms: int | None) -> None:
            self._world.record("done", request.number, code)
            if code is None:
                self.latency_s[request.number] = self._world.now - request.at
            elif tries < self._scenario.retries:
                pause_s = (100 << tries if retry_ms is None else retry_ms) / 1e3
                self._world.after(pause_s * self._random.uniform(0.8, 1.2), self._ask, request, tries + 1)
            else:
                self.codes[code] = self.codes.get(code, 0) + 1

        self._driver.request(request, done)
