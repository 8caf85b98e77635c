"""The questions of `oip_models` over REST: paths and JSON bodies to protobuf requests, protobuf answers to JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeAlias

import msgspec
from google.protobuf.message import Message

from nearcast.errors import Code, MeshError
from nearcast.transport.oip_models import QUESTIONS, refuse
from nearcast.transport.seam import Call
from nearcast.transport.service import InferenceService
from nearcast.wire.v1 import oip_pb2 as pb

Names: TypeAlias = Mapping[str, str]
"""What the path names: `model`, `version`, `region`."""
_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """What any of the bodies may hold. Other fields are ignored: the protocol lets clients send more than we know."""

    ready: bool = False
    repository_name: str = ""
    parameters: dict[str, Any] = {}
    key: str = ""
    offset: _Size = 0
    byte_size: _Size = 0


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One path. `read` makes the request of the question `name`; `show` makes JSON of the answer."""

    method: str
    path: str
    name: str
    read: Callable[[Names, Body], Message]
    show: Callable[[Message], Any]


async def answer(service: InferenceService, route: Route, names: Names, body: bytes, call: Call) -> Any:
    """Answer one question; returns what is sent as JSON.

    Raises:
        MeshError: INVALID_REQUEST for a malformed body; what the question raises.
    """
    if route.name not in QUESTIONS:
        raise refuse(route.name)
    try:
        asked = msgspec.json.decode(body, type=Body) if body else Body()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MeshError(Code.INVALID_REQUEST, f"The body must be a JSON object that fits: {error}.") from error
    try:
        request = route.read(names, asked)
    except ValueError as error:
        raise MeshError(Code.INVALID_REQUEST, "The path or the body holds text that is not valid Unicode.") from error
    return route.show(await QUESTIONS[route.name][1](service, request, call))


def to_json(message: Message) -> dict[str, Any]:
    """A message as Triton writes it in JSON: every field by its name, numbers as numbers, unset messages left out."""
    return {
        field.name: _value(message, field)
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    }


def _value(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {key: to_json(each) if isinstance(each, Message) else each for key, each in value.items()}
    if field.message_type is not None:
        return [to_json(each) for each in value] if field.is_repeated else to_json(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return list(value) if field.is_repeated else value


def _list(name: str) -> Callable[[Message], list[Any]]:
    return lambda message: to_json(message)[name]


def _parameters(body: Body) -> dict[str, pb.ModelRepositoryParameter]:
    return {name: pb.ModelRepositoryParameter(string_param=str(value)) for name, value in body.parameters.items()}


def _named(kind: Any) -> Callable[[Names, Body], Message]:
    """A request that names a model, and perhaps a version."""
    return lambda names, _: kind(name=names.get("model", ""), version=names.get("version", ""))


def _region(kind: Any) -> Callable[[Names, Body], Message]:
    return lambda names, _: kind(name=names.get("region", ""))


def _repository(kind: Any) -> Callable[[Names, Body], Message]:
    def read(names: Names, body: Body) -> Message:
        request: Message = kind(
            repository_name=body.repository_name, model_name=names["model"], parameters=_parameters(body)
        )
        return request

    return read


def _register(names: Names, body: Body) -> Message:
    return pb.SystemSharedMemoryRegisterRequest(
        name=names["region"], key=body.key, offset=body.offset, byte_size=body.byte_size
    )


def _index(_: Names, body: Body) -> Message:
    return pb.RepositoryIndexRequest(repository_name=body.repository_name, ready=body.ready)


def _nothing(_: Names, __: Body) -> Message:
    return pb.ServerMetadataRequest()


def _get(path: str, name: str, read: Any, show: Any = to_json) -> Route:
    return Route(method="GET", path=path, name=name, read=read, show=show)


def _post(path: str, name: str, read: Any, show: Any = to_json) -> Route:
    return Route(method="POST", path=path, name=name, read=read, show=show)


def _of_models() -> list[Route]:
    routes = [_get("/v2/models/stats", "ModelStatistics", _named(pb.ModelStatisticsRequest))]
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        routes += [
            _get(model, "ModelMetadata", _named(pb.ModelMetadataRequest)),
            _get(model + "/config", "ModelConfig", _named(pb.ModelConfigRequest), lambda m: to_json(m)["config"]),
            _get(model + "/stats", "ModelStatistics", _named(pb.ModelStatisticsRequest)),
        ]
    return routes


def _of_shared_memory() -> list[Route]:
    routes = [
        _post("/v2/systemsharedmemory/region/{region}/register", "SystemSharedMemoryRegister", _register),
        _post("/v2/cudasharedmemory/region/{region}/register", "CudaSharedMemoryRegister", _nothing),
    ]
    for kind, path in (("System", "/v2/systemsharedmemory"), ("Cuda", "/v2/cudasharedmemory")):
        status, unregister = f"{kind}SharedMemoryStatus", f"{kind}SharedMemoryUnregister"
        for place in (path, path + "/region/{region}"):
            routes += [
                _get(place + "/status", status, _region(QUESTIONS[status][0]), _regions),
                _post(place + "/unregister", unregister, _region(QUESTIONS[unregister][0])),
            ]
    return routes


def _regions(message: Message) -> list[Any]:
    return list(to_json(message)["regions"].values())


def _refused() -> list[Route]:
    paths = (
        ("/v2/trace/setting", "TraceSetting"),
        ("/v2/models/{model}/trace/setting", "TraceSetting"),
        ("/v2/logging", "LogSettings"),
    )
    return [make(path, name, _nothing) for path, name in paths for make in (_get, _post)]


ROUTES: tuple[Route, ...] = (
    _get("/v2", "ServerMetadata", _nothing),
    _get("/v2/health/live", "ServerLive", _nothing),
    *_of_models(),
    _post("/v2/repository/index", "RepositoryIndex", _index, _list("models")),
    _post("/v2/repository/models/{model}/load", "RepositoryModelLoad", _repository(pb.RepositoryModelLoadRequest)),
    _post(
        "/v2/repository/models/{model}/unload", "RepositoryModelUnload", _repository(pb.RepositoryModelUnloadRequest)
    ),
    *_of_shared_memory(),
    *_refused(),
)
