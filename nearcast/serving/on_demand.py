"""Versions that are on disk only: a request for one waits within its deadline, or hears when to come again."""

from __future__ import annotations

import asyncio

from nearcast.clock import Clock
from nearcast.errors import Code, MeshError
from nearcast.serving.limits import HostLimits
from nearcast.serving.memory import Key, Refuse
from nearcast.serving.residency import Residency
from nearcast.serving.slots import Slot
from nearcast.serving.version import HotVersion


class OnDemand:
    """Brings versions in for those who ask. Any number of requests share one load. Lives on the host's loop."""

    def __init__(self, residency: Residency, *, limits: HostLimits, clock: Clock) -> None:
        self._residency = residency
        self._limits = limits
        self._now = clock.monotonic
        self._loads: dict[Key, asyncio.Task[Refuse | None]] = {}
        self._waiting = 0

    async def fetch(self, slot: Slot, wanted: str, deadline: float | None) -> HotVersion:
        """The version that answers, once it is in memory. Until the caller holds a lease, its waiting is one.

        Args:
            slot: the model.
            wanted: release or semver; "" = stable.
            deadline: monotonic seconds; None = `load_wait_s_max` from now.

        Raises:
            MeshError: VERSION_MISMATCH if there is no such version here; UNAVAILABLE with a hint if it cannot be hot in
                time (the load goes on for who comes next); DEADLINE if time ran out all the same.
        """
        release = slot.on_demand(wanted)
        if release is None:
            raise slot.mismatch(wanted) if wanted else slot.unavailable()
        if self._waiting >= self._limits.load_waiters_max:
            raise MeshError(
                Code.UNAVAILABLE,
                "Too many requests wait for cold models on this node.",
                retry_after_ms=_to_ms(slot.load_s),
            )
        self._waiting += 1
        slot.waiting[release] = slot.waiting.get(release, 0) + 1
        try:
            return await self._fetch(slot, release, deadline)
        finally:
            self._waiting -= 1
            slot.waiting[release] -= 1
            if not slot.waiting[release]:
                del slot.waiting[release]

    async def _fetch(self, slot: Slot, release: int, deadline: float | None) -> HotVersion:
        until = self._now() + self._limits.load_wait_s_max if deadline is None else deadline
        while True:
            load = self._load(slot, release)
            need_s = slot.load_s or self._residency.load_s
            if self._now() + need_s > until:
                raise _not_yet(slot, release, need_s)
            done, _ = await asyncio.wait({load}, timeout=max(0.0, until - self._now()))
            if not done:
                raise MeshError(Code.DEADLINE, f"The deadline passed while model {slot.name} was loading.")
            refusal = load.result()
            if (version := slot.hot.get(release)) is not None:
                return version
            if refusal is None:
                raise slot.unavailable()
            if refusal.retry_after_s is None:
                raise MeshError(Code.UNAVAILABLE, f"Model {slot.name} does not fit into this node's memory.")
            if self._now() + refusal.retry_after_s + need_s > until:
                raise _not_yet(slot, release, refusal.retry_after_s + need_s)
            await asyncio.sleep(refusal.retry_after_s)

    def _load(self, slot: Slot, release: int) -> asyncio.Task[Refuse | None]:
        key = (slot.name, release)
        load = self._loads.get(key)
        if load is None:
            load = self._loads[key] = self._residency.spawn(self._residency.load(slot, release, "request"))
            load.add_done_callback(lambda _: self._loads.pop(key, None))
        return load


def _not_yet(slot: Slot, release: int, need_s: float) -> MeshError:
    return MeshError(
        Code.UNAVAILABLE,
        f"Model {slot.name} release {release} is not in memory and cannot be within the deadline; try again later.",
        retry_after_ms=_to_ms(need_s),
    )


def _to_ms(time_s: float) -> int:
    return max(1, int(time_s * 1000))
