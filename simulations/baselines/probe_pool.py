"""Prequal's pool of probe answers: what is in it, which answer is used, and which leaves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

POOL_MAX = 16
AGE_S_MAX = 1.0


@dataclass(slots=True)
class Probe:
    """What one server said: requests in flight there, and the latency to expect at that load. `uses` are left."""

    node: str
    at: float
    in_flight: int
    latency_s: float
    uses: float = inf


class ProbePool:
    """At most 16 answers, one per server, none older than a second.

    Source: Prequal (Wydrowski et al., NSDI 2024), sections 4.2 to 4.4. An answer is hot if its requests in flight are
    above the bound that the caller gives; the best is the cold one with the least latency, else the hot one with the
    fewest requests in flight.
    """

    def __init__(self) -> None:
        self._probes: dict[str, Probe] = {}
        self._worst_is_next = False

    def __len__(self) -> int:
        return len(self._probes)

    def add(self, probe: Probe) -> None:
        """Take an answer in place of the server's earlier one; the oldest leaves a pool that is full."""
        known = self._probes.get(probe.node)
        if known is not None and known.at > probe.at:
            return
        self._probes[probe.node] = probe
        if len(self._probes) > POOL_MAX:
            self._drop(self._oldest())

    def fresh(self, now: float, nodes: Iterable[str]) -> list[Probe]:
        """The answers of `nodes`, once those that are too old are gone."""
        for old in [probe for probe in self._probes.values() if now - probe.at > AGE_S_MAX]:
            self._drop(old)
        return [self._probes[node] for node in nodes if node in self._probes]

    def use(self, probe: Probe) -> None:
        """A request goes to this server: one more in flight there, one use less of the answer."""
        probe.in_flight += 1
        probe.uses -= 1
        if probe.uses < 1:
            self._drop(probe)

    def remove(self, bound: float) -> None:
        """Take one answer out, the oldest and the worst by turns, so that neither stale nor bad ones gather."""
        if self._probes:
            self._drop(worst(self._probes.values(), bound) if self._worst_is_next else self._oldest())
            self._worst_is_next = not self._worst_is_next

    def _oldest(self) -> Probe:
        return min(self._probes.values(), key=lambda probe: probe.at)

    def _drop(self, probe: Probe) -> None:
        if self._probes.get(probe.node) is probe:
            del self._probes[probe.node]


def best(probes: Iterable[Probe], bound: float) -> Probe:
    """The hot-cold lexicographic rule."""
    return min(probes, key=lambda probe: _rank(probe, bound))


def worst(probes: Iterable[Probe], bound: float) -> Probe:
    """The same rule reversed."""
    return max(probes, key=lambda probe: _rank(probe, bound))


def _rank(probe: Probe, bound: float) -> tuple[bool, float]:
    hot = probe.in_flight > bound
    return hot, probe.in_flight if hot else probe.latency_s
