"""Two clients of the protocol with one face: gRPC by generic calls, REST by the standard library's HTTP."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from nearcast.wire.v1 import oip_pb2 as pb
from tests.compat.registry import GRPC, REST, NonconformingError, expect
from tests.compat.tensors import TYPED_FIELDS, Tensor, make

SERVICE = "/inference.GRPCInferenceService/"
TIMEOUT_S = 10.0
MESSAGE_SIZE_BYTES_MAX = 128 * 1024 * 1024
JSON_SIZE = "Inference-Header-Content-Length"
Inputs = Mapping[str, Tensor]


class RefusedError(Exception):
    """The server answered with an error. `status` is gRPC's name of it, or HTTP's number."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message

    @property
    def blames_client(self) -> bool:
        """Whether the status says that the request was wrong, not the server."""
        return self.status in {
            "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "OUT_OF_RANGE", "UNIMPLEMENTED",
        } or (self.status.isdigit() and (400 <= int(self.status) < 500 or self.status == "501"))  # fmt: skip

    @property
    def means_not_found(self) -> bool:
        """Whether the status says that there is no such thing."""
        return self.status in {"NOT_FOUND", "FAILED_PRECONDITION", "404", "412"}


@dataclass(frozen=True)
class Answer:
    """One inference answered; `binary` names the outputs that came as binary data behind JSON."""

    model: str
    version: str
    id: str
    outputs: dict[str, Tensor]
    binary: frozenset[str] = frozenset()
    parameters: dict[str, Any] = field(default_factory=dict)


class Grpc:
    """The protocol over gRPC."""

    transport = GRPC

    def __init__(self, address: str) -> None:
        size = [("grpc.max_receive_message_length", MESSAGE_SIZE_BYTES_MAX)]
        self.channel = grpc.insecure_channel(address, options=[*size, ("grpc.max_send_message_length", size[0][1])])

    def close(self) -> None:
        self.channel.close()

    def call_bytes(self, method: str, body: bytes, *, timeout_s: float = TIMEOUT_S, **options: Any) -> bytes:
        """One unary call by full path."""
        try:
            reply: bytes = self.channel.unary_unary(method)(body, timeout=timeout_s, **options)
        except grpc.RpcError as error:
            raise RefusedError(error.code().name, error.details() or "") from None
        return reply

    def call(self, method: str, request: Any, *, timeout_s: float = TIMEOUT_S) -> Any:
        """One unary call; the reply's type follows from the method's name."""
        reply = self.call_bytes(SERVICE + method, request.SerializeToString(), timeout_s=timeout_s)
        return getattr(pb, f"{method}Response").FromString(reply)

    def extensions(self) -> set[str]:
        return set(self.call("ServerMetadata", pb.ServerMetadataRequest()).extensions)

    def server_metadata(self) -> dict[str, Any]:
        found = self.call("ServerMetadata", pb.ServerMetadataRequest())
        return {"name": found.name, "version": found.version, "extensions": list(found.extensions)}

    def model_metadata(self, model: str, version: str = "") -> dict[str, Any]:
        found = self.call("ModelMetadata", pb.ModelMetadataRequest(name=model, version=version))
        tensors = {
            side: [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in getattr(found, side)]
            for side in ("inputs", "outputs")
        }
        plain = {"name": found.name, "versions": list(found.versions), "platform": found.platform}
        return plain | tensors | {"properties": dict(found.properties)}

    def is_model_ready(self, model: str, version: str = "") -> bool:
        return bool(self.call("ModelReady", pb.ModelReadyRequest(name=model, version=version)).ready)

    def config(self, model: str) -> dict[str, Any]:
        config = self.call("ModelConfig", pb.ModelConfigRequest(name=model)).config
        kinds = pb.DataType
        return {
            "name": config.name,
            "max_batch_size": config.max_batch_size,
            "input": [
                {"name": t.name, "data_type": kinds.Name(t.data_type), "dims": list(t.dims)} for t in config.input
            ],
            "output": [
                {"name": t.name, "data_type": kinds.Name(t.data_type), "dims": list(t.dims)} for t in config.output
            ],
        }

    def statistics(self, model: str = "", version: str = "") -> list[dict[str, Any]]:
        reply = self.call("ModelStatistics", pb.ModelStatisticsRequest(name=model, version=version))
        return [
            {
                "name": entry.name,
                "version": entry.version,
                "last_inference": entry.last_inference,
                "inference_count": entry.inference_count,
                "execution_count": entry.execution_count,
                "inference_stats": {
                    name: {
                        "count": getattr(entry.inference_stats, name).count,
                        "ns": getattr(entry.inference_stats, name).ns,
                    }
                    for name in ("success", "fail", "queue", "compute_infer")
                },
            }
            for entry in reply.model_stats
        ]

    def index(self, *, ready: bool = False) -> list[dict[str, str]]:
        reply = self.call("RepositoryIndex", pb.RepositoryIndexRequest(ready=ready))
        return [{"name": m.name, "version": m.version, "state": m.state} for m in reply.models]

    def request(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = "",
        request_id: str = "",
        outputs: Sequence[str] = (),
        parameters: Mapping[str, Any] | None = None,
        typed: bool = False,
    ) -> pb.ModelInferRequest:
        """A request to change or send."""
        message = pb.ModelInferRequest(model_name=model, model_version=version, id=request_id)
        for name, tensor in inputs.items():
            entry = message.inputs.add(name=name, datatype=tensor.datatype, shape=tensor.shape)
            if typed:
                getattr(entry.contents, TYPED_FIELDS[tensor.datatype]).extend(tensor.values())
            else:
                message.raw_input_contents.append(tensor.raw)
        for name in outputs:
            message.outputs.add(name=name)
        for name, value in (parameters or {}).items():
            set_parameter(message.parameters[name], value)
        return message

    def infer(self, model: str, inputs: Inputs, *, timeout_s: float = TIMEOUT_S, **options: Any) -> Answer:
        return self.send(self.request(model, inputs, **options), timeout_s=timeout_s)

    def send(self, request: pb.ModelInferRequest, *, timeout_s: float = TIMEOUT_S) -> Answer:
        """One prepared request."""
        return read_grpc(self.call("ModelInfer", request, timeout_s=timeout_s))


