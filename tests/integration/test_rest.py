from __future__ import annotations

import asyncio
import gzip
import io
import json
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from nearcast.errors import Code, MeshError
from nearcast.identity import CertificateAuthority, Identity, client_tls, load_identity, make_csr, server_tls
from nearcast.transport.rest import RestServer
from nearcast.transport.seam import Limits
from nearcast.transport.service import InferenceService
from tests.integration.add_model import AddModel

LIMITS = Limits(message_size_bytes_max=1024 * 1024, concurrent_streams_max=2)
A = np.float32([[1, 2], [3, 4]])
B = np.float32([[0.5, 0.5], [1, 1]])


@pytest.fixture
async def model():
    return AddModel()


@pytest.fixture
async def server(model):
    server = RestServer(InferenceService(model, model, server_name="test-1"), address="127.0.0.1:0", limits=LIMITS)
    await server.start()
    yield server
    model.release.set()
    await server.drain(2.0)


@pytest.fixture
async def client(server):
    async with aiohttp.ClientSession(f"http://{server.address}") as session:
        yield session


def add_json(**extra):
    return {
        "inputs": [
            {"name": "a", "datatype": "FP32", "shape": [2, 2], "data": A.tolist()},
            {"name": "b", "datatype": "FP32", "shape": [2, 2], "data": B.reshape(-1).tolist()},
        ],
        **extra,
    }


async def get(client, path, status=200):
    async with client.get(path) as answer:
        assert answer.status == status, await answer.text()
        return await answer.json()


async def post(client, path, status=200, **how):
    async with client.post(path, **how) as answer:
        assert answer.status == status, await answer.text()
        return await answer.json(), answer.headers


async def test_server_and_models(client, model):
    assert await get(client, "/v2/health/live") == {"live": True}
    assert await get(client, "/v2/health/ready") == {"live": True}
    server = await get(client, "/v2")
    assert server["name"] == "test-1"
    assert "binary_tensor_data" in server["extensions"]
    metadata = await get(client, "/v2/models/add")
    assert metadata["versions"] == ["1", "2"]
    assert metadata["inputs"][0] == {"name": "a", "datatype": "FP32", "shape": [-1, 2]}
    assert metadata["properties"] == {"licence": "test"}
    assert await get(client, "/v2/models/add/versions/2/ready") == {"name": "add", "ready": True}
    config = await get(client, "/v2/models/add/config")
    assert config["input"][0] == {"name": "a", "data_type": "TYPE_FP32", "dims": [-1, 2]}
    index, _ = await post(client, "/v2/repository/index")
    assert [(m["version"], m["state"]) for m in index] == [("1", "UNAVAILABLE"), ("2", "READY")]
    index, _ = await post(client, "/v2/repository/index", json={"ready": True})
    assert [m["version"] for m in index] == ["2"]
    model.ready = False
    assert await get(client, "/v2/health/ready", 503) == {"live": False}
    assert await get(client, "/v2/models/add/ready", 503) == {"name": "add", "ready": False}


async def test_json_nested_and_flat(client, model):
    answer, headers = await post(client, "/v2/models/add/infer", json=add_json(id="r-1"))
    assert answer["id"] == "r-1"
    assert (answer["model_name"], answer["model_version"]) == ("add", "2")
    assert answer["outputs"][0] == {"name": "sum", "datatype": "FP32", "shape": [2, 2], "data": [1.5, 2.5, 4.0, 5.0]}
    assert headers["nc-served-by"] == "test-1"
    assert headers["nc-model-version"] == "2"
    assert headers["nc-queue-us"] == "7"
    assert model.contexts[-1].tenant == "local"
    assert model.contexts[-1].deadline is None


async def test_version_outputs_parameters_and_context(client, model):
    body = add_json(
        outputs=[{"name": "difference"}], parameters={"sequence_id": 9, "priority": 3, "timeout": 5_000_000}
    )
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    headers = {
        "nc-idempotency-key": "k1",
        "traceparent": trace,
        "nc-hop": "1",
        "nc-version": "77",
        "nc-tenant": "someone-else",
        "nc-deadline-ms": "60000",
    }
    answer, _ = await post(client, "/v2/models/add/versions/1/infer", json=body, headers=headers)
    assert answer["model_version"] == "1"
    assert [output["name"] for output in answer["outputs"]] == ["difference"]
    context = model.contexts[-1]
    assert (context.priority, context.idempotency_key, context.trace) == (3, "k1", trace)
    assert (context.forwarded, context.version, context.tenant) == (False, "", "local")
    assert 0 < context.deadline - asyncio.get_running_loop().time() <= 5.0
    assert model.requests[-1].sequence_id == "9"


