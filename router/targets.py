"""The other nodes: a channel to each, and probes that keep the policy's view of them fresh."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import Code, MeshError
from nearcast.identity import Identity
from nearcast.load import NodeReport, Tier
from nearcast.telemetry import get_logger
from nearcast.transport.foreign import SLOTS_DEFAULT, ForeignNode
from nearcast.transport.grpc import make_channel
from nearcast.transport.remote import RemoteNode
from nearcast.transport.seam import Channel
from router.config import ProbeConfig, TargetConfig
from router.router import Router

_log = get_logger(__name__)
_JITTER = 0.25
TIERS: dict[str, Tier] = {"edge": "peer", "cloud": "cloud"}
"""The tier of a node by its role, seen from any other node. Other roles are no targets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """A node as the directory or the configuration (`TargetConfig`) names it."""

    name: str
    role: str
    address: str
    domain: str = ""
    kind: Literal["nearcast", "oip"] = "nearcast"
    price: float | None = None
    quality: float | None = None
    ca: str = ""
    models: tuple[str, ...] = ()
    slots: int | None = None


def configured_views(targets: Iterable[TargetConfig]) -> list[NodeView]:
    """The `[[targets]]` of a configuration."""
    return [NodeView(**msgspec.structs.asdict(target)) for target in targets]


class ChannelFactory:
    """Makes the channel to a target: with our identity to a node of the mesh, without to any other server."""

    def __init__(self, kind: Literal["ngh2", "grpcio"], identity: Identity | None) -> None:
        self._kind = kind
        self._identity = identity

    def __call__(self, view: NodeView) -> Channel:
        if view.kind == "oip":
            return make_channel(self._kind, view.address, ca=Path(view.ca) if view.ca else None, roles=None)
        return make_channel(self._kind, view.address, identity=self._identity, roles=(view.role,))


