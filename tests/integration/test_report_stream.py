"""How a router hears of its targets: reports that come by themselves, polls of old nodes, and a question when idle."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from nearcast.errors import Code, MeshError
from nearcast.handler import RequestContext
from nearcast.identity import CertificateAuthority, Identity, load_identity, make_csr
from nearcast.load import NodeReport
from nearcast.transport import mesh
from nearcast.transport.grpc import make_channel, make_server
from nearcast.transport.oip import oip_methods
from nearcast.transport.report_feed import ReportFeed
from nearcast.transport.seam import Methods, Server
from nearcast.transport.service import InferenceService
from nearcast.wire.request import TensorRequest
from router.config import ProbeConfig
from router.policy import Policy, PolicyConfig
from router.router import Router
from router.targets import ChannelFactory, NodeView, TargetSet
from tests.patience import until

_spec = importlib.util.spec_from_file_location("stream_node", Path(__file__).with_name("router_node.py"))
assert _spec is not None
assert _spec.loader is not None
router_node = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(router_node)
TinyHost = router_node.TinyHost
NAMES = {"a": "edge", "b": "edge", "r": "router"}


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    root = tmp_path_factory.mktemp("identities")
    ca = CertificateAuthority.create(root / "ca")
    out = {}
    for name, role in NAMES.items():
        folder = root / name
        folder.mkdir()
        key, csr = make_csr(name, role)
        (folder / "node.key").touch(mode=0o600)
        (folder / "node.key").write_bytes(key)
        (folder / "node.pem").write_bytes(ca.issue(csr, name=name, role=role, lifetime_s=3600))
        (folder / "ca.pem").write_bytes(ca.certificate_pem)
        out[name] = load_identity(folder)
    return out


class Watched:
    """A node whose reports and questions are counted."""

    def __init__(self, name: str, identity: Identity, kind: str = "ngh2", *, streams: bool = True) -> None:
        self.host = TinyHost(name, delay_s=0.001)
        self.draining = False
        self.asked = 0
        self.asked_at: list[float] = []
        inference = oip_methods(InferenceService(self.host, self.host, server_name=name), trusted=True)
        offered = mesh.mesh_methods(self.report)
        unary = {mesh.REPORT: self._count(offered.unary[mesh.REPORT])}
        reports = Methods(unary=unary, stream=offered.stream if streams else {})
        methods = mesh.join_methods(inference, reports)
        self.name = name
        self.server: Server = make_server(
            kind,
            methods,
            address="127.0.0.1:0",
            identity=identity,
            require_client=True,  # type: ignore[arg-type]
        )

    @property
    def view(self) -> NodeView:
        return NodeView(name=self.name, role="edge", address=self.server.address)

    def report(self) -> NodeReport:
        return replace(self.host.report(), draining=self.draining)

    def _count(self, method: Any) -> Any:
        def counted(body: bytes, call: Any) -> Any:
            self.asked += 1
            self.asked_at.append(time.monotonic())
            return method(body, call)

        return counted


Start = Callable[..., Awaitable[tuple[Router, TargetSet]]]


@pytest.fixture
async def start(identities: dict[str, Identity]) -> AsyncIterator[Start]:
    """Starts nodes and a router in front of them."""
    closers: list[Callable[[], Awaitable[Any]]] = []

    async def begin(*nodes: Watched, kind: str = "ngh2", report_ms: float = 50.0) -> tuple[Router, TargetSet]:
        for node in nodes:
            await node.server.start()
            closers.append(lambda server=node.server: server.drain(0.1))  # type: ignore[misc]
        router = Router(Policy(PolicyConfig(), seed=1), node="r")
        config = ProbeConfig(report_ms=report_ms, timeout_ms=300, drain_ms=200)
        targets = TargetSet(router, ChannelFactory(kind, identities["r"]), config=config)  # type: ignore[arg-type]
        closers.append(targets.close)
        targets.update([node.view for node in nodes])
        await until(lambda: len(router.policy.holders("digits")) == len(nodes))
        return router, targets

    yield begin
    for close in reversed(closers):
        await close()


async def ask(router: Router) -> str:
    request = TensorRequest(model="digits", inputs={"x": np.float32([1.0])})
    return (await router.infer(request, RequestContext(deadline=time.monotonic() + 5))).served.node


@pytest.mark.parametrize("kind", ["ngh2", "grpcio"])
async def test_a_change_is_heard_without_a_question(identities: dict[str, Identity], start: Start, kind: str) -> None:
    node = Watched("a", identities["a"], kind)
    # The beat is long: what is heard below is heard because it has changed.
    router, targets = await start(node, kind=kind, report_ms=400.0)
    await until(lambda: next(iter(targets.targets)).is_streaming)
    await until(lambda: node.asked == 2)  # the first question makes the connection, the second measures the way
    node.host.versions = ("1", "2")
    heard_s = await until(lambda: router.policy.holders("digits", "2"))
    assert heard_s < 0.3
    await asyncio.sleep(0.2)
    assert node.asked == 2
    assert router.policy.targets[0].rtt_measured


async def test_an_idle_target_is_asked_once_a_second_and_a_busy_one_never(
    identities: dict[str, Identity], start: Start
) -> None:
    idle, busy = Watched("a", identities["a"]), Watched("b", identities["b"])
    idle.host.versions = ("7",)
    router, targets = await start(busy, idle)
    await until(lambda: all(target.is_streaming for target in targets.targets) and min(idle.asked, busy.asked) >= 2)
    asked = idle.asked, busy.asked
    request = TensorRequest(model="digits", version="1", inputs={"x": np.float32([1.0])})
    while idle.asked < asked[0] + 2:
        await router.infer(request, RequestContext(deadline=time.monotonic() + 5))
        await asyncio.sleep(0.02)
    assert idle.asked_at[-1] - idle.asked_at[-2] > 0.8
    assert (idle.asked, busy.asked) == (asked[0] + 2, asked[1])


async def test_an_older_node_is_polled(identities: dict[str, Identity], start: Start) -> None:
    node = Watched("a", identities["a"], streams=False)
    router, targets = await start(node)
    await until(lambda: node.asked >= 5)
    assert not any(target.is_streaming for target in targets.targets)
    node.host.versions = ("2",)
    await until(lambda: router.policy.holders("digits", "2"))


async def test_a_broken_stream_is_a_lost_target_at_once(identities: dict[str, Identity], start: Start) -> None:
    dying, other = Watched("a", identities["a"]), Watched("b", identities["b"])
    router, targets = await start(dying, other, report_ms=2000.0)
    await until(lambda: all(target.is_streaming for target in targets.targets))
    await dying.server.drain(0.0)
    assert await until(lambda: any(t.name == "a" and t.breaker.state != "closed" for t in router.policy.targets)) < 1.0
    assert set(await asyncio.gather(*(ask(router) for _ in range(10)))) == {"b"}
    assert router.statistics.retries == 0


async def test_a_draining_node_says_so_and_gets_nothing_more(identities: dict[str, Identity], start: Start) -> None:
    leaving, other = Watched("a", identities["a"]), Watched("b", identities["b"])
    router, targets = await start(leaving, other, report_ms=2000.0)
    await until(lambda: all(target.is_streaming for target in targets.targets))
    leaving.draining = True
    assert await until(lambda: any(target.draining for target in router.policy.targets)) < 0.5
    answered = leaving.host.answered
    assert {await ask(router) for _ in range(10)} == {"b"}
    assert leaving.host.answered == answered


async def test_the_load_is_told_no_more_often_than_wished() -> None:
    load = iter(range(10_000))
    feed = ReportFeed(lambda: NodeReport(node="a", role="edge", in_flight=next(load)), look_s=0.005)
    started = time.monotonic()
    followed = feed.follow(interval_s=10.0, gap_s=0.05)
    for _ in range(5):
        await anext(followed)
    await followed.aclose()
    assert time.monotonic() - started >= 4 * 0.05


async def test_nothing_is_read_while_nobody_watches() -> None:
    reads = 0

    def report() -> NodeReport:
        nonlocal reads
        reads += 1
        return NodeReport(node="a", role="edge")

    feed = ReportFeed(report, look_s=0.005)
    followed = feed.follow(interval_s=0.02, gap_s=0.0)
    for _ in range(3):  # the same again is said at the interval
        assert await anext(followed)
    await followed.aclose()
    read = reads
    await asyncio.sleep(0.05)
    assert read > 2
    assert reads == read
    assert feed.watchers == 0


async def test_connections_are_not_all_made_at_once(identities: dict[str, Identity]) -> None:
    opened: list[asyncio.StreamWriter] = []
    together: list[int] = []

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Accepts and says nothing, as behind a cut link."""
        opened.append(writer)
        together.append(len(opened))
        await reader.read()
        opened.remove(writer)
        writer.close()

    hole = await asyncio.start_server(swallow, "127.0.0.1", 0)
    port = hole.sockets[0].getsockname()[1]
    router = Router(Policy(PolicyConfig(), seed=1), node="r")
    config = ProbeConfig(connects_max=4, report_ms=10, drain_ms=10)
    targets = TargetSet(router, ChannelFactory("ngh2", identities["r"]), config=config)
    live = Watched("a", identities["a"])
    await live.server.start()
    try:
        views = [NodeView(name=f"n{i}", role="edge", address=f"127.0.0.1:{port}") for i in range(12)]
        targets.update(views)
        await until(lambda: len(opened) == 4)
        await asyncio.sleep(0.1)
        assert max(together) == 4
        # Who can be reached waits for a place at most until a handshake has failed.
        targets.update([live.view, *views[:3]])
        assert await until(lambda: router.policy.holders("digits")) < 4.0
    finally:
        await targets.close()
        await live.server.drain(0.1)
        hole.close()


async def test_a_stranger_may_not_watch(identities: dict[str, Identity], start: Start) -> None:
    node = Watched("a", identities["a"])
    await start(node)
    channel = make_channel("ngh2", node.server.address, ca=identities["a"].ca)
    with pytest.raises(MeshError) as caught:
        async for _ in mesh.watch_report(channel, mesh.Watch()):
            pass
    assert caught.value.code in (Code.UNAVAILABLE, Code.UNAUTHENTICATED)
    await channel.close()
