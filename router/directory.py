"""Who is there: the node directory of the control API, read and written. Without it the last view holds."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from nearcast.errors import MeshError
from nearcast.telemetry import get_logger
from router.control import Control
from router.targets import NodeView, TargetSet

_log = get_logger(__name__)
_JITTER = 0.25
_SEEN_S_MAX = 60.0
_PATIENCE_MAX = 10.0


class _Entry(msgspec.Struct, frozen=True):
    """One row of `GET /v1/nodes`; fields that we do not read may be there."""

    name: str
    role: str
    addresses: dict[str, str] = {}
    seen_s_ago: float = 0.0


class _Listing(msgspec.Struct, frozen=True):
    """The answer. A controller that has just started lacks nodes which it does not call removed."""

    nodes: list[_Entry] = []
    is_complete: bool = True
    removed: frozenset[str] = frozenset()


class DirectoryReader:
    """Makes a `TargetSet` follow the directory. Nodes of the configuration stay whatever it says."""

    def __init__(
        self, control: Control, targets: TargetSet, *, interval_s: float, fixed: Sequence[NodeView] = ()
    ) -> None:
        self._control = control
        self._targets = targets
        self._interval_s = interval_s
        self.fixed = {view.name: view for view in fixed}
        self._task: asyncio.Task[None] | None = None
        self._away = 0

    @property
    def is_away(self) -> bool:
        """Whether the last look failed: what other nodes hold may be unknown."""
        return self._away > 0

    def fix(self, views: Sequence[NodeView]) -> None:
        """These nodes are targets from now on, whatever the directory says, and no longer those of before."""
        of_directory = {view.name: view for view in self._targets.views if self.fixed.get(view.name) != view}
        self.fixed = {view.name: view for view in views}
        self._targets.update({**of_directory, **self.fixed}.values())

    async def start(self) -> None:
        """Look once, then go on in the background. An absent control plane is no error."""
        await self._look()
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _follow(self) -> None:
        while True:
            patience = min(_PATIENCE_MAX, 1.0 + self._away)
            await asyncio.sleep(self._interval_s * random.uniform(1 - _JITTER, 1 + _JITTER) * patience)
            await self._look()

    async def _look(self) -> None:
        try:
            listing = msgspec.convert(await self._control.call("GET", "/v1/nodes"), _Listing)
        except (MeshError, msgspec.ValidationError) as error:
            self._away += 1
            if self._away == 1:
                _log.warning("directory_away", error=str(error), targets=len(self._targets.views))
            return
        if self._away:
            _log.info("directory_back")
        self._away = 0
        views = {
            entry.name: NodeView(name=entry.name, role=entry.role, address=entry.addresses.get("mesh", ""))
            for entry in listing.nodes
            if entry.seen_s_ago <= _SEEN_S_MAX
        }
        if not listing.is_complete:
            kept = {view.name: view for view in self._targets.views if view.name not in listing.removed}
            views = kept | views
        self._targets.update({**views, **self.fixed}.values())


class Announcer:
    """Says to the directory where this node listens and what it holds, again and again.

    Args:
        control: the link to the control API.
        addresses: listeners by name: grpc, http, mesh, metrics, mqtt, peer.
        models: what this node holds, as JSON; read at each word.
        heed_removed: told with each answer which names were removed from the mesh.
        interval_s: pause between two words.
    """

    def __init__(
        self,
        control: Control,
        *,
        addresses: Callable[[], Mapping[str, str]],
        models: Callable[[], Mapping[str, Any]] = dict,
        heed_removed: Callable[[list[str]], None] = lambda _: None,
        interval_s: float = 5.0,
    ) -> None:
        self._control = control
        self._addresses = addresses
        self._models = models
        self._heed_removed = heed_removed
        self._interval_s = interval_s
        self._task: asyncio.Task[None] | None = None
        self._away = 0

    async def start(self) -> None:
        """Speak once, then go on in the background. An absent control plane is no error."""
        await self._speak()
        self._task = asyncio.get_running_loop().create_task(self._go_on())

    async def close(self) -> None:
        """Fall silent; the directory forgets us by itself."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(min(self._interval_s, 0.5 * self._away) if self._away else self._interval_s)
            await self._speak()

    async def _speak(self) -> None:
        addresses = {name: address for name, address in self._addresses().items() if address}
        body = {"addresses": addresses, "models": dict(self._models())}
        try:
            answer = await self._control.call("POST", "/v1/nodes/self", body)
            removed = msgspec.convert(answer.get("removed", []), list[str])
        except (MeshError, msgspec.ValidationError) as error:
            self._away += 1
            if self._away == 1:
                _log.warning("announcement_failed", error=str(error))
            return
        self._heed_removed(removed)
        if self._away:
            _log.info("announcement_heard")
        self._away = 0
