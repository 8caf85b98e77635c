"""The stand-alone router as a process, its directory, and what it tells people."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import ClientSession, web

from nearcast.client import AsyncClient
from nearcast.errors import Code, MeshError
from nearcast.handler import RequestContext
from nearcast.identity import CertificateAuthority, load_identity, make_csr, peer_uri, server_tls
from nearcast.transport.ngh2_connection import split_address
from nearcast.wire.request import TensorRequest
from router.config import ProbeConfig
from router.control import ControlLink
from router.directory import Announcer, DirectoryReader
from router.policy import Policy, PolicyConfig
from router.router import Router
from router.targets import ChannelFactory, NodeView, TargetSet
from tests.patience import until

ROOT = Path(__file__).parents[2]
NODE_FILE = Path(__file__).with_name("router_node.py")
_spec = importlib.util.spec_from_file_location("process_node", NODE_FILE)
assert _spec is not None
assert _spec.loader is not None
router_node = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(router_node)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("identities")
    ca = CertificateAuthority.create(root / "ca")
    for name, role in (("a", "edge"), ("r", "router"), ("sync", "sync"), ("fake", "edge")):
        folder = root / name
        folder.mkdir()
        key, csr = make_csr(name, role)
        (folder / "node.key").touch(mode=0o600)
        (folder / "node.key").write_bytes(key)
        (folder / "node.pem").write_bytes(ca.issue(csr, name=name, role=role, lifetime_s=3600))
        (folder / "ca.pem").write_bytes(ca.certificate_pem)
    return root


class ControlPlane:
    """The two routes of the node directory, over mTLS on loopback, in the form of the contract."""

    def __init__(self, folder: Path) -> None:
        self.identity = load_identity(folder)
        self.nodes: list[dict[str, Any]] = []
        self.more: dict[str, Any] = {}
        self.said: list[tuple[str, dict[str, Any]]] = []
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def start(self) -> str:
        app = web.Application()
        app.router.add_get("/v1/nodes", self._list)
        app.router.add_post("/v1/nodes/self", self._take)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        tls = server_tls(self.identity, require_client=False, alpn=("http/1.1",))
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=tls).start()
        self.port = self._runner.addresses[0][1]
        return f"https://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response({"nodes": self.nodes, **self.more})

    async def _take(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        uri = peer_uri(request.transport.get_extra_info("ssl_object"))
        if not uri:
            return web.json_response({"error": "Who are you?", "code": "UNAUTHENTICATED"}, status=401)
        self.said.append((uri, await request.json()))
        return web.json_response({})


@pytest.fixture
async def control(folders: Path) -> AsyncIterator[ControlPlane]:
    plane = ControlPlane(folders / "sync")
    yield plane
    await plane.stop()


def entry(name: str, address: str, role: str = "edge") -> dict[str, Any]:
    addresses = {"mesh": address, "grpc": "127.0.0.1:1"}
    return {"name": name, "role": role, "addresses": addresses, "seen_s_ago": 0.1, "models": {}}


async def test_the_directory_is_followed_and_outlived(folders: Path, control: ControlPlane) -> None:
    url = await control.start()
    router = Router(Policy(PolicyConfig()), node="r")
    identity = load_identity(folders / "r")
    targets = TargetSet(router, ChannelFactory("ngh2", identity))
    link = ControlLink(url, identity)
    fixed = NodeView(name="cloud-1", role="cloud", address="127.0.0.1:9")
    reader = DirectoryReader(link, targets, interval_s=0.05, fixed=[fixed])
    announcer = Announcer(
        link,
        addresses=lambda: {"grpc": "127.0.0.1:7", "mqtt": ""},
        models=lambda: {"m": ["1"]},
        interval_s=0.05,
    )
    try:
        control.nodes = [entry("a", "127.0.0.1:1"), entry("r", "127.0.0.1:2"), entry("s", "127.0.0.1:3", "sync")]
        await reader.start()
        await announcer.start()
        assert {view.name for view in targets.views} == {"a", "cloud-1"}
        assert control.said[0] == (
            "spiffe://nearcast/router/r",
            {"addresses": {"grpc": "127.0.0.1:7"}, "models": {"m": ["1"]}},
        )
        await control.stop()
        await asyncio.sleep(0.3)
        assert {view.name for view in targets.views} == {"a", "cloud-1"}  # the last view holds
        control.nodes = [entry("b", "127.0.0.1:1")]
        spoken = len(control.said)
        await control.start()
        await until(lambda: {view.name for view in targets.views} == {"b", "cloud-1"})
        await until(lambda: len(control.said) > spoken)
    finally:
        await announcer.close()
        await reader.close()
        await targets.close()
        await link.close()


async def test_a_controller_that_has_just_started_makes_nobody_forgotten(folders: Path, control: ControlPlane) -> None:
    router = Router(Policy(PolicyConfig()), node="r")
    identity = load_identity(folders / "r")
    targets = TargetSet(router, ChannelFactory("ngh2", identity))
    link = ControlLink(await control.start(), identity)
    control.nodes = [entry(name, "127.0.0.1:1") for name in ("a", "b", "c")]
    reader = DirectoryReader(link, targets, interval_s=0.02)

    def names() -> set[str]:
        return {view.name for view in targets.views}

    try:
        await reader.start()
        assert names() == {"a", "b", "c"}
        control.nodes = [entry("d", "127.0.0.1:1")]
        control.more = {"is_complete": False, "removed": ["c"]}
        await until(lambda: "d" in names())
        assert names() == {"a", "b", "d"}, "only who was removed is gone"
        control.more = {}
        await until(lambda: names() == {"d"})
    finally:
        await reader.close()
        await targets.close()
        await link.close()


async def test_a_router_that_is_cut_off_decides_alone_on_its_last_view(folders: Path, control: ControlPlane) -> None:
    hosts = [router_node.TinyHost(name, delay_s=0.001) for name in ("a", "b", "c")]
    identity = load_identity(folders / "a")
    servers = [router_node.make_node_server(host, identity) for host in hosts]
    for server in servers:
        await server.start()
    addresses = [server.address for server in servers]
    link = ControlLink(await control.start(), load_identity(folders / "r"))
    control.nodes = [entry(host.name, address) for host, address in zip(hosts, addresses, strict=True)]
    router = Router(Policy(PolicyConfig(), seed=1), node="r")
    config = ProbeConfig(report_ms=50, timeout_ms=200, drain_ms=100)
    targets = TargetSet(router, ChannelFactory("ngh2", load_identity(folders / "r")), config=config)
    reader = DirectoryReader(link, targets, interval_s=0.02)

    async def ask(count: int) -> set[str]:
        request = TensorRequest(model="digits", inputs={"x": np.float32([1.0])})
        asked = (router.infer(request, RequestContext(deadline=time.monotonic() + 5)) for _ in range(count))
        return {answer.served.node for answer in await asyncio.gather(*asked)}

    try:
        await reader.start()
        await until(lambda: len(router.policy.holders("digits")) == 3)
        assert await ask(60) <= {"a", "b", "c"}
        await control.stop()
        await asyncio.gather(servers[0].drain(0.0), servers[1].drain(0.0))
        assert await ask(60) == {"c"}
        assert {view.name for view in targets.views} == {"a", "b", "c"}
        # One is back where it was, the controller still is not.
        servers[0] = router_node.make_node_server(hosts[0], identity, address=addresses[0])
        await servers[0].start()
        answered = hosts[0].answered
        await until(lambda: all(t.breaker.state != "open" for t in router.policy.targets if t.name == "a"))
        async with asyncio.timeout(10):
            while hosts[0].answered == answered:
                assert await ask(20) <= {"a", "c"}
        assert router.policy.outstanding == 0
    finally:
        await reader.close()
        await targets.close()
        await router.close()
        await link.close()
        await asyncio.gather(*(server.drain(0.1) for server in servers))


async def test_only_the_role_sync_is_a_controller(folders: Path) -> None:
    impostor = ControlPlane(folders / "fake")
    link = ControlLink(await impostor.start(), load_identity(folders / "r"))
    try:
        with pytest.raises(MeshError, match="this needs the role sync") as caught:
            await link.call("GET", "/v1/nodes")
        assert caught.value.code is Code.UNAVAILABLE
    finally:
        await link.close()
        await impostor.stop()


async def test_a_controller_of_another_mesh_is_told_in_words(
    folders: Path, control: ControlPlane, tmp_path: Path
) -> None:
    other = CertificateAuthority.create(tmp_path / "other")
    (tmp_path / "ca.pem").write_bytes(other.certificate_pem)
    identity = replace(load_identity(folders / "r"), ca=tmp_path / "ca.pem")
    link = ControlLink(await control.start(), identity)
    try:
        with pytest.raises(MeshError, match="not from this mesh") as caught:
            await link.call("GET", "/v1/nodes")
        assert caught.value.code is Code.UNAVAILABLE
        assert "_ssl.c" not in caught.value.message
    finally:
        await link.close()


async def test_what_the_controller_refuses_is_said(folders: Path, control: ControlPlane) -> None:
    link = ControlLink(await control.start(), load_identity(folders / "r"))
    try:
        with pytest.raises(MeshError):
            await link.call("GET", "/v1/nothing")
    finally:
        await link.close()


def write_config(folders: Path, data: Path, node: str, more: str = "", grpc: str = "127.0.0.1:0") -> None:
    (data / "router.toml").write_text(
        f"""
        data_dir = "{data}"
        identity = "{folders / "r"}"
        [listen]
        grpc = "{grpc}"
        http = "127.0.0.1:0"
        metrics = "127.0.0.1:0"
        [[targets]]
        name = "a"
        address = "{node}"
        {more}
        """
    )


async def start_router(folders: Path, data: Path, node: str) -> tuple[asyncio.subprocess.Process, dict[str, str]]:
    data.mkdir()
    write_config(folders, data, node)
    with (data / "log").open("wb") as log:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "router", "--config", str(data / "router.toml"),
            stdout=asyncio.subprocess.PIPE, stderr=log, env=ENVIRONMENT,
        )  # fmt: skip
    assert child.stdout is not None
    async with asyncio.timeout(30):
        line = await child.stdout.readline()
    assert line, f"the router ended with {await child.wait()}"
    return child, json.loads(line)


async def test_a_router_process_serves_explains_reloads_and_drains(folders: Path, tmp_path: Path) -> None:
    host = router_node.TinyHost("a", delay_s=0.002, versions=("3",))
    server = router_node.make_node_server(host, load_identity(folders / "a"))
    await server.start()
    child, ready = await start_router(folders, tmp_path / "data", server.address)
    try:
        assert ready["ready"] == "r"
        async with AsyncClient([ready["grpc"]]) as client:
            x = {"x": np.array([4.0], np.float32)}
            async with asyncio.timeout(20):
                while True:  # until the first probe has been answered
                    try:
                        answer = await client.infer("digits", x, deadline_ms=5000)
                        break
                    except MeshError:
                        await asyncio.sleep(0.05)
            assert answer.outputs["y"].tolist() == [8.0]
            assert (answer.served_by, answer.version) == ("a", "3")
            host.gate.clear()
            last = asyncio.ensure_future(client.infer("digits", x, deadline_ms=40_000))
            await until(lambda: host.in_flight == 1)
            await explain(ready)
            await reload(child, ready, folders, tmp_path / "data", server.address)
            assert not last.done()
            child.send_signal(signal.SIGTERM)
            await until(lambda: refuses(ready["grpc"]), "it takes no more connections")
            host.gate.set()
            assert (await last).served_by == "a"
        async with asyncio.timeout(15):
            assert await child.wait() == 0
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
        await server.drain(0.2)


async def refuses(address: str) -> bool:
    try:
        _, writer = await asyncio.open_connection(*split_address(address))
    except OSError:
        return True
    writer.close()
    return False


async def reload(
    child: asyncio.subprocess.Process, ready: dict[str, str], folders: Path, data: Path, node: str
) -> None:
    """A broken file changes nothing; a good one changes what it can, while a request is under way."""
    log = data / "log"
    write_config(folders, data, node, more="price = -1")
    child.send_signal(signal.SIGHUP)
    await until(lambda: "configuration_refused" in log.read_text())
    assert "`targets` has a bad value" in log.read_text()
    write_config(folders, data, node, more="price = 7.5\n[policy]\nattempts_max = 2", grpc="127.0.0.1:1")
    child.send_signal(signal.SIGHUP)
    await until(lambda: "configuration_reloaded" in log.read_text())
    (told,) = [line for line in log.read_text().splitlines() if "configuration_reloaded" in line]
    changed, kept = json.loads(told)["changed"], json.loads(told)["needs_restart"]
    assert (changed, kept) == (["targets", "policy.attempts_max"], ["listen.grpc"])
    async with (
        ClientSession() as session,
        session.get(f"http://{ready['metrics']}/v2/nearcast/route?model=digits") as reply,
    ):
        (candidate,) = (await reply.json())["candidates"]
    assert (candidate["price"], candidate["in_flight"]) == (7.5, 1)


async def explain(ready: dict[str, str]) -> None:
    url = f"http://{ready['metrics']}"
    async with ClientSession() as session:
        async with session.get(f"{url}/v2/nearcast/route?model=digits&deadline_ms=500&size=1000") as reply:
            told = await reply.json()
        assert (told["decision"], told["target"], told["answers_as"]) == ("send", "a", "3")
        assert told["candidates"][0]["verdict"] == "chosen"
        assert told["candidates"][0]["t95_ms"] > told["candidates"][0]["rtt_ms"] > 0
        async with session.get(f"{url}/v2/nearcast/route?model=digits&deadline_ms=x") as reply:
            assert reply.status == 400
        async with session.get(f"{url}/v2/nearcast/route?model=cats") as reply:
            assert (await reply.json())["code"] == "MODEL_NOT_FOUND"
        async with session.get(f"{url}/metrics") as reply:
            metrics = await reply.text()
    assert 'nearcast_router_sends_total{code="OK",target="a"}' in metrics
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nearcast", "route", "explain", "digits", "--address", url, "--deadline-ms", "0.5",
        stdout=asyncio.subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    out, _ = await child.communicate()
    assert child.returncode == 0
    assert b"refused: DEADLINE" in out
    assert b"verdict" in out


async def test_a_wrong_configuration_is_one_line_and_code_78(tmp_path: Path) -> None:
    (tmp_path / "router.toml").write_text('[listen]\ngprc = "127.0.0.1:0"\n')
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nearcast", "router", "--config", str(tmp_path / "router.toml"),
        stderr=asyncio.subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    _, errors = await child.communicate()
    assert child.returncode == 78
    assert b"gprc" in errors
    assert b"grpc" in errors
    assert b"Traceback" not in errors
