"""One other node: how it is reached, and what keeps the policy's view of it fresh.

A node of the mesh sends its reports as a stream; one that offers none is polled, and so is any other server. A small
question beside that measures the round trip, and only while no reply does.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from contextlib import aclosing, nullcontext
from typing import Literal

import msgspec
from msgspec.structs import replace

from nearcast.clock import Clock
from nearcast.errors import Code, MeshError
from nearcast.load import NodeReport, Tier
from nearcast.telemetry import get_logger
from nearcast.transport.foreign import SLOTS_DEFAULT, ForeignNode
from nearcast.transport.mesh import watch_report
from nearcast.transport.remote import RemoteNode
from nearcast.transport.seam import Channel
from nearcast.wire.report import Watch
from router.config import ProbeConfig, TargetConfig
from router.router import Router

_log = get_logger(__name__)
_JITTER = 0.25
_PATIENCE_MAX = 4.0
_CONNECT_FACTOR = 2.0
_SILENT_INTERVALS = 2.0
"""A stream that has said nothing for so many intervals is asked whether it lives."""
_SPREAD_S = 0.05
"""Many streams may break in one moment; they are looked after within this time."""
TIERS: dict[str, Tier] = {"edge": "peer", "cloud": "cloud"}
"""The tier of a node by its role, seen from any other node. Other roles are no targets."""


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
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


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What all targets of a router share.

    Attributes:
        router: whose targets they are.
        make: makes the channel to one.
        clock: its monotonic time is the loop's.
        connects: held while a connection is being made, so that not all are made at once.
        gap_s: how close together reports of one target may come now.
    """

    router: Router
    make: Callable[[NodeView], Channel]
    clock: Clock
    connects: asyncio.Semaphore
    gap_s: Callable[[], float]


