"""Server reflection (`grpc.reflection.v1`, `v1alpha`): generic clients learn here what they may call.

The messages are those of `grpcio-reflection`, whose servicer is not used: it needs grpcio, which a server on ngh2 does
not load. Descriptors live in a pool of our own: the public package name `inference` is not ours alone in a process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2 as descriptors
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError

from nearcast.errors import Code, MeshError
from nearcast.transport.lease import LEASE
from nearcast.transport.seam import Call, Methods, Reply

_NAMES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
_INFERENCE = "inference"
_HEALTH = "grpc.health.v1"
_NOT_FOUND = 5
_INVALID_ARGUMENT = 3
# Those whose messages are not called after them.
_REQUESTS = {"ModelStreamInfer": "ModelInfer", "Check": "HealthCheck"}
_ANSWERS = {"Check": "HealthCheck"}


def reflection_methods(methods: Methods) -> Methods:
    """The reflection service for a listener that offers `methods` beside it."""

    @cache
    def catalogue() -> _Catalogue:
        return _Catalogue(methods)

    async def answer(bodies: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:  # noqa: ARG001
        async for body in bodies:
            yield Reply((catalogue().answer(body),))

    return Methods(stream={f"/{name}/ServerReflectionInfo": answer for name in _NAMES})


class _Catalogue:
    """Made at the first question: most servers are never asked."""

    def __init__(self, methods: Methods) -> None:
        from grpc_reflection.v1alpha import reflection_pb2  # type: ignore[import-untyped]

        from nearcast.wire.v1 import lease_pb2, oip_pb2

        self._pb: Any = reflection_pb2
        self._pool = DescriptorPool()
        self._services: list[str] = list(_NAMES)
        for file in (
            _offer(_move(_copy(oip_pb2.DESCRIPTOR), _INFERENCE), "GRPCInferenceService", methods),
            _offer(_health(), "Health", methods),
            *([_copy(lease_pb2.DESCRIPTOR)] if LEASE in methods.unary else []),
        ):
            self._pool.Add(file)
            self._services += [f"{file.package}.{service.name}" for service in file.service]
        self._pool.Add(_copy(reflection_pb2.DESCRIPTOR))
        self._pool.Add(_move(_copy(reflection_pb2.DESCRIPTOR), "grpc.reflection.v1"))

    def answer(self, body: bytes) -> bytes:
        """Answer a `ServerReflectionRequest`. What is not found is an answer as well.

        Raises:
            MeshError: INVALID_REQUEST if the bytes are no such message.
        """
        try:
            request = self._pb.ServerReflectionRequest.FromString(body)
        except DecodeError as error:
            raise MeshError(Code.INVALID_REQUEST, "The message is no ServerReflectionRequest.") from error
        answer = self._pb.ServerReflectionResponse(valid_host=request.host, original_request=request)
        kind = request.WhichOneof("message_request")
        try:
            self._fill(answer, kind, request)
        except KeyError:
            answer.error_response.error_code = _NOT_FOUND
            answer.error_response.error_message = f"This server knows nothing of the {kind} asked for."
        return bytes(answer.SerializeToString())

    def _fill(self, answer: Any, kind: str | None, request: Any) -> None:
        pool = self._pool
        match kind:
            case "list_services":
                answer.list_services_response.service.extend(
                    self._pb.ServiceResponse(name=name) for name in sorted(self._services)
                )
            case "file_by_filename":
                _attach(answer, pool.FindFileByName(request.file_by_filename))
            case "file_containing_symbol":
                _attach(answer, pool.FindFileContainingSymbol(request.file_containing_symbol))
            case "all_extension_numbers_of_type":
                message = pool.FindMessageTypeByName(request.all_extension_numbers_of_type)
                answer.all_extension_numbers_response.base_type_name = message.full_name
            case "file_containing_extension":
                # There are no extensions.
                raise KeyError(kind)
            case _:
                answer.error_response.error_code = _INVALID_ARGUMENT
                answer.error_response.error_message = "The question is missing."


def _attach(answer: Any, file: Any) -> None:
    """No file of ours imports another one."""
    answer.file_descriptor_response.file_descriptor_proto.append(_copy(file).SerializeToString())


def _copy(file: Any) -> descriptors.FileDescriptorProto:
    proto = descriptors.FileDescriptorProto()
    file.CopyToProto(proto)
    return proto


def _move(file: descriptors.FileDescriptorProto, package: str) -> descriptors.FileDescriptorProto:
    """The same messages and services under another package."""
    old, new = f".{file.package}.", f".{package}."
    for field in _fields(file.message_type):
        if field.type_name:
            field.type_name = field.type_name.replace(old, new, 1)
    for service in file.service:
        for method in service.method:
            method.input_type = method.input_type.replace(old, new, 1)
            method.output_type = method.output_type.replace(old, new, 1)
    file.package = package
    file.name = f"{package.replace('.', '/')}/{file.name.rpartition('/')[2]}"
    return file


def _fields(messages: Iterable[descriptors.DescriptorProto]) -> Iterable[descriptors.FieldDescriptorProto]:
    for message in messages:
        yield from message.field
        yield from _fields(message.nested_type)


def _offer(file: descriptors.FileDescriptorProto, name: str, methods: Methods) -> descriptors.FileDescriptorProto:
    """Declare a service with those of `methods` that are its own and whose messages `file` has."""
    known = {message.name for message in file.message_type}
    service = descriptors.ServiceDescriptorProto(name=name)
    prefix = f"/{file.package}.{name}/"
    for path in sorted({*methods.unary, *methods.stream}):
        method = path.removeprefix(prefix)
        request, response = _REQUESTS.get(method, method) + "Request", _ANSWERS.get(method, method) + "Response"
        if path.startswith(prefix) and {request, response} <= known:
            service.method.add(
                name=method,
                input_type=f".{file.package}.{request}",
                output_type=f".{file.package}.{response}",
                client_streaming=path in methods.stream,
                server_streaming=path in methods.stream,
            )
    if service.method:
        file.service.append(service)
    return file


def _health() -> descriptors.FileDescriptorProto:
    """The public description of the health service; its messages are written by hand in `health`."""
    file = descriptors.FileDescriptorProto(name="grpc/health/v1/health.proto", package=_HEALTH, syntax="proto3")
    kind = descriptors.FieldDescriptorProto
    file.message_type.add(name="HealthCheckRequest").field.add(
        name="service", number=1, type=kind.TYPE_STRING, label=kind.LABEL_OPTIONAL
    )
    answer = file.message_type.add(name="HealthCheckResponse")
    answer.field.add(
        name="status",
        number=1,
        type=kind.TYPE_ENUM,
        label=kind.LABEL_OPTIONAL,
        type_name=f".{_HEALTH}.HealthCheckResponse.ServingStatus",
    )
    status = answer.enum_type.add(name="ServingStatus")
    for number, name in enumerate(("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")):
        status.value.add(name=name, number=number)
    return file
