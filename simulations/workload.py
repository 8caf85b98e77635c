"""Who asks, when, and with what luck: everything random about a run, drawn before it begins.

Draws belong to a request and a node, not to an order of service: all policies meet the same arrivals, the same service
times and the same network.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from router.policy.facts import RequestFacts
from simulations.scenario import Fault, NodeSpec, Phase, Scenario

Floats = NDArray[np.float64]


class Request(NamedTuple):
    """One request of our own users. `number` counts from 0 in the order of arrival."""

    number: int
    at: float
    facts: RequestFacts


class Luck(NamedTuple):
    """What a node has in store for each request: model time and stall in s, share of the round trip each way."""

    work_s: list[float]
    stall_s: list[float]
    there: list[float]
    back: list[float]


class Foreign(NamedTuple):
    """Requests that reach a node past our router: instants, model times, stalls, in seconds."""

    at: list[float]
    work_s: list[float]
    stall_s: list[float]


class Workload(NamedTuple):
    """All draws of one run."""

    requests: list[Request]
    luck: dict[str, Luck]
    foreign: dict[str, Foreign]


@lru_cache(maxsize=2)
def draw_workload(scenario: Scenario, seed: int) -> Workload:
    """The workload of a scenario. The same for every policy; cached for the next one."""
    at = draw_arrivals(generator(seed, "arrivals"), scenario.load, scenario.duration_s)
    kinds = scenario.classes
    chosen = generator(seed, "classes").choice(len(kinds), size=len(at), p=[kind.share for kind in kinds])
    facts = [
        RequestFacts(
            model=kind.model,
            size_bytes=kind.size_bytes,
            remaining_s=scenario.deadline_ms / 1e3,
            priority=kind.priority,
            tenant=kind.tenant,
        )
        for kind in kinds
    ]
    exists = at >= np.array([kind.from_s for kind in kinds])[chosen]
    pairs = zip(at[exists].tolist(), chosen[exists].tolist(), strict=True)
    requests = [Request(index, time_s, facts[kind]) for index, (time_s, kind) in enumerate(pairs)]
    luck, foreign = {}, {}
    for node in scenario.nodes:
        luck[node.name] = _draw_luck(seed, node, len(requests))
        foreign[node.name] = _draw_foreign(seed, node, scenario)
    return Workload(requests, luck, foreign)


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A generator of its own for one purpose."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def draw_arrivals(random: np.random.Generator, phases: Sequence[Phase], until_s: float) -> Floats:
    """Instants of a Poisson process with a rate that changes in steps."""
    ends = [*(phase.from_s for phase in phases[1:]), until_s]
    parts = []
    for phase, end_s in zip(phases, ends, strict=True):
        length_s = max(0.0, min(end_s, until_s) - phase.from_s)
        count = int(random.poisson(phase.rate_rps * length_s))
        parts.append(np.sort(random.uniform(phase.from_s, phase.from_s + length_s, count)))
    return np.concatenate(parts)


def draw_service(random: np.random.Generator, node: NodeSpec, count: int) -> tuple[list[float], list[float]]:
    """Model times without slow-down, and stalls, in seconds."""
    if node.memoryless:
        return random.exponential(node.service_ms / 1e3, count).tolist(), [0.0] * count
    work = node.service_ms / 1e3 * random.lognormal(0.0, node.service_sigma, count)
    stall = np.where(random.random(count) < node.stall_share, node.stall_ms / 1e3, 0.0)
    return work.tolist(), stall.tolist()


def _draw_luck(seed: int, node: NodeSpec, count: int) -> Luck:
    work, stall = draw_service(generator(seed, f"service/{node.name}"), node, count)
    delays = generator(seed, f"network/{node.name}")
    there, back = (0.5 + 0.5 * node.rtt_jitter * delays.exponential(1.0, count) for _ in range(2))
    return Luck(work, stall, there.tolist(), back.tolist())


def _draw_foreign(seed: int, node: NodeSpec, scenario: Scenario) -> Foreign:
    random = generator(seed, f"foreign/{node.name}")
    parts = [draw_arrivals(random, (Phase(rate_rps=node.foreign_rps),), scenario.duration_s)]
    for fault in scenario.faults:
        if fault.kind == "crowd" and node.name in fault.nodes:
            parts += [_crowd(random, fault, begin_s, end_s) for begin_s, end_s in fault.windows_s]
    at = np.sort(np.concatenate(parts))
    return Foreign(at.tolist(), *draw_service(random, node, len(at)))


def _crowd(random: np.random.Generator, fault: Fault, begin_s: float, end_s: float) -> Floats:
    return draw_arrivals(random, (Phase(from_s=begin_s, rate_rps=fault.value),), end_s)