async def test_binary_in_and_out(client):
    head = json.dumps(
        {
            "inputs": [
                {"name": "a", "datatype": "FP32", "shape": [2, 2], "parameters": {"binary_data_size": 16}},
                {"name": "b", "datatype": "FP32", "shape": [2, 2], "parameters": {"binary_data_size": 16}},
            ],
            "outputs": [
                {"name": "sum", "parameters": {"binary_data": True}},
                {"name": "difference", "parameters": {"binary_data": False}},
            ],
        }
    ).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    async with client.post("/v2/models/add/infer", data=head + A.tobytes() + B.tobytes(), headers=headers) as answer:
        assert answer.status == 200
        size = int(answer.headers["Inference-Header-Content-Length"])
        body = await answer.read()
    message = json.loads(body[:size])
    assert message["outputs"][0]["parameters"] == {"binary_data_size": 16}
    assert message["outputs"][1]["data"] == [0.5, 1.5, 2.0, 3.0]
    assert np.frombuffer(body[size:], np.float32).tolist() == [1.5, 2.5, 4.0, 5.0]


async def test_raw_body_for_a_model_with_one_input(client):
    headers = {"Inference-Header-Content-Length": "0"}
    async with client.post("/v2/models/echo/infer", data=A.tobytes(), headers=headers) as answer:
        assert answer.status == 200
        size = int(answer.headers["Inference-Header-Content-Length"])
        body = await answer.read()
    assert json.loads(body[:size])["outputs"][0]["shape"] == [2, 2]
    assert body[size:] == A.tobytes()
    refusal, _ = await post(client, "/v2/models/add/infer", 400, data=A.tobytes(), headers=headers)
    assert "2 inputs" in refusal["error"]
    refusal, _ = await post(client, "/v2/models/echo/infer", 400, data=b"123", headers=headers)
    assert "needs 8 bytes, got 3" in refusal["error"]


async def test_text(client):
    body = {"inputs": [{"name": "x", "datatype": "BYTES", "shape": [2], "data": ["grün", ""]}]}
    answer, _ = await post(client, "/v2/models/echo/infer", json=body)
    assert answer["outputs"][0]["data"] == ["grün", ""]


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ({"shape": [2], "data": [1]}, "needs 2 elements, got 1"),
        ({"shape": [2, 2], "data": [[1, 2, 3], [4]]}, "nesting"),
        ({"shape": [2, 2], "data": [[1, 2], 3]}, "nesting"),
        ({"shape": [1], "data": ["1"]}, "cannot hold"),
        ({"shape": [1], "data": [None]}, "cannot hold"),
        ({"shape": [1], "data": 5}, "must be an array"),
        ({"shape": [-1], "data": [1]}, "shape"),
        ({"shape": [1]}, "neither data nor"),
        ({"shape": [1], "data": [1.5], "datatype": "INT32"}, "cannot hold"),
        ({"shape": [1], "data": [300], "datatype": "UINT8"}, "cannot hold"),
        ({"shape": [1], "data": [1], "datatype": "BYTES"}, "strings"),
        ({"shape": [1], "data": [1], "datatype": "FP99"}, "FP99"),
        ({"shape": [1], "parameters": {"binary_data_size": 4}}, "0 are left"),
        ({"shape": [1], "parameters": {"binary_data_size": -4}}, "announces"),
        ({"shape": [1], "data": [1], "parameters": {"binary_data_size": 0}}, "both"),
    ],
)
async def test_malformed_tensors(client, tensor, words):
    body = {"inputs": [{"name": "x", "datatype": "FP32"} | tensor]}
    refusal, headers = await post(client, "/v2/models/echo/infer", 400, json=body)
    assert words in refusal["error"]
    assert headers["nc-code"] == "INVALID_REQUEST"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"inputs": 1}',
        b'{"inputs": [], "parameters": {"a": []}}',
        b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [NaN]}]}',
    ],
)
async def test_garbage_json(client, body):
    refusal, _ = await post(client, "/v2/models/echo/infer", 400, data=body)
    assert refusal["error"]


@pytest.mark.parametrize("size", ["x", "-1", "99999", "1e3"])
async def test_bad_header_length(client, size):
    headers = {"Inference-Header-Content-Length": size}
    await post(client, "/v2/models/echo/infer", 400, data=b"{}", headers=headers)


async def test_numbers_that_json_lacks_need_binary_data(client):
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 4}}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    body = head + np.float32([np.nan]).tobytes()
    refusal, _ = await post(client, "/v2/models/echo/infer", 400, data=body, headers=headers)
    assert "binary_data" in refusal["error"]


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/v2/models/none/infer", 404, "no model 'none'"),
        ("/v2/models/add/versions/9/infer", 412, "no version 9"),
        ("/v2/models/busy/infer", 429, "Too busy"),
        ("/v2/models/broken/infer", 500, "its log says why"),
        ("/v2/nothing", 404, "Not Found"),
    ],
)
async def test_errors(client, path, status, words):
    refusal, headers = await post(client, path, status, json=add_json())
    assert words in refusal["error"]
    assert "secret" not in refusal["error"]
    if status == 429:
        assert headers["Retry-After"] == "2"
        assert headers["nc-retry-after-ms"] == "1500"


async def test_method_not_allowed(client):
    async with client.get("/v2/models/add/infer") as answer:
        assert answer.status == 405
        assert answer.headers["Allow"] == "POST"
        assert "error" in await answer.json()


