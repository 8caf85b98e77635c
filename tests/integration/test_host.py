"""The model host over a real store and real engines."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pymicro_wakeword
import pytest
from prometheus_client import CollectorRegistry, generate_latest

import nearcast
from nearcast.errors import Code, MeshError
from nearcast.handler import InferenceHandler, InferRequest, ModelDirectory, RequestContext
from nearcast.serving import HostLimits, ModelHost, residency
from nearcast.serving.loading import Loaded, load_version
from nearcast.serving.slots import VersionStatus
from nearcast.store import Store
from nearcast.wire.request import TensorRequest
from tests.patience import until
from tests.tiny_models import activate, affine_model, install, lookup_model, recurrent_model, tensor, text_model

X = np.arange(4, dtype=np.float32).reshape(1, 4)
CONTEXT = RequestContext()
THREADED = HostLimits(inline_us_max=0.0, slots=2)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@contextlib.asynccontextmanager
async def running(store: Store, limits: HostLimits | None = None, **options: Any) -> AsyncIterator[ModelHost]:
    host = ModelHost(store, node="edge-1", tier="local", limits=limits, **options)
    await host.start()
    try:
        yield host
    finally:
        await host.close()


def refused(code: Code, match: str | None = None) -> Any:
    return pytest.RaisesExc(MeshError, match=match, check=lambda error: error.code is code)


def request(x: Any = X, *, model: str = "affine", **fields: Any) -> TensorRequest:
    return TensorRequest(model=model, inputs={"x": x}, **fields)


def stats(host: ModelHost, model: str) -> dict[int, VersionStatus]:
    return {each.release: each for each in host.status(model)}


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


async def test_a_version_is_swapped_under_load_without_a_failed_request(store: Store) -> None:
    for release in (1, 2):
        install(store, affine_model(float(release), width=4), release=release)
    activate(store, stable=1)
    async with running(store) as host:
        answers: list[tuple[str, float]] = []
        stop = asyncio.Event()

        async def client() -> None:
            while not stop.is_set():
                answer = await host.infer(request(), CONTEXT)
                answers.append((answer.version, float(answer.decode()["y"][0, 1])))
                await asyncio.sleep(0)

        clients = [asyncio.create_task(client()) for _ in range(4)]
        await until(lambda: len(answers) > 50)
        activate(store, stable=2, last_good=1)
        await host.refresh("affine")
        before = len(answers)
        await until(lambda: len(answers) > before + 50)
        activate(store, stable=1, last_good=2)
        flipped = time.perf_counter()
        await host.refresh("affine")
        assert time.perf_counter() - flipped < 1.0
        before = len(answers)
        await until(lambda: len(answers) > before + 50)
        stop.set()
        await asyncio.gather(*clients)
        assert {version for version, _ in answers} == {"1", "2"}
        assert all(value == float(version) for version, value in answers)
        assert answers[-1][0] == "1"
        assert {each.release: each.state for each in host.status("affine")} == {1: "hot", 2: "hot"}


async def test_what_is_replaced_is_drained_then_unloaded(store: Store) -> None:
    install(store, affine_model(1.0, width=256, repeat=40), release=1, **wide(256))
    install(store, affine_model(2.0, width=256), release=2, **wide(256))
    activate(store, stable=1)
    async with running(store, THREADED) as host:
        x = np.ones((512, 256), np.float32)
        slow = asyncio.create_task(host.infer(request(x), CONTEXT))
        await until(lambda: host.report().in_flight == 1)
        activate(store, stable=2)
        await host.refresh("affine")
        assert not slow.done()
        assert [version.version for version in host.report().versions] == ["2"]
        assert (await host.infer(request(x[:1]), CONTEXT)).version == "2"
        assert (await slow).version == "1"
        with refused(Code.VERSION_MISMATCH):
            await host.infer(request(x[:1], version="1"), CONTEXT)


async def test_a_broken_candidate_leaves_stable_serving_and_says_why(store: Store) -> None:
    install(store, affine_model())
    install(store, b"no model at all", release=2)
    activate(store, stable=1, candidate=2, share=0.5)
    async with running(store) as host:
        status = stats(host, "affine")
        assert (status[1].state, status[2].state) == ("hot", "failed")
        assert "ONNX Runtime cannot load model.onnx" in status[2].error
        assert str(store.root) not in status[2].error
        assert (await host.infer(request(), CONTEXT)).version == "1"
        activate(store, stable=2, last_good=1)
        await host.refresh("affine")
        assert (await host.infer(request(), CONTEXT)).version == "1", "a stable that cannot load must not stop service"
        activate(store, stable=9, last_good=1)
        await host.refresh("affine")
        assert stats(host, "affine")[9].error == "Release 9 of model affine is not on this node."
        assert (await host.infer(request(), CONTEXT)).version == "1"


async def test_a_model_that_differs_from_its_manifest_is_refused(store: Store) -> None:
    install(store, affine_model(), inputs=(tensor("x", "FP64", (-1, 4)),))
    activate(store, stable=1)
    async with running(store) as host:
        assert stats(host, "affine")[1].error == "The input x is FP32, but its manifest says FP64."
        with refused(Code.UNAVAILABLE, "could not be loaded"):
            await host.infer(request(), CONTEXT)


async def test_a_rollback_does_not_wait_for_a_slow_candidate(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for release in (1, 2, 3):
        install(store, affine_model(float(release)), release=release)
    activate(store, stable=2, last_good=1)
    async with running(store) as host:
        gate = threading.Event()

        def load_slowly(*arguments: Any) -> Loaded:
            assert gate.wait(20)
            return load_version(*arguments)

        monkeypatch.setattr(residency, "load_version", load_slowly)
        activate(store, stable=2, candidate=3, last_good=1)
        loading = asyncio.create_task(host.refresh("affine"))
        await until(lambda: states(host).get(3) == "loading")
        assert [version.residency for version in host.report().versions] == ["hot", "hot", "loading"]
        activate(store, stable=1, last_good=2)
        rollback = asyncio.create_task(host.refresh("affine"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (await host.infer(request(), CONTEXT)).version == "1"
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        gate.set()
        await rollback
        assert states(host) == {1: "hot", 2: "hot"}, "what nobody wants any more is unloaded, cancelled caller or not"


async def test_a_load_goes_on_when_its_caller_leaves(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    install(store, affine_model())
    async with running(store) as host:
        gate = threading.Event()
        monkeypatch.setattr(residency, "load_version", lambda *a: (gate.wait(20), load_version(*a))[1])
        activate(store, stable=1)
        caller = asyncio.create_task(host.refresh("affine"))
        await until(lambda: host.models() == ("affine",) and states(host) == {1: "loading"})
        with refused(Code.UNAVAILABLE, "still loading"):
            await host.infer(request(), CONTEXT)
        caller.cancel()
        gate.set()
        await until(lambda: states(host) == {1: "hot"})


async def test_a_torn_pointer_keeps_what_was_served(store: Store) -> None:
    install(store, affine_model())
    install(store, affine_model(), name="other")
    activate(store, stable=1)
    activate(store, "other", stable=1)
    async with running(store) as host:
        (store.root / "affine" / "serving.json").write_bytes(b'{"stable": ')
        with refused(Code.INTERNAL, "torn or malformed"):
            await host.refresh("affine")
        await host.refresh(None)
        assert (await host.infer(request(), CONTEXT)).version == "1"
        (store.root / "affine" / "serving.json").unlink()
        await host.refresh("affine")
        assert (await host.infer(request(), CONTEXT)).version == "1"
        activate(store)
        await host.refresh("affine")
        with refused(Code.UNAVAILABLE, "no active version"):
            await host.infer(request(), CONTEXT)
    (store.root / "affine" / "serving.json").write_bytes(b"\x00" * 40)
    async with running(store) as host:
        assert host.models() == ("other",)


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


# Hidden state: the wake word model of the demo, on LiteRT.

WAKE_WORD = Path(pymicro_wakeword.__file__).parent / "models" / "okay_nabu.tflite"
CLIPS = Path(nearcast.__file__).parent / "cli" / "demo" / "models" / "wake_word" / "clips.npz"
WAKE_FIELDS: dict[str, Any] = {
    "engine": "litert",
    "model_file": "model.tflite",
    "stateful": "hidden",
    "inputs": (tensor("input_audio", "INT8", (1, 3, 40), None),),
    "outputs": (tensor("dense_1", "UINT8", (1, 1), None),),
}


def wake(x: Any, sequence: Any = "s", **parameters: Any) -> TensorRequest:
    parameters |= {} if sequence is None else {"sequence_id": sequence}
    return TensorRequest(model="wake_word", inputs={"input_audio": x}, parameters=parameters)


def frames(seed: int, count: int = 50) -> list[Any]:
    """A spoken wake word, from `seed` windows after its beginning on: what was heard before changes every score."""
    with np.load(CLIPS) as clips:
        return list(clips["okay_nabu"][5 * seed :][:count])


@pytest.fixture
def wake_store(store: Store) -> Store:
    install(store, WAKE_WORD.read_bytes(), name="wake_word", **WAKE_FIELDS)
    activate(store, "wake_word", stable=1)
    return store


async def listen(host: ModelHost, sequence: str, data: list[Any], tenant: str = "local") -> list[int]:
    heard = []
    for index, frame in enumerate(data):
        context = RequestContext(tenant=tenant)
        answer = await host.infer(wake(frame, sequence, sequence_start=index == 0), context)
        heard.append(int(answer.decode()["dense_1"][0, 0]))
        await asyncio.sleep(0)
    return heard


@pytest.mark.parametrize("limits", [HostLimits(), THREADED], ids=["inline", "threads"])
async def test_interleaved_sequences_never_mix(wake_store: Store, limits: HostLimits) -> None:
    async with running(wake_store, limits) as host:
        alone = [await listen(host, f"alone-{seed}", frames(seed)) for seed in range(4)]
        together = await asyncio.gather(*(listen(host, f"both-{seed}", frames(seed)) for seed in range(4)))
        assert list(together) == alone
        assert max(alone[0]) > 240, "the model must hear the wake word"
        assert len({tuple(heard) for heard in alone}) == 4, "the frames must tell the sequences apart"
        tenants = await asyncio.gather(*(listen(host, "same", frames(seed), f"t{seed}") for seed in range(2)))
        assert list(tenants) == alone[:2]
        assert await listen(host, "alone-0", frames(0)) == alone[0], "sequence_start gives a fresh state"


async def test_requests_of_one_sequence_run_in_order(wake_store: Store) -> None:
    async with running(wake_store, THREADED) as host:
        expected = await listen(host, "a", frames(7, 20))
        calls = [host.infer(wake(f, "b", sequence_start=i == 0), CONTEXT) for i, f in enumerate(frames(7, 20))]
        answers = await asyncio.gather(*calls)
        assert [int(answer.decode()["dense_1"][0, 0]) for answer in answers] == expected


async def test_deadlines_and_priorities_hold_for_sequences_too(wake_store: Store) -> None:
    frame = frames(1, 1)[0]
    async with running(wake_store, HostLimits(inline_us_max=0.0, slots=1)) as host:
        sequences = host._residency.slots["wake_word"].hot[1].sequences
        step, gate, ran = sequences._step, threading.Event(), []

        def step_when_open(sequence: Any, inputs: Any, **flags: bool) -> Any:
            ran.append(sequence)
            assert gate.wait(20)
            return step(sequence, inputs, **flags)

        sequences._step = step_when_open  # type: ignore[method-assign]
        first = RequestContext(deadline=time.monotonic() + 0.02)
        with refused(Code.DEADLINE, "while the model ran"):
            await host.infer(wake(frame, "a", sequence_start=True), first)
        low = asyncio.create_task(host.infer(wake(frame, "low", sequence_start=True), RequestContext(priority=3)))
        high = asyncio.create_task(host.infer(wake(frame, "high", sequence_start=True), RequestContext(priority=1)))
        with refused(Code.DEADLINE):
            await host.infer(wake(frame, "b", sequence_start=True), RequestContext(deadline=time.monotonic() + 0.02))
        gate.set()
        await asyncio.gather(low, high)
        keys = {id(sequence): key[1] for key, sequence in sequences._open.items()}
        assert [keys[id(sequence)] for sequence in ran] == ["a", "high", "low"]
        assert (await host.infer(wake(frame, "a"), CONTEXT)).version == "1", "a late answer does not end its sequence"


async def test_sequences_must_be_named_started_and_ended(wake_store: Store) -> None:
    frame = frames(1, 1)[0]
    async with running(wake_store) as host:
        with refused(Code.INVALID_REQUEST, "send the parameter sequence_id"):
            await host.infer(wake(frame, None), CONTEXT)
        with refused(Code.INVALID_REQUEST, "send the parameter sequence_id"):
            await host.infer(wake(frame, 0, sequence_start=True), CONTEXT)
        with refused(
            Code.INVALID_REQUEST, "'42' of wake_word release 1 has not been started; send sequence_start=true"
        ):
            await host.infer(wake(frame, 42), CONTEXT)
        with refused(Code.INVALID_REQUEST, "must be true or false"):
            await host.infer(wake(frame, 42, sequence_start=1), CONTEXT)
        await host.infer(wake(frame, 42, sequence_start=True), CONTEXT)
        await host.infer(wake(frame, "42", sequence_end=True), CONTEXT)
        with refused(Code.INVALID_REQUEST, "has not been started"):
            await host.infer(wake(frame, 42), CONTEXT)


async def test_sequences_are_bounded_and_the_idle_ones_go(wake_store: Store) -> None:
    frame = frames(1, 1)[0]
    async with running(wake_store, HostLimits(sequences_max=2, sequence_idle_s=0.2)) as host:
        for name in ("a", "b"):
            await host.infer(wake(frame, name, sequence_start=True), CONTEXT)
        with refused(Code.OVERLOADED, "2 open sequences") as caught:
            await host.infer(wake(frame, "c", sequence_start=True), CONTEXT)
        assert 0 < (caught.value.retry_after_ms or 0) <= 200
        await asyncio.sleep(0.25)
        await host.infer(wake(frame, "c", sequence_start=True), CONTEXT)
        with refused(Code.INVALID_REQUEST, "has not been started"):
            await host.infer(wake(frame, "a"), CONTEXT)


async def test_a_sequence_stays_with_the_version_it_began_on(wake_store: Store) -> None:
    install(wake_store, WAKE_WORD.read_bytes(), name="wake_word", release=2, **WAKE_FIELDS)
    frame = frames(1, 1)[0]
    async with running(wake_store) as host:
        await host.infer(wake(frame, "old", sequence_start=True), CONTEXT)
        activate(wake_store, "wake_word", stable=2)
        await host.refresh("wake_word")
        assert (await host.infer(wake(frame, "old"), RequestContext(version="2"))).version == "1"
        assert (await host.infer(wake(frame, "new", sequence_start=True), CONTEXT)).version == "2"
        assert (await host.infer(wake(frame, "old", sequence_end=True), CONTEXT)).version == "1"
        with refused(Code.INVALID_REQUEST, "has not been started"):
            await host.infer(wake(frame, "old"), CONTEXT)


def wide(width: int) -> dict[str, Any]:
    return {"inputs": (tensor("x", "FP32", (-1, width)),), "outputs": (tensor("y", "FP32", (-1, width)),)}


def states(host: ModelHost) -> dict[int, str]:
    return {release: status.state for release, status in stats(host, "affine").items()}
