"""Both servers, judged by clients that nearcast has no part in: reflection's, curl, nghttp, h2load, grpc-js."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

from nearcast.identity import CertificateAuthority, load_identity, make_csr
from nearcast.transport.grpc import KINDS, Kind, make_server
from nearcast.transport.health import health_methods
from nearcast.transport.mesh import join_methods
from nearcast.transport.oip import oip_methods
from nearcast.transport.reflection import reflection_methods
from nearcast.transport.seam import Call, Methods, Reply, Server
from nearcast.transport.service import InferenceService
from nearcast.wire.request import TensorRequest
from nearcast.wire.v1 import oip_pb2 as pb
from tests.integration.add_model import AddModel

SERVICE = "inference.GRPCInferenceService"
GRPC_JS = Path(__file__).parents[2] / ".venv-node"
FIELDS = ("content-type: application/grpc", "te: trailers")


async def count(messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
    async for message in messages:
        for index in range(int(message)):
            yield Reply((str(index).encode(),))


async def collect(messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
    yield Reply((b",".join([message async for message in messages]),))


def offered(model: AddModel) -> Methods:
    methods = join_methods(
        oip_methods(InferenceService(model, model, server_name="test-1"), trusted=False),
        health_methods(model.is_ready),
        Methods(stream={"/t.T/count": count, "/t.T/collect": collect}),
    )
    return join_methods(methods, reflection_methods(methods))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
async def model() -> AddModel:
    return AddModel()


@pytest.fixture
async def server(kind: Kind, model: AddModel) -> AsyncIterator[Server]:
    server = make_server(kind, offered(model), address="127.0.0.1:0")
    await server.start()
    yield server
    model.release.set()
    await server.drain(1.0)


@pytest.fixture
def body(tmp_path: Path) -> Path:
    """One framed ModelInferRequest, as a file for clients of plain HTTP/2."""
    ones = np.ones((1, 2), np.float32)
    message = TensorRequest(model="add", id="r", inputs={"a": ones, "b": ones}).encode()
    path = tmp_path / "body"
    path.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
    return path


def tool(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; on Debian: apt-get install {package}")
    return found


async def run(*command: str | Path) -> bytes:
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(30):
        out, problem = await process.communicate()
    assert process.returncode == 0, problem.decode()
    return out


def framed(data: bytes) -> pb.ModelInferResponse:
    assert data[0] == 0
    assert int.from_bytes(data[1:5], "big") == len(data) - 5
    return pb.ModelInferResponse.FromString(data[5:])


def ask_by_reflection(address: str) -> None:
    """Everything a generic client does: which services, which methods, a message by name, a call with it."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) == {
            SERVICE,
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        pool = DescriptorPool(database)
        assert pool.FindServiceByName("grpc.health.v1.Health").methods_by_name["Check"]
        methods = pool.FindServiceByName(SERVICE).methods_by_name
        stream, method = methods["ModelStreamInfer"], methods["ServerMetadata"]
        assert (stream.client_streaming, stream.server_streaming) == (True, True)
        assert (method.client_streaming, method.server_streaming) == (False, False)
        call: Any = channel.unary_unary(
            f"/{SERVICE}/ServerMetadata",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        assert call(GetMessageClass(method.input_type)()).name == "test-1"
        with pytest.raises(KeyError):
            pool.FindMessageTypeByName("inference.Nothing")


async def test_reflection(server: Server) -> None:
    async with asyncio.timeout(20):
        await asyncio.to_thread(ask_by_reflection, server.address)


async def reflect(address: str) -> FileDescriptorSet:
    """The inference service's file, over v1 of the reflection protocol."""
    async with grpc.aio.insecure_channel(address) as channel:
        call: Any = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
        question = ServerReflectionRequest(file_containing_symbol=SERVICE)
        answers = [ServerReflectionResponse.FromString(a) async for a in call(iter([question.SerializeToString()]))]
    found = FileDescriptorSet()
    for data in answers[0].file_descriptor_response.file_descriptor_proto:
        found.file.add().ParseFromString(data)
    return found


async def test_curl(server: Server, body: Path, tmp_path: Path) -> None:
    out, head = tmp_path / "out", tmp_path / "head"
    url = f"http://{server.address}/{SERVICE}/ModelInfer"
    fields = [part for field in FIELDS for part in ("-H", field)]
    curl = tool("curl", "curl")
    await run(curl, "-sS", "--http2-prior-knowledge", *fields, "--data-binary", f"@{body}", "-o", out, "-D", head, url)
    assert framed(out.read_bytes()).id == "r"
    said = head.read_text()
    assert said.startswith("HTTP/2 200")
    assert "grpc-status: 0" in said
    assert "nc-served-by: test-1" in said


async def test_nghttp(server: Server, body: Path) -> None:
    fields = [f"-H{field}" for field in FIELDS]
    url = f"http://{server.address}/{SERVICE}/ModelInfer"
    assert framed(await run(tool("nghttp", "nghttp2-client"), *fields, "-d", body, url)).id == "r"


async def test_h2load(server: Server, body: Path) -> None:
    fields = [part for field in FIELDS for part in ("-H", field)]
    url = f"http://{server.address}/{SERVICE}/ModelInfer"
    h2load = tool("h2load", "nghttp2-client")
    said = (await run(h2load, "-n", "400", "-c", "4", "-m", "20", "-d", body, *fields, url)).decode()
    assert "400 succeeded, 0 failed, 0 errored" in said
    assert "400 2xx" in said


@pytest.fixture
def tls_files(tmp_path: Path) -> Path:
    authority = CertificateAuthority.create(tmp_path / "ca")
    folder = tmp_path / "identity"
    folder.mkdir()
    key, csr = make_csr("edge-1", "edge")
    (folder / "node.key").write_bytes(key)
    (folder / "node.key").chmod(0o600)
    (folder / "node.pem").write_bytes(authority.issue(csr, name="edge-1", role="edge"))
    (folder / "ca.pem").write_bytes(authority.certificate_pem)
    return folder


@pytest.mark.parametrize(
    ("kind", "secured"), [("ngh2", False), ("ngh2", True), ("grpcio", False)], ids=["ngh2", "ngh2-tls", "grpcio"]
)
async def test_grpc_js(kind: Kind, model: AddModel, tls_files: Path, tmp_path: Path, secured: bool) -> None:
    node = tool("node", "nodejs")
    if not (GRPC_JS / ".npm").exists():
        pytest.skip("grpc-js is not installed; `make node-client` does it, with npm (on Debian: apt-get install npm)")
    plain = make_server(kind, offered(model), address="127.0.0.1:0")
    server = make_server(
        kind, offered(model), address="127.0.0.1:0", identity=load_identity(tls_files) if secured else None
    )
    await plain.start()
    await server.start()
    descriptors = tmp_path / "descriptors"
    descriptors.write_bytes((await reflect(plain.address)).SerializeToString())
    ca = tls_files / "ca.pem" if secured else ""
    said = json.loads(await run(node, GRPC_JS / "client.mjs", server.address, descriptors, ca))
    assert said["unary"] == {"sum": [1.5, 6], "id": "u1", "by": "test-1"}
    assert model.contexts[0].priority == 3
    assert said["gzip"]["id"] == "z" * 4000
    assert said["error"]["code"] == 5
    assert said["error"]["said"] == "MODEL_NOT_FOUND"
    assert said["error"]["details"].startswith("There is no model 'größer als 100 %'")
    assert said["stream"][0] == ["1", 1.5, 6]
    assert said["stream"][1].startswith("There is no model 'none'")
    assert said["stream"][2] == ["3", 1.5, 6]
    assert said["serverStream"] == [str(index) for index in range(200)]
    assert said["clientStream"] == "a,,c"
    assert said["deadline"]["code"] == 4
    assert said["cancelled"]["code"] == 1
    assert said["cancelledStream"]["code"] == 1
    assert said["many"] == 100
    await asyncio.wait_for(model.cancelled.wait(), 1)
    await server.drain(1.0)
    await plain.drain(1.0)