class Target:
    """One other node, looked after until it is closed."""

    def __init__(self, view: NodeView, shared: Surroundings, config: ProbeConfig) -> None:
        self.view = view
        self.config = config
        self.last_report: NodeReport | None = None
        self._shared = shared
        self._router = shared.router
        self._now = shared.clock.monotonic
        self._channel, self._node = self._connect()
        self._failures = 0
        self._connecting = True
        self._is_measured = False
        self._closing: set[asyncio.Task[None]] = set()
        # The stream of reports: wished for, offered, when it last spoke.
        self._connected = asyncio.Event()
        self._is_polled = view.kind == "oip"
        self._heard_at: float | None = None
        # The round trip: how many replies there were, since when there has been none, when it was last asked for.
        self._replies = 0
        self._idle_since = self._probed_at = self._now()
        self._woken = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._probing = loop.create_task(self._probe_forever())
        self._watching = None if view.kind == "oip" else loop.create_task(self._watch_forever())

    @property
    def is_streaming(self) -> bool:
        """Whether its reports come by themselves."""
        return self._heard_at is not None

    def attach(self) -> bool:
        """Offer requests to it."""
        return self._router.attach(self.view.name, self._node, TIERS[self.view.role], self.view.domain)

    def revise(self, view: NodeView) -> bool:
        """Take a new price and quality at once. False = something else has changed, too."""
        if view == self.view:
            return True
        if replace(view, price=self.view.price, quality=self.view.quality) != self.view:
            return False
        self.view = view
        if self.last_report is not None:
            self._tell(self._now(), self.last_report)
        return True

    def configure(self, config: ProbeConfig) -> None:
        """Ask and listen by other times from now on."""
        beats_otherwise = config.report_ms != self.config.report_ms
        self.config = config
        if beats_otherwise and self._watching is not None:
            self._watching.cancel()
            self._heard_at = None
            self._watching = asyncio.get_running_loop().create_task(self._watch_forever())

    async def close(self) -> None:
        """Stop asking; the connection ends when nothing is in flight any more, or after the drain time."""
        tasks = [task for task in (self._probing, self._watching) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        ends_at = self._now() + self.config.drain_ms / 1e3
        while self._in_flight() and self._now() < ends_at:  # noqa: ASYNC110 - the policy is pure and wakes nobody
            await asyncio.sleep(0.02)
        await self._node.close()
        await asyncio.gather(*self._closing, return_exceptions=True)

    # Reports that come by themselves ---------------------------------------------------------------------------------

    async def _watch_forever(self) -> None:
        while True:
            await self._connected.wait()
            self._connected.clear()
            watch = Watch(self.config.report_ms / 1e3, self._shared.gap_s())
            try:
                async with aclosing(watch_report(self._channel, watch)) as reports:
                    async for report in reports:
                        self._heard_at = self._now()
                        self._take(self._heard_at, report)
            except MeshError as error:
                if error.code is Code.UNSUPPORTED:
                    self._is_polled = True  # until it is another process: an older node
                elif self.is_streaming:
                    asyncio.get_running_loop().call_later(random.uniform(0.0, _SPREAD_S), self._woken.set)
            self._heard_at = None

    def _take(self, now: float, report: NodeReport) -> None:
        if report.node != self.view.name:
            raise MeshError(Code.UNTRUSTED, f"{self.view.address} says that it is {report.node!r}.")
        self.last_report = report
        self._tell(now, report)

    def _tell(self, now: float, report: NodeReport) -> None:
        """What the configuration says about a target outranks its own word."""
        view = self.view
        said = {name: value for name in ("price", "quality") if (value := getattr(view, name)) is not None}
        if said:
            report = replace(report, versions=tuple(replace(version, **said) for version in report.versions))
        self._router.policy.on_report(now, view.name, report)

    # Questions -------------------------------------------------------------------------------------------------------

    async def _probe_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if self._is_due(self._now()):
                await self._probe()
                if not (self._failures or self._is_measured):
                    # The first answer took the making of the connection along: the second one measures the way.
                    await self._probe()
            # A target that does not answer is asked less often, up to four times the pause.
            patience = min(_PATIENCE_MAX, 1.0 + self._failures)
            pause_s = self.config.report_ms / 1e3 * random.uniform(1 - _JITTER, 1 + _JITTER) * patience
            self._woken.clear()
            timer = loop.call_later(pause_s, self._woken.set)
            try:
                await self._woken.wait()
            finally:
                timer.cancel()

    def _is_due(self, now: float) -> bool:
        """Whether to ask now: nothing comes by itself, the stream fell silent, or no reply has measured the way."""
        replies = self._router.statistics.answered(self.view.name)
        if replies != self._replies:
            self._replies = replies
            self._idle_since = now
        if self._heard_at is None or self._failures or not self._is_measured:
            return True
        if now - self._heard_at > _SILENT_INTERVALS * self.config.report_ms / 1e3:
            return True
        return now - max(self._idle_since, self._probed_at) >= self.config.idle_ms / 1e3

    async def _probe(self) -> None:
        # With a connection to make it takes longer, and holds its place until the handshake is over.
        timeout_s = self.config.timeout_ms / 1e3 * (_CONNECT_FACTOR if self._connecting else 1.0)
        try:
            async with self._shared.connects if self._connecting else nullcontext(), asyncio.timeout(2 * timeout_s):
                report, round_trip_s = await self._ask(self._now() + timeout_s)
            now = self._now()
            self._take(now, report)
        except (MeshError, TimeoutError) as error:
            self._failed(error)
            return
        if self._failures:
            _log.info("target_answers", target=self.view.name)
        self._failures = 0
        self._probed_at = now
        self._router.policy.on_probe(now, self.view.name, round_trip_s, connecting=self._connecting)
        self._is_measured = not self._connecting
        self._connecting = False
        if self._heard_at is None and not self._is_polled:
            self._connected.set()

    async def _ask(self, deadline: float) -> tuple[NodeReport, float]:
        """A report, and how long a small question takes."""
        if isinstance(self._node, ForeignNode):
            return await self._node.poll(deadline=deadline)
        started = self._now()
        report = await self._node.report(deadline=deadline)
        return report, self._now() - started

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._is_polled = self.view.kind == "oip"
        timed_out = isinstance(error, TimeoutError) or (isinstance(error, MeshError) and error.code is Code.DEADLINE)
        self._connecting = self._connecting or not timed_out
        # One slow answer is a busy node, not a lost one; a refused connection is.
        if not timed_out or self._failures >= self.config.failures_max:
            self._router.policy.on_probe(self._now(), self.view.name, None)
        if self._failures == 1:
            _log.warning("target_silent", target=self.view.name, address=self.view.address, error=str(error))
        if timed_out and self._failures % self.config.failures_max == 0:
            self._reconnect()

    # The connection --------------------------------------------------------------------------------------------------

    def _reconnect(self) -> None:
        """Give the connection up: a peer behind a cut link never says so, and what waits on it can be retried."""
        _log.warning("target_reconnects", target=self.view.name)
        old = self._node
        self._connecting = True
        self._channel, self._node = self._connect()
        self.attach()
        task = asyncio.get_running_loop().create_task(old.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _connect(self) -> tuple[Channel, RemoteNode]:
        view = self.view
        channel = self._shared.make(view)
        if view.kind == "oip":
            slots = view.slots or SLOTS_DEFAULT
            return channel, ForeignNode(channel, view.name, models=view.models, slots=slots)
        return channel, RemoteNode(channel, view.name)

    def _in_flight(self) -> int:
        return sum(target.own for target in self._router.policy.targets if target.name == self.view.name)
