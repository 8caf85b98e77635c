"""Yardsticks that no router can be: they look into the nodes. Neither hedges."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from simulations.drivers import SingleDriver
from simulations.fleet import Job, Node
from simulations.mesh import Mesh
from simulations.workload import Request

_NEVER_S = 1e9


class QueueOracle(SingleDriver):
    """Knows all queues, what is on its way to them, mean model times, round trips and present faults; not the draws.

    Takes the least expected completion.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self._on_way: dict[str, dict[Request, float]] = {name: {} for name in mesh.nodes}

    def choose(self, request: Request, names: Sequence[str]) -> str:
        best = min(names, key=lambda name: self.completion_s(request, name))
        luck = self.mesh.workload.luck[best]
        self._on_way[best][request] = self.world.now + self._travel_s(request, best, luck.there[request.number])
        return best

    def completion_s(self, request: Request, name: str) -> float:
        """Seconds from now until the answer is expected back."""
        node, spec = self.mesh.nodes[name], self.mesh.nodes[name].spec
        if self.mesh.links[name].is_cut or node.fails_after_s is not None or not node.slots:
            return _NEVER_S
        there_s = self._travel_s(request, name, 0.5 * (1.0 + spec.rtt_jitter))
        back_s = self.mesh.links[name].rtt_s * 0.5 * (1.0 + spec.rtt_jitter)
        service_s = self._mean_s(node)
        ahead = node.waiting + len(node.running) + len(self._arriving(name)) + 1 - node.slots
        wait_s = max(0, ahead) * service_s / node.slots
        return max(there_s, self._ready_s(node, request)) + wait_s + service_s + back_s

    def _arriving(self, name: str) -> dict[Request, float]:
        """What we have sent and has not arrived yet."""
        flights = self._on_way[name]
        for request in [request for request, at in flights.items() if at <= self.world.now]:
            del flights[request]
        return flights

    def _travel_s(self, request: Request, name: str, share: float) -> float:
        link = self.mesh.links[name]
        return link.transfer_s(request.facts.size_bytes) + share * link.rtt_s

    def _mean_s(self, node: Node) -> float:
        spec = node.spec
        stall_s = 0.0 if spec.memoryless else spec.stall_share * spec.stall_ms / 1e3
        return (spec.service_mean_s - stall_s) * node.slowdown + stall_s

    def _ready_s(self, node: Node, request: Request) -> float:
        """Seconds until the node has the model in memory."""
        model = request.facts.model
        if model in node.ready_at:
            return node.ready_at[model] - self.world.now
        return node.cold_s.get(model, 0.0)


class FullOracle(QueueOracle):
    """Knows every draw, too, and takes the earliest completion; it does not foresee who will come next."""

    def completion_s(self, request: Request, name: str) -> float:
        node, link = self.mesh.nodes[name], self.mesh.links[name]
        if link.is_cut or node.fails_after_s is not None or not node.slots:
            return _NEVER_S
        luck, now = self.mesh.workload.luck[name], self.world.now
        arrives = now + self._travel_s(request, name, luck.there[request.number])
        free = [job.ends for job in node.running] + [now] * (node.slots - len(node.running))
        heapq.heapify(free)
        for job in node.queue:
            if job.state == "waiting":
                heapq.heapreplace(free, max(now, free[0]) + self._length_s(node, job))
        for other, at in self._arriving(name).items():
            if at <= arrives:
                theirs = luck.work_s[other.number] * node.slowdown + luck.stall_s[other.number]
                heapq.heapreplace(free, max(at, free[0]) + theirs)
        begins = max(arrives, free[0], now + self._ready_s(node, request))
        ends = begins + luck.work_s[request.number] * node.slowdown + luck.stall_s[request.number]
        return ends - now + luck.back[request.number] * link.rtt_s

    def _length_s(self, node: Node, job: Job) -> float:
        return job.work_s * node.slowdown + job.stall_s
