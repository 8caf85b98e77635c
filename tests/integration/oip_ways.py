"""The same calls over gRPC and REST, as tritonclient makes them, so that one test can check both transports."""

from __future__ import annotations

import json
import urllib.parse
from typing import Any

import aiohttp
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
from google.protobuf.json_format import MessageToDict
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from nearcast.handler import InferenceHandler, ModelDirectory
from nearcast.identity import Identity, server_tls
from nearcast.transport.grpc import make_server
from nearcast.transport.oip import oip_methods
from nearcast.transport.rest import RestServer
from nearcast.transport.service import InferenceService

WAYS = ("ngh2", "grpcio", "rest")


class Refused(Exception):
    """What the server said no with: gRPC's status name or HTTP's number, and its text."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status
        self.text = text


def make_listener(way: str, handler: InferenceHandler, directory: ModelDirectory, address: str, **more: Any) -> Any:
    """A server of one kind that is not started yet. `identity` puts it behind TLS."""
    identity: Identity | None = more.pop("identity", None)
    if way == "rest":
        tls = None if identity is None else server_tls(identity, require_client=False, alpn=["http/1.1"])
        return RestServer(InferenceService(handler, directory, server_name="test-1", **more), address=address, tls=tls)
    methods = oip_methods(InferenceService(handler, directory, server_name="test-1", **more), trusted=False)
    return make_server(way, methods, address=address, identity=identity)


def make_client(way: str, address: str) -> GrpcWay | RestWay:
    return RestWay(address) if way == "rest" else GrpcWay(address)


def _inputs(module: Any, tensors: dict[str, Any]) -> list[Any]:
    """Arrays, or (datatype, shape, region, size, offset) for tensors in shared memory."""
    out = []
    for name, value in tensors.items():
        if isinstance(value, tuple):
            datatype, shape, region, size, offset = value
            one = module.InferInput(name, shape, datatype)
            one.set_shared_memory(region, size, offset)
        else:
            one = module.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
            one.set_data_from_numpy(value)
        out.append(one)
    return out


def _outputs(module: Any, wanted: dict[str, Any] | None) -> list[Any] | None:
    """Per name: None, a number of classes, or (region, size, offset)."""
    if wanted is None:
        return None
    out = []
    for name, form in wanted.items():
        one = module.InferRequestedOutput(name, **({"class_count": form} if isinstance(form, int) else {}))
        if isinstance(form, tuple):
            one.set_shared_memory(*form)
        out.append(one)
    return out


class GrpcWay:
    """tritonclient's gRPC client."""

    def __init__(self, address: str) -> None:
        self._client = triton_grpc_aio.InferenceServerClient(address)

    async def close(self) -> None:
        await self._client.close()

    async def _ask(self, name: str, *arguments: Any, **more: Any) -> Any:
        try:
            return await getattr(self._client, name)(*arguments, **more)
        except InferenceServerException as error:
            raise Refused(error.status().removeprefix("StatusCode."), error.message()) from error

    async def _told(self, name: str, *arguments: Any, **more: Any) -> Any:
        message = await self._ask(name, *arguments, **more)
        return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)

    async def infer(
        self, model: str, tensors: dict[str, Any], wanted: dict[str, Any] | None = None, **more: Any
    ) -> Any:
        return await self._ask(
            "infer", model, _inputs(triton_grpc, tensors), outputs=_outputs(triton_grpc, wanted), **more
        )

    async def server(self) -> Any:
        return await self._told("get_server_metadata")

    async def metadata(self, model: str, version: str = "") -> Any:
        return _numbers(await self._told("get_model_metadata", model, version))

    async def config(self, model: str, version: str = "") -> Any:
        return _numbers((await self._told("get_model_config", model, version))["config"])

    async def statistics(self, model: str = "", version: str = "") -> Any:
        return _numbers((await self._told("get_inference_statistics", model, version))["model_stats"])

    async def index(self) -> Any:
        return (await self._told("get_model_repository_index"))["models"]

    async def load(self, model: str, **more: Any) -> None:
        await self._ask("load_model", model, **more)

    async def unload(self, model: str) -> None:
        await self._ask("unload_model", model)

    async def register(self, name: str, key: str, size: int, offset: int = 0) -> None:
        await self._ask("register_system_shared_memory", name, key, size, offset)

    async def unregister(self, name: str = "") -> None:
        await self._ask("unregister_system_shared_memory", name)

    async def regions(self, name: str = "") -> Any:
        found = _numbers(await self._told("get_system_shared_memory_status", name))["regions"]
        return sorted(found.values(), key=lambda region: region["name"])