def set_parameter(entry: Any, value: Any) -> None:
    """Fill an InferParameter by the value's type."""
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    setattr(entry, kinds[type(value)], value)


def read_grpc(reply: Any) -> Answer:
    """An answer from its message; raw and typed contents are equally allowed."""
    outputs: dict[str, Tensor] = {}
    raw = list(reply.raw_output_contents)
    expect(len(raw) in (0, len(reply.outputs)), f"{len(raw)} raw contents for {len(reply.outputs)} outputs")
    for index, entry in enumerate(reply.outputs):
        if raw:
            outputs[entry.name] = Tensor(entry.datatype, tuple(entry.shape), raw[index])
        else:
            expect(entry.datatype in TYPED_FIELDS, f"{entry.datatype} has no typed contents; it must come raw")
            values = getattr(entry.contents, TYPED_FIELDS[entry.datatype])
            outputs[entry.name] = make(entry.datatype, tuple(entry.shape), list(values))
    parameters = {
        name: getattr(p, p.WhichOneof("parameter_choice") or "string_param") for name, p in reply.parameters.items()
    }
    return Answer(reply.model_name, reply.model_version, reply.id, outputs, parameters=parameters)


@dataclass(frozen=True)
class HttpAnswer:
    """One HTTP exchange; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body; nonconforming if it is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise NonconformingError(f"status {self.status} with a body that is no JSON: {self.body[:80]!r}") from None


class Rest:
    """The protocol over HTTP/1.1."""

    transport = REST

    def __init__(self, url: str) -> None:
        self.address = urllib.parse.urlsplit(url).netloc

    def close(self) -> None:
        """Nothing is kept open."""

    def http(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None,
        *, timeout_s: float = TIMEOUT_S,
    ) -> HttpAnswer:  # fmt: skip
        """One exchange on a connection of its own."""
        connection = http.client.HTTPConnection(self.address, timeout=timeout_s)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            fields = {name.lower(): value for name, value in response.getheaders()}
            return HttpAnswer(response.status, fields, response.read())
        finally:
            connection.close()

    def call(self, method: str, path: str, value: Any = None) -> Any:
        """One exchange in JSON; any status but 2xx raises `RefusedError`."""
        body = None if value is None else json.dumps(value).encode()
        return require_ok(self.http(method, path, body, {"Content-Type": "application/json"} if body else {})).json()

    def extensions(self) -> set[str]:
        return set(self.server_metadata()["extensions"])

    def server_metadata(self) -> dict[str, Any]:
        return self.call("GET", "/v2")

    def model_metadata(self, model: str, version: str = "") -> dict[str, Any]:
        return self.call("GET", path_of(model, version))

    def is_model_ready(self, model: str, version: str = "") -> bool:
        answer = self.http("GET", path_of(model, version) + "/ready")
        if not 200 <= answer.status < 300:
            return False
        return bool(answer.json().get("ready", True)) if answer.body else True

    def config(self, model: str) -> dict[str, Any]:
        return self.call("GET", path_of(model) + "/config")

    def statistics(self, model: str = "", version: str = "") -> list[dict[str, Any]]:
        path = path_of(model, version) + "/stats" if model else "/v2/models/stats"
        return self.call("GET", path)["model_stats"]

    def index(self, *, ready: bool = False) -> list[dict[str, str]]:
        return self.call("POST", "/v2/repository/index", {"ready": ready})

    def request(
        self,
        inputs: Inputs,
        *,
        request_id: str = "",
        outputs: Sequence[str] = (),
        parameters: Mapping[str, Any] | None = None,
        binary: bool | Sequence[str] = False,
        binary_outputs: Mapping[str, bool] | None = None,
    ) -> tuple[dict[str, Any], bytes]:
        """The JSON to change or send, and the binary data behind it. `binary`: which inputs go there."""
        entries, data = [], b""
        for name, tensor in inputs.items():
            entry: dict[str, Any] = {"name": name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
            if binary is True or (binary and name in binary):
                entry["parameters"] = {"binary_data_size": len(tensor.raw)}
                data += tensor.raw
            else:
                entry["data"] = tensor.json_values()
            entries.append(entry)
        message: dict[str, Any] = {"inputs": entries}
        if request_id:
            message["id"] = request_id
        if parameters:
            message["parameters"] = dict(parameters)
        if outputs:
            message["outputs"] = [{"name": name} for name in outputs]
        if binary_outputs is not None:
            message["outputs"] = [
                {"name": name, "parameters": {"binary_data": wanted}} for name, wanted in binary_outputs.items()
            ]
        return message, data

    def infer(
        self, model: str, inputs: Inputs, *, version: str = "", timeout_s: float = TIMEOUT_S, **options: Any
    ) -> Answer:
        return self.send(model, *self.request(inputs, **options), version=version, timeout_s=timeout_s)

    def send(
        self, model: str, message: dict[str, Any], data: bytes = b"", *, version: str = "",
        timeout_s: float = TIMEOUT_S, json_size: int | None = None,
    ) -> Answer:  # fmt: skip
        """One prepared request; binary data makes it one of the binary tensor extension."""
        body = json.dumps(message).encode()
        headers = {"Content-Type": "application/json"}
        if data or json_size is not None:
            headers = {"Content-Type": "application/octet-stream", JSON_SIZE: str(json_size or len(body))}
        path = path_of(model, version) + "/infer"
        return read_rest(require_ok(self.http("POST", path, body + data, headers, timeout_s=timeout_s)))


def path_of(model: str, version: str = "") -> str:
    """A model's path, with its version if one is named."""
    path = "/v2/models/" + urllib.parse.quote(model, safe="")
    return f"{path}/versions/{urllib.parse.quote(version, safe='')}" if version else path


