"""Shadowed inputs on a real host: what is compared, what is counted, and that the user never notices."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearcast.errors import MeshError
from nearcast.handler import RequestContext
from nearcast.serving import HostLimits, ModelHost
from nearcast.serving.shadow import Shadow
from nearcast.store import Store
from nearcast.wire.request import TensorRequest
from tests.patience import until
from tests.tiny_models import activate, affine_model, install, lookup_model, recurrent_model, tensor

X = np.arange(4, dtype=np.float32).reshape(1, 4)
LIMITS = HostLimits(shadow_interval_s=0.0, shadow_quiet_s=0.001)


@contextlib.asynccontextmanager
async def hosting(store: Store, limits: HostLimits = LIMITS) -> AsyncIterator[ModelHost]:
    host = ModelHost(store, node="edge-1", limits=limits)
    await host.start()
    try:
        yield host
    finally:
        await host.close()


async def ask(host: ModelHost, inputs: dict[str, Any], version: str = "", model: str = "affine") -> Any:
    response = await host.infer(TensorRequest(model=model, inputs=inputs, version=version), RequestContext())
    return response.decode()


def counted(host: ModelHost, release: int, model: str = "affine") -> tuple[int, int, int]:
    found = next(one for one in host.status(model) if one.release == release)
    return found.requests, found.compared, found.disagreed


@pytest.mark.parametrize(("scale", "disagreed"), [(2.0, 0), (3.0, 20)])
async def test_a_candidate_is_compared_in_both_directions(tmp_path: Path, scale: float, disagreed: int) -> None:
    store = Store(tmp_path)
    install(store, affine_model(2.0))
    install(store, affine_model(scale), release=2)
    activate(store, stable=1, candidate=2)
    async with hosting(store) as host:
        for turn in range(20):
            answer = await ask(host, {"x": X}, version="2" if turn % 2 else "")
            assert (answer["y"] == X * (scale if turn % 2 else 2.0)).all()
            await until(lambda expected=turn + 1: counted(host, 2)[1] == expected)
        assert counted(host, 1) == (10, 0, 0), "shadow runs are no requests, and the verdict is about the candidate"
        assert counted(host, 2) == (10, 20, disagreed)


async def test_a_version_is_not_compared_with_itself(tmp_path: Path) -> None:
    store = Store(tmp_path)
    install(store, affine_model(2.0))
    activate(store, stable=1, last_good=1)
    async with hosting(store) as host:
        for _ in range(5):
            await ask(host, {"x": X})
            await asyncio.sleep(0.005)
        assert counted(host, 1) == (5, 0, 0)
        assert host._shadow._work is None, "there is no second version"


async def test_a_new_stable_is_compared_with_what_it_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path)
    install(store, affine_model(2.0))
    install(store, affine_model(2.5), release=2)
    activate(store, stable=2, last_good=1)
    async with hosting(store, HostLimits(shadow_interval_s=0.0, shadow_compared_max=3)) as host:
        for _ in range(3):
            before = counted(host, 2)[1]
            await ask(host, {"x": X})
            await until(lambda seen=before: counted(host, 2)[1] > seen)
        await ask(host, {"x": X})
        assert host._shadow._work is None, "three comparisons were asked for"
        assert counted(host, 2) == (4, 3, 3)


async def test_failing_where_the_other_answers_is_disagreement(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {"inputs": (tensor("x", "INT64", (-1,)),), "outputs": (tensor("y", "FP32", (-1,)),)}
    store = Store(tmp_path)
    install(store, lookup_model(4), **tensors)
    install(store, lookup_model(2), release=2, **tensors)
    activate(store, stable=1, candidate=2)
    async with hosting(store) as host:
        assert (await ask(host, {"x": np.array([3])}))["y"] == 3.0
        await until(lambda: counted(host, 2) == (0, 1, 1))
        with pytest.raises(MeshError):
            await ask(host, {"x": np.array([9])})
        assert host._shadow._work is None, "what nobody answered is not compared"


async def test_calls_with_state_are_never_shadowed(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {
        "inputs": (tensor("x", "FP32", (-1, 3)), tensor("state", "FP32", (2, -1, 3), 1)),
        "outputs": (tensor("y", "FP32", (-1, 3)), tensor("state_out", "FP32", (2, -1, 3), 1)),
    }
    store = Store(tmp_path)
    for release in (1, 2):
        install(store, recurrent_model(), release=release, stateful="explicit", **tensors)
    activate(store, stable=1, candidate=2)
    async with hosting(store) as host:
        await ask(host, {"x": np.zeros((1, 3), np.float32), "state": np.zeros((2, 1, 3), np.float32)})
        assert host._shadow._work is None


async def test_a_busy_node_drops_samples_and_serves(tmp_path: Path) -> None:
    store = Store(tmp_path)
    install(store, affine_model())
    install(store, affine_model(3.0), release=2)
    activate(store, stable=1, candidate=2)
    limits = HostLimits(shadow_interval_s=0.0, shadow_queue_max=2, shadow_wait_s=0.02, shadow_bytes_max=64)
    async with hosting(store, limits) as host:
        slot = host._slots["affine"]
        assert slot.pair is not None
        shadow = Shadow(limits, quiet=lambda: False, now=time.monotonic)
        for _ in range(5):
            shadow.take(slot.pair, slot.pair.trial, {"x": X}, {"y": X})
        await asyncio.sleep(0)
        assert slot.pair.trial.statistics.shadows_dropped == 3, "the queue holds two"
        await until(lambda: slot.pair is not None and slot.pair.trial.statistics.shadows_dropped == 5)
        shadow.take(slot.pair, slot.pair.trial, {"x": np.zeros((100, 4), np.float32)}, {"y": X})
        await asyncio.sleep(0)
        assert slot.pair.trial.statistics.shadows_dropped == 6, "it is too large to be kept"
        await shadow.close()
        assert counted(host, 2) == (0, 0, 0)


async def test_the_sample_outlives_the_request_and_ends_with_the_host(tmp_path: Path) -> None:
    store = Store(tmp_path)
    install(store, affine_model())
    install(store, affine_model(3.0, repeat=3), release=2)
    activate(store, stable=1, candidate=2)
    async with hosting(store, HostLimits(shadow_interval_s=0.0, shadow_quiet_s=0.0)) as host:
        async with asyncio.timeout(5):
            request = asyncio.create_task(ask(host, {"x": X}))
            await request
        request.cancel()
        await until(lambda: counted(host, 2)[1] == 1)
        await ask(host, {"x": X})
    assert host._shadow._work is None
