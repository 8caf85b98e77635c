"""Every method of tritonclient's four clients: right answers where the server offers it, clear refusals elsewhere."""

from __future__ import annotations

import asyncio
import inspect
import os
import queue
from contextlib import asynccontextmanager

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

from nearcast.serving import ModelHost
from nearcast.store import Store
from tests.integration.oip_ways import make_listener
from tests.tiny_models import activate, affine_model, install

X = np.float32([[1, 2, 3, 4]])
CLIENTS = {
    "grpc": tritonclient.grpc,
    "grpc.aio": tritonclient.grpc.aio,
    "http": tritonclient.http,
    "http.aio": tritonclient.http.aio,
}


class Recorder:
    """A client whose methods are remembered once called. Blocking and asynchronous ones are awaited alike."""

    def __init__(self, client):
        self._client = client
        self.called = set()

    def __getattr__(self, name):
        self.called.add(name)
        method = getattr(self._client, name)

        async def call(*arguments, **more):
            value = method(*arguments, **more)
            return await value if inspect.isawaitable(value) else value

        return call

    def uncalled(self):
        return {name for name in dir(self._client) if name[0] != "_" and callable(getattr(self._client, name))} - (
            self.called
        )


@asynccontextmanager
async def serving(kind, tmp_path):
    """A real host; gRPC on a Unix socket, where its user is an operator, REST on TCP, where nobody is."""
    store = Store(tmp_path / "store")
    install(store, affine_model())
    activate(store, stable=1)
    host = ModelHost(store, node="test-1")
    await host.start()
    is_grpc = kind.startswith("grpc")
    address = f"unix:{tmp_path / 'oip.sock'}" if is_grpc else "127.0.0.1:0"
    server = make_listener("ngh2" if is_grpc else "rest", host, host, address)
    await server.start()
    try:
        yield server.address
    finally:
        await server.drain(2.0)
        await host.close()


def inputs(kind):
    module = tritonclient.grpc if kind.startswith("grpc") else tritonclient.http
    one = module.InferInput("x", [1, 4], "FP32")
    one.set_data_from_numpy(X)
    return [one]


async def refused(words, call):
    with pytest.raises(InferenceServerException) as caught:
        await call
    assert words in caught.value.message(), caught.value


async def ask_about_models(client, kind):
    as_json = {"as_json": True} if kind.startswith("grpc") else {}
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("affine", "1")
    assert not await client.is_model_ready("affine", "9")
    assert not await client.is_model_ready("none")
    assert (await client.get_server_metadata(**as_json))["name"] == "test-1"
    assert (await client.get_model_metadata("affine", **as_json))["inputs"][0]["name"] == "x"
    config = await client.get_model_config("affine", **as_json)
    assert config.get("config", config)["max_batch_size"] == 32
    index = await client.get_model_repository_index(**as_json)
    assert [m["state"] for m in (index["models"] if as_json else index)] == ["READY"]
    stats = await client.get_inference_statistics("affine", "1", **as_json)
    assert int(stats["model_stats"][0]["inference_count"]) == int(stats["model_stats"][0]["execution_count"]) > 0


async def infer_in_every_way(client, kind):
    assert (await client.infer("affine", inputs(kind), request_id="r")).as_numpy("y").tolist() == (2 * X).tolist()
    for coding in ("gzip", "deflate"):
        names = ["compression_algorithm"]
        if not kind.startswith("grpc"):
            names = ["request_compression_algorithm", "response_compression_algorithm"]
        found = await client.infer("affine", inputs(kind), **dict.fromkeys(names, coding))
        assert found.as_numpy("y").tolist() == (2 * X).tolist()
    answers = queue.Queue()
    if kind == "grpc":
        await client.async_infer("affine", inputs(kind), lambda result, error: answers.put((result, error)))
        result, error = await asyncio.to_thread(answers.get, timeout=10)
        assert error is None
        assert result.as_numpy("y").tolist() == (2 * X).tolist()
        await stream_by_callbacks(client, answers)
    elif kind == "http":
        later = await client.async_infer("affine", inputs(kind))
        assert later.get_result().as_numpy("y").tolist() == (2 * X).tolist()
    elif kind == "grpc.aio":
        await stream_by_iterator(client)


def has_final_mark(result):
    return result.get_response().parameters["triton_final_response"].bool_param


