"""The other nodes: who they are, and how they are reached."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import MeshError
from nearcast.identity import Identity
from nearcast.load import NodeReport
from nearcast.telemetry import get_logger
from nearcast.transport.grpc import make_channel
from nearcast.transport.seam import Channel
from router.config import ProbeConfig
from router.router import Router
from router.target import TIERS, NodeView, Surroundings, Target

__all__ = ["ChannelFactory", "NodeView", "TargetSet"]
_log = get_logger(__name__)


class ChannelFactory:
    """Makes the channel to a target: with our identity to a node of the mesh, without to any other server."""

    def __init__(self, kind: Literal["ngh2", "grpcio"], identity: Identity | None) -> None:
        self._kind = kind
        self._identity = identity

    def __call__(self, view: NodeView) -> Channel:
        if view.kind == "oip":
            return make_channel(self._kind, view.address, ca=Path(view.ca) if view.ca else None, roles=None)
        return make_channel(self._kind, view.address, identity=self._identity, roles=(view.role,))


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
        self._config = config or ProbeConfig()
        connects = asyncio.Semaphore(self._config.connects_max)
        self._shared = Surroundings(router=router, make=make, clock=clock, connects=connects, gap_s=self._gap_s)
        self._targets: dict[str, Target] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def views(self) -> tuple[NodeView, ...]:
        """The nodes that are targets now."""
        return tuple(target.view for target in self._targets.values())

    @property
    def targets(self) -> tuple[Target, ...]:
        """How each of them is doing. For reading only."""
        return tuple(self._targets.values())

    @property
    def reports(self) -> tuple[tuple[NodeReport, str], ...]:
        """What each of them said last, and where its mesh listener is."""
        found = ((target.last_report, target.view.address) for target in self._targets.values())
        return tuple((report, address) for report, address in found if report is not None)

    def configure(self, config: ProbeConfig) -> None:
        """Watch all of them by other times from now on; `connects_max` stays."""
        self._config = config
        for target in self._targets.values():
            target.configure(config)

    def update(self, views: Iterable[NodeView]) -> None:
        """Add who is new, move who has another address, drop who is gone. Our own name and other roles are skipped."""
        wanted = {
            view.name: view for view in views if view.role in TIERS and view.address and view.name != self._router.node
        }
        for name, target in list(self._targets.items()):
            if name not in wanted or not target.revise(wanted[name]):
                self._drop(name)
        for name, view in wanted.items():
            if name not in self._targets:
                self._add(view)

    async def close(self) -> None:
        """Drop all and wait until their connections are closed."""
        for name in list(self._targets):
            self._drop(name)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _gap_s(self) -> float:
        """A changed load is told twice a beat, less often where all targets together would exceed the maximum.

        Replies say the load, too: what matters at once is who drains, loads or has lost a version.
        """
        return max(self._config.report_ms / 2e3, len(self._targets) / self._config.reports_per_s_max)

    def _add(self, view: NodeView) -> None:
        try:
            target = Target(view, self._shared, self._config)
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
