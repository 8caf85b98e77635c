"""Nobody's request fails while a node leaves, while a router is replaced, and while the rest of the mesh is gone."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from nearcast.client import AsyncClient
from nearcast.errors import MeshError
from nearcast.identity import CertificateAuthority, load_identity, make_csr
from nearcast.load import NodeReport
from nearcast.transport.grpc import make_server
from nearcast.transport.mesh import join_methods, mesh_methods
from nearcast.transport.oip import oip_methods
from nearcast.transport.service import InferenceService
from router.app import RouterApp
from router.config import ListenConfig, ProbeConfig, RouterConfig, TargetConfig

_spec = importlib.util.spec_from_file_location("drain_node", Path(__file__).with_name("router_node.py"))
assert _spec is not None
assert _spec.loader is not None
router_node = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(router_node)
X = {"x": np.float32([2.0])}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("identities")
    ca = CertificateAuthority.create(root / "ca")
    for name, role in (("a", "edge"), ("b", "edge"), ("r1", "router"), ("r2", "router")):
        folder = root / name
        folder.mkdir()
        key, csr = make_csr(name, role)
        (folder / "node.key").touch(mode=0o600)
        (folder / "node.key").write_bytes(key)
        (folder / "node.pem").write_bytes(ca.issue(csr, name=name, role=role, lifetime_s=3600))
        (folder / "ca.pem").write_bytes(ca.certificate_pem)
    return root


class LeavingNode:
    """A node that can say that it drains, and then does."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.host = router_node.TinyHost(name, delay_s=0.004)
        self._draining = False
        methods = join_methods(
            oip_methods(InferenceService(self.host, self.host, server_name=name), trusted=True),
            mesh_methods(self.report),
        )
        identity = load_identity(folder)
        self.server = make_server("ngh2", methods, address="127.0.0.1:0", identity=identity, require_client=True)

    def report(self) -> NodeReport:
        return replace(self.host.report(), draining=self._draining)

    async def leave(self) -> None:
        self._draining = True
        await self.server.drain(2.0)


class Load:
    """Requests without a pause from a few tasks, and what became of them."""

    def __init__(self, client: AsyncClient) -> None:
        self.served_by: list[str] = []
        self.failures: list[MeshError] = []
        self._client = client
        self._tasks = [asyncio.ensure_future(self._ask()) for _ in range(6)]

    async def _ask(self) -> None:
        while True:
            try:
                self.served_by.append((await self._client.infer("digits", X, deadline_ms=5000)).served_by)
            except MeshError as error:
                self.failures.append(error)
            await asyncio.sleep(0.002)

    async def more(self, count: int = 60) -> list[str]:
        """Who answered the next `count` requests."""
        start = len(self.served_by)
        async with asyncio.timeout(10):
            while len(self.served_by) < start + count:
                assert self.failures == []
                await asyncio.sleep(0.005)
        return self.served_by[start:]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def nodes(folders: Path) -> AsyncIterator[list[LeavingNode]]:
    made = [LeavingNode(name, folders / name) for name in ("a", "b")]
    for node in made:
        await node.server.start()
    yield made
    await asyncio.gather(*(node.server.drain(0.1) for node in made))


async def start(folders: Path, data: Path, name: str, nodes: list[LeavingNode], grpc: str = "127.0.0.1:0") -> RouterApp:
    targets = tuple(TargetConfig(name=node.name, address=node.server.address) for node in nodes)
    app = RouterApp(
        RouterConfig(
            data_dir=str(data / name),
            identity=str(folders / name),
            listen=ListenConfig(grpc=grpc, http="", metrics="", mesh=""),
            targets=targets,
            probe=ProbeConfig(report_ms=100, drain_ms=500),
        )
    )
    await app.start()
    async with asyncio.timeout(10):
        while len(app.router.policy.holders("digits")) < len(nodes):
            await asyncio.sleep(0.005)
    return app


async def test_nothing_fails_while_a_node_and_a_router_are_replaced(
    folders: Path, tmp_path: Path, nodes: list[LeavingNode]
) -> None:
    routers: list[Any] = [await start(folders, tmp_path, name, nodes) for name in ("r1", "r2")]
    first, second = (app.addresses["grpc"] for app in routers)
    async with AsyncClient([first, second]) as client:
        load = Load(client)
        try:
            assert set(await load.more()) <= {"a", "b"}
            await nodes[0].leave()
            await load.more(20)  # what it answered last may just be coming in
            assert set(await load.more()) == {"b"}
            leaving = asyncio.ensure_future(routers[0].drain())
            await load.more()
            assert not await routers[0].router.is_ready()
            await leaving
            await load.more()
            routers[0] = await start(folders, tmp_path, "r1", nodes[1:], grpc=first)
            async with AsyncClient([first]) as other:
                assert (await other.infer("digits", X)).served_by == "b"
            assert set(await load.more()) == {"b"}
            # It is back for everybody before anybody needs it, although the other one is preferred until then.
            known = client._router.policy
            async with asyncio.timeout(5):
                while any(target.breaker.state != "closed" for target in known.targets):
                    await asyncio.sleep(0.005)
            await routers[1].drain()
            await load.more()
        finally:
            await load.stop()
    assert load.failures == []
    await routers[0].drain()
