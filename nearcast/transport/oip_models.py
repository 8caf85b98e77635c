"""What can be asked of a server beside inference: about itself, its models, its repository, and shared memory.

Each question is one function from a protobuf request to a protobuf answer. gRPC sends them as they are, REST as JSON.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError, Message

from nearcast.errors import Code, MeshError
from nearcast.handler import ModelMetadata, TensorSpec
from nearcast.transport.model_config import encode_config, encode_statistics
from nearcast.transport.seam import Call
from nearcast.transport.service import InferenceService
from nearcast.wire.v1 import oip_pb2 as pb

Answer: TypeAlias = Callable[[InferenceService, Any, Call], Awaitable[Message]]


async def _live(service: InferenceService, request: pb.ServerLiveRequest, call: Call) -> Message:  # noqa: ARG001
    return pb.ServerLiveResponse(live=True)


async def _ready(service: InferenceService, request: pb.ServerReadyRequest, call: Call) -> Message:  # noqa: ARG001
    return pb.ServerReadyResponse(ready=await service.directory.is_ready())


async def _server(service: InferenceService, request: pb.ServerMetadataRequest, call: Call) -> Message:  # noqa: ARG001
    return pb.ServerMetadataResponse(
        name=service.server_name, version=service.server_version, extensions=service.extensions(call)
    )


async def _model_ready(service: InferenceService, request: pb.ModelReadyRequest, call: Call) -> Message:  # noqa: ARG001
    return pb.ModelReadyResponse(ready=await service.is_model_ready(request.name, request.version))


async def _metadata(service: InferenceService, request: pb.ModelMetadataRequest, call: Call) -> Message:  # noqa: ARG001
    return encode_metadata(await service.metadata(request.name, request.version))


async def _config(service: InferenceService, request: pb.ModelConfigRequest, call: Call) -> Message:  # noqa: ARG001
    return pb.ModelConfigResponse(config=encode_config(await service.metadata(request.name, request.version)))


async def _statistics(
    service: InferenceService,
    request: pb.ModelStatisticsRequest,
    call: Call,  # noqa: ARG001
) -> Message:
    entries = await service.statistics(request.name, request.version)
    return pb.ModelStatisticsResponse(model_stats=map(encode_statistics, entries))


async def _index(service: InferenceService, request: pb.RepositoryIndexRequest, call: Call) -> Message:  # noqa: ARG001
    _require_default(request.repository_name)
    kind = pb.RepositoryIndexResponse.ModelIndex
    return pb.RepositoryIndexResponse(
        models=[
            kind(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason)
            for entry in service.index(ready_only=request.ready)
        ]
    )


async def _load(service: InferenceService, request: pb.RepositoryModelLoadRequest, call: Call) -> Message:
    _require_default(request.repository_name)
    for name in request.parameters:
        raise MeshError(
            Code.UNSUPPORTED,
            f"Loading takes no parameter '{name[:64]}': models and their settings come in signed bundles alone.",
        )
    await service.load(request.model_name, call)
    return pb.RepositoryModelLoadResponse()


async def _unload(service: InferenceService, request: pb.RepositoryModelUnloadRequest, call: Call) -> Message:
    _require_default(request.repository_name)
    # `unload_dependents` may be said: no model here is loaded for the sake of another.
    for name in set(request.parameters) - {"unload_dependents"}:
        raise MeshError(Code.UNSUPPORTED, f"Unloading takes no parameter '{name[:64]}'.")
    await service.unload(request.model_name, call)
    return pb.RepositoryModelUnloadResponse()


async def _register(service: InferenceService, request: pb.SystemSharedMemoryRegisterRequest, call: Call) -> Message:
    service.regions.register(
        call, name=request.name, key=request.key, offset=request.offset, size_bytes=request.byte_size
    )
    return pb.SystemSharedMemoryRegisterResponse()


async def _unregister(
    service: InferenceService, request: pb.SystemSharedMemoryUnregisterRequest, call: Call
) -> Message:
    service.regions.unregister(call, request.name)
    return pb.SystemSharedMemoryUnregisterResponse()


async def _status(service: InferenceService, request: pb.SystemSharedMemoryStatusRequest, call: Call) -> Message:
    kind = pb.SystemSharedMemoryStatusResponse.RegionStatus
    return pb.SystemSharedMemoryStatusResponse(
        regions={
            region.name: kind(name=region.name, key=region.key, offset=region.offset, byte_size=region.size_bytes)
            for region in service.regions.status(call, request.name)
        }
    )


# Tools end by giving back all regions of either kind; of this kind there are none, whatever the request says.
async def _cuda_status(service: InferenceService, request: Message, call: Call) -> Message:  # noqa: ARG001
    return pb.CudaSharedMemoryStatusResponse()


async def _cuda_unregister(service: InferenceService, request: Message, call: Call) -> Message:  # noqa: ARG001
    return pb.CudaSharedMemoryUnregisterResponse()


QUESTIONS: dict[str, tuple[type[Message], Answer]] = {
    "ServerLive": (pb.ServerLiveRequest, _live),
    "ServerReady": (pb.ServerReadyRequest, _ready),
    "ServerMetadata": (pb.ServerMetadataRequest, _server),
    "ModelReady": (pb.ModelReadyRequest, _model_ready),
    "ModelMetadata": (pb.ModelMetadataRequest, _metadata),
    "ModelConfig": (pb.ModelConfigRequest, _config),
    "ModelStatistics": (pb.ModelStatisticsRequest, _statistics),
    "RepositoryIndex": (pb.RepositoryIndexRequest, _index),
    "RepositoryModelLoad": (pb.RepositoryModelLoadRequest, _load),
    "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest, _unload),
    "SystemSharedMemoryStatus": (pb.SystemSharedMemoryStatusRequest, _status),
    "SystemSharedMemoryRegister": (pb.SystemSharedMemoryRegisterRequest, _register),
    "SystemSharedMemoryUnregister": (pb.SystemSharedMemoryUnregisterRequest, _unregister),
    "CudaSharedMemoryStatus": (pb.CudaSharedMemoryStatusRequest, _cuda_status),
    "CudaSharedMemoryUnregister": (pb.CudaSharedMemoryUnregisterRequest, _cuda_unregister),
}
"""By the name of the RPC: what it takes and what answers it."""

NOT_OFFERED = {
    "CudaSharedMemoryRegister": "This server has no cuda_shared_memory; use system shared memory over a Unix socket.",
    "TraceSetting": "This server has no trace settings; send the header traceparent to trace a request.",
    "LogSettings": "This server has no log settings over this protocol; its configuration file holds them.",
}
"""RPCs of Triton that are refused, with what to do instead."""


def refuse(name: str) -> MeshError:
    """The error for an RPC of Triton that is not offered."""
    return MeshError(Code.UNSUPPORTED, NOT_OFFERED[name])


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


def _require_default(repository: str) -> None:
    if repository:
        raise MeshError(Code.UNSUPPORTED, "A node has one repository, without a name; leave repository_name empty.")
