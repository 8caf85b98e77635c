"""What gRPC and REST answer alike: inference with its bookkeeping, readiness, the index of models."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import msgspec

from nearcast import __version__
from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.counts import VersionCounts
from nearcast.errors import Code, MeshError
from nearcast.handler import (
    Asker,
    Counting,
    InferenceHandler,
    InferRequest,
    InferResponse,
    ModelDirectory,
    ModelMetadata,
    ModelRepository,
    RequestContext,
)
from nearcast.load import NodeReport
from nearcast.transport.peer import is_operator, peer_uid, require_operator
from nearcast.transport.seam import Call, Responder, Taken
from nearcast.transport.shared_memory import Regions
from nearcast.transport.statistics import FramesLetGo, Statistics
from nearcast.wire.response import TensorResponse

Report: TypeAlias = Callable[[], NodeReport]
State: TypeAlias = Literal["READY", "LOADING", "UNAVAILABLE"]
DESCRIBED_MAX = 64
"""Model versions whose description is remembered."""
_STATES: dict[str, State] = {"hot": "READY", "loading": "LOADING", "cold": "UNAVAILABLE"}


@runtime_checkable
class Reporting(Protocol):
    """A directory that can list what it holds, such as a model host."""

    def report(self) -> NodeReport:
        """What the node says about itself now."""
        ...


@runtime_checkable
class PassingHandler(Protocol):
    """A handler that can take a call over and answer it later, such as a router without models of its own."""

    @property
    def passes(self) -> bool:
        """Whether it ever does."""
        ...

    def pass_on(
        self, request: InferRequest, context: RequestContext, responder: Responder, counts: Statistics | None
    ) -> Taken | None:
        """Take a call over; None = `infer` answers it.

        Args:
            request: what to answer.
            context: its surroundings; the transport keeps the deadline and cancels.
            responder: told of the end.
            counts: where the request is counted.

        Raises:
            MeshError: as `infer`.
        """
        ...


@runtime_checkable
class BeginningHandler(Protocol):
    """A handler that answers some calls without a coroutine, such as a model host whose models run on the loop."""

    def begin(self, request: InferRequest, context: RequestContext, asker: Asker) -> Taken | None:
        """As `PassingHandler.pass_on`, of a handler that makes answers itself: with the id of the request."""
        ...


class IndexEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One model version in the repository index."""

    name: str
    version: str
    state: State
    reason: str = ""


