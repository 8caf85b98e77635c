"""Versions of a model come, go and fail while the host serves."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearcast.errors import Code
from nearcast.handler import Tensors
from nearcast.serving import residency
from nearcast.serving.engines import Outputs
from nearcast.serving.engines.onnxruntime import OnnxModel
from nearcast.serving.loading import Loaded, load_version
from nearcast.store import Store
from tests.integration.host_parts import CONTEXT, THREADED, refused, request, running, states, stats, wide
from tests.patience import own_time, until
from tests.tiny_models import activate, affine_model, install, tensor


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


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
        flipped = own_time()
        await host.refresh("affine")
        assert own_time() - flipped < 1.0
        before = len(answers)
        await until(lambda: len(answers) > before + 50)
        stop.set()
        await asyncio.gather(*clients)
        assert {version for version, _ in answers} == {"1", "2"}
        assert all(value == float(version) for version, value in answers)
        assert answers[-1][0] == "1"
        assert {each.release: each.state for each in host.status("affine")} == {1: "hot", 2: "hot"}


async def test_what_is_replaced_is_drained_then_unloaded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    install(store, affine_model(1.0, width=256), release=1, **wide(256))
    install(store, affine_model(2.0, width=256), release=2, **wide(256))
    activate(store, stable=1)
    x, replaced, run = np.ones((512, 256), np.float32), threading.Event(), OnnxModel.run

    def run_until_replaced(model: OnnxModel, inputs: Tensors) -> Outputs:
        if next(iter(inputs.values())).shape == x.shape:
            assert replaced.wait(10)
        return run(model, inputs)

    monkeypatch.setattr(OnnxModel, "run", run_until_replaced)
    async with running(store, THREADED) as host:
        slow = asyncio.create_task(host.infer(request(x), CONTEXT))
        await until(lambda: host.report().in_flight == 1)
        activate(store, stable=2)
        await host.refresh("affine")
        assert not slow.done()
        assert [version.version for version in host.report().versions] == ["2"]
        assert (await host.infer(request(x[:1]), CONTEXT)).version == "2"
        replaced.set()
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
