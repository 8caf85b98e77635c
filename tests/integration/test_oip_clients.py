"""The protocol over real gRPC servers of both kinds, judged by a foreign client and used by our own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import numpy as np
import pytest

from nearcast.errors import Code, MeshError
from nearcast.handler import RequestContext
from nearcast.identity import CertificateAuthority, Identity, load_identity, make_csr
from nearcast.transport.grpc import KINDS, make_channel, make_server
from nearcast.transport.mesh import join_methods, mesh_methods
from nearcast.transport.oip import oip_methods
from nearcast.transport.remote import RemoteNode
from nearcast.transport.service import InferenceService
from nearcast.wire.request import TensorRequest
from nearcast.wire.v1 import oip_pb2 as pb
from tests.integration.add_model import AddModel

A = np.float32([[1, 2], [3, 4]])
B = np.float32([[0.5, 0.5], [1, 1]])
INFER = "/inference.GRPCInferenceService/ModelInfer"
TRACE = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
async def model():
    return AddModel()


@pytest.fixture
async def server(kind, model):
    server = make_server(
        kind, oip_methods(InferenceService(model, model, server_name="test-1"), trusted=False), address="127.0.0.1:0"
    )
    await server.start()
    yield server
    model.release.set()
    await server.drain(2.0)


@pytest.fixture
async def node(kind, server):
    node = RemoteNode(make_channel(kind, server.address), "somewhere")
    yield node
    await node.close()


def add(**extra) -> TensorRequest:
    return TensorRequest(model="add", inputs={"a": A, "b": B}, **extra)


async def in_thread(function, *arguments):
    async with asyncio.timeout(20):
        return await asyncio.to_thread(function, *arguments)


def triton_inputs():
    from tritonclient.grpc import InferInput

    made = [InferInput(name, [2, 2], "FP32") for name in ("a", "b")]
    for one, array in zip(made, (A, B), strict=True):
        one.set_data_from_numpy(array)
    return made


async def test_mixed_contents_are_refused_in_tritons_words(server):
    message = pb.ModelInferRequest(model_name="add", raw_input_contents=[b"\0" * 8])
    tensor = message.inputs.add(name="a", datatype="INT32", shape=[2])
    tensor.contents.int_contents.extend([1, 2])
    async with grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(INFER)(message.SerializeToString())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    expected = "contents field must not be specified when using raw_input_contents for 'a' for model 'add'"
    assert caught.value.details() == expected


async def test_answers_of_a_stream_name_their_request_and_say_that_they_are_the_last(server):
    def body(model, request_id, **output):
        message = pb.ModelInferRequest.FromString(
            TensorRequest(model=model, inputs={"a": A, "b": B}, id=request_id).encode()
        )
        if output:
            message.outputs.add(name="sum").parameters["classification"].int64_param = output["classes"]
        return message.SerializeToString()

    bodies = [body("add", "1"), body("none", "2"), body("add", "3", classes=1), b"\xff", body("add", "5")]
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter(bodies))
        answers = [pb.ModelStreamInferResponse.FromString(answer) async for answer in call]
    assert [answer.infer_response.id for answer in answers] == ["1", "2", "3", "", "5"]
    assert [bool(answer.error_message) for answer in answers] == [False, True, False, True, False]
    assert all(answer.infer_response.parameters["triton_final_response"].bool_param for answer in answers)
    assert answers[2].infer_response.raw_output_contents == [b"\x0a\0\0\x005.000000:3"]


async def test_trailers_and_dropped_metadata(server, model):
    metadata = (
        ("nc-hop", "1"),
        ("nc-version", "1"),
        ("nc-tenant", "someone-else"),
        ("nc-idempotency-key", "k1"),
        ("nc-priority", "4"),
        ("traceparent", TRACE),
    )
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.unary_unary(INFER)(add().encode(), metadata=metadata, timeout=10)
        await call
        trailers = dict(await call.trailing_metadata())
    assert trailers["nc-served-by"] == "test-1"
    assert (trailers["nc-tier"], trailers["nc-model-version"]) == ("local", "2")
    assert (trailers["nc-queue-us"], trailers["nc-compute-us"]) == ("7", "11")
    assert trailers["endpoint-load-metrics"] == "TEXT named_metrics.nc_in_flight=3"
    context = model.contexts[-1]
    assert (context.forwarded, context.version, context.tenant) == (False, "", "local")
    assert (context.idempotency_key, context.priority, context.trace) == ("k1", 4, TRACE)
    assert 0 < context.deadline - asyncio.get_running_loop().time() < 10.5


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\x05a", b""])
async def test_malformed_messages(server, body):
    async with grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(INFER)(body)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert dict(caught.value.trailing_metadata())["nc-code"] == "INVALID_REQUEST"


async def test_remote_node(node, model):
    context = RequestContext(
        deadline=asyncio.get_running_loop().time() + 5, priority=2, idempotency_key="k", trace=TRACE
    )
    answer = await node.infer(add(id="r1", parameters={"sequence_id": "s"}), context)
    assert np.array_equal(answer.decode()["sum"], A + B)
    assert (answer.id, answer.version) == ("r1", "2")
    assert (answer.served.node, answer.served.queue_us, answer.served.in_flight) == ("test-1", 7, 3)
    seen = model.contexts[-1]
    assert (seen.priority, seen.idempotency_key, seen.trace) == (2, "k", TRACE)
    # The time on the way is not in grpc-timeout, and grpcio rounds it up to a few significant digits.
    assert abs(seen.deadline - context.deadline) < 0.5
    assert model.requests[-1].sequence_id == "s"
    metadata = await node.metadata("add")
    assert (metadata.versions, metadata.inputs[0].shape) == (("1", "2"), (-1, 2))
    assert metadata.properties == {"licence": "test"}
    assert await node.is_ready()
    assert await node.is_ready("add")
    assert not await node.is_ready("none")


async def test_remote_node_passes_large_tensors_and_streams(node):
    picture = np.random.default_rng(2).random((3, 500, 500), dtype=np.float32)
    answer = await node.infer(TensorRequest(model="echo", inputs={"x": picture}), RequestContext())
    assert np.array_equal(answer.decode()["x"], picture)

    async def requests():
        for number in range(3):
            yield add(id=str(number))

    answers = [answer async for answer in node.stream(requests(), RequestContext())]
    assert [(answer.id, answer.served.node, answer.served.version) for answer in answers] == [
        (str(number), "somewhere", "2") for number in range(3)
    ]
    assert all(np.array_equal(answer.decode()["sum"], A + B) for answer in answers)


async def test_remote_errors(node):
    with pytest.raises(MeshError) as caught:
        await node.infer(TensorRequest(model="busy", inputs={}), RequestContext())
    assert (caught.value.code, caught.value.retry_after_ms, caught.value.sent) == (Code.OVERLOADED, 1500, False)
    with pytest.raises(MeshError) as caught:
        await node.infer(TensorRequest(model="broken", inputs={}), RequestContext())
    assert (caught.value.code, caught.value.sent) == (Code.INTERNAL, True)

    async def mixed():
        yield add()
        yield TensorRequest(model="busy", inputs={})

    answers = []
    with pytest.raises(MeshError) as caught:
        async for answer in node.stream(mixed(), RequestContext()):
            answers.append(answer)
    assert (len(answers), caught.value.code, caught.value.retry_after_ms) == (1, Code.OVERLOADED, 1500)
    deadline = asyncio.get_running_loop().time() + 0.1
    with pytest.raises(MeshError) as caught:
        await node.infer(TensorRequest(model="slow", inputs={}), RequestContext(deadline=deadline))
    assert caught.value.code is Code.DEADLINE
    with pytest.raises(MeshError) as caught:
        await node.infer(add(), RequestContext(idempotency_key="a\r\nnc-hop: 1"))
    assert caught.value.code is Code.INVALID_REQUEST


async def test_client_listeners_have_no_mesh_methods(node):
    with pytest.raises(MeshError) as caught:
        await node.report()
    assert caught.value.code is Code.UNSUPPORTED


def certify(authority: CertificateAuthority, folder: Path, role: str) -> Identity:
    folder.mkdir()
    key, csr = make_csr(f"{role}-1", role)
    (folder / "node.key").write_bytes(key)
    (folder / "node.key").chmod(0o600)
    (folder / "node.pem").write_bytes(authority.issue(csr, name=f"{role}-1", role=role))
    (folder / "ca.pem").write_bytes(authority.certificate_pem)
    return load_identity(folder)


async def test_mesh_listener_honours_nodes_only(kind, model, tmp_path):
    authority = CertificateAuthority.create(tmp_path / "ca")
    edge, router, operator = (certify(authority, tmp_path / role, role) for role in ("edge", "router", "operator"))
    methods = join_methods(
        oip_methods(InferenceService(model, model, server_name="test-1"), trusted=True), mesh_methods(model.report)
    )
    server = make_server(kind, methods, address="127.0.0.1:0", identity=edge, require_client=True)
    await server.start()
    trusted = RemoteNode(make_channel(kind, server.address, identity=router))
    other = RemoteNode(make_channel(kind, server.address, identity=operator))
    try:
        context = RequestContext(tenant="t-1").forward("1")
        answer = await trusted.infer(add(), context)
        assert answer.version == "1"
        seen = model.contexts[-1]
        assert (seen.forwarded, seen.version, seen.tenant) == (True, "1", "t-1")
        assert seen.principal == "spiffe://nearcast/router/router-1"
        assert await trusted.report() == model.report()
        with pytest.raises(MeshError) as caught:
            await other.infer(add(), context)
        assert caught.value.code is Code.FORBIDDEN
    finally:
        await trusted.close()
        await other.close()
        await server.drain(2.0)
