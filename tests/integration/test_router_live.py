"""The router in front of real nodes: mTLS mesh listeners on loopback, some of them processes that get killed."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import sys
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
from nearcast.load import VersionReport
from nearcast.store import Store
from nearcast.store.pointer import Pointer
from nearcast.wire.request import TensorRequest
from router.config import ProbeConfig
from router.policy import Policy, PolicyConfig, RequestFacts, Send
from router.router import Router
from router.splits import NO_SPLIT, StoreSplits
from router.targets import ChannelFactory, NodeView, TargetSet
from tests.patience import own_time, until

NODE_FILE = Path(__file__).with_name("router_node.py")
_spec = importlib.util.spec_from_file_location("router_node", NODE_FILE)
assert _spec is not None
assert _spec.loader is not None
router_node = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(router_node)
TinyHost = router_node.TinyHost
FAST = ProbeConfig(report_ms=40, timeout_ms=300, directory_ms=40, drain_ms=500)
ROOT = Path(__file__).parents[2]


class Mesh:
    """A CA and whatever it has certified."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = CertificateAuthority.create(folder / "ca")

    def identity(self, name: str, role: str) -> Identity:
        folder = self.folder / name
        folder.mkdir()
        key, csr = make_csr(name, role)
        (folder / "node.key").touch(mode=0o600)
        (folder / "node.key").write_bytes(key)
        (folder / "node.pem").write_bytes(self.ca.issue(csr, name=name, role=role, lifetime_s=3600))
        (folder / "ca.pem").write_bytes(self.ca.certificate_pem)
        return load_identity(folder)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Mesh:
    made = Mesh(tmp_path_factory.mktemp("mesh"))
    for name, role in (("a", "edge"), ("b", "edge"), ("c", "cloud"), ("r", "router"), ("s", "sync")):
        made.identity(name, role)
    return made


def identity(mesh: Mesh, name: str) -> Identity:
    return load_identity(mesh.folder / name)


