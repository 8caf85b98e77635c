"""The Open Inference Protocol over gRPC: messages in, an `InferenceHandler` behind, messages out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError, Message

from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import Code, MeshError
from nearcast.handler import InferenceHandler, ModelDirectory, ModelMetadata, RequestContext, TensorSpec
from nearcast.transport.context import read_context
from nearcast.transport.seam import Call, Methods, Reply, UnaryMethod
from nearcast.transport.service import InferenceService, Report
from nearcast.transport.statistics import Statistics, VersionStatistics
from nearcast.wire.framing import encode_field, encode_prefix
from nearcast.wire.request import WireRequest
from nearcast.wire.response import response_pieces
from nearcast.wire.status import served_to_trailers
from nearcast.wire.v1 import oip_pb2 as pb

SERVICE = "/inference.GRPCInferenceService/"
MODEL_INFER = SERVICE + "ModelInfer"
MODEL_STREAM_INFER = SERVICE + "ModelStreamInfer"
MODEL_METADATA = SERVICE + "ModelMetadata"
MODEL_READY = SERVICE + "ModelReady"
SERVER_READY = SERVICE + "ServerReady"

_Answer: TypeAlias = Callable[[Any], Awaitable[Message]]
_TRITON_NAMES = {"BYTES": "STRING"}


def oip_methods(
    handler: InferenceHandler,
    directory: ModelDirectory,
    *,
    server_name: str,
    trusted: bool,
    statistics: Statistics | None = None,
    report: Report | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> Methods:
    """The protocol's methods for a server.

    Args:
        handler: answers inference.
        directory: answers questions about models.
        server_name: what ServerMetadata says.
        trusted: True on a mesh listener (mTLS): peers must be mesh nodes, and `nc-hop`, `nc-version`, `nc-tenant`
            count. Elsewhere these are dropped.
        statistics: share one between listeners to count both; one of its own if None.
        report: what RepositoryIndex lists; the directory's own `report` if it has one, else the method is not offered.
        clock: for deadlines.
    """
    service = InferenceService(
        handler, directory, server_name=server_name, statistics=statistics, report=report, clock=clock
    )
    unary: dict[str, UnaryMethod] = {
        SERVICE + name: _unary(kind, answer) for name, (kind, answer) in _questions(service).items()
    }
    unary[MODEL_INFER] = _infer(service, trusted=trusted)

    def stream(bodies: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
        return _stream(service, bodies, call, trusted=trusted)

    return Methods(unary=unary, stream={MODEL_STREAM_INFER: stream})


def _infer(service: InferenceService, *, trusted: bool) -> UnaryMethod:
    async def infer(body: bytes, call: Call) -> Reply:
        request, context = _read(service, body, call, trusted=trusted)
        response = await service.infer(request, context, kept=call.deadline)
        return Reply(response_pieces(response), served_to_trailers(response.served))

    return infer


def _read(service: InferenceService, body: bytes, call: Call, *, trusted: bool) -> tuple[WireRequest, RequestContext]:
    request = WireRequest(body)
    context = read_context(
        call.metadata,
        request.parameters,
        deadline=call.deadline,
        identity=call.identity,
        trusted=trusted,
        clock=service.clock,
    )
    return request, context


async def _stream(
    service: InferenceService, bodies: AsyncIterator[bytes], call: Call, *, trusted: bool
) -> AsyncIterator[Reply]:
    """Answers in the order of the requests. A request that fails is answered by its error; the stream goes on."""
    async for body in bodies:
        try:
            request, context = _read(service, body, call, trusted=trusted)
            pieces = response_pieces(await service.infer(request, context, kept=call.deadline))
        except MeshError as error:
            yield Reply((encode_field(1, error.message.encode("utf-8", "replace")),))
            continue
        yield Reply((encode_prefix(2, sum(map(len, pieces))), *pieces))


def _unary(kind: type[Message], answer: _Answer) -> UnaryMethod:
    async def method(body: bytes, _: Call) -> Reply:
        try:
            request = kind.FromString(body)
        except DecodeError as error:
            raise MeshError(Code.INVALID_REQUEST, f"The message is no {kind.DESCRIPTOR.name}.") from error
        message = await answer(request)
        return Reply((message.SerializeToString(),))

    return method


def _questions(service: InferenceService) -> dict[str, tuple[type[Message], _Answer]]:
    async def live(_: pb.ServerLiveRequest) -> Message:
        return pb.ServerLiveResponse(live=True)

    async def ready(_: pb.ServerReadyRequest) -> Message:
        return pb.ServerReadyResponse(ready=await service.directory.is_ready())

    async def server(_: pb.ServerMetadataRequest) -> Message:
        return pb.ServerMetadataResponse(
            name=service.server_name, version=service.server_version, extensions=service.extensions
        )

    async def model_ready(request: pb.ModelReadyRequest) -> Message:
        return pb.ModelReadyResponse(ready=await service.is_model_ready(request.name, request.version))

    async def metadata(request: pb.ModelMetadataRequest) -> Message:
        return encode_metadata(await service.metadata(request.name, request.version))

    async def config(request: pb.ModelConfigRequest) -> Message:
        return _config(await service.metadata(request.name, request.version))

    async def statistics(request: pb.ModelStatisticsRequest) -> Message:
        entries = await service.statistics(request.name, request.version)
        return pb.ModelStatisticsResponse(model_stats=[_statistics(entry) for entry in entries])

    async def index(request: pb.RepositoryIndexRequest) -> Message:
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(name=e.name, version=e.version, state=e.state, reason=e.reason)
                for e in service.index(ready_only=request.ready)
            ]
        )

    questions: dict[str, tuple[type[Message], _Answer]] = {
        "ServerLive": (pb.ServerLiveRequest, live),
        "ServerReady": (pb.ServerReadyRequest, ready),
        "ServerMetadata": (pb.ServerMetadataRequest, server),
        "ModelReady": (pb.ModelReadyRequest, model_ready),
        "ModelMetadata": (pb.ModelMetadataRequest, metadata),
        "ModelConfig": (pb.ModelConfigRequest, config),
        "ModelStatistics": (pb.ModelStatisticsRequest, statistics),
    }
    if "model_repository(index)" in service.extensions:
        questions["RepositoryIndex"] = (pb.RepositoryIndexRequest, index)
    return questions


def encode_metadata(metadata: ModelMetadata) -> pb.ModelMetadataResponse:
    """A model's metadata as protobuf."""
    kind = pb.ModelMetadataResponse.TensorMetadata

    def tensors(specs: tuple[TensorSpec, ...]) -> list[pb.ModelMetadataResponse.TensorMetadata]:
        return [kind(name=spec.name, datatype=spec.datatype, shape=spec.shape) for spec in specs]

    return pb.ModelMetadataResponse(
        name=metadata.name,
        versions=metadata.versions,
        platform=metadata.platform,
        inputs=tensors(metadata.inputs),
        outputs=tensors(metadata.outputs),
        properties=dict(metadata.properties),
    )


