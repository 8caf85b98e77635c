"""A model that takes photographs, from the author's specification to clients on every transport."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from PIL import Image

from edge_node.broker import Broker
from edge_node.mqtt.worker import MqttWorker
from model_sync.publisher.bundle import create_bundle, pass_gate, read_spec
from nearcast.cli import main
from nearcast.client.mqtt import MqttDevice
from nearcast.errors import Code, MeshError
from nearcast.handler import RequestContext
from nearcast.serving import HostLimits, ModelHost
from nearcast.serving.pipeline import images
from nearcast.store import Store
from nearcast.wire.request import TensorRequest
from tests.integration.oip_ways import WAYS, Refused, make_client, make_listener
from tests.patience import own_time
from tests.tiny_models import activate

SPEC = """
name = "colours"
release = 1
semver = "1.0.0"
engine = "onnxruntime"
model_file = "colours.onnx"
licence = "Apache-2.0"
golden = ["green.jpg"]
labels = ["red", "green", "blue"]
inputs = [{ name = "image", datatype = "BYTES", shape = [-1], batch_axis = 0 }]
outputs = [
    { name = "scores", datatype = "FP32", shape = [-1, 2], batch_axis = 0 },
    { name = "classes", datatype = "INT32", shape = [-1, 2], batch_axis = 0 },
    { name = "labels", datatype = "BYTES", shape = [-1, 2], batch_axis = 0 },
]
[pipeline]
inputs = [{ name = "x", datatype = "FP32", shape = [-1, 3, 8, 8], batch_axis = 0 }]
outputs = [{ name = "y", datatype = "FP32", shape = [-1, 3], batch_axis = 0 }]
before = [
    { step = "decode_image", source = "image", target = "x", pixels_max = 1_000_000 },
    { step = "resize", tensor = "x", width = 8, height = 8, filter = "area" },
    { step = "normalise", tensor = "x", scale = [0.03] },
    { step = "layout", tensor = "x" },
]
after = [{ step = "softmax", tensor = "y" }, { step = "top_k", source = "y", k = 2 }]
"""
CONTEXT = RequestContext()


def photo(red: int, green: int, blue: int, *, side: int = 40, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (red, green, blue)).save(buffer, kind)
    return buffer.getvalue()


def files(*contents: bytes) -> np.ndarray:
    array = np.empty(len(contents), object)
    array[:] = contents
    return array


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)
    shapes = (("x", ["n", 3, 8, 8]), ("y", ["n", 3]))
    sides = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in shapes]
    model = helper.make_model(
        helper.make_graph([node], "colours", *sides), opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    )
    (folder / "colours.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(model)
    (folder / "green.jpg").write_bytes(photo(10, 250, 10))
    (folder / "bundle.toml").write_text(SPEC)
    create_bundle(read_spec(folder / "bundle.toml"), folder, folder / "out")
    return folder / "out"


@pytest.fixture
async def host(bundle: Path, tmp_path: Path) -> AsyncIterator[ModelHost]:
    store = Store(tmp_path / "store")
    staged = store.stage_folder("colours", 1)
    shutil.copytree(bundle, staged, dirs_exist_ok=True)
    store.commit("colours", 1, staged)
    activate(store, "colours", stable=1)
    host = ModelHost(store, node="edge-1", limits=HostLimits(slots=1))
    await host.start()
    yield host
    await host.close()


@contextlib.asynccontextmanager
async def served(host: ModelHost, way: str) -> AsyncIterator[str]:
    server = make_listener(way, host, host, "127.0.0.1:0")
    await server.start()
    try:
        yield server.address
    finally:
        await server.drain(2.0)


@contextlib.asynccontextmanager
async def closing(client: Any) -> AsyncIterator[Any]:
    try:
        yield client
    finally:
        await client.close()


async def ask(host: ModelHost, inputs: dict[str, Any], context: RequestContext = CONTEXT) -> Any:
    return (await host.infer(TensorRequest(model="colours", inputs=inputs), context)).decode()


def test_the_gate_runs_the_photograph_alone_and_in_a_batch(bundle: Path) -> None:
    assert pass_gate(bundle).vectors == 1


@pytest.mark.parametrize("way", WAYS)
async def test_a_client_sends_a_jpeg_and_gets_a_name(host: ModelHost, way: str) -> None:
    async with served(host, way) as address, closing(make_client(way, address)) as client:
        assert [tensor["name"] for tensor in (await client.metadata("colours"))["inputs"]] == ["image"]
        for kind in ("JPEG", "PNG", "WEBP"):
            result = await client.infer("colours", {"image": files(photo(250, 90, 5, kind=kind))})
            assert result.as_numpy("labels").tolist() == [[b"red", b"green"]]
            assert result.as_numpy("scores")[0, 0] > 0.9
        with pytest.raises(Refused, match=r"(INVALID_ARGUMENT|400): The image in input image is a damaged or cut off"):
            await client.infer("colours", {"image": files(photo(250, 90, 5, side=400)[:-400])})
        with pytest.raises(Refused, match="1200 x 1200 pixels, more than 1000000 in all"):
            await client.infer("colours", {"image": files(photo(0, 0, 0, side=1200))})
        ready = np.zeros((1, 3, 8, 8), np.float32)
        ready[:, 2] = 7.0
        assert (await client.infer("colours", {"x": ready})).as_numpy("labels").tolist() == [[b"blue", b"red"]]


@pytest.mark.parametrize("scheme", ["grpc", "http"])
async def test_the_command_line_sends_a_file_as_it_is(host: ModelHost, tmp_path: Path, scheme: str) -> None:
    (tmp_path / "sky.png").write_bytes(photo(5, 60, 250, kind="PNG"))
    async with served(host, "rest" if scheme == "http" else "ngh2") as address:
        for words in (["--file", str(tmp_path / "sky.png")], [f"image=@{tmp_path / 'sky.png'}:BYTES"]):
            arguments = ["infer", "colours", *words, "--url", f"{scheme}://{address}"]
            result = await asyncio.to_thread(CliRunner().invoke, main, arguments)
            assert "blue, green" in result.output


async def test_in_a_batch_everyone_gets_their_own_answer_and_a_bad_image_harms_nobody(host: ModelHost) -> None:
    rng = np.random.default_rng(5)
    inputs: list[dict[str, Any]] = []
    for index in range(24):
        colours = [tuple(rng.integers(0, 256, 3).tolist()) for _ in range(1 + index % 3)]
        if index % 4 == 3:
            inputs.append({"x": rng.random((len(colours), 3, 8, 8), np.float32) * 8})
        else:
            inputs.append({"image": files(*(photo(*colour) for colour in colours))})
    alone = [await ask(host, each) for each in inputs]
    inputs[7:7] = [{"image": files(photo(1, 2, 3), b"no image")}]
    before = host.status("colours")[0].requests
    together = await asyncio.gather(*(ask(host, each) for each in inputs), return_exceptions=True)
    (bad,) = [together.pop(7)]
    assert isinstance(bad, MeshError)
    assert bad.code is Code.INVALID_REQUEST
    for one, other in zip(alone, together, strict=True):
        assert not isinstance(other, BaseException)
        for name in ("scores", "classes", "labels"):
            assert one[name].dtype == other[name].dtype
            assert np.array_equal(one[name], other[name])
    assert host.status("colours")[0].requests >= before + 24


async def test_decoding_ends_with_the_deadline_and_leaves_the_loop_free(
    host: ModelHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = images.decode_image
    monkeypatch.setattr(images, "decode_image", lambda step, data: decoded.append(1) or decode(step, data))
    noise = np.random.default_rng(1).integers(0, 256, (900, 900, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    loop = asyncio.get_running_loop()
    started, own_started = loop.time(), own_time()
    with pytest.raises(MeshError) as caught:
        await ask(host, {"image": files(*[buffer.getvalue()] * 64)}, RequestContext(deadline=started + 0.08))
    assert caught.value.code is Code.DEADLINE
    assert own_time() - own_started < 0.5
    await ask(host, {"image": files(photo(1, 2, 3))})
    assert 0 < len(decoded) < 60
    with pytest.raises(MeshError, match="holds 65 images; send 1 to 64"):
        await ask(host, {"image": files(*[photo(1, 2, 3)] * 65)})


async def test_a_camera_sends_its_photograph_over_mqtt(host: ModelHost, tmp_path: Path) -> None:
    broker = await Broker.start(tmp_path / "broker")
    worker = MqttWorker(host, host, node="edge-1", host=broker.host, port=broker.port, inbox=tmp_path / "inbox.sqlite")
    await worker.start()
    await worker.wait_connected()
    try:
        async with MqttDevice(f"{broker.url}/local/camera") as camera:
            answer = await camera.infer("colours", {"image": files(photo(10, 250, 10))}, content_type="image/jpeg")
            assert answer.outputs["labels"].tolist()[0][0] == b"green"
            said = await camera.ask("colours", photo(10, 10, 250, kind="PNG"), "image/png")
            assert json.loads(said.payload)["outputs"][2]["data"][0] == "blue"
            said = await camera.ask("colours", photo(10, 10, 250)[:-30], "image/jpeg")
            assert (said.user["status"], said.user["code"]) == ("400", "INVALID_REQUEST")
            assert "damaged" in json.loads(said.payload)["error"]
            said = await camera.ask("colours", bytes(1024 * 1024 + 1), "image/jpeg")
            assert said.user["status"] == "413"
    finally:
        await worker.drain(1.0)
        await broker.stop()
