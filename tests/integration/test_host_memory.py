"""More models than memory in a real host: who comes in, who goes, and what a request hears meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import magika
import numpy as np
import pymicro_wakeword
import pytest
from prometheus_client import CollectorRegistry

from nearcast.errors import Code, MeshError
from nearcast.handler import ModelRepository, RequestContext
from nearcast.serving import HostLimits, ModelHost, residency
from nearcast.serving.engines import estimate_memory_bytes
from nearcast.serving.loading import Loaded, load_version
from nearcast.serving.profile import Profile, Setting
from nearcast.serving.tuning import Profiles
from nearcast.store import Store
from nearcast.wire.request import TensorRequest
from tests.tiny_models import activate, affine_model, install, tensor

X = np.arange(4, dtype=np.float32).reshape(1, 4)
NAMES = ("m1", "m2", "m3", "m4")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Four models, mN multiplies by N."""
    store = Store(tmp_path / "store")
    for scale, name in enumerate(NAMES, start=1):
        install(store, affine_model(float(scale)), name=name)
        activate(store, name, stable=1)
    return store


def room_for(store: Store, models: int, **fields: Any) -> HostLimits:
    need = max(estimate_memory_bytes(store.manifest(name, 1)) for name in NAMES)
    return HostLimits(**{"memory_bytes_max": models * need, "memory_protect_s": 0.0} | fields)


@contextlib.asynccontextmanager
async def running(store: Store, limits: HostLimits, **options: Any) -> AsyncIterator[ModelHost]:
    host = ModelHost(store, node="edge-1", limits=limits, **options)
    await host.start()
    try:
        yield host
    finally:
        await host.close()


async def ask(host: ModelHost, model: str, *, within_s: float | None = 5.0, version: str = "") -> float:
    deadline = None if within_s is None else time.monotonic() + within_s
    request = TensorRequest(model=model, inputs={"x": X}, version=version)
    answer = await host.infer(request, RequestContext(deadline=deadline))
    return float(answer.decode()["y"][0, 1])


def hot(host: ModelHost) -> set[str]:
    return {version.model for version in host.report().versions if version.residency == "hot"}


async def test_a_cold_model_comes_in_for_a_request_and_the_least_recently_used_goes(store: Store) -> None:
    registry = CollectorRegistry()
    async with running(store, room_for(store, 2), registry=registry) as host:
        assert isinstance(host, ModelRepository)
        assert hot(host) == {"m1", "m2"}, "a start fills free room"
        cold = {version.model: version for version in host.report().versions if version.residency == "cold"}
        assert set(cold) == {"m3", "m4"}
        assert cold["m3"].eta_ms > 0
        assert await host.is_ready("m3")
        assert (await host.metadata("m3", "")).inputs[0].shape == (-1, 4)
        assert await ask(host, "m1") == 1.0
        assert await ask(host, "m3") == 3.0
        assert hot(host) == {"m1", "m3"}, "m2 was not used for longest"
        assert await ask(host, "m4", within_s=None, version="1") == 4.0
        assert hot(host) == {"m3", "m4"}
        assert await ask(host, "m1") == 1.0
        assert registry.get_sample_value("nearcast_model_reloads_total") == 1
        assert registry.get_sample_value("nearcast_model_evictions_total") == 3
        assert registry.get_sample_value("nearcast_model_memory_bytes") <= room_for(store, 2).memory_bytes_max


async def test_the_previous_release_gives_way_first(store: Store) -> None:
    install(store, affine_model(9.0), name="m1", release=2)
    for name in NAMES[2:]:
        activate(store, name)
    async with running(store, room_for(store, 3)) as host:
        activate(store, "m1", stable=2, last_good=1)
        await host.refresh("m1")
        assert {each.release: each.state for each in host.status("m1")} == {1: "hot", 2: "hot"}
        activate(store, "m3", stable=1)
        await host.refresh("m3")
        assert {each.release: each.state for each in host.status("m1")} == {1: "cold", 2: "hot"}
        assert hot(host) == {"m1", "m2", "m3"}
        activate(store, "m1", stable=1, last_good=2)
        await host.refresh("m1")
        assert await ask(host, "m1") == 1.0, "a rollback sends others away"


async def test_what_never_fits_is_said_at_once(store: Store) -> None:
    limits = HostLimits(memory_bytes_max=1000)
    async with running(store, limits) as host:
        assert "more would exceed" in host.status("m1")[0].error
        with pytest.raises(MeshError) as caught:
            await ask(host, "m1")
        assert caught.value.code is Code.UNAVAILABLE


async def test_who_cannot_wait_is_told_when_and_the_load_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    async with running(store, room_for(store, 2)) as host:
        monkeypatch.setattr(residency, "load_version", lambda *a: (gate.wait(20), load_version(*a))[1])
        with pytest.raises(MeshError) as caught:
            await ask(host, "m3", within_s=0.001)
        assert caught.value.code is Code.UNAVAILABLE
        assert caught.value.retry_after_ms
        host._residency.load_s = 0.001
        with pytest.raises(MeshError) as caught:
            await ask(host, "m3", within_s=0.02)
        assert caught.value.code is Code.DEADLINE
        gate.set()
        assert await ask(host, "m3") == 3.0
        assert "m3" in hot(host)


