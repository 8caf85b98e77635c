"""One request that breaks the model amid good ones: each is told its own end, and nothing stays in flight."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from nearcast.errors import Code, MeshError
from nearcast.handler import InferResponse, RequestContext, Tensors
from nearcast.serving import HostLimits, ModelHost
from nearcast.serving.engines import Outputs
from nearcast.store import Store
from nearcast.store.manifest import Pipeline
from nearcast.store.steps import Softmax
from nearcast.wire.request import TensorRequest
from tests.patience import WAIT_S
from tests.tiny_models import _serialise, activate, install, lookup_model, tensor

BAD, INVALID = 2, 99
"""What breaks the engine, and what the model itself refuses."""
CONTEXT = RequestContext()


class Listener:
    """Keeps what it is told; `breaks`: it fails when it is."""

    def __init__(self, *, breaks: bool = False) -> None:
        self.told: list[object] = []
        self._breaks = breaks

    def answer(self, response: InferResponse) -> None:
        self.told.append(response.decode()["y"].tolist())

    def refuse(self, error: MeshError) -> None:
        assert "secret" not in str(error)
        self.told.append(error.code)
        if self._breaks:
            raise RuntimeError("the asker is broken")


async def start(folder: Path, *, joins: bool = True, inline: bool = True) -> ModelHost:
    """A host whose engine breaks on `BAD`."""
    store, axis = Store(folder / "store"), 0 if joins else None
    shape = (-1,) if joins else (1,)
    install(
        store, lookup_model(), inputs=(tensor("x", "INT64", shape, axis),), outputs=(tensor("y", "FP32", shape, axis),)
    )
    host = await serve(store, inline=inline)
    engine = host._slots["affine"].hot[1].engine
    run = engine.run

    def break_or_run(inputs: Tensors) -> Outputs:
        if BAD in inputs["x"]:
            raise RuntimeError("secret")
        return run(inputs)

    engine.run = break_or_run  # type: ignore[method-assign]
    return host


async def serve(store: Store, *, inline: bool = True) -> ModelHost:
    activate(store, stable=1)
    # Generous, so that a busy machine still runs these models on the loop.
    limits = HostLimits(inline_us_max=1e6 if inline else 0, batch_rows_max=8, slots=1, drain_timeout_s=10 * WAIT_S)
    host = ModelHost(store, node="edge-1", limits=limits)
    await host.start()
    return host


def ask(value: int) -> TensorRequest:
    return TensorRequest(model="affine", inputs={"x": np.array([value], np.int64)})


async def crowd(host: ModelHost, request: TensorRequest) -> None:
    """After a turn in which two arrive, those of the next run together."""
    await asyncio.gather(host.infer(request, CONTEXT), host.infer(request, CONTEXT))


async def ends(answers: Sequence[Coroutine[Any, Any, InferResponse]]) -> list[object]:
    async with asyncio.timeout(WAIT_S):
        ended = await asyncio.gather(*answers, return_exceptions=True)
    assert not any("secret" in str(end) for end in ended)
    return [_told(end) for end in ended]


def _told(end: InferResponse | BaseException) -> object:
    if isinstance(end, BaseException):
        return end.code if isinstance(end, MeshError) else end
    return end.decode()["y"].tolist()


async def require_quiet(host: ModelHost, codes: dict[Code, int]) -> None:
    assert host.report().in_flight == 0
    found = Counter(host._residency.statistics["affine", 1].codes)
    assert {code: found[code] for code in codes} == codes
    async with asyncio.timeout(WAIT_S):
        await host.close()


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("joins", [True, False])
async def test_what_breaks_the_model_fails_alone(tmp_path: Path, *, joins: bool, inline: bool) -> None:
    host = await start(tmp_path, joins=joins, inline=inline)
    await crowd(host, ask(0))
    assert await ends([host.infer(ask(value), CONTEXT) for value in (0, BAD, 1, INVALID, 3)]) == [
        [0.0],
        Code.INTERNAL,
        [1.0],
        Code.INVALID_REQUEST,
        [3.0],
    ]
    await require_quiet(host, {Code.INTERNAL: 1, Code.INVALID_REQUEST: 1})


@pytest.mark.parametrize("joins", [True, False])
async def test_what_breaks_the_model_fails_alone_without_a_coroutine(tmp_path: Path, *, joins: bool) -> None:
    host = await start(tmp_path, joins=joins)
    await crowd(host, ask(0))
    askers = [Listener() for _ in range(4)]
    for asker, value in zip(askers, (0, BAD, 1, INVALID), strict=True):
        assert host.begin(ask(value), CONTEXT, asker) is not None
    await crowd(host, ask(0))
    assert [asker.told for asker in askers] == [[[0.0]], [Code.INTERNAL], [[1.0]], [Code.INVALID_REQUEST]]
    await require_quiet(host, {Code.INTERNAL: 1})


@pytest.mark.parametrize("joins", [True, False])
async def test_an_asker_that_breaks_takes_no_end_from_the_others(tmp_path: Path, *, joins: bool) -> None:
    host = await start(tmp_path, joins=joins)
    await crowd(host, ask(0))
    askers = [Listener(), Listener(breaks=True), Listener(), Listener()]
    for asker, value in zip(askers, (0, INVALID, 1, 3), strict=True):
        assert host.begin(ask(value), CONTEXT, asker) is not None
    await crowd(host, ask(0))
    assert [len(asker.told) for asker in askers] == [1, 1, 1, 1]
    await require_quiet(host, {Code.INVALID_REQUEST: 1})


async def test_a_lone_request_that_breaks_the_model_is_counted_and_told_so(tmp_path: Path) -> None:
    host = await start(tmp_path)
    for _ in range(3):  # nobody comes: the turn is not crowded
        await asyncio.sleep(0)
    with pytest.raises(MeshError, match="the log says why") as caught:
        host.begin(ask(BAD), CONTEXT, Listener())
    assert caught.value.code is Code.INTERNAL
    await asyncio.sleep(0)
    with pytest.raises(MeshError, match="the log says why"):
        await host.infer(ask(BAD), CONTEXT)
    await require_quiet(host, {Code.INTERNAL: 2})


async def test_an_empty_tensor_for_a_softmax_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    model = _serialise(
        [helper.make_node("Relu", ["x"], ["y"])],
        [],
        [("x", TensorProto.FLOAT, ["k"])],
        [("y", TensorProto.FLOAT, ["k"])],
    )
    x, y = (tensor(name, "FP32", (-1,), None) for name in "xy")
    pipeline = Pipeline(inputs=(x,), outputs=(y,), after=(Softmax(tensor="y"),))
    install(store, model, inputs=(x,), outputs=(y,), pipeline=pipeline)
    host = await serve(store)
    requests = [TensorRequest(model="affine", inputs={"x": np.ones(size, np.float32)}) for size in (1, 0, 1)]
    await crowd(host, requests[0])
    answers = await ends([host.infer(request, CONTEXT) for request in requests])
    assert answers == [[1.0], Code.INVALID_REQUEST, [1.0]]
    await require_quiet(host, {Code.INVALID_REQUEST: 1})
