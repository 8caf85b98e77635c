"""What gRPC and REST answer alike: inference with its bookkeeping, readiness, the index of models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from nearcast import __version__
from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import Code, MeshError
from nearcast.handler import (
    InferenceHandler,
    InferRequest,
    InferResponse,
    ModelDirectory,
    ModelMetadata,
    RequestContext,
)
from nearcast.load import NodeReport
from nearcast.transport.statistics import Statistics, VersionStatistics
from nearcast.wire.response import TensorResponse

Report: TypeAlias = Callable[[], NodeReport]
State: TypeAlias = Literal["READY", "LOADING", "UNAVAILABLE"]
_STATES: dict[str, State] = {"hot": "READY", "loading": "LOADING", "cold": "UNAVAILABLE"}


@runtime_checkable
class Reporting(Protocol):
    """A directory that can list what it holds, such as a model host."""

    def report(self) -> NodeReport:
        """What the node says about itself now."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexEntry:
    """One model version in the repository index."""

    name: str
    version: str
    state: State
    reason: str = ""


class InferenceService:
    """One handler and one directory as the Open Inference Protocol sees them."""

    def __init__(
        self,
        handler: InferenceHandler,
        directory: ModelDirectory,
        *,
        server_name: str,
        statistics: Statistics | None = None,
        report: Report | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.directory = directory
        self.server_name = server_name
        self.server_version = __version__
        self.clock = clock
        self._handler = handler
        self._statistics = Statistics(clock) if statistics is None else statistics
        self._report = directory.report if report is None and isinstance(directory, Reporting) else report

    @property
    def extensions(self) -> tuple[str, ...]:
        """The extensions that exist here, in Triton's words where it has one."""
        always = (
            "binary_tensor_data",
            "model_configuration",
            "parameters",
            "schedule_policy",
            "sequence",
            "statistics",
        )
        return (*always, "model_repository(index)") if self._report is not None else always

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
        if not request.model:
            raise MeshError(Code.INVALID_REQUEST, "The request names no model.")
        began = self.clock.monotonic()
        context.require_time(began)
        try:
            if context.deadline is None or context.deadline == kept:
                response = await self._handler.infer(request, context)
            else:
                response = await self._within(request, context, context.deadline - began)
        except MeshError:
            version = context.version or request.version
            self._statistics.fail(request.model, version, self.clock.monotonic() - began)
            raise
        elapsed_s = self.clock.monotonic() - began
        self._statistics.succeed(request.model, response.version, response.served, elapsed_s)
        if response.id != request.id and isinstance(response, TensorResponse):
            return response.with_id(request.id)
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

    async def statistics(self, model: str, version: str) -> list[VersionStatistics]:
        """Counts of a model ("" = all models) since the start of the process.

        Raises:
            MeshError: MODEL_NOT_FOUND for a model that the directory does not know.
        """
        entries = self._statistics.of(model, version)
        if model and not entries:
            known = await self.directory.metadata(model, version)
            return [VersionStatistics(model=model, version=v) for v in known.versions if version in ("", v)]
        return entries

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