class InferenceService:
    """One handler and one directory as the Open Inference Protocol sees them.

    Args:
        handler: answers inference.
        directory: answers questions about models.
        server_name: what ServerMetadata says.
        counting: knows what the engines here did; the directory itself if it does. Elsewhere what passes is counted.
        statistics: what passes; share one between listeners to count both. Unused where `counting` knows.
        repository: what an operator may load and unload; the directory itself if it can.
        report: what RepositoryIndex lists; the directory's own `report` if it has one.
        regions: shared memory; share one between listeners.
        frames: counts those that are let go.
        clock: for deadlines.
    """

    def __init__(
        self,
        handler: InferenceHandler,
        directory: ModelDirectory,
        *,
        server_name: str,
        counting: Counting | None = None,
        statistics: Statistics | None = None,
        repository: ModelRepository | None = None,
        report: Report | None = None,
        regions: Regions | None = None,
        frames: FramesLetGo | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.directory = directory
        self.server_name = server_name
        self.server_version = __version__
        self.clock = clock
        self.regions = regions or Regions()
        self.frames = frames or FramesLetGo()
        self._handler = handler
        self.passing = handler if isinstance(handler, PassingHandler) and handler.passes else None
        self._described: dict[tuple[str, str], ModelMetadata] = {}
        self._counting = directory if counting is None and isinstance(directory, Counting) else counting
        self.counts = None
        if self._counting is None:
            self.counts = statistics or Statistics(clock)
        # What is counted here has to end here.
        self.beginning = handler if isinstance(handler, BeginningHandler) and self.counts is None else None
        self._repository = directory if repository is None and isinstance(directory, ModelRepository) else repository
        self._report = directory.report if report is None and isinstance(directory, Reporting) else report

    def extensions(self, call: Call) -> tuple[str, ...]:
        """The extensions that exist here for this peer, in Triton's words where it has one."""
        names = [
            "binary_tensor_data",
            "classification",
            "model_configuration",
            "parameters",
            "schedule_policy",
            "sequence",
            "sequence(string_id)",
            "statistics",
        ]
        if self._repository is not None and is_operator(call):
            names.append("model_repository")
        elif self._report is not None:
            names.append("model_repository(index)")
        if peer_uid(call) is not None:
            names.append("system_shared_memory")
        return tuple(sorted(names))

    async def infer(
        self, request: InferRequest, context: RequestContext, *, kept: float | None = None
    ) -> InferResponse:
        """Answer one request, count it, and repeat its id.

        Args:
            request: what to answer.
            context: its surroundings; the deadline is kept here.
            kept: the deadline that the transport keeps by itself, which then needs no second timer.

        Raises:
            MeshError: whatever the handler raises; INVALID_REQUEST if the request names no model.
        """
        return repeat_id(request, await self.ask(request, context, kept=kept))

    def ask(
        self, request: InferRequest, context: RequestContext, *, kept: float | None = None
    ) -> Awaitable[InferResponse]:
        """As `infer`, but the id is left to `repeat_id`: where nothing is counted this costs a coroutine less."""
        if not request.model:
            raise MeshError(Code.INVALID_REQUEST, "The request names no model.")
        deadline = context.deadline
        if deadline is not None:
            context.require_time(self.clock.monotonic())
        if self.counts is None and (deadline is None or deadline == kept):
            return self._handler.infer(request, context)
        return self._counted(request, context, kept)

    async def _counted(self, request: InferRequest, context: RequestContext, kept: float | None) -> InferResponse:
        began = self.clock.monotonic()
        try:
            if context.deadline is None or context.deadline == kept:
                response = await self._handler.infer(request, context)
            else:
                response = await self._within(request, context, context.deadline - began)
        except MeshError:
            if self.counts is not None:
                version = context.version or request.version
                self.counts.fail(request.model, version, self.clock.monotonic() - began)
            raise
        if self.counts is not None:
            elapsed_s = self.clock.monotonic() - began
            self.counts.succeed(request.model, response.version, response.served, elapsed_s)
        return response

    async def _within(self, request: InferRequest, context: RequestContext, seconds: float) -> InferResponse:
        timer = asyncio.timeout(seconds)
        try:
            async with timer:
                return await self._handler.infer(request, context)
        except TimeoutError as error:
            if not timer.expired():
                raise
            raise MeshError(
                Code.DEADLINE, "The deadline passed before the answer was ready; send a longer deadline.", sent=True
            ) from error

    async def is_model_ready(self, model: str, version: str) -> bool:
        """Whether a model answers now; False if there is none of that name or version."""
        if not model:
            raise MeshError(Code.INVALID_REQUEST, "The request names no model.")
        try:
            return await self.directory.is_ready(model, version)
        except MeshError as error:
            if error.code in (Code.MODEL_NOT_FOUND, Code.VERSION_MISMATCH):
                return False
            raise

    async def metadata(self, model: str, version: str) -> ModelMetadata:
        """Tensors and versions of a model.

        Raises:
            MeshError: MODEL_NOT_FOUND.
        """
        return await self.directory.metadata(model, version)

    async def described(self, model: str, version: str) -> ModelMetadata:
        """As `metadata`, of a version that has answered: a release never changes, so it is asked for once.

        Raises:
            MeshError: MODEL_NOT_FOUND.
        """
        found = self._described.get((model, version))
        if found is None:
            found = await self.directory.metadata(model, version)
            if len(self._described) >= DESCRIBED_MAX:
                self._described.clear()
            self._described[model, version] = found
        return found

    async def statistics(self, model: str, version: str) -> Sequence[VersionCounts]:
        """What the versions of a model ("" = of every model) have done since the start of the process.

        Raises:
            MeshError: MODEL_NOT_FOUND for a model that the directory does not know.
        """
        source = self._counting or self.counts
        entries = source.counts(model, version) if source is not None else ()
        if model and not entries:
            known = await self.directory.metadata(model, version)
            return [VersionCounts(model=model, version=v) for v in known.versions if version in ("", v)]
        return entries

    async def load(self, model: str, call: Call) -> None:
        """Have a model in memory and keep it there.

        Raises:
            MeshError: FORBIDDEN for everyone but operators; UNSUPPORTED where there are no models to load; what the
                repository raises.
        """
        await self._require_repository(model, call, "load models").load(model)

    async def unload(self, model: str, call: Call) -> None:
        """Give a model's memory back until it is asked for again.

        Raises:
            MeshError: as `load`.
        """
        await self._require_repository(model, call, "unload models").unload(model)

    def _require_repository(self, model: str, call: Call, what: str) -> ModelRepository:
        require_operator(call, what)
        if self._repository is None:
            raise MeshError(Code.UNSUPPORTED, "This server routes to others and cannot load or unload; ask a node.")
        if not model:
            raise MeshError(Code.INVALID_REQUEST, "The request names no model.")
        return self._repository

    def index(self, *, ready_only: bool) -> list[IndexEntry]:
        """Every model version that this process holds.

        Raises:
            MeshError: UNSUPPORTED where the directory cannot list.
        """
        if self._report is None:
            raise MeshError(Code.UNSUPPORTED, "This server routes to others and cannot list models; ask a node.")
        entries = [
            IndexEntry(name=v.model, version=v.version, state=_STATES[v.residency]) for v in self._report().versions
        ]
        return [entry for entry in entries if entry.state == "READY" or not ready_only]


def repeat_id(request: InferRequest, response: InferResponse) -> InferResponse:
    """The answer with the request's id, if its handler has left that out."""
    if response.id != request.id and isinstance(response, TensorResponse):
        return response.with_id(request.id)
    return response
