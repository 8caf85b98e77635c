"""A node without file descriptors: it serves those whom it knows, says what is wrong, and gets over it."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from nearcast.client import AsyncClient
from nearcast.runtime.descriptors import Shortage
from nearcast.store import Store
from nearcast.telemetry import CONNECTIONS_MAX, Telemetry
from tests.tiny_models import activate, affine_model, install

DESCRIPTORS = 96
WAIT_S = 30.0
INPUTS = {"x": np.ones((1, 4), np.float32)}


class Node:
    """An edge node that may have few descriptors."""

    def __init__(self, folder: Path) -> None:
        store = Store(folder / "edge" / "models")
        install(store, affine_model())
        activate(store, stable=1)
        kinds = (f"listen.{kind}=127.0.0.1:0" for kind in ("grpc", "http", "metrics"))
        settings = [f"data_dir={folder}/edge", "mqtt.broker=", *kinds]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nearcast", "edge", *(word for each in settings for word in ("--set", each))],
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.allow(DESCRIPTORS)
        assert self.process.stdout is not None
        self.addresses = json.loads(self.process.stdout.readline() or self.log.read_text())

    def allow(self, descriptors: int) -> None:
        resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (descriptors, DESCRIPTORS))

    def connect(self, kind: str) -> socket.socket:
        host, port = self.addresses[kind].split(":")
        return socket.create_connection((host, int(port)))

    def used(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.process.terminate()
    assert node.process.wait(WAIT_S) == 0
    assert node.process.stdout is not None
    node.process.stdout.close()


async def test_a_node_out_of_descriptors_serves_on_and_says_so(node: Node) -> None:
    async with AsyncClient([node.addresses["grpc"]]) as client:

        async def ask_until(condition: Callable[[], bool]) -> None:
            ends_at = time.monotonic() + WAIT_S
            while not condition():
                assert time.monotonic() < ends_at, f"{node.used()} descriptors in use; {node.log.read_text()}"
                answer = await client.infer("affine", INPUTS)
                np.testing.assert_array_equal(answer.outputs["y"], 2 * INPUTS["x"])
                await asyncio.sleep(0.01)

        await client.infer("affine", INPUTS)
        # The first who comes by HTTP has the server made, which takes files: without any it is made later.
        node.allow(node.used())
        first = node.connect("metrics")
        await ask_until(lambda: "no HTTP server" in node.log.read_text())
        node.allow(DESCRIPTORS)
        crowd = [first, *(node.connect(kind) for kind in ("metrics", "grpc", "http") for _ in range(DESCRIPTORS))]
        await ask_until(lambda: node.used() >= DESCRIPTORS - 1)
        await ask_until(lambda: "nearly all are in use" in node.log.read_text())
        for connection in crowd:
            connection.close()
        await ask_until(lambda: "enough file descriptors again" in node.log.read_text())
        async with AsyncClient([node.addresses["grpc"]]) as newcomer:
            await newcomer.infer("affine", INPUTS)


async def test_who_holds_connections_to_the_metrics_keeps_nobody_out() -> None:
    observed = Telemetry("test")
    address = await observed.serve_metrics("127.0.0.1:0")
    host, port = address.split(":")
    held = [await asyncio.open_connection(host, int(port)) for _ in range(CONNECTIONS_MAX)]
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}/metrics") as answer:
        assert answer.status == 200
    assert await held[0][0].read() == b"", "the oldest is closed"
    # All of these wait in the backlog when the loop next looks: they are accepted in one turn.
    burst = [socket.create_connection((host, int(port))) for _ in range(CONNECTIONS_MAX)]
    async with asyncio.timeout(WAIT_S):
        assert await asyncio.gather(*(reader.read() for reader, _ in held)) == [b""] * CONNECTIONS_MAX
    for _, writer in held:
        writer.close()
    for connection in burst:
        connection.close()
    await observed.close()


def test_what_is_short_is_said_once_until_it_is_clearly_over() -> None:
    shortage = Shortage()
    said = [(used, shortage.lasts) for used in (10, 89, 90, 100, 85, 80, 79, 85, 95) if shortage.look(used, 100)]
    assert said == [(90, True), (79, False), (95, True)]
