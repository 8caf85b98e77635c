"""Nodes in virtual time: so many slots, one queue, models that are in memory or not."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from nearcast.errors import Code
from nearcast.handler import Served
from nearcast.load import NodeReport, Residency, VersionReport
from simulations.scenario import MODEL, VERSION, NodeSpec
from simulations.world import World

Heard: TypeAlias = Callable[[Served | None, Code | None, int | None], None]
"""Hears once what became of a request: how it was served, or why it was not and when to come again, in ms."""
_SAMPLES = 64
HANDSHAKE = ""
"""The model of work that is none: it holds a slot, and no report counts it."""


class Job:
    """One request on a node. `work_s` is its model time on a node that is well, `stall_s` what comes on top."""

    __slots__ = ("arrived", "began", "ends", "expires", "heard", "in_flight", "model", "stall_s", "state", "work_s")

    def __init__(
        self, work_s: float, stall_s: float, heard: Heard | None, model: str = MODEL, expires: float = math.inf
    ) -> None:
        self.work_s = work_s
        self.stall_s = stall_s
        self.heard = heard
        self.model = model
        self.expires = expires
        self.state = "new"
        self.arrived = self.began = self.ends = 0.0
        self.in_flight = 0


class Node:
    """A first-come-first-served queue with `slots` servers.

    Work that was cancelled, or whose deadline passed, is dropped before it begins; what has begun runs to its end.
    """

    def __init__(self, world: World, spec: NodeSpec, models: tuple[str, ...] = (MODEL,)) -> None:
        self._world = world
        self.spec = spec
        self.slots = spec.slots
        self.slowdown = 1.0
        self.fails_after_s: float | None = None
        self.lies_s: float | None = None
        self.models = models
        self.ready_at: dict[str, float] = {}
        """Models that are being brought in, and when they will be there."""
        self.cold_s: dict[str, float] = {}
        """Models that are not in memory, and how long it takes to bring them in."""
        self.running: dict[Job, None] = {}
        self.queue: deque[Job] = deque()
        self.waiting = 0
        self._handshakes = 0
        self._parked: dict[str, list[Job]] = {}
        self._samples: deque[float] = deque(maxlen=_SAMPLES)
        self._mean_s = spec.service_s
        self.arrived = self.left = 0
        self._sojourns_s = self._area_s = self._counted_at = 0.0

    @property
    def in_flight(self) -> int:
        """Requests running and waiting."""
        return len(self.running) + self.waiting - self._handshakes

    @property
    def wait_s(self) -> float:
        """How long a request that arrives now will wait, by the model times lately."""
        ahead = self.waiting + len(self.running) + 1 - self.slots
        return max(0, ahead) * self._mean_s / max(1, self.slots)

    def submit(self, job: Job) -> None:
        """Take a request that has just arrived; one that was cancelled on its way never does."""
        now = self._world.now
        if job.state == "dropped":
            return
        if self.fails_after_s is not None:
            if job.heard is not None:
                self._world.after(self.fails_after_s, job.heard, None, Code.INTERNAL, None)
            return
        if job.model == HANDSHAKE:
            self._handshakes += 1
        elif self.waiting >= self.spec.queue_max or now + self.wait_s > job.expires:
            if job.heard is not None:
                job.heard(None, Code.OVERLOADED, max(1, int(self.wait_s * 1e3)))
            return
        job.arrived = now
        job.in_flight = self.in_flight
        job.state = "waiting"
        self._count(+1)
        self.waiting += 1
        if job.model in self.cold_s:
            self.bring_in(job.model)
        if job.model in self.ready_at:
            self._parked.setdefault(job.model, []).append(job)
            return
        self.queue.append(job)
        if len(self.running) < self.slots:
            self._start()

    def cancel(self, job: Job) -> None:
        """Nobody wants this answer any more."""
        job.heard = None
        if job.state == "waiting":
            self._drop(job)
        elif job.state == "new":
            job.state = "dropped"

    def bring_in(self, model: str) -> None:
        """Begin to load a cold model."""
        load_s = self.cold_s.pop(model, None)
        if load_s is not None:
            self.ready_at[model] = self._world.now + load_s
            self._world.after(load_s, self._loaded, model)

    def set_slots(self, slots: int) -> None:
        """Lose slots, together with the runs on them, or get them back."""
        self.slots = slots
        while len(self.running) > slots:
            job, _ = self.running.popitem()
            job.state = "failed"
            self._leave(job)
            if job.heard is not None:
                job.heard(None, Code.INTERNAL, None)
        self._start()

    def report(self) -> NodeReport:
        """What the node says about itself now."""
        if self.lies_s is not None:
            return self._describe(0, 0.0, self.lies_s, self.lies_s * 1.5)
        ordered = sorted(self._samples)
        if ordered:
            p50, p95 = ordered[len(ordered) // 2], ordered[int(0.95 * len(ordered))]
        else:
            p50 = self.spec.service_s
            p95 = p50 * math.exp(1.645 * self.spec.service_sigma)
        return self._describe(self.in_flight, self.wait_s, p50, p95)

    def check(self) -> None:
        """Flow is conserved, and Little's law holds: the sum of all stays is the area under the number present.

        Raises:
            RuntimeError: if the simulator has lost or invented a request.
        """
        self._count(0)
        inside = [*self.running, *(job for job in self.queue if job.state == "waiting")]
        inside += [job for jobs in self._parked.values() for job in jobs if job.state == "waiting"]
        stays_s = self._sojourns_s + sum(self._world.now - job.arrived for job in inside)
        if self.arrived != self.left + len(inside) or len(inside) != self.in_flight + self._handshakes:
            raise RuntimeError(f"{self.spec.name}: {self.arrived} came, {self.left} left, {len(inside)} are inside")
        if not math.isclose(stays_s, self._area_s, rel_tol=1e-6, abs_tol=1e-6):
            raise RuntimeError(f"{self.spec.name}: stays sum to {stays_s} s, the area is {self._area_s} s")

    # Inside ----------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        now = self._world.now
        while self.queue and len(self.running) < self.slots:
            job = self.queue.popleft()
            if job.state != "waiting":
                continue
            if now > job.expires:
                self._drop(job)
                continue
            job.state = "running"
            job.began = now
            job.ends = now + job.work_s * self.slowdown + job.stall_s
            self.waiting -= 1
            self.running[job] = None
            self._world.at(job.ends, self._finish, job)

    def _finish(self, job: Job) -> None:
        if job.state != "running":
            return
        del self.running[job]
        job.state = "done"
        self._leave(job)
        compute_s = self._world.now - job.began
        if job.model != HANDSHAKE:
            self._samples.append(compute_s)
            self._mean_s += 0.05 * (compute_s - self._mean_s)
        if self.queue:
            self._start()
        if job.heard is not None:
            job.heard(self._serve(job, compute_s), None, None)

    def _serve(self, job: Job, compute_s: float) -> Served:
        spec = self.spec
        queue_us, in_flight = int((job.began - job.arrived) * 1e6), job.in_flight
        if self.lies_s is not None:
            queue_us, compute_s, in_flight = 0, self.lies_s, 0
        return Served(
            node=spec.name, tier=spec.tier, version=VERSION,
            queue_us=queue_us, compute_us=int(compute_s * 1e6), in_flight=in_flight,
        )  # fmt: skip

    def _drop(self, job: Job) -> None:
        job.state = "dropped"
        self.waiting -= 1
        self._leave(job)

    def _loaded(self, model: str) -> None:
        del self.ready_at[model]
        self.queue.extend(self._parked.pop(model, ()))
        self._start()

    def _count(self, change: int) -> None:
        now = self._world.now
        self._area_s += (now - self._counted_at) * (self.arrived - self.left)
        self._counted_at = now
        if change > 0:
            self.arrived += change
        else:
            self.left -= change

    def _leave(self, job: Job) -> None:
        self._count(-1)
        self._handshakes -= job.model == HANDSHAKE
        self._sojourns_s += self._world.now - job.arrived

    def _describe(self, in_flight: int, wait_s: float, p50_s: float, p95_s: float) -> NodeReport:
        now, versions = self._world.now, []
        for model in self.models:
            residency: Residency = "hot"
            eta_ms = 0.0
            if model in self.ready_at:
                residency, eta_ms = "loading", (self.ready_at[model] - now) * 1e3
            elif model in self.cold_s:
                residency, eta_ms = "cold", self.cold_s[model] * 1e3
            version = VersionReport(
                model=model,
                version=VERSION,
                residency=residency,
                eta_ms=eta_ms,
                in_flight=in_flight,
                queue_us=wait_s * 1e6,
                service_p50_us=p50_s * 1e6,
                service_p95_us=p95_s * 1e6,
            )
            versions.append(version)
        return NodeReport(
            node=self.spec.name, role=self.spec.tier, slots=self.slots, in_flight=in_flight, versions=tuple(versions)
        )
