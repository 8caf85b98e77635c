"""The agent beside a real model host: activation waits for it, probation reads its counters, failures go back."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from nearcast.errors import MeshError
from nearcast.handler import RequestContext
from nearcast.serving.control import ControlSocket
from nearcast.serving.host import ModelHost
from nearcast.store import Pointer, Store
from nearcast.wire.request import TensorRequest
from tests.integration.agent_parts import (
    MODEL,
    Origin,
    Publisher,
    make_config,
    running,
    serving,
    settled,
    status_of,
)
from tests.patience import until
from tests.tiny_models import tensor


def reshaping_model() -> bytes:
    """y = 0..3 in the shape that x asks for: fails inside the engine unless the shape holds four."""
    table = helper.make_tensor("t", TensorProto.FLOAT, [4], [0.0, 1.0, 2.0, 3.0])
    node = helper.make_node("Reshape", ["t", "x"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.INT64, [2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])
    graph = helper.make_graph([node], "reshaping", [x], [y], [table])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


X = np.arange(4, dtype=np.float32).reshape(1, 4)


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    made = Publisher(tmp_path / "home")
    made.push(1, scale=2.0)
    made.roll(1)
    return made


@pytest.fixture
def origin(publisher: Publisher) -> Iterator[Origin]:
    with serving(publisher) as running_origin:
        yield running_origin


@contextlib.asynccontextmanager
async def hosting(folder: Path) -> AsyncIterator[ModelHost]:
    host = ModelHost(Store(folder / "store"), node="edge-1")
    control = ControlSocket(host, folder / "host.sock")
    await host.start()
    await control.start()
    try:
        yield host
    finally:
        await control.close()
        await host.close()


async def ask(host: ModelHost, x: Any = X, version: str = "") -> Any:
    response = await host.infer(TensorRequest(model=MODEL, inputs={"x": x}, version=version), RequestContext())
    return response.decode()["y"]


async def test_the_host_serves_what_the_agent_activated(tmp_path: Path, publisher: Publisher, origin: Origin) -> None:
    config = make_config(tmp_path, publisher, origin, host_socket=str(tmp_path / "host.sock"))
    async with hosting(tmp_path) as host, running(config) as agent:
        await settled(agent, stable=1)
        assert (await ask(host) == X * 2).all()
        publisher.push(2, scale=5.0)
        publisher.roll(2)
        await agent.check()
        await settled(agent, stable=2)
        assert (await ask(host) == X * 5).all()
        publisher.roll(1, rollback=True)
        await agent.check()
        await settled(agent, stable=1)
        assert (await ask(host) == X * 2).all()


class DamagingStore(Store):
    """A disk that damages release 2 after its gate, when the pointer turns to it."""

    def write_pointer(self, model: str, pointer: Pointer) -> None:
        if pointer.stable == 2:
            (self.folder(model, 2) / "model.onnx").write_bytes(b"no model any more")
        super().write_pointer(model, pointer)


async def test_a_version_that_the_host_cannot_load_is_rolled_back(
    tmp_path: Path, publisher: Publisher, origin: Origin
) -> None:
    config = make_config(tmp_path, publisher, origin, host_socket=str(tmp_path / "host.sock"))
    store = DamagingStore(tmp_path / "store")
    async with hosting(tmp_path) as host, running(config, store=store) as agent:
        await settled(agent, stable=1)
        publisher.push(2, scale=5.0)
        publisher.roll(2)
        await agent.check()
        await until(lambda: status_of(agent).quarantined == (2,), "release 2 is in quarantine")
        await settled(agent, stable=1)
        assert "could not load it" in status_of(agent).error
        assert (await ask(host) == X * 2).all()
        assert store.pointer(MODEL) == Pointer(stable=1, intent=2), "the intent does not fall"


async def test_a_version_that_fails_requests_on_probation_is_rolled_back(
    tmp_path: Path, publisher: Publisher, origin: Origin
) -> None:
    good, bad = np.array([2, 2], dtype=np.int64), np.array([3, 3], dtype=np.int64)
    answer = np.arange(4, dtype=np.float32).reshape(2, 2)
    fields = {
        "inputs": (tensor("x", "INT64", (2,), None),),
        "outputs": (tensor("y", "FP32", (2, 2), None),),
        "golden": (({"x": good}, {"y": answer}),),
    }
    publisher.push_model(2, reshaping_model(), **fields)
    publisher.push_model(3, reshaping_model(), **fields, extra={"notes.txt": b"another release"})
    config = make_config(tmp_path, publisher, origin, host_socket=str(tmp_path / "host.sock"))
    async with hosting(tmp_path) as host:
        async with running(config) as agent:
            publisher.roll(2)
            await agent.check()
            await settled(agent, stable=2)
        config = make_config(tmp_path, publisher, origin, host_socket=str(tmp_path / "host.sock"), probation_s=15.0)
        async with running(config) as agent:
            publisher.roll(3)
            await agent.check()
            await until(lambda: status_of(agent).state == "PROBATION", "release 3 is on probation")
            for _ in range(4):
                assert (await ask(host, good) == answer).all()
            for _ in range(5):
                with pytest.raises(MeshError):
                    await ask(host, bad)
            await until(lambda: status_of(agent).quarantined == (3,), "the errors condemn it")
            await settled(agent, stable=2)
            assert "requests failed during its probation" in status_of(agent).error
            assert (await ask(host, good) == answer).all()


async def test_an_absent_host_delays_the_verdict_and_nothing_else(
    tmp_path: Path, publisher: Publisher, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_sync.agent.host_link.UNREACHABLE_S", 0.2)
    config = make_config(tmp_path, publisher, origin, host_socket=str(tmp_path / "host.sock"))
    async with running(config) as agent:
        await until(lambda: "The model host does not answer" in status_of(agent).error, "nobody is there")
        assert status_of(agent).quarantined == ()
        assert status_of(agent).stable == 1, "the pointer is what a host finds when it starts"
        async with hosting(tmp_path) as host:
            await settled(agent, stable=1)
            assert (await ask(host) == X * 2).all()
