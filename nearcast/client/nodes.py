"""Where a client's requests may go: nodes that were named to it. `leases` holds the other way to know."""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from nearcast.client.limits import ClientLimits
from nearcast.errors import Code, MeshError
from nearcast.load import NodeReport, VersionReport
from nearcast.transport.remote import RemoteNode
from nearcast.transport.seam import Channel
from router.router import Router

Connect: TypeAlias = Callable[[str, str], Channel]
"""Makes a channel to an address; a name that is not "" must be in the server's certificate."""


class Nodes(Protocol):
    """What a client needs of whoever knows the nodes. Feeds the client's policy."""

    @property
    def front(self) -> RemoteNode | None:
        """Who routes what we cannot send anywhere ourselves; None = nobody."""
        ...

    @property
    def every(self) -> Sequence[RemoteNode]:
        """All nodes, in the order in which they are asked about models."""
        ...

    @property
    def leases(self) -> int:
        """Leases given or renewed so far."""
        ...

    def channel(self, name: str) -> Channel:
        """The channel to a target of the policy; that of `front`, if there is one, for any other name."""
        ...

    def start(self) -> None:
        """Begin to watch; called on the client's loop, again and again."""
        ...

    def knows(self, now: float, model: str) -> bool:
        """Whether the policy has heard of the model; marks it as used."""
        ...

    async def learn(self, model: str, size_bytes: int, deadline: float | None, priority: int) -> None:
        """Let the policy hear of a model, from a usual request for it. Never fails."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


class Probe:
    """Asks one node whether it is ready, and tells the policy how long that took."""

    def __init__(
        self, name: str, node: RemoteNode, router: Router, limits: ClientLimits, now: Callable[[], float]
    ) -> None:
        self.name = name
        self.is_ready = True
        self.is_measured = False
        self._node = node
        self._policy = router.policy
        self._limits = limits
        self._now = now
        self._slow = 0

    async def ask(self) -> bool:
        """One question; two of a node that was not reached before, for the first holds the making of a connection.

        Returns:
            Whether it has answered.
        """
        while True:
            began = self._now()
            if not await self._is_answered(began):
                self.is_measured = False
                return False
            now = self._now()
            self._policy.on_probe(now, self.name, now - began, connecting=not self.is_measured)
            if self.is_measured:
                return True
            self.is_measured = True

    async def _is_answered(self, began: float) -> bool:
        limits = self._limits
        try:
            async with asyncio.timeout(2 * limits.probe_timeout_s):
                self.is_ready = await self._node.is_ready(deadline=began + limits.probe_timeout_s)
        except (MeshError, TimeoutError) as error:
            # One slow answer is a busy node, not a lost one; a refused connection is.
            timed_out = isinstance(error, TimeoutError) or error.code is Code.DEADLINE
            self._slow = self._slow + 1 if timed_out else limits.probes_slow_max
            if self._slow >= limits.probes_slow_max:
                self._slow = 0
                self._policy.on_probe(self._now(), self.name, None)
            return False
        self._slow = 0
        return True


class NamedNodes:
    """Nodes named by their addresses. They do not tell clients what they hold: each is believed to hold every model
    until it says no.
    """

    front = None
    leases = 0

    def __init__(
        self,
        addresses: Sequence[str],
        router: Router,
        connect: Connect,
        limits: ClientLimits,
        now: Callable[[], float],
    ) -> None:
        self._limits = limits
        self._now = now
        self._policy = router.policy
        self._channels = {address: connect(address, "") for address in dict.fromkeys(addresses)}
        self._nodes = {address: RemoteNode(channel, address) for address, channel in self._channels.items()}
        self._probes = {name: Probe(name, node, router, limits, now) for name, node in self._nodes.items()}
        for name, node in self._nodes.items():
            router.attach(name, node, "peer")
        self._models: OrderedDict[str, None] = OrderedDict()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def every(self) -> Sequence[RemoteNode]:
        return list(self._nodes.values())

    def channel(self, name: str) -> Channel:
        return self._channels[name]

    def start(self) -> None:
        if not self._tasks:
            loop = asyncio.get_running_loop()
            self._tasks = [loop.create_task(self._probe_forever(probe)) for probe in self._probes.values()]

    def knows(self, now: float, model: str) -> bool:
        if model not in self._models:
            return False
        self._models.move_to_end(model)
        return True

    async def learn(self, model: str, size_bytes: int, deadline: float | None, priority: int) -> None:
        self._models[model] = None
        if len(self._models) > self._limits.models_max:
            self._models.popitem(last=False)
        for name in self._nodes:
            self._report(name)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(node.close() for node in self._nodes.values()))

    async def _probe_forever(self, probe: Probe) -> None:
        while True:
            if await probe.ask():
                self._report(probe.name)
            await asyncio.sleep(self._limits.probe_s * random.uniform(0.75, 1.25))

    def _report(self, name: str) -> None:
        load = next((t.load for t in self._policy.targets if t.name == name), 0.0)
        report = NodeReport(
            node=name,
            role="edge",
            slots=self._limits.slots,
            in_flight=round(load),
            draining=not self._probes[name].is_ready,
            versions=tuple(VersionReport(model=model, version="") for model in self._models),
        )
        self._policy.on_report(self._now(), name, report)
