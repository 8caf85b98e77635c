"""Clients that know nothing of us get right answers from a mesh: gRPC, HTTP, MQTT 5 (3.1.1: `test_mqtt_clients`)."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from nearcast.client import AsyncClient, Client
from nearcast.errors import Code, MeshError
from nearcast.wire.tensors import to_raw
from tests.e2e.fleet import EDGES, image, image_json, is_html, nearcast, page
from tests.integration.mqtt_parts import Device, user_of

TIMEOUT_S = 30.0
ALL_DIGITS = list(range(10))
ALL = np.concatenate([image(digit) for digit in ALL_DIGITS])


def port_of(fleet) -> int:
    return int(fleet.address("edge-1", "mqtt").rpartition(":")[2])


def digit_of(answer: dict) -> int:
    return int(np.argmax(answer["outputs"][0]["data"]))


@pytest.mark.parametrize("node", ["edge-1", "router-1"])
def test_tritonclient_over_grpc(fleet, node):
    import tritonclient.grpc as triton

    with triton.InferenceServerClient(fleet.address(node)) as client:
        assert client.is_server_live(client_timeout=TIMEOUT_S)
        assert client.is_model_ready("digits", client_timeout=TIMEOUT_S)
        metadata = client.get_model_metadata("digits", client_timeout=TIMEOUT_S)
        assert [(one.name, one.datatype, list(one.shape)) for one in metadata.inputs] == [("image", "FP32", [-1, 64])]
        batch = triton.InferInput("image", list(ALL.shape), "FP32")
        batch.set_data_from_numpy(ALL)
        wanted = [triton.InferRequestedOutput("probabilities")]
        result = client.infer("digits", [batch], outputs=wanted, request_id="ten", client_timeout=TIMEOUT_S)
        assert result.as_numpy("probabilities").argmax(axis=1).tolist() == ALL_DIGITS
        assert result.get_response().model_version == "1"
        assert result.get_response().id == "ten"
        bytes_ = triton.InferInput("bytes", [1, 2048], "INT32")
        bytes_.set_data_from_numpy(page())
        assert is_html(client.infer("magika", [bytes_], client_timeout=TIMEOUT_S).as_numpy("target_label"))


@pytest.mark.parametrize("node", ["edge-1", "router-1"])
def test_a_generic_client_with_nothing_but_the_address(fleet, node):
    """What grpcurl and the like do: the service and its messages come from the node's reflection."""
    with grpc.insecure_channel(fleet.address(node)) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName("inference.GRPCInferenceService").methods_by_name["ModelInfer"]
        request = GetMessageClass(method.input_type)(model_name="digits", raw_input_contents=[to_raw(ALL)])
        request.inputs.add(name="image", datatype="FP32", shape=ALL.shape)
        request.outputs.add(name="probabilities")
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        answer = call(request, timeout=TIMEOUT_S)
    probabilities = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(10, 10)
    assert probabilities.argmax(axis=1).tolist() == ALL_DIGITS


@pytest.mark.parametrize("node", ["edge-1", "router-1"])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_tritonclient_over_http(fleet, node, binary):
    import tritonclient.http as triton

    with triton.InferenceServerClient(
        fleet.address(node, "http"), connection_timeout=TIMEOUT_S, network_timeout=TIMEOUT_S
    ) as client:
        assert client.is_server_ready()
        assert "1" in client.get_model_metadata("digits")["versions"]
        batch = triton.InferInput("image", list(ALL.shape), "FP32")
        batch.set_data_from_numpy(ALL, binary_data=binary)
        wanted = [triton.InferRequestedOutput("probabilities", binary_data=binary)]
        result = client.infer("digits", [batch], outputs=wanted)
        assert result.as_numpy("probabilities").argmax(axis=1).tolist() == ALL_DIGITS


def test_curl(fleet):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    url = f"http://{fleet.address('edge-1', 'http')}/v2/models/digits/infer"
    body = json.dumps(image_json(3))
    command = ["curl", "-sS", "--max-time", "10", "-w", "%{stderr}%{http_code}", url, "-d", body]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    assert run.stderr == "200"
    assert digit_of(json.loads(run.stdout)) == 3


def test_paho_with_mqtt_5(fleet):
    with Device(port_of(fleet), "paho5") as device:
        key = device.ask(to_raw(image(5)), model="digits", dtype="FP32", shape="1,64", name="image")
        reply = device.reply()
    user = user_of(reply)
    assert (user["status"], user["model-version"], user["dtype"], user["shape"]) == ("200", "1", "FP32", "1,10")
    assert (user["served-by"], user["node"] in EDGES) == ("edge", True)
    assert reply.properties.CorrelationData == key
    assert int(np.frombuffer(reply.payload, "<f4").argmax()) == 5


@pytest.mark.parametrize("way", ["named", "leased"])
async def test_our_client_on_a_loop(fleet, way):
    async with AsyncClient(fleet.edges if way == "named" else fleet.address("router-1")) as client:
        answers = await asyncio.gather(
            *(client.infer("digits", {"image": image(digit)}, deadline_ms=5000) for digit in ALL_DIGITS)
        )
        assert [int(answer.outputs["probabilities"].argmax()) for answer in answers] == ALL_DIGITS
        assert {answer.served_by for answer in answers} <= set(EDGES)
        assert {answer.version for answer in answers} == {"1"}
        cloud_only = await client.infer("digits_large", {"image": ALL}, deadline_ms=5000)
        assert cloud_only.outputs["probabilities"].argmax(axis=1).tolist() == ALL_DIGITS
        assert (cloud_only.served_by, cloud_only.tier) == ("cloud-1", "cloud")
        with pytest.raises(MeshError) as refused:
            await client.infer("digits", {"image": image(1)[:, :3]}, deadline_ms=5000)
        assert refused.value.code is Code.INVALID_REQUEST
        assert (client.counts.answered, client.counts.passed_on) == (11, 0)


def test_our_client_without_a_loop(fleet):
    with Client(fleet.edges[0]) as client:
        answer = client.infer("digits", {"image": image(9)}, deadline_ms=5000)
        assert int(answer.outputs["probabilities"].argmax()) == 9
        assert client.metadata("digits").inputs[0].shape == (-1, 64)


@pytest.mark.parametrize("scheme", ["grpc", "http", "mqtt"])
def test_the_command_line(fleet, scheme, tmp_path):
    np.save(tmp_path / "image.npy", image(2))
    url = f"{scheme}://{fleet.address('edge-1', scheme)}"
    run = nearcast("infer", "digits", f"image=@{tmp_path / 'image.npy'}", "--url", url, "--json")
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert digit_of(answer) == 2
    assert answer["served_by"] in EDGES
