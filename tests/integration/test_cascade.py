"""Uncertain answers and shadows: an edge node with a small model, a core with a large one, mutual TLS between them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from nearcast.errors import Code, MeshError
from nearcast.handler import InferResponse, RequestContext
from nearcast.identity import CertificateAuthority, Identity, load_identity, make_csr
from nearcast.serving import HostLimits, ModelHost
from nearcast.store import Store
from nearcast.store.manifest import Cascade
from nearcast.transport.grpc import make_channel, make_server
from nearcast.transport.mesh import join_methods, mesh_methods
from nearcast.transport.oip import oip_methods
from nearcast.transport.remote import RemoteNode
from nearcast.transport.service import InferenceService
from nearcast.wire.request import TensorRequest
from router.config import ProbeConfig
from router.policy import Policy, PolicyConfig
from router.router import Router
from router.shadow import ShadowConfig, ShadowLimits
from router.targets import ChannelFactory, NodeView, TargetSet
from tests.patience import own_time, until
from tests.tiny_models import activate, affine_model, install

SURE, TORN = 0.9, 0.2
CASCADE = Cascade(larger="large", output="y", high=0.5)


class Mesh:
    """What a test sees: the router of the edge node, a client of it, and the engine of the core."""

    def __init__(self, router: Router, client: RemoteNode, core: ModelHost) -> None:
        self.router = router
        self.core = core
        self._client = client
        self.gate = threading.Event()
        self.gate.set()
        hot = next(iter(core._residency.slots["large"].hot.values()))
        run = hot.engine.run

        def run_when_open(inputs: Any) -> Any:
            assert self.gate.wait(20)
            return run(inputs)

        hot.engine.run = run_when_open  # type: ignore[method-assign]

    async def ask(self, value: float, *, deadline_s: float | None = None, **fields: Any) -> InferResponse:
        inputs = {"x": np.full((1, 4), value, np.float32)}
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        request = TensorRequest(**({"model": "small", "inputs": inputs} | fields))
        return await self._client.infer(request, RequestContext(deadline=deadline))


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    folder = tmp_path_factory.mktemp("mesh")
    authority = CertificateAuthority.create(folder / "ca")
    made = {}
    for name, role in (("near", "edge"), ("core", "cloud")):
        place = folder / name
        place.mkdir()
        key, csr = make_csr(name, role)
        (place / "node.key").touch(mode=0o600)
        (place / "node.key").write_bytes(key)
        (place / "node.pem").write_bytes(authority.issue(csr, name=name, role=role, lifetime_s=3600))
        (place / "ca.pem").write_bytes(authority.certificate_pem)
        made[name] = load_identity(place)
    return made


async def start_host(folder: Path, node: str, name: str, scale: float, **fields: Any) -> ModelHost:
    store = Store(folder / node)
    install(store, affine_model(scale), name=name, **fields)
    activate(store, name, stable=1)
    # In threads, so that an engine which is stuck holds up nothing else.
    host = ModelHost(store, node=node, tier="cloud" if node == "core" else "local", limits=HostLimits(inline_us_max=0))
    await host.start()
    return host


@pytest.fixture
async def mesh(identities: dict[str, Identity], tmp_path: Path) -> AsyncIterator[Mesh]:
    async with contextlib.AsyncExitStack() as stack:
        core = await start_host(tmp_path, "core", "large", 3.0)
        stack.push_async_callback(core.close)
        offered = join_methods(
            oip_methods(InferenceService(core, core, server_name="core"), trusted=True), mesh_methods(core.report)
        )
        server = make_server("ngh2", offered, address="127.0.0.1:0", identity=identities["core"], require_client=True)
        await server.start()
        stack.push_async_callback(server.drain, 0.2)

        near = await start_host(tmp_path, "near", "small", 1.0, cascade=CASCADE, smaller="tiny")
        stack.push_async_callback(near.close)
        router = Router(Policy(PolicyConfig(), seed=1), local=near, node="near")
        await router.start()
        stack.push_async_callback(router.close)
        probe = ProbeConfig(report_ms=40, timeout_ms=300, drain_ms=200)
        targets = TargetSet(router, ChannelFactory("ngh2", identities["near"]), config=probe)
        stack.push_async_callback(targets.close)
        targets.update([NodeView(name="core", role="cloud", address=server.address)])
        listener = make_server(
            "ngh2",
            oip_methods(InferenceService(router, router, server_name="near"), trusted=False),
            address="127.0.0.1:0",
        )
        await listener.start()
        stack.push_async_callback(listener.drain, 0.2)
        client = RemoteNode(make_channel("ngh2", listener.address), "near")
        stack.push_async_callback(client.close)
        await until(lambda: router.policy.holders("large"))
        made = Mesh(router, client, core)
        stack.callback(made.gate.set)
        yield made


async def test_only_an_uncertain_answer_is_asked_about_again(mesh: Mesh) -> None:
    sure = await mesh.ask(SURE, id="1")
    assert (sure.model, sure.served.node, sure.served.escalate) == ("small", "near", "")
    torn = await mesh.ask(TORN, id="2")
    assert (torn.model, torn.id, torn.served.node) == ("large", "2", "core")
    np.testing.assert_allclose(torn.decode()["y"], TORN * 3, rtol=1e-6)
    assert mesh.router.statistics.escalations == {"escalated": 1, "kept_late": 0, "kept_failed": 0}
    assert mesh.router.policy.outstanding == 0


async def test_a_client_that_names_a_version_gets_that_one(mesh: Mesh) -> None:
    answer = await mesh.ask(TORN, version="1")
    assert (answer.model, answer.version, answer.served.escalate) == ("small", "1", "large")


async def test_without_time_for_the_larger_model_the_answer_in_hand_is_given(mesh: Mesh) -> None:
    mesh.router.policy.on_probe(time.monotonic(), "core", 0.5)
    mesh.router.policy.on_probe(time.monotonic(), "core", 0.5)
    answer = await mesh.ask(TORN, deadline_s=0.4)
    assert (answer.model, answer.served.escalate) == ("small", "large")
    assert mesh.router.statistics.escalations["kept_late"] == 1


async def test_a_larger_model_that_hangs_costs_the_deadline_and_no_answer(mesh: Mesh) -> None:
    mesh.gate.clear()
    began = own_time()
    answer = await mesh.ask(TORN, deadline_s=0.5)
    assert (answer.model, answer.served.escalate) == ("small", "large")
    assert own_time() - began < 0.5
    assert mesh.router.statistics.escalations["kept_failed"] == 1
    await until(lambda: mesh.router.policy.outstanding == 0)


async def test_a_larger_model_that_is_gone_costs_nothing(mesh: Mesh) -> None:
    mesh.router.detach("core")
    answer = await mesh.ask(TORN)
    assert (answer.model, answer.served.node) == ("small", "near")
    assert mesh.router.statistics.escalations["kept_late"] == 1


def shadowed(mesh: Mesh) -> dict[str, int]:
    return {outcome: count for (_, outcome), count in mesh.router.statistics.shadows.items()}


async def test_a_shadow_compares_and_changes_nothing(mesh: Mesh) -> None:
    mesh.router.shadow([ShadowConfig(model="small", to_model="large", share=1.0, compare="y")])
    while shadowed(mesh).get("same", 0) < 5:
        answer = await mesh.ask(SURE)
        assert (answer.model, answer.served.node) == ("small", "near")
        # A copy takes only a free place, and on a busy machine there may be none for a moment.
        assert set(shadowed(mesh)) <= {"same", "dropped_busy", "dropped_full", "dropped_refused"}
    await until(lambda: mesh.router.policy.outstanding == 0)


async def test_a_shadow_that_hangs_or_fails_is_nobodys_business(mesh: Mesh) -> None:
    limits = ShadowLimits(in_flight_max=2, timeout_ms=400)
    mesh.router.shadow([ShadowConfig(model="small", to_model="large", share=1.0)], limits)
    mesh.gate.clear()
    latencies = []
    for _ in range(10):
        began = own_time()
        assert (await mesh.ask(SURE)).model == "small"
        latencies.append(own_time() - began)
    assert sorted(latencies)[5] < 0.05
    await until(lambda: shadowed(mesh).get("failed", 0) == 2)
    assert shadowed(mesh)["dropped_full"] == 8
    mesh.gate.set()
    await until(lambda: mesh.router.policy.outstanding == 0)
    await mesh.ask(SURE)
    await until(lambda: shadowed(mesh).get("answered", 0) >= 1)


async def test_a_shadow_takes_only_what_is_free_small_and_assigned(mesh: Mesh) -> None:
    mesh.router.shadow([ShadowConfig(model="small", to_model="large", share=1.0)], ShadowLimits(utilisation_max=0.0))
    busy = msgspec.structs.replace(mesh.core.report(), in_flight=5)
    mesh.router.policy.on_report(time.monotonic(), "core", busy)
    await mesh.ask(SURE)
    await until(lambda: shadowed(mesh) == {"dropped_busy": 1})
    mesh.router.shadow([ShadowConfig(model="small", to_model="large", share=1.0)], ShadowLimits(size_bytes_max=8))
    await mesh.ask(SURE)
    assert shadowed(mesh)["dropped_large"] == 1
    mesh.router.shadow([ShadowConfig(model="small", to_model="unknown", share=1.0)])
    await mesh.ask(SURE)
    await until(lambda: shadowed(mesh).get("dropped_refused") == 1)
    mesh.router.shadow([ShadowConfig(model="small", to_model="large", share=0.3)])
    before = sum(shadowed(mesh).values())
    for number in range(200):
        await mesh.ask(SURE, id=str(number))
    await until(lambda: mesh.router.policy.outstanding == 0)
    assert 30 <= sum(shadowed(mesh).values()) - before <= 90


def test_a_shadow_of_the_same_version_is_no_shadow() -> None:
    with pytest.raises(ValueError, match="another one"):
        ShadowConfig(model="small", share=0.1)


async def test_a_request_may_set_limits_to_quality_and_price(mesh: Mesh) -> None:
    assert (await mesh.ask(SURE, parameters={"quality_min": 0.9, "price_max": 0.0})).served.node == "near"
    with pytest.raises(MeshError, match="the best quality is 1") as found:
        await mesh.ask(SURE, parameters={"quality_min": 1.1})
    assert found.value.code is Code.UNSUPPORTED
    with pytest.raises(MeshError, match="quality_min must be a number") as found:
        await mesh.ask(SURE, parameters={"quality_min": "good"})
    assert found.value.code is Code.INVALID_REQUEST
