"""Which versions are in memory: load, flip, keep a fallback warm, drain, unload. Follows the store's pointers."""

from __future__ import annotations

import asyncio
import ctypes
import logging
from collections.abc import Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from nearcast.clock import Clock
from nearcast.errors import Code, MeshError
from nearcast.serving.engines import estimate_memory_bytes
from nearcast.serving.limits import HostLimits
from nearcast.serving.loading import Loaded, load_version
from nearcast.serving.slots import Slot
from nearcast.serving.statistics import Statistics
from nearcast.serving.version import HotVersion
from nearcast.store import Pointer, Store, is_model_name

_LOG = logging.getLogger(__name__)
_LOAD_GUESS_S = 0.2


class Residency:
    """The versions of one host. Lives on one event loop.

    Attributes:
        slots: by model name; readers may hold on to the mapping.
        statistics: by model and release; they outlive an unloaded version, up to `versions_max`.
        load_s: how long a load takes, from the loads so far.
    """

    def __init__(self, store: Store, *, limits: HostLimits, clock: Clock, tenant_keys: Path | None = None) -> None:
        self._store = store
        self._tenant_keys = tenant_keys
        self._limits = limits
        self._clock = clock
        self.slots: dict[str, Slot] = {}
        self.statistics: dict[tuple[str, int], Statistics] = {}
        self.load_s = _LOAD_GUESS_S
        self._executor = ThreadPoolExecutor(limits.slots, "nearcast-run")
        self._loader = ThreadPoolExecutor(limits.loads_concurrent_max, "nearcast-load")
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def in_flight(self) -> dict[tuple[str, int], int]:
        """Requests inside of each hot version."""
        return {(s.name, release): v.in_flight for s in self.slots.values() for release, v in s.hot.items()}

    async def follow_all(self) -> None:
        """Follow every pointer; what is wrong with one model is logged and leaves the others alone."""
        names = sorted({*self._store.models(), *self.slots})
        results = await asyncio.gather(*(self.follow(name) for name in names), return_exceptions=True)
        for name, result in zip(names, results, strict=True):
            if isinstance(result, MeshError):
                if result.code is not Code.MODEL_NOT_FOUND:
                    _LOG.error("model %s: %s", name, result.message)
            elif result is not None:
                raise result

    async def follow(self, model: str) -> None:
        """Follow one pointer.

        Raises:
            MeshError: MODEL_NOT_FOUND if there is none, INTERNAL if it is torn; what serves then goes on serving.
        """
        slot = self._point(model)
        if slot is not None:
            # Shielded: a caller that goes away must not leave a version half loaded.
            await asyncio.shield(self._spawn(self._load_wanted(slot)))

    async def close(self) -> None:
        """Unload everything, after what is in flight or `drain_timeout_s`."""
        self._closed = True
        for slot in self.slots.values():
            slot.stable = None
            slot.by_name = {}
            for version in list(slot.hot.values()):
                self._retire(slot, version, keep_sequences=False)
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._loader.shutdown(wait=False, cancel_futures=True)

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
            slot = self.slots[model] = Slot(model)
        slot.problem = ""
        slot.pointer = pointer
        slot.failed = {}
        slot.route()
        return slot

    async def _load_wanted(self, slot: Slot) -> None:
        async with slot.turn:
            while not self._closed and (release := self._next(slot)) is not None:
                await self._load(slot, release)
                slot.route()
            for version in slot.unused():
                self._retire(slot, version)

    def _next(self, slot: Slot) -> int | None:
        """The most important release that is neither hot nor hopeless; the pointer may have changed meanwhile."""
        for release in slot.wanted():
            if release in slot.hot or release in slot.failed:
                continue
            is_fallback = release not in (slot.pointer.stable, slot.pointer.candidate)
            if is_fallback and not self._fits(self._need_bytes(slot.name, release)):
                continue
            return release
        return None

    async def _load(self, slot: Slot, release: int) -> None:
        slot.loading[release] = self._clock.monotonic()
        try:
            self._make_room(slot, release)
            loaded = await asyncio.get_running_loop().run_in_executor(
                self._loader, load_version, self._store, slot.name, release, self._limits.threads, self._tenant_keys
            )
        except MeshError as error:
            slot.failed[release] = error.message
            _LOG.error("model %s release %d cannot be served: %s", slot.name, release, error.message)
            return
        except Exception as error:  # noqa: BLE001 - whatever a file makes an engine raise, others go on serving
            slot.failed[release] = f"Loading failed: {type(error).__name__}; the node's log says more."
            _LOG.exception("model %s release %d cannot be served", slot.name, release)
            return
        finally:
            del slot.loading[release]
        self._admit(slot, loaded)

    def _admit(self, slot: Slot, loaded: Loaded) -> None:
        release = loaded.manifest.release
        if self._closed:
            loaded.engine.close()
            return
        self.load_s += 0.3 * (loaded.load_s - self.load_s)
        slot.hot[release] = HotVersion(
            loaded,
            statistics=self._remember(slot.name, release),
            limits=self._limits,
            executor=self._executor,
            clock=self._clock,
        )
        _LOG.info(
            "model %s release %d is hot after %.0f ms, p50 %.0f us, %s",
            slot.name,
            release,
            loaded.load_s * 1000,
            loaded.warm_up.p50_us,
            "inline" if slot.hot[release].inline else "in threads",
        )

    def _remember(self, model: str, release: int) -> Statistics:
        statistics = self.statistics.setdefault((model, release), Statistics())
        if len(self.statistics) > self._limits.versions_max:
            hot = self.in_flight()
            oldest = next((key for key in self.statistics if key not in hot and key != (model, release)), None)
            if oldest is not None:
                del self.statistics[oldest]
        return statistics

    def _need_bytes(self, model: str, release: int) -> int:
        try:
            return estimate_memory_bytes(self._store.manifest(model, release))
        except MeshError:
            return 0

    def _fits(self, need_bytes: int) -> bool:
        used = sum(v.engine.memory_bytes for slot in self.slots.values() for v in (*slot.hot.values(), *slot.draining))
        return used + need_bytes <= self._limits.memory_bytes_max

    def _make_room(self, slot: Slot, release: int) -> None:
        """Give up fallbacks of any model until the release fits.

        Raises:
            MeshError: OVERLOADED if it does not fit all the same.
        """
        need_bytes = self._need_bytes(slot.name, release)
        for other in self.slots.values():
            for version in [v for v in other.hot.values() if not other.needs(v)]:
                if self._fits(need_bytes):
                    return
                self._retire(other, version)
        if not self._fits(need_bytes):
            raise MeshError(
                Code.OVERLOADED,
                f"About {need_bytes >> 20} MiB more would exceed the {self._limits.memory_bytes_max >> 20} MiB "
                "that models may use on this node.",
            )

    def _retire(self, slot: Slot, version: HotVersion, *, keep_sequences: bool = True) -> None:
        """Take a version out of service; it goes once its requests, and for a while its sequences, are done."""
        del slot.hot[version.release]
        slot.route()
        drained = version.drained(keep_sequences=keep_sequences)
        if drained.done():
            version.close()
            self._spawn(self._trim())
            return
        slot.draining.add(version)
        self._spawn(self._drain(slot, version, drained))

    async def _drain(self, slot: Slot, version: HotVersion, drained: asyncio.Future[None]) -> None:
        done, _ = await asyncio.wait([drained], timeout=self._limits.drain_timeout_s)
        if not done:
            _LOG.warning("%s was still in use after %.0f s", version.title, self._limits.drain_timeout_s)
        slot.draining.discard(version)
        version.close()
        await self._trim()

    async def _trim(self) -> None:
        """Give freed memory back to the system; off the loop, because it walks the whole heap."""
        await asyncio.get_running_loop().run_in_executor(self._loader, _trim_heap)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def unknown_model(model: str, known: Iterable[str]) -> MeshError:
    """The error for a model that is not on this node, naming those that are."""
    names = ", ".join(sorted(known)[:20]) or "no models yet"
    return MeshError(Code.MODEL_NOT_FOUND, f"Model {model[:64]!r} is not on this node; it has: {names}.")


def _trim_heap() -> None:
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    """The C library's `malloc_trim`; None where it has none (musl)."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