def require_ok(answer: HttpAnswer) -> HttpAnswer:
    """The answer, or the refusal that it is; the protocol wants `{"error": text}` in its body."""
    if 200 <= answer.status < 300:
        return answer
    try:
        text = json.loads(answer.body)["error"]
    except (ValueError, KeyError, TypeError):
        text = ""
    raise RefusedError(str(answer.status), text if isinstance(text, str) else "")


def read_rest(answer: HttpAnswer) -> Answer:
    """An answer from its body: JSON, with binary data behind it if the header says so."""
    size = answer.headers.get(JSON_SIZE.lower())
    head, rest = (answer.body[: int(size)], answer.body[int(size) :]) if size else (answer.body, b"")
    message = HttpAnswer(answer.status, answer.headers, head).json()
    outputs, binary = {}, set()
    for entry in message["outputs"]:
        name, shape = entry["name"], tuple(entry["shape"])
        length = entry.get("parameters", {}).get("binary_data_size")
        if length is None:
            outputs[name] = make(entry["datatype"], shape, _flatten(entry["data"]))
        else:
            binary.add(name)
            expect(length <= len(rest), f"output {name} announces {length} bytes of binary data, {len(rest)} are left")
            outputs[name], rest = Tensor(entry["datatype"], shape, rest[:length]), rest[length:]
    expect(not rest, f"{len(rest)} bytes of binary data belong to no output")
    found = message.get("id") or "", message.get("parameters") or {}
    version = message.get("model_version") or ""
    return Answer(message["model_name"], version, found[0], outputs, frozenset(binary), found[1])


def _flatten(data: Any) -> list[Any]:
    if not isinstance(data, list):
        return [data]
    return [leaf for item in data for leaf in _flatten(item)]
