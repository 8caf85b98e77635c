"""Which versions are in memory: load, flip, keep a fallback warm, drain, unload. Follows the store's pointers.

`memory` decides who may come and who must go; here its instructions are carried out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from nearcast.clock import Clock
from nearcast.errors import Code, MeshError
from nearcast.serving.engines import LoadedModel, estimate_memory_bytes
from nearcast.serving.heap import share_arena, trim_heap, trim_heap_if_large
from nearcast.serving.limits import CORES, HostLimits
from nearcast.serving.loading import Loaded, load_version
from nearcast.serving.memory import Alarm, Evict, Held, Key, Memory, Reason, Refuse
from nearcast.serving.precedence import LoopPrecedence, give_way_to_loop, yield_to_serving
from nearcast.serving.profile import Setting
from nearcast.serving.slots import Slot
from nearcast.serving.statistics import Statistics
from nearcast.serving.tuner import Tuner
from nearcast.serving.version import HotVersion
from nearcast.serving.workers import Workers
from nearcast.store import Manifest, Pointer, Store, is_model_name

_LOG = logging.getLogger(__name__)
_LOAD_GUESS_S = 0.2
T = TypeVar("T")


class Residency:
    """The versions of one host. Lives on one event loop.

    Attributes:
        slots: by model name; readers may hold on to the mapping.
        statistics: by model and release; they outlive an unloaded version, up to `versions_max`.
        load_s: how long a load takes, from the loads so far.
        memory: who came and went, and how often.
    """

    def __init__(
        self,
        store: Store,
        *,
        limits: HostLimits,
        clock: Clock,
        precedence: LoopPrecedence,
        tenant_keys: Path | None = None,
    ) -> None:
        self._store = store
        self._precedence = precedence
        self._tenant_keys = tenant_keys
        self._limits = limits
        self._clock = clock
        self.slots: dict[str, Slot] = {}
        self.statistics: dict[tuple[str, int], Statistics] = {}
        self.load_s = _LOAD_GUESS_S
        self.memory = Memory(
            bytes_max=limits.memory_bytes_max, protect_s=limits.memory_protect_s, reloads_max=limits.reloads_max
        )
        share_arena()
        self._workers = Workers(limits.slots, "nearcast-run", give_way_to_loop)
        self._loader = _make_pool(limits.loads_concurrent_max)
        self._starter: ThreadPoolExecutor | None = _make_pool(min(limits.loads_at_start_max, CORES))
        self._tasks: set[asyncio.Task[Any]] = set()
        self._granted: dict[Key, int] = {}
        self._default = Setting(threads=limits.threads, rows_max=limits.batch_rows_max)
        self._tuner = Tuner(store, concurrency=limits.slots, tenant_keys=tenant_keys)
        self._closed = False

    def in_flight(self) -> dict[tuple[str, int], int]:
        """Requests inside of each hot version."""
        return {(s.name, release): v.in_flight for s in self.slots.values() for release, v in s.hot.items()}

    def waiting(self) -> dict[tuple[str, int], int]:
        """Requests that wait for the engine of each hot version."""
        return {(s.name, release): v.waiting for s in self.slots.values() for release, v in s.hot.items()}

    def held_bytes(self) -> int:
        """Estimate of what all versions take now."""
        return sum(each.size_bytes for each in self._held())

    async def follow_all(self) -> None:
        """Follow every pointer; what is wrong with one model is logged and leaves the others alone."""
        names = sorted({*self._store.models(), *self.slots})
        # Pinned models come first: what no longer fits stays on disk until a request asks for it.
        names.sort(key=lambda name: name not in self._limits.pinned)
        results = await asyncio.gather(*(self.follow(name, "start") for name in names), return_exceptions=True)
        for name, result in zip(names, results, strict=True):
            if isinstance(result, MeshError):
                if result.code is not Code.MODEL_NOT_FOUND:
                    _LOG.error("model %s: %s", name, result.message)
            elif result is not None:
                raise result
        await self._run_in_loader(trim_heap)

    def begin_serving(self) -> None:
        """From now on others are answered while versions load."""
        starter, self._starter = self._starter, None
        if starter is not None:
            starter.shutdown(wait=False)

    async def follow(self, model: str, reason: Reason = "deploy") -> None:
        """Follow one pointer.

        Raises:
            MeshError: MODEL_NOT_FOUND if there is none, INTERNAL if it is torn; what serves then goes on serving.
        """
        slot = self._point(model)
        if slot is not None:
            # Shielded: a caller that goes away must not leave a version half loaded.
            await asyncio.shield(self.spawn(self._load_wanted(slot, reason)))

    async def load(self, slot: Slot, release: int, reason: Reason) -> Refuse | None:
        """Bring one version in, however long that takes; None once it is hot or has failed."""
        async with slot.turn:
            if self._closed or release in slot.hot or release not in slot.cold:
                return None
            slot.failed.pop(release, None)
            refusal = await self._load(slot, release, reason)
            slot.route()
            return refusal

    def unload(self, slot: Slot) -> None:
        """Take every version of a model out of memory; requests inside are finished first."""
        for version in list(slot.hot.values()):
            self._evict(slot, version)

    async def close(self) -> None:
        """Unload everything, after what is in flight or `drain_timeout_s`."""
        self._closed = True
        self.begin_serving()
        self._tuner.close()
        for slot in self.slots.values():
            slot.stable = None
            slot.by_name = {}
            for version in list(slot.hot.values()):
                self._retire(slot, version, keep_sequences=False)
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._workers.close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run in the background; `close` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _point(self, model: str) -> Slot | None:
        """Read the pointer and flip to what is hot already; None if there is nothing to do."""
        slot = self.slots.get(model)
        try:
            pointer = self._store.pointer(model) if is_model_name(model) else None
        except MeshError as error:
            if slot is not None:
                slot.problem = error.message
            raise
        if pointer is None:
            if slot is None:
                raise unknown_model(model, self.slots)
            # The file vanished: no reason to stop serving. Deactivating a model is a pointer without `stable`.
            slot.problem = f"The pointer of model {model} is gone; it keeps serving what it had."
            return None
        if slot is None:
            if pointer == Pointer() and not self._store.releases(model):
                raise unknown_model(model, self.slots)
            slot = self.slots[model] = Slot(model, pinned=model in self._limits.pinned)
        slot.problem = ""
        slot.pointer = pointer
        slot.failed = {}
        slot.route()
        return slot

    async def _read_manifests(self, slot: Slot) -> None:
        """Off the loop: one takes half a millisecond."""
        releases = {*slot.wanted(), *slot.hot}
        slot.manifests = {release: known for release, known in slot.manifests.items() if release in releases}
        for release in releases - slot.manifests.keys():
            try:
                slot.manifests[release] = await self._run_in_loader(self._store.manifest, slot.name, release)
            except MeshError as error:
                _LOG.info("model %s release %d: %s", slot.name, release, error.message)

    async def _load_wanted(self, slot: Slot, reason: Reason) -> None:
        async with slot.turn:
            tried: set[int] = set()
            await self._read_manifests(slot)
            while not self._closed and (release := self._next(slot, tried)) is not None:
                tried.add(release)
                is_fallback = release not in (slot.pointer.stable, slot.pointer.candidate)
                await self._load(slot, release, "fallback" if is_fallback else reason)
                slot.route()
            for version in slot.unused():
                self._retire(slot, version)
            slot.cold.intersection_update(slot.wanted())

    def _next(self, slot: Slot, tried: set[int]) -> int | None:
        """The most important release that is not tried yet; the pointer may have changed meanwhile."""
        done = {*tried, *slot.hot, *slot.failed}
        return next((release for release in slot.wanted() if release not in done), None)

    async def _load(self, slot: Slot, release: int, reason: Reason) -> Refuse | None:
        now = slot.loading[release] = self._clock.monotonic()
        try:
            refusal = await self._make_room(slot, release, now, reason)
            if refusal is not None:
                slot.cold.add(release)
                return refusal
            self._granted[slot.name, release] = self._need_bytes(slot, release)
            load = partial(load_version, self._store, slot.name, release, self._default)
            loaded = await self._lead_while(
                self._starter or self._loader, load, self._tuner.profiles, self._tenant_keys
            )
        except MeshError as error:
            slot.failed[release] = error.message
            # What found no room may find some later; what is broken stays so until the pointer is followed again.
            (slot.cold.add if error.code is Code.OVERLOADED else slot.cold.discard)(release)
            _LOG.error("model %s release %d cannot be served: %s", slot.name, release, error.message)
            return None
        except Exception as error:  # noqa: BLE001 - whatever a file makes an engine raise, others go on serving
            slot.failed[release] = f"Loading failed: {type(error).__name__}; the node's log says more."
            slot.cold.discard(release)
            _LOG.exception("model %s release %d cannot be served", slot.name, release)
            return None
        finally:
            del slot.loading[release]
            self._granted.pop((slot.name, release), None)
        self._admit(slot, loaded)
        return None

    def _admit(self, slot: Slot, loaded: Loaded) -> None:
        release = loaded.manifest.release
        if self._closed:
            loaded.engine.close()
            return
        self.load_s += 0.3 * (loaded.load_s - self.load_s)
        slot.load_s = loaded.load_s
        slot.cold.discard(release)
        slot.manifests[release] = loaded.manifest
        slot.hot[release] = HotVersion(
            loaded,
            statistics=self._remember(slot.name, release),
            limits=self._limits,
            workers=self._workers,
            clock=self._clock,
        )
        slot.since[release] = slot.hot[release].used_at = self._clock.monotonic()
        _LOG.info(
            "model %s release %d is hot after %.0f ms, p50 %.0f us, %s",
            slot.name,
            release,
            loaded.load_s * 1000,
            loaded.warm_up.p50_us,
            "inline" if slot.hot[release].inline else "in threads",
        )
        if self._limits.tune:
            self.spawn(self._tune(slot, slot.hot[release]))

    async def _tune(self, slot: Slot, version: HotVersion) -> None:
        """Measure a version that nobody has measured here, and load it anew if it should run in another way."""
        setting = await self._tuner.measure(version.manifest)
        if setting is None or setting == version.setting:
            return
        async with slot.turn:
            if self._closed or slot.hot.get(version.release) is not version:
                return
            # A fallback's claim: it sends nobody away. Until the new engine is there, the old one serves.
            await self._load(slot, version.release, "fallback")
            slot.cold.discard(version.release)
            if slot.hot[version.release] is not version:
                slot.route()
                self._let_go(slot, version, keep_sequences=True)

    def _remember(self, model: str, release: int) -> Statistics:
        statistics = self.statistics.setdefault((model, release), Statistics())
        if len(self.statistics) > self._limits.versions_max:
            hot = self.in_flight()
            oldest = next((key for key in self.statistics if key not in hot and key != (model, release)), None)
            if oldest is not None:
                del self.statistics[oldest]
        return statistics

    def _held(self) -> Iterator[Held]:
        """What takes memory now. A version that drains still takes it, one that loads does already.

        What could not come back, because its files are gone, stays as if it were pinned.
        """
        for slot in self.slots.values():
            for release, version in slot.hot.items():
                yield Held(
                    key=(slot.name, release),
                    size_bytes=version.engine.memory_bytes,
                    used_at=version.used_at,
                    since=slot.since[release],
                    leases=version.in_flight + len(version.sequences) + slot.waiting.get(release, 0),
                    pinned=slot.needs(version) and (slot.pinned or not self._store.folder(slot.name, release).is_dir()),
                    fallback=not slot.needs(version),
                )
            for version in slot.draining:
                yield _busy((slot.name, version.release), version.engine.memory_bytes)
        for key, size_bytes in self._granted.items():
            yield _busy(key, size_bytes)

    def _need_bytes(self, slot: Slot, release: int) -> int:
        manifest: Manifest | None = slot.manifests.get(release)
        return 0 if manifest is None else estimate_memory_bytes(manifest)

    async def _make_room(self, slot: Slot, release: int, now: float, reason: Reason) -> Refuse | None:
        """Send away what `memory` says. A deployment waits a while for what is in use.

        Raises:
            MeshError: OVERLOADED if a deployed release does not fit.
        """
        until = now + self._limits.drain_timeout_s
        while True:
            for instruction in self.memory.demand(
                now, (slot.name, release), self._need_bytes(slot, release), tuple(self._held()), reason
            ):
                match instruction:
                    case Evict((model, gone)):
                        other = self.slots[model]
                        self._evict(other, other.hot[gone])
                    case Alarm(reloads):
                        _LOG.warning("%d models came back within a minute: too little memory for them all", reloads)
                    case Refuse(_, obstacle, retry_after_s) as refusal:
                        if reason in ("deploy", "start") and obstacle == "too_large":
                            raise self._short_of_memory(slot, release)
                        if reason != "deploy" or retry_after_s is None:
                            return refusal
                        if now + retry_after_s > until:
                            raise self._short_of_memory(slot, release)
                        await asyncio.sleep(retry_after_s)
                    case _:
                        return None
            now = self._clock.monotonic()

    def _short_of_memory(self, slot: Slot, release: int) -> MeshError:
        return MeshError(
            Code.OVERLOADED,
            f"About {self._need_bytes(slot, release) >> 20} MiB more would exceed the "
            f"{self._limits.memory_bytes_max >> 20} MiB that models may use on this node.",
        )

    def _evict(self, slot: Slot, version: HotVersion) -> None:
        _LOG.info("%s leaves the memory", version.title)
        if slot.stable is version:
            slot.stable = None
        slot.cold.add(version.release)
        self._retire(slot, version)

    def _retire(self, slot: Slot, version: HotVersion, *, keep_sequences: bool = True) -> None:
        """Take a version out of service; it goes once its requests, and for a while its sequences, are done."""
        del slot.hot[version.release]
        slot.since.pop(version.release, None)
        slot.route()
        self._let_go(slot, version, keep_sequences=keep_sequences)

    def _let_go(self, slot: Slot, version: HotVersion, *, keep_sequences: bool) -> None:
        drained = version.drained(keep_sequences=keep_sequences)
        if drained.done():
            version.close()
            self.spawn(self._free(version.engine))
            return
        slot.draining.add(version)
        self.spawn(self._drain(slot, version, drained))

    async def _drain(self, slot: Slot, version: HotVersion, drained: asyncio.Future[None]) -> None:
        done, _ = await asyncio.wait([drained], timeout=self._limits.drain_timeout_s)
        if not done:
            _LOG.warning("%s was still in use after %.0f s", version.title, self._limits.drain_timeout_s)
        slot.draining.discard(version)
        version.close()
        await self._free(version.engine)

    async def _free(self, engine: LoadedModel) -> None:
        """Give the memory back to the system. Off the loop: weights and heap are large. Before the next load begins."""
        await self._lead_while(self._loader, _free, engine)

    async def _run_in_loader(self, work: Callable[..., T], *arguments: Any) -> T:
        # One thread: what is read first is let in first, pinned models before all others.
        return await asyncio.get_running_loop().run_in_executor(self._loader, work, *arguments)

    async def _lead_while(self, pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
        """For what takes the core for long; the loop goes before it meanwhile."""
        future = pool.submit(work, *arguments)
        self._precedence.lead(future)
        return await asyncio.wrap_future(future)


def unknown_model(model: str, known: Iterable[str]) -> MeshError:
    """The error for a model that is not on this node, naming those that are."""
    names = ", ".join(sorted(known)[:20]) or "no models yet"
    return MeshError(Code.MODEL_NOT_FOUND, f"Model {model[:64]!r} is not on this node; it has: {names}.")


def _busy(key: Key, size_bytes: int) -> Held:
    return Held(key=key, size_bytes=size_bytes, used_at=0.0, since=0.0, leases=1)


def _make_pool(loads_max: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(loads_max, "nearcast-load", initializer=yield_to_serving)


def _free(engine: LoadedModel) -> None:
    engine.close()
    trim_heap_if_large()
