"""The seam where requests meet.

A loaded model, the whole model host, a channel to another node, the router in front of them: each is an
`InferenceHandler`. Transports only convert between their wire and this. Cancelling the task is the cancel signal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt

from nearcast.counts import VersionCounts
from nearcast.errors import Code, MeshError

SEQUENCE_ID_CHARS_MAX = 256
"""What of a sequence's name counts: it is remembered wherever the sequence's requests come by."""
Parameter: TypeAlias = bool | int | float | str
"""A value of an Open Inference Protocol parameter."""
Tensors: TypeAlias = Mapping[str, npt.NDArray[np.generic]]
"""Tensors by name, in the order of the wire. BYTES tensors are object arrays of `bytes`."""
Stateful: TypeAlias = Literal["none", "explicit", "hidden"]
"""Where a model keeps state between calls: nowhere, in its tensors, or inside its interpreter."""


class InferRequest(ABC):
    """One request, lazy: the top-level fields are known, the tensors only after `decode`.

    `version` is what the client asked for ("" = the channel's choice).
    """

    __slots__ = ("id", "model", "parameters", "version")

    model: str
    version: str
    id: str
    parameters: Mapping[str, Parameter]

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """Bytes of the request as protobuf; an estimate is enough where it was never encoded."""

    @property
    def form(self) -> Hashable:
        """Equal only for requests whose tensors have equal names, types and shapes; None = nobody knows."""
        return None

    @abstractmethod
    def decode(self) -> Tensors:
        """The input tensors. Cached.

        Raises:
            MeshError: INVALID_REQUEST if the bytes are no valid request.
        """

    @abstractmethod
    def encode(self) -> bytes:
        """The request as a `ModelInferRequest` protobuf. Cached; the original bytes where there are any."""

    @abstractmethod
    def requested_outputs(self) -> Sequence[str]:
        """Names of the outputs asked for; empty = all."""

    @property
    def sequence_id(self) -> str:
        """The sequence this request belongs to; "" outside any ("0" is the protocol's word for none)."""
        value = self.parameters.get("sequence_id", "")
        return "" if value in (0, "0", "") else str(value)[:SEQUENCE_ID_CHARS_MAX]


# Structs and not dataclasses where one is made per request: a frozen dataclass takes ten times as long to make.
class Served(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What happened to an answered request; travels as trailers.

    `node` answered with `version`; it waited `queue_us` and ran `compute_us` microseconds. `in_flight` is the load that
    the node saw at the request's arrival, itself not counted. `escalate` names a larger model that should be asked
    again, because this answer is uncertain; "" = it is certain, or there is no such model. `load` says now and then
    how the node is (`load.AnswerLoad` as text), so that neither side pays for it with every answer.
    """

    node: str = ""
    tier: str = ""
    version: str = ""
    queue_us: int = 0
    compute_us: int = 0
    in_flight: int = 0
    escalate: str = ""
    load: str = ""


class InferResponse(ABC):
    """One answer, lazy like the request: what only passes through is never decoded."""

    __slots__ = ("id", "model", "parameters", "served", "version")

    model: str
    version: str
    id: str
    parameters: Mapping[str, Parameter]
    served: Served

    @abstractmethod
    def decode(self) -> Tensors:
        """The output tensors. Cached.

        Raises:
            MeshError: INTERNAL if the bytes are no valid response.
        """

    @abstractmethod
    def encode(self) -> bytes:
        """The answer as a `ModelInferResponse` protobuf. Cached; the original bytes where there are any."""

    def encode_pieces(self) -> Sequence[bytes]:
        """The same in pieces, so that large tensors are not copied once more to be joined."""
        return (self.encode(),)


class RequestContext(msgspec.Struct, frozen=True, kw_only=True):
    """What surrounds a request.

    Attributes:
        deadline: monotonic instant in seconds after which the answer is worthless; None = none. Never wall time.
        priority: 0 = default, 1 = highest, larger is lower (Triton's schedule policy).
        tenant: whose request this is.
        principal: who sent it: a mesh identity, a device or "" (anonymous on loopback).
        idempotency_key: makes repeating the call harmless; "" = none.
        trace: W3C `traceparent`, "" = none.
        forwarded: a mesh router has decided already: serve locally or answer `elsewhere`, never route again.
        version: the version that router chose; "" where none has chosen yet.
    """

    deadline: float | None = None
    priority: int = 0
    tenant: str = "local"
    principal: str = ""
    idempotency_key: str = ""
    trace: str = ""
    forwarded: bool = False
    version: str = ""

    def remaining_s(self, now: float) -> float | None:
        """Seconds left at the monotonic instant `now`, never negative; None without a deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - now)

    def require_time(self, now: float) -> None:
        """Refuse work that nobody waits for any more.

        Raises:
            MeshError: DEADLINE if the deadline has passed.
        """
        if self.deadline is not None and now >= self.deadline:
            raise MeshError(Code.DEADLINE, "The deadline passed before the model ran; send a longer deadline.")

    def forward(self, version: str) -> RequestContext:
        """The context of the same request on its one hop to another node."""
        return msgspec.structs.replace(self, forwarded=True, version=version)


class InferenceHandler(Protocol):
    """Anything that answers inference requests."""

    async def infer(self, request: InferRequest, context: RequestContext) -> InferResponse:
        """Answer one request.

        Raises:
            MeshError: with the code and retry class of the catalogue.
        """
        ...

    def stream(self, requests: AsyncIterator[InferRequest], context: RequestContext) -> AsyncIterator[InferResponse]:
        """Answer a stream of requests, in order."""
        ...


class Asker(Protocol):
    """Who waits for an answer without a coroutine. Told once, unless it has given up."""

    def answer(self, response: InferResponse) -> None:
        """The answer.

        Raises:
            MeshError: INTERNAL if it cannot travel.
        """
        ...

    def refuse(self, error: MeshError) -> None:
        """Why there is none."""
        ...


class TensorSpec(msgspec.Struct, frozen=True):
    """One declared input or output. `shape` uses -1 for a free axis; `datatype` is the protocol's name (FP32, …)."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """What `ModelMetadata` answers: the versions that are ready and the tensors of the one asked for."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    properties: Mapping[str, str] = msgspec.field(default_factory=dict)


@runtime_checkable
class ModelDirectory(Protocol):
    """What can be asked about models without running one. The model host and the router both answer."""

    async def metadata(self, model: str, version: str) -> ModelMetadata:
        """Tensors and versions of a model.

        Raises:
            MeshError: MODEL_NOT_FOUND, naming the models that exist.
        """
        ...

    async def is_ready(self, model: str = "", version: str = "") -> bool:
        """Whether the model ("" = the server) answers requests now.

        Raises:
            MeshError: MODEL_NOT_FOUND for an unknown model.
        """
        ...


@runtime_checkable
class Counting(Protocol):
    """A directory whose engines run here, and which therefore knows what they did."""

    def counts(self, model: str = "", version: str = "") -> Sequence[VersionCounts]:
        """Counts of one model and version; "" = all. Empty for what has never been loaded."""
        ...


@runtime_checkable
class ModelRepository(Protocol):
    """What an operator may do with the models that a node has on disk. Neither verb brings in files."""

    async def load(self, model: str) -> None:
        """Have the model in memory, warm, and keep it there; returns once it answers.

        Raises:
            MeshError: MODEL_NOT_FOUND; OVERLOADED if memory does not suffice; what else keeps it from being loaded.
        """
        ...

    async def unload(self, model: str) -> None:
        """Give the model's memory back once its requests are done; the next request or `load` brings it in again.

        Raises:
            MeshError: MODEL_NOT_FOUND.
        """
        ...
