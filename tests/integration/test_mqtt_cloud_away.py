"""Devices behind a real router whose cloud goes away and comes back: who needs it waits, nobody else is held up."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from edge_node.mqtt.admission import Request
from edge_node.mqtt.executor import Executor
from edge_node.mqtt.limits import MqttLimits, RequestLimits
from edge_node.mqtt.worker import MqttWorker
from nearcast.clock import SYSTEM_CLOCK
from nearcast.errors import Code, MeshError
from nearcast.handler import ModelMetadata, TensorSpec
from nearcast.identity import CertificateAuthority, load_identity, make_csr
from nearcast.load import NodeReport, VersionReport
from router.config import ProbeConfig
from router.policy import Policy, PolicyConfig
from router.router import Router
from router.targets import ChannelFactory, NodeView, TargetSet
from tests.integration.mqtt_parts import Device, Doubler, until, user_of
from tests.integration.router_node import TinyHost, make_node_server

OCTETS = "application/octet-stream"
X = np.ones(2, dtype=np.float32).tobytes()
FAST = ProbeConfig(report_ms=40, timeout_ms=300, directory_ms=40, drain_ms=500)


class Host(TinyHost):
    """Holds other models than `digits`; `smaller` may stand in for `large`."""

    def __init__(self, name, tier, **models):
        super().__init__(name)
        self.tier = tier
        self.models = models

    async def infer(self, request, context):
        response = await super().infer(request, context)
        response.served = msgspec.structs.replace(response.served, tier=self.tier)
        return response

    async def metadata(self, model, version):
        spec = TensorSpec("x", "FP32", (-1,))
        return ModelMetadata(name=model, versions=("1",), platform="tiny", inputs=(spec,), outputs=(spec,))

    def report(self):
        versions = tuple(
            VersionReport(model=model, version="1", service_p50_us=50.0, service_p95_us=80.0, smaller=smaller)
            for model, smaller in self.models.items()
        )
        return NodeReport(node=self.name, role="edge", slots=64, versions=versions)


@pytest.fixture
def identities(tmp_path):
    ca = CertificateAuthority.create(tmp_path / "ca")

    def make(name, role):
        folder = tmp_path / name
        folder.mkdir()
        key, csr = make_csr(name, role)
        (folder / "node.key").touch(mode=0o600)
        (folder / "node.key").write_bytes(key)
        (folder / "node.pem").write_bytes(ca.issue(csr, name=name, role=role, lifetime_s=3600))
        (folder / "ca.pem").write_bytes(ca.certificate_pem)
        return load_identity(folder)

    return make


@asynccontextmanager
async def mesh(identities):
    """A router with a host of its own, and the way to a cloud that is there only when it is started."""
    near, far = Host("edge-1", "local", small=""), Host("cloud-1", "cloud", exact="", large="small")
    own, cloud = identities("edge-1", "edge"), identities("cloud-1", "cloud")
    servers = [make_node_server(far, cloud)]
    await servers[0].start()
    address = servers[0].address
    router = Router(Policy(PolicyConfig(), seed=1), local=near, node="edge-1")
    await router.start()
    targets = TargetSet(router, ChannelFactory("ngh2", own), config=FAST)

    async def come_back():
        servers.append(make_node_server(far, cloud, address=address))
        await servers[-1].start()

    try:
        yield router, targets, far, NodeView(name="cloud-1", role="cloud", address=address), servers[0], come_back
    finally:
        await targets.close()
        await router.close()
        await servers[-1].drain(0.1)


async def test_who_needs_the_cloud_waits_for_it_and_nobody_else_does(broker, tmp_path, identities):
    async with mesh(identities) as (router, targets, far, view, server, come_back):
        targets.update([view])
        await until(lambda: "cloud-1" in router.policy.holders("exact"))
        limits = MqttLimits(requests=RequestLimits(in_flight_max=1, outlast_max_s=0.2, answer_margin_s=0.5))
        worker = MqttWorker(
            router, router, node="edge-1", host=broker.host, port=broker.port, inbox=tmp_path / "i", limits=limits
        )
        await worker.start()
        await worker.wait_connected()
        try:
            with Device(broker.port, "d1") as device:

                async def ask(model, ttl_ms):
                    began = time.monotonic()
                    device.ask(X, model=model, dtype="FP32", shape="2", ttl_ms=str(ttl_ms))
                    answer = user_of(await device.answer())
                    return answer, time.monotonic() - began

                answer, _ = await ask("exact", 5000)
                assert (answer["status"], answer["served-by"]) == ("200", "cloud")
                answer, _ = await ask("large", 5000)
                assert (answer["status"], answer["node"]) == ("200", "cloud-1")
                assert "model" not in answer

                await server.drain(0.0)
                answer, took_s = await ask("exact", 1000)
                assert (answer["status"], answer["code"]) == ("503", "UNAVAILABLE"), answer
                assert "retry-after-ms" not in answer, "that would mean: not accepted, send the same again"
                assert 0.4 < took_s < 1.0, "it was tried until shortly before its deadline, and the device hears of it"
                answer, _ = await ask("large", 5000)
                assert (answer["status"], answer["served-by"], answer["model"]) == ("200", "edge", "small"), answer

                executed = far.answered
                device.ask(X, model="exact", dtype="FP32", shape="2", ttl_ms="9000")
                await asyncio.sleep(0.3)
                answer, _ = await ask("small", 5000)
                assert (answer["status"], answer["node"]) == ("200", "edge-1"), "the one slot stays free"
                await come_back()
                answer = user_of(await device.answer())
                assert (answer["status"], answer["served-by"]) == ("200", "cloud"), answer
                assert far.answered == executed + 1
        finally:
            await worker.drain(1.0)


def request_of(model, arrived, deadline, **user):
    return Request(
        tenant="local", device="d1", model=model, correlation=b"c", arrived=arrived, deadline=deadline, digest=b"",
        reply_topic="nc/v1/local/d1/down/reply/x", content_type=OCTETS, accept=OCTETS,
        user={"dtype": "FP32", "shape": "2"} | user,
    )  # fmt: skip


@asynccontextmanager
async def link_to(address):
    """A way to `address` on which nothing passes, and nobody is told, while the second of what it yields is clear."""
    host, port = address.rsplit(":", 1)
    passes, tasks = asyncio.Event(), set()
    passes.set()

    async def carry(reader, writer):
        try:
            while data := await reader.read(65536):
                await passes.wait()
                writer.write(data)
        finally:
            writer.close()

    async def connect(reader, writer):
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        tasks.update(asyncio.create_task(carry(*ends)) for ends in ((reader, far_writer), (far_reader, writer)))

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield "{}:{}".format(*server.sockets[0].getsockname()), passes
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # for what is closed to go


async def test_a_link_that_swallows_everything_is_answered_for_at_the_deadline(identities):
    async with mesh(identities) as (router, targets, _, view, _, _), link_to(view.address) as (address, passes):
        targets.update([replace(view, address=address)])
        await until(lambda: "cloud-1" in router.policy.holders("exact"))
        executor = Executor(router, router, limits=RequestLimits(), clock=SYSTEM_CLOCK)

        async def ask(model, left_s):
            now = time.monotonic()
            reply = await executor.answer(request_of(model, now, now + left_s), X)
            return reply.user["status"], reply.user.get("model")

        assert await ask("exact", 9.0) == ("200", None)
        assert await ask("large", 9.0) == ("200", None)
        passes.clear()
        until_s = time.monotonic() + 0.3
        assert await ask("exact", 0.3) == ("504", None), "it was sent, and may have run"
        assert time.monotonic() >= until_s
        assert await ask("small", 9.0) == ("200", None)
        async with asyncio.timeout(9.0):  # the questions to the other side have their own time to fail
            while await ask("large", 0.2) != ("200", "small"):
                pass
        await executor.close()


async def test_a_node_that_restarts_while_it_sees_no_mesh_does_not_call_a_model_unknown(identities):
    limits = RequestLimits(outlast_max_s=0.1)
    async with mesh(identities) as (router, targets, _, view, _, _):
        blind, seeing = (
            Executor(router, router, limits=limits, clock=SYSTEM_CLOCK, sees_mesh=lambda sees=sees: sees)
            for sees in (False, True)
        )
        now = time.monotonic()
        request = request_of("exact", now, now + 9.0)
        assert (await seeing.answer(request, X)).user["status"] == "404"
        waiting = asyncio.create_task(blind.answer(request, X))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        targets.update([view])
        assert (await waiting).user["status"] == "200"


class Leaving(Doubler):
    """Cannot be reached at the given calls."""

    def __init__(self, *absences):
        super().__init__()
        self.calls = 0
        self.absences = absences

    async def infer(self, request, context):
        self.calls += 1
        if self.calls in self.absences:
            raise MeshError(Code.UNAVAILABLE, "The link is down.", sent=False)
        return await super().infer(request, context)


async def test_a_sequence_goes_on_where_it_was_before_the_link_went():
    handler = Leaving(2, 3)
    executor = Executor(handler, handler, limits=RequestLimits(outlast_max_s=0.01), clock=SYSTEM_CLOCK)
    now = time.monotonic()
    request = request_of("sum", now, now + 9.0, shape="1,2")
    answers = [np.frombuffer((await executor.answer(request, X)).payload, np.float32)[0] for _ in range(3)]
    assert answers == [2.0, 4.0, 6.0]
    assert handler.calls == 5