class Target:
    """One other node, probed until it is closed."""

    def __init__(
        self, view: NodeView, router: Router, make: Callable[[NodeView], Channel], config: ProbeConfig, clock: Clock
    ) -> None:
        self.view = view
        self.last_report: NodeReport | None = None
        self._router = router
        self._make = make
        self._config = config
        self._now = clock.monotonic
        self._node = self._connect()
        self._failures = 0
        self._connecting = True
        self._closing: set[asyncio.Task[None]] = set()
        self._probes = asyncio.get_running_loop().create_task(self._probe_forever())

    def attach(self) -> bool:
        """Offer requests to it."""
        return self._router.attach(self.view.name, self._node, TIERS[self.view.role], self.view.domain)

    async def close(self) -> None:
        """Stop probing; the connection ends when nothing is in flight any more, or after the drain time."""
        self._probes.cancel()
        await asyncio.gather(self._probes, return_exceptions=True)
        ends_at = self._now() + self._config.drain_ms / 1e3
        while self._in_flight() and self._now() < ends_at:  # noqa: ASYNC110 - the policy is pure and wakes nobody
            await asyncio.sleep(0.02)
        await self._node.close()
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def _probe_forever(self) -> None:
        while True:
            await self._probe()
            spread = random.uniform(1 - _JITTER, 1 + _JITTER)
            # A target that does not answer is asked less often, up to four times the pause.
            patience = min(4.0, 1.0 + self._failures)
            await asyncio.sleep(self._config.report_ms / 1e3 * spread * patience)

    async def _probe(self) -> None:
        started = self._now()
        timeout_s = self._config.timeout_ms / 1e3
        policy = self._router.policy
        try:
            async with asyncio.timeout(2 * timeout_s):
                report, round_trip_s = await self._ask(started + timeout_s)
        except (MeshError, TimeoutError) as error:
            self._failed(error)
            return
        if report.node != self.view.name:
            self._failed(MeshError(Code.UNTRUSTED, f"{self.view.address} says that it is {report.node!r}."))
            return
        if self._failures:
            _log.info("target_answers", target=self.view.name)
        self._failures = 0
        now = self._now()
        policy.on_probe(now, self.view.name, round_trip_s, connecting=self._connecting)
        self._connecting = False
        self._take(now, report)

    async def _ask(self, deadline: float) -> tuple[NodeReport, float]:
        """A report, and how long a small question takes."""
        if isinstance(self._node, ForeignNode):
            return await self._node.poll(deadline=deadline)
        started = self._now()
        report = await self._node.report(deadline=deadline)
        return report, self._now() - started

    def _take(self, now: float, report: NodeReport) -> None:
        """What the configuration says about a target outranks its own word."""
        view = self.view
        said = {name: value for name in ("price", "quality") if (value := getattr(view, name)) is not None}
        if said:
            report = replace(report, versions=tuple(replace(version, **said) for version in report.versions))
        self.last_report = report
        self._router.policy.on_report(now, view.name, report)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._connecting = True
        timed_out = isinstance(error, TimeoutError) or (isinstance(error, MeshError) and error.code is Code.DEADLINE)
        # One slow answer is a busy node, not a lost one; a refused connection is.
        if not timed_out or self._failures >= self._config.failures_max:
            self._router.policy.on_probe(self._now(), self.view.name, None)
        if self._failures == 1:
            _log.warning("target_silent", target=self.view.name, address=self.view.address, error=str(error))
        if timed_out and self._failures % self._config.failures_max == 0:
            self._reconnect()

    def _reconnect(self) -> None:
        """Give the connection up: a peer behind a cut link never says so, and what waits on it can be retried."""
        _log.warning("target_reconnects", target=self.view.name)
        old, self._node = self._node, self._connect()
        self.attach()
        task = asyncio.get_running_loop().create_task(old.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _connect(self) -> RemoteNode:
        view = self.view
        if view.kind == "oip":
            return ForeignNode(self._make(view), view.name, models=view.models, slots=view.slots or SLOTS_DEFAULT)
        return RemoteNode(self._make(view), view.name)

    def _in_flight(self) -> int:
        return sum(target.own for target in self._router.policy.targets if target.name == self.view.name)


class TargetSet:
    """All other nodes of one router. `update` makes it follow a list."""

    def __init__(
        self,
        router: Router,
        make: Callable[[NodeView], Channel],
        *,
        config: ProbeConfig | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._router = router
        self._make = make
        self._config = config or ProbeConfig()
        self._clock = clock
        self._targets: dict[str, Target] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def views(self) -> tuple[NodeView, ...]:
        """The nodes that are targets now."""
        return tuple(target.view for target in self._targets.values())

    @property
    def reports(self) -> tuple[tuple[NodeReport, str], ...]:
        """What each of them said last, and where its mesh listener is."""
        found = ((target.last_report, target.view.address) for target in self._targets.values())
        return tuple((report, address) for report, address in found if report is not None)

    def update(self, views: Iterable[NodeView]) -> None:
        """Add who is new, move who has another address, drop who is gone. Our own name and other roles are skipped."""
        wanted = {
            view.name: view for view in views if view.role in TIERS and view.address and view.name != self._router.node
        }
        for name in [name for name, target in self._targets.items() if wanted.get(name) != target.view]:
            self._drop(name)
        for name, view in wanted.items():
            if name not in self._targets:
                self._add(view)

    async def close(self) -> None:
        """Drop all and wait until their connections are closed."""
        for name in list(self._targets):
            self._drop(name)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _add(self, view: NodeView) -> None:
        try:
            target = Target(view, self._router, self._make, self._config, self._clock)
        except MeshError as error:
            _log.warning("target_unusable", target=view.name, address=view.address, error=error.message)
            return
        self._targets[view.name] = target
        if not target.attach():
            self._drop(view.name)
            return
        _log.info("target_added", target=view.name, role=view.role, address=view.address)

    def _drop(self, name: str) -> None:
        target = self._targets.pop(name)
        self._router.detach(name)
        task = asyncio.get_running_loop().create_task(target.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        _log.info("target_dropped", target=name)
