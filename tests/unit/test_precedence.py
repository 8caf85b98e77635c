"""The loop goes before what is ordinary while it is quiet; threads that run models give way; nobody inherits either."""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearcast.serving import loop_rank
from nearcast.serving.loop_rank import (
    BUSY_SHARE,
    FIRST_WINDOW_S,
    LOADING_SHARE,
    ORDINARY_WINDOW_S,
    ORDINARY_WINDOW_S_MAX,
    QUIET_SHARE,
    LoopRank,
)
from nearcast.serving.precedence import NICENESS, LoopPrecedence, give_way_to_loop, yield_to_serving

on_linux = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"), reason="asks Linux"
)
REAL_TIME = getattr(os, "SCHED_RR", 2)


def policy() -> int:
    """Of the calling thread, and whether its children start as ordinary ones."""
    return os.sched_getscheduler(0)


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def is_granted() -> bool:
    """Whether a thread of this process, which then ends, may be real-time."""

    def ask() -> bool:
        try:
            os.sched_setscheduler(0, REAL_TIME, os.sched_param(1))
        except OSError:
            return False
        return True

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(ask).result()


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_only_a_quiet_loop_is_first(shares: list[float]) -> None:
    rank, now, used_s = LoopRank(0.0, 0.0), 0.0, 0.0
    for share in shares:
        was_first, window_s = rank.is_first, rank.window_s
        assert window_s == FIRST_WINDOW_S if was_first else ORDINARY_WINDOW_S <= window_s <= ORDINARY_WINDOW_S_MAX
        now, used_s = now + window_s, used_s + share * window_s
        changed = rank.look(now, used_s)
        assert changed == (rank.is_first is not was_first)
        assert rank.share == pytest.approx(share, abs=1e-6)
        if abs(share - BUSY_SHARE) > 1e-6 and abs(share - QUIET_SHARE) > 1e-6:
            assert rank.is_first == (share < (BUSY_SHARE if was_first else QUIET_SHARE))


def test_a_flood_that_looks_quiet_because_it_gets_little_is_first_less_and_less() -> None:
    rank, now, used_s = LoopRank(0.0, 0.0), 0.0, 0.0
    first_s, ordinary_s = 0.0, []
    for _ in range(40):
        share, window_s = (0.95, rank.window_s) if rank.is_first else (0.1, rank.window_s)
        if rank.is_first:
            first_s += window_s
        else:
            ordinary_s.append(window_s)
        now, used_s = now + window_s, used_s + share * window_s
        rank.look(now, used_s)
    assert ordinary_s == [min(ORDINARY_WINDOW_S_MAX, ORDINARY_WINDOW_S * 2**time) for time in range(20)]
    assert first_s <= 0.01 * now
    assert not rank.is_first
    for share in (0.1, 0.1, 0.9):
        now, used_s = now + rank.window_s, used_s + share * rank.window_s
        rank.look(now, used_s)
    assert rank.window_s == ORDINARY_WINDOW_S, "it was quiet for a while"


@given(st.lists(st.floats(0, 1), max_size=5), st.lists(st.floats(0, 1), max_size=5))
def test_while_a_version_loads_it_is_first_up_to_a_higher_share_and_then_as_before(
    before: list[float], meanwhile: list[float]
) -> None:
    rank, now, used_s = LoopRank(0.0, 0.0), 0.0, 0.0

    def look(share: float) -> None:
        nonlocal now, used_s
        now, used_s = now + rank.window_s, used_s + share * rank.window_s
        rank.look(now, used_s)

    for share in before:
        look(share)
    was_first, ordinary_s = rank.is_first, rank.window_s
    rank.begin_load(now, used_s)
    assert rank.is_first
    for share in meanwhile:
        look(share)
        if abs(share - LOADING_SHARE) > 1e-6:
            assert rank.is_first == (share < LOADING_SHARE)
    kept = rank.is_first
    rank.end_load(now, used_s)
    assert rank.is_first == (was_first and kept)
    if not was_first:
        assert rank.window_s == ordinary_s, "a load is no reason to look less often"


