"""The model host: every version that this node has in memory, behind one `InferenceHandler`.

It reads the store and never writes it. `refresh` makes it follow the pointers: new versions are loaded and warmed
beside the serving ones, the switch is one assignment, and what was replaced is unloaded once nobody uses it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from functools import partial
from pathlib import Path

from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.counts import VersionCounts
from nearcast.errors import Code, MeshError
from nearcast.handler import (
    Asker,
    InferRequest,
    InferResponse,
    ModelMetadata,
    RequestContext,
    Served,
)
from nearcast.load import AnswerLoad, NodeReport, Tier, VersionReport, write_answer_load
from nearcast.metrics import Registry
from nearcast.serving.asked import Asked
from nearcast.serving.cache import ResponseCache
from nearcast.serving.confidence import is_uncertain
from nearcast.serving.description import describe
from nearcast.serving.dispatch import failed
from nearcast.serving.engines import Timed
from nearcast.serving.limits import HostLimits
from nearcast.serving.memory_metrics import MemoryCollector
from nearcast.serving.metrics import HostCollector
from nearcast.serving.nv_metrics import NvCollector
from nearcast.serving.on_demand import OnDemand
from nearcast.serving.precedence import LoopPrecedence
from nearcast.serving.residency import Residency, unknown_model
from nearcast.serving.shadow import Shadow
from nearcast.serving.slots import Slot, VersionStatus
from nearcast.serving.version import HotVersion
from nearcast.store import Store
from nearcast.wire.response import TensorResponse

_LOG = logging.getLogger(__name__)
_TIMER_EARLY_S = 0.001
"""Event loops round their timers to milliseconds."""


class ModelHost:
    """All models of one node. An `InferenceHandler` and a `ModelDirectory`; lives on one event loop.

    Args:
        store: where the agent puts versions and pointers.
        node: this node's name, for answers and reports.
        tier: how near this node is to those who ask it.
        limits: every bound.
        registry: where the metrics appear; None = nowhere.
        role: what reports say; by default `cloud` on the cloud tier and `edge` elsewhere.
        tenant_keys: folder with the keys that open sealed versions; None = there are none.
        price: what reports say 1000 answers cost, in the operator's unit.
        clock: its monotonic time must be the loop's.
    """

    def __init__(
        self,
        store: Store,
        *,
        node: str,
        tier: Tier = "local",
        limits: HostLimits | None = None,
        registry: Registry | None = None,
        role: str = "",
        tenant_keys: Path | None = None,
        price: float = 0.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._node = node
        self._tier = tier
        self._role = role or ("cloud" if tier == "cloud" else "edge")
        self._limits = limits or HostLimits()
        self._price = price
        self._registry = registry
        self._clock = clock
        self._now = clock.monotonic
        self._precedence = LoopPrecedence(real_time=self._limits.real_time)
        self._residency = Residency(
            store, limits=self._limits, clock=clock, precedence=self._precedence, tenant_keys=tenant_keys
        )
        self._on_demand = OnDemand(self._residency, limits=self._limits, clock=clock)
        self._slots: Mapping[str, Slot] = self._residency.slots
        self._cache = ResponseCache(self._limits.cache_bytes_max, clock)
        self._in_flight = 0
        self._started = False
        self._closed = False
        self._arrived = 0.0
        self._shadow = Shadow(self._limits, self._quiet, self._now)
        self._collectors = (
            self._precedence,
            HostCollector(self._residency.statistics, self._residency.in_flight),
            MemoryCollector(self._residency),
            NvCollector(self._residency.statistics, self._residency.waiting),
        )
        if registry is not None:
            for collector in self._collectors:
                registry.register(collector)

    async def start(self) -> None:
        """Load every model of the store. A model that cannot be loaded is reported, not raised."""
        await self.refresh(None)
        self._residency.begin_serving()
        self._precedence.start()
        self._started = True

    async def refresh(self, model: str | None = None) -> None:
        """Follow the pointers again: of one model, or of all.

        The flip to versions that are hot already (a rollback, a promotion) is done before this waits for anything.
        Returns when what the pointer names is hot or has failed; see `status` for which.

        Raises:
            MeshError: for one model only: INTERNAL if its pointer is torn (it keeps serving what it had),
                MODEL_NOT_FOUND if the store does not know it.
        """
        if self._closed:
            raise MeshError(Code.UNAVAILABLE, "This node is shutting down.")
        if model is None:
            await self._residency.follow_all()
        else:
            await self._residency.follow(model)

    async def infer(self, request: InferRequest, context: RequestContext) -> InferResponse:
        arrived = self._now()
        slot = self._slots.get(request.model)
        if slot is None:
            raise self._unknown(request.model)
        version = slot.choose(request, context)
        if version is None:
            version = await self._on_demand.fetch(slot, context.version or request.version, context.deadline)
        asked = self._accept(Asked(slot, version, request, context, arrived, self._in_flight))
        try:
            asked.read(self._now)
            run = self._run(asked)
            timed = run if isinstance(run, tuple) else await run
        except (MeshError, asyncio.CancelledError) as error:
            self.fail(asked, error)
            raise
        except Exception as error:
            raise self._failure(asked, error) from error
        finally:
            self.leave(version)
        return self.end(asked, timed)

    def begin(self, request: InferRequest, context: RequestContext, asker: Asker) -> Asked | None:
        """As `infer`, where the model runs on the loop: at once, or with others by the end of the turn.

        It takes no coroutine, future or task. The asker keeps the deadline.

        Returns:
            What can be cancelled; None = `infer` must do it.

        Raises:
            MeshError: what the model raised.
        """
        arrived = self._now()
        slot = self._slots.get(request.model)
        if slot is None or (version := slot.choose(request, context)) is None or (turn := version.turn) is None:
            return None
        asked = Asked(slot, version, request, context, arrived, self._in_flight)
        try:
            asked.read(self._now)
        except Exception:  # noqa: BLE001
            # It is found again and counted.
            return None
        if not version.runs_inline(asked.size):
            return None
        if turn.arrive():
            asked.host, asked.asker = self, asker
            version.join(asked.inputs, asked.size, context.deadline, self._accept(asked))
            return asked
        # Nobody sees that it is in flight: the loop does nothing else meanwhile.
        self._arrived = version.used_at = arrived
        try:
            timed = version.run_now(asked.inputs, asked.size)
        except MeshError as error:
            self.fail(asked, error)
            raise
        except Exception as error:
            raise self._failure(asked, error) from error
        asker.answer(self.end(asked, timed))
        return asked

    def _accept(self, asked: Asked) -> Asked:
        self._arrived = asked.version.used_at = asked.arrived
        self._in_flight += 1
        asked.version.in_flight += 1
        return asked

    def leave(self, version: HotVersion) -> None:
        """One request less is in flight."""
        self._in_flight -= 1
        version.in_flight -= 1
        version.left()

    def fail(self, asked: Asked, error: BaseException) -> None:
        """Count a request that got no answer."""
        now = self._now()
        code = error.code if isinstance(error, MeshError) else _why_cancelled(now, asked.context)
        asked.version.statistics.fail(code, int((now - asked.arrived) * 1e6))

    def _failure(self, asked: Asked, error: Exception) -> MeshError:
        """Log and count what no model should raise, and say it so that nothing of it shows."""
        _LOG.error("%s failed", asked.version.title, exc_info=error)
        public = failed(asked.version.title)
        self.fail(asked, public)
        return public

    def end(self, asked: Asked, timed: Timed) -> InferResponse:
        """Count a request that is answered, and make its answer."""
        outputs, started, ended = timed
        version, arrived = asked.version, asked.arrived
        statistics = version.statistics
        if version.stateful:
            statistics.ran(1, started, ended)
        queue_us = int((started - arrived) * 1e6)
        compute_us = int((ended - started) * 1e6)
        statistics.answer(queue_us, compute_us)
        statistics.read_s += asked.read_at - arrived
        statistics.last = ended
        if asked.slot.pair is not None and arrived >= self._shadow.due:
            self._shadow.take(asked.slot.pair, version, asked.inputs, outputs)
        load = ""
        if ended - version.told_at >= self._limits.load_interval_s:
            version.told_at = ended
            load = self._load_of(version, ended)
        cascade = version.cascade
        escalate = cascade.larger if cascade is not None and is_uncertain(cascade, outputs) else ""
        if asked.names:
            outputs = {name: outputs[name] for name in asked.names}
        return TensorResponse(
            model=asked.request.model,
            version=version.wire_version,
            outputs=outputs,
            id=asked.request.id,
            served=Served(
                node=self._node,
                tier=self._tier,
                version=version.wire_version,
                queue_us=queue_us,
                compute_us=compute_us,
                in_flight=asked.in_flight,
                escalate=escalate,
                load=load,
            ),
        )

    def _run(self, asked: Asked) -> Timed | Awaitable[Timed]:
        """The way that suits the version and the inputs: remembered, in a sequence, on the loop or in a thread."""
        version, request, context = asked.version, asked.request, asked.context
        inputs, size = asked.inputs, asked.size
        if version.stateful:
            return version.sequences.run(request, context, inputs)
        if version.cache_salt and request.size_bytes <= self._limits.cache_request_bytes_max:
            run = partial(version.run, inputs, size, context, request.size_bytes)
            return self._cache.answer(version.cache_salt, inputs, context, version.statistics, run)
        if version.runs_inline(size):
            return version.run_inline(inputs, size, context.deadline)
        return version.submit(inputs, size, context, request.size_bytes)

    async def stream(
        self, requests: AsyncIterator[InferRequest], context: RequestContext
    ) -> AsyncIterator[InferResponse]:
        async for request in requests:
            yield await self.infer(request, context)

    async def metadata(self, model: str, version: str) -> ModelMetadata:
        slot = self._require_slot(model)
        return describe(slot.manifest(version), slot.hot, self._limits)

    async def is_ready(self, model: str = "", version: str = "") -> bool:
        if not model:
            return self._started and not self._closed
        slot = self._require_slot(model)
        found = slot.by_name.get(version) if version else slot.stable
        return not self._closed and (found is not None or slot.on_demand(version) is not None)

    def models(self) -> tuple[str, ...]:
        """Names of the models that this host knows, sorted."""
        return tuple(sorted(self._slots))

    def status(self, model: str) -> tuple[VersionStatus, ...]:
        """Every version of a model that is in use or in memory.

        Raises:
            MeshError: MODEL_NOT_FOUND, naming the models that exist.
        """
        return self._require_slot(model).status(self._residency.statistics)

    def counts(self, model: str = "", version: str = "") -> list[VersionCounts]:
        """What the versions have done, those too that are no longer in memory; "" = every one."""
        wall_offset_s = self._clock.wall() - self._now()
        out = []
        for (name, release), statistics in sorted(self._residency.statistics.items()):
            if model in ("", name) and version in ("", str(release)):
                slot = self._slots.get(name)
                hot = slot.hot.get(release) if slot else None
                held = hot.engine.memory_bytes if hot else 0
                out.append(statistics.counts(name, str(release), wall_offset_s=wall_offset_s, memory_bytes=held))
        return out

    def report(self) -> NodeReport:
        """What routers want to know about this node now. Cheap enough for several times a second."""
        now = self._now()
        versions = [each for slot in self._slots.values() for each in self._report_slot(slot, now)]
        return NodeReport(
            node=self._node,
            role=self._role,
            slots=self._limits.slots,
            in_flight=self._in_flight,
            draining=self._closed,
            versions=tuple(versions),
        )

    async def load(self, model: str) -> None:
        """Have a model's stable release in memory and keep it there until `unload`.

        Raises:
            MeshError: MODEL_NOT_FOUND; OVERLOADED if memory does not suffice; UNAVAILABLE if it cannot be loaded.
        """
        slot = self._require_slot(model)
        slot.pinned = True
        await self._residency.follow(model)
        if slot.stable is None:
            slot.pinned = model in self._limits.pinned
            raise slot.unavailable()

    async def unload(self, model: str) -> None:
        """Give a model's memory back once its requests are done; the next request or `load` brings it in again.

        Raises:
            MeshError: MODEL_NOT_FOUND.
        """
        slot = self._require_slot(model)
        slot.pinned = False
        self._residency.unload(slot)

    async def close(self) -> None:
        """Refuse new work, finish what is in flight within `drain_timeout_s`, unload everything."""
        if self._closed:
            return
        self._closed = True
        await self._shadow.close()
        await self._residency.close()
        self._precedence.stop()
        if self._registry is not None:
            for collector in self._collectors:
                self._registry.unregister(collector)

    def _load_of(self, version: HotVersion, now: float) -> str:
        """What an answer says now and then about this host."""
        p50_us, p95_us = version.service_us(now)
        load = AnswerLoad(
            utilization=self._in_flight / self._limits.slots,
            queue_us=version.queue_us(),
            service_p50_us=p50_us,
            service_p95_us=p95_us,
            batch_wait_us=version.batch_wait_us(),
        )
        return write_answer_load(load)

    def _quiet(self) -> bool:
        return not self._in_flight and self._now() - self._arrived >= self._limits.shadow_quiet_s

    def _report_slot(self, slot: Slot, now: float) -> Iterator[VersionReport]:
        for version in slot.hot.values():
            version.sequences.sweep(now)
            p50_us, p95_us = version.service_us(now)
            yield VersionReport(
                model=slot.name,
                version=version.wire_version,
                in_flight=version.in_flight,
                queue_us=version.queue_us(),
                service_p50_us=p50_us,
                service_p95_us=p95_us,
                stateful=version.manifest.stateful,
                quality=version.manifest.quality,
                batch_wait_us=version.batch_wait_us(),
                price=self._price,
                smaller=version.manifest.smaller or "",
            )
        for release, since in slot.loading.items():
            eta_ms = max(0.0, self._residency.load_s - (now - since)) * 1000
            yield VersionReport(model=slot.name, version=str(release), residency="loading", eta_ms=eta_ms)
        for release in slot.wanted():
            if release not in slot.hot and release not in slot.loading and release not in slot.failed:
                yield self._report_cold(slot, release)

    def _report_cold(self, slot: Slot, release: int) -> VersionReport:
        """A request may bring it in, then `eta_ms` is how long that takes; 0 = it is not to be had here."""
        manifest = slot.manifests.get(release)
        if release not in slot.cold or manifest is None:
            return VersionReport(model=slot.name, version=str(release), residency="cold")
        return VersionReport(
            model=slot.name,
            version=str(release),
            residency="cold",
            eta_ms=(slot.load_s or self._residency.load_s) * 1000,
            stateful=manifest.stateful,
            quality=manifest.quality,
            price=self._price,
            smaller=manifest.smaller or "",
        )

    def _require_slot(self, model: str) -> Slot:
        slot = self._slots.get(model)
        if slot is None:
            raise self._unknown(model)
        return slot

    def _unknown(self, model: str) -> MeshError:
        return unknown_model(model, self._slots)


def _why_cancelled(now: float, context: RequestContext) -> Code:
    """A transport's timer for the same deadline may ring before ours."""
    late = context.deadline is not None and now >= context.deadline - _TIMER_EARLY_S
    return Code.DEADLINE if late else Code.CANCELLED
