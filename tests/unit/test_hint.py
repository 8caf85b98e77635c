"""The long poll: woken once per change, bounded, and strangers never take a node's place."""

from __future__ import annotations

import asyncio

import pytest

from model_sync.controller.hint import Hint
from nearcast.errors import Code, MeshError


def make_hint() -> Hint:
    return Hint(5, waiters_max=2, strangers_max=1, wait_s_max=60.0)


async def started(hint: Hint, count: int) -> None:
    async with asyncio.timeout(5):
        while hint.waiting < count:
            await asyncio.sleep(0)


async def test_older_serials_are_answered_at_once() -> None:
    assert await make_hint().wait(4, 60.0, is_enrolled=True) == 5
    assert await make_hint().wait(5, 0.0, is_enrolled=True) == 5


async def test_everyone_is_woken_and_may_wait_again() -> None:
    hint = make_hint()
    for serial in (6, 7):
        waiters = [asyncio.ensure_future(hint.wait(serial - 1, 60.0, is_enrolled=True)) for _ in range(2)]
        await started(hint, 2)
        hint.announce(serial - 1)
        await asyncio.sleep(0)
        assert not any(waiter.done() for waiter in waiters)
        hint.announce(serial)
        assert await asyncio.gather(*waiters) == [serial, serial]
    assert hint.waiting == 0


async def test_waiters_are_bounded_apart() -> None:
    hint = make_hint()
    waiters = [asyncio.ensure_future(hint.wait(5, 60.0, is_enrolled=enrolled)) for enrolled in (True, True, False)]
    await started(hint, 3)
    for enrolled in (True, False):
        with pytest.raises(MeshError) as caught:
            await hint.wait(5, 60.0, is_enrolled=enrolled)
        assert caught.value.code is Code.OVERLOADED
        assert caught.value.retry_after_ms
    waiters[2].cancel()
    await asyncio.gather(waiters[2], return_exceptions=True)
    assert hint.waiting == 2
    hint.close()
    assert await asyncio.gather(*waiters[:2]) == [5, 5]
    assert await hint.wait(5, 60.0, is_enrolled=False) == 5
