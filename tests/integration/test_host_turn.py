"""Small requests of one turn of the loop: one run for all, each with its own answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from nearcast.errors import Code, MeshError
from nearcast.handler import RequestContext
from nearcast.serving import HostLimits, ModelHost
from nearcast.serving.turn import Turn
from nearcast.store import Store
from nearcast.wire.request import TensorRequest
from tests.tiny_models import activate, install, lookup_model, recurrent_model, scaled_model, tensor

CONTEXT = RequestContext()
# Generous, so that a busy machine still runs these models on the loop; eight rows a run.
LIMITS = HostLimits(inline_us_max=1e6, batch_rows_max=8)


@contextlib.asynccontextmanager
async def recurrent(folder: Path) -> AsyncIterator[tuple[ModelHost, list[int]]]:
    """A host with a batchable model of explicit state, and the rows of every run."""
    store = Store(folder / "store")
    install(
        store,
        recurrent_model(),
        name="recurrent",
        stateful="explicit",
        inputs=(tensor("x", "FP32", (-1, 3)), tensor("state", "FP32", (2, -1, 3), 1)),
        outputs=(tensor("y", "FP32", (-1, 3)), tensor("state_out", "FP32", (2, -1, 3), 1)),
    )
    activate(store, "recurrent", stable=1)
    host = ModelHost(store, node="edge-1", limits=LIMITS)
    await host.start()
    engine = host._residency.slots["recurrent"].hot[1].engine
    run, sizes = engine.run, []
    engine.run = lambda inputs: (sizes.append(len(inputs["x"])), run(inputs))[1]  # type: ignore[method-assign]
    try:
        yield host, sizes
    finally:
        await host.close()


async def call(host: ModelHost, rows: int, seed: int, **context: Any) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, 3), dtype=np.float32)
    state = random.standard_normal((2, rows, 3), dtype=np.float32)
    request = TensorRequest(model="recurrent", inputs={"x": x, "state": state})
    outputs = (await host.infer(request, RequestContext(**context))).decode()
    np.testing.assert_array_equal(outputs["y"], x + state[0])
    np.testing.assert_array_equal(outputs["state_out"], state + 1)


async def test_crowded_turns_share_runs_and_each_request_gets_its_own(tmp_path: Path) -> None:
    async with recurrent(tmp_path) as (host, sizes):
        for burst in range(4):
            await asyncio.gather(*(call(host, 1 + index % 3, 100 * burst + index) for index in range(32)))
        rows = 4 * sum(1 + index % 3 for index in range(32))
        assert sum(sizes) == rows
        assert max(sizes) <= LIMITS.batch_rows_max
        assert len(sizes) < 32 + 3 * 20, "after the first burst the turns are crowded"
        assert host._residency.statistics["recurrent", 1].batches["turn"] >= 3
        (counts,) = host.counts("recurrent")
        assert all(took_ns > 0 for _, took_ns in (counts.compute_input, counts.compute, counts.compute_output))
        parts_ns = (counts.queue[1], counts.compute_input[1], counts.compute[1], counts.compute_output[1])
        # Answers name whole microseconds.
        assert abs(counts.success[1] - sum(parts_ns)) <= 2000 * counts.success[0]


@pytest.mark.parametrize("rows_max", [8, 1])
async def test_requests_are_joined_only_where_their_common_inputs_are_equal(tmp_path: Path, rows_max: int) -> None:
    store = Store(tmp_path / "store")
    install(
        store,
        scaled_model(),
        name="scaled",
        inputs=(tensor("x", "FP32", (-1, 3)), tensor("rate", "INT64", (), None)),
        outputs=(tensor("y", "FP32", (-1, 3)),),
    )
    activate(store, "scaled", stable=1)
    host = ModelHost(store, node="edge-1", limits=replace(LIMITS, batch_rows_max=rows_max))
    await host.start()
    rows_of_runs = host._residency.statistics["scaled", 1].runs

    async def ask(index: int) -> None:
        x, rate = np.full((1, 3), index, np.float32), np.array(1 + index % 2, np.int64)
        request = TensorRequest(model="scaled", inputs={"x": x, "rate": rate})
        np.testing.assert_array_equal((await host.infer(request, CONTEXT)).decode()["y"], x * rate)

    try:
        for _ in range(3):
            await asyncio.gather(*(ask(index) for index in range(16)))
    finally:
        await host.close()
    assert max(rows_of_runs) == rows_max, "eight of each rate"


async def test_a_lone_request_does_not_wait_for_company(tmp_path: Path) -> None:
    async with recurrent(tmp_path) as (host, sizes):
        await asyncio.gather(*(call(host, 1, index) for index in range(8)))
        await asyncio.sleep(0)
        for index in range(5):
            await asyncio.sleep(0.001)
            coroutine = call(host, 1, index)
            if index:  # the turn after a crowd may still collect
                with pytest.raises(StopIteration):
                    coroutine.send(None)
            else:
                await coroutine
        assert sizes[-4:] == [1, 1, 1, 1]


async def test_cancelled_and_expired_requests_of_a_turn_do_not_run(tmp_path: Path) -> None:
    async with recurrent(tmp_path) as (host, sizes):
        await asyncio.gather(*(call(host, 1, index) for index in range(8)))
        sizes.clear()
        now = time.monotonic()
        tasks = [asyncio.ensure_future(call(host, 1, index, deadline=now + 60)) for index in range(4)]
        late = asyncio.ensure_future(call(host, 1, 9, deadline=now + 0.02))
        await asyncio.sleep(0)  # they have joined the turn
        tasks[1].cancel()
        while time.monotonic() < now + 0.03:  # the loop is busy with something else until the deadline has passed
            pass
        results = await asyncio.gather(*tasks, late, return_exceptions=True)
        assert isinstance(results[1], asyncio.CancelledError)
        assert isinstance(results[4], MeshError)
        assert results[4].code is Code.DEADLINE
        assert [results[0], results[2], results[3]] == [None, None, None]
        assert sum(sizes) == 3


async def test_one_poisoned_request_does_not_fail_its_turn(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    install(
        store,
        lookup_model(),
        inputs=(tensor("x", "INT64", (-1,)),),
        outputs=(tensor("y", "FP32", (-1,)),),
    )
    activate(store, stable=1)
    host = ModelHost(store, node="edge-1", limits=LIMITS)
    await host.start()
    for _ in range(2):
        values = [0, 1, 99, 2, 3]
        requests = [TensorRequest(model="affine", inputs={"x": np.array([value], np.int64)}) for value in values]
        results = await asyncio.gather(*(host.infer(each, CONTEXT) for each in requests), return_exceptions=True)
        for value, result in zip(values, results, strict=True):
            if value == 99:
                assert isinstance(result, MeshError)
            else:
                assert not isinstance(result, BaseException)
                assert result.decode()["y"].tolist() == [float(value)]
    await host.close()


async def test_a_turn_cuts_at_its_rows_keeps_keys_apart_and_goes_on() -> None:
    runs: list[list[tuple[str, int]]] = []
    turn: Turn[tuple[str, int]] = Turn(runs.append, lambda waiting: waiting[1], rows_max=4)
    assert not turn.arrive()
    assert not turn.arrive()
    await asyncio.sleep(0)
    assert turn.arrive(), "the turn before was crowded"
    for key, rows in (("a", 3), ("a", 2), ("b", 1), ("a", 1), ("a", 9)):
        turn.join(key, (key, rows))
    for _ in range(6):
        await asyncio.sleep(0)
    assert runs == [[("a", 3)], [("b", 1)], [("a", 2), ("a", 1)], [("a", 9)]]
    assert turn.take_all() == []
    turn.join("a", ("a", 1))
    assert turn.take_all() == [("a", 1)]