@pytest.fixture(params=["ngh2", "grpcio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Bench:
    """Nodes, a router and its targets, closed at the end of a test."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.closers: list[Callable[[], Awaitable[Any]]] = []

    async def node(self, host: Any, kind: str = "ngh2") -> NodeView:
        own = identity(self.mesh, host.name)
        server = router_node.make_node_server(host, own, kind)
        await server.start()
        self.closers.append(lambda: server.drain(0.2))
        return NodeView(name=host.name, role=own.role, address=server.address)

    async def process(
        self, name: str, delay_ms: float, versions: str = "1"
    ) -> tuple[NodeView, asyncio.subprocess.Process]:
        own = identity(self.mesh, name)
        child = await asyncio.create_subprocess_exec(
            sys.executable, str(NODE_FILE), name, str(delay_ms), versions, str(own.certificate.parent),
            stdout=asyncio.subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self.closers.append(lambda: end(child))
        assert child.stdout is not None
        async with asyncio.timeout(20):
            ready = json.loads(await child.stdout.readline())
        return NodeView(name=name, role=own.role, address=ready["grpc"]), child

    async def router(
        self, *views: NodeView, kind: str = "ngh2", config: PolicyConfig | None = None, **options: Any
    ) -> tuple[Router, TargetSet]:
        router = Router(Policy(config or PolicyConfig(), seed=1), node="r", **options)
        await router.start()
        self.closers.append(router.close)
        make = ChannelFactory(kind, identity(self.mesh, "r"))  # type: ignore[arg-type]
        targets = TargetSet(router, make, config=FAST)
        self.closers.append(targets.close)
        targets.update(views)
        await until(lambda: {view.name for view in views} <= set(router.policy.holders("digits")))
        return router, targets


async def end(child: asyncio.subprocess.Process) -> None:
    if child.returncode is None:
        child.kill()
    await child.wait()


@pytest.fixture
async def bench(mesh: Mesh) -> AsyncIterator[Bench]:
    made = Bench(mesh)
    yield made
    for close in reversed(made.closers):
        await close()


def request(value: float = 1.0, **options: Any) -> TensorRequest:
    return TensorRequest(model="digits", inputs={"x": np.array([value], np.float32)}, **options)


def context(timeout_s: float = 5.0, **options: Any) -> RequestContext:
    return RequestContext(deadline=time.monotonic() + timeout_s, **options)


async def test_a_request_travels_to_a_node_and_back(bench: Bench, kind: str) -> None:
    host = TinyHost("a", versions=("3", "4"))
    router, _ = await bench.router(await bench.node(host, kind), kind=kind)
    response = await router.infer(request(21.0, id="q", version="3"), context(principal="device"))
    assert response.decode()["y"].tolist() == [42.0]
    assert (response.served.node, response.version, response.id) == ("a", "3", "q")
    version, seen = host.seen[0]
    assert (version, seen.forwarded, seen.version) == ("3", True, "3")
    assert router.policy.outstanding == 0
    assert sum(t.own for t in router.policy.targets) == 0


async def test_a_killed_node_costs_no_stateless_request(bench: Bench) -> None:
    dying, child = await bench.process("a", delay_ms=2000)
    router, _ = await bench.router(dying, config=PolicyConfig(hedge_share=0, hedge_burst=0))
    asked = [asyncio.ensure_future(router.infer(request(i), context())) for i in range(12)]
    await until(lambda: sum(t.own for t in router.policy.targets) == 12)
    await asyncio.sleep(0.03)  # the calls are on the wire
    host = TinyHost("b", delay_s=0.001)
    second = await bench.node(host)
    make = ChannelFactory("ngh2", identity(bench.mesh, "r"))
    others = TargetSet(router, make, config=FAST)
    bench.closers.append(others.close)
    others.update([second])
    await until(lambda: "b" in router.policy.holders("digits"))
    assert not any(task.done() for task in asked)
    child.send_signal(signal.SIGKILL)
    answers = await asyncio.gather(*asked)
    assert [a.served.node for a in answers] == ["b"] * 12
    assert [float(a.decode()["y"][0]) for a in answers] == [2.0 * i for i in range(12)]
    assert router.statistics.retries == 12
    assert router.policy.outstanding == 0
    # And nobody is sent to the dead one, which is noticed at once.
    again = await asyncio.gather(*(router.infer(request(), context()) for _ in range(20)))
    assert {a.served.node for a in again} == {"b"}
    assert router.statistics.retries == 12


async def test_traffic_through_a_death_fails_at_most_three(bench: Bench) -> None:
    dying, child = await bench.process("a", delay_ms=40)
    other, _ = await bench.process("c", delay_ms=45)
    router, _ = await bench.router(dying, other)
    failures: list[MeshError] = []
    answers: list[str] = []

    async def ask(i: int) -> None:
        try:
            answers.append((await router.infer(request(i), context(2.0))).served.node)
        except MeshError as error:
            failures.append(error)

    tasks = []
    for i in range(220):
        tasks.append(asyncio.ensure_future(ask(i)))
        if i == 100:
            tasks += [asyncio.ensure_future(ask(j)) for j in range(20)]  # enough for both, however slow we are
            await until(lambda: next(t for t in router.policy.targets if t.name == "a").own >= 5)
            child.send_signal(signal.SIGKILL)
        await asyncio.sleep(0.005)
    await asyncio.gather(*tasks)
    assert "a" in answers
    assert len(failures) <= 3, failures
    assert len(answers) + len(failures) == 240
    assert router.policy.outstanding == 0


def preferred(router: Router) -> str:
    decision = router.explain(RequestFacts(model="digits", remaining_s=4.0))[1]
    assert isinstance(decision, Send)
    return decision.target


async def test_a_hedge_saves_a_stalled_request_and_cancels_the_loser(bench: Bench) -> None:
    slow, fast = TinyHost("a", delay_s=0.002), TinyHost("b", delay_s=0.03)
    router, _ = await bench.router(await bench.node(slow), await bench.node(fast))
    for i in range(20):
        await router.infer(request(i), context())
    async with asyncio.timeout(20):
        # On a busy machine one late answer is enough, and nobody asks it for a while.
        while (await router.infer(request(), context())) and preferred(router) != "a":
            await asyncio.sleep(0.01)
    slow.delay_s = 5.0
    started = own_time()
    answers = await asyncio.gather(*(router.infer(request(i), context(4.0)) for i in range(4)))
    assert own_time() - started < 2.0  # the stalled node would have taken 5 s, the deadline 4 s
    assert {a.served.node for a in answers} == {"b"}
    assert router.statistics.hedges_won > 0
    await until(lambda: slow.in_flight == 0)
    assert slow.cancelled > 0
    assert router.policy.outstanding == 0


async def test_cancelling_a_request_cancels_it_everywhere(bench: Bench) -> None:
    hosts = [TinyHost("a", delay_s=0.002), TinyHost("b", delay_s=0.002)]
    router, _ = await bench.router(*[await bench.node(host) for host in hosts])
    for host in hosts:
        host.delay_s = 5.0
    task = asyncio.ensure_future(router.infer(request(), context(10.0)))
    await until(lambda: sum(host.in_flight for host in hosts) == 2)  # the request and its hedge
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: sum(host.cancelled for host in hosts) == 2)
    await until(lambda: router.policy.outstanding == 0)


async def test_a_forwarded_request_is_never_routed_again(bench: Bench) -> None:
    other = TinyHost("b")
    mine = TinyHost("r", versions=("1",))
    router, _ = await bench.router(await bench.node(other), local=mine)
    forwarded = RequestContext(forwarded=True, version="1")
    assert (await router.infer(request(), forwarded)).served.node == "r"
    mine.fail = MeshError(Code.OVERLOADED, "Busy.", retry_after_ms=5)
    with pytest.raises(MeshError) as caught:
        await router.infer(request(), forwarded)
    assert caught.value.code is Code.OVERLOADED
    with pytest.raises(MeshError) as caught:
        await router.infer(request(), RequestContext(forwarded=True, version="7"))
    assert caught.value.code is Code.VERSION_MISMATCH
    assert other.answered == 0
    # For our own clients the same failure sends it on.
    assert (await router.infer(request(), context())).served.node == "b"
    alone = Router(Policy(PolicyConfig()))
    with pytest.raises(MeshError) as caught:
        await alone.infer(request(), forwarded)
    assert caught.value.code is Code.MODEL_NOT_FOUND


async def test_split_by_pointer(bench: Bench, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_pointer("digits", Pointer(stable=1, candidate=2, share=0.2, salt="s", last_good=1))
    mine = TinyHost("r", versions=("1", "2"))
    router, _ = await bench.router(local=mine, splits=StoreSplits(store, interval_s=0.0))
    answers = [(await router.infer(request(), context())).version for _ in range(600)]
    assert 80 <= answers.count("2") <= 160  # 120 ± 4 standard deviations
    # One client stays with one version.
    one = {(await router.infer(request(), context(principal="device-7"))).version for _ in range(20)}
    assert len(one) == 1
    # Where the candidate is not held stable answers, and it is counted.
    mine.versions = ("1",)
    router.observe_local()
    assert {(await router.infer(request(), context())).version for _ in range(100)} == {"1"}
    assert router.statistics.missed > 5
    # An explicit version is the client's word.
    with pytest.raises(MeshError) as caught:
        await router.infer(request(version="2"), context())
    assert caught.value.code is Code.VERSION_MISMATCH
    # The pointer moves, the router follows.
    store.write_pointer("digits", Pointer(stable=2, last_good=1))
    mine.versions = ("1", "2")
    router.observe_local()
    assert (await router.infer(request(), context())).version == "2"


def test_no_pointer_of_what_is_no_models_name_is_remembered(tmp_path: Path) -> None:
    splits = StoreSplits(Store(tmp_path))
    assert (splits.split("unknown"), splits.split("x" * 1000), splits.alias("X", "1.0")) == (NO_SPLIT, NO_SPLIT, "")
    assert list(splits._entries) == ["unknown"]


async def test_without_a_pointer_the_nodes_own_decides_so_that_a_trial_never_leaks(bench: Bench) -> None:
    # A stand-alone router whose agent has not synced yet sees both releases hot; the node's stable one is the first.
    host = TinyHost("a", versions=("1", "2"))
    router, _ = await bench.router(await bench.node(host))
    assert router.policy.newest("digits") == "2"
    answers = {(await router.infer(request(), context())).version for _ in range(20)}
    assert answers == {"1"}
    assert {seen.version for _, seen in host.seen} == {""}
    assert all(seen.forwarded for _, seen in host.seen)


async def test_a_target_that_hangs_without_a_word_is_given_up(bench: Bench) -> None:
    view, child = await bench.process("a", delay_ms=0)
    host = TinyHost("b", delay_s=0.05)
    router, _ = await bench.router(view, await bench.node(host), config=PolicyConfig(hedge_share=0, hedge_burst=0))
    child.send_signal(signal.SIGSTOP)
    try:
        answers = await asyncio.gather(*(router.infer(request(i), context(8.0)) for i in range(4)))
    finally:
        child.send_signal(signal.SIGCONT)
    assert {a.served.node for a in answers} == {"b"}


async def test_the_directory_of_models(bench: Bench) -> None:
    router, _ = await bench.router(await bench.node(TinyHost("a", versions=("1", "2"))))
    found = await router.metadata("digits", "")
    assert found.versions == ("1", "2")
    assert found.inputs[0].name == "x"
    assert await router.is_ready()
    assert await router.is_ready("digits", "2")
    assert not await router.is_ready("digits", "9")
    with pytest.raises(MeshError, match="known models: digits"):
        await router.metadata("cats", "")
    with pytest.raises(MeshError, match="known models: digits"):
        await router.infer(TensorRequest(model="cats", inputs={}), context())


async def test_a_model_is_described_while_it_is_loaded() -> None:
    host = TinyHost("a")
    router = Router(Policy(PolicyConfig()), local=host, node="a")
    loading = VersionReport(model="digits", version="1", residency="loading")
    router.policy.on_report(router.now(), "a", replace(host.report(), versions=(loading,)))
    assert (await router.metadata("digits", "")).inputs[0].name == "x"
    assert not await router.is_ready("digits")


async def test_a_node_under_another_name_is_not_believed(bench: Bench) -> None:
    view = await bench.node(TinyHost("a"))
    router = Router(Policy(PolicyConfig()), node="r")
    targets = TargetSet(router, ChannelFactory("ngh2", identity(bench.mesh, "r")), config=FAST)
    bench.closers.append(targets.close)
    targets.update([NodeView(name="b", role="edge", address=view.address)])
    await until(lambda: any(t.breaker.state != "closed" for t in router.policy.targets))
    assert router.policy.models == {}


async def test_targets_come_go_and_move(bench: Bench) -> None:
    a, b = await bench.node(TinyHost("a")), await bench.node(TinyHost("b"))
    router, targets = await bench.router(a)
    targets.update([a, b, NodeView(name="s", role="sync", address="127.0.0.1:1")])
    await until(lambda: set(router.policy.holders("digits")) == {"a", "b"})
    targets.update([b])
    assert router.policy.holders("digits") == ("b",)
    moved = await bench.node(TinyHost("b", versions=("5",)))
    targets.update([moved])
    await until(lambda: router.policy.models == {"digits": ("5",)})
    assert (await router.infer(request(), context())).version == "5"
