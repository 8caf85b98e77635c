"""A scenario of the simulator as real processes: a stand-alone router, nodes with a known model, mutual TLS."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np

from benchmarks.live_node import ROLES
from nearcast.errors import MeshError
from nearcast.handler import Served
from nearcast.identity import CertificateAuthority, make_csr
from nearcast.transport.grpc import make_channel
from nearcast.transport.oip import MODEL_INFER
from nearcast.transport.seam import Channel
from nearcast.wire.request import TensorRequest
from nearcast.wire.status import served_from_trailers
from simulations.scenario import MODEL, Scenario
from simulations.workload import draw_workload

LIFETIME_S = 86_400.0
READY_TIMEOUT_S = 30.0
ROUTER = "live-router"
TENSOR = (np.arange(600) % 251).astype(np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How one request ended: when it was due and answered (seconds of the run), by whom, or with which code."""

    number: int
    at_s: float
    latency_s: float
    served: Served
    code: str


class LiveMesh:
    """The processes. Use as a context manager.

    Args:
        folder: for identities, configuration and the router's data.
        scenario: its nodes are started; its faults are not.
        seed: of the workload that the nodes and `drive` draw.
        settings: more TOML for the router.
    """

    def __init__(self, folder: Path, scenario: Scenario, seed: int, *, settings: str = "") -> None:
        self.data_dir = folder / "router-data"
        self.router: dict[str, Any] = {}
        self._folder = folder
        self._scenario = scenario
        self._seed = seed
        self._settings = settings
        self._children: dict[str, subprocess.Popen[str]] = {}
        self._ports: dict[str, int] = {}

    def __enter__(self) -> Self:
        authority = CertificateAuthority.create(self._folder / "ca")
        roles = {node.name: ROLES[node.tier] for node in self._scenario.nodes} | {ROUTER: "router"}
        for name, role in roles.items():
            key, csr = make_csr(name, role)
            place = self._folder / name
            place.mkdir()
            (place / "node.key").write_bytes(key)
            (place / "node.key").chmod(0o600)
            (place / "node.pem").write_bytes(authority.issue(csr, name=name, role=role, lifetime_s=LIFETIME_S))
            (place / "ca.pem").write_bytes(authority.certificate_pem)
        try:
            for node in self._scenario.nodes:
                self.start(node.name)
            config = self._folder / "router.toml"
            config.write_text(self._make_config())
            self.router = self._spawn(ROUTER, "router", "--config", str(config))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # The router first: it is to see no node die at the end.
        for name in (ROUTER, *(name for name in list(self._children) if name != ROUTER)):
            child = self._children.pop(name, None)
            if child is None:
                continue
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def start(self, name: str) -> None:
        """Run a node; it comes back where it was."""
        scenario = msgspec.json.encode(self._scenario).decode()
        arguments = (str(self._folder), scenario, str(self._seed), name, str(self._ports.get(name, 0)))
        ready = self._spawn(name, "benchmarks.live_node", *arguments)
        self._ports[name] = int(ready["mesh"].rpartition(":")[2])

    def kill(self, name: str) -> None:
        """End a node at once, whatever it is doing."""
        child = self._children.pop(name)
        child.send_signal(signal.SIGKILL)
        child.wait()

    def end_router(self) -> int:
        """Let the router drain; returns its exit status."""
        child = self._children.pop(ROUTER)
        child.terminate()
        return child.wait(30)

    def _spawn(self, name: str, module: str, *arguments: str) -> dict[str, Any]:
        child = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True)
        self._children[name] = child
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise RuntimeError(f"{module} ended with {child.wait()} before it was ready")
        ready: dict[str, Any] = {"pid": child.pid} | json.loads(line)
        return ready

    def _make_config(self) -> str:
        nowhere = "127.0.0.1:0"
        listen = ", ".join(f'{name} = "{nowhere}"' for name in ("grpc", "http", "metrics", "mesh"))
        head = f"""
name = "{ROUTER}"
data_dir = "{self.data_dir}"
identity = "{self._folder / ROUTER}"
seed = {self._seed}
listen = {{ {listen} }}
agent = {{ enabled = false }}
telemetry = {{ level = "error" }}
{self._settings}
"""
        return head + "".join(
            f'\n[[targets]]\nname = "{node.name}"\nrole = "{ROLES[node.tier]}"\n'
            f'address = "127.0.0.1:{self._ports[node.name]}"\n'
            for node in self._scenario.nodes
        )


async def drive(address: str, scenario: Scenario, seed: int) -> list[Answer]:
    """Send the workload's requests when they are due, whatever became of those before, and wait for all answers."""
    requests = draw_workload(scenario, seed).requests
    answers: list[Answer] = []
    channel = make_channel("ngh2", address)
    try:
        await wait_until_routed(channel)
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for request in requests:
                await asyncio.sleep(max(0.0, began + request.at - time.monotonic()))
                group.create_task(_ask(channel, request.number, request.at, began, scenario.deadline_ms / 1e3, answers))
    finally:
        await channel.close()
    return sorted(answers, key=lambda answer: answer.number)


async def wait_until_routed(channel: Channel) -> None:
    """The router has found a node that answers.

    Raises:
        MeshError: the last answer, if none comes.
    """
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            await channel.unary(MODEL_INFER, (_encode(""),))
        except MeshError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)
        else:
            return


async def _ask(
    channel: Channel, number: int, at_s: float, began: float, deadline_s: float, answers: list[Answer]
) -> None:
    due = began + at_s
    served, code, latency_s = Served(), "", math.inf
    try:
        reply = await channel.unary(MODEL_INFER, (_encode(str(number)),), deadline=due + deadline_s)
        latency_s = time.monotonic() - due
        served = served_from_trailers(reply.trailers)
    except MeshError as error:
        code = str(error.code)
    answers.append(Answer(number=number, at_s=at_s, latency_s=latency_s, served=served, code=code))


def _encode(request_id: str) -> bytes:
    return TensorRequest(model=MODEL, id=request_id, inputs={"x": TENSOR}).encode()
