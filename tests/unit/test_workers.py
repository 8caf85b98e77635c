"""Threads that run models: what is told, in which order, and how they end."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from nearcast.serving.workers import Workers

WAIT_S = 20.0


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    made = Workers(2, "test-run", lambda: None)
    yield made
    made.close()


async def told(workers: Workers, work: Callable[[], Any]) -> Any:
    """The outcome, and a check that it was told on the loop."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    loop_thread = threading.get_ident()

    def then(outcome: Any) -> None:
        assert threading.get_ident() == loop_thread
        future.set_result(outcome)

    workers.run(work, then)
    return await asyncio.wait_for(future, WAIT_S)


async def test_work_runs_in_a_named_thread_and_its_result_comes_back(workers: Workers) -> None:
    assert await told(workers, lambda: threading.current_thread().name) == "test-run_0"
    # It is free again, so nobody starts a second one.
    assert await told(workers, lambda: threading.current_thread().name) == "test-run_0"


async def test_all_threads_work_at_once_and_no_more_than_those(workers: Workers) -> None:
    both = threading.Barrier(2)
    first, second = await asyncio.gather(*(told(workers, lambda: both.wait(WAIT_S)) for _ in range(2)))
    assert {first, second} == {0, 1}
    names = await asyncio.gather(*(told(workers, lambda: threading.current_thread().name) for _ in range(20)))
    assert set(names) <= {"test-run_0", "test-run_1"}


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit(3)])
async def test_whatever_is_raised_is_told_and_the_thread_lives_on(workers: Workers, error: BaseException) -> None:
    def fail() -> None:
        raise error

    assert await told(workers, fail) is error
    assert await told(workers, lambda: 1) == 1


async def test_a_listener_that_fails_harms_no_other(workers: Workers, caplog: pytest.LogCaptureFixture) -> None:
    def break_down(_: Any) -> None:
        raise ValueError("nobody listens")

    gate = threading.Event()
    workers.run(gate.wait, break_down)
    outcomes = asyncio.gather(*(told(workers, lambda: 7) for _ in range(4)))
    gate.set()
    assert await outcomes == [7] * 4
    while "nobody listens" not in caplog.text:
        await asyncio.sleep(0)


async def test_a_thread_whose_set_up_fails_works_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    def refuse() -> None:
        raise PermissionError("not permitted")

    workers = Workers(1, "test-run", refuse)
    assert await told(workers, lambda: 5) == 5
    assert "not permitted" in caplog.text
    workers.close()


async def test_close_cancels_what_waits_and_lets_end_what_runs() -> None:
    workers = Workers(1, "test-run", lambda: None)
    gate, began = threading.Event(), threading.Event()

    def hold() -> str:
        began.set()
        assert gate.wait(WAIT_S)
        return "ran"

    runs = asyncio.create_task(told(workers, hold))
    waits = asyncio.create_task(told(workers, lambda: "ran, too"))
    await asyncio.sleep(0)
    assert began.wait(WAIT_S)
    workers.close()
    assert isinstance(await waits, asyncio.CancelledError)
    assert isinstance(await told(workers, lambda: "too late"), asyncio.CancelledError)
    gate.set()
    assert await runs == "ran"
    (thread,) = workers._threads
    thread.join(WAIT_S)
    assert not thread.is_alive()
    bell = workers._bell
    os.fstat(bell)
    del workers, thread
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(bell)


async def test_without_a_thread_to_be_had_the_caller_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    workers = Workers(1, "test-run", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert "can't start" in str(await told(workers, lambda: 1))
    assert await told(workers, lambda: 1) == 1
    workers.close()


async def test_threads_start_where_no_file_can_be_opened_any_more(workers: Workers) -> None:
    free = os.dup(0)
    os.close(free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        assert await told(workers, lambda: 1) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_a_loop_that_cannot_listen_is_told_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "too many watches")

    workers = Workers(1, "test-run", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "add_reader", refuse)
        assert "too many watches" in str(await told(workers, lambda: 1))
    assert await told(workers, lambda: 1) == 1
    workers.close()


FAILS_WHILE_A_MODEL_RUNS = """
import asyncio, time
from nearcast.serving.workers import Workers

def run():
    time.sleep(0.05)
    print("the run has ended", flush=True)

async def main():
    Workers(1, "run", lambda: None).run(run, lambda _: None)
    raise SystemExit(3)

asyncio.run(main())
"""


def test_a_process_ends_without_close_but_not_under_a_running_model() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILS_WHILE_A_MODEL_RUNS], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "the run has ended\n", "")