async def test_a_model_that_came_in_lately_stays(store: Store) -> None:
    async with running(store, room_for(store, 1, memory_protect_s=60.0)) as host:
        with pytest.raises(MeshError) as caught:
            await ask(host, "m2", within_s=1.0)
        assert caught.value.code is Code.UNAVAILABLE
        assert 50_000 < (caught.value.retry_after_ms or 0) <= 61_000
        assert hot(host) == {"m1"}


async def test_pins_hold_until_they_are_taken_back(store: Store) -> None:
    async with running(store, room_for(store, 2, pinned=frozenset({"m4"}))) as host:
        assert hot(host) == {"m1", "m4"}, "pinned models come first"
        for name in ("m2", "m3", "m1"):
            await ask(host, name)
            assert hot(host) == {name, "m4"}
        await host.load("m2")
        assert hot(host) == {"m2", "m4"}
        with pytest.raises(MeshError) as caught:
            await ask(host, "m1")
        assert caught.value.code is Code.UNAVAILABLE
        with pytest.raises(MeshError) as caught:
            await host.load("m1")
        await host.unload("m2")
        assert hot(host) == {"m4"}
        assert await ask(host, "m1") == 1.0


async def test_a_request_inside_keeps_its_model(store: Store) -> None:
    wide = {"inputs": (tensor("x", "FP32", (-1, 256)),), "outputs": (tensor("y", "FP32", (-1, 256)),)}
    slow_model = affine_model(1.0, width=256, repeat=40)
    install(store, slow_model, name="slow", **wide)
    activate(store, "slow", stable=1)
    for name in NAMES[1:]:
        activate(store, name)
    limits = HostLimits(
        memory_bytes_max=estimate_memory_bytes(store.manifest("slow", 1)),
        memory_protect_s=0.0,
        inline_us_max=0.0,
        pinned=frozenset({"slow"}),
    )
    async with running(store, limits) as host:
        await host.unload("m1")
        await host.load("slow")
        host._residency.slots["slow"].pinned = False
        x = np.ones((4096, 256), np.float32)
        slow = asyncio.create_task(host.infer(TensorRequest(model="slow", inputs={"x": x}), RequestContext()))
        await asyncio.sleep(0)
        assert await ask(host, "m1") == 1.0
        assert slow.done(), "the other model waited for the lease"
        assert (await slow).version == "1"
        assert hot(host) == {"m1"}


async def test_loads_requests_and_unloads_never_tear_an_answer(store: Store) -> None:
    """Complaint: load, infer, unload are not atomic. Here two operators and eight clients quarrel over room for one."""
    limits = room_for(store, 1)
    async with running(store, limits) as host:
        until = time.monotonic() + 0.7
        answered = dict.fromkeys(NAMES, 0)

        async def client(seed: int) -> None:
            choose = random.Random(seed)
            while time.monotonic() < until:
                name = choose.choice(NAMES)
                try:
                    assert await ask(host, name) == float(name[1])
                    answered[name] += 1
                except MeshError as error:
                    assert error.code is Code.UNAVAILABLE, error

        async def operator(seed: int) -> None:
            choose = random.Random(seed)
            while time.monotonic() < until:
                name = choose.choice(NAMES[:2])
                with contextlib.suppress(MeshError):
                    await host.load(name)
                await asyncio.sleep(0.01)
                await host.unload(name)
                await asyncio.sleep(0.01)

        async with asyncio.TaskGroup() as group:
            for seed in range(8):
                group.create_task(client(seed))
            group.create_task(operator(1))
            group.create_task(operator(2))
        assert all(answered.values()), answered
        assert len(hot(host)) <= 1
        assert host._residency.held_bytes() <= limits.memory_bytes_max


async def test_what_could_not_come_back_never_goes(store: Store) -> None:
    """Complaint: the storage hiccups and the serving version is unloaded."""
    async with running(store, room_for(store, 1)) as host:
        shutil.rmtree(store.folder("m1", 1))
        with pytest.raises(MeshError) as caught:
            await ask(host, "m2", within_s=0.3)
        assert caught.value.code is Code.UNAVAILABLE
        assert await ask(host, "m1") == 1.0
        await host.refresh(None)
        assert await ask(host, "m1") == 1.0


async def test_a_cold_model_that_is_broken_says_so_to_all_who_wait(store: Store) -> None:
    async with running(store, room_for(store, 2)) as host:
        path = store.folder("m3", 1) / "model.onnx"
        path.chmod(0o600)
        path.write_bytes(b"\0" * path.stat().st_size)
        failures = await asyncio.gather(*(ask(host, "m3") for _ in range(3)), return_exceptions=True)
        assert {failure.code for failure in failures if isinstance(failure, MeshError)} == {Code.UNAVAILABLE}
        assert host.status("m3")[0].state == "failed"
        assert await ask(host, "m1") == 1.0


