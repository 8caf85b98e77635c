"""Inference over gRPC (both servers) and REST alike: what arrives at the handler, what comes back, how it fails."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from nearcast.errors import Code
from tests.integration.add_model import AddModel
from tests.integration.oip_ways import WAYS, Refused, make_client, make_listener, shape_of

A = np.float32([[1, 2], [3, 4]])
B = np.float32([[0.5, 0.5], [1, 1]])
STATUSES = {
    Code.INVALID_REQUEST: ("INVALID_ARGUMENT", "400"),
    Code.MODEL_NOT_FOUND: ("NOT_FOUND", "404"),
    Code.VERSION_MISMATCH: ("FAILED_PRECONDITION", "412"),
    Code.OVERLOADED: ("RESOURCE_EXHAUSTED", "429"),
    Code.INTERNAL: ("INTERNAL", "500"),
    Code.DEADLINE: ("DEADLINE_EXCEEDED", "504"),
}


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


@pytest.fixture
async def model():
    return AddModel()


@pytest.fixture
async def client(way, model):
    server = make_listener(way, model, model, "127.0.0.1:0")
    await server.start()
    client = make_client(way, server.address)
    yield client
    await client.close()
    model.release.set()
    await server.drain(2.0)


def whole(result):
    """The answer as a mapping, whichever client it came from."""
    answer = result.get_response()
    if isinstance(answer, dict):
        return answer
    return {"id": answer.id, "model_name": answer.model_name, "model_version": answer.model_version}


async def test_ids_versions_and_outputs(client):
    result = await client.infer("add", {"a": A, "b": B}, request_id="r7")
    assert np.array_equal(result.as_numpy("sum"), A + B)
    assert np.array_equal(result.as_numpy("difference"), A - B)
    found = whole(result)
    assert (found["id"], found["model_name"], found["model_version"]) == ("r7", "add", "2")
    one = await client.infer("add", {"a": A, "b": B}, {"difference": None}, model_version="1")
    assert whole(one)["model_version"] == "1"
    assert np.array_equal(one.as_numpy("difference"), A - B)
    assert one.as_numpy("sum") is None


@pytest.mark.parametrize(
    "array",
    [
        np.array([[b"\xff\x00", b""], [b"gr\xc3\xbcn", b"x" * 300]], dtype=object),
        np.float16([1, 2, 3]),
        np.array([True, False]),
        np.int64([[-(2**63)], [2**63 - 1]]),
        np.array(np.pi),
        np.zeros((0, 4), np.uint8),
        np.random.default_rng(1).random((1, 3, 224, 224), dtype=np.float32),
        np.float32([np.nan, np.inf, -0.0]),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
async def test_tensors_come_back_as_they_went(client, array):
    result = await client.infer("echo", {"x": array})
    back = result.as_numpy("x")
    assert shape_of(result, "x") == list(array.shape)
    assert back.tolist() == array.tolist() or np.array_equal(back, array, equal_nan=True)


async def test_parameters_reach_the_handler(client, model):
    await client.infer(
        "add",
        {"a": A, "b": B},
        sequence_id=9,
        sequence_start=True,
        priority=2,
        timeout=9_000_000,
        parameters={"mine": 1.5, "words": "of mine"},
    )
    request, context = model.requests[-1], model.contexts[-1]
    assert request.sequence_id == "9"
    assert request.parameters["sequence_start"] is True
    assert (request.parameters["mine"], request.parameters["words"]) == (1.5, "of mine")
    assert (context.priority, context.tenant, context.forwarded) == (2, "local", False)
    assert 0 < context.deadline - asyncio.get_running_loop().time() <= 9


@pytest.mark.parametrize(
    ("model_name", "version", "code", "words"),
    [
        ("none", "", Code.MODEL_NOT_FOUND, "There is no model 'none'; there are add and echo."),
        ("add", "9", Code.VERSION_MISMATCH, "Model 'add' has no version 9; it has 1 and 2."),
        ("busy", "", Code.OVERLOADED, "Too busy; try again later."),
        ("broken", "", Code.INTERNAL, "its log says why"),
    ],
)
async def test_errors_have_one_status_each(client, model_name, version, code, words):
    with pytest.raises(Refused) as caught:
        await client.infer(model_name, {"a": A, "b": B}, model_version=version)
    assert caught.value.status in STATUSES[code]
    assert words in caught.value.text or model_name == "broken"
    assert "secret" not in caught.value.text


async def test_timeouts_are_microseconds_and_cancel_the_work(client, model):
    with pytest.raises(Refused) as caught:
        await client.infer("slow", {}, timeout=50_000)
    assert caught.value.status in STATUSES[Code.DEADLINE]
    async with asyncio.timeout(5):
        await model.cancelled.wait()


async def test_what_a_router_knows_of_models(client):
    """This handler has no engines: it counts what passes, and cannot load."""
    server = await client.server()
    assert server["name"] == "test-1"
    assert "model_repository(index)" in server["extensions"]
    assert {"model_repository", "system_shared_memory"}.isdisjoint(server["extensions"])
    assert [(m["version"], m["state"]) for m in await client.index()] == [("1", "UNAVAILABLE"), ("2", "READY")]
    metadata, config = await client.metadata("add"), await client.config("add")
    assert metadata["inputs"][0]["shape"] == config["input"][0]["dims"] == [-1, 2]
    assert (config["name"], config["platform"], config["max_batch_size"]) == ("add", "test_numpy", 0)
    await client.infer("add", {"a": A, "b": B})
    with pytest.raises(Refused):
        await client.infer("add", {"a": A}, model_version="2")
    (entry,) = await client.statistics("add")
    assert (entry["version"], entry["inference_count"], entry["execution_count"]) == ("2", 1, 0)
    assert entry["inference_stats"]["queue"] == {"count": 1, "ns": 7000}
    assert entry["inference_stats"]["fail"]["count"] == 1
    with pytest.raises(Refused) as caught:
        await client.statistics("none")
    assert caught.value.status in STATUSES[Code.MODEL_NOT_FOUND]
