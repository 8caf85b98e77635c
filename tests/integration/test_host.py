"""The model host over a real store and real engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from nearcast.errors import Code, MeshError
from nearcast.handler import InferenceHandler, InferRequest, ModelDirectory, RequestContext
from nearcast.serving import HostLimits
from nearcast.store import Store
from nearcast.wire.request import TensorRequest
from tests.integration.host_parts import CONTEXT, THREADED, X, refused, request, running, stats, wide
from tests.patience import until
from tests.tiny_models import activate, affine_model, install, lookup_model, recurrent_model, tensor, text_model


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


async def test_a_request_gets_the_models_answer_and_what_happened(store: Store) -> None:
    install(store, affine_model(3.0), semver="2.1.0")
    activate(store, stable=1)
    async with running(store) as host:
        assert isinstance(host, ModelDirectory)
        handler: InferenceHandler = host
        for version in ("", "1", "2.1.0"):
            answer = await handler.infer(request(id="a", version=version), CONTEXT)
            np.testing.assert_array_equal(answer.decode()["y"], 3 * X)
            assert (answer.model, answer.version, answer.id) == ("affine", "1", "a")
        served = answer.served
        assert (served.node, served.tier, served.version, served.in_flight) == ("edge-1", "local", "1", 0)
        assert stats(host, "affine")[1].requests == 3
        metadata = await host.metadata("affine", "")
        assert metadata.versions == ("1",)
        assert metadata.platform == "onnxruntime_onnx"
        assert metadata.inputs[0].shape == (-1, 4)
        assert metadata.properties["semver"] == "2.1.0"
        assert await host.is_ready()
        assert await host.is_ready("affine")
        assert not await host.is_ready("affine", "7")


async def test_a_stream_is_answered_in_order(store: Store) -> None:
    install(store, affine_model())
    activate(store, stable=1)

    async def requests() -> AsyncIterator[InferRequest]:
        for index in range(3):
            yield request(id=str(index))

    async with running(store) as host:
        assert [answer.id async for answer in host.stream(requests(), CONTEXT)] == ["0", "1", "2"]


@pytest.mark.parametrize("limits", [HostLimits(), THREADED], ids=["inline", "threads"])
@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, "Input x (FP32 [-1, 4]) of affine release 1 is missing; got none."),
        ({"x": X.astype(np.float64)}, "Input x of affine release 1 must be FP32, got FP64."),
        ({"x": X[:, :3]}, "Input x of affine release 1 must have shape [-1, 4], got [1, 3]."),
        ({"x": X[0]}, "Input x of affine release 1 must have shape [-1, 4], got [4]."),
        ({"x": X, "z": X}, "Model affine release 1 has no input z; it takes x."),
    ],
)
async def test_wrong_inputs_are_named(store: Store, limits: HostLimits, inputs: Any, sentence: str) -> None:
    install(store, affine_model())
    activate(store, stable=1)
    async with running(store, limits) as host:
        with refused(Code.INVALID_REQUEST) as caught:
            await host.infer(TensorRequest(model="affine", inputs=inputs), CONTEXT)
        assert caught.value.message == sentence
        with refused(Code.INVALID_REQUEST, "has no output q; it gives y"):
            await host.infer(request(outputs=["q"]), CONTEXT)
        np.testing.assert_array_equal((await host.infer(request(outputs=["y"]), CONTEXT)).decode()["y"], 2 * X)
        assert stats(host, "affine")[1].errors == 0
        assert stats(host, "affine")[1].codes == {"INVALID_REQUEST": 2}


async def test_unknown_models_and_versions_name_what_is_there(store: Store) -> None:
    install(store, affine_model())
    activate(store, stable=1)
    async with running(store) as host:
        with refused(Code.MODEL_NOT_FOUND, "it has: affine"):
            await host.infer(request(model="other"), CONTEXT)
        with refused(Code.MODEL_NOT_FOUND):
            await host.is_ready("../etc")
        with refused(Code.MODEL_NOT_FOUND):
            await host.refresh("../etc")
        with refused(Code.VERSION_MISMATCH, "no version '7' here; hot releases: 1"):
            await host.infer(request(version="7"), CONTEXT)
        with refused(Code.VERSION_MISMATCH):
            await host.infer(request(), RequestContext(version="7", forwarded=True))


async def test_the_routers_choice_beats_the_clients_wish(store: Store) -> None:
    for release in (1, 2):
        install(store, affine_model(float(release)), release=release)
    activate(store, stable=1, candidate=2, share=0.1)
    async with running(store) as host:
        assert (await host.infer(request(), CONTEXT)).version == "1"
        assert (await host.infer(request(), RequestContext(version="2"))).version == "2"


async def test_expired_work_is_dropped_before_it_runs(store: Store) -> None:
    install(store, affine_model(1.0, width=256, repeat=40), **wide(256))
    activate(store, stable=1)
    async with running(store, HostLimits(inline_us_max=0.0, slots=1, batch_rows_max=1)) as host:
        with refused(Code.DEADLINE):
            await host.infer(request(np.ones((1, 256), np.float32)), RequestContext(deadline=time.monotonic() - 1))
        slow = asyncio.create_task(host.infer(request(np.ones((2048, 256), np.float32)), CONTEXT))
        await until(lambda: host.report().in_flight == 1)
        late = RequestContext(deadline=time.monotonic() + 0.005)
        with refused(Code.DEADLINE):
            await host.infer(request(np.ones((1, 256), np.float32)), late)
        assert not slow.done(), "the deadline must not wait for the engine"
        await slow
        assert stats(host, "affine")[1].codes == {"DEADLINE": 2}


async def test_a_full_queue_refuses_with_a_hint(store: Store) -> None:
    install(store, affine_model(1.0, width=256, repeat=40), **wide(256))
    activate(store, stable=1)
    limits = HostLimits(inline_us_max=0.0, slots=1, queue_rows_max=2, batch_rows_max=1)
    async with running(store, limits) as host:
        x = np.ones((512, 256), np.float32)
        tasks = [asyncio.create_task(host.infer(request(x if not index else x[:1]), CONTEXT)) for index in range(6)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [result for result in results if isinstance(result, MeshError)]
        assert len(errors) == 3
        assert all(error.code is Code.OVERLOADED and (error.retry_after_ms or 0) >= 1 for error in errors)


async def test_what_waits_is_batched_and_each_gets_its_own(store: Store) -> None:
    fields = {
        "inputs": (tensor("x", "FP32", (-1, 3)), tensor("state", "FP32", (2, -1, 3), 1)),
        "outputs": (tensor("y", "FP32", (-1, 3)), tensor("state_out", "FP32", (2, -1, 3), 1)),
    }
    install(store, recurrent_model(), name="recurrent", stateful="explicit", **fields)
    activate(store, "recurrent", stable=1)
    registry = CollectorRegistry()
    async with running(store, HostLimits(inline_us_max=0.0, slots=1, batch_rows_max=8), registry=registry) as host:
        random = np.random.default_rng(0)
        engine = host._residency.slots["recurrent"].hot[1].engine
        run, sizes = engine.run, []
        engine.run = lambda inputs: (sizes.append(len(inputs["x"])), run(inputs))[1]  # type: ignore[method-assign]

        async def call(rows: int) -> None:
            x = random.standard_normal((rows, 3), dtype=np.float32)
            state = random.standard_normal((2, rows, 3), dtype=np.float32)
            outputs = (
                await host.infer(TensorRequest(model="recurrent", inputs={"x": x, "state": state}), CONTEXT)
            ).decode()
            np.testing.assert_array_equal(outputs["y"], x + state[0])
            np.testing.assert_array_equal(outputs["state_out"], state + 1)

        await asyncio.gather(*(call(1 + index % 3) for index in range(64)))
        assert sum(sizes) == 127
        assert max(sizes) <= 8
        assert len(sizes) <= 24, sizes
        text = generate_latest(registry).decode()
        assert 'nearcast_batches_total{model="recurrent",reason="full",version="1"}' in text
        assert 'nearcast_batch_rows_total{model="recurrent",version="1"} 127.0' in text
        with refused(Code.INVALID_REQUEST, "Input state has 2 rows along axis 1, but input x has 1"):
            bad = {"x": np.ones((1, 3), np.float32), "state": np.ones((2, 2, 3), np.float32)}
            await host.infer(TensorRequest(model="recurrent", inputs=bad), CONTEXT)


async def test_one_poisoned_request_does_not_fail_its_batch(store: Store) -> None:
    tensors = {"inputs": (tensor("x", "INT64", (-1,)),), "outputs": (tensor("y", "FP32", (-1,)),)}
    install(store, lookup_model(), **tensors)
    activate(store, stable=1)
    async with running(store, HostLimits(inline_us_max=0.0, slots=1)) as host:
        values = [0, 1, 99, 2, 3, 1]
        calls = [host.infer(request(np.array([value], np.int64)), CONTEXT) for value in values]
        results = await asyncio.gather(*calls, return_exceptions=True)
        for value, result in zip(values, results, strict=True):
            if value == 99:
                assert isinstance(result, MeshError)
                assert result.code in (Code.INVALID_REQUEST, Code.INTERNAL)
            else:
                assert not isinstance(result, BaseException)
                assert result.decode()["y"].tolist() == [float(value)]


async def test_a_cancelled_request_leaves_the_queue(store: Store) -> None:
    install(store, affine_model(1.0, width=256, repeat=40), **wide(256))
    activate(store, stable=1)
    async with running(store, HostLimits(inline_us_max=0.0, slots=1, batch_rows_max=1)) as host:
        x = np.ones((512, 256), np.float32)
        slow = asyncio.create_task(host.infer(request(x), CONTEXT))
        await until(lambda: host.report().in_flight == 1)
        waiting = asyncio.create_task(host.infer(request(x), CONTEXT))
        await until(lambda: host.report().in_flight == 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert host.report().in_flight == 1
        await slow
        assert stats(host, "affine")[1].codes == {"CANCELLED": 1}
        assert host._residency.statistics["affine", 1].batches == {"full": 1}, "what was cancelled must not run"


async def test_text_survives_the_engine(store: Store) -> None:
    tensors = {"inputs": (tensor("x", "BYTES", (-1,)),), "outputs": (tensor("y", "BYTES", (-1,)),)}
    install(store, text_model(), **tensors)
    activate(store, stable=1)
    async with running(store) as host:
        x = np.array([b"plain", "grün".encode(), b""], dtype=object)
        assert (await host.infer(request(x), CONTEXT)).decode()["y"].tolist() == x.tolist()
        with refused(Code.INVALID_REQUEST, "no UTF-8"):
            await host.infer(request(np.array([b"\xff"], dtype=object)), CONTEXT)


async def test_the_report_shows_versions_and_load(store: Store) -> None:
    install(store, affine_model(), quality=0.75)
    install(store, b"broken", release=2)
    activate(store, stable=1, candidate=2)
    async with running(store, HostLimits(slots=3, batch_window_us_max=500.0), price=2.5) as host:
        report = host.report()
        assert (report.node, report.role, report.slots, report.in_flight, report.draining) == (
            "edge-1",
            "edge",
            3,
            0,
            False,
        )
        (version,) = report.versions
        assert (version.model, version.version, version.residency, version.quality) == ("affine", "1", "hot", 0.75)
        assert 0 < version.service_p50_us <= version.service_p95_us
        assert version.price == 2.5
        assert 0 <= version.batch_wait_us <= 500.0
    assert host.report().draining


async def test_closing_twice_and_refusing_afterwards(store: Store) -> None:
    install(store, affine_model())
    activate(store, stable=1)
    registry = CollectorRegistry()
    async with running(store, registry=registry) as host:
        pass
    await host.close()
    assert generate_latest(registry) == b""
    assert not await host.is_ready()
    with refused(Code.UNAVAILABLE):
        await host.infer(request(), CONTEXT)
    with refused(Code.UNAVAILABLE):
        await host.refresh("affine")
