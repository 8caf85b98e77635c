"""Requests that make no sense get one clear error over every transport, and the next good one is answered."""

from __future__ import annotations

import http.client
import json
import queue
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import grpc
import numpy as np
import pytest

from nearcast.transport.mqtt.status import STATUS
from nearcast.wire.request import TensorRequest
from nearcast.wire.v1 import oip_pb2
from tests.e2e.fleet import ask_http, image, image_json
from tests.integration.mqtt_parts import Device, user_of

INFER = "/inference.GRPCInferenceService/ModelInfer"
TIMEOUT_S = 30.0
HUGE = 100_000_000
GOOD = TensorRequest(model="digits", inputs={"image": image(7)}).encode()


@dataclass(frozen=True)
class Bad:
    """A request that makes no sense: as protobuf, as path and body of REST, and what the answer must say."""

    model: str
    protobuf: bytes
    path: str
    body: bytes
    code: str
    grpc: int
    http: int
    words: tuple[str, ...]


def bad(model: str, array: np.ndarray, datatype: str, version: str = "", **expected) -> Bad:
    request = TensorRequest(model=model, version=version, inputs={"image": array})
    tensor = {"name": "image", "datatype": datatype, "shape": list(array.shape), "data": array.reshape(-1).tolist()}
    path = f"/v2/models/{model}{f'/versions/{version}' if version else ''}/infer"
    return Bad(model, request.encode(), path, json.dumps({"inputs": [tensor]}).encode(), **expected)


ARGUMENT = {"code": "INVALID_REQUEST", "grpc": 3, "http": 400}
BAD = {
    "unknown model": bad(
        "nothere", image(1), "FP32", code="MODEL_NOT_FOUND", grpc=5, http=404, words=("nothere", "digits", "magika")
    ),
    "unknown version": bad(
        "digits", image(1), "FP32", "99", code="VERSION_MISMATCH", grpc=9, http=412, words=("digits", "99", "1")
    ),
    "wrong shape": bad("digits", image(1)[:, :3], "FP32", **ARGUMENT, words=("image", "[-1, 64]", "[1, 3]")),
    "wrong dtype": bad("digits", image(1).astype("i4"), "INT32", **ARGUMENT, words=("image", "FP32", "INT32")),
    "truncated": Bad(
        "digits", GOOD[:-9], "/v2/models/digits/infer", json.dumps(image_json(1)).encode()[:-9], **ARGUMENT, words=()
    ),
}
each_bad = pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
each_node = pytest.mark.parametrize("node", ["edge-1", "router-1"])


@contextmanager
def grpc_call(fleet, node: str) -> Iterator[grpc.UnaryUnaryMultiCallable]:
    """Raw bytes over grpcio."""
    with grpc.insecure_channel(fleet.address(node), [("grpc.max_send_message_length", -1)]) as channel:
        yield channel.unary_unary(INFER)


def require_seven(body: bytes) -> None:
    answer = oip_pb2.ModelInferResponse.FromString(body)
    assert int(np.frombuffer(answer.raw_output_contents[0], "<f4").argmax()) == 7


@each_node
@each_bad
def test_over_grpc(fleet, node, bad):
    pid = fleet.mesh.pid(node)
    with grpc_call(fleet, node) as call:
        with pytest.raises(grpc.RpcError) as refused:
            call(bad.protobuf, timeout=TIMEOUT_S)
        require_seven(call(GOOD, timeout=TIMEOUT_S))
    assert refused.value.code().value[0] == bad.grpc
    assert dict(refused.value.trailing_metadata())["nc-code"] == bad.code
    require_clear(refused.value.details(), bad)
    assert fleet.mesh.pid(node) == pid


@each_node
@each_bad
def test_over_http(fleet, node, bad):
    base = f"http://{fleet.address(node, 'http')}"
    said = ask_http(base + bad.path, bad.body)
    assert (said.status, said.headers["nc-code"]) == (bad.http, bad.code)
    require_clear(said.body["error"], bad)
    assert ask_http(f"{base}/v2/models/digits/infer", json.dumps(image_json(7)).encode()).status == 200