async def stream_by_callbacks(client, answers):
    await client.start_stream(lambda result, error: answers.put((result, error)))
    for model, request_id in (("affine", "1"), ("none", "2"), ("affine", "3")):
        await client.async_stream_infer(
            model, inputs("grpc"), request_id=request_id, enable_empty_final_response=request_id == "3"
        )
    found = [await asyncio.to_thread(answers.get, timeout=10) for _ in range(3)]
    await client.stop_stream()
    assert [result and result.get_response().id for result, _ in found] == ["1", None, "3"]
    assert has_final_mark(found[2][0])
    assert "'none' is not on this node" in found[1][1].message()
    assert answers.empty(), "there is exactly one answer to each request"


async def stream_by_iterator(client):
    async def requests():
        for request_id in ("1", "2"):
            yield {"model_name": "affine", "inputs": inputs("grpc"), "request_id": request_id}

    found = []
    async for result, error in await client.stream_infer(requests()):
        assert error is None
        found.append(result.get_response().id)
    assert found == ["1", "2"]


async def operate(client, kind):
    """gRPC comes over the Unix socket of the server's own user: an operator. REST comes over TCP: a stranger."""
    key = f"/nc-test-api-{os.getpid()}"
    handle = shm.create_shared_memory_region("r", key, 64)
    try:
        if kind.startswith("grpc"):
            await client.unload_model("affine")
            await client.load_model("affine")
            await client.register_system_shared_memory("r", key, 64)
            found = await client.get_system_shared_memory_status(as_json=True)
            assert found["regions"]["r"]["byte_size"] == "64"
            await client.unregister_system_shared_memory("r")
            assert (await client.get_cuda_shared_memory_status(as_json=True)).get("regions", {}) == {}
        else:
            await refused("Only an operator may unload", client.unload_model("affine"))
            await refused("Only an operator may load", client.load_model("affine"))
            await refused("Unix socket", client.register_system_shared_memory("r", key, 64))
            assert await client.get_system_shared_memory_status() == []
            await client.unregister_system_shared_memory()
            assert await client.get_cuda_shared_memory_status() == []
    finally:
        shm.destroy_shared_memory_region(handle)
    files = {"file:1/model.onnx": b"a model pushed through the API"}
    words = "signed bundles alone"
    await refused(words, client.load_model("affine", config='{"max_batch_size": 4}', files=files))
    await client.unregister_cuda_shared_memory()
    await refused("no cuda_shared_memory", client.register_cuda_shared_memory("c", b"aGFuZGxl", 0, 64))
    for call in (client.get_trace_settings, client.update_trace_settings):
        await refused("no trace settings", call())
    await refused("no log settings", client.get_log_settings())
    await refused("no log settings", client.update_log_settings({"log_info": True}))


async def use_what_is_of_the_client_alone(client, kind):
    class Plugin:
        def __call__(self, request):
            request.headers["nc-idempotency-key"] = "k"

    await client.register_plugin(Plugin())
    await client.plugin()
    await client.infer("affine", inputs(kind))
    await client.unregister_plugin()
    if kind == "http":
        body, size = await client.generate_request_body(inputs(kind))
        assert size == len(body) - X.nbytes
        answer = b'{"model_name":"affine","outputs":[{"name":"y","datatype":"FP32","shape":[1],"data":[2]}]}'
        assert (await client.parse_response_body(answer)).as_numpy("y").tolist() == [2]


async def call_everything(kind, address):
    client = Recorder(CLIENTS[kind].InferenceServerClient(address))
    try:
        await infer_in_every_way(client, kind)
        await ask_about_models(client, kind)
        await operate(client, kind)
        await use_what_is_of_the_client_alone(client, kind)
    finally:
        await client.close()
    left = client.uncalled()
    if kind == "http.aio":
        left -= {
            "generate_request_body",
            "parse_response_body",
            "async_infer",
        }  # inherited
    assert left == set()


@pytest.mark.parametrize("kind", CLIENTS)
async def test_every_method_answers_or_is_refused(kind, tmp_path):
    async with serving(kind, tmp_path) as address, asyncio.timeout(30):
        if kind.endswith(".aio"):
            await call_everything(kind, address)
        else:
            # A loop of its own, in a thread of its own: these clients block.
            await asyncio.to_thread(lambda: asyncio.run(call_everything(kind, address)))