class RestWay:
    """tritonclient's HTTP bodies over aiohttp, because its own client knows no Unix sockets."""

    def __init__(self, address: str) -> None:
        path = address.removeprefix("unix:")
        connector = aiohttp.UnixConnector(path) if path != address else None
        base = "http://localhost" if connector else f"http://{address}"
        self._session = aiohttp.ClientSession(base, connector=connector)

    async def close(self) -> None:
        await self._session.close()

    async def _ask(self, method: str, path: str, **more: Any) -> Any:
        async with self._session.request(method, path, **more) as answer:
            body = await answer.read()
            if answer.status >= 400:
                raise Refused(str(answer.status), json.loads(body)["error"])
            return body, answer.headers

    async def _told(self, method: str, path: str, **more: Any) -> Any:
        return json.loads((await self._ask(method, path, **more))[0])

    async def infer(
        self,
        model: str,
        tensors: dict[str, Any],
        wanted: dict[str, Any] | None = None,
        model_version: str = "",
        **more: Any,
    ) -> Any:
        body, size = triton_http.InferenceServerClient.generate_request_body(
            _inputs(triton_http, tensors), outputs=_outputs(triton_http, wanted), **more
        )
        headers = {"Inference-Header-Content-Length": str(size)} if size is not None else {}
        path = f"/v2/models/{model}/versions/{model_version}" if model_version else f"/v2/models/{model}"
        answer, told = await self._ask("POST", path + "/infer", data=body, headers=headers)
        length = told.get("Inference-Header-Content-Length")
        return triton_http.InferenceServerClient.parse_response_body(
            answer, header_length=None if length is None else int(length)
        )

    def _model(self, model: str, version: str) -> str:
        return f"/v2/models/{model}" + (f"/versions/{version}" if version else "")

    async def server(self) -> Any:
        return await self._told("GET", "/v2")

    async def metadata(self, model: str, version: str = "") -> Any:
        return await self._told("GET", self._model(model, version))

    async def config(self, model: str, version: str = "") -> Any:
        return await self._told("GET", self._model(model, version) + "/config")

    async def statistics(self, model: str = "", version: str = "") -> Any:
        path = self._model(model, version) if model else "/v2/models"
        return (await self._told("GET", path + "/stats"))["model_stats"]

    async def index(self) -> Any:
        return await self._told("POST", "/v2/repository/index")

    async def load(self, model: str, **parameters: Any) -> None:
        await self._ask("POST", f"/v2/repository/models/{model}/load", json={"parameters": parameters})

    async def unload(self, model: str) -> None:
        body = {"parameters": {"unload_dependents": False}}
        await self._ask("POST", f"/v2/repository/models/{model}/unload", json=body)

    async def register(self, name: str, key: str, size: int, offset: int = 0) -> None:
        path = f"/v2/systemsharedmemory/region/{urllib.parse.quote(name)}/register"
        await self._ask("POST", path, json={"key": key, "offset": offset, "byte_size": size})

    async def unregister(self, name: str = "") -> None:
        await self._ask("POST", f"/v2/systemsharedmemory{f'/region/{name}' if name else ''}/unregister")

    async def regions(self, name: str = "") -> Any:
        found = await self._told("GET", f"/v2/systemsharedmemory{f'/region/{name}' if name else ''}/status")
        return sorted(found, key=lambda region: region["name"])


def shape_of(result: Any, name: str) -> list[int]:
    """The shape of an output of either client's result."""
    output = result.get_output(name)
    return output["shape"] if isinstance(output, dict) else list(output.shape)


def _numbers(value: Any) -> Any:
    """Protobuf's JSON writes 64-bit numbers as text; Triton's REST writes numbers."""
    if isinstance(value, dict):
        return {
            key: _numbers(each) if key not in ("string_value", "name", "versions", "version") else each
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return int(value) if isinstance(value, str) and value.lstrip("-").isdecimal() else value
