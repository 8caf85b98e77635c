"""Servers that know nothing of the mesh as targets of the router: a plain grpc.aio server.

MLServer and Triton's core are in `tests/compat/test_peers_as_targets.py`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from nearcast.errors import Code, MeshError
from nearcast.handler import RequestContext
from nearcast.identity import CertificateAuthority, make_csr
from nearcast.wire.request import TensorRequest
from nearcast.wire.v1 import oip_pb2 as pb
from router.config import ProbeConfig, TargetConfig
from router.policy import Policy, PolicyConfig
from router.router import Router
from router.target import configured_views
from router.targets import ChannelFactory, TargetSet
from tests.patience import until

FAST = ProbeConfig(report_ms=20, timeout_ms=500, drain_ms=200)


class OipServer:
    """Doubles `x`, as versions 1 and 2 of the model `twice`. Says nothing that the protocol does not demand."""

    def __init__(self, *, lists_models: bool = True) -> None:
        self.lists_models = lists_models
        self.states = {"1": "READY", "2": "READY"}
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.address = ""
        self._server = grpc.aio.server()

    async def start(self, credentials: grpc.ServerCredentials | None = None) -> None:
        kinds = {
            "ServerReady": (pb.ServerReadyRequest, self._ready),
            "ModelReady": (pb.ModelReadyRequest, self._model_ready),
            "ModelMetadata": (pb.ModelMetadataRequest, self._metadata),
            "ModelInfer": (pb.ModelInferRequest, self._infer),
        }
        if self.lists_models:
            kinds["RepositoryIndex"] = (pb.RepositoryIndexRequest, self._index)
        methods = {
            name: grpc.unary_unary_rpc_method_handler(answer, kind.FromString, lambda reply: reply.SerializeToString())
            for name, (kind, answer) in kinds.items()
        }
        service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)
        self._server.add_generic_rpc_handlers([service])
        if credentials is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            # The mesh's certificates name localhost and 127.0.0.1, and not the address that loopback has besides.
            port = self._server.add_secure_port("127.0.0.1:0", credentials)
            self._server.add_secure_port(f"127.0.0.2:{port}", credentials)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)

    async def _ready(self, _: Any, __: Any) -> Any:
        return pb.ServerReadyResponse(ready=all(state == "READY" for state in self.states.values()))

    async def _model_ready(self, request: Any, _: Any) -> Any:
        return pb.ModelReadyResponse(ready=self.states.get(request.version or "1") == "READY")

    async def _metadata(self, request: Any, _: Any) -> Any:
        return pb.ModelMetadataResponse(name=request.name, versions=list(self.states), platform="test")

    async def _index(self, _: Any, __: Any) -> Any:
        kind = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[kind(name="twice", version=version, state=state) for version, state in self.states.items()]
        )

    async def _infer(self, request: Any, context: Any) -> Any:
        self.seen.append((request.model_version, dict(context.invocation_metadata())))
        reply = pb.ModelInferResponse(model_name="twice", model_version=request.model_version or "1", id=request.id)
        y = np.frombuffer(request.raw_input_contents[0], np.float32) * 2
        reply.outputs.add(name="y", datatype="FP32", shape=[len(y)]).contents.SetInParent()
        reply.raw_output_contents.append(y.tobytes())
        return reply


@pytest.fixture
async def routed() -> AsyncIterator[Callable[..., Router]]:
    """A router over the targets that it is called with."""
    closers: list[Callable[[], Any]] = []

    def make(*targets: TargetConfig, kind: str = "ngh2") -> Router:
        router = Router(Policy(PolicyConfig(), seed=1), node="r")
        found = TargetSet(router, ChannelFactory(kind, None), config=FAST)  # type: ignore[arg-type]
        closers.extend((router.close, found.close))
        found.update(configured_views(targets))
        return router

    yield make
    for close in reversed(closers):
        await close()


@pytest.fixture
async def server() -> AsyncIterator[OipServer]:
    made = OipServer()
    await made.start()
    yield made
    await made.stop()


def request(version: str = "", model: str = "twice") -> TensorRequest:
    return TensorRequest(model=model, version=version, inputs={"x": np.float32([1, 2, 3])}, id="q")


def context() -> RequestContext:
    trace = f"00-{'1' * 32}-{'2' * 16}-01"
    return RequestContext(deadline=time.monotonic() + 5, tenant="acme", priority=1, idempotency_key="k", trace=trace)


async def test_its_models_are_found_and_answer(server: OipServer, routed: Callable[..., Router]) -> None:
    target = TargetConfig(name="box", kind="oip", address=server.address, role="cloud", price=2.5, quality=0.75)
    router = routed(target)
    await until(lambda: router.policy.holders("twice") == ("box", "box"))
    answer = await router.infer(request(), context())
    assert answer.decode()["y"].tolist() == [2, 4, 6]
    assert (answer.id, answer.served.node, answer.served.version) == ("q", "box", "1")
    assert (await router.infer(request("2"), context())).version == "2"
    # What a router of ours has chosen for the client travels in the request; nothing of the mesh is said.
    chosen = RequestContext(forwarded=True, version="2", tenant="acme")
    assert (await router._nodes["box"].infer(request(), chosen)).version == "2"
    assert [version for version, _ in server.seen] == ["", "2", "2"]
    assert [name for _, seen in server.seen for name in seen if name.startswith("nc-")] == []
    assert [seen.get("traceparent", "")[:2] for _, seen in server.seen] == ["00", "00", ""]
    with pytest.raises(MeshError) as caught:
        await router.infer(request("9"), context())
    assert caught.value.code is Code.VERSION_MISMATCH
    (state,) = router.policy.targets
    assert (state.tier, state.slots) == ("cloud", 4)
    assert (await router.metadata("twice", "1")).versions == ("1", "2")


async def test_a_model_that_is_not_ready_gets_nothing(server: OipServer, routed: Callable[..., Router]) -> None:
    server.states["2"] = "UNAVAILABLE"
    router = routed(TargetConfig(name="box", kind="oip", address=server.address))
    await until(lambda: router.policy.holders("twice"))
    assert router.policy.holders("twice", "2") == ()
    assert (await router.infer(request(), context())).version == "1"
    server.states["2"] = "READY"
    await until(lambda: router.policy.holders("twice", "2"))


async def test_models_are_named_where_the_server_lists_none(
    routed: Callable[..., Router], caplog: pytest.LogCaptureFixture
) -> None:
    server = OipServer(lists_models=False)
    await server.start()
    try:
        silent = routed(TargetConfig(name="box", kind="oip", address=server.address))
        told = TargetConfig(name="box", kind="oip", address=server.address, models=("twice", "gone@3"), slots=9)
        named = routed(told)
        await until(lambda: named.policy.holders("twice"))
        assert set(named.policy.models["twice"]) == {"1", "2"}
        assert named.policy.holders("gone") == ()
        assert named.policy.targets[0].slots == 9
        assert (await named.infer(request(), context())).decode()["y"].tolist() == [2, 4, 6]
        await until(lambda: "lists no models" in caplog.text)
        assert silent.policy.models == {}
    finally:
        await server.stop()


@pytest.mark.parametrize("kind", ["ngh2", "grpcio"])
async def test_over_tls_its_certificate_must_name_its_host(
    tmp_path: Path, routed: Callable[..., Router], kind: str
) -> None:
    ca = CertificateAuthority.create(tmp_path / "ca")
    (tmp_path / "ca.pem").write_bytes(ca.certificate_pem)
    key, csr = make_csr("box", "edge")
    shown = ca.issue(csr, name="box", role="edge", lifetime_s=3600)
    server = OipServer()
    await server.start(grpc.ssl_server_credentials([(key, shown)]))
    port = server.address.rpartition(":")[2]
    try:
        target = TargetConfig(name="box", kind="oip", address=f"localhost:{port}", ca=str(tmp_path / "ca.pem"))
        router = routed(target, kind=kind)
        await until(lambda: router.policy.holders("twice"))
        assert (await router.infer(request(), context())).version == "1"
        other = TargetConfig(name="box", kind="oip", address=f"127.0.0.2:{port}", ca=str(tmp_path / "ca.pem"))
        refused = routed(other, kind=kind)
        await until(lambda: any(target.breaker.state != "closed" for target in refused.policy.targets))
        assert refused.policy.models == {}
    finally:
        await server.stop()


def test_what_only_a_foreign_server_needs_is_refused_elsewhere() -> None:
    with pytest.raises(ValueError, match='kind = "oip"'):
        TargetConfig(name="a", address="127.0.0.1:1", models=("m",))
