"""The SDK against real nodes on plain client listeners."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from nearcast.client import AsyncClient, Client
from nearcast.errors import Code, MeshError
from tests.patience import own_time

NODE_FILE = Path(__file__).with_name("router_node.py")
ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("client_node", NODE_FILE)
assert _spec is not None
assert _spec.loader is not None
router_node = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(router_node)
X = {"x": np.array([21.0], np.float32)}


async def start_process(name: str, delay_ms: float) -> tuple[str, asyncio.subprocess.Process]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, str(NODE_FILE), name, str(delay_ms), "1",
        stdout=asyncio.subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert child.stdout is not None
    async with asyncio.timeout(20):
        return json.loads(await child.stdout.readline())["grpc"], child


@pytest.mark.parametrize("transport", ["ngh2", "grpcio"])
async def test_ask_and_be_told_who_answered(transport: str) -> None:
    host = router_node.TinyHost("a", delay_s=0.002, versions=("7",))
    server = router_node.make_node_server(host, None, transport)
    await server.start()
    async with AsyncClient([server.address], transport=transport) as client:  # type: ignore[arg-type]
        answer = await client.infer("digits", X, deadline_ms=3000, sequence="9", priority=1)
        assert answer.outputs["y"].tolist() == [42.0]
        assert (answer.served_by, answer.version) == ("a", "7")
        assert answer.latency_ms >= answer.compute_ms > 0
        _, context = host.seen[0]
        assert (context.priority, context.forwarded) == (1, False)
        assert context.deadline is not None
        assert (await client.metadata("digits")).versions == ("7",)
        with pytest.raises(MeshError) as caught:
            await client.infer("digits", X, version="8")
        assert caught.value.code is Code.VERSION_MISMATCH
        counts = client.counts
        assert (counts.requests, counts.answered, counts.failed) == (2, 1, {Code.VERSION_MISMATCH: 1})
    with pytest.raises(MeshError, match="closed"):
        await client.infer("digits", X)
    await server.drain(0.2)


async def test_a_node_dies_under_load_and_at_most_three_requests_notice() -> None:
    first, dying = await start_process("a", 40)
    second, other = await start_process("b", 40)
    failures: list[MeshError] = []
    answers: list[str] = []
    try:
        async with AsyncClient([first, second]) as client:

            async def ask() -> None:
                try:
                    answers.append((await client.infer("digits", X, deadline_ms=3000)).served_by)
                except MeshError as error:
                    failures.append(error)

            tasks = []
            for i in range(300):
                tasks.append(asyncio.ensure_future(ask()))
                if i == 150:
                    dying.send_signal(signal.SIGKILL)
                await asyncio.sleep(0.005)
            await asyncio.gather(*tasks)
            counts = client.counts
    finally:
        for child in (dying, other):
            if child.returncode is None:
                child.kill()
            await child.wait()
    assert "a" in answers
    assert len(failures) <= 3, failures
    assert counts.failures == len(failures)
    assert counts.requests == 300 == counts.answered + counts.failures


async def test_an_impossible_deadline_and_an_absent_node_are_told_quickly() -> None:
    async with AsyncClient(["127.0.0.1:9"]) as client:
        started = own_time()
        with pytest.raises(MeshError) as caught:
            await client.infer("digits", X, deadline_ms=5000)
        assert caught.value.code is Code.UNAVAILABLE
        assert own_time() - started < 2.0
        assert client.counts.failures == 1
    with pytest.raises(MeshError, match="at least one node"):
        AsyncClient([])


async def test_a_dead_node_in_the_list_costs_nothing() -> None:
    host = router_node.TinyHost("b")
    server = router_node.make_node_server(host, None)
    await server.start()
    async with AsyncClient(["127.0.0.1:9", server.address]) as client:
        for _ in range(30):
            assert (await client.infer("digits", X)).served_by == "b"
        assert client.counts.failures == 0
    await server.drain(0.2)


async def test_the_blocking_client_serves_threads() -> None:
    host = router_node.TinyHost("a")
    server = router_node.make_node_server(host, None)
    await server.start()
    client = Client([server.address])
    try:
        answers = await asyncio.gather(*(asyncio.to_thread(client.infer, "digits", X) for _ in range(16)))
        assert {float(a.outputs["y"][0]) for a in answers} == {42.0}
        assert client.counts.answered == 16
    finally:
        await asyncio.to_thread(client.close)
    client.close()
    with pytest.raises(MeshError, match="closed"):
        client.infer("digits", X)
    await server.drain(0.2)
