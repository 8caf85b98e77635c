"""`nearcast infer`: one request over any transport."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nearcast.cli.listing import json_option, print_table
from nearcast.errors import Code, MeshError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nearcast.handler import ModelMetadata, Parameter

INPUT_SIZE_BYTES_MAX = 64 * 1024 * 1024
SHOWN_ELEMENTS_MAX = 16
FILE_INPUT = "=@"
"""Marks an input whose name is the model's to say."""
GRPC_PORT, HTTP_SCHEMES, MQTT_SCHEMES = 8001, ("http", "https"), ("mqtt", "mqtts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back, whatever the transport."""

    model: str
    version: str
    outputs: Mapping[str, npt.NDArray[Any]]
    served_by: str = ""
    tier: str = ""
    latency_ms: float = 0.0


@click.command()
@click.argument("model")
@click.argument("inputs", nargs=-1, metavar="[INPUT]...")
@click.option(
    "--file",
    "files",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    multiple=True,
    help="Send this file, such as a photograph, as it is to a model that takes one; repeatable.",
)
@click.option(
    "--url", default=f"grpc://127.0.0.1:{GRPC_PORT}", show_default=True, help="grpc://, http(s):// or mqtt(s)://."
)
@click.option("--identity", type=click.Path(path_type=Path), help="Ask over MQTT as the device with this identity.")
@click.option("--version", "release", default="", help="A release or a semver; empty = what the channel serves.")
@click.option("--deadline-ms", type=click.FloatRange(min=0, min_open=True), default=10_000.0, show_default=True)
@click.option("--parameter", "parameters", multiple=True, metavar="NAME=JSON", help="A request parameter; repeatable.")
@json_option
def command(
    model: str,
    inputs: tuple[str, ...],
    files: tuple[Path, ...],
    url: str,
    identity: Path | None,
    release: str,
    deadline_ms: float,
    parameters: tuple[str, ...],
    as_json: bool,
) -> None:
    """Send one request to MODEL and print the answer.

    INPUT is one of

    \b
      name=@file.npy              a NumPy file
      name=@file.bin:FP32:1,64    raw little-endian bytes with datatype and shape
      name=@photo.jpg:BYTES       a file as it is, as one element
      name=[[1, 2], [3, 4]]       JSON; the model says the datatype (not over MQTT)

    URL is grpc://host:port, http://host:port or mqtt://host:port/tenant/device; --identity knows its broker.
    """  # noqa: D301 (click looks for a real backspace)
    if bool(inputs) is bool(files):
        raise click.UsageError("Give either INPUTs or --file.")
    inputs = inputs or tuple(f"{FILE_INPUT}{path}" for path in files)
    settings = dict(_split_parameter(text) for text in parameters)
    answer = asyncio.run(_ask(url, identity, model, release, inputs, settings, deadline_ms))
    if as_json:
        click.echo(json.dumps(_as_json(answer)))
    else:
        _print(answer)


async def _ask(
    url: str,
    identity: Path | None,
    model: str,
    release: str,
    inputs: tuple[str, ...],
    parameters: dict[str, Parameter],
    deadline_ms: float,
) -> Answer:
    scheme, _, place = url.partition("://")
    if not place:
        scheme, place = "grpc", url
    if identity is not None or scheme in MQTT_SCHEMES:
        return await _ask_mqtt(url, identity, model, release, inputs, parameters, deadline_ms)
    if scheme == "grpc":
        return await _ask_grpc(place, model, release, inputs, parameters, deadline_ms)
    if scheme in HTTP_SCHEMES:
        return await _ask_http(url.rstrip("/"), model, release, inputs, parameters, deadline_ms)
    raise MeshError(Code.INVALID_REQUEST, f"{scheme!r} is no transport; use grpc://, http(s):// or mqtt(s)://.")


async def _ask_grpc(
    place: str, model: str, release: str, inputs: tuple[str, ...], parameters: dict[str, Parameter], deadline_ms: float
) -> Answer:
    from nearcast.handler import RequestContext
    from nearcast.transport.grpc import make_channel
    from nearcast.transport.remote import RemoteNode
    from nearcast.wire.request import TensorRequest

    node = RemoteNode(make_channel("ngh2", place))
    deadline = time.monotonic() + deadline_ms / 1e3
    try:
        metadata = await node.metadata(model, release, deadline=deadline) if _needs_metadata(inputs) else None
        request = TensorRequest(
            model=model, version=release, inputs=_read_inputs(inputs, metadata), parameters=parameters
        )
        started = time.monotonic()
        response = await node.infer(request, RequestContext(deadline=deadline))
        latency_ms = (time.monotonic() - started) * 1e3
    finally:
        await node.close()
    served = response.served
    return Answer(
        model=response.model,
        version=response.version or served.version,
        outputs=response.decode(),
        served_by=served.node,
        tier=served.tier,
        latency_ms=latency_ms,
    )


async def _ask_http(
    url: str, model: str, release: str, inputs: tuple[str, ...], parameters: dict[str, Parameter], deadline_ms: float
) -> Answer:
    import aiohttp

    base = f"{url}/v2/models/{model}" + (f"/versions/{release}" if release else "")
    from nearcast.wire.status import DEADLINE_MS

    try:
        timeout = aiohttp.ClientTimeout(total=deadline_ms / 1e3)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            metadata = None
            if _needs_metadata(inputs):
                async with session.get(base) as reply:
                    metadata = _metadata_of(await _json(reply))
            body, header = _http_body(_read_inputs(inputs, metadata), parameters)
            started = time.monotonic()
            headers = {DEADLINE_MS: f"{deadline_ms:g}", "content-type": "application/json"} | header
            async with session.post(f"{base}/infer", data=body, headers=headers) as reply:
                found = await _json(reply)
                latency_ms = (time.monotonic() - started) * 1e3
                said = reply.headers
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise MeshError(Code.UNAVAILABLE, f"{url} cannot be reached: {_reason(error)}.") from error
    return Answer(
        model=found["model_name"],
        version=found.get("model_version", ""),
        outputs=_json_outputs(found),
        served_by=said.get("nc-served-by", ""),
        tier=said.get("nc-tier", ""),
        latency_ms=latency_ms,
    )


def _reason(error: Exception) -> str:
    import aiohttp

    match error:
        case aiohttp.ClientConnectorError():
            return error.os_error.strerror or str(error.os_error)
        case aiohttp.ClientResponseError() if error.status == HTTPStatus.BAD_REQUEST:
            return "what listens there does not speak HTTP"
        case TimeoutError():
            return "no answer in time"
        case _:
            return str(error) or type(error).__name__


async def _ask_mqtt(
    url: str,
    identity: Path | None,
    model: str,
    release: str,
    inputs: tuple[str, ...],
    parameters: dict[str, Parameter],
    deadline_ms: float,
) -> Answer:
    from nearcast.cli.infer_mqtt import ask

    if _needs_metadata(inputs):
        raise MeshError(
            Code.INVALID_REQUEST,
            "Over MQTT nobody tells the datatype of JSON; use name=@file.npy or @file.bin:DTYPE:1,64.",
        )
    tensors = _read_inputs(inputs, None)
    answer = await ask(url, identity, model, tensors, version=release, parameters=parameters, deadline_ms=deadline_ms)
    return Answer(
        model=model,
        version=answer.version,
        outputs=answer.outputs,
        served_by=answer.served_by,
        tier=answer.tier,
        latency_ms=answer.latency_ms,
    )


# -- inputs -----------------------------------------------------------------------------------------------------------


def _needs_metadata(inputs: tuple[str, ...]) -> bool:
    return any(text.startswith(FILE_INPUT) or not text.partition("=")[2].startswith("@") for text in inputs)


def _read_inputs(inputs: tuple[str, ...], metadata: ModelMetadata | None) -> dict[str, npt.NDArray[np.generic]]:
    if inputs[0].startswith(FILE_INPUT):
        return _read_whole_files([Path(text.removeprefix(FILE_INPUT)) for text in inputs], metadata)
    out = {}
    for text in inputs:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise MeshError(Code.INVALID_REQUEST, f"{text[:80]!r} is no input; write name=@file.npy or name=JSON.")
        out[name] = _read_file(name, value[1:]) if value.startswith("@") else _read_json(name, value, metadata)
    return out


def _read_whole_files(paths: list[Path], metadata: ModelMetadata | None) -> dict[str, npt.NDArray[np.generic]]:
    names = [spec.name for spec in metadata.inputs if spec.datatype == "BYTES"] if metadata is not None else []
    if metadata is None or len(names) != 1 or len(metadata.inputs) != 1:
        raise MeshError(Code.INVALID_REQUEST, "The model does not take one file; name its inputs: name=@file:BYTES.")
    return {names[0]: _as_elements([_read_bytes(path) for path in paths])}


def _as_elements(contents: list[bytes]) -> npt.NDArray[np.generic]:
    import numpy as np

    array = np.empty(len(contents), dtype=object)
    array[:] = contents
    return array


def _read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > INPUT_SIZE_BYTES_MAX:
            raise MeshError(Code.TOO_LARGE, f"{path} is larger than {INPUT_SIZE_BYTES_MAX} bytes.")
        return path.read_bytes()
    except OSError as error:
        raise MeshError(Code.INVALID_REQUEST, f"{path} cannot be read: {error.strerror}.") from error


def _read_file(name: str, text: str) -> npt.NDArray[np.generic]:
    import numpy as np

    from nearcast.wire.tensors import from_raw

    path, _, described = text.partition(":")
    body = _read_bytes(Path(path))
    if not described:
        try:
            array: npt.NDArray[np.generic] = np.load(io.BytesIO(body), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise MeshError(Code.INVALID_REQUEST, f"{path} cannot be read: {error}.") from error
        return array
    if described.upper() == "BYTES":
        return _as_elements([body])
    datatype, _, sizes = described.partition(":")
    try:
        shape = tuple(int(size) for size in sizes.split(",")) if sizes else (len(body),)
    except ValueError as error:
        raise MeshError(Code.INVALID_REQUEST, f"{sizes!r} is no shape; write it as 1,64.") from error
    return from_raw(name, datatype.upper(), shape, body, 0, len(body))


def _read_json(name: str, text: str, metadata: ModelMetadata | None) -> npt.NDArray[np.generic]:
    import numpy as np

    from nearcast.wire.tensors import dtype_of, from_elements

    datatypes = {} if metadata is None else {spec.name: spec.datatype for spec in metadata.inputs}
    if name not in datatypes:
        raise MeshError(Code.INVALID_REQUEST, f"There is no input {name!r}; there are {', '.join(datatypes)}.")
    try:
        value = json.loads(text)
        shape = np.shape(np.asarray(value, dtype=object if datatypes[name] == "BYTES" else None))
        flat = np.asarray(value, dtype=object).reshape(-1).tolist()
    except ValueError as error:
        raise MeshError(Code.INVALID_REQUEST, f"The value of {name!r} is no JSON array: {error}.") from error
    dtype_of(datatypes[name])
    return from_elements(name, datatypes[name], shape, flat)


def _split_parameter(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


# -- JSON and people --------------------------------------------------------------------------------------------------


async def _json(reply: Any) -> dict[str, Any]:
    found = await reply.json(content_type=None)
    if reply.status >= 400:  # where HTTP's errors begin
        code = str(reply.headers.get("nc-code", ""))
        known = Code(code) if code in Code.__members__ else Code.UNAVAILABLE
        raise MeshError(known, str((found or {}).get("error", f"the server answered {reply.status}")))
    return dict(found)


def _metadata_of(found: Mapping[str, Any]) -> ModelMetadata:
    from nearcast.handler import ModelMetadata, TensorSpec

    specs = tuple(TensorSpec(each["name"], each["datatype"], tuple(each["shape"])) for each in found["inputs"])
    return ModelMetadata(name=found["name"], versions=(), platform="", inputs=specs, outputs=())


def _http_body(
    tensors: Mapping[str, npt.NDArray[Any]], parameters: Mapping[str, Parameter]
) -> tuple[bytes, dict[str, str]]:
    """A request's body and header fields: JSON, and behind it the BYTES tensors, whose contents are rarely text."""
    from nearcast.wire.tensors import to_raw

    described, behind = [], b""
    for name, array in tensors.items():
        if array.dtype.hasobject:
            raw = to_raw(array)
            behind += raw
            shape, sizes = list(array.shape), {"binary_data_size": len(raw)}
            described.append({"name": name, "datatype": "BYTES", "shape": shape, "parameters": sizes})
        else:
            described.append({"name": name, **_tensor(array)})
    head = json.dumps({"inputs": described, "parameters": dict(parameters)}).encode()
    return head + behind, {"inference-header-content-length": str(len(head))} if behind else {}


def _json_outputs(found: Mapping[str, Any]) -> dict[str, npt.NDArray[np.generic]]:
    from nearcast.wire.tensors import from_elements

    out = {}
    for each in found["outputs"]:
        elements = each["data"]
        if each["datatype"] == "BYTES":
            elements = [element.encode() for element in elements]
        out[each["name"]] = from_elements(each["name"], each["datatype"], tuple(each["shape"]), elements)
    return out


def _tensor(array: npt.NDArray[Any]) -> dict[str, Any]:
    from nearcast.wire.tensors import datatype_of

    data = [
        element.decode(errors="replace") if isinstance(element, bytes) else element
        for element in array.reshape(-1).tolist()
    ]
    return {"datatype": datatype_of(array.dtype), "shape": list(array.shape), "data": data}


def _as_json(answer: Answer) -> dict[str, Any]:
    return {
        "model_name": answer.model,
        "model_version": answer.version,
        "served_by": answer.served_by,
        "tier": answer.tier,
        "latency_ms": round(answer.latency_ms, 3),
        "outputs": [{"name": name, **_tensor(array)} for name, array in answer.outputs.items()],
    }


def _print(answer: Answer) -> None:
    rows = []
    for name, array in answer.outputs.items():
        tensor = _tensor(array)
        shown = ", ".join(_short(value) for value in tensor["data"][:SHOWN_ELEMENTS_MAX])
        more = f", … ({array.size} in all)" if array.size > SHOWN_ELEMENTS_MAX else ""
        rows.append([name, tensor["datatype"], ",".join(map(str, tensor["shape"])), shown + more])
    print_table(["output", "datatype", "shape", "data"], rows)
    place = " ".join(part for part in (answer.served_by, f"({answer.tier})" if answer.tier else "") if part)
    click.echo(f"{answer.model} version {answer.version}, {place or 'server'}, {answer.latency_ms:.1f} ms")


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
