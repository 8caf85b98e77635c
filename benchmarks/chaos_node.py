"""A node that can be killed: the real worker with its real ledger, in a process of its own.

Its model is a witness: the answer repeats the question and adds a number drawn anew in each run, so whoever ran it
twice gives two different answers. Each run is written to a journal first.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.chaos_history import Event
from edge_node.mqtt.limits import MqttLimits, SessionLimits
from edge_node.mqtt.streams.definition import StreamDefinition
from edge_node.mqtt.worker import Durability, MqttWorker
from nearcast.backoff import ReconnectLimits
from nearcast.handler import InferRequest, InferResponse, ModelMetadata, RequestContext, Served, Tensors, TensorSpec
from nearcast.telemetry import TelemetryConfig, start
from nearcast.wire.response import TensorResponse

MODEL, TALLY, STREAM = "witness", "tally", "count"
TALLY_WIDTH = 3
STREAMS = (StreamDefinition(name=STREAM, model=TALLY, labels=("count", "")),)
NODE = "n1"
NONCE_BYTES = 8
POISON = b"poison!!"
POISON_SAMPLE = 13.0
RUN_S_MAX = 0.03
RUNS_TWICE = "runs a request twice"
FORGETS_LEDGER = "forgets its ledger when it restarts"


class NodeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a node is told. `wrong` names the one mistake that it makes (`chaos_mutants`).

    Attributes:
        reboots: each life takes itself for the first one after a power cut, which makes earlier instants meaningless.
    """

    port: int
    folder: str
    durability: Durability = "full"
    wrong: str = ""
    reboots: bool = False

    @property
    def ledger(self) -> Path:
        """The SQLite file. Its folder is made by whoever opens it first."""
        return Path(self.folder) / "disk" / "node" / "inbox.sqlite"

    @property
    def journal(self) -> Path:
        """One line a run."""
        return Path(self.folder) / "journal"


class Witness:
    """The models `witness` and `tally`. A request that begins with `POISON`, or a sample with `POISON_SAMPLE`, kills.

    `tally` has explicit state, the number of messages so far, and says it: one that is left out, run twice or run with
    an old state shows in every later result.
    """

    def __init__(self, journal: Path, *, runs: int = 1) -> None:
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._runs = runs
        self._draw = random.Random()

    async def metadata(self, model: str, version: str) -> ModelMetadata:
        if model == TALLY:
            return ModelMetadata(
                name=TALLY,
                versions=("1",),
                platform="chaos",
                inputs=(TensorSpec("x", "FP32", (1, TALLY_WIDTH)), TensorSpec("state", "FP32", (1, 1))),
                outputs=(TensorSpec("y", "FP32", (1, 2)), TensorSpec("stateN", "FP32", (1, 1))),
                properties={"stateful": "explicit"},
            )
        return ModelMetadata(
            name=MODEL,
            versions=("1",),
            platform="chaos",
            inputs=(TensorSpec("x", "UINT8", (-1,)),),
            outputs=(TensorSpec("y", "UINT8", (-1,)),),
            properties={"stateful": "none"},
        )

    async def is_ready(self, model: str = "", version: str = "") -> bool:
        return True

    async def infer(self, request: InferRequest, context: RequestContext) -> InferResponse:
        if request.model == TALLY:
            tensors = request.decode()
            if tensors["x"][0, 0] == POISON_SAMPLE:
                os.kill(os.getpid(), signal.SIGKILL)
            state = tensors["state"] + 1
            outputs = {"y": np.array([[state[0, 0], -1]], np.float32), "stateN": state}
            return _response(request, outputs)
        device = context.principal.rpartition("/")[2]
        line = f"{time.monotonic()} {os.getpid()} {device} {context.idempotency_key}\n".encode()
        for _ in range(self._runs):
            os.write(self._journal, line)
        x = request.decode()["x"]
        if x.tobytes().startswith(POISON):
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(self._draw.uniform(0.0, RUN_S_MAX))
        y = np.concatenate((x, np.frombuffer(os.urandom(NONCE_BYTES), np.uint8)))
        return _response(request, {"y": y})

    def stream(self, requests: AsyncIterator[InferRequest], context: RequestContext) -> AsyncIterator[InferResponse]:
        raise NotImplementedError


def _response(request: InferRequest, outputs: Tensors) -> TensorResponse:
    served = Served(node=NODE, tier="local", version="1")
    return TensorResponse(model=request.model, version="1", outputs=outputs, id=request.id, served=served)


def read_journal(journal: Path) -> Iterator[Event]:
    """All runs of all lives."""
    for line in journal.read_text().splitlines() if journal.exists() else ():
        at, life, device, key = line.split(" ")
        yield Event(at=float(at), kind="ran", life=int(life), device=device, key=key)


class Node:
    """The lives of one node, one after the other. The next one comes from a process that has imported everything."""

    def __init__(self, settings: NodeSettings) -> None:
        self.settings = settings
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._process: BaseProcess | None = None

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.is_alive()

    def start(self) -> None:
        """Begin a life."""
        self._process = self._context.Process(target=live, args=(self.settings,), daemon=True)
        self._process.start()

    def strike(self) -> None:
        """SIGKILL, without waiting for the end."""
        if self._process is not None:
            self._process.kill()

    async def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.strike()
        if self._process is not None:
            await asyncio.to_thread(self._process.join)


def live(settings: NodeSettings) -> None:
    """One life of a node, until it is killed."""
    start("chaos", TelemetryConfig(level="error"))
    asyncio.run(_live(settings))


async def _live(settings: NodeSettings) -> None:
    if settings.wrong == FORGETS_LEDGER:
        for file in settings.ledger.parent.glob(f"{settings.ledger.name}*"):
            file.unlink()
    witness = Witness(settings.journal, runs=2 if settings.wrong == RUNS_TWICE else 1)
    await make_worker(settings, witness).start()
    await asyncio.Event().wait()


def make_worker(settings: NodeSettings, witness: Witness) -> MqttWorker:
    """The worker as a node makes it, but that it comes back faster."""
    return MqttWorker(
        witness,
        witness,
        node=NODE,
        host="127.0.0.1",
        port=settings.port,
        inbox=settings.ledger,
        limits=MqttLimits(session=SessionLimits(reconnect=ReconnectLimits(base_s=0.05, max_s=0.3), will_delay_s=0)),
        streams=STREAMS,
        durability=settings.durability,
        boot=f"boot of {os.getpid()}" if settings.reboots else None,
    )


if __name__ == "__main__":
    live(msgspec.json.decode(sys.argv[1], type=NodeSettings))
