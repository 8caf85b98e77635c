"""A call's coroutine begins without a task: nothing inside may tell the difference."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from typing import Any

import pytest

from nearcast.transport import eager

VARIABLE: ContextVar[str] = ContextVar("variable", default="outside")


async def begin(body: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None] | None:
    """Start it as a protocol would: from a callback of the loop."""
    loop = asyncio.get_running_loop()
    started: asyncio.Future[asyncio.Task[None] | None] = loop.create_future()
    loop.call_soon(lambda: started.set_result(eager.start(body(), loop)))
    return await started


async def test_what_never_waits_is_over_at_once_and_leaves_no_trace() -> None:
    seen: list[str] = []

    async def body() -> None:
        VARIABLE.set("inside")
        seen.append(VARIABLE.get())
        assert asyncio.current_task() is not None

    assert await begin(body) is None
    assert seen == ["inside"]
    assert VARIABLE.get() == "outside"


@pytest.mark.parametrize(
    "wait", [lambda: asyncio.sleep(0), lambda: asyncio.sleep(0.001), lambda: asyncio.Event().wait()]
)
async def test_the_rest_goes_on_in_a_task_with_the_same_context(wait: Callable[[], Awaitable[Any]]) -> None:
    seen: list[str] = []

    async def body() -> None:
        VARIABLE.set("inside")
        try:
            await asyncio.wait_for(wait(), 0.01)
        except TimeoutError:
            seen.append("timeout")
        seen.append(VARIABLE.get())

    task = await begin(body)
    assert task is not None
    await task
    assert seen[-1] == "inside"
    assert VARIABLE.get() == "outside"


async def test_a_timeout_that_began_before_the_task_cancels_it_and_is_told_from_a_cancellation() -> None:
    async def body() -> None:
        async with asyncio.timeout(0.005):
            await asyncio.Event().wait()

    task = await begin(body)
    assert task is not None
    with pytest.raises(TimeoutError):
        await task
    assert task.cancelling() == 0


async def test_a_timeout_that_is_over_before_the_first_wait_fires() -> None:
    async def body() -> None:
        async with asyncio.timeout(0):
            await asyncio.Event().wait()

    task = await begin(body)
    assert task is not None
    with pytest.raises(TimeoutError):
        await task


@pytest.mark.parametrize("turns", [0, 1, 2])
async def test_a_cancellation_reaches_what_is_waited_for_at_any_moment(turns: int) -> None:
    ended: list[str] = []

    async def inner() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("inner")
            raise

    async def body() -> None:
        try:
            await asyncio.create_task(inner())
        except asyncio.CancelledError:
            ended.append("outer")
            raise

    loop = asyncio.get_running_loop()
    started: asyncio.Future[asyncio.Task[None]] = loop.create_future()

    def start() -> None:
        task = eager.start(body(), loop)
        assert task is not None
        if turns == 0:
            task.cancel()
        started.set_result(task)

    loop.call_soon(start)
    task = await started
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended[-1] == "outer"
    assert turns == 0 or ended[0] == "inner"


async def test_who_cancels_itself_before_it_waits_is_cancelled_when_it_does() -> None:
    async def body() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        assert task.cancelling() == 1
        await asyncio.sleep(0)

    task = await begin(body)
    assert task is not None
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_group_of_tasks_may_be_opened_before_the_first_wait() -> None:
    seen: list[int] = []

    async def part(number: int) -> None:
        await asyncio.sleep(0)
        seen.append(number)

    async def body() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(part(number))

    task = await begin(body)
    assert task is not None
    await task
    assert seen == [0, 1, 2]