def test_a_look_at_no_time_changes_nothing() -> None:
    rank = LoopRank(5.0, 1.0)
    assert not rank.look(5.0, 2.0)
    assert not rank.is_first


@on_linux
def test_a_models_thread_is_nicer_than_the_loops() -> None:
    with ThreadPoolExecutor(1) as before, ThreadPoolExecutor(1, initializer=give_way_to_loop) as models:
        assert models.submit(niceness).result() == min(19, before.submit(niceness).result() + NICENESS)


@on_linux
def test_a_thread_that_loads_interrupts_nobody_and_keeps_its_share() -> None:
    with ThreadPoolExecutor(1) as before, ThreadPoolExecutor(1, initializer=yield_to_serving) as loader:
        assert loader.submit(policy).result() == os.SCHED_BATCH
        assert loader.submit(niceness).result() == before.submit(niceness).result()


@on_linux
def test_without_real_time_the_loop_stays_ordinary_and_its_threads_start_as_such() -> None:
    async def serve() -> None:
        precedence, before = LoopPrecedence(real_time=False), niceness()
        precedence.start()
        assert policy() == os.SCHED_OTHER | os.SCHED_RESET_ON_FORK
        assert niceness() == before
        assert await asyncio.to_thread(policy) == os.SCHED_OTHER
        precedence.stop()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, serve()).result()


@on_linux
@pytest.mark.skipif(not is_granted(), reason="the system grants no real-time priority")
def test_the_loop_is_real_time_while_it_is_quiet_and_nobody_inherits_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_rank, "ORDINARY_WINDOW_S", 0.02)
    monkeypatch.setattr(loop_rank, "FIRST_WINDOW_S", 0.02)
    first, ordinary = REAL_TIME | os.SCHED_RESET_ON_FORK, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK

    async def until(wanted: int, meanwhile: Callable[[], None]) -> None:
        async with asyncio.timeout(10):
            while policy() != wanted:
                meanwhile()
                await asyncio.sleep(0.001)

    def work() -> None:
        until_s = time.thread_time() + 0.02
        while time.thread_time() < until_s:
            pass

    def shown() -> float:
        (family,) = precedence.collect()
        return float(family.samples[0].value)

    async def serve() -> None:
        precedence.start()
        with precedence.loading(), precedence.loading():
            assert (policy(), shown()) == (first, 1.0)
        assert (policy(), shown()) == (ordinary, 0.0)
        await until(first, lambda: None)
        with precedence.loading():
            assert policy() == first
        assert (policy(), shown()) == (first, 1.0)
        assert await asyncio.to_thread(policy) == os.SCHED_OTHER
        child = subprocess.run(
            [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"], capture_output=True, check=True
        )
        assert int(child.stdout) == os.SCHED_OTHER
        await until(ordinary, work)
        assert shown() == 0.0
        await until(first, lambda: None)
        precedence.stop()
        assert (policy(), shown()) == (ordinary, 0.0)

    precedence = LoopPrecedence(real_time=True)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, serve()).result()


THREADS_OF_A_REAL_TIME_LOOP = """
import os, threading
from concurrent.futures import ThreadPoolExecutor
from nearcast.serving.precedence import give_way_to_loop, yield_to_serving

os.nice(5)
os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
for prepare in (lambda: None, give_way_to_loop, yield_to_serving):
    with ThreadPoolExecutor(1, initializer=prepare) as thread:
        print(thread.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result())
"""


@on_linux
@pytest.mark.skipif(not is_granted(), reason="the system grants no real-time priority")
def test_the_niceness_of_an_operator_reaches_the_threads_of_a_real_time_loop() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    told = subprocess.run([sys.executable, "-c", THREADS_OF_A_REAL_TIME_LOOP], capture_output=True, check=True)
    assert [int(line) for line in told.stdout.split()] == [0, min(19, own + 5 + NICENESS), min(19, own + 5)]


@on_linux
def test_what_an_operator_has_chosen_stays() -> None:
    async def serve() -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        precedence = LoopPrecedence(real_time=True)
        precedence.start()
        precedence.stop()
        assert policy() == os.SCHED_BATCH

    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, serve()).result()
