"""Requests that a host answers without a coroutine: each asker is told once, and all are counted."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import numpy as np

from nearcast.errors import Code, MeshError
from nearcast.handler import InferResponse, RequestContext
from nearcast.serving import HostLimits, ModelHost
from nearcast.serving.asked import Asked
from nearcast.store import Store
from nearcast.wire.request import TensorRequest
from tests.tiny_models import activate, install, lookup_model, tensor

# Generous, so that a busy machine still runs these models on the loop.
LIMITS = HostLimits(inline_us_max=1e6, batch_rows_max=8)


class Listener:
    """An asker that keeps what it is told; `breaks`: the answer cannot travel."""

    def __init__(self, *, breaks: bool = False) -> None:
        self.told: list[object] = []
        self._breaks = breaks

    def answer(self, response: InferResponse) -> None:
        if self._breaks:
            raise MeshError(Code.INTERNAL, "The answer cannot travel.")
        self.told.append((response.id, response.decode()["y"].tolist()))

    def refuse(self, error: MeshError) -> None:
        self.told.append(error.code)


async def start(folder: Path) -> ModelHost:
    store = Store(folder / "store")
    install(store, lookup_model(), inputs=(tensor("x", "INT64", (-1,)),), outputs=(tensor("y", "FP32", (-1,)),))
    activate(store, stable=1)
    host = ModelHost(store, node="edge-1", limits=LIMITS)
    await host.start()
    return host


def begin(host: ModelHost, value: int, asker: Listener, *, deadline: float | None = None) -> Asked | None:
    request = TensorRequest(model="affine", inputs={"x": np.array([value], np.int64)}, id=f"r{value}")
    return host.begin(request, RequestContext(deadline=deadline), asker)


async def test_a_lone_request_is_answered_at_once_and_those_of_a_crowd_by_the_end_of_the_turn(tmp_path: Path) -> None:
    host = await start(tmp_path)
    alone = Listener()
    begun = begin(host, 3, alone)
    assert alone.told == [("r3", [3.0])]
    assert begun is not None
    begun.cancel()  # too late to matter

    for _ in range(2):  # the second turn is known to be crowded
        await asyncio.sleep(0)
        askers = [Listener(breaks=value == -1) for value in (0, 1, 99, 2, -1, 3, 0, 1)]
        now = time.monotonic()
        for index, value in enumerate((0, 1, 99, 2, -1, 3)):
            try:
                begun = begin(host, value, askers[index])
            except MeshError as error:  # who asks is told so where nothing waits
                askers[index].refuse(error)
            if index == 3 and begun is not None:
                begun.cancel()
    late, gone = askers[6], askers[7]
    begin(host, 0, late, deadline=now + 0.01)
    assert begin(host, 1, gone, deadline=now - 1.0) is None, "`infer` says so"
    assert host.report().in_flight == 6
    while time.monotonic() < now + 0.02:  # the loop is busy with something else until the deadline has passed
        pass
    while host.report().in_flight:
        await asyncio.sleep(0)
    assert [asker.told for asker in askers] == [
        [("r0", [0.0])],
        [("r1", [1.0])],
        [Code.INVALID_REQUEST],
        [],
        [Code.INTERNAL],
        [("r3", [3.0])],
        [Code.DEADLINE],
        [],
    ]
    codes = Counter(host._residency.statistics["affine", 1].codes)
    assert codes[Code.DEADLINE] == 1
    assert codes[Code.CANCELLED] == 1
    assert codes[Code.INVALID_REQUEST] == 2
    await host.close()


async def test_what_a_host_cannot_begin_is_left_to_infer(tmp_path: Path) -> None:
    host = await start(tmp_path)
    unknown = TensorRequest(model="nobody", inputs={"x": np.array([1], np.int64)})
    wrong = TensorRequest(model="affine", inputs={"x": np.array([1.0], np.float32)})
    for request in (unknown, wrong):
        assert host.begin(request, RequestContext(), Listener()) is None
    assert host.report().in_flight == 0
    assert not host._residency.statistics["affine", 1].requests, "`infer` counts it"
    await host.close()
