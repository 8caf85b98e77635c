"""Nodes and the ways to them, as one router meets them: sends, answers, probes, lost connections."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from nearcast.errors import Code
from nearcast.handler import Served
from nearcast.load import NodeReport
from simulations.fleet import Job, Node
from simulations.link import Link
from simulations.scenario import MODEL, NodeSpec, Scenario
from simulations.workload import Request, Workload
from simulations.world import World

REPORT_S = 0.25
"""Mean time between two probes of a node."""
_REPORT_SPREAD = 0.25
_PROBE_TIMEOUT_S = 1.0
_PATIENCE_MAX = 4.0
_FAILURES_MAX = 3
"""Probes that time out in a row before the policy is told; a lost connection is told at once."""


class Watcher(Protocol):
    """Whoever routes hears of the nodes through this."""

    def hear_report(self, node: NodeSpec, report: NodeReport, rtt_s: float, *, connecting: bool) -> None:
        """A node answered a probe that took `rtt_s`; `connecting`: the connection was made on the way."""
        ...

    def hear_silence(self, node: NodeSpec) -> None:
        """A node does not answer probes."""
        ...


class Mesh:
    """All nodes of a scenario and their foreign users."""

    def __init__(self, world: World, scenario: Scenario, workload: Workload) -> None:
        self.world = world
        self.scenario = scenario
        self.workload = workload
        models = tuple(sorted({kind.model for kind in scenario.classes} | {MODEL}))
        self.nodes = {spec.name: Node(world, spec, models) for spec in scenario.nodes}
        self.links = {spec.name: Link(world, spec) for spec in scenario.nodes}
        self.report_age_s = dict.fromkeys(self.nodes, 0.0)
        self.sends: list[tuple[float, str, str]] = []
        """When, where, and whether first, hedge or retry."""
        for name, node in self.nodes.items():
            self._come_foreign(node, name, 0)

    def send(self, request: Request, name: str, kind: str, expires: float, heard: Answered) -> Flight:
        """Send a request to a node; `heard` is called once unless the flight is cancelled."""
        self.sends.append((self.world.now, name, kind))
        self.world.record(kind, request.number, name)
        return Flight(self, request, name, expires, heard)

    def watch(self, watcher: Watcher, until_s: float) -> None:
        """Report every node to `watcher`, at once and then four times a second."""
        for name, node in self.nodes.items():
            _Probes(self, name, watcher, until_s)
            watcher.hear_report(node.spec, node.report(), self.links[name].rtt_s, connecting=False)

    def _come_foreign(self, node: Node, name: str, index: int) -> None:
        foreign = self.workload.foreign[name]
        if index > 0:
            node.submit(Job(foreign.work_s[index - 1], foreign.stall_s[index - 1], None))
        if index < len(foreign.at):
            self.world.at(foreign.at[index], self._come_foreign, node, name, index + 1)


class Answered(Protocol):
    """Hears how a flight ended. `sent`: the node may have run it; `told`: the node said so itself."""

    def __call__(
        self, flight: Flight, served: Served | None, code: Code | None, retry_ms: int | None, *, sent: bool, told: bool
    ) -> None:
        """`code` None = answered."""
        ...


class Flight:
    """One request on its way to one node and back."""

    __slots__ = ("_heard", "_job", "_link", "_node", "_share_back", "_share_there", "name", "request", "sent_at")

    def __init__(self, mesh: Mesh, request: Request, name: str, expires: float, heard: Answered) -> None:
        self.request = request
        self.name = name
        self.sent_at = mesh.world.now
        self._heard: Answered | None = heard
        self._link = link = mesh.links[name]
        self._node = mesh.nodes[name]
        luck, index = mesh.workload.luck[name], request.number
        self._share_there, self._share_back = luck.there[index], luck.back[index]
        self._job = Job(luck.work_s[index], luck.stall_s[index], self._leave, request.facts.model, expires)
        if link.is_lost:
            mesh.world.after(0.0, self._refuse)
            return
        link.flights[self] = self._lose
        link.there(self._share_there, request.facts.size_bytes, self._node.submit, self._job)

    def cancel(self) -> None:
        """Give it up: the node hears so half a round trip later. `heard` is not called any more."""
        self._heard = None
        if self._link.flights.pop(self, None) is not None:
            self._link.back(self._share_there, self._node.cancel, self._job)

    def _leave(self, served: Served | None, code: Code | None, retry_ms: int | None) -> None:
        self._link.back(self._share_back, self._arrive, served, code, retry_ms)

    def _arrive(self, served: Served | None, code: Code | None, retry_ms: int | None) -> None:
        heard, self._heard = self._heard, None
        if heard is not None:
            self._link.flights.pop(self, None)
            heard(self, served, code, retry_ms, sent=True, told=code is not None)

    def _lose(self) -> None:
        heard, self._heard = self._heard, None
        if heard is not None:
            heard(self, None, Code.UNAVAILABLE, None, sent=True, told=False)

    def _refuse(self) -> None:
        heard, self._heard = self._heard, None
        if heard is not None:
            heard(self, None, Code.UNAVAILABLE, None, sent=False, told=False)


class _Probes:
    """Probes one node for ever, as the live router does: one at a time, less often while it does not answer."""

    def __init__(self, mesh: Mesh, name: str, watcher: Watcher, until_s: float) -> None:
        self._world = mesh.world
        self._ages = mesh.report_age_s
        self._node = mesh.nodes[name]
        self._link = mesh.links[name]
        self._watcher = watcher
        self._until_s = until_s
        self._random = mesh.world.stream(f"probes/{name}")
        self._history: deque[tuple[float, NodeReport]] = deque(maxlen=256)
        self._failures = 0
        self._connecting = False
        self._number = 0
        self._pause()

    def _pause(self) -> None:
        self._number += 1
        patience = min(_PATIENCE_MAX, 1.0 + self._failures)
        spread = self._random.uniform(1.0 - _REPORT_SPREAD, 1.0 + _REPORT_SPREAD)
        if self._world.now < self._until_s:
            self._world.after(REPORT_S * spread * patience, self._probe)

    def _probe(self) -> None:
        started, number, link = self._world.now, self._number, self._link
        if link.is_lost:
            self._connecting = True
        link.flights[self] = lambda: self._fail(number, timed_out=False)
        # A new connection takes one round trip for TCP and one for TLS before the probe itself leaves.
        link.there(2.5 if self._connecting else 0.5, 200, self._look, number, started)
        self._world.after(_PROBE_TIMEOUT_S, self._fail, number)

    def _look(self, number: int, started: float) -> None:
        now = self._world.now
        self._history.append((now, self._node.report()))
        age_s = self._ages[self._node.spec.name]
        past = next((report for at, report in reversed(self._history) if at <= now - age_s), self._history[0][1])
        self._link.back(0.5, self._hear, number, started, past)

    def _hear(self, number: int, started: float, report: NodeReport) -> None:
        if number != self._number:
            return
        self._link.flights.pop(self, None)
        self._link.is_lost = False
        self._failures = 0
        connecting, self._connecting = self._connecting, False
        self._watcher.hear_report(self._node.spec, report, self._world.now - started, connecting=connecting)
        self._pause()

    def _fail(self, number: int, *, timed_out: bool = True) -> None:
        if number != self._number:
            return
        self._link.flights.pop(self, None)
        self._failures += 1
        self._connecting = True
        if not timed_out or self._failures >= _FAILURES_MAX:
            self._watcher.hear_silence(self._node.spec)
        self._pause()


Done = Callable[[Code | None, int | None], None]
"""Hears once how a request ended: code None = answered in time; else why not, and when to come again in ms."""