def decode_metadata(body: bytes) -> ModelMetadata:
    """A model's metadata from a peer.

    Raises:
        MeshError: INTERNAL if the bytes are no metadata.
    """
    try:
        message = pb.ModelMetadataResponse.FromString(body)
    except DecodeError as error:
        raise MeshError(Code.INTERNAL, "The peer's model metadata is malformed.") from error
    return ModelMetadata(
        name=message.name,
        versions=tuple(message.versions),
        platform=message.platform,
        inputs=tuple(TensorSpec(t.name, t.datatype, tuple(t.shape)) for t in message.inputs),
        outputs=tuple(TensorSpec(t.name, t.datatype, tuple(t.shape)) for t in message.outputs),
        properties=dict(message.properties),
    )


def triton_type(datatype: str) -> str:
    """Triton's configuration name of a datatype, such as TYPE_FP32."""
    return "TYPE_" + _TRITON_NAMES.get(datatype, datatype)


def _config(metadata: ModelMetadata) -> pb.ModelConfigResponse:
    return pb.ModelConfigResponse(
        config=pb.ModelConfig(
            name=metadata.name,
            platform=metadata.platform,
            input=[
                pb.ModelInput(name=s.name, data_type=triton_type(s.datatype), dims=s.shape) for s in metadata.inputs
            ],
            output=[
                pb.ModelOutput(name=s.name, data_type=triton_type(s.datatype), dims=s.shape) for s in metadata.outputs
            ],
        )
    )


def _statistics(entry: VersionStatistics) -> pb.ModelStatistics:
    def duration(count: int, ns: int) -> pb.StatisticDuration:
        return pb.StatisticDuration(count=count, ns=ns)

    return pb.ModelStatistics(
        name=entry.model,
        version=entry.version,
        last_inference=entry.last_inference_ms,
        inference_count=entry.success_count,
        execution_count=entry.success_count,
        inference_stats=pb.InferStatistics(
            success=duration(entry.success_count, entry.success_ns),
            fail=duration(entry.fail_count, entry.fail_ns),
            queue=duration(entry.success_count, entry.queue_ns),
            compute_infer=duration(entry.success_count, entry.compute_ns),
        ),
    )
