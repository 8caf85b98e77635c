"""Any server of the Open Inference Protocol as a node: requests go to it, its models are found by asking."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence

import msgspec
from google.protobuf.message import DecodeError

from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, InferResponse, RequestContext
from nearcast.load import NodeReport, Residency, VersionReport
from nearcast.transport.oip import MODEL_INFER, SERVICE
from nearcast.transport.remote import RemoteNode
from nearcast.transport.seam import Channel, Metadata
from nearcast.wire import status
from nearcast.wire.framing import encode_field, encode_text
from nearcast.wire.report import LIMITS
from nearcast.wire.request import request_pieces
from nearcast.wire.response import WireResponse
from nearcast.wire.v1 import oip_pb2 as pb

SLOTS_DEFAULT = 4
REPOSITORY_INDEX = SERVICE + "RepositoryIndex"
_STATES: dict[str, Residency] = {"READY": "hot", "LOADING": "loading"}
_LOADING_MS = 5000.0
_LOOKS_PER_INDEX = 10
"""Of so many polls one asks for the models; all ask whether the server is ready."""


class ForeignNode(RemoteNode):
    """A server that knows nothing of the mesh.

    Nothing of ours is said to it but `traceparent`; the version that a router chose travels in the request itself.

    Args:
        channel: to its gRPC listener.
        name: what it is called here.
        models: `name` or `name@version` that it holds; empty = what its RepositoryIndex lists.
        slots: model runs that it carries out at the same time.
    """

    def __init__(self, channel: Channel, name: str, *, models: Sequence[str] = (), slots: int = SLOTS_DEFAULT) -> None:
        super().__init__(channel, name)
        self._named = tuple(model.partition("@")[::2] for model in models)
        self._slots = slots
        self._versions: tuple[VersionReport, ...] = ()
        self._was_ready = False
        self._looks = 0

    async def infer(self, request: InferRequest, context: RequestContext) -> InferResponse:
        """Send the request and wait for the answer.

        Raises:
            CallError: the server's error, or the channel's; `sent` says whether the model may have run.
            MeshError: INTERNAL if the answer is malformed, INVALID_REQUEST if a value cannot travel.
        """
        reply = await self._channel.unary(
            MODEL_INFER,
            self._write(request, context.version),
            metadata=self._describe(context),
            deadline=context.deadline,
        )
        body = reply.body[0] if len(reply.body) == 1 else b"".join(reply.body)
        response = WireResponse(body, status.served_from_trailers(reply.trailers))
        served = response.served
        if not served.node:
            response.served = msgspec.structs.replace(served, node=self.name, version=response.version)
        return response

    def _describe(self, context: RequestContext) -> Metadata:
        return ((status.TRACE, context.trace),) if context.trace else ()

    def _write(self, request: InferRequest, version: str) -> Sequence[bytes]:
        pieces = request_pieces(request)
        if version and version != request.version:
            # Of two values of a field the last one counts.
            pieces = (*pieces, encode_field(2, encode_text(version)))
        return pieces

    def stream(self, requests: AsyncIterator[InferRequest], context: RequestContext) -> AsyncIterator[InferResponse]:
        """As `RemoteNode.stream`, without what only a node of the mesh understands."""
        return super().stream(requests, RequestContext(deadline=context.deadline, trace=context.trace))

    async def report(self, *, deadline: float | None = None) -> NodeReport:
        """What can be known about the server.

        Raises:
            CallError: if it cannot be asked.
            MeshError: INTERNAL if an answer is malformed; UNSUPPORTED if it lists no models and none are named.
        """
        return (await self.poll(deadline=deadline))[0]

    async def poll(self, *, deadline: float | None = None) -> tuple[NodeReport, float]:
        """The report, and the seconds that the question whether the server is ready took.

        Raises:
            CallError: if it cannot be asked.
            MeshError: INTERNAL if an answer is malformed; UNSUPPORTED if it lists no models and none are named.
        """
        started = time.monotonic()
        is_ready = await self.is_ready(deadline=deadline)
        round_trip_s = time.monotonic() - started
        # A server with one broken model says "not ready" for all of them: then only their own states count.
        if not is_ready or not self._was_ready or self._looks % _LOOKS_PER_INDEX == 0:
            self._versions = await (self._ask_named(deadline) if self._named else self._read_index(deadline))
        self._was_ready = is_ready
        self._looks += 1
        return NodeReport(node=self.name, role="", slots=self._slots, versions=self._versions), round_trip_s

    async def _read_index(self, deadline: float | None) -> tuple[VersionReport, ...]:
        try:
            reply = await self._channel.unary(REPOSITORY_INDEX, (b"",), deadline=deadline)
            index = pb.RepositoryIndexResponse.FromString(b"".join(reply.body))
        except DecodeError as error:
            raise MeshError(Code.INTERNAL, f"The repository index of {self.name} is malformed.") from error
        except MeshError as error:
            if error.code is not Code.UNSUPPORTED:
                raise
            raise MeshError(
                Code.UNSUPPORTED, f"{self.name} lists no models; name them in `models` of its [[targets]] entry."
            ) from error
        return tuple(_version(m.name, m.version, m.state) for m in index.models[: LIMITS.versions_max])

    async def _ask_named(self, deadline: float | None) -> tuple[VersionReport, ...]:
        found = []
        for model, named in self._named:
            try:
                is_ready = await self.is_ready(model, named, deadline=deadline)
                versions = (named,) if named or not is_ready else await self._versions_of(model, deadline)
            except MeshError as error:
                if error.code not in (Code.MODEL_NOT_FOUND, Code.INVALID_REQUEST, Code.UNSUPPORTED, Code.INTERNAL):
                    raise
                is_ready, versions = False, (named,)
            found += [_version(model, version, "READY" if is_ready else "") for version in versions]
        return tuple(found)

    async def _versions_of(self, model: str, deadline: float | None) -> tuple[str, ...]:
        return (await self.metadata(model, deadline=deadline)).versions or ("",)


def _version(model: str, version: str, state: str) -> VersionReport:
    # MLServer writes the name of its own enumeration in front.
    residency = _STATES.get(state.rpartition(".")[2], "cold")
    return VersionReport(
        model=model[: LIMITS.name_chars_max],
        version=version[: LIMITS.name_chars_max],
        residency=residency,
        eta_ms=_LOADING_MS if residency == "loading" else 0.0,
    )
