"""A trial over a real mesh: sync process, agents and model hosts; what stops it, who hears of it, and how soon."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import pytest

from model_sync.agent.app import Agent
from model_sync.agent.config import AgentConfig, AgentLimits
from model_sync.agent.report import sign_report
from model_sync.agent.status import ModelStatus
from model_sync.publisher.control_client import ControlClient
from model_sync.publisher.push import push
from model_sync.replica.state import State
from model_sync.rollout.report import SIGNATURE_HEADER, ModelReport, ReleaseReport, SyncReport
from nearcast.errors import Code, MeshError
from nearcast.handler import RequestContext
from nearcast.identity import join
from nearcast.serving.control import ControlSocket
from nearcast.serving.host import ModelHost
from nearcast.serving.limits import HostLimits
from nearcast.store import Store
from nearcast.wire.request import TensorRequest
from tests.integration.sync_parts import Sync, make_bundle
from tests.patience import own_time, until

MODEL = "affine"
X = np.array([[1.0, 2.0]], np.float32)
POLL_S = 0.5


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sync]:
    home = tmp_path_factory.mktemp("trial")
    sync = Sync(home)
    assert sync.stop() == 0
    sync.start("limits.judge_s=0.1")
    with sync.connect() as client:
        for release in (1, 2):
            push(make_bundle(home, release), client, sync.operator, channel="seed")
    yield sync
    assert sync.stop() == 0


def change(mesh: Sync, channel: str, action: str, **fields: Any) -> dict[str, Any]:
    with mesh.connect() as client:
        return client.call("POST", "/v1/rollouts", {"channel": channel, "model": MODEL, "action": action, **fields})


def start_trial(mesh: Sync, channel: str, **fields: Any) -> None:
    change(mesh, channel, "stable", release=1)
    change(mesh, channel, "candidate", release=2, share=0.5, **fields)


def shown(mesh: Sync, channel: str) -> dict[str, Any]:
    with mesh.connect() as client:
        return client.call("GET", f"/v1/channels/{channel}/status?model={MODEL}")


def picked(mesh: Sync, channel: str) -> dict[str, Any]:
    with mesh.connect() as client:
        (rollout,) = client.call("GET", f"/v1/channels/{channel}")["rollouts"]
    return dict(rollout)


class Reporting:
    """A node that reports what the test wants, with an identity of its own."""

    def __init__(self, mesh: Sync, folder: Path, name: str, channel: str) -> None:
        self.name, self._channel, self._folder, self._sequence = name, channel, folder / name, 0
        join(mesh.invite(name), self._folder)
        self.client = ControlClient(mesh.url, self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def report(self, *releases: ReleaseReport, sequence: int = 0, **fields: Any) -> dict[str, Any]:
        self._sequence = sequence or self._sequence + 1
        model = ModelReport(model=MODEL, releases=releases, **{"state": "IDLE", "stable": 1, "intent": 2} | fields)
        report = SyncReport(
            node=self.name, channel=self._channel, epoch="e", sequence=self._sequence, at=0.0, models=(model,)
        )
        return self.send(msgspec.json.encode(report))

    def send(self, data: bytes, signature: str | None = None) -> dict[str, Any]:
        headers = {SIGNATURE_HEADER: sign_report(data, self._folder / "node.key") if signature is None else signature}
        status, answer = self.client._exchange("POST", "/v1/reports", data, headers)
        return {"status": status, **msgspec.json.decode(answer)}


def test_a_failing_candidate_is_stopped_by_the_controller(mesh: Sync, tmp_path: Path) -> None:
    start_trial(mesh, "errors")
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(Reporting(mesh, tmp_path, f"errors-{index}", "errors")) for index in range(3)]
        for turn in range(40):
            for node in nodes:
                node.report(
                    ReleaseReport(release=1, requests=1000 * turn, errors=5 * turn),
                    ReleaseReport(release=2, requests=1000 * turn, errors=20 * turn),
                    candidate=2,
                )
    deadline = time.monotonic() + 10
    while "candidate" in (rollout := picked(mesh, "errors")) and rollout["candidate"] is not None:
        assert time.monotonic() < deadline, shown(mesh, "errors")
        time.sleep(0.05)
    assert rollout["by"] == "controller"
    assert "requests fail, of stable 0.50%" in rollout["reason"]
    assert abs(rollout["at"] - time.time()) < 60
    with mesh.connect() as client:
        changes = client.call("GET", f"/v1/lineage?model={MODEL}")["changes"]
    made = [(c["action"], c["release"], c["replaced"], c["by"]) for c in changes if c["channel"] == "errors"]
    operator = changes[-1]["by"]
    assert made == [("stop", 2, 1, "controller"), ("candidate", 2, 1, operator), ("stable", 1, None, operator)]
    assert [(c["action"], c["release"]) for c in changes if c["channel"] == ""] == [("publish", 2), ("publish", 1)]
    assert all(len(c["manifest_sha256"]) == 64 for c in changes)


def test_one_liar_stops_nothing_and_speaks_for_itself_alone(mesh: Sync, tmp_path: Path) -> None:
    start_trial(mesh, "liar")
    with contextlib.ExitStack() as stack:
        names = ("liar", "honest-0", "honest-1")
        liar, *honest = [stack.enter_context(Reporting(mesh, tmp_path, name, "liar")) for name in names]
        report_a_lie(mesh, liar, honest)


def report_a_lie(mesh: Sync, liar: Reporting, honest: list[Reporting]) -> None:
    for turn in range(10):
        for node in honest:
            node.report(ReleaseReport(release=1, requests=100 * turn), ReleaseReport(release=2, requests=100 * turn))
        everything = ReleaseReport(release=2, requests=2**53 // 10 * turn, errors=2**53 // 10 * turn)
        answer = liar.report(ReleaseReport(release=1, requests=10**9 * turn), everything, quarantined=(2,))
        assert answer == {"status": 200, "accepted": True}
    time.sleep(0.4)  # four looks at the trial
    found = shown(mesh, "liar")
    assert found["rollouts"][0]["candidate"] == 2, "nobody stopped it"
    assert found["rollouts"][0]["quarantined"][0]["nodes"] == 1
    assert liar.report(everything, sequence=3) == {"status": 200, "accepted": False}, "a replay"
    stolen = msgspec.json.encode(SyncReport(node="honest-0", channel="liar", epoch="x", sequence=99, at=0.0))
    assert liar.send(stolen)["code"] == "FORBIDDEN"
    assert liar.send(stolen, signature="AAAA")["code"] == "UNAUTHENTICATED"
    assert liar.send(b"[1]")["code"] == "INVALID_REQUEST"
    assert liar.send(b" " * (300 * 1024))["code"] == "TOO_LARGE"
    with mesh.connect() as operator:
        status, _ = operator._exchange("POST", "/v1/reports", stolen, {SIGNATURE_HEADER: "AAAA"})
    assert status == 403, "an operator is no node"


# Real agents.


class Proxy:
    """A TCP relay to the sync process that can be cut like a cable."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.removeprefix("https://").rpartition(":")
        self._port = int(port)
        self._writers: set[asyncio.StreamWriter] = set()
        self.is_cut = False

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        return f"https://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        self.is_cut = True
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        self._server.close()
        self.cut()
        await asyncio.sleep(0)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        if self.is_cut:
            writer.transport.abort()
            return
        away_reader, away_writer = await asyncio.open_connection(self._host, self._port)
        self._writers.add(away_writer)
        with contextlib.suppress(OSError):
            await asyncio.gather(self._copy(reader, away_writer), self._copy(away_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()


class Node:
    """A real agent and a real model host on one store."""

    def __init__(self, agent: Agent, host: ModelHost) -> None:
        self.agent, self.host = agent, host

    @property
    def status(self) -> ModelStatus:
        shell = self.agent._shells.get(MODEL)
        return shell.status if shell is not None else ModelStatus(state="ABSENT")

    async def ask(self, version: str = "") -> float:
        request = TensorRequest(model=MODEL, inputs={"x": X}, version=version)
        return float((await self.host.infer(request, RequestContext())).decode()["y"][0, 0])


@contextlib.asynccontextmanager
async def running(mesh: Sync, folder: Path, name: str, channel: str, **fields: Any) -> AsyncIterator[Node]:
    folder = folder / name
    if not folder.exists():
        join(await asyncio.to_thread(mesh.invite, name), folder / "identity")
    host = ModelHost(Store(folder / "store"), node=name, limits=HostLimits(shadow_interval_s=0.0))
    control = ControlSocket(host, folder / "host.sock")
    defaults = {"control": mesh.url, "poll_s": POLL_S, "hint_wait_s": 0.0, "probation_s": 0.2}
    config = AgentConfig(
        **{**defaults, "report_s": 0.2, "trial_report_s": 0.1, **fields}, node=name, channel=channel,
        identity=str(folder / "identity"), store=str(folder / "store"), host_socket=str(folder / "host.sock"),
        limits=AgentLimits(backoff_base_s=0.05, backoff_cap_s=0.2, compared_min=10),
    )  # fmt: skip
    await host.start()
    await control.start()
    agent = Agent(config)
    try:
        await agent.start()
        yield Node(agent, host)
    finally:
        await agent.close(orderly=True)
        await control.close()
        await host.close()


def at(node: Node, stable: int, candidate: int | None) -> bool:
    return (node.status.state, node.status.stable, node.status.candidate) == ("IDLE", stable, candidate)


async def test_a_stop_reaches_every_node_within_two_poll_periods(mesh: Sync, tmp_path: Path) -> None:
    await asyncio.to_thread(start_trial, mesh, "wave")
    async with contextlib.AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(running(mesh, tmp_path, f"wave-{index}", "wave")) for index in range(3)
        ]
        for node in nodes:
            await until(lambda node=node: at(node, 1, 2), "the trial has begun")
        await asyncio.to_thread(change, mesh, "wave", "stop")
        signed = own_time()
        for node in nodes:
            await until(lambda node=node: node.status.candidate is None, "the stop is obeyed")
        check_s = 0.5  # the check itself
        assert own_time() - signed <= 2 * POLL_S + check_s, "I16"


async def test_reports_of_a_real_node_and_a_failed_one(mesh: Sync, tmp_path: Path) -> None:
    await asyncio.to_thread(start_trial, mesh, "real")
    async with running(mesh, tmp_path, "real-1", "real") as node:
        await until(lambda: at(node, 1, 2), "the trial has begun")
        for turn in range(10):
            assert await node.ask("2" if turn % 2 else "") == X[0, 0] + (2 if turn % 2 else 1)
            await asyncio.sleep(0.01)

        async def seen() -> bool:
            (rollout,) = (await asyncio.to_thread(shown, mesh, "real"))["rollouts"]
            one, two = rollout["releases"]["1"], rollout["releases"]["2"]
            return (one["requests"], two["requests"]) == (5, 5) and two["compared"] == two["disagreed"] > 0

        await until(seen, "what was asked and compared is reported")
        found = await asyncio.to_thread(shown, mesh, "real")
        (rollout,) = found["rollouts"]
        assert "real-1" not in found["silent"]
        assert rollout["candidate_nodes"] == 1
        assert rollout["stable_nodes"] == {"1": 1}
        assert rollout["trial"]["reason"] == ""


async def test_the_signed_bound_on_other_answers_condemns_on_the_node(mesh: Sync, tmp_path: Path) -> None:
    await asyncio.to_thread(start_trial, mesh, "answers", disagreement_max=0.05)
    with Reporting(mesh, tmp_path, "answers-2", "answers") as other:
        other.report()  # in a fleet of two, one alone stops nothing: the node has to find out by itself
        async with running(mesh, tmp_path, "answers-1", "answers", probation_s=3.0) as node:
            await until(lambda: node.status.state == "PROBATION" and node.status.candidate == 2, "it is on probation")
            while node.status.state == "PROBATION":
                assert await node.ask() == 2.0
                await asyncio.sleep(0.004)
            await until(lambda: at(node, 1, None), "it is given back")
            assert "inputs got another answer than before, allowed are 5%" in node.status.error

            async def reported() -> bool:
                (rollout,) = (await asyncio.to_thread(shown, mesh, "answers"))["rollouts"]
                return any("another answer" in reason for q in rollout["quarantined"] for reason in q["reasons"])

            await until(reported, "the controller knows why")


async def test_in_a_fleet_of_one_the_controller_stops_what_answers_otherwise(mesh: Sync, tmp_path: Path) -> None:
    await asyncio.to_thread(start_trial, mesh, "alone", disagreement_max=0.05)
    async with running(mesh, tmp_path, "alone-1", "alone", probation_s=0.1) as node:
        await until(lambda: node.status.candidate == 2, "it is tried")

        async def stopped() -> bool:
            await node.ask()
            return "answered otherwise" in (await asyncio.to_thread(picked, mesh, "alone"))["reason"]

        await until(stopped, "the controller has signed a stop")
        await until(lambda: at(node, 1, None), "and the node obeys")
        assert node.status.quarantined == (), "it is stopped, not condemned here"


async def test_a_node_behind_a_cut_obeys_the_newest_word_when_it_returns(mesh: Sync, tmp_path: Path) -> None:
    await asyncio.to_thread(start_trial, mesh, "cut")
    proxy = Proxy(mesh.url)
    async with running(mesh, tmp_path, "cut-1", "cut", control=await proxy.start(), poll_s=0.1) as node:
        await until(lambda: at(node, 1, 2), "the trial has begun")
        proxy.cut()
        await asyncio.to_thread(change, mesh, "cut", "promote")
        await asyncio.to_thread(change, mesh, "cut", "rollback", release=1)
        await until(lambda: node.agent._status.error, "it cannot check")
        before = (node.status.stable, node.status.candidate, node.status.intent)
        assert before[:2] == (1, 2), "it serves on as it was told last"
        assert await node.ask("2") == X[0, 0] + 2
        proxy.is_cut = False
        await until(lambda: at(node, 1, None), "the newest document holds, and none in between was tried")
        assert node.status.intent == 4
        assert node.status.quarantined == ()
    await proxy.close()


async def test_a_report_that_fails_changes_no_state(mesh: Sync, tmp_path: Path) -> None:
    """I11: the reports of this node are all refused, because it is no member any more; it goes on all the same."""
    await asyncio.to_thread(start_trial, mesh, "refused")
    reasons: list[str] = []
    async with running(mesh, tmp_path, "refused-1", "refused") as node:
        await until(lambda: at(node, 1, 2), "the trial has begun")
        with mesh.connect() as client:
            client.call("DELETE", "/v1/nodes/refused-1")
        reporter = node.agent._reporter
        assert reporter is not None
        told, reporter._failed = reporter._failed, lambda reason: (reasons.append(reason), told(reason))
        machine = node.agent._shells[MODEL]._machine  # type: ignore[union-attr]
        await until(lambda: machine.state is not State.CHECK, "the agent has looked at the repository")
        before = (machine.memory, machine.pointer, machine.state, dict(machine.installed))
        journal = (tmp_path / "refused-1" / "store" / ".agent" / "journal").read_bytes()
        await until(lambda: len(reasons) >= 3, "reports are refused")
        assert "not enrolled" in reasons[0]
        await until(lambda: machine.state is not State.CHECK, "the agent has looked once more")
        assert (machine.memory, machine.pointer, machine.state, machine.installed) == before
        assert (tmp_path / "refused-1" / "store" / ".agent" / "journal").read_bytes() == journal
        assert await node.ask("2") == X[0, 0] + 2
        with pytest.raises(MeshError) as caught:
            await reporter.report()
        assert caught.value.code is Code.UNAVAILABLE