async def test_loading_yields_to_serving(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complaint: loading one model raises the latency of the others."""
    seen: list[int] = []

    def load(*arguments: Any) -> Loaded:
        seen.append(os.sched_getscheduler(threading.get_native_id()))
        return load_version(*arguments)

    monkeypatch.setattr(residency, "load_version", load)
    async with running(store, room_for(store, 4)):
        pass
    assert set(seen) == {os.SCHED_BATCH}
    assert os.sched_getscheduler(0) != os.SCHED_BATCH, "its own thread alone"


async def test_two_models_load_at_once_until_the_host_serves(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=20.0)

    def load(*arguments: Any) -> Loaded:
        both.wait()
        return load_version(*arguments)

    monkeypatch.setattr(residency, "CORES", 2)
    monkeypatch.setattr(residency, "load_version", load)
    async with running(store, room_for(store, 8)) as host:
        assert hot(host) == set(NAMES)
        inside: list[int] = []
        most: list[int] = []

        def load_alone(*arguments: Any) -> Loaded:
            inside.append(1)
            most.append(len(inside))
            loaded = load_version(*arguments)
            inside.pop()
            return loaded

        monkeypatch.setattr(residency, "load_version", load_alone)
        for name in NAMES:
            install(store, affine_model(1.0), name=name, release=2)
            activate(store, name, stable=2)
        await host.refresh()
        assert most == [1] * len(NAMES)


MEASURE = """
import sys
from pathlib import Path
import numpy as np
from nearcast.serving.engines import load_engine
from nearcast.serving.golden import read_tensors
from nearcast.serving.heap import trim_heap
from nearcast.store import Store
from nearcast.store.contents import Contents

def rss():
    trim_heap()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

store, kept = Store(Path(sys.argv[1])), []
for name in store.models():
    def load():
        contents = Contents(store.manifest(name, 1), store.folder(name, 1))
        engine = load_engine(contents)
        engine.run(read_tensors(contents, contents.manifest.golden[0].inputs))
        kept.append(engine)
    load(), load()
    before = rss()
    for _ in range(8):
        load()
    print(name, (rss() - before) / 8 / kept[-1].memory_bytes)
"""


def test_the_estimate_of_a_models_memory_is_within_a_factor_of_three(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    x = np.zeros((1, 1024), np.float32)
    install(
        store,
        affine_model(2.0, width=1024, repeat=1),
        name="affine",
        golden=(({"x": x}, {"y": x}),),
        inputs=(tensor("x", "FP32", (-1, 1024)),),
        outputs=(tensor("y", "FP32", (-1, 1024)),),
    )
    text = {"bytes": np.zeros((1, 2048), np.int32)}
    install(
        store,
        next(Path(magika.__file__).parent.rglob("*.onnx")).read_bytes(),
        name="magika",
        golden=((text, {}),),
        inputs=(tensor("bytes", "INT32", (-1, 2048)),),
        outputs=(tensor("target_label", "FP32", (-1, -1)),),
    )
    install(
        store,
        (Path(pymicro_wakeword.__file__).parent / "models" / "okay_nabu.tflite").read_bytes(),
        name="wake_word",
        golden=(({"input_audio": np.zeros((1, 3, 40), np.int8)}, {}),),
        engine="litert",
        model_file="model.tflite",
        inputs=(tensor("input_audio", "INT8", (1, 3, 40), None),),
        outputs=(tensor("dense_1", "UINT8", (1, 1), None),),
    )
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(store.root)], capture_output=True, text=True, check=True, timeout=50
    )
    ratios = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines() if line.count(" ") == 1}
    assert set(ratios) == {"affine", "magika", "wake_word"}
    assert all(1 / 3 <= ratio <= 3 for ratio in ratios.values()), ratios


async def test_a_version_that_nobody_measured_is_measured_beside_the_serving_and_runs_as_that_advises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real child measures; what it advises is then replaced, so that the host has something to change."""
    store = Store(tmp_path / "models")
    manifest = install(store, affine_model())
    activate(store, stable=1)
    monkeypatch.setattr(Profile, "choose", lambda _: Setting(threads=2, rows_max=7))
    host = ModelHost(store, node="n", limits=HostLimits(tune=True, slots=1))
    await host.start()
    try:
        slot = host._slots["affine"]
        first = slot.stable
        async with asyncio.timeout(30):
            while slot.stable is first:
                answer = await host.infer(TensorRequest(model="affine", inputs={"x": X}), RequestContext())
                assert answer.version == "1"
                await asyncio.sleep(0.005)
        assert slot.stable.setting == Setting(threads=2, rows_max=7)
        assert first.is_closed or first.in_flight
        profile = Profiles.beside(store.root).find(manifest)
        assert profile is not None
        assert profile.concurrency == 1
    finally:
        await host.close()
