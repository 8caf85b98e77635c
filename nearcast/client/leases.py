"""Where a client's requests may go, by leases of a router: look-aside, nothing of a request passes through it."""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec

from nearcast.client.limits import ClientLimits
from nearcast.client.nodes import Connect, Probe
from nearcast.errors import Code, MeshError
from nearcast.load import NodeReport, VersionReport
from nearcast.telemetry import get_logger
from nearcast.transport.lease import ask_lease
from nearcast.transport.remote import RemoteNode
from nearcast.transport.seam import Channel
from nearcast.wire.lease import Lease, LeaseQuestion, LeaseTarget
from router.router import Router

_log = get_logger(__name__)
_PASSING = frozenset({Code.UNAVAILABLE, Code.DEADLINE, Code.OVERLOADED, Code.INTERNAL, Code.CANCELLED})
"""Errors that say nothing about the lease held: it goes on. After any other one everything goes through the router."""


class _Held:
    """The lease of one model."""

    __slots__ = ("deadline_s", "failures", "first", "lease", "model", "priority", "size_bytes", "task", "used_at")

    def __init__(self, model: str, size_bytes: int, deadline_s: float | None, priority: int, now: float) -> None:
        self.model = model
        self.size_bytes = size_bytes
        self.deadline_s = deadline_s
        self.priority = priority
        self.used_at = now
        self.lease: Lease | None = None
        self.failures = 0
        self.first = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    @property
    def question(self) -> LeaseQuestion:
        held = self.lease
        return LeaseQuestion(
            model=self.model,
            size_bytes=self.size_bytes,
            deadline_ms=0 if self.deadline_s is None else max(1, int(self.deadline_s * 1e3)),
            priority=self.priority,
            lease_id="" if held is None else held.lease_id,
            etag="" if held is None else held.etag,
        )


class _Target:
    """One node that some lease names, and what each lease says of it."""

    __slots__ = ("address", "channel", "is_front", "is_warm", "models", "node", "probe")

    def __init__(self, address: str, channel: Channel, node: RemoteNode, probe: Probe, *, is_front: bool) -> None:
        self.address = address
        self.channel = channel
        self.node = node
        self.probe = probe
        self.is_front = is_front
        self.is_warm = False
        self.models: dict[str, tuple[Lease, LeaseTarget]] = {}

    def report(self) -> NodeReport:
        """What the leases say, in the form in which nodes speak to a policy."""
        _, some = next(iter(self.models.values()))
        return NodeReport(
            node=some.name,
            role="edge",
            slots=some.slots,
            in_flight=round(some.load),
            versions=tuple(_claim(model, *said) for model, said in self.models.items()),
        )