async def test_too_large(client):
    refusal, _ = await post(
        client, "/v2/models/echo/infer", 413, data=io.BytesIO(b"0" * (LIMITS.message_size_bytes_max + 1))
    )
    assert str(LIMITS.message_size_bytes_max) in refusal["error"]
    bomb = gzip.compress(b"0" * (LIMITS.message_size_bytes_max * 20))
    refusal, _ = await post(client, "/v2/models/echo/infer", 413, data=bomb, headers={"Content-Encoding": "gzip"})
    assert "larger" in refusal["error"]


async def test_compressed_request_and_garbage_compression(client):
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    body = gzip.compress(json.dumps(add_json()).encode())
    answer, _ = await post(client, "/v2/models/add/infer", data=body, headers=headers)
    assert answer["outputs"][0]["data"] == [1.5, 2.5, 4.0, 5.0]
    await post(client, "/v2/models/add/infer", 400, data=b"not gzip at all", headers=headers)


async def test_deadlines(client, model):
    soon = {"nc-deadline-ms": "200"}
    _, headers = await post(client, "/v2/models/slow/infer", 504, json={"inputs": []}, headers=soon)
    assert headers["nc-code"] == "DEADLINE"
    assert model.cancelled.is_set()
    await post(client, "/v2/models/slow/infer", 504, json={"inputs": [], "parameters": {"timeout": 30_000}})
    for value in ("0", "-1", "x", "nan", "inf"):
        await post(client, "/v2/models/slow/infer", 400, json={"inputs": []}, headers={"nc-deadline-ms": value})


async def test_hanging_up_cancels(client, model):
    with pytest.raises(asyncio.TimeoutError):
        await client.post("/v2/models/slow/infer", json={"inputs": []}, timeout=aiohttp.ClientTimeout(total=0.2))
    async with asyncio.timeout(5):
        await model.cancelled.wait()


async def test_requests_in_flight_are_bounded(client, model):
    tasks = [asyncio.create_task(post(client, "/v2/models/slow/infer", json={"inputs": []})) for _ in range(2)]
    async with asyncio.timeout(5):
        while len(model.contexts) < 2:
            await asyncio.sleep(0.01)
    refusal, headers = await post(client, "/v2/models/add/infer", 429, json=add_json())
    assert "in flight" in refusal["error"]
    assert headers["Retry-After"] == "1"
    assert await get(client, "/v2/health/live") == {"live": True}
    model.release.set()
    await asyncio.gather(*tasks)


async def test_drain_finishes_what_is_in_flight(client, server, model):
    task = asyncio.create_task(post(client, "/v2/models/slow/infer", json={"inputs": []}))
    async with asyncio.timeout(5):
        await model.running.wait()
    drain = asyncio.create_task(server.drain(5.0))
    await asyncio.sleep(0.05)
    assert not drain.done()
    model.release.set()
    answer, _ = await task
    assert answer["outputs"] == []
    await drain
    with pytest.raises(aiohttp.ClientConnectorError):
        await client.get("/v2/health/live")


async def test_addresses(model):
    with pytest.raises(MeshError) as caught:
        await RestServer(InferenceService(model, model, server_name="x"), address="0.0.0.0:0").start()
    assert caught.value.code is Code.INVALID_REQUEST
    first = RestServer(InferenceService(model, model, server_name="x"), address="127.0.0.1:0")
    await first.start()
    with pytest.raises(MeshError) as caught:
        await RestServer(InferenceService(model, model, server_name="x"), address=first.address).start()
    assert caught.value.code is Code.UNAVAILABLE
    assert first.address in caught.value.message
    await first.drain(1.0)


async def test_certificate_of_the_client_is_its_principal(model, tmp_path):
    authority = CertificateAuthority.create(tmp_path / "ca")
    edge, operator = (certify(authority, tmp_path / role, role) for role in ("edge", "operator"))
    tls = server_tls(edge, require_client=False, alpn=["http/1.1"])
    server = RestServer(InferenceService(model, model, server_name="x"), address="127.0.0.1:0", tls=tls)
    await server.start()
    try:
        for identity, principal in ((operator, operator.uri), (None, "")):
            context = client_tls(identity, ca=edge.ca, alpn=["http/1.1"])
            connector = aiohttp.TCPConnector(ssl=context)
            async with aiohttp.ClientSession(f"https://{server.address}", connector=connector) as client:
                await post(client, "/v2/models/add/infer", json=add_json())
            assert model.contexts[-1].principal == principal
    finally:
        await server.drain(1.0)


def certify(authority: CertificateAuthority, folder: Path, role: str) -> Identity:
    folder.mkdir()
    key, csr = make_csr(f"{role}-1", role)
    (folder / "node.key").touch(mode=0o600)
    (folder / "node.key").write_bytes(key)
    (folder / "node.pem").write_bytes(authority.issue(csr, name=f"{role}-1", role=role))
    (folder / "ca.pem").write_bytes(authority.certificate_pem)
    return load_identity(folder)
