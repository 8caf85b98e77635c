"""Two ways into the mesh for traffic of one image: our client, and tritonclient through the stand-alone router."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nearcast.cli.demo.traffic import Answer
from nearcast.client import AsyncClient
from tests.e2e.fleet import Fleet, image, page

DEADLINE_S = 1.0
DIGIT = 7
BURST, MORE = 16, 4
LOADED_S_MAX = 5.0


class Way(Protocol):
    """Asks for one digit (near, or of the model that only the cloud has), or has magika read a page, 10 ms of work.

    It knows how many of its requests a node is working on.
    """

    async def ask(self) -> Answer: ...

    async def ask_far(self) -> Answer: ...

    async def work(self) -> Answer: ...

    def in_flight(self, node: str) -> int: ...


@dataclass
class OurWay:
    client: AsyncClient
    fleet: Fleet
    image: npt.NDArray[np.float32]

    async def ask(self) -> Answer:
        return await self._infer("digits", "image", self.image, "probabilities")

    async def ask_far(self) -> Answer:
        return await self._infer("digits_large", "image", self.image, "probabilities")

    async def work(self) -> Answer:
        return await self._infer("magika", "bytes", page(), "target_label")

    def in_flight(self, node: str) -> int:
        return self.client.in_flight[self.fleet.address(node)]

    async def _infer(self, model: str, name: str, value: Any, output: str) -> Answer:
        answer = await self.client.infer(model, {name: value}, deadline_ms=DEADLINE_S * 1e3)
        says = str(int(answer.outputs[output].argmax()))
        return Answer(model=model, version=answer.version, served_by=answer.served_by, says=says)


@dataclass
class RouterWay:
    client: Any
    fleet: Fleet
    image: npt.NDArray[np.float32]

    async def ask(self) -> Answer:
        return await self._infer("digits", "image", self.image, "FP32", "probabilities")

    async def ask_far(self) -> Answer:
        return await self._infer("digits_large", "image", self.image, "FP32", "probabilities")

    async def work(self) -> Answer:
        return await self._infer("magika", "bytes", page(), "INT32", "target_label")

    def in_flight(self, node: str) -> int:
        return round(self.fleet.candidates("router-1", "magika").get(node, 0.0))

    async def _infer(self, model: str, name: str, value: Any, datatype: str, output: str) -> Answer:
        import tritonclient.grpc.aio as triton

        tensor = triton.InferInput(name, list(value.shape), datatype)
        tensor.set_data_from_numpy(value)
        result = await self.client.infer(model, [tensor], client_timeout=DEADLINE_S)
        says = str(int(result.as_numpy(output).argmax()))
        return Answer(model=model, version=result.get_response().model_version, served_by="", says=says)


@asynccontextmanager
async def open_way(name: str, fleet: Fleet, *, shown: npt.NDArray[np.float32] | None = None) -> AsyncIterator[Way]:
    """The way called `client` or `router`, asking about `shown`."""
    asked = image(DIGIT) if shown is None else shown
    if name == "client":
        async with AsyncClient(fleet.edges) as client:
            yield OurWay(client, fleet, asked)
    else:
        import tritonclient.grpc.aio as triton

        client = triton.InferenceServerClient(fleet.address("router-1"))
        try:
            yield RouterWay(client, fleet, asked)
        finally:
            await client.close()


async def load_node(way: Way, node: str, *, at_least: int) -> tuple[list[asyncio.Task[str]], int]:
    """A burst of heavier work, and more until a node has enough of it in flight; (tasks, how many it has)."""
    tasks = [asyncio.create_task(attempt(way)) for _ in range(BURST)]
    until = time.monotonic() + LOADED_S_MAX
    while True:
        await asyncio.sleep(0.002)
        in_flight = way.in_flight(node)
        if in_flight >= at_least or time.monotonic() > until:
            return tasks, in_flight
        tasks += [asyncio.create_task(attempt(way)) for _ in range(MORE)]


async def attempt(way: Way) -> str:
    """Work once; what went wrong, or nothing."""
    try:
        await way.work()
    except Exception as error:  # of either client
        return f"{type(error).__name__}: {error}"
    return ""
