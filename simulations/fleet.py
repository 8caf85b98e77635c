"""Nodes in virtual time: so many slots, one queue, service times drawn from the world's generator."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nearcast.handler import Served
from nearcast.load import NodeReport, Tier, VersionReport
from simulations.world import World

MODEL, VERSION = "detector", "1"
QUEUE_MAX = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """What a simulated node is. `rtt_s` is there and back from the router; `service_s` is the median of one run."""

    name: str
    tier: Tier
    slots: int
    rtt_s: float
    service_s: float
    stall_share: float = 0.0
    stall_s: float = 0.0


@dataclass(slots=True)
class _Job:
    arrived: float
    in_flight: int
    done: Callable[[Served | None], None]
    cancelled: bool = False
    started: bool = False


class Node:
    """A first-come-first-served queue with `slots` servers. Cancelled work that has not begun is dropped."""

    def __init__(self, world: World, spec: NodeSpec) -> None:
        self._world = world
        self.spec = spec
        self.slowdown = 1.0
        self._queue: deque[_Job] = deque()
        self._busy = 0
        self._waiting = 0
        self._service_s = spec.service_s
        self._random = world.stream(f"service/{spec.name}")

    @property
    def in_flight(self) -> int:
        """Requests running and waiting."""
        return self._busy + self._waiting

    def submit(self, done: Callable[[Served | None], None]) -> Callable[[], None]:
        """Take a request that has just arrived; `done` hears what happened (None = refused). Returns the cancel."""
        if self._waiting >= QUEUE_MAX:
            done(None)
            return lambda: None
        job = _Job(self._world.now, self.in_flight, done)
        self._queue.append(job)
        self._waiting += 1
        self._start()
        return lambda: self._cancel(job)

    def _cancel(self, job: _Job) -> None:
        if not job.cancelled and not job.started:
            job.cancelled = True
            self._waiting -= 1

    def _start(self) -> None:
        while self._busy < self.spec.slots and self._queue:
            job = self._queue.popleft()
            if job.cancelled:
                continue
            job.started = True
            self._waiting -= 1
            self._busy += 1
            began = self._world.now
            service_s = self._draw_service_s()
            self._world.after(service_s, lambda job=job, began=began: self._finish(job, began))  # type: ignore[misc]

    def _finish(self, job: _Job, began: float) -> None:
        self._busy -= 1
        compute_s = self._world.now - began
        self._service_s += 0.05 * (compute_s - self._service_s)
        self._start()
        job.done(
            Served(
                node=self.spec.name,
                tier=self.spec.tier,
                version=VERSION,
                queue_us=int((began - job.arrived) * 1e6),
                compute_us=int(compute_s * 1e6),
                in_flight=job.in_flight,
            )
        )

    def _draw_service_s(self) -> float:
        random = self._random
        service_s = self.spec.service_s * random.lognormvariate(0.0, 0.15) * self.slowdown
        if self.spec.stall_share and random.random() < self.spec.stall_share:
            service_s += self.spec.stall_s
        return service_s

    def report(self) -> NodeReport:
        """What the node would say about itself now."""
        version = VersionReport(
            model=MODEL,
            version=VERSION,
            in_flight=self.in_flight,
            queue_us=self._waiting / self.spec.slots * self._service_s * 1e6,
            service_p50_us=self._service_s * 1e6,
            service_p95_us=self._service_s * 1.5e6,
        )
        return NodeReport(
            node=self.spec.name,
            role=self.spec.tier,
            slots=self.spec.slots,
            in_flight=self.in_flight,
            versions=(version,),
        )
