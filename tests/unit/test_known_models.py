"""What a node knows of models holds while nobody can say more."""

from __future__ import annotations

import asyncio

import pytest

from edge_node.mqtt import models
from edge_node.mqtt.models import AGE_S_MAX, KnownModels
from nearcast.clock import ManualClock
from nearcast.errors import Code, MeshError
from nearcast.handler import ModelMetadata


class Directory:
    """Answers what it is told to, once `gate` is open."""

    def __init__(self):
        self.asked = 0
        self.failure = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def metadata(self, model, version):
        self.asked += 1
        await self.gate.wait()
        if self.failure is not None:
            raise MeshError(self.failure, "gone")
        return ModelMetadata(name=model, versions=(str(self.asked),), platform="", inputs=(), outputs=())

    async def is_ready(self, model="", version=""):
        return True


def make():
    directory, clock = Directory(), ManualClock()
    return directory, clock, KnownModels(directory, clock)


async def version_of(known, **fields):
    return (await known.metadata("m", **fields)).versions[0]


async def test_a_model_is_asked_once_a_second():
    directory, clock, known = make()
    assert [await version_of(known), await version_of(known)] == ["1", "1"]
    clock.advance(AGE_S_MAX)
    assert [await version_of(known), await version_of(known), await version_of(known, renew=True)] == ["2", "2", "3"]
    assert directory.asked == 3
    await known.close()


async def test_a_question_that_is_swallowed_delays_one_request_a_little(monkeypatch):
    monkeypatch.setattr(models, "WAIT_S_MAX", 0.001)
    directory, clock, known = make()
    await version_of(known)
    clock.advance(AGE_S_MAX)
    directory.gate.clear()
    assert [await version_of(known) for _ in range(3)] == ["1", "1", "1"]
    assert directory.asked == 2, "nobody asks while a question is under way"
    directory.gate.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert await version_of(known) == "2", "a late answer counts"
    await known.close()


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.MODEL_NOT_FOUND])
async def test_what_is_known_holds_while_nobody_can_say(code):
    directory, clock, known = make()
    directory.failure = code
    with pytest.raises(MeshError):
        await known.metadata("m")
    directory.failure = None
    await version_of(known)
    clock.advance(AGE_S_MAX)
    directory.failure = code
    if code is Code.UNAVAILABLE:
        assert await version_of(known) == "2"
    else:
        with pytest.raises(MeshError):
            await known.metadata("m")
    with pytest.raises(MeshError):
        await known.metadata("m", renew=True)
    known.forget(("m", ""))
    assert ("m", "") not in known


async def test_a_question_ends_with_the_node():
    directory, clock, known = make()
    await version_of(known)
    clock.advance(AGE_S_MAX)
    directory.gate.clear()
    asking = asyncio.create_task(known.metadata("m"))
    while directory.asked < 2:
        await asyncio.sleep(0)
    await known.close()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_a_question_that_is_never_answered_counts_as_lost(monkeypatch):
    monkeypatch.setattr(models, "WAIT_S_MAX", 0.0)
    monkeypatch.setattr(models, "ASK_S_MAX", 0.001)
    directory, clock, known = make()
    await version_of(known)
    clock.advance(AGE_S_MAX)
    directory.gate.clear()
    async with asyncio.timeout(10):
        while directory.asked < 3:
            assert await version_of(known) == "1"
            await asyncio.sleep(0)
        with pytest.raises(MeshError) as caught:
            await known.metadata("other")
    assert (caught.value.code, caught.value.sent) == (Code.UNAVAILABLE, False)
    await known.close()
