"""Hidden state: the wake word model of the demo, on LiteRT."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pymicro_wakeword
import pytest

import nearcast
from nearcast.errors import Code
from nearcast.handler import RequestContext
from nearcast.serving import HostLimits, ModelHost
from nearcast.store import Store
from nearcast.wire.request import TensorRequest
from tests.integration.host_parts import CONTEXT, THREADED, refused, running
from tests.tiny_models import activate, install, tensor

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
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


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
