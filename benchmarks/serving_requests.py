"""What is sent to a server, and whether its answers are the engine's."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np

from benchmarks.serving_load import Request
from benchmarks.serving_models import Arrays, Workload
from benchmarks.serving_peers import Candidate
from nearcast.serving.engines import LoadedModel
from nearcast.wire.request import TensorRequest
from nearcast.wire.tensors import datatype_of
from nearcast.wire.v1.oip_pb2 import ModelInferResponse

INFER = "/inference.GRPCInferenceService/ModelInfer"
JSON_SIZE = "Inference-Header-Content-Length"
AT_ONCE = 16
TIMEOUT_S = 60.0


class WrongAnswerError(Exception):
    """A server that answers otherwise than the engine is no row."""


def prepare(
    workload: Workload, engine: LoadedModel, candidate: Candidate, places: Mapping[str, Any], transport: str
) -> Request:
    """Check a server's answers over one transport and give the request to load it with.

    Raises:
        WrongAnswerError: naming the output that differs.
    """
    if transport == "grpc":
        return _prepare_grpc(workload, engine, candidate, str(places["grpc"]))
    return _prepare_rest(workload, engine, candidate, str(places["rest"]))


def _prepare_grpc(workload: Workload, engine: LoadedModel, candidate: Candidate, address: str) -> Request:
    bodies = [_message(workload, candidate, seed) for seed in range(AT_ONCE)]
    with grpc.insecure_channel(address) as channel:
        method: Any = channel.unary_unary(INFER)
        alone = [method(body, timeout=TIMEOUT_S) for body in bodies[:1]]
        futures = [method.future(body, timeout=TIMEOUT_S) for body in bodies]
        replies = [future.result() for future in futures]
    for seed, reply in enumerate([*alone, *replies]):
        compare(workload, engine, candidate, max(0, seed - len(alone)), _decode(reply))
    message = bodies[0]
    return Request(
        url=f"http://{address}{INFER}",
        body=b"\0" + len(message).to_bytes(4, "big") + message,
        headers={"content-type": "application/grpc", "te": "trailers"},
        http1=False,
        answer_bytes=len(alone[0]) + 5,
    )


def _prepare_rest(workload: Workload, engine: LoadedModel, candidate: Candidate, url: str) -> Request:
    arrays = _placed(workload, candidate, workload.arrays(0))
    body, headers = _binary(arrays) if candidate.binary_rest else _json(arrays)
    path = f"/v2/models/{workload.name}/infer"
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=TIMEOUT_S)
    try:
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        answer = response.read()
        size = int(response.getheader(JSON_SIZE) or len(answer))
    finally:
        connection.close()
    if response.status != 200:
        raise WrongAnswerError(f"{candidate.server} answers {response.status}: {answer[:200]!r}")
    compare(workload, engine, candidate, 0, _read_rest(answer, size))
    return Request(url=url + path, body=body, headers=headers, http1=True, answer_bytes=int(0.9 * len(answer)))


def compare(
    workload: Workload, engine: LoadedModel, candidate: Candidate, seed: int, found: Mapping[str, np.ndarray]
) -> None:
    """Raise unless every output is the engine's for the same request; a larger batch may round otherwise."""
    wanted = _placed(workload, candidate, dict(engine.run(workload.arrays(seed))))
    for name, array in wanted.items():
        if name not in found or not np.allclose(found[name], array, rtol=1e-3, atol=1e-4):
            raise WrongAnswerError(
                f"{candidate.server} ({candidate.setting}) answers {name} differently from the engine."
            )


def _placed(workload: Workload, candidate: Candidate, arrays: Arrays) -> Arrays:
    """The tensors as this server takes and gives them."""
    if not candidate.batch_first:
        return arrays
    axes = {tensor.name: tensor.batch_axis or 0 for tensor in (*workload.inputs, *workload.outputs)}
    return {name: np.ascontiguousarray(np.moveaxis(array, axes[name], 0)) for name, array in arrays.items()}


def _message(workload: Workload, candidate: Candidate, seed: int) -> bytes:
    inputs = _placed(workload, candidate, workload.arrays(seed))
    return TensorRequest(model=workload.name, inputs=inputs).encode()


def _decode(reply: bytes) -> dict[str, np.ndarray]:
    message = ModelInferResponse.FromString(reply)
    pairs = zip(message.outputs, message.raw_output_contents, strict=True)
    return {output.name: np.frombuffer(raw, np.float32).reshape(tuple(output.shape)) for output, raw in pairs}


def _binary(arrays: Arrays) -> tuple[bytes, dict[str, str]]:
    entries = [
        _entry(name, array) | {"parameters": {"binary_data_size": array.nbytes}} for name, array in arrays.items()
    ]
    head = json.dumps({"inputs": entries, "parameters": {"binary_data_output": True}}).encode()
    data = b"".join(array.tobytes() for array in arrays.values())
    return head + data, {"content-type": "application/octet-stream", JSON_SIZE: str(len(head))}


def _json(arrays: Arrays) -> tuple[bytes, dict[str, str]]:
    entries = [_entry(name, array) | {"data": array.reshape(-1).tolist()} for name, array in arrays.items()]
    return json.dumps({"inputs": entries}).encode(), {"content-type": "application/json"}


def _entry(name: str, array: np.ndarray) -> dict[str, Any]:
    return {"name": name, "datatype": datatype_of(array.dtype), "shape": array.shape}


def _read_rest(body: bytes, json_size: int) -> dict[str, np.ndarray]:
    message, at, found = json.loads(body[:json_size]), json_size, {}
    for entry in message["outputs"]:
        size = entry.get("parameters", {}).get("binary_data_size")
        if size is None:
            array = np.array(entry["data"], np.float32)
        else:
            array, at = np.frombuffer(body[at : at + size], np.float32), at + size
        found[entry["name"]] = array.reshape(entry["shape"])
    return found
