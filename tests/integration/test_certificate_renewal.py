"""Certificates that run out while everything goes on: renewed by the node, shown by every listener and channel."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from nearcast import telemetry
from nearcast.clock import SYSTEM_CLOCK, ManualClock
from nearcast.errors import Code, MeshError
from nearcast.identity import (
    CertificateAuthority,
    Identity,
    client_tls,
    load_identity,
    make_csr,
    parse_uri,
    peer_uri,
    server_tls,
)
from nearcast.identity.files import write_file
from nearcast.transport.grpc import KINDS, Kind, make_channel, make_server
from nearcast.transport.rest import RestServer
from nearcast.transport.seam import Call, Channel, Methods, Reply, Server
from nearcast.transport.service import InferenceService
from router.control import ControlLink
from router.policy import Policy
from router.policy.config import PolicyConfig
from router.renewal import Renewal, RenewalLimits
from router.router import Router
from router.serving_config import AgentSettings, ListenConfig, ServingConfig
from router.serving_node import ServingNode
from tests.patience import until

METHOD = "/t.T/whoami"
LIMITS = RenewalLimits(pause_min_s=0.05, backoff_base_s=0.05, backoff_max_s=0.2)


class Controller:
    """`POST /v1/renew` over mTLS with a real authority. `lifetime_s` is that of what it issues."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.authority = CertificateAuthority.create(root / "ca")
        self.lifetime_s = 3600.0
        self.asked: list[str] = []
        self.seen: list[str] = []
        self.is_broken = False
        self._port = 0
        self._runner: web.AppRunner | None = None
        self._identity = self.enrol("sync", "sync")

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._port}"

    def enrol(self, name: str, role: str, authority: CertificateAuthority | None = None) -> Identity:
        folder = self.root / name / "identity"
        folder.mkdir(parents=True)
        key, csr = make_csr(name, role)
        pem = (authority or self.authority).issue(csr, name=name, role=role, lifetime_s=self.lifetime_s)
        write_file(folder / "node.key", key, mode=0o600)
        write_file(folder / "node.pem", pem)
        write_file(folder / "ca.pem", self.authority.certificate_pem)
        write_file(folder / "control", self.url.encode())
        return load_identity(folder)

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/renew", self._renew)
        app.router.add_get("/v1/nodes", self._list)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await self._runner.setup()
        tls = server_tls(self._identity, require_client=True, alpn=("http/1.1",))
        await web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=tls).start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _renew(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        role, name = parse_uri(peer_uri(request.transport.get_extra_info("ssl_object")))
        self.asked.append(name)
        if self.is_broken:
            return web.json_response({"error": "The disk is full.", "code": "UNAVAILABLE"}, status=503)
        csr = (await request.json())["csr"].encode()
        pem = self.authority.issue(csr, name=name, role=role, lifetime_s=self.lifetime_s)
        return web.json_response(
            {"certificate": pem.decode(), "ca": self.authority.certificate_pem.decode(), "root": "{}"}
        )

    async def _list(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        tls = request.transport.get_extra_info("ssl_object")
        self.seen.append(hashlib.sha256(tls.getpeercert(binary_form=True)).hexdigest())
        return web.json_response({"nodes": []})


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[Controller]:
    controller = Controller(tmp_path)
    await controller.start()
    yield controller
    await controller.stop()


async def whoami(_: bytes, call: Call) -> Reply:
    return Reply((call.identity.encode(),))


async def ask(channel: Channel) -> str:
    reply = await channel.unary(METHOD, (b"",), deadline=time.monotonic() + 5)
    return b"".join(reply.body).decode()


async def ask_anew(kind: Kind, address: str, identity: Identity) -> str:
    channel = make_channel(kind, address, identity=identity)
    try:
        return await ask(channel)
    finally:
        await channel.close()


class Traffic:
    """Asks without a pause, on one channel that stays and on new ones, until it is told to stop."""

    def __init__(self, kind: Kind, address: str, identity: Identity) -> None:
        self.answers: list[str] = []
        self.failures: list[str] = []
        self._kind = kind
        self._address = address
        self._identity = identity
        self._tasks = [asyncio.ensure_future(self._ask_on_one()), asyncio.ensure_future(self._ask_on_new_ones())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask_on_one(self) -> None:
        channel = make_channel(self._kind, self._address, identity=self._identity)
        try:
            while True:
                await self._note(ask(channel))
                await asyncio.sleep(0.002)
        finally:
            await channel.close()

    async def _ask_on_new_ones(self) -> None:
        while True:
            await self._note(ask_anew(self._kind, self._address, self._identity))
            await asyncio.sleep(0.02)

    async def _note(self, answer: object) -> None:
        try:
            self.answers.append(await answer)  # type: ignore[misc]
        except MeshError as error:
            self.failures.append(f"{self._kind}: {error}")


async def test_no_call_fails_while_certificates_come_and_go(controller: Controller) -> None:
    controller.lifetime_s = 4.0
    cloud, edge = controller.enrol("cloud-1", "cloud"), controller.enrol("edge-1", "edge")
    first = {identity.name: identity.validity() for identity in (cloud, edge)}
    async with AsyncExitStack() as closers:
        servers: dict[Kind, Server] = {}
        for kind in KINDS:
            servers[kind] = make_server(
                kind, Methods(unary={METHOD: whoami}), address="127.0.0.1:0", identity=cloud, require_client=True
            )
            await servers[kind].start()
            closers.push_async_callback(servers[kind].drain, 0.2)
        renewals = [Renewal(identity, limits=LIMITS) for identity in (cloud, edge)]
        for renewal in renewals:
            renewal.start()
            closers.push_async_callback(renewal.close)
        traffic = [Traffic(kind, servers[kind].address, edge) for kind in KINDS]
        for each in traffic:
            closers.push_async_callback(each.stop)
        await until(lambda: min(controller.asked.count(name) for name in ("cloud-1", "edge-1")) >= 3)
        await until(lambda: all(time.time() > validity.ends_at for validity in first.values()))
        seen = [len(each.answers) for each in traffic]
        await until(lambda: all(len(each.answers) > before + 20 for each, before in zip(traffic, seen, strict=True)))
        assert [failure for each in traffic for failure in each.failures] == []
        assert {answer for each in traffic for answer in each.answers} == {"spiffe://nearcast/edge/edge-1"}
        assert all(identity.validity().ends_at > first[identity.name].ends_at for identity in (cloud, edge))


@pytest.mark.parametrize("kind", KINDS)
async def test_calls_and_streams_in_flight_outlive_a_renewal(kind: Kind, controller: Controller) -> None:
    cloud, edge = controller.enrol("cloud-1", "cloud"), controller.enrol("edge-1", "edge")
    started, release = asyncio.Event(), asyncio.Event()

    async def wait(_: bytes, call: Call) -> Reply:
        started.set()
        await release.wait()
        return Reply((call.identity.encode(),))

    async def talk(messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
        async for message in messages:
            yield Reply((message, call.identity.encode()))

    async def words() -> AsyncIterator[Sequence[bytes]]:
        while (word := await said.get()) is not None:
            yield (word,)

    said: asyncio.Queue[bytes | None] = asyncio.Queue()
    methods = Methods(unary={METHOD: whoami, "/t.T/wait": wait}, stream={"/t.T/talk": talk})
    server = make_server(kind, methods, address="127.0.0.1:0", identity=cloud, require_client=True)
    await server.start()
    channel = make_channel(kind, server.address, identity=edge)
    waiting = asyncio.ensure_future(channel.unary("/t.T/wait", (b"",), deadline=time.monotonic() + 10))
    await started.wait()
    heard = aiter(channel.stream("/t.T/talk", words()))
    said.put_nowait(b"1 ")
    assert await anext(heard) == b"1 " + edge.uri.encode()
    for identity in (cloud, edge):
        identity.reload()
    assert await ask(channel) == edge.uri
    said.put_nowait(b"2 ")
    assert await anext(heard) == b"2 " + edge.uri.encode()
    said.put_nowait(None)
    assert [word async for word in heard] == []
    assert not waiting.done()
    release.set()
    assert (await waiting).body == (edge.uri.encode(),)
    await channel.close()
    await server.drain(0.2)


async def test_a_controller_that_is_away_is_asked_again_and_nothing_else_waits(controller: Controller) -> None:
    cloud, edge = controller.enrol("cloud-1", "cloud"), controller.enrol("edge-1", "edge")
    server = make_server("ngh2", Methods(unary={METHOD: whoami}), address="127.0.0.1:0", identity=cloud)
    await server.start()
    before = cloud.certificate.read_bytes()
    await controller.stop()
    late = ManualClock(wall=cloud.validity().renew_at + 3600)
    registry = CollectorRegistry()
    renewal = Renewal(cloud, limits=LIMITS, clock=late, registry=registry)
    renewal.start()
    for _ in range(10):
        assert await ask_anew("ngh2", server.address, edge) == edge.uri
        await asyncio.sleep(0.02)
    assert cloud.certificate.read_bytes() == before
    controller.lifetime_s = 7200
    controller.is_broken = True
    await controller.start()
    await until(lambda: len(controller.asked) >= 3)
    controller.is_broken = False
    await until(lambda: renewal.validity == cloud.validity() and cloud.certificate.read_bytes() != before)
    shown = registry.get_sample_value("nc_certificate_ends_at_seconds")
    assert shown == cloud.validity().ends_at
    # The clock says that this one is old as well; that is no reason to ask without end.
    asked = len(controller.asked)
    await asyncio.sleep(0.3)
    assert len(controller.asked) == asked
    await renewal.close()
    await server.drain(0.2)


async def test_a_broken_controller_is_asked_at_a_bounded_rate(controller: Controller) -> None:
    cloud = controller.enrol("cloud-1", "cloud")
    controller.is_broken = True
    renewal = Renewal(
        cloud, limits=RenewalLimits(pause_min_s=0.1, backoff_base_s=0.01), clock=ManualClock(wall=time.time() + 3600)
    )
    renewal.start()
    started = time.monotonic()
    await until(lambda: len(controller.asked) >= 4)
    assert time.monotonic() - started >= 0.4
    await renewal.close()


async def renew_once(identity: Identity) -> None:
    """Have a node renew at once, because its clock says that it is time."""
    before = identity.certificate.read_bytes()
    renewal = Renewal(identity, limits=LIMITS, clock=ManualClock(wall=identity.validity().renew_at + 3600))
    shown: list[bytes] = []
    identity.on_reload(renewal, lambda _: shown.append(identity.certificate.read_bytes()))
    renewal.start()
    await until(lambda: shown)
    await renewal.close()
    assert shown != [before]


async def test_the_rest_listener_shows_the_new_certificate(controller: Controller) -> None:
    cloud = controller.enrol("cloud-1", "cloud")
    router = Router(Policy(PolicyConfig(), 1), node="cloud-1")
    tls = server_tls(cloud, require_client=False, alpn=("http/1.1",))
    server = RestServer(InferenceService(router, router, server_name="t"), address="127.0.0.1:0", tls=tls)
    await server.start()
    host, port = server.address.split(":")
    for _ in range(2):
        context = client_tls(None, ca=cloud.ca, alpn=("http/1.1",))
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        assert found == ssl.PEM_cert_to_DER_cert(cloud.certificate.read_text())
        await renew_once(cloud)
    await server.drain(0.2)


async def test_the_control_link_connects_anew_with_the_new_certificate(controller: Controller) -> None:
    edge = controller.enrol("edge-1", "edge")
    link = ControlLink(controller.url, edge)
    for _ in range(3):
        for _ in range(2):
            await link.call("GET", "/v1/nodes")
        await renew_once(edge)
    seen = controller.seen
    assert seen[0::2] == seen[1::2]
    assert len(set(seen)) == 3
    await link.close()


async def test_an_expired_certificate_never_stops_loopback_serving(controller: Controller, tmp_path: Path) -> None:
    past = ManualClock(wall=SYSTEM_CLOCK.wall() - 30 * 86_400)
    authority = CertificateAuthority.load(controller.root / "ca", clock=past)
    identity = controller.enrol("edge-1", "edge", authority)
    assert identity.validity().ends_at < time.time()
    anywhere = ListenConfig(grpc="127.0.0.1:0", http="127.0.0.1:0", metrics="127.0.0.1:0")
    config = ServingConfig(data_dir=str(tmp_path / "edge-1"), listen=anywhere, agent=AgentSettings(enabled=False))
    started = telemetry.start("edge", config.telemetry)
    node = ServingNode(config, started, role="edge", tier="local", identity=identity, find_targets=True)
    await node.start()
    try:
        channel = make_channel("ngh2", node.addresses["grpc"])
        reply = await channel.unary("/inference.GRPCInferenceService/ServerLive", (b"",))
        assert b"".join(reply.body) == b"\x08\x01"
        await channel.close()
        async with aiohttp.ClientSession() as session:
            alive = await session.get(f"http://{node.addresses['http']}/v2/health/live")
            assert alive.status == 200
            metrics = await session.get(f"http://{node.addresses['metrics']}/metrics")
            assert "nc_certificate_ends_at_seconds" in await metrics.text()
        with pytest.raises(MeshError, match="expired"):
            await ask_anew("ngh2", node.addresses["mesh"], controller.enrol("edge-2", "edge"))
    finally:
        await node.drain()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_listener_that_others_can_reach_needs_an_identity(
    kind: Kind, controller: Controller, tmp_path: Path
) -> None:
    for address in ("0.0.0.0:0", "[::]:0", "192.0.2.7:8001", "edge.example:8001"):
        with pytest.raises(MeshError, match="has no certificates") as caught:
            make_server(kind, Methods(), address=address)
        assert caught.value.code is Code.INVALID_REQUEST
    make_server(kind, Methods(), address="0.0.0.0:0", identity=controller.enrol("cloud-1", "cloud"))
    for address in (f"unix:{tmp_path}/n.sock", "127.0.0.1:0", "localhost:0", "[::1]:0"):
        server = make_server(kind, Methods(), address=address)
        await server.start()
        await server.drain(0.1)
