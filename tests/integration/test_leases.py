"""Clients that learn their nodes by leases: from a router process and from servers in this process."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from nearcast.client import AsyncClient, Client
from nearcast.clock import SYSTEM_CLOCK
from nearcast.errors import Code, MeshError
from nearcast.identity import load_identity
from nearcast.transport.grpc import make_channel, make_server
from nearcast.transport.lease import ask_lease, lease_methods
from nearcast.transport.mesh import join_methods
from nearcast.transport.oip import oip_methods
from nearcast.transport.reflection import reflection_methods
from nearcast.transport.remote import RemoteNode
from nearcast.transport.service import InferenceService
from nearcast.wire.lease import LeaseQuestion
from router.lease import Announced, LeaseConfig
from router.lessor import Lessor
from router.policy import Policy, PolicyConfig
from router.router import Router
from tests.integration.lease_parts import make_identities
from tests.patience import until

_spec = importlib.util.spec_from_file_location("lease_node", Path(__file__).with_name("router_node.py"))
assert _spec is not None
assert _spec.loader is not None
router_node = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(router_node)
X = {"x": np.array([21.0], np.float32)}
QUICK = LeaseConfig(ttl_ms=200, ranking_ms=5)


class Fleet:
    """Nodes and a stand-alone router in this process; the router hears the nodes when the test says so."""

    def __init__(self, names: str, config: LeaseConfig, folder: Path | None) -> None:
        self.hosts = {name: router_node.TinyHost(name, delay_s=0.002) for name in names}
        self.folder = folder
        self.servers: dict[str, Any] = {}
        self.router = Router(Policy(PolicyConfig(), 1), node="r", forward=False)
        self.lessor = Lessor(
            self.router, lambda: [Announced(h.report(), "127.0.0.1:1") for h in self.hosts.values()], config=config
        )
        self.front: Any = None
        self.nodes: list[RemoteNode] = []

    async def start(self) -> None:
        for name, host in self.hosts.items():
            identity = None if self.folder is None else load_identity(self.folder / name)
            methods = oip_methods(InferenceService(host, host, server_name=name), trusted=False)
            server = self.servers[name] = make_server("ngh2", methods, address="127.0.0.1:0", identity=identity)
            await server.start()
            host.client_address = server.address
            ca = None if self.folder is None else self.folder / name / "ca.pem"
            self.nodes.append(RemoteNode(make_channel("ngh2", server.address, ca=ca), name))
            self.router.attach(name, self.nodes[-1], "peer")
        self.hear()
        methods = join_methods(
            oip_methods(InferenceService(self.router, self.router, server_name="r"), trusted=False),
            lease_methods(self.lessor.grant),
        )
        methods = join_methods(methods, reflection_methods(methods))
        identity = None if self.folder is None else load_identity(self.folder / "r")
        self.front = make_server("ngh2", methods, address="127.0.0.1:0", identity=identity)
        await self.front.start()

    def hear(self) -> None:
        for name, host in self.hosts.items():
            self.router.policy.on_report(SYSTEM_CLOCK.monotonic(), name, host.report())

    async def close(self) -> None:
        await self.router.close()
        await asyncio.gather(*(node.close() for node in self.nodes))
        await asyncio.gather(*(server.drain(0.1) for server in [self.front, *self.servers.values()]))


@asynccontextmanager
async def running(
    names: str = "ab", *, config: LeaseConfig = QUICK, folder: Path | None = None
) -> AsyncIterator[Fleet]:
    fleet = Fleet(names, config, folder)
    await fleet.start()
    try:
        yield fleet
    finally:
        await fleet.close()


async def ask(fleet: Fleet, **fields: Any) -> Any:
    channel = make_channel("ngh2", fleet.front.address)
    try:
        return await ask_lease(channel, LeaseQuestion(**fields), deadline=SYSTEM_CLOCK.monotonic() + 10.0)
    finally:
        await channel.close()


def services(address: str) -> list[str]:
    with grpc.insecure_channel(address) as channel:
        return list(ProtoReflectionDescriptorDatabase(channel).get_services())


async def test_a_lease_names_the_targets_and_is_renewed_cheaply() -> None:
    async with running() as fleet:
        lease = await ask(fleet, model="digits", size_bytes=600, deadline_ms=100)
        assert {t.address for t in lease.targets} == {s.address for s in fleet.servers.values()}
        assert 0 < lease.hedge_after_ms < 100
        assert (lease.size_bytes, lease.deadline_ms, lease.stateful) == (1024, 96, False)
        again = await ask(
            fleet, model="digits", size_bytes=600, deadline_ms=100, lease_id=lease.lease_id, etag=lease.etag
        )
        assert (again.unchanged, again.targets, again.lease_id) == (True, (), lease.lease_id)
        assert "nearcast.wire.v1.Routing" in await asyncio.to_thread(services, fleet.front.address)
        with pytest.raises(MeshError) as caught:
            await ask(fleet, model="unknown")
        assert caught.value.code is Code.MODEL_NOT_FOUND
        with pytest.raises(MeshError) as caught:
            await ask(fleet, model="digits", version="9")
        assert caught.value.code is Code.VERSION_MISMATCH


async def test_a_client_calls_the_nodes_directly_and_goes_on_without_the_router() -> None:
    async with running() as fleet, AsyncClient(fleet.front.address) as client:
        for _ in range(20):
            assert (await client.infer("digits", X, priority=1)).outputs["y"].tolist() == [42.0]
        assert fleet.router.statistics.sends == {}
        assert client.counts.passed_on == 0
        # The lease of the first request becomes old, and the router dies.
        await until(lambda: client.counts.leases >= 2)
        await fleet.front.drain(0.0)
        await asyncio.sleep(0.3)
        for _ in range(20):
            await client.infer("digits", X)
        # And a node with it: the others go on.
        await fleet.servers["a"].drain(0.0)
        assert {(await client.infer("digits", X)).served_by for _ in range(20)} <= {"a", "b"}
        assert client.counts.failures == 0


async def test_what_no_lease_covers_goes_through_the_router() -> None:
    async with running("a") as fleet:
        fleet.hosts["a"].client_address = ""  # clients cannot reach it
        async with AsyncClient(fleet.front.address) as client:
            assert (await client.infer("digits", X)).served_by == "a"
            assert client.counts.passed_on == 1
            with pytest.raises(MeshError) as caught:
                await client.infer("unknown", X)
            assert caught.value.code is Code.MODEL_NOT_FOUND
            assert client.counts.failed == {Code.MODEL_NOT_FOUND: 1}
    host = router_node.TinyHost("plain")
    server = router_node.make_node_server(host, None)  # knows no leases
    await server.start()
    async with AsyncClient(server.address) as client:
        assert (await client.infer("digits", X)).served_by == "plain"
    await server.drain(0.1)


async def test_versions_and_sequences_find_their_node() -> None:
    async with running() as fleet, AsyncClient(fleet.front.address) as client:
        fleet.hosts["b"].versions = ("1", "2")
        for _ in range(5):
            assert (await client.infer("digits", X, version="2")).served_by == "b"
        walks = {
            name: {(await client.infer("digits", X, sequence=name)).served_by for _ in range(10)} for name in "123"
        }
        assert {len(nodes) for nodes in walks.values()} == {1}
        assert client.counts.failures == 0


async def test_a_new_node_is_used_and_one_that_left_is_not() -> None:
    async with running() as fleet, AsyncClient(fleet.front.address) as client:
        fleet.router.detach("b")
        served = {(await client.infer("digits", X)).served_by for _ in range(10)}
        assert served == {"a"}
        fleet.router.attach("b", fleet.nodes[1], "peer")
        fleet.router.detach("a")
        fleet.hear()
        async with asyncio.timeout(20):
            while (await client.infer("digits", X)).served_by != "b":
                await asyncio.sleep(0.02)
        assert client.counts.failures == 0


async def test_leased_nodes_must_show_their_name(tmp_path: Path) -> None:
    make_identities(tmp_path, {"a": "edge", "b": "edge", "r": "router"})
    ca = tmp_path / "r" / "ca.pem"
    async with running(folder=tmp_path) as fleet:
        for host in fleet.hosts.values():
            host.client_tls = True
        for transport in ("ngh2", "grpcio"):
            async with AsyncClient(fleet.front.address, ca=ca, transport=transport) as client:
                assert (await client.infer("digits", X)).served_by in "ab"
                assert client.counts.passed_on == 0
        # A lease that sends us to somebody else: nobody is believed, and the router routes.
        a, b = fleet.hosts.values()
        a.client_address, b.client_address = b.client_address, a.client_address
        for transport in ("ngh2", "grpcio"):
            async with AsyncClient(fleet.front.address, ca=ca, transport=transport) as client:  # type: ignore[arg-type]
                assert (await client.infer("digits", X)).served_by in "ab"
                assert client.counts.passed_on == 1


async def frames(count: int, pause_s: float = 0.0) -> AsyncIterator[dict[str, Any]]:
    for number in range(count):
        yield {"x": np.array([number], np.float32)}
        await asyncio.sleep(pause_s)


async def test_streams_answer_in_order_or_only_the_newest() -> None:
    async with running() as fleet, AsyncClient(fleet.front.address) as client:
        answers = [answer async for answer in client.stream("digits", frames(30))]
        assert [float(a.outputs["y"][0]) for a in answers] == [2.0 * n for n in range(30)]
        assert [a.index for a in answers] == list(range(30))
        for host in fleet.hosts.values():
            host.delay_s = 0.03
        newest = [a async for a in client.stream("digits", frames(60, 0.005), latest=True, deadline_ms=1000)]
        shown = [a.index for a in newest]
        assert shown == sorted(set(shown))
        assert 5 <= len(shown) < 40
        assert shown[-1] == 59
        assert len(shown) + client.counts.dropped == 60
        assert all(float(a.outputs["y"][0]) == 2.0 * a.index for a in newest)
        with pytest.raises(MeshError) as caught:
            _ = [a async for a in client.stream("unknown", frames(3), latest=True)]
        assert caught.value.code is Code.MODEL_NOT_FOUND
        # Leaving a stream cancels what is under way.
        async for _ in client.stream("digits", frames(1000)):
            break
        await until(lambda: not any(host.in_flight for host in fleet.hosts.values()))


async def test_a_stream_of_the_newest_survives_its_node() -> None:
    async with running() as fleet, AsyncClient(fleet.front.address) as client:
        served: list[str] = []
        async for answer in client.stream("digits", frames(80, 0.005), latest=True, deadline_ms=1000):
            served.append(answer.served_by)
            if len(served) == 10:
                await fleet.servers[served[0]].drain(0.0)
        assert set(served) == {"a", "b"}


async def test_the_blocking_client_works_inside_a_running_loop() -> None:
    async with running() as fleet:
        # As in a notebook, whose thread runs a loop: the servers have another one here, so that they can answer.
        def notebook() -> list[float]:
            async def cell() -> list[float]:
                with Client(fleet.front.address) as client:
                    first = client.infer("digits", {"x": [4.0]}).outputs["y"].tolist()
                    seen = [float(a.outputs["y"][0]) for a in client.stream("digits", iter([X, X]))]
                    for answer in client.stream("digits", iter([X] * 50), latest=True):
                        seen.append(float(answer.outputs["y"][0]))
                        break
                return [*first, *seen]

            return asyncio.run(cell())

        assert await asyncio.to_thread(notebook) == [8.0, 42.0, 42.0, 42.0]