def test_over_mqtt_and_nothing_good_between_is_lost(fleet):
    """Each bad request between two good ones: one answer for each of them."""
    port = int(fleet.address("edge-1", "mqtt").rpartition(":")[2])
    with Device(port, "clumsy") as device:
        sent: dict[bytes, Bad | None] = {}
        for bad in BAD.values():
            model = f"{bad.model}@99" if "/versions/" in bad.path else bad.model
            sent[device.ask(GOOD, model="digits", content_type="application/x-protobuf")] = None
            sent[device.ask(bad.protobuf, model=model, content_type="application/x-protobuf")] = bad
        sent[device.ask(GOOD, model="digits", content_type="application/x-protobuf")] = None
        replies = [device.reply() for _ in sent]
        with pytest.raises(queue.Empty):
            device.reply(timeout_s=0.2)
    assert {reply.properties.CorrelationData for reply in replies} == set(sent)
    for reply in replies:
        bad, user = sent[reply.properties.CorrelationData], user_of(reply)
        if bad is None:
            assert user["status"] == "200", user
            require_seven(reply.payload)
        else:
            assert (user["status"], user["code"]) == (str(STATUS[bad.code]), bad.code)
            require_clear(user["status-message"], bad)


def require_clear(text: str, bad: Bad) -> None:
    """One sentence that names what was wrong, and no traceback or path."""
    assert all(word in text for word in bad.words), text
    assert 15 <= len(text) <= 300, text
    assert "Traceback" not in text
    assert "/" not in text.replace("application/json", ""), text


@each_node
def test_a_hundred_megabytes_over_grpc(fleet, node):
    request = TensorRequest(model="digits", inputs={"image": np.zeros((HUGE // 256, 64), np.float32)}).encode()
    pid = fleet.mesh.pid(node)
    with grpc_call(fleet, node) as call:
        require_seven(call(GOOD, timeout=TIMEOUT_S))
        with pytest.raises(grpc.RpcError) as refused:
            call(request, timeout=TIMEOUT_S)
        require_seven(call(GOOD, timeout=TIMEOUT_S))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, refused.value
    assert dict(refused.value.trailing_metadata())["nc-code"] == "TOO_LARGE"
    assert "67108864" in refused.value.details()
    assert fleet.mesh.pid(node) == pid


@each_node
@pytest.mark.parametrize("stated", [True, False], ids=["with its length", "chunked"])
def test_a_hundred_megabytes_over_http(fleet, node, stated):
    host, _, port = fleet.address(node, "http").rpartition(":")
    block = bytes(1_000_000)
    connection = http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_S)
    headers = {"content-type": "application/json", **({"content-length": str(HUGE)} if stated else {})}
    blocks = (block for _ in range(HUGE // len(block)))
    with suppress(BrokenPipeError, ConnectionResetError):  # it refuses before it has read all; its answer is there
        connection.request("POST", "/v2/models/digits/infer", blocks, headers, encode_chunked=not stated)
    response = connection.getresponse()
    said = json.loads(response.read())
    connection.close()
    assert response.status == 413
    assert response.getheader("nc-code") == "TOO_LARGE"
    assert "67108864" in said["error"]
    good = ask_http(f"http://{host}:{port}/v2/models/digits/infer", json.dumps(image_json(7)).encode())
    assert good.status == 200


def test_too_much_over_mqtt(fleet):
    """What the worker does not take is answered; what not even the broker takes ends the connection with a reason."""
    port = int(fleet.address("edge-1", "mqtt").rpartition(":")[2])
    with Device(port, "greedy") as device:
        reasons: queue.Queue[str] = queue.Queue()
        device.client.on_disconnect = lambda _c, _u, _f, reason, _p: reasons.put(str(reason))
        device.ask(bytes(8 * 1024 * 1024 + 1), model="digits")
        user = user_of(device.reply())
        assert (user["status"], user["code"]) == ("413", "TOO_LARGE")
        assert "8388608" in user["status-message"]
        device.client.publish("nc/v1/local/greedy/up/infer/digits", bytes(HUGE), 0)
        assert reasons.get(timeout=TIMEOUT_S) in ("Packet too large", "Unspecified error")
        device._subscribed.get(timeout=TIMEOUT_S)
        device.ask(GOOD, model="digits", content_type="application/x-protobuf")
        require_seven(device.reply().payload)