class LeasedNodes:
    """Asks a router, or a node, for leases, renews them in the background and attaches their targets.

    An expired lease goes on ordering calls, for its targets decide for themselves. What it cannot place, and everything
    while there is none, is for `front` to route.

    Args:
        address: who gives the leases.
        router: the client's own; its policy chooses among the targets.
        connect: makes channels.
        limits: bounds.
        now: monotonic seconds.
        is_secured: targets without TLS are left out; else those with it.
    """

    def __init__(
        self,
        address: str,
        router: Router,
        connect: Connect,
        limits: ClientLimits,
        now: Callable[[], float],
        *,
        is_secured: bool,
    ) -> None:
        self._address = address
        self._router = router
        self._config = router.policy.config
        self._connect = connect
        self._limits = limits
        self._now = now
        self._is_secured = is_secured
        self._channel = connect(address, "")
        self.front = RemoteNode(self._channel)
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._targets: dict[str, _Target] = {}
        self._watch: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()
        self.leases = 0

    @property
    def every(self) -> Sequence[RemoteNode]:
        return [self.front, *(target.node for target in self._targets.values())]

    def channel(self, name: str) -> Channel:
        target = self._targets.get(name)
        return self._channel if target is None else target.channel

    def start(self) -> None:
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._watch_forever())

    def knows(self, now: float, model: str) -> bool:
        held = self._held.get(model)
        if held is None:
            return False
        held.used_at = now
        if held.task is None:
            self._keep(held)
        return held.first.is_set()

    async def learn(self, model: str, size_bytes: int, deadline: float | None, priority: int) -> None:
        now = self._now()
        held = self._held.get(model)
        if held is None:
            deadline_s = None if deadline is None else deadline - now
            held = self._held[model] = _Held(model, size_bytes, deadline_s, priority, now)
            self._keep(held)
            if len(self._held) > self._limits.models_max:
                self._forget(min(self._held.values(), key=lambda other: other.used_at))
        # Whoever cannot wait for the lease goes through the router.
        patience_s = self._limits.lease_timeout_s if deadline is None else max(0.0, (deadline - now) / 2.0)
        try:
            async with asyncio.timeout(min(patience_s, self._limits.lease_timeout_s)):
                await held.first.wait()
        except TimeoutError:
            return

    async def close(self) -> None:
        tasks = [held.task for held in self._held.values() if held.task is not None]
        if self._watch is not None:
            tasks.append(self._watch)
        for task in (*tasks, *self._closing):
            task.cancel()
        await asyncio.gather(*tasks, *self._closing, return_exceptions=True)
        nodes = [target.node for target in self._targets.values() if not target.is_front]
        await asyncio.gather(self.front.close(), *(node.close() for node in nodes))

    # Leases ----------------------------------------------------------------------------------------------------------

    def _keep(self, held: _Held) -> None:
        held.task = asyncio.get_running_loop().create_task(self._renew(held))

    def _forget(self, held: _Held) -> None:
        del self._held[held.model]
        if held.task is not None:
            held.task.cancel()
        self._take(held, None)

    async def _renew(self, held: _Held) -> None:
        """Ask, sleep, ask again, until the model is used no more."""
        limits = self._limits
        while True:
            pause_s = await self._ask(held)
            held.first.set()
            if self._now() - held.used_at > limits.lease_idle_s:
                held.task = None
                return
            await asyncio.sleep(pause_s)

    async def _ask(self, held: _Held) -> float:
        """One question; seconds until the next one."""
        limits, began = self._limits, self._now()
        try:
            async with asyncio.timeout(limits.lease_timeout_s):
                lease = await ask_lease(self._channel, held.question, deadline=began + limits.lease_timeout_s)
            if lease.unchanged and held.lease is None:
                raise MeshError(Code.INTERNAL, "The router renews a lease that we do not hold.")
        except (MeshError, TimeoutError) as error:
            return self._failed(held, error)
        held.failures = 0
        self.leases += 1
        if lease.unchanged:
            for target in held.lease.targets if held.lease is not None else ():
                self._tell(target.name)
        else:
            self._take(held, lease)
        asked_s = self._now() - began
        return max(0.0, lease.refresh_after_ms / 1e3 * random.uniform(0.9, 1.1) - asked_s)

    def _failed(self, held: _Held, error: Exception) -> float:
        limits = self._limits
        held.failures += 1
        if held.failures == 1:
            _log.warning("lease_refused", router=self._address, model=held.model, error=str(error))
        pause_s = min(limits.lease_retry_s_max, limits.lease_retry_s * 2.0 ** min(held.failures - 1, 16))
        if isinstance(error, MeshError):
            if error.code not in _PASSING:
                self._take(held, None)
                pause_s = limits.lease_retry_s_max
            elif error.retry_after_ms is not None:
                pause_s = max(pause_s, min(limits.lease_retry_s_max, error.retry_after_ms / 1e3))
        return pause_s * random.uniform(0.5, 1.0)

    def _take(self, held: _Held, lease: Lease | None) -> None:
        former = {} if held.lease is None else {target.name: target for target in held.lease.targets}
        held.lease = lease
        if lease is not None:
            self._spend_less(lease)
        targets = () if lease is None else lease.targets
        for name in former.keys() - {target.name for target in targets}:
            known = self._targets.get(name)
            if known is not None and known.models.pop(held.model, None) is not None:
                self._tell(name)
        for number, target in enumerate(targets):
            known = self._find(target)
            if lease is not None and known is not None:
                known.is_warm = known.is_warm or number < self._limits.warm_max
                known.models[held.model] = (lease, target)
                self._tell(target.name)

    def _spend_less(self, lease: Lease) -> None:
        """No larger budgets than the lease grants, and none than we were configured with."""
        own, policy = self._config, self._router.policy
        granted = msgspec.structs.replace(
            own,
            hedge_share=min(own.hedge_share, lease.hedge_share),
            hedge_burst=min(own.hedge_burst, lease.hedge_burst),
            retry_share=min(own.retry_share, lease.retry_share),
            retry_burst=min(own.retry_burst, lease.retry_burst),
            retry_per_s=min(own.retry_per_s, lease.retry_per_s),
            attempts_max=min(own.attempts_max, lease.attempts_max),
        )
        if granted != policy.config:
            policy.reconfigure(self._now(), granted)

    # Targets ---------------------------------------------------------------------------------------------------------

    def _find(self, target: LeaseTarget) -> _Target | None:
        """The node that a lease names, attached; None if we must not or cannot call it."""
        address = target.address or self._address
        is_front = address == self._address
        if target.tls != self._is_secured and not is_front:
            return None
        known = self._targets.get(target.name)
        if known is not None and known.address == address:
            return known
        if known is not None:
            self._drop(target.name)
        if len(self._targets) >= self._limits.targets_max:
            return None
        channel = self._channel if is_front else self._connect(address, target.server_name if target.tls else "")
        node = RemoteNode(channel, target.name)
        if not self._router.attach(target.name, node, "cloud" if target.tier == "cloud" else "peer", target.domain):
            return None
        probe = Probe(target.name, node, self._router, self._limits, self._now)
        self._targets[target.name] = known = _Target(address, channel, node, probe, is_front=is_front)
        self._changed.set()
        return known

    def _tell(self, name: str) -> None:
        """Let the policy hear again what the leases say of a target; drop one that no lease names any more."""
        known = self._targets.get(name)
        if known is None:
            return
        if known.models:
            self._router.policy.on_report(self._now(), name, known.report())
        else:
            self._drop(name)

    def _drop(self, name: str) -> None:
        target = self._targets.pop(name)
        self._router.detach(name)
        if not target.is_front:
            task = asyncio.get_running_loop().create_task(self._drain(name, target.node))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _drain(self, name: str, node: RemoteNode) -> None:
        """Close a connection once its last calls have ended."""
        ends_at = self._now() + self._limits.drain_s
        try:
            while self._now() < ends_at and self._in_flight(name):  # noqa: ASYNC110 - the policy is pure and wakes nobody
                await asyncio.sleep(0.05)
        finally:
            await node.close()

    def _in_flight(self, name: str) -> int:
        return sum(target.own for target in self._router.policy.targets if target.name == name)

    async def _watch_forever(self) -> None:
        """Probe who was not measured yet and who is lost; whoever answers requests needs no probes."""
        while True:
            self._changed.clear()
            lost = {target.name for target in self._router.policy.targets if target.breaker.state != "closed"}
            asked = [
                target.probe
                for name, target in self._targets.items()
                if name in lost or (target.is_warm and not target.probe.is_measured)
            ]
            await asyncio.gather(*(probe.ask() for probe in asked))
            try:
                async with asyncio.timeout(self._limits.probe_s * random.uniform(0.75, 1.25)):
                    await self._changed.wait()
            except TimeoutError:
                continue


def _claim(model: str, lease: Lease, target: LeaseTarget) -> VersionReport:
    """What a lease says of a target, without the way there: that is for us to measure."""
    transfer_ms = lease.size_bytes / target.bytes_per_ms if target.bytes_per_ms else 0.0
    service_ms = max(0.0, target.t50_ms - target.rtt_ms - transfer_ms)
    return VersionReport(
        model=model,
        version="",
        service_p50_us=service_ms * 1e3,
        service_p95_us=(service_ms + target.t95_ms - target.t50_ms) * 1e3,
        stateful="hidden" if lease.stateful else "none",
        quality=target.quality,
        price=target.price,
    )
