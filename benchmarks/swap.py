"""Versions change under load: a real edge node answers gRPC while releases are tried, promoted and taken back.

Each round pushes a release as a candidate on half of the requests, promotes it, and rolls back to the first release.
The requests go straight to the node, without retries: each one that is not answered counts as failed.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import onnx

from benchmarks import swap_latency
from benchmarks.rows import Row
from benchmarks.swap_latency import PATH
from model_sync.agent.status import ModelStatus, read_status
from model_sync.publisher.bundle import create_bundle, read_spec
from model_sync.publisher.control_client import connect
from model_sync.publisher.push import push
from nearcast.cli.demo.bundles import write_sources
from nearcast.cli.processes import Mesh, MeshConfig
from nearcast.wire.request import TensorRequest

MODEL, NODE, FIRST = "digits", "edge-1", 1
RATE_PER_S = 250.0
TIMEOUT_S = 5.0
WAIT_S = 60.0
STEADY_S = 0.5
"""What each step of a round is watched for after it is reached."""
CONFIG = MeshConfig(
    edges=1, cloud=0, router=0, broker=False, first_ports=False, edge_settings=("agent.probation_s=0.3",)
)


@dataclass(slots=True)
class Load:
    """Requests at a steady rate, each on its own, and when which version answered them."""

    channel: grpc.aio.Channel
    message: bytes
    answers: list[tuple[float, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    sent: int = 0
    _stop: bool = False

    async def run(self, at_least: int) -> None:
        """Send until `stop` was called and `at_least` requests were sent."""
        call: Any = self.channel.unary_unary(PATH)
        tasks: set[asyncio.Task[None]] = set()
        due = time.monotonic()
        while not self._stop or self.sent < at_least:
            task = asyncio.create_task(self._ask(call))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            self.sent += 1
            due += 1.0 / RATE_PER_S
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await asyncio.gather(*tasks)

    def stop(self) -> None:
        """No more than is needed from now on."""
        self._stop = True

    def last_of(self, version: str) -> float:
        """When that version last answered."""
        return max((when for when, said in self.answers if said == version), default=0.0)

    async def _ask(self, call: Any) -> None:
        try:
            running = call(self.message, timeout=TIMEOUT_S)
            await running
            trailers = dict(await running.trailing_metadata())
        except grpc.aio.AioRpcError as error:
            self.failures.append(f"{error.code().name}: {error.details()}")
        else:
            self.answers.append((time.monotonic(), str(trailers.get("nc-model-version", ""))))


class Releases:
    """Bundles of one small model that differ in their bytes alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spec = write_sources(folder / "sources")["digits-1"]

    def make(self, release: int) -> Path:
        """A bundle with that release number."""
        source = self._folder / f"source-{release}"
        shutil.copytree(self._spec.parent, source)
        (path,) = source.glob("*.onnx")
        model = onnx.load(path)
        model.doc_string = f"release {release}"
        onnx.save(model, path)
        lines = (source / self._spec.name).read_text().splitlines()
        numbered = [f"release = {release}" if line.startswith("release =") else line for line in lines]
        (source / self._spec.name).write_text("\n".join(numbered) + "\n")
        bundle = self._folder / f"bundle-{release}"
        create_bundle(read_spec(source / self._spec.name), source, bundle)
        return bundle


class Operator:
    """What a person would type, and the wait until the node has followed."""

    def __init__(self, mesh: Mesh, data: Path) -> None:
        self._home = mesh.operator_home
        self._store = data / NODE / "models"

    def publish(self, bundle: Path, *, share: float | None) -> None:
        """Push, as stable or as a candidate."""
        with connect(self._home) as client:
            back = () if share is None else (FIRST,)
            push(bundle, client, self._home / "operator", channel="stable", share=share, rollback_ok=back)

    def roll(self, action: str, **fields: Any) -> None:
        """Change the channel."""
        with connect(self._home) as client:
            client.call("POST", "/v1/rollouts", {"channel": "stable", "model": MODEL, "action": action, **fields})

    async def until(self, condition: Callable[[ModelStatus], bool], what: str) -> None:
        """Wait for the node's agent to say so."""
        deadline = time.monotonic() + WAIT_S
        while True:
            status = read_status(self._store)
            model = status.models.get(MODEL) if status is not None else None
            if model is not None and condition(model):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} did not come within {WAIT_S:g} s: {model}")
            await asyncio.sleep(0.01)


def run(*, quick: bool) -> list[Row]:
    """Rounds of candidate, promotion and rollback under load."""
    rounds, requests = (2, 2_000) if quick else (8, 10_000)
    with tempfile.TemporaryDirectory() as folder:
        load, rollbacks = asyncio.run(measure(Path(folder), rounds, requests))
    versions = len({version for _, version in load.answers})
    said = "; ".join(sorted(set(load.failures))[:3])
    return [
        Row("swap.requests", load.sent, "1", f"{rounds} candidates, promotions and rollbacks; {versions} versions"),
        Row("swap.failed", load.sent - len(load.answers), "1", said or "without retries"),
        Row("swap.rollback_s", max(rollbacks), "s", "slowest; command until the last answer of the release taken back"),
        *swap_latency.run(quick=quick),
    ]


async def measure(folder: Path, rounds: int, requests: int) -> tuple[Load, list[float]]:
    """The load with all its answers, and how long each rollback took to reach the last request."""
    releases = Releases(folder)
    bundles = [releases.make(release) for release in range(FIRST, FIRST + rounds + 1)]
    mesh = await Mesh.start(folder / "mesh", config=CONFIG)
    try:
        operator = Operator(mesh, folder / "mesh")
        await asyncio.to_thread(operator.publish, bundles[0], share=None)
        await operator.until(lambda model: model.state == "IDLE" and model.stable == FIRST, "the first release")
        image = np.zeros((1, 64), np.float32)
        message = TensorRequest(model=MODEL, inputs={"image": image}).encode()
        async with grpc.aio.insecure_channel(mesh.addresses[NODE]["grpc"]) as channel:
            load = Load(channel, message)
            loading = asyncio.create_task(load.run(requests))
            rollbacks = [
                await swap(operator, load, bundle, release) for release, bundle in enumerate(bundles[1:], FIRST + 1)
            ]
            load.stop()
            await loading
    finally:
        await mesh.stop()
    return load, rollbacks


async def swap(operator: Operator, load: Load, bundle: Path, release: int) -> float:
    """One round; seconds from the rollback command to the last answer of the release that it takes back."""
    await asyncio.to_thread(operator.publish, bundle, share=0.5)
    await operator.until(lambda model: model.candidate == release and model.state == "IDLE", f"candidate {release}")
    await asyncio.sleep(STEADY_S)
    await asyncio.to_thread(operator.roll, "promote")
    await operator.until(lambda model: model.stable == release and model.state == "IDLE", f"stable {release}")
    await asyncio.sleep(STEADY_S)
    began = time.monotonic()
    await asyncio.to_thread(operator.roll, "rollback", release=FIRST)
    await operator.until(lambda model: model.stable == FIRST and model.state == "IDLE", f"the return from {release}")
    await asyncio.sleep(STEADY_S)
    return load.last_of(str(release)) - began
